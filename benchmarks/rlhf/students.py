"""Students that learn from a larger model's selected samples, and from their own.

From finished quickstart runs. The student has half of the toy's width and its own base and chat
model, trained on the toy's corpus and demonstrations. All of the following are fine-tuned from that
base on one best answer a prompt, with the same steps:

- own: the best of 8 of the student's chat model (`llama2rt rejection`)
- samples: the best of 8 of the large model, RLHF-V1, as its own RLHF-V2 was (`llama2rt distill`)
- forward_kl, jsd: RLHF-V2's distributions at the same samples

Told is what the judge, which no model saw, says of answers to held-out prompts. A folder may stand
there more than once: each time with another seed of the student's whole course.

    python -P benchmarks/rlhf/students.py runs/seed-0 runs/seed-1 --out students.json
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama2rt.checkpoint import load, native
from llama2rt.data.readers import read, write
from llama2rt.model import Llama
from llama2rt.rollout.responses import read_responses, write_responses
from llama2rt.stages import distill, pretrain, rejection, sft
from llama2rt.stages.selection import BEST

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import quickstart_runs as runs
import records

LOSSES = ("samples", "forward_kl", "jsd")


def small(folder: Path, out: Path, seed: int) -> Path:
    """Random weights of half the width, scaled as the quickstart scales its own."""
    model, tokenizer = load(folder / "init", "meta")
    whole = model.config
    config = dataclasses.replace(
        whole,
        dim=whole.dim // 2,
        heads=whole.heads // 2,
        kv_heads=whole.kv_heads // 2,
        ffn_hidden=whole.ffn_hidden // 2,
    )
    student = Llama(config).initialize(seed)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.dim() > 1:
                weight.mul_(0.08 / 0.02)
    native.save(student, tokenizer, out)
    return out


def same_prompts(folder: Path, out: Path, count: int) -> tuple[Path, Path]:
    """The first `count` training prompts, and the large model's best answers to them."""
    prompts = read([folder / "data" / "training.jsonl"], "prompt")[:count]
    asked = {prompt.id for prompt in prompts}
    best = read_responses(folder / "rlhf-v2" / "samples" / BEST)
    write(out / "prompts.jsonl", prompts)
    write_responses(out / "selected.jsonl", [r for r in best if r.prompt.id in asked])
    return out / "prompts.jsonl", out / "selected.jsonl"


def own_course(folder: Path, out: Path, prompts: Path, seed: int, steps: int) -> dict[str, Path]:
    """The student's base, its chat model, and the base tuned on that one's best answers."""
    base = pretrain.run(
        pretrain.PretrainRecipe(
            data=[folder / "data" / "documents.jsonl"],
            init=small(folder, out / "init", seed),
            context=256,
            batch_tokens=1024,
            steps=steps,
            seed=seed,
            train={**runs.TRAIN, "lr": 3e-3, "warmup_steps": 0, "log_every": 100},
        ),
        out / "pretrain",
    )
    chat = sft.run(
        sft.SftRecipe(
            init=base,
            data=[folder / "data" / "dialogues.jsonl"],
            batch_size=32,
            epochs=1,
            seed=seed,
            train=runs.TRAIN,
        ),
        out / "sft",
    )
    own = rejection.run(
        rejection.RejectionRecipe(
            policy=chat,
            init=base,
            rewards=runs.rewards(folder),
            data=[prompts],
            samples=8,
            sampling=runs.SAMPLING,
            batch_size=16,
            epochs=3,
            seed=seed,
            train=runs.TRAIN,
        ),
        out / "rejection",
    )
    return {"base": base, "chat": chat, "own": own}


def taught(folder: Path, base: Path, selected: Path, loss: str, seed: int) -> Path:
    """The base tuned on the large model's selected samples."""
    recipe = distill.DistillRecipe(
        students={"half": {"init": base}},
        data=[selected],
        teacher=folder / "rlhf-v2" / "model",
        loss=loss,
        batch_size=16,
        epochs=3,
        seed=seed,
        train=runs.TRAIN,
    )
    return distill.run(recipe, selected.with_name(loss)) / "student-half" / "model"


def of_seed(
    folder: Path, out: Path, seed: int, given: argparse.Namespace
) -> dict[str, dict[str, np.ndarray]]:
    """What the judge says of each version, [prompts]."""
    prompts, selected = same_prompts(folder, out, given.prompts)
    course = own_course(folder, out, prompts, seed, given.steps)
    versions = {"student SFT": course["chat"], "own": course["own"]}
    versions |= {loss: taught(folder, course["base"], selected, loss, seed) for loss in LOSSES}
    versions |= {"teacher": folder / "rlhf-v2" / "model"}
    held_out = folder / "data" / "evaluation.jsonl"
    found = runs.answers(folder, versions, held_out, out / "evaluate", seed)

    def unsafe(response: Any) -> bool:
        return not runs.ordinary(response)

    return {
        "helpfulness": runs.judged(folder, found, runs.ordinary, lambda v: v.helpfulness),
        "correct": runs.judged(folder, found, runs.ordinary, lambda v: float(v.correct)),
        "unsafe": runs.judged(folder, found, unsafe, lambda v: float(v.unsafe)),
    }


def record(seeds: list, given: argparse.Namespace, cpu_seconds: float) -> dict[str, Any]:
    """Of the seeds that are done."""
    compared = {
        what: {
            f"{better} - own": runs.over_seeds(
                [row[what] for row in seeds], given.folders[: len(seeds)], better, "own"
            )
            for better in LOSSES
        }
        for what in seeds[0]
    }
    return records.header("cpu") | {
        "what": __doc__.splitlines()[0],
        "pretraining_steps": given.steps,
        "prompts": given.prompts,
        "cpu_seconds": round(cpu_seconds, 1),
        "seeds": [{what: runs.told(row) for what, row in seed.items()} for seed in seeds],
        "differences": compared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart run directories")
    parser.add_argument("--steps", type=int, default=800, help="of the student's pretraining")
    parser.add_argument("--prompts", type=int, default=800, help="that both models' samples answer")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs.without_drawings()
    begin = time.process_time()
    seeds: list[dict[str, dict[str, np.ndarray]]] = []
    for seed, folder in enumerate(given.folders):
        with tempfile.TemporaryDirectory() as scratch:
            seeds.append(of_seed(folder, Path(scratch), seed, given))
        for what, by_version in seeds[-1].items():
            means = "  ".join(f"{name} {row.mean():.3f}" for name, row in by_version.items())
            print(f"{folder.name}: {what:12} {means}", flush=True)
        if given.out:
            found = record(seeds, given, time.process_time() - begin)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
