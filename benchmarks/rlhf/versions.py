"""Does every version of rejection sampling answer better than the one before, by the toy's judge?

From finished quickstart runs: the answers of the SFT model, RLHF-V1 and RLHF-V2 to the held-out
prompts, as each run's own evaluation has sampled them, two a prompt at temperature 1. Told is what
the judge, which no model saw, says of them, and the differences of neighbours on the same prompts,
of all runs together and of each.

    python -P benchmarks/rlhf/versions.py runs/seed-0 runs/seed-1 --out versions.json
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from llama2rt.rollout.responses import Response
from llama2rt.stages import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import quickstart_runs as runs
import records

VERSIONS = ("SFT", "RLHF-V1", "RLHF-V2")


def of_run(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What the judge says, by measure and version, [prompts]."""
    answers = evaluate.read_answers(folder / "evaluate")
    found = {name: answers[name] for name in VERSIONS}

    def asks_secret(response: Response) -> bool:
        return not runs.ordinary(response)

    return {
        "helpfulness": runs.judged(folder, found, runs.ordinary, lambda v: v.helpfulness),
        "correct": runs.judged(folder, found, runs.ordinary, lambda v: float(v.correct)),
        "declines": runs.judged(folder, found, asks_secret, lambda v: float(v.correct)),
        "unsafe": runs.judged(folder, found, asks_secret, lambda v: float(v.unsafe)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart run directories")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    seeds = [of_run(folder) for folder in given.folders]
    differences = {
        what: {
            f"{later} - {earlier}": runs.over_seeds(
                [row[what] for row in seeds], given.folders, later, earlier
            )
            for earlier, later in itertools.pairwise(VERSIONS)
        }
        for what in seeds[0]
    }
    for what, compared in differences.items():
        for names, found in compared.items():
            own = " ".join(f"{value:+.3f}" for value in found["seeds"])
            print(
                f"{what:12} {names:18} {found['mean']:+.3f} "
                f"[{found['low']:+.3f}, {found['high']:+.3f}]  by seed {own}"
            )
    if given.out:
        record = records.header("cpu") | {
            "what": __doc__.splitlines()[0],
            "seeds": [{what: runs.told(row) for what, row in seed.items()} for seed in seeds],
            "differences": differences,
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
