"""Every stage in bf16 at DPO's learning rate saves what its optimizer held: the model folder has
the steps in it, and no rounding of the weights."""

import json

import pocket as problem
import pytest
import torch

from llama2rt.checkpoint import load
from llama2rt.stages import dpo, ppo, pretrain, rejection, reward, sft

LR = 5e-7
TRAIN = {
    "lr": LR,
    "precision": "bf16",
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "warmup_minimum": 0,
    "weight_decay": 0.0,
    "eps": 1e-12,
}


def trained(stage: str, pocket, directory) -> tuple[list, int]:
    """([model folders of the stage, each trained on from the one before], steps between two)."""
    text = directory / "text.jsonl"
    lines = [{"text": " ".join(problem.NAMES[i:] + problem.NAMES[:i])} for i in range(8)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    talks = directory / "talks.jsonl"
    lines = [
        {"messages": [*problem.messages(kind, name), {"role": "assistant", "content": answers[0]}]}
        for kind, answers in problem.ANSWERS.items()
        for name in problem.TRAINING[:16]
    ]
    talks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {"helpfulness": pocket.helpfulness, "safety": pocket.safety}
    rollouts = {
        "rewards": models,
        "data": [pocket.prompts],
        "sampling": {"max_tokens": 8},
        "train": TRAIN,
    }
    run = directory / "run"
    if stage == "pretrain":
        settings = {"data": [text], "init": pocket.sft, "context": 64, "batch_tokens": 128}
        recipe = pretrain.PretrainRecipe(**settings, steps=4, held_out=0, train=TRAIN)
        return [pretrain.run(recipe, run)], 4
    if stage == "sft":
        settings = {"init": pocket.sft, "data": [talks], "batch_size": 8, "epochs": 1}
        return [sft.run(sft.SftRecipe(**settings, held_out=0, train=TRAIN), run)], 4
    if stage == "reward":
        recipe = problem.reward_recipe(pocket, "helpfulness", epochs=1, batch_size=32, train=TRAIN)
        folder = reward.run(recipe, run)
        return [folder], json.loads((run / "report.json").read_text())["steps"]
    if stage == "rejection":
        settings = {"policy": pocket.sft, "init": pocket.sft, "samples": 2, "epochs": 1}
        recipe = rejection.RejectionRecipe(**settings, **rollouts, batch_size=50)
        return [rejection.run(recipe, run)], 2
    if stage == "ppo":
        sizes = {"iterations": 2, "batch_size": 16, "mini_batch_size": 8}
        return [ppo.run(ppo.PpoRecipe(init=pocket.sft, **sizes, **rollouts), run)], 4
    sizes = {"iterations": 2, "prompts_per_iteration": 30, "samples": 2, "batch_size": 64}
    settings = {"init": pocket.sft, "temperatures": [1.0]}
    last = dpo.run(dpo.DpoRecipe(**settings, **sizes, **rollouts, epochs=2), run)
    return [run / "iteration-1" / "model", last], 2


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "rejection", "ppo", "dpo"])
def test_a_folder_holds_the_steps_and_no_rounding(pocket, tmp_path, stage):
    folders, steps = trained(stage, pocket, tmp_path)
    before, _ = load(pocket.sft)
    for folder in folders:
        after, _ = load(folder)
        weights = dict(before.named_parameters())
        kept = ((name, p) for name, p in after.named_parameters() if name != "head.weight")
        moved = torch.cat([(p - weights[name]).flatten() for name, p in kept]).detach()
        assert {p.dtype for p in after.parameters()} == {torch.float32}
        # AdamW moves a weight by about the learning rate a step; rounding would by up to 1e-3.
        # Rows of tokens that never occur stay.
        assert float(moved.abs().max()) < 2 * steps * LR
        assert float((moved != 0).float().mean()) > 0.3
        before = after  # in dpo the next iteration goes on from here
