"""Ghost Attention on the quickstart's models: does a model keep to the first turn's instruction?

For each quickstart folder: its RLHF-V2 model, given a wider context, learns to follow instructions
from demonstrations (`quickstart.ghost_world`); that model is the policy of `llama2rt
ghost-attention` and what it fine-tunes. Told is the share of answers, at each turn of held-out
dialogues, that follow what only the first turn says: of the policy, of the model after Ghost
Attention, and of a control that has taken as many steps of SFT on more demonstrations instead. The
dialogues' tasks are of the quickstart's evaluation split, the instructions are drawn anew; a rule
reads the answers.

    python -P benchmarks/rlhf/ghost_attention.py runs/seed-0 runs/seed-1 --work runs/ghost \\
        --out ghost-attention.json

A folder may stand there more than once: each time with another seed of data and training. A second
start with the same --work goes on where the first one was.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llama2rt import atomic
from llama2rt.checkpoint import load, native
from llama2rt.data import readers
from llama2rt.evaluate import recall
from llama2rt.evaluate.recall import RecallOptions
from llama2rt.generate import Engine
from llama2rt.model import Llama
from llama2rt.quickstart import ghost_world
from llama2rt.rollout.sampling import SamplingOptions, derived_seed
from llama2rt.stages import ghost_attention, sft
from llama2rt.stages.ghost_attention import GhostAttentionRecipe
from llama2rt.stages.sft import SftRecipe
from llama2rt.train.options import TrainOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

CONTEXT = 1024
"""the quickstart's 256 hold about five turns"""
MAX_TOKENS = 40
BATCH = 4
"""demonstrations in a step of SFT: about as many tokens as in a step of the quickstart's
pretraining"""


def options(lr: float) -> TrainOptions:
    """As the quickstart's (`quickstart.plan`): AdamW as in the paper, but for eps."""
    return TrainOptions(lr=lr, eps=1e-8, warmup_ratio=0.05, log_every=10, checkpoint_every=20)


def widen(source: Path, folder: Path) -> None:
    """The model in `source` with `CONTEXT`: rotary embeddings have no weights."""
    if (folder / "config.json").exists():
        return
    model, tokenizer = load(source, "cpu")
    wide = Llama(dataclasses.replace(model.config, context=CONTEXT))
    wide.load_state_dict(model.state_dict())
    native.save(wide, tokenizer, folder)


def write_data(work: Path, seed: int, sizes: argparse.Namespace) -> None:
    """Demonstrations, dialogues to ask, and what instructions are made of."""
    if (work / "attributes.toml").exists():  # written last
        return
    shown = ghost_world.demonstrations(2 * sizes.demonstrations, seed)
    readers.write(work / "demonstrations.jsonl", shown[: sizes.demonstrations])
    readers.write(work / "more.jsonl", shown[sizes.demonstrations :])
    for split, count in (("train", sizes.dialogues), ("evaluation", sizes.tested)):
        dialogues = ghost_world.dialogues(count, split, seed)
        readers.write(work / f"{split}.jsonl", dialogues)
    (work / "attributes.toml").write_text(ghost_world.ATTRIBUTES)


def fine_tuned(work: Path, name: str, init: Path, data: Path, **settings: Any) -> Path:
    """SFT; the model folder."""
    recipe = SftRecipe(
        init=init, data=[data], batch_size=BATCH, epochs=1, train=options(1e-3), **settings
    )
    return sft.run(recipe, work / name, resume=(work / name / "manifest.json").exists())


def recipe_of(work: Path, policy: Path, seed: int, given: argparse.Namespace) -> Any:
    return GhostAttentionRecipe(
        policy=policy,
        init=policy,
        data=[work / "train.jsonl"],
        validation=[work / "evaluation.jsonl"],
        attributes=work / "attributes.toml",
        **{
            "sampling": SamplingOptions(max_tokens=MAX_TOKENS),
            "recall": RecallOptions(turns=given.turns, limit=given.tested),
            "batch_size": 8,
            "followed_only": True,
            "epochs": given.epochs,
            "seed": seed,
            "train": options(given.lr),
            **given.settings,
        },
    )


def of_control(work: Path, folder: Path, recipe: Any) -> dict[str, Any]:
    """The test of another model, on the stage's own dialogues and instructions."""
    inputs = ghost_attention.open_inputs(recipe)
    model, tokenizer = load(folder, "cpu")
    assert isinstance(model, Llama)
    dialogues, told = zip(*inputs.tested, strict=True)
    return recall.measure(
        Engine(model, tokenizer, as_trained=True),
        dialogues,
        told,
        recipe.recall,
        place=recipe.place,
        max_tokens=MAX_TOKENS,
        seed=derived_seed(recipe.seed, "recall"),
    )


def of_folder(folder: Path, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What Ghost Attention did to this seed's model, kept in its folder."""
    work = given.work / f"seed-{seed}"
    if (work / "row.json").exists():
        kept: dict[str, Any] = json.loads((work / "row.json").read_text())
        return kept
    started = time.process_time()
    widen(folder / "rlhf-v2" / "model", work / "init")
    write_data(work, seed, given)
    policy = fine_tuned(work, "sft", work / "init", work / "demonstrations.jsonl", seed=seed)
    recipe = recipe_of(work, policy, seed, given)
    run = work / "ghost-attention"
    ghost_attention.run(recipe, run, resume=(run / "manifest.json").exists())
    found = json.loads((run / "report.json").read_text())
    row: dict[str, Any] = {"folder": folder.name, "seed": seed, "recall": found["recall"]}
    if given.control:
        steps = found["steps"]
        more = fine_tuned(
            work,
            "control",
            policy,
            work / "more.jsonl",
            seed=seed,
            limit=BATCH * steps,
            held_out=0.0,
        )
        row["recall"]["control"] = of_control(work, more, recipe)
    logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["held_out_loss"] for line in logged if "held_out_loss" in line]
    row["held_out_loss"] = [losses[0], losses[-1]]
    row |= {name: found[name] for name in ("asked", "kept", "left_out", "last_answer_follows")}
    row["steps"] = found["steps"]
    attention = found["attention"]
    row["attention_by_turn"] = {name: attention[name]["turns"] for name in attention}
    row["cpu_seconds"] = round(time.process_time() - started, 1)
    atomic.write(work / "row.json", json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart runs, seeds from 0")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--demonstrations", type=int, default=2400)
    parser.add_argument("--dialogues", type=int, default=256)
    parser.add_argument("--tested", type=int, default=60)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 4, 6, 10, 15, 20])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={}, help="other recipe keys, JSON")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed, folder in enumerate(given.folders):
        rows.append(of_folder(folder, seed, given))
        for name, found in rows[-1]["recall"].items():
            print(recall.describe(f"{folder.name}, {name}", found), flush=True)
        if given.out:
            settings = {k: str(v) if k == "work" else v for k, v in vars(given).items()}
            settings = {k: v for k, v in settings.items() if k not in ("work", "folders", "out")}
            head = records.header("cpu") | {"what": __doc__.splitlines()[0], "settings": settings}
            given.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
