"""A hundred thousand malformed and hostile records over all readers.

    python benchmarks/data/fuzz_readers.py --records 100000 --out build/fuzz-readers.json

What they are, and what each file of 500 is checked for, is in tests/helpers/hostile_rows.py: no
exception but InputError, every fault with FILE:LINE, everything that was read valid, nothing
written half. Resident memory is read after the first twenty files, when libraries are loaded and
caches full, and after the last; exit status 1 where it grew by more than a tenth. The same seed
gives the same records.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for _folder in ("benchmarks/helpers", "tests/helpers"):
    sys.path.append(str(Path(__file__).parents[2] / _folder))

A_FILE = 500
WARM_UP = 20
MOST_GROWTH = 0.1


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def main() -> int:
    """Print counts and memory, and write them to --out."""
    import hostile_rows
    import records

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    kinds = list(hostile_rows.BEGIN)
    done = Counter[str]()
    reasons = Counter[str]()
    files, begin, slowest, start = -(-given.records // A_FILE), time.process_time(), 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(files):
            folder = Path(name) / str(number)
            folder.mkdir()
            count = min(A_FILE, given.records - number * A_FILE)
            # Of the formats most are of comparisons.
            kind = draw.choice([*kinds, "comparison", "comparison", "comparison"])
            before = time.process_time()
            found = hostile_rows.check(folder, kind, count, draw)
            slowest = max(slowest, time.process_time() - before)
            done.update(records=found.records, valid=found.good, faults=found.faults)
            done[f"records of {kind}s"] += found.records
            reasons += found.reasons
            (folder / f"{kind}.jsonl").unlink()
            if number == min(WARM_UP, files) - 1:
                start = resident()
    end = resident()
    result = {
        "what": "malformed and hostile records over all readers",
        "command": f"python benchmarks/data/fuzz_readers.py --records {given.records} "
        f"--seed {given.seed}",
        **done,
        "exceptions_or_faults_without_file_and_line": 0,  # the first one would have ended this
        "kinds_of_refusal": len(reasons),
        "cpu_seconds": round(time.process_time() - begin, 1),
        "slowest_file_cpu_seconds": round(slowest, 2),
        "resident_mib_at_start": round(start / 2**20, 1),
        "resident_mib_at_end": round(end / 2**20, 1),
    }
    print(json.dumps(result, indent=1))
    for reason, count in reasons.most_common(25):
        print(f"{count:7} {reason}", file=sys.stderr)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(records.header("cpu") | result, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(end > start * (1 + MOST_GROWTH))


if __name__ == "__main__":
    sys.exit(main())
