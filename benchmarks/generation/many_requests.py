"""Ten thousand random requests of one session, each against the answer that it gets alone.

What they are is in tests/helpers/random_requests.py: random lengths, options, stops, seeds and
shared beginnings; they arrive in bursts, one in six is aborted at a random moment, and sixteen
sequences share 64 pages of 4 tokens, so that they are preempted and computed again. The model is
tiny: width 64, 2 layers, 4 heads over 2, vocabulary 330, context 96; its weights are random, but so
large that it prefers some tokens to others. Exits 1, and says why, unless

- every answer, greedy or sampled, has the tokens, text and end that its request gets in an engine
  of the same weights where nothing else runs, and every aborted one is a beginning of it. A greedy
  answer may part at a token where the two largest logits are within 1e-4;
- in fp32 log-probabilities are within 1e-4, and every token is also what its request draws from one
  forward pass over prompt and answer (there ties are counted: logits, or the uniform number from a
  border, within 1e-4);
- something was preempted, and every page is free at the end and can be given out again, once;
- resident memory is at a quarter, half, three quarters and the end of the requests no more than 1
  MiB larger than after the first tenth: some 115 bytes a request. Answers are kept in a file.

    python benchmarks/generation/many_requests.py --weights same int8 --speculate 0 3 --out r.json
    python benchmarks/generation/many_requests.py --requests 500

Each setting runs in a process of its own: memory that another has freed would hide growth. Its row
is recorded with its `failures`. In bfloat16 rounding does choose between tokens: that fails, and
`parted` says how many answers differ and at what gaps (smallest, median, largest); of the first
ones also where, and how near a border between the two tokens a sampled one's uniform number was.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.extend(
    str(Path(__file__).parents[2] / f"{room}/helpers") for room in ("benchmarks", "tests")
)

import random_requests
import records
import request_checks

from llama2rt.generate import Engine

MOST_GROWTH = 2**20
"""bytes"""
MOST_APART = 1e-4
"""of log-probabilities, in fp32"""
PAGE_SIZE = 4
SHARES = (0.1, 0.25, 0.5, 0.75, 1)
"""of the requests have ended when memory is measured; the first is the end of the warm-up"""


@dataclass(frozen=True)
class Settings:
    """Of one run."""

    requests: int
    seed: int
    dtype: str
    weights: Any
    speculate: int


def one_run(given: Settings) -> dict[str, Any]:
    """The row of a record, in this process; its `failures` say what is wrong."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dtype = getattr(torch, given.dtype)
        model, tokenizer = random_requests.model_and_tokenizer(Path(folder), dtype)
    shared: dict[str, Any] = {"page_size": PAGE_SIZE, "weights": given.weights}
    tight = random_requests.FewPages(model, tokenizer, speculate=given.speculate, **shared)
    asked = random_requests.draw(given.requests, model.config.vocab_size, given.seed)
    begun = time.process_time()
    ran = random_requests.run(
        tight, asked, most_waiting=24, measure_at=[int(s * len(asked)) for s in SHARES]
    )
    seconds = [time.process_time() - begun]
    equal, parted = request_checks.compare(Engine(model, tokenizer, **shared), asked)
    seconds.append(time.process_time() - begun)
    resident = ran.pop("resident")
    held = list(resident.values())
    growth = max(held) - held[0]
    row = {
        **asdict(given),
        "path": tight.runner.path,
        "aborted": sum(one.finish_reason == "abort" for one in asked),
        "aborted_with_tokens": sum(
            one.finish_reason == "abort" and len(one.tokens) > 0 for one in asked
        ),
        "greedy": sum(one.options.temperature == 0 for one in asked),
        **ran,
        **equal,
        "ties": sum(one.tie for one in parted),
        "parted": different(parted),
        "resident_mib": {ended: round(each / 2**20, 3) for ended, each in resident.items()},
        "growth_mib": round(growth / 2**20, 3),
        "cpu_seconds": {"together": round(seconds[0], 1), "alone": round(seconds[1], 1)},
        "forward_pass": None,
    }
    row["failures"] = failures(row)
    if growth > MOST_GROWTH:
        row["failures"].append(f"memory grew by {growth} bytes")
    if dtype == torch.float32:
        try:
            row["forward_pass"] = request_checks.verify(tight, asked)
        except AssertionError as error:
            row["failures"].append(f"a forward pass of its own: {error}")
    return row


def different(parted: list[request_checks.Parted]) -> dict[str, Any]:
    """How many answers differ, at what gaps the greedy ones part, and the first of them."""
    greedy = [one for one in parted if one.greedy]
    gaps = sorted(one.gap for one in greedy if one.gap is not None)
    return {
        "greedy": len(greedy),
        "sampled": len(parted) - len(greedy),
        "greedy_gap": [gaps[0], gaps[len(gaps) // 2], gaps[-1]] if gaps else None,
        "first": [asdict(one) for one in parted[:5]],
    }


def failures(row: dict[str, Any]) -> list[str]:
    """What is wrong in the answers and the pages of a row."""
    wrong = []
    if others := row["parted"]["greedy"] + row["parted"]["sampled"] - row["ties"]:
        wrong.append(f"{others} answers are not those that their requests get alone")
    if row["pages_leaked"]:
        wrong.append(f"{row['pages_leaked']} pages leaked")
    if not row["preemptions"]:
        wrong.append("nothing was preempted")
    if row["dtype"] == "float32" and row["logprobs_apart"] > MOST_APART:
        wrong.append(f"log-probabilities differ by {row['logprobs_apart']}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000, help="at least 10")
    parser.add_argument("--weights", nargs="+", default=["same"], choices=["same", "int8"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--speculate", nargs="+", type=int, default=[0], help="guesses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.requests < 10:
        parser.error(f"--requests: expected at least 10, got {given.requests}")
    torch.set_num_threads(1)  # as the runs, for the record
    found = records.header("cpu") | {
        "what": "random requests of one session, each against the answer that it gets alone",
        "command": f"python benchmarks/generation/many_requests.py --requests {given.requests} "
        f"--weights {' '.join(given.weights)} --dtype {given.dtype} "
        f"--speculate {' '.join(map(str, given.speculate))} --seed {given.seed}",
        "model": "random weights: width 64, 2 layers, 4 heads over 2, vocabulary 330, context 96",
        "most_growth_mib": MOST_GROWTH / 2**20,
        "rows": [],
    }
    for each in itertools.product(given.weights, given.speculate):
        settings = Settings(given.requests, given.seed, given.dtype, *each)
        # One that dies is an error here, where a Pool would wait for it for ever.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found["rows"].append(process.submit(one_run, settings).result())
        print(json.dumps(found["rows"][-1], indent=1), flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = [failure for row in found["rows"] for failure in row["failures"]]
    for failure in wrong:
        print(failure, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
