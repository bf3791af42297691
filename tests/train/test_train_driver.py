"""The driver of steps: what happens after which step and in what order, interrupts, early stop,
resume, divergence, and that energy is that of steps."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import json_lines
import power
import pytest
import torch

from llama2rt import energy
from llama2rt.checkpoint.store import CheckpointError
from llama2rt.run import Recipe, Run
from llama2rt.train import TrainOptions
from llama2rt.train.driver import Step, drive, resume
from llama2rt.train.optimizer import Diverged


class Counting:
    """A work whose only state is a sum; it writes down every call."""

    noun = "round"
    device = torch.device("cpu")

    def __init__(self, ceiling: float | None = None, held_out: bool = True, stop: int = 99) -> None:
        self.ceiling, self.held_out, self.stop = ceiling, held_out, stop
        self.total = 0.0
        self.calls: list[tuple[Any, ...]] = []
        self.during: Callable[[int], None] = lambda index: None

    def step(self, index: int) -> Step:
        self.calls.append(("step", index))
        self.during(index)
        self.total += index + 1
        return Step({"total": self.total}, tokens=10, flops=20)

    def describe(self, metrics: dict[str, Any]) -> str:
        self.calls.append(("describe", metrics["total"]))
        return ""

    def validate(self, done: int) -> dict[str, float] | None:
        self.calls.append(("validate", done))
        return {"held_out": -self.total} if self.held_out else None

    def finished(self) -> bool:
        return self.total >= self.stop

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        self.calls.append(("state",))
        return {"total": torch.tensor(self.total)}, {"note": "kept"}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        assert state == {"note": "kept"}
        self.total = float(tensors["total"])


def run_of(directory: Path) -> Run:
    return Run.open(directory, Recipe(), resume=True)


def logged(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without energy, which the machine decides."""
    unsteady = ("energy", "joules_per_token", "joules_per_step")
    lines = json_lines.read(directory / "metrics.jsonl")
    return [{key: line[key] for key in line if key not in unsteady} for line in lines]


OPTIONS = TrainOptions(log_every=2, validate_every=4, checkpoint_every=4)


def test_each_thing_is_done_at_its_step_in_order(tmp_path, monkeypatch):
    work, run = Counting(), run_of(tmp_path)
    log, save = run.log, run.store.save

    def noted_log(step, **metrics):
        work.calls.append(("log", step, "held_out" in metrics))
        log(step, **metrics)

    def noted_save(step, tensors, state):
        work.calls.append(("save", step))
        return save(step, tensors, state)

    monkeypatch.setattr(run, "log", noted_log)
    monkeypatch.setattr(run.store, "save", noted_save)
    assert drive(run, work, OPTIONS, done=0, total=5) == 5
    assert work.calls == [
        ("step", 0),
        ("step", 1),
        ("log", 2, False),
        ("describe", 3.0),
        ("step", 2),
        ("step", 3),
        ("log", 4, False),
        ("describe", 10.0),
        ("validate", 4),
        ("log", 4, True),
        ("state",),
        ("save", 4),
        # The last step is logged and validated out of turn, and not saved.
        ("step", 4),
        ("log", 5, False),
        ("describe", 15.0),
        ("validate", 5),
        ("log", 5, True),
    ]


def test_nothing_periodic_is_asked_for(tmp_path):
    work = Counting(held_out=False)
    options = TrainOptions(log_every=99, validate_every=0, checkpoint_every=0)
    drive(run_of(tmp_path), work, options, done=0, total=3)
    assert logged(tmp_path) == [{"step": 3, "total": 6.0}]
    assert [call[0] for call in work.calls] == ["step", "step", "step", "describe", "validate"]
    assert not (tmp_path / "checkpoints").exists()


def test_throughput_is_logged_where_there_is_a_ceiling(tmp_path):
    drive(run_of(tmp_path), Counting(ceiling=5.0), OPTIONS, done=0, total=2)
    (line, _) = logged(tmp_path)
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 2 / 5.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_saves(tmp_path, number):
    work, run = Counting(), run_of(tmp_path)
    work.during = lambda index: os.kill(os.getpid(), number) if index == 2 else None
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as raised:
        drive(run, work, OPTIONS, done=0, total=9)
    assert str(raised.value) == (
        f"stopped after round 3 of 9; saved {tmp_path}/checkpoints/step-3, continue with --resume"
    )
    assert work.total == 6.0 and run.store.steps() == [3]
    assert signal.getsignal(number) is handler


@pytest.fixture
def interrupted_as_by_a_person():
    """A shell ignores SIGINT in what it starts in the background, perhaps in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_stops_at_once(tmp_path, interrupted_as_by_a_person):
    def twice(index):
        # To this thread: another one might take os.kill's two together, and Python sees one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    work, run = Counting(), run_of(tmp_path)
    work.during = twice
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        drive(run, work, OPTIONS, done=0, total=9)
    assert work.total == 0.0 and run.store.steps() == []


def test_after_the_last_step_there_is_nothing_to_interrupt(tmp_path):
    work, run = Counting(), run_of(tmp_path)
    work.during = lambda index: os.kill(os.getpid(), signal.SIGINT) if index == 2 else None
    assert drive(run, work, OPTIONS, done=0, total=3) == 3
    assert run.store.steps() == []


def test_a_finished_work_takes_no_further_step(tmp_path):
    work = Counting(stop=6)
    assert drive(run_of(tmp_path), work, OPTIONS, done=0, total=9) == 3
    # Neither logged nor validated out of turn: nobody knew that step 3 would be the last.
    assert logged(tmp_path) == [{"step": 2, "total": 3.0}]
    assert drive(run_of(tmp_path), work, OPTIONS, done=3, total=9) == 3
    assert [call for call in work.calls if call[0] == "step"] == [("step", i) for i in range(3)]


class Killed(BaseException):
    """What a kill looks like from inside."""


def killed_at(index: int) -> Callable[[int], None]:
    def during(step: int) -> None:
        if step == index:
            raise Killed

    return during


@pytest.mark.parametrize("kill", range(11))
def test_a_resumed_run_is_the_same_run(tmp_path, kill):
    """Killed in any step: what was logged after the newest checkpoint is dropped and done again."""
    drive(run_of(tmp_path / "whole"), Counting(), OPTIONS, done=0, total=11)
    work = Counting()
    work.during = killed_at(kill)
    with pytest.raises(Killed):
        drive(run_of(tmp_path / "parts"), work, OPTIONS, done=0, total=11)
    again, run = Counting(), run_of(tmp_path / "parts")
    done = resume(run, again)
    assert done == kill // 4 * 4
    assert again.total == done * (done + 1) / 2
    assert drive(run, again, OPTIONS, done=done, total=11) == 11
    assert again.total == 66.0
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_resume_without_a_checkpoint_keeps_what_came_before_the_first_step(tmp_path):
    run, work = run_of(tmp_path), Counting()
    for step in (0, 1):
        run.log(step, total=0.0)
    assert resume(run, work) == 0
    assert logged(tmp_path) == [{"step": 0, "total": 0.0}]


@pytest.mark.parametrize(
    ("index", "kept"),
    [(2, "no checkpoint exists yet"), (6, "step-4 is the last good checkpoint")],
)
def test_a_step_that_diverged_names_itself_and_what_is_left(tmp_path, index, kept):
    def diverge(step):
        if step == index:
            raise Diverged("the loss is nan")

    work = Counting()
    work.during = diverge
    with pytest.raises(FloatingPointError) as raised:
        drive(run_of(tmp_path), work, OPTIONS, done=0, total=9)
    assert not isinstance(raised.value, Diverged)
    assert str(raised.value).startswith(
        f"{tmp_path}: training diverged, the loss is nan at step {index + 1}; {kept}. Lower"
    )


def test_a_divergence_is_said_where_the_last_checkpoint_failed_too(tmp_path, monkeypatch):
    def diverge(step):
        raise Diverged("the loss is nan")

    def failed():
        raise CheckpointError("step-4 could not be written")

    work, run = Counting(), run_of(tmp_path)
    work.during = diverge
    monkeypatch.setattr(run.store, "wait", failed)
    with pytest.raises(FloatingPointError, match=r"loss is nan .* step-4 could not be written$"):
        drive(run, work, OPTIONS, done=0, total=9)


def test_what_else_is_not_finite_is_no_divergence(tmp_path):
    """A sampler's complaint about a damaged model says what it says."""

    def damaged(index):
        raise FloatingPointError("logits of a damaged model")

    work = Counting()
    work.during = damaged
    with pytest.raises(FloatingPointError, match=r"^logits of a damaged model$"):
        drive(run_of(tmp_path), work, OPTIONS, done=0, total=9)


def test_energy_is_that_of_steps_alone(tmp_path, monkeypatch):
    """50 W for 2 s of each step; validation and checkpoints draw power of their own."""
    now = [0.0]
    monkeypatch.setattr(
        energy,
        "of_device",
        lambda device, **_: power.tree(tmp_path / "power", 50.0, lambda: now[0]),
    )

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    class Slow(Counting):
        def validate(self, done):
            pass_time(30.0)
            return super().validate(done)

        def state(self):
            pass_time(7.0)
            return super().state()

    work = Slow()
    work.during = lambda index: pass_time(2.0)
    options = TrainOptions(log_every=1, validate_every=2, checkpoint_every=3)
    drive(run_of(tmp_path / "run"), work, options, done=0, total=5)
    lines = json_lines.read(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "total" in line]
    assert [line["joules_per_step"] for line in steps] == pytest.approx([100.0] * 5)
    assert [line["joules_per_token"] for line in steps] == pytest.approx([10.0] * 5)
