"""Online against offline preference learning, InfoNCA against DPO, and the length penalty, measured
on a quickstart's models by the judge that none of them has seen.

One study of policies (`llama2rt study`), each variant from several seeds, all on the same held-out
prompts:

- online DPO: three iterations, best against worst of 8
- offline DPO, first policy's samples: as many prompts and steps at once, the same reward models
- offline DPO, annotators: as many of the annotators' comparisons, as many steps
- InfoNCA, K = 8: online as DPO is, of all answers
- length penalty: online DPO whose rewards lose some for each character

    python -P benchmarks/rlhf/online_preferences.py runs/quickstart --runs runs/online --out FILE
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.data import readers
from llama2rt.pipeline import study

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

EPOCHS, ITERATIONS = 2, 3


def some_comparisons(folder: Path, count: int, seed: int, path: Path) -> Path:
    """`count` of the annotators' comparisons of the chat model's answers, in a file at `path`."""
    found = [
        comparison
        for kind in ("helpfulness", "safety")
        for comparison in readers.read(
            folder / "annotate-1" / f"{kind}-training.jsonl", "comparison"
        )
    ]
    drawn = np.random.default_rng(seed).permutation(len(found))[:count]
    readers.write(path, [found[i] for i in sorted(drawn)])
    return path


def policies(folder: Path, given: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The variants. Online, iteration t trains on t batches: 1 + 2 + 3 batches, twice each, are as
    many steps as four epochs over all three."""
    prompts = given.prompts
    passes = EPOCHS * (ITERATIONS + 1) // 2
    once = {"iterations": 1, "prompts_per_iteration": ITERATIONS * prompts, "epochs": passes}
    scratch.mkdir(parents=True, exist_ok=True)
    said = some_comparisons(folder, ITERATIONS * prompts, 0, scratch / "annotators.jsonl")
    annotators = {
        "stage": "offline",
        "init": folder / "sft" / "model",
        "data": [said],
        "held_out": 0,
        "batch_size": given.batch_size,
        "epochs": passes,
        "train": train(given.lr),
    }
    found: list[dict[str, Any]] = [
        {"name": "online DPO", "stage": "dpo"},
        {"name": "offline DPO, first policy", "stage": "dpo", **once},
        {"name": "offline DPO, annotators", **annotators},
        {"name": "InfoNCA, K = 8", "stage": "dpo", "kind": "infonca"},
        {"name": "length penalty", "stage": "dpo", "length_penalty": given.length_penalty},
    ]
    return [one for one in found if given.only is None or one["name"] in given.only]


def train(lr: float) -> dict[str, Any]:
    """The quickstart's settings of DPO."""
    return {"lr": lr, "eps": 1e-8, "micro_tokens": 4096, "checkpoint_every": 0}


def recipe(folder: Path, given: argparse.Namespace) -> study.StudyRecipe:
    rewards = {k: folder / f"reward-{k}-2" / "model" for k in ("helpfulness", "safety")}
    sampling = {"max_tokens": 56}
    online = {
        "init": folder / "sft" / "model",
        "rewards": rewards,
        "data": [folder / "data" / "training.jsonl"],
        "iterations": ITERATIONS,
        "prompts_per_iteration": given.prompts,
        "samples": 8,
        "sampling": sampling,
        "batch_size": given.batch_size,
        "epochs": EPOCHS,
        "train": train(given.lr),
    }
    compared = {
        "reference": folder / "sft" / "model",
        "versions": {"SFT": folder / "sft" / "model"},
        "data": [folder / "data" / "evaluation.jsonl"],
        "rewards": rewards,
        "sampling": sampling,
        "samples": given.samples,
        "judge": {
            "python": "llama2rt.quickstart.evaluation:worth",
            "files": [folder / "judge" / "keys.json"],
        },
    }
    return study.StudyRecipe.model_validate(
        {
            "seeds": given.seeds,
            "defaults": {"dpo": online, "evaluate": compared},
            "policies": policies(folder, given, given.runs.with_name(f"{given.runs.name}-data")),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a quickstart's run directory")
    parser.add_argument("--runs", type=Path, required=True, help="where the study runs; resumes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=500, help="an iteration")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs, or prompts of InfoNCA")
    parser.add_argument("--samples", type=int, default=2, help="answers to a held-out prompt")
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--length-penalty", type=float, default=0.02)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    directory = study.run(recipe(given.folder, given), given.runs, resume=True)
    print((directory / "tables.md").read_text())
    if given.out:
        numbers = json.loads((directory / "report.json").read_text())
        settings = {
            name: getattr(given, name)
            for name in ("seeds", "prompts", "batch_size", "samples", "lr", "length_penalty")
        }
        record = records.header("cpu") | {"what": __doc__.splitlines()[0], "settings": settings}
        record |= {"study": numbers["study"], "policies": numbers["policies"]}
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
