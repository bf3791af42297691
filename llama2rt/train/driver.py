"""The loop over steps that `fit` and PPO share: when to log, validate, save and stop.

What a step does is up to the caller's `Work`. Everything that a step depends on is in the
checkpoint, so a run killed anywhere continues to the same bits.

Left out: measurements before the first step, which a stage takes between `resume` and `drive`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2rt import energy
from llama2rt.checkpoint.store import CheckpointError
from llama2rt.energy import EnergyMeter
from llama2rt.parallel import faults, on_main, world
from llama2rt.run import Run
from llama2rt.train.interrupts import Interrupts, Stopped
from llama2rt.train.metrics import EnergyUse, Throughput
from llama2rt.train.optimizer import Diverged
from llama2rt.train.options import TrainOptions
from llama2rt.train.progress import ProgressLine
from llama2rt.train.stragglers import NOTHING, Elapsed, Stragglers


@dataclass(frozen=True)
class Step:
    """What a step measured and what it cost."""

    metrics: Mapping[str, float]
    tokens: int
    """trained on, or sampled: the unit of throughput and energy"""
    flops: int = 0
    """that MFU counts: recomputation left out"""
    prepared: Elapsed = NOTHING
    """how long the rank took to have its batch"""


class Work(Protocol):
    """One run's steps, and all that has to survive a kill between two of them."""

    noun: str
    """what a message calls a step"""
    device: torch.device
    """whose energy is measured"""
    ceiling: float | None
    """FLOP/s that MFU is a fraction of; None to log neither throughput nor MFU"""

    def step(self, index: int) -> Step:
        """Take step `index` (from 0). Raises Diverged before anything that is not finite reaches a
        weight."""

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """A few words on a logged step, for the progress line."""

    def validate(self, done: int) -> dict[str, float] | None:
        """Held-out numbers after `done` steps; None where nothing is held out."""

    def finished(self) -> bool:
        """Whether to stop before the last step."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) that `restore` continues from."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""


def resume(run: Run, work: Work) -> int:
    """Restore `work` from the run's newest checkpoint, if it has one; returns the steps done by
    then, and drops metrics of later ones."""
    found = run.store.latest(into=work.state()[0])
    done = 0
    if found is not None:
        done, tensors, state = found
        work.restore(tensors, state)
    run.truncate_metrics(done)
    return done


def drive(run: Run, work: Work, options: TrainOptions, *, done: int, total: int) -> int:
    """Take steps until `total` are done or the work is finished; returns how many are done.

    Logs every `log_every` steps, validates every `validate_every`, and does both after step
    `total`; saves every `checkpoint_every` steps. Ctrl-C, SIGTERM and SIGUSR1 on any rank finish
    the step, save, and raise Stopped, a KeyboardInterrupt, on all (a second signal stops at once);
    after the last step nothing is left to interrupt. A step that diverged raises
    FloatingPointError, once the last checkpoint is complete.
    """
    interrupts = Interrupts()
    with (
        ProgressLine(run.directory.resolve().name, total, done) as line,
        interrupts.noted(),
        energy.of_device(work.device, host=world().local_rank == 0) as meter,
    ):
        rates, stragglers = _Rates(work.ceiling, meter), Stragglers(work.device)
        while done < total and not work.finished():
            faults.doing(f"in {work.noun} {done + 1}")
            begin = Elapsed.now()
            try:
                step = work.step(done)
            except Diverged as error:
                raise FloatingPointError(_divergence(run, done + 1, str(error))) from None
            rates.add(step)
            stragglers.add(Elapsed.now().since(begin), step.prepared)
            done += 1
            run.store.check()
            last = done == total
            if last or _due(done, options.log_every):
                metrics = dict(**step.metrics, **rates.read(), **stragglers.read())
                run.log(done, **metrics)
                line.update(done, work.describe(metrics))
            if last or _due(done, options.validate_every):
                numbers = work.validate(done)
                if numbers is not None:
                    run.log(done, **numbers)
                    rates.restart()
            stop = 0 if last else interrupts.agreed()
            if stop or _due(done, options.checkpoint_every):
                faults.doing(f"saving after {work.noun} {done}")
                run.store.save(done, *work.state())
                rates.restart()
            if stop:
                run.store.wait()
                raise Stopped(
                    f"stopped after {work.noun} {done} of {total}; saved "
                    f"{run.store.path(done)}, continue with --resume",
                    stop,
                )
        run.store.wait()
    return done


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class _Rates:
    """Throughput and energy of the steps since these were last logged."""

    def __init__(self, ceiling: float | None, meter: EnergyMeter) -> None:
        self._ceiling = ceiling
        self._throughput, self._energy = Throughput(), EnergyUse(meter)

    def add(self, step: Step) -> None:
        self._throughput.add(step.tokens, step.flops)
        self._energy.add(step.tokens)
        self._energy.step()

    def read(self) -> dict[str, float | str]:
        tokens_per_second, flops_per_second = self._throughput.read()
        rates: dict[str, float | str] = {}
        if self._ceiling is not None:
            rates["tokens_per_second"] = tokens_per_second
            rates["mfu"] = flops_per_second / self._ceiling
        return rates | self._energy.read()

    def restart(self) -> None:
        """Forget what was counted: something else than a step took the time since."""
        self._throughput.read()
        self._energy.restart()


def _divergence(run: Run, step: int, what: str) -> str:
    """What to say of a run whose step `step` was not finite: what is left, what to try. Waits for a
    checkpoint that is still being written, which the end of the process would throw away."""
    unwritten = ""
    try:
        run.store.wait()
    except CheckpointError as error:
        unwritten = f" {error}"
    kept = on_main(run.store.steps)
    where = f"step-{kept[-1]} is the last good checkpoint" if kept else "no checkpoint exists yet"
    return (
        f"{run.directory}: training diverged, {what} at step {step}; {where}. "
        "Lower train.lr, lengthen the warm-up or look at the data of this step."
        f"{unwritten}"
    )
