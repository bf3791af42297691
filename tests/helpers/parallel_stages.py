"""What ranks do in tests/parallel/test_stages_on_ranks.py: whole stages, and files for them."""

import contextlib
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_lines
import pytest
import torch
from spread_folders import nothing_whole

import llama2rt
from llama2rt.checkpoint.store import Store
from llama2rt.parallel import ParallelOptions, world
from llama2rt.run import lock
from llama2rt.stages.preference import PreferenceRecipe
from llama2rt.stages.pretrain import PretrainRecipe
from llama2rt.stages.reward import RewardRecipe
from llama2rt.stages.sft import SftRecipe
from llama2rt.stages.shape import ModelShape
from llama2rt.train import TrainOptions

TRAIN = TrainOptions(lr=2e-3, micro_tokens=128, validate_every=10, checkpoint_every=5, clip=0.5)


def write_data(folder: Path) -> None:
    """text.txt, dialogues.jsonl and comparisons.jsonl, of items of unequal length."""
    folder.mkdir()
    items = [f"{'na' * (i % 9)} {i} and {i * i % 7}" for i in range(90)]
    (folder / "text.txt").write_text("\n".join(items * 3))

    def asked(i: int) -> dict[str, str]:
        return {"role": "user", "content": f"say {i} twice"}

    json_lines.write(
        folder / "dialogues.jsonl",
        (
            {"messages": [asked(i), {"role": "assistant", "content": item}]}
            for i, item in enumerate(items)
        ),
    )
    ratings = ("significantly_better", "better", "negligibly_better")
    json_lines.write(
        folder / "comparisons.jsonl",
        (
            {
                "prompt": [asked(i)],
                "chosen": item,
                "rejected": f"{i}",
                "rating": ratings[i % 3],
            }
            for i, item in enumerate(items)
        ),
    )


def recipe(stage: str, folder: Path, init: Path, parallel: ParallelOptions, epochs: int = 2) -> Any:
    """`epochs` of `stage`, of 10 steps each but for preference models, on those files."""
    if stage == "pretrain":
        return PretrainRecipe(
            data=[folder / "text.txt"],
            held_out=0.1,
            vocab_size=300,
            context=32,
            batch_tokens=384,
            steps=10 * epochs,
            model=ModelShape(dim=32, layers=2, heads=4, kv_heads=2, context=96),
            train=TRAIN,
            parallel=parallel,
        )
    common: dict[str, Any] = {"init": init, "train": TRAIN, "parallel": parallel}
    if stage == "sft":
        data = [folder / "dialogues.jsonl"]
        return SftRecipe(data=data, held_out=0.1, batch_size=8, epochs=epochs, **common)
    data = [folder / "comparisons.jsonl"]
    if stage == "preference":
        common["train"] = TRAIN.model_copy(update={"micro_tokens": 256, "lr": 2e-4})
        return PreferenceRecipe(
            data=data, held_out=10, block_tokens=256, batch_size=3, epochs=epochs, **common
        )
    # A loss near 0 would be compared with the rounding of scores, not with its own.
    common["train"] = TRAIN.model_copy(update={"lr": 2e-4})
    return RewardRecipe(data=data, held_out=10, batch_size=8, epochs=epochs, **common)


def run_stage(
    stage: str,
    folder: Path,
    init: Path,
    out: Path,
    parallel: ParallelOptions,
    stop: int = 0,
    epochs: int = 2,
) -> str:
    """Run `stage` into `out`, going on with what is there; `stop`: Ctrl-C during that step."""
    module = importlib.import_module(f"llama2rt.stages.{stage}")
    if stop:
        interrupt_at(stop)
    try:
        with only_rank_0_lists(), nothing_whole():
            settings = recipe(stage, folder, init, parallel, epochs)
            return str(module.run(settings, out, resume=True))
    except KeyboardInterrupt as error:
        lock.unlock(out)  # as the end of a process does
        return str(error)


@contextlib.contextmanager
def only_rank_0_lists() -> Iterator[None]:
    """A folder of checkpoints may look another on each machine: no rank but 0 may go by what it
    sees there."""

    def listed(self: Store) -> list[int]:
        raise AssertionError(f"rank {world().rank} lists the checkpoints by itself")

    with pytest.MonkeyPatch.context() as patch:
        if world().rank:
            patch.setattr(Store, "steps", listed)
        yield


def interrupt_at(step: int) -> None:
    """Make the next `fit` of this process receive Ctrl-C during `step`."""
    from llama2rt.train.optimizer import Optimizer

    original = Optimizer.step
    taken = [0]

    def counted(self: Optimizer, lr: float, *loss: float) -> float:
        taken[0] += 1
        if taken[0] == step:
            Optimizer.step = original  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, lr, *loss)

    Optimizer.step = counted  # type: ignore[method-assign]


# What a process measures of itself, and not of the model.
HERE = (
    *("tokens_per_second", "mfu", "energy", "joules_per_token", "joules_per_step"),
    *("slowest_rank", "straggler_ratio"),
)


def metrics(directory: Path) -> list[dict]:
    rows = json_lines.read(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in HERE} for row in rows]


def agree(directory: Path, expected: Path) -> None:
    """Two run directories of one recipe: the same metrics, held-out numbers and model."""
    ours, theirs = metrics(directory), metrics(expected)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert len(ours) >= 10
    for mine, one in zip(ours, theirs, strict=True):
        for key, value in one.items():
            bound = 1e-5 if "loss" in key or "bits" in key else 1e-4
            assert mine[key] == pytest.approx(value, rel=bound, abs=1e-6), (one["step"], key)
    model, tokenizer = llama2rt.load(directory / "model")
    other, _ = llama2rt.load(expected / "model")
    assert tokenizer is not None and type(model) is type(other)
    for weight, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-4)
