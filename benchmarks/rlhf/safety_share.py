"""`llama2rt safety-study` on the quickstart's world: chat models by their share of safety data.

For each quickstart folder: its base model, its reward models, helpful demonstrations by hurried
annotators, and safety demonstrations by careful ones, who keep every secret. The judge that no
model saw reads the answers to held-out prompts; borderline ones have a secret in sight and ask for
something else.

    python -P benchmarks/rlhf/safety_share.py runs/seed-0 runs/seed-1 --work W --out record.json
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt import atomic
from llama2rt.data import readers
from llama2rt.data.records import Dialogue
from llama2rt.pipeline import safety_study
from llama2rt.quickstart import careful_world as world
from llama2rt.quickstart import corpus

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

COUNTS = {"safety": 300, "borderline": 200, "ordinary": 300}
KEYS = ("safety_score", "helpfulness_score", "violation", "false_refusal")


def demonstrations(kind: str, count: int, seed: int) -> list[Dialogue]:
    """Of one kind: hurried answers to helpful questions, safe ones to requests for the secret."""
    rng = random.Random(f"{seed}:{kind}:share")
    stream = corpus.conversations(kind, "train", seed, "safety-share")
    found = []
    for _ in range(count):
        conversation = next(stream)
        way = "careful" if kind == "safety" else "none"
        text = world.demonstration(conversation, way, rng)
        answer = {"role": "assistant", "content": text}
        found.append(Dialogue([*conversation.messages, answer]))
    return found


def study(folder: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The study's numbers for one quickstart folder."""
    began = time.process_time()
    seed: int = json.loads((folder / "manifest.json").read_text())["seed"]
    work.mkdir(parents=True, exist_ok=True)
    for kind, count in (("helpfulness", given.helpful), ("safety", given.safe)):
        readers.write(work / f"{kind}.jsonl", demonstrations(kind, count, seed))
    prompts, keys = world.prompts("share-evaluation", "evaluation", seed, COUNTS)
    readers.write(work / "held_out.jsonl", prompts)
    atomic.write(work / "keys.json", json.dumps({i: key.to_json() for i, key in keys.items()}))
    batch = len(list(folder.glob("reward-safety-*/model/config.json")))
    train = {"lr": 1e-3, "eps": 1e-8, "warmup_ratio": 0.05, "checkpoint_every": 0}
    recipe = safety_study.SafetyStudyRecipe.model_validate(
        {
            "init": folder / "pretrain" / "model",
            "helpful": [work / "helpfulness.jsonl"],
            "safe": [work / "safety.jsonl"],
            "defaults": {"sft": {"batch_size": 32, "epochs": 1, "train": train}},
            "rewards": {
                kind: folder / f"reward-{kind}-{batch}" / "model"
                for kind in ("helpfulness", "safety")
            },
            "data": [work / "held_out.jsonl"],
            "sampling": {"max_tokens": 56},
            "judge": {
                "python": "llama2rt.quickstart.evaluation:safety_of",
                "files": [work / "keys.json"],
            },
            "seeds": [seed],
        }
    )
    safety_study.run(recipe, work / "study", resume=True)
    found = json.loads((work / "study" / "report.json").read_text())
    return {
        "seed": seed,
        "shares": found["safety_study"],
        "cpu_s": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart run directories")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--helpful", type=int, default=3_000, help="helpful demonstrations")
    parser.add_argument(
        "--safe", type=int, default=1_000, help="safety demonstrations, all of them"
    )
    given = parser.parse_args()
    rows = [study(folder, given.work / folder.name, given) for folder in given.folders]
    means = []
    for shares in zip(*(row["shares"] for row in rows), strict=True):
        own = {key: [share[key]["mean"] for share in shares] for key in KEYS}
        means.append(
            {"share": shares[0]["share"], **{k: float(np.mean(v)) for k, v in own.items()}}
        )
        said = ", ".join(f"{key} {np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for key, v in
                         own.items())  # fmt: skip
        print(f"{shares[0]['name']:6} {said}", flush=True)
    if given.out:
        settings = {"helpful": given.helpful, "safe": given.safe}
        record = records.header("cpu") | {"what": __doc__.splitlines()[0], "settings": settings}
        given.out.write_text(json.dumps(record | {"means": means, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
