"""Work of unequal size against `transformers.generate`, on the same weights, EOS disabled.

Mixed lengths: 64 requests of 16 to 256 prompt tokens that want 8 to 256 new ones. The peer takes
them 32 at a time, padded, in the order of their wishes (its best), and each batch goes on until its
last request has enough; what is asked for counts, not what a batch draws beyond it.

Best of 8: eight answers of 32 tokens to each of 64 prompts of 256, the peer by
`num_return_sequences=8`, which computes a prompt eight times, 64 sequences at a time.

The peer runs before each of our rounds; the figure is the ratio of medians. Allocator as the
process has it: `make bench` sets the same for both.

    pytest benchmarks/generation/test_workloads.py --benchmark-columns=median,rounds
    BENCH_DTYPE=float32 pytest ...      both sides, where a CPU has no bf16 instructions
"""

import os
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llama2rt.checkpoint import hf
from llama2rt.generate import Engine, SamplingOptions
from llama2rt.model import Llama, LlamaConfig

ROUNDS = 3
DTYPE = getattr(torch, os.environ.get("BENCH_DTYPE", "bfloat16"))
SHAPES = {
    "24M": LlamaConfig(dim=288, layers=6, heads=6, kv_heads=6, ffn_hidden=768, context=1024),
    "134M": LlamaConfig(dim=768, layers=12, heads=12, kv_heads=12, ffn_hidden=2048, context=1024),
}
TOKENIZER = SimpleNamespace(bos=1, eos=-1, stop_ids=(-1,), vocab_size=32000, decode=lambda ids: "")


@pytest.fixture(params=SHAPES)
def sides(request, tmp_path):
    """(name of the shape, our model, theirs), in `DTYPE`."""
    model = Llama(SHAPES[request.param], dtype=DTYPE).initialize(seed=0)
    hf.save(model, None, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=DTYPE).eval()
    theirs.generation_config.eos_token_id = None
    return request.param, model, theirs


def padded(prompts):
    """(ids, mask) int64 [B, longest], padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def measure(benchmark, capsys, what, tokens, run_ours, run_theirs):
    seconds = []

    def timed():
        started = time.perf_counter()
        run_theirs()
        seconds.append(time.perf_counter() - started)

    benchmark.pedantic(run_ours, setup=timed, rounds=ROUNDS, warmup_rounds=1)
    peer, median = statistics.median(seconds[1:]), benchmark.stats.stats.median
    row = {
        "tokens_per_s": tokens / median,
        "transformers_tokens_per_s": tokens / peer,
        "ratio": peer / median,
        "threads": torch.get_num_threads(),
    }
    benchmark.extra_info.update(row)
    with capsys.disabled():
        print(
            f"\n{what}: {row['tokens_per_s']:.0f} tokens/s, transformers "
            f"{row['transformers_tokens_per_s']:.0f}, ratio {row['ratio']:.2f} "
            f"({row['threads']} threads)"
        )


def test_mixed_lengths(benchmark, capsys, sides):
    shape, model, theirs = sides
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 32000, n) for n in rng.integers(16, 257, 64)]
    wishes = rng.integers(8, 257, 64)
    engine = Engine(model, TOKENIZER)

    def run_ours():
        drawn = 0
        with engine.session() as session:
            for prompt, wish in zip(prompts, wishes.tolist(), strict=True):
                session.add(prompt.tolist(), SamplingOptions(max_tokens=wish))
            while session.unfinished:
                drawn += sum(len(update.tokens) for update in session.step())
        assert drawn == wishes.sum()

    def run_theirs():
        order = np.argsort(wishes, kind="stable")
        for part in np.array_split(order, 2):
            ids, mask = padded([prompts[i] for i in part])
            theirs.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=int(wishes[part].max()),
                pad_token_id=0,
            )

    measure(
        benchmark, capsys, f"64 mixed lengths, {shape}", int(wishes.sum()), run_ours, run_theirs
    )


@pytest.mark.parametrize("sides", ["24M"], indirect=True)
def test_best_of_8(benchmark, capsys, sides):
    shape, model, theirs = sides
    prompts = torch.randint(3, 32000, (64, 256), generator=torch.Generator().manual_seed(0))
    engine = Engine(model, TOKENIZER)

    def run_ours():
        assert len(engine.generate(prompts.tolist(), n=8, max_tokens=32)) == 512

    def run_theirs():
        for part in prompts.split(8):
            out = theirs.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                top_k=0,
                num_return_sequences=8,
                max_new_tokens=32,
                pad_token_id=0,
            )
            assert out.shape == (64, 256 + 32)

    measure(benchmark, capsys, f"best of 8, {shape}", 512 * 32, run_ours, run_theirs)
