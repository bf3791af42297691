"""The alignment tax of a plan's versions: accuracy and calibration error on five local tasks.

    pip install 'llama2rt[lm-eval]'
    python -P benchmarks/evaluation/alignment_tax.py runs/quickstart --data DATA --out FILE

`llama2rt evaluate RUN --tasks FOLDER` on every version from SFT on: the right one of four
solutions to GSM8K and of four results, the harmless one of two answers (HH), the next line and the
last word of a line of TinyShakespeare. DATA is ../shared/data. The record has each version's
figures and its difference from SFT with the paired interval. What a small model of another world
knows of these is next to nothing: what is measured is whether training on preferences moved what
was there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import records
from local_tasks import WITH_OPTIONS, write_tasks

from llama2rt import atomic


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(WITH_OPTIONS, given.data, folder, given.documents)
        begin = time.perf_counter()
        command = [sys.executable, "-P", "-m", "llama2rt.cli", "evaluate", str(given.run)]
        said = subprocess.run(
            [*command, "--tasks", str(folder), "--json"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    found = json.loads(said)
    record = {
        **records.header("cpu"),
        "documents": given.documents,
        "seconds": round(time.perf_counter() - begin, 1),
        "models": list(found["models"]),
        "tasks": rounded({row["task"]: row["versions"] for row in found["tasks"]}),
        "samples": {row["task"]: row["samples"] for row in found["tasks"]},
    }
    atomic.write(given.out, json.dumps(record, indent=1) + "\n")
    for task, versions in record["tasks"].items():
        print(task)
        for version, row in versions.items():
            print(f"  {version}: {row}")


if __name__ == "__main__":
    main()
