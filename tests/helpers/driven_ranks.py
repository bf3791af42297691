"""What ranks do in tests/parallel/test_driver_on_ranks.py: `drive`, steps and meters made up."""

import signal
import time
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from fault_work import Silent

from llama2rt import energy
from llama2rt.checkpoint import store
from llama2rt.energy import Energy
from llama2rt.parallel import on_main, world
from llama2rt.run import Recipe, Run, lock
from llama2rt.train import TrainOptions
from llama2rt.train.driver import Step, drive
from llama2rt.train.interrupts import Interrupts
from llama2rt.train.optimizer import Diverged


class Work(Silent):
    """Steps of ten tokens, of which one may diverge."""

    def __init__(self, diverges_at: int = -1) -> None:
        self._diverges_at = diverges_at

    def step(self, index: int) -> Step:
        if index == self._diverges_at:
            raise Diverged("the loss is nan")
        return Step({"index": float(index)}, tokens=10)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"total": torch.zeros(1)}, {}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        pass


class Meter:
    """A GPU of each rank, of 100 J on rank 0 and 200 J on rank 1, and a host of 1000 J."""

    def __init__(self, host: bool, broken: bool) -> None:
        here = world().rank
        own = {} if broken else {f"GPU {here}": 100.0 * (here + 1)}
        why = {f"GPU {here}": "no counter"} if broken else {}
        self._energy = Energy(2.0, own | ({"CPU": 1000.0} if host else {}), why)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def peek(self) -> Energy:
        return self._energy

    lap = peek


def diverge_while_a_checkpoint_is_written(folder: Path) -> str:
    """What is said where step 3 diverges, and step 2's files take a while to reach the disk."""
    describe = store.described

    def slowly(path: Path) -> dict[str, Any]:
        time.sleep(0.3)
        return describe(path)

    run = Run.open(folder, Recipe(), resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "described", slowly)
        with pytest.raises(FloatingPointError) as raised:
            drive(run, Work(2), TrainOptions(checkpoint_every=2), done=0, total=9)
        kept = on_main(run.store.steps)
        run.store.wait()
    lock.unlock(folder)  # as the end of a process does
    return f"{raised.value} {kept}"


def drive_with_meters(folder: Path, broken_rank: int) -> None:
    """One step, logged."""
    run = Run.open(folder, Recipe(), resume=True)
    broken = world().rank == broken_rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "of_device", lambda device, host=True: Meter(host, broken))
        drive(run, Work(), TrainOptions(log_every=1), done=0, total=1)
    run.finish()


def asked_to_stop_twice_while_rank_0_works_alone() -> int:
    """By one scheduler, at once; the signal that all then agree on."""

    def signalled() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)

    interrupts = Interrupts()
    with interrupts.noted():
        on_main(signalled)
        return interrupts.agreed()
