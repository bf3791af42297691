"""The optimisation loop that pretraining, SFT, reward models and DPO share.

A step is a list of micro-batches; their summed losses are divided by what the whole step predicts
(``micro.weight`` summed), never per micro-batch, so one batch of eight is eight of one. Everything
a step depends on is in the checkpoint, so a run killed anywhere continues to the same bits.

Left out: what a loss is (the stage's objective), and PPO's phases, which use `Optimizer` directly.
"""

import contextlib
import math
import random
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llama2rt import energy
from llama2rt.run import Run
from llama2rt.train.metrics import EnergyUse, Throughput, gemm_ceiling, training_flops
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions
from llama2rt.train.progress import ProgressLine
from llama2rt.train.recompute import recompute_blocks
from llama2rt.train.schedule import learning_rate, warn_of_warmup

# (model, micro-batch) -> (loss summed over the micro-batch, other sums to report)
Objective = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Any]]]


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
) -> dict[str, float]:
    """Train ``model`` in place for ``steps`` steps, from the run's newest checkpoint if it has one.

    The model is put into ``options.precision`` and left there. ``objective`` returns the loss
    summed over a micro-batch's ``weight`` and further sums; all are divided by the step's weight
    and logged. ``validate(model)`` runs without gradients every ``validate_every`` steps and after
    the last; the numbers of its last call are returned.

    Ctrl-C and SIGTERM finish the step, save, and raise KeyboardInterrupt (a second one stops at
    once). A loss or gradient norm that is not finite raises FloatingPointError before it reaches
    the weights; the last checkpoint stays.
    """
    device = next(model.parameters()).device
    warn_of_warmup(steps, options)
    optimizer = Optimizer(model, options)
    done, last = _resume(run, optimizer, loader)
    model.train()
    ceiling = gemm_ceiling(device.type, options.dtype)
    recompute = recompute_blocks(model) if options.activation_checkpointing else None
    with (
        recompute or contextlib.nullcontext(),
        ProgressLine(run.directory.resolve().name, steps, done) as line,
        interrupts() as interrupted,
        energy.of_device(device) as meter,
    ):
        throughput, use = Throughput(), EnergyUse(meter)
        for step in range(done, steps):
            done = step + 1
            means = _backward(model, loader.next(), objective, optimizer, throughput, use)
            lr = learning_rate(step, steps, options)
            norm = _update(run, optimizer, done, lr, means["loss"])
            use.step()

            if done % options.log_every == 0 or done == steps:
                tokens_per_second, flops_per_second = throughput.read()
                rates = {"tokens_per_second": tokens_per_second, "mfu": flops_per_second / ceiling}
                run.log(done, **means, lr=lr, gradient_norm=norm, **rates, **use.read())
                said = f"{tokens_per_second:,.0f} tokens/s MFU {rates['mfu']:.0%}"
                line.update(done, f"loss {means['loss']:.4f} {said}")
            due = options.validate_every and done % options.validate_every == 0
            if validate is not None and (due or done == steps):
                last = _validated(model, validate)
                run.log(done, **last)
                throughput.read()
                use.restart()
            stop = bool(interrupted) and done < steps
            if stop or (options.checkpoint_every and done % options.checkpoint_every == 0):
                _save(run, optimizer, loader, done, last)
                throughput.read()
                use.restart()
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after step {done} of {steps}; saved "
                    f"{run.store.path(done)}, continue with --resume"
                )
    return last


def _resume(run: Run, optimizer: Optimizer, loader: Loader) -> tuple[int, dict[str, float]]:
    """(steps done, last validation) of the run's newest checkpoint, which everything is set to."""
    found = run.store.latest()
    done, last = 0, {}
    if found is not None:
        done, tensors, state = found
        loader.load_state_dict(state["loader"])
        last = state["validation"]
        _restore_generators(tensors, state["generators"])
        optimizer.load_state_dict(tensors)
    run.truncate_metrics(done)
    return done, last


def _save(
    run: Run, optimizer: Optimizer, loader: Loader, step: int, last: dict[str, float]
) -> None:
    state = {"loader": loader.state_dict(), "validation": last, "generators": _generator_state()}
    run.store.save(step, {**optimizer.state_dict(), **_generator_tensors()}, state)


def _backward(
    model: nn.Module,
    micros: list[Any],
    objective: Objective,
    optimizer: Optimizer,
    throughput: Throughput,
    use: EnergyUse,
) -> dict[str, float]:
    """Accumulate a step's gradients; its loss and further numbers, per unit of weight."""
    device = next(model.parameters()).device
    weight = max(1, sum(micro.weight for micro in micros))
    sums: dict[str, Tensor | float] = {}
    for micro in micros:
        tokens, flops = _cost(model, micro)
        throughput.add(tokens, flops)
        use.add(tokens)
        loss, metrics = objective(model, micro.to(device))
        (loss / weight).backward()
        optimizer.accumulate()
        for key, value in {"loss": loss, **metrics}.items():
            value = value.detach() if isinstance(value, Tensor) else value
            sums[key] = sums.get(key, 0.0) + value
        # The next forward pass must not start while this one's output is still held.
        del loss, metrics
    return {key: float(value) / weight for key, value in sums.items()}


def _update(run: Run, optimizer: Optimizer, step: int, lr: float, loss: float) -> float:
    """Change the weights; the gradient norm. FloatingPointError before, where it is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(diverged(run, step, f"the loss is {loss}"))
    try:
        return optimizer.step(lr)
    except FloatingPointError as error:
        raise FloatingPointError(diverged(run, step, str(error))) from None


def _validated(
    model: nn.Module, validate: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        numbers = {name: float(value) for name, value in validate(model).items()}
    model.train()
    return numbers


def _cost(model: nn.Module, micro: Any) -> tuple[int, int]:
    """(tokens, FLOPs) of a Batch or of the Batch inside a PairBatch."""
    batch = getattr(micro, "batch", micro)
    flops = training_flops(model, batch.tokens, batch.cu_seqlens, batch.weight)
    return batch.tokens.numel(), flops


def diverged(run: Run, step: int, what: str) -> str:
    """What to say of a run whose step ``step`` was not finite: what is left, what to try."""
    kept = run.store.steps()
    where = f"step-{kept[-1]} is the last good checkpoint" if kept else "no checkpoint exists yet"
    return (
        f"{run.directory}: training diverged, {what} at step {step}; {where}. "
        "Lower train.lr, lengthen the warm-up or look at the data of this step."
    )


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM appends to; the second has its usual effect."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers; there Ctrl-C stays immediate
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
