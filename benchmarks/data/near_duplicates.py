"""CPU time and memory of the near-duplicate filter on synthetic comparisons, of which some are
planted copies with a few words changed; with --peer, those of datasketch's own index on the same.

    python benchmarks/data/near_duplicates.py --records 100000 --out results.json

Needs datasketch. Texts are words of a Zipf law, so that unrelated comparisons share common runs.
`planted` copies have at least the threshold's similarity to their original in every part, which is
computed without signatures; `found` of them are left out, `chained` are copies of a copy that was
left out itself and need not be alike what stays. What is left out beyond the planted is `false`.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from llama2rt.data.filters import Filters, Located, keep
from llama2rt.data.near_duplicates import runs
from llama2rt.data.records import Comparison
from llama2rt.data.removed import Removed

VOCABULARY = 30_000
LENGTHS = {"question": 40, "chosen": 80, "rejected": 80}
"""mean words of each part"""
COPIES = 0.05
"""share of records that are copies of an earlier one with words changed"""
CHANGED = 0.05
"""at most this share of the words of each part of a copy"""


def comparisons(count: int, seed: int) -> tuple[list[Comparison], dict[int, int]]:
    """Synthetic records, and of each planted copy which earlier record it copies."""
    random = np.random.default_rng(seed)
    names = np.array([f"w{i}" for i in range(VOCABULARY)])
    weights = 1 / np.arange(10, VOCABULARY + 10)
    cumulative = np.cumsum(weights / weights.sum())

    def words(n: int) -> np.ndarray:
        return names[np.searchsorted(cumulative, random.random(n)).clip(max=VOCABULARY - 1)]

    made: list[list[np.ndarray]] = []
    copies: dict[int, int] = {}
    for index in range(count):
        if index > 100 and random.random() < COPIES:
            original = int(random.integers(index))
            copies[index] = original
            parts = [changed(part, words, random) for part in made[original]]
        else:
            parts = [words(int(random.poisson(mean)) + 5) for mean in LENGTHS.values()]
        made.append(parts)
    texts = [[" ".join(part) for part in parts] for parts in made]
    records = [
        Comparison([{"role": "user", "content": asked}], chosen, rejected)
        for asked, chosen, rejected in texts
    ]
    return records, copies


def changed(part: np.ndarray, words, random: np.random.Generator) -> np.ndarray:
    """The part with a few of its words replaced."""
    copy = part.copy()
    where = random.permutation(len(copy))[: int(random.integers(int(CHANGED * len(copy)) + 1))]
    copy[where] = words(len(where))
    return copy


def similarity(one: Comparison, other: Comparison) -> float:
    """Of the part that is least alike, exactly."""
    found = []
    for of in (lambda c: c.prompt[-1]["content"], lambda c: c.chosen, lambda c: c.rejected):
        mine, theirs = runs(of(one)), runs(of(other))
        found.append(len(mine & theirs) / len(mine | theirs))
    return min(found)


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(records: list[Comparison], least: float) -> set[int]:
    """The indices that the filter leaves out."""
    found = [Located(record, Path("synthetic"), n) for n, record in enumerate(records)]
    kept = keep(Filters(near_duplicates=least), found, Removed())
    return set(range(len(records))).difference(kept)


def peer(records: list[Comparison], least: float) -> set[int]:
    """Those of which datasketch's index holds an earlier one, by signatures of the whole alone."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=least, num_perm=128)
    out = set()
    texts = ([r.prompt[-1]["content"], r.chosen, r.rejected] for r in records)
    hashed = ([f"{i} {run}".encode() for i, t in enumerate(ts) for run in runs(t)] for ts in texts)
    for number, signature in enumerate(MinHash.generator(hashed, num_perm=128)):
        if index.query(signature):
            out.add(number)
        else:
            index.insert(number, signature)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="datasketch's index in place of ours")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records, copies = comparisons(options.records, options.seed)
    before, started = peak_mib(), time.process_time()
    removed = (peer if options.peer else ours)(records, options.threshold)
    cpu_seconds = time.process_time() - started
    alike = {
        index
        for index, original in copies.items()
        if similarity(records[index], records[original]) >= options.threshold
    }
    result = {
        "index": "datasketch.MinHashLSH" if options.peer else "llama2rt",
        "records": len(records),
        "words": sum(LENGTHS.values()),
        "threshold": options.threshold,
        "cpu_seconds": round(cpu_seconds, 1),
        "records_per_cpu_second": round(len(records) / cpu_seconds),
        "peak_mib_added": round(peak_mib() - before),
        "removed": len(removed),
        "planted": len(alike),
        "found": len(alike & removed),
        "chained": sum(copies[index] in removed for index in alike - removed),
        "false": len(removed - alike),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
