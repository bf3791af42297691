"""Whether pooling earlier versions' best samples recovers a skill that later prompts leave out.

The paper's rhymes, planted: RLHF-V1 of finished quickstart runs learned from prompts of all skills.
The prompts of V2 have none that asks for words backwards. Three ways to V2, all on the best of 4 of
V1's answers to those prompts:

- preceding: fine-tuned from the base model on them alone (the paper up to V3)
- pooled: from the base model on them and V1's own best samples (the paper from V4 on)
- from V1: fine-tuned from V1 instead of the base model, on them alone

Told is how often the judge, which no model saw, finds the answers to held-out prompts correct, on
the skill that is missing and on all others.

A folder may stand there more than once: each time with another seed of sampling and training.

    python -P benchmarks/rlhf/pooling.py runs/seed-0 runs/seed-1 --out pooling.json
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llama2rt.data.readers import read, write
from llama2rt.rollout.responses import Response, read_responses, write_responses
from llama2rt.stages import rejection
from llama2rt.stages.selection import BEST

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import quickstart_runs as runs
import records

# The phrasings of `quickstart.tasks.reversing`, as a question and as a follow-up.
BACKWARDS = re.compile(r"backwards|\breverse\b|from last to first", re.IGNORECASE)
SAMPLE = rejection.sample


def asks_backwards(messages: list[dict[str, str]]) -> bool:
    return BACKWARDS.search(messages[-1]["content"]) is not None


def of_skill(messages: list[dict[str, str]]) -> bool:
    """Whether any turn asks for it: a dialogue whose history does would show it as context."""
    return any(BACKWARDS.search(message["content"]) for message in messages)


def without_the_skill(folder: Path, out: Path, count: int) -> tuple[int, int]:
    """Of the first `count` training prompts, those that do not ask for the skill in
    `out`/prompts.jsonl; V1's best answers to all of them as an earlier version in `out`/v1. Returns
    how many were kept and left out."""
    prompts = read([folder / "data" / "training.jsonl"], "prompt")[:count]
    kept = [prompt for prompt in prompts if not of_skill(prompt.messages)]
    write(out / "prompts.jsonl", kept)
    asked = {prompt.id for prompt in prompts}
    best = read_responses(folder / "rlhf-v1" / "samples" / BEST)
    (out / "v1").mkdir()
    shutil.copy(folder / "rlhf-v1" / "manifest.json", out / "v1")
    write_responses(out / "v1" / "samples" / BEST, [r for r in best if r.prompt.id in asked])
    return len(kept), len(prompts) - len(kept)


def held_out(folder: Path, out: Path) -> Path:
    """All held-out prompts that ask for the skill last, and three times as many ordinary others."""
    prompts = read([folder / "data" / "evaluation.jsonl"], "prompt")
    ordinary = [prompt for prompt in prompts if prompt.kind == "helpfulness"]
    skill = [prompt for prompt in ordinary if asks_backwards(prompt.messages)]
    others = [prompt for prompt in ordinary if not asks_backwards(prompt.messages)]
    write(out / "held_out.jsonl", [*skill, *others[: 3 * len(skill)]])
    return out / "held_out.jsonl"


def version(folder: Path, prompts: Path, out: Path, seed: int, **keys: object) -> Path:
    """RLHF-V2 from V1's answers."""
    settings = {
        "policy": folder / "rlhf-v1" / "model",
        "init": folder / "pretrain" / "model",
        "rewards": runs.rewards(folder),
        "data": [prompts],
        "samples": 4,
        "sampling": runs.SAMPLING,
        "batch_size": 16,
        "epochs": 3,
        "seed": seed,
        "train": runs.TRAIN,
    }
    return rejection.run(rejection.RejectionRecipe.model_validate(settings | keys), out)


def of_seed(
    folder: Path, out: Path, seed: int, count: int
) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """Shares of correct answers by version, [prompts], on the skill and on the others."""
    kept, gone = without_the_skill(folder, out, count)
    prompts, v1 = out / "prompts.jsonl", folder / "rlhf-v1" / "model"
    # All three ask V1 the same with the same random numbers: once is enough.
    drawn: list = []

    def once(*arguments: object) -> object:
        drawn.extend([] if drawn else [SAMPLE(*arguments)])
        return drawn[0]

    rejection.sample = once
    versions = {
        "V1": v1,
        "preceding": version(folder, prompts, out / "preceding", seed),
        "pooled": version(folder, prompts, out / "pooled", seed, earlier=[out / "v1"]),
        "from V1": version(folder, prompts, out / "from-v1", seed, init=v1),
    }
    found = runs.answers(folder, versions, held_out(folder, out), out / "evaluate", seed)
    pooled = json.loads((out / "pooled" / "report.json").read_text())

    def skill(response: Response) -> bool:
        return asks_backwards(response.prompt.messages)

    def others(response: Response) -> bool:
        return runs.ordinary(response) and not skill(response)

    shares = {
        "backwards": runs.judged(folder, found, skill, lambda v: float(v.correct)),
        "other skills": runs.judged(folder, found, others, lambda v: float(v.correct)),
    }
    facts = {"prompts": kept, "left_out": gone, "targets_pooled": pooled["targets"]}
    return shares, facts


def record(seeds: list, facts: list, folders: list[Path], cpu_seconds: float) -> dict:
    """Of the seeds that are done, each with its folder."""
    compared = {
        what: {
            f"{better} - preceding": runs.over_seeds(
                [row[what] for row in seeds], folders, better, "preceding"
            )
            for better in ("V1", "pooled", "from V1")
        }
        for what in seeds[0]
    }
    return records.header("cpu") | {
        "what": __doc__.splitlines()[0],
        "cpu_seconds": round(cpu_seconds, 1),
        "seeds": [
            said | {what: runs.told(row) for what, row in seed.items()}
            for seed, said in zip(seeds, facts, strict=True)
        ],
        "differences": compared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart run directories")
    parser.add_argument("--prompts", type=int, default=2400, help="the first so many")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs.without_drawings()
    begin = time.process_time()
    seeds: list[dict[str, dict[str, np.ndarray]]] = []
    facts: list[dict] = []
    for seed, folder in enumerate(given.folders):
        with tempfile.TemporaryDirectory() as scratch:
            shares, said = of_seed(folder, Path(scratch), seed, given.prompts)
        seeds.append(shares)
        facts.append(said)
        print(folder.name, said)
        for what, by_version in shares.items():
            means = "  ".join(f"{name} {row.mean():.3f}" for name, row in by_version.items())
            print(f"{folder.name}: {what:12} {means}", flush=True)
        if given.out:
            found = record(seeds, facts, given.folders[: seed + 1], time.process_time() - begin)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
