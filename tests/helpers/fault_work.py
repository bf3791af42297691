"""A run of a few ranks whose steps are all-reduces, and what can go wrong with one of them."""

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama2rt import cli
from llama2rt.errors import InputError
from llama2rt.parallel import command, faults, world
from llama2rt.rollout import balance
from llama2rt.run import Recipe, Run
from llama2rt.train import TrainOptions, stragglers
from llama2rt.train.driver import Step, drive, resume
from llama2rt.train.schedule import warn_of_warmup
from llama2rt.train.stragglers import Elapsed

TOTAL = 12
# A step takes so long that a signal meets one.
SECONDS = 0.05


class Silent:
    """What `drive` wants to know of steps that have nothing to say besides."""

    noun = "step"
    device = torch.device("cpu")
    ceiling = None

    def describe(self, metrics: Mapping[str, Any]) -> str:
        return ""

    def validate(self, done: int) -> None:
        return None

    def finished(self) -> bool:
        return False


class Summing(Silent):
    """Its state is the sum over steps and ranks of (rank + 1) * step."""

    def __init__(self, fault: str, rank: int, folder: Path) -> None:
        self.fault, self.rank, self.folder = fault, rank, folder
        self.total = torch.zeros(1)

    def step(self, index: int) -> Step:
        if index == 5:
            (self.folder / f"reached-{world().rank}").touch()
            self.go_wrong()
        begin = Elapsed.now()
        time.sleep(SECONDS)
        if self.fault == "slow" and world().rank == self.rank:
            time.sleep(0.05)
        prepared = Elapsed.now().since(begin)
        part = torch.tensor([float((world().rank + 1) * index)])
        dist.all_reduce(part)
        self.total += part
        return Step({"total": float(self.total)}, tokens=1, prepared=prepared)

    def go_wrong(self) -> None:
        if self.fault == "share":
            balance.spread(lambda: [1.0] * world().size, self.share, world().size)
        if self.fault == "alike":
            warn_of_warmup(1, TrainOptions(warmup_steps=2))
            raise InputError("data.jsonl:3: all read the same")
        if world().rank != self.rank:
            return
        if self.fault == "alone":
            raise InputError(f"data-{self.rank}.jsonl:3: only here")
        if self.fault == "defect":
            raise KeyError("a defect")
        if self.fault == "sleep":
            time.sleep(3600)

    def share(self, indices: list[int]) -> list[int]:
        """Forward passes of a while, of which one rank's comes to no end."""
        for _ in range(4):
            faults.moved()
            time.sleep(SECONDS)
        if world().rank == self.rank:
            time.sleep(3600)
        return indices

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"total": self.total}, {}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.total.copy_(tensors["total"])


def command_of_a_stage(out: Path, fault: str = "", rank: int = 1, limit: float = 60.0) -> None:
    """As `llama2rt` carries out a stage; the process ends in it where the run does not."""
    cli._listen()
    stragglers.SECONDS = 4 * SECONDS
    try:
        with command.joined():
            faults.set_limit(datetime.timedelta(seconds=limit))
            run = Run.open(out, Recipe(), resume=True)
            work = Summing(fault, rank, out)
            options = TrainOptions(log_every=1, checkpoint_every=4)
            drive(run, work, options, done=resume(run, work), total=TOTAL)
            run.finish(total=float(work.total))
    except BaseException as error:
        cli._end(error, "sum")
