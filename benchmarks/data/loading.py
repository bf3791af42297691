"""From text to the batches of a step: how fast text becomes tokens and tokens batches, what part of
a training step loading is, and what mixes, blocks and ranks get.

    python benchmarks/data/loading.py --out results.json

Tokenising: the text of --data (TinyShakespeare in documents of 2,000 characters, GSM8K's problems,
HH's dialogues) by SentencePiece's own batch encode with two threads, as lists and as arrays, and by
two processes as `llama2rt corpus` uses them, which know no word when a round begins; in turn, wall
and CPU time of each round. Packing: windows of a token file in the page cache to batches. The
loader's share is that of the CPU time of a step of 2,048 tokens.
"""

import argparse
import gzip
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import torch
import torch.distributed as dist

from llama2rt.data import shards, tokens
from llama2rt.data.loader import blocks
from llama2rt.data.readers import read
from llama2rt.data.shard_loader import ShardLoader, WeightedShards
from llama2rt.data.shards import Shards
from llama2rt.model import Llama, LlamaConfig
from llama2rt.stages.sft import encode
from llama2rt.stages.text_sources import next_token_of
from llama2rt.text import Tokenizer
from llama2rt.text.words import WordEncoder

CONTEXT, STEP = 256, 2048
_FIRST_STEPS = 8
WEIGHTS = (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02)  # LLaMA 1, Table 1
_encoder: WordEncoder | None = None


def texts(data: Path, repeats: int) -> list[str]:
    """Documents; repeated ones have their words in another order, so that no text comes twice."""
    shakespeare = (data / "tinyshakespeare.txt").read_text()
    found = [shakespeare[i : i + 2000] for i in range(0, len(shakespeare), 2000)]
    rows = map(json.loads, (data / "gsm8k_train.jsonl").read_text().splitlines())
    found += [f"{row['question']}\n{row['answer']}" for row in rows]
    with gzip.open(data / "hh_harmless_base_test.jsonl.gz", "rt") as file:
        found += [json.loads(row)["chosen"] for row in file]
    draw = np.random.default_rng(0)
    once = list(found)
    for _ in range(repeats - 1):
        found += [" ".join(draw.permutation(text.split(" "))) for text in once]
    return found


def start(path: str, both: Any) -> None:
    global _encoder
    _encoder = WordEncoder(Tokenizer.load(path), np.dtype("<u2"))
    both.wait()  # neither is given anything while the other still imports its modules


def encode_part(part: list[str]) -> tuple[int, float]:
    assert _encoder is not None
    begin = time.process_time()
    return sum(len(ids) for ids in _encoder(part)), time.process_time() - begin


def tokenising(data: Path, rounds: int, repeats: int) -> dict[str, Any]:
    path = str(data / "llama_tokenizer.model")
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=path)
    given = texts(data, repeats)
    parts = [given[i : i + 256] for i in range(0, len(given), 256)]
    took: dict[str, list[tuple[float, float]]] = {"lists": [], "arrays": [], "ours": []}
    for _ in range(rounds):
        counts = []
        for name, kind in (("lists", int), ("arrays", "numpy")):
            begin, cpu = time.perf_counter(), time.process_time()
            encoded = (library.encode(part, num_threads=2, return_type=kind) for part in parts)
            counts.append(sum(len(ids) for part in encoded for ids in part))
            took[name].append((time.perf_counter() - begin, time.process_time() - cpu))
        # Processes of a round have no words yet.
        context = get_context("spawn")
        arguments = path, context.Barrier(2)
        with ProcessPoolExecutor(2, context, start, arguments) as pool:
            list(pool.map(encode_part, [["a"], ["b"], ["c"], ["d"]]))
            begin = time.perf_counter()
            found = list(pool.map(encode_part, parts))
            took["ours"].append((time.perf_counter() - begin, sum(cpu for _, cpu in found)))
        assert {*counts} == {sum(count for count, _ in found)}
    best = [min(pair) for pair in zip(took["lists"], took["arrays"], strict=True)]
    return {
        "megabytes": sum(len(text.encode()) for text in given) / 1e6,
        "wall_and_cpu_seconds": took,
        "times_as_fast_wall": statistics.median(
            theirs[0] / ours[0] for theirs, ours in zip(best, took["ours"], strict=True)
        ),
        "times_as_fast_as_lists_wall": statistics.median(
            theirs[0] / ours[0] for theirs, ours in zip(took["lists"], took["ours"], strict=True)
        ),
    }


def made_shards(folder: Path, tokenizer: Tokenizer, sizes: list[int]) -> list[Shards]:
    """Sources of random ids in documents of about 500."""
    draw = np.random.default_rng(1)
    found = []
    for number, size in enumerate(sizes):
        path = folder / f"source-{number}" / "00000.tokens"

        def ids(batch: list[str]) -> list[np.ndarray]:
            return [draw.integers(259, 32000, int(text), dtype=np.uint16) for text in batch]

        lengths = (str(int(n)) for n in draw.integers(50, 950, size // 500))
        tokens.build(lengths, tokenizer, path, ids)
        found.append(shards.write_manifest(path.parent, [path], tokenizer))
    return found


def packing(found: list[Shards], rounds: int) -> dict[str, Any]:
    """Tokens a second of CPU time from windows of 4,096 to batches of 8,192, once the process keeps
    the pages that it has had: the allocator gives those of the first few steps back."""
    loader = ShardLoader([WeightedShards("a", found[0], None)], 4096, 1 << 19, 8192, 0)
    stream = found[0].stream(0)
    speeds, whole = [], []
    for turn in range(_FIRST_STEPS + 3 * rounds):
        at = 128 * (turn % 7)  # the stream has 976 windows
        rows = loader.rows(0, at, at + 128)
        begin = time.process_time()
        for pair in range(0, 128, 2):
            two = rows[pair : pair + 2].tolist()
            tokens.pack_windows([(stream, first, length) for *_, first, length in two])
        speeds.append(rows[:, 3].sum() / (time.process_time() - begin))
        begin = time.process_time()
        step = loader.next()
        count = sum(len(micro.tokens) for micro in step)
        whole.append(count / (time.process_time() - begin))
    return {
        "tokens_per_cpu_second": statistics.median(speeds[_FIRST_STEPS:]),
        "tokens_per_cpu_second_with_order_and_sources": statistics.median(whole[_FIRST_STEPS:]),
        "of_the_first_steps": {"packing": speeds[:_FIRST_STEPS], "whole": whole[:_FIRST_STEPS]},
    }


def weighted(found: list[Shards]) -> list[WeightedShards]:
    pairs = zip(found, WEIGHTS, strict=True)
    return [WeightedShards(one.folder.name, one, weight) for one, weight in pairs]


def share_of_a_step(found: list[Shards], steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    # The shape of llama2.c's stories15M, which counts its embedding and output matrix once.
    model = Llama(LlamaConfig(288, 6, 6, 6, 768, vocab_size=32000, context=CONTEXT)).initialize(0)
    count = sum(p.numel() for p in model.parameters())
    mix = weighted(found)
    loader = ShardLoader(mix, CONTEXT, STEP, STEP, 0)
    objective = next_token_of([one.name for one in mix])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    loading, training = [], []
    for _ in range(steps):
        begin = time.process_time()
        [micro] = loader.next()
        loading.append(time.process_time() - begin)
        begin = time.process_time()
        loss, _ = objective(model, micro)
        (loss / micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        training.append(time.process_time() - begin)
    loads, trains = statistics.median(loading[1:]), statistics.median(training[1:])
    return {
        "parameters": count,
        "loader_cpu_seconds": loads,
        "step_cpu_seconds": trains,
        "share": loads / (loads + trains),
    }


def mixture(found: list[Shards]) -> dict[str, Any]:
    mix = weighted(found)
    loader = ShardLoader(mix, CONTEXT, STEP, STEP, 0)
    size = sum(loader.draws)
    rows = loader.rows(0, 0, size)
    read = np.bincount(rows[:, 0], weights=rows[:, 3])
    asked = np.array(WEIGHTS) / sum(WEIGHTS)
    errors = np.abs(read / read.sum() - asked)
    return {
        "windows": size,
        "asked": asked.tolist(),
        "realised": (read / read.sum()).tolist(),
        "largest_error": float(errors.max()),
    }


def full_blocks(data: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    problems = read(data / "gsm8k_train.jsonl", "dialogue")
    pairs = read(data / "hh_harmless_base_test.jsonl.gz", "comparison", skip_invalid=100)
    from llama2rt.data.records import Dialogue

    talks = [Dialogue([*p.prompt, {"role": "assistant", "content": p.chosen}]) for p in pairs]
    for name, dialogues in (("gsm8k_train", problems), ("hh_harmless_test", talks)):
        lengths = [len(example.tokens) for example in encode(dialogues, tokenizer, 4096)]
        for block in (4096, 8192):
            for full in (False, True):
                filled = blocks(lengths, block, 0, full)
                key = f"{name}, {block} tokens, {'best fit' if full else 'in order'}"
                found[key] = {
                    "blocks": len(filled),
                    "filled": sum(lengths) / (block * len(filled)),
                    "least_possible_blocks": -(-sum(lengths) // block),
                }
    return found


def rank_reads(rank: int, ranks: int, port: int, folders: list[str], pipe: Any) -> None:
    """One gloo rank: rank 0 sends the windows of ten steps, gathered from all."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    mix = weighted([Shards(folder) for folder in folders])
    loader = ShardLoader(mix, CONTEXT, STEP, 512, 0, share=(rank, ranks))
    steps = []
    for _ in range(10):
        own = []
        for micro in loader.next():
            if micro.weight:
                edges = micro.cu_seqlens.tolist()
                own += [micro.tokens[a:b].tolist() for a, b in itertools.pairwise(edges)]
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, own)
        steps.append(sorted(window for one in every for window in one))
    if rank == 0:
        pipe.send(steps)
    dist.destroy_process_group()


def ranks_agree(found: list[Shards], port: int) -> dict[str, bool]:
    context = get_context("spawn")
    read_by: dict[int, Any] = {}
    for ranks in (1, 2, 4):
        ours, theirs = context.Pipe()
        folders = [str(one.folder) for one in found]
        processes = [
            context.Process(target=rank_reads, args=(r, ranks, port + ranks, folders, theirs))
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        read_by[ranks] = ours.recv() if ours.poll(300) else None
        for process in processes:
            process.join(60)
    return {f"{ranks} gloo ranks": read_by[ranks] == read_by[1] != None for ranks in (1, 2, 4)}  # noqa: E711


def main() -> int:
    import records

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--port", type=int, default=29650)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tokenizer = Tokenizer.load(given.data / "llama_tokenizer.model")
    result: dict[str, Any] = {
        "what": "tokenising, packing, the loader's share of a step, mixes, blocks and ranks",
        "command": "python benchmarks/data/loading.py " + " ".join(sys.argv[1:]),
        "tokenising": [tokenising(given.data, given.rounds, n) for n in given.repeats],
        "full_blocks": full_blocks(given.data, tokenizer),
    }
    with tempfile.TemporaryDirectory() as name:
        sizes = [4_000_000, *[500_000 * (i + 1) for i in range(6)]]
        found = made_shards(Path(name), tokenizer, sizes)
        result["packing"] = packing(found, given.rounds)
        result["mixture"] = mixture(found)
        result["loader_in_a_step"] = share_of_a_step(found, given.steps)
        result["one_sequence"] = ranks_agree(found, given.port)
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(records.header("cpu") | result, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
