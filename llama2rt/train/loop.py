"""The optimisation loop that pretraining, SFT, reward models and DPO share.

A step is a list of micro-batches; their summed losses are divided by what the whole step predicts
(`micro.weight` summed, over all ranks), never per micro-batch or per rank, so one batch of eight is
eight of one, on whatever ranks. Where the loader stands and the state of every random generator is
in the checkpoint.

Left out: what a loss is (the stage's objective), and when to log, validate and save (`driver`).
"""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llama2rt.parallel import Mesh, world
from llama2rt.parallel.pipeline import PipelinedLlama
from llama2rt.run import Run
from llama2rt.train.driver import Step, drive, resume
from llama2rt.train.metrics import gemm_ceiling, training_flops
from llama2rt.train.optimizer import Diverged, Optimizer
from llama2rt.train.options import TrainOptions
from llama2rt.train.recompute import recompute_blocks
from llama2rt.train.schedule import learning_rate, warn_of_warmup
from llama2rt.train.stragglers import Elapsed

Objective = Callable[[Any, Any], tuple[Tensor, dict[str, Any]]]
"""(model, micro-batch) -> (loss summed over the micro-batch, other sums to report); each stage's
own kind of model and batch"""
Survey = Callable[[Any, list[Any]], None]
"""(model, all micro-batches of a step that are this rank's): reads, without gradients, what a loss
takes from the whole step"""


class Mean(NamedTuple):
    """Such a sum with a count of its own, such as what one source's tokens predict: it is divided
    by that, not by what the whole step predicts, and is not logged of a step that has none."""

    total: Tensor | float
    weight: Tensor | float


_COUNT = " (count)"  # behind a Mean's name: the sum of its counts


class Loader(Protocol):
    """The micro-batches of one optimizer step at a time, resumable (see data.loader)."""

    def next(self) -> list[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    run: Run,
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    options: TrainOptions,
    *,
    steps: int,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    mesh: Mesh | None = None,
    survey: Survey | None = None,
) -> dict[str, float]:
    """Train `model` in place for `steps` steps, from the run's newest checkpoint if it has one.

    The model is put into `options.precision` and left there. `objective` returns the loss summed
    over a micro-batch's `weight` and further sums; all are divided by the step's weight and logged.
    `validate(model)` runs without gradients every `validate_every` steps and after the last; the
    numbers of its last call are returned. `survey` comes before the losses of each step, with the
    model as for validation.

    Every rank of `mesh` calls this, with a model that `parallel.parallelize` has spread over it and
    a loader that has the rank's share; `validate` too, which returns the same numbers everywhere.

    Interrupts are those of `driver.drive`. A loss or gradient norm that is not finite raises
    FloatingPointError before it reaches the weights; the last checkpoint stays.
    """
    warn_of_warmup(steps, options)
    work = _Fit(model, loader, objective, options, mesh or Mesh.single())
    work.steps, work.held_out, work.survey = steps, validate, survey
    done = resume(run, work)
    model.train()
    with recompute_blocks(model, options.activation_checkpointing):
        drive(run, work, options, done=done, total=steps)
    return work.validation


class _Fit:
    """The driver's work: an optimizer step over the micro-batches of a batch."""

    noun = "step"

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        objective: Objective,
        options: TrainOptions,
        mesh: Mesh,
    ) -> None:
        self._model, self._loader, self._objective = model, loader, _in_sums(objective)
        self._options, self._mesh = options, mesh
        self._optimizer = Optimizer(model, options, mesh)
        self.device = next(model.parameters()).device
        self.ceiling: float | None = gemm_ceiling(self.device.type, options.dtype) * world().size
        self.steps = 0
        self.held_out: Callable[[nn.Module], dict[str, float]] | None = None
        self.validation: dict[str, float] = {}
        self.survey: Survey | None = None

    def step(self, index: int) -> Step:
        begin = Elapsed.now()
        micros = self._loader.next()
        costs = [(micro.weight, *_cost(self._model, micro)) for micro in micros]
        prepared = Elapsed.now().since(begin)
        weight, tokens, flops = self._mesh.totals(sum(cost) for cost in zip(*costs, strict=True))
        if self.survey is not None:
            self._read(self.survey, micros)
        means = self._backward(micros, max(1, int(weight)))
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']}")
        lr = learning_rate(index, self.steps, self._options)
        norm = self._optimizer.step(lr, means["loss"])
        metrics = dict(**means, lr=lr, gradient_norm=norm, **self._optimizer.outliers.metrics())
        return Step(metrics, int(tokens), int(flops), prepared)

    def _read(self, survey: Survey, micros: list[Any]) -> None:
        self._model.eval()
        with torch.no_grad():
            survey(self._model, [micro.to(self.device) for micro in micros])
        self._model.train()

    def _backward(self, micros: list[Any], weight: int) -> dict[str, float]:
        """Accumulate a step's gradients; its loss and further numbers, per unit of the step's
        `weight`."""
        sums: dict[str, Tensor | float] = {}
        if isinstance(self._model, PipelinedLlama):
            micros = [micro.to(self.device) for micro in micros]
            sums |= self._model.accumulate(micros, self._objective, weight)
            self._optimizer.accumulate()
            micros = []
        for micro in micros:
            loss, metrics = self._objective(self._model, micro.to(self.device))
            # What fills up a rank's share weighs nothing, whatever its loss is.
            counts = micro.weight > 0 or self._mesh.batch_ranks == 1
            (loss / weight if counts else loss * 0).backward()
            self._optimizer.accumulate()
            for key, value in {"loss": loss, **metrics}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                sums[key] = sums.get(key, 0.0) + (value if counts else 0.0)
            # The next forward pass must not start while this one's output is still held.
            del loss, metrics
        totals = self._mesh.totals(float(value) for value in sums.values())
        return _means(dict(zip(sums, totals, strict=True)), weight)

    def describe(self, metrics: Mapping[str, Any]) -> str:
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s MFU {metrics['mfu']:.0%}"
        return f"loss {metrics['loss']:.4f} {speed}"

    def validate(self, done: int) -> dict[str, float] | None:
        if self.held_out is None:
            return None
        self._model.eval()
        with torch.no_grad():
            numbers = self.held_out(self._model)
            self.validation = {name: float(value) for name, value in numbers.items()}
        self._model.train()
        return self.validation

    def finished(self) -> bool:
        return False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {**self._optimizer.state_dict(), **_generator_tensors()}
        return tensors, {
            "loader": self._loader.state_dict(),
            "validation": self.validation,
            "generators": _generator_state(),
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state["loader"])
        self.validation = state["validation"]
        _restore_generators(tensors, state["generators"])
        self._optimizer.load_state_dict(tensors)


def _in_sums(objective: Objective) -> Objective:
    """`objective` with each `Mean` as two sums."""

    def summed(model: Any, micro: Any) -> tuple[Tensor, dict[str, Any]]:
        loss, metrics = objective(model, micro)
        sums: dict[str, Any] = {}
        for key, value in metrics.items():
            if isinstance(value, Mean):
                sums[key], sums[key + _COUNT] = value
            else:
                sums[key] = value
        return loss, sums

    return summed


def _means(totals: Mapping[str, float], weight: float) -> dict[str, float]:
    """The sums of a step per unit of what each is a mean over."""
    over = {key: totals.get(key + _COUNT, weight) for key in totals if not key.endswith(_COUNT)}
    return {key: totals[key] / count for key, count in over.items() if count}


def _cost(model: nn.Module, micro: Any) -> tuple[int, int]:
    """(tokens, FLOPs) of a Batch or of the Batch inside a PairBatch."""
    batch = getattr(micro, "batch", micro)
    whole = getattr(model, "shape", model)  # a stage of a pipeline has a part
    return batch.tokens.numel(), training_flops(whole, batch)


def _generator_tensors() -> dict[str, Tensor]:
    tensors = {"generator.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _generator_state() -> dict[str, Any]:
    kind, key, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, np.asarray(key).tolist(), *rest]}


def _restore_generators(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors.pop("generator.torch"))
    if "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("generator.cuda"))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
