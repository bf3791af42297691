"""What ranks do in tests/parallel/test_fit_on_ranks.py: `fit` of an objective on a mesh."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2rt.data.loader import ExampleLoader, PairLoader
from llama2rt.data.packing import Example
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.parallel.parallelize import parallelize
from llama2rt.stages import direct, dpo, reward
from llama2rt.stages.pretrain import next_token
from llama2rt.train import TrainOptions, fit
from llama2rt.train.optimizer import Optimizer, placed

CONFIG = LlamaConfig(32, 2, 4, 2, 64, vocab_size=53, context=64)
STEPS = 6  # every document once, and into the second epoch


class Notes:
    """What `fit` needs of a run: a place for metrics, and no checkpoint to begin with."""

    directory = Path("notes")

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.store = self

    def latest(self, into: object = None) -> None:
        return None

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def steps(self) -> list[int]:
        return []

    def truncate_metrics(self, step: int) -> None:
        pass

    def log(self, step: int, **metrics: float | str) -> None:
        self.rows.append({"step": step, **metrics})


def documents(count: int = 40) -> list[Example]:
    """Of 2 to 40 tokens, parts of which are trained on."""
    random = np.random.default_rng(0)
    made = []
    for k in range(count):
        tokens = (np.arange(random.integers(2, 41)) * (k % 7 + 1) + k) % 53
        made.append(Example.of(tokens, random.random(len(tokens)) < 0.7))
    return made


def pair_loader(kind: str, micro_tokens: int, share: tuple[int, int]) -> PairLoader:
    """Pairs of `documents`, with what the stage's objective wants to know of each."""
    examples = documents()
    pairs = list(zip(examples[::2], examples[1::2], strict=True))
    random = np.random.default_rng(1)
    if kind == "dpo":
        names = ("reference_chosen", "reference_rejected")
        extras = {name: -20 * random.random(len(pairs)) for name in names}
    else:
        names = ("labelled", "chosen_safe", "rejected_safe")
        extras = {name: random.random(len(pairs)) < 0.5 for name in names}
        extras["margin"] = random.random(len(pairs))
    return PairLoader(pairs, extras, 6, micro_tokens, 1, share=share)


def train(
    kind: str,
    parallel: ParallelOptions,
    tied: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    steps: int = STEPS,
) -> dict[str, Any]:
    """Metrics of each step, whole gradients of the first, whole weights after the last."""
    settings = {"lr": 1e-3, "checkpoint_every": 0, "micro_tokens": 90, "clip": 0.5, **options}
    train_options = TrainOptions(**settings)
    config = LlamaConfig(**{**vars(CONFIG), "tied": tied})
    mesh = Mesh.build(parallel, config, pipelined=kind == "sft")
    model: Any = (ScalarModel if kind == "reward" else Llama)(config).initialize(0)
    loader: Any
    if kind in ("reward", "dpo"):
        loader = pair_loader(kind, train_options.micro_tokens, mesh.share)
    else:
        loader = ExampleLoader(documents(), 9, train_options.micro_tokens, 1, share=mesh.share)
    objective = {
        "sft": next_token,
        "reward": reward.objective(reward.RewardRecipe.model_construct(kind="safety")),
        "dpo": direct.loss(dpo.DpoRecipe.model_construct(), mesh),
    }[kind]
    # A tenth of inductor's time, for the same graphs.
    with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
        parallelize(model, mesh, train_options.dtype, compile_blocks=train_options.compile)
    run: Any = Notes()
    gradients: dict[str, Tensor] = {}
    with first_gradients(gradients):
        fit(run, model, loader, objective, train_options, steps=steps, mesh=mesh)
    speed = {"tokens_per_second", "mfu", "energy", "slowest_rank", "straggler_ratio"}
    keys = run.rows[0].keys() - speed - {"step"}
    return {
        "metrics": {key: [row[key] for row in run.rows] for key in sorted(keys)},
        "gradients": gradients,
        "weights": {name: whole(p.detach()) for name, p in model.named_parameters()},
    }


@contextmanager
def first_gradients(kept: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the first step of an optimizer leaves the gradients it was given, whole."""
    original = Optimizer.step

    def step(self: Optimizer, *arguments: float) -> float:
        if not kept:
            for name, parameter, gradient in zip(
                self.names, self.parameters, self._gradients, strict=True
            ):
                assert gradient is not None, name
                kept[name] = whole(placed(gradient.float(), parameter))
        return original(self, *arguments)

    Optimizer.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.step = original  # type: ignore[method-assign]


def whole(tensor: Tensor) -> Tensor:
    # What no other rank has a part of, `full_tensor` gives as it is, to be changed in place.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
