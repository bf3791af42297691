"""Stages of two ranks, killed at random moments: are their models those of an undisturbed run?

    python tests/helpers/kill_ranks.py --kills 60 --seed 0 --stage pretrain sft reward dpo ppo

(with OMP_NUM_THREADS=1) makes a small world (`pocket`) and carries out each stage on two ranks,
once whole; then again and again, disturbed at moments drawn uniformly from the whole run's time:
SIGKILL to one rank or to all, SIGTERM or SIGINT to one. After each all ranks must end by
themselves, with a status that is not 0, and the same command goes on. Exit status 1 where a model
or a number of a report is another one, or a rank stays. The ranks are forked from this process,
since importing takes longer than their work; with `--torchrun` they are torchrun's. Forked ranks
of which one ends before they have met are ended here, as torchrun does: it cannot be noticed
otherwise.
"""

import argparse
import collections
import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pocket  # beside this file
import tomli_w
import torch
import torch._dynamo  # which DTensor imports at its first use: once here, not in every fork
from kill_plan import differences, results
from rank_pool import free_port

from llama2rt import cli
from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue
from llama2rt.model import LlamaConfig, ScalarModel
from llama2rt.parallel import command
from llama2rt.stages import STAGES, loading

RANKS = 2
# Seconds that the others have to notice that a rank is gone, on a busy machine.
PATIENCE = 90.0
KINDS = ("SIGKILL to one", "SIGKILL to all", "SIGTERM to one", "SIGINT to one")
TRAIN = {"lr": 1e-3, "log_every": 2, "checkpoint_every": 2, "validate_every": 4}


def world(folder: Path) -> dict[str, Path]:
    """The recipes by stage, and what they name, in `folder`."""
    torch.set_num_threads(1)
    tokenizer = pocket.begin(folder)
    shape = loading.outline(folder / "sft").config
    reward = ScalarModel(LlamaConfig(**vars(shape))).initialize(1)
    native.save(reward, tokenizer, folder / "reward")
    (folder / "text.txt").write_text("\n\n".join(pocket.texts()))
    write(folder / "prompts.jsonl", pocket.prompts(pocket.TRAINING[:8]))
    write(folder / "held_out.jsonl", pocket.prompts(pocket.HELD_OUT[:4]))
    write(folder / "comparisons.jsonl", pocket.comparisons("helpfulness", pocket.TRAINING, 0))
    write(
        folder / "dialogues.jsonl",
        [
            Dialogue([*pocket.messages(kind, name), {"role": "assistant", "content": answers[0]}])
            for name in pocket.NAMES
            for kind, answers in pocket.ANSWERS.items()
        ],
    )
    paths = {}
    for stage, recipe in recipes(folder).items():
        paths[stage] = folder / f"{stage}.toml"
        paths[stage].write_text(tomli_w.dumps(recipe))
    return paths


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs of a second or two that save every other step."""
    # With a window of outliers, which a checkpoint holds.
    train = {**TRAIN, "micro_tokens": 128, "outlier_sigmas": 6, "outlier_window": 4}
    rollout = {
        "init": str(folder / "sft"),
        "data": [str(folder / "prompts.jsonl")],
        "validation": [str(folder / "held_out.jsonl")],
        "rewards": {"helpfulness": str(folder / "reward")},
        "sampling": {"max_tokens": 6},
    }
    return {
        "pretrain": {
            "data": [str(folder / "text.txt")],
            "document_separator": "\n\n",
            "held_out": 0.1,
            "tokenizer": str(folder / "tokenizer"),
            "model": {"dim": 32, "layers": 2, "heads": 2},
            "context": 32,
            "batch_tokens": 256,
            "steps": 24,
            "train": {**train, "warmup_steps": 2},
        },
        "sft": {
            "init": str(folder / "sft"),
            "data": [str(folder / "dialogues.jsonl")],
            "held_out": 0.1,
            "batch_size": 16,
            "epochs": 2,
            "train": train,
        },
        "reward": {
            "init": str(folder / "sft"),
            "data": [str(folder / "comparisons.jsonl")],
            "kind": "helpfulness",
            "held_out": 8,
            "batch_size": 8,
            "epochs": 2,
            "train": train,
        },
        "dpo": {
            **rollout,
            "iterations": 2,
            "prompts_per_iteration": 8,
            "samples": 2,
            "batch_size": 4,
            "epochs": 2,
            "train": train,
        },
        "ppo": {
            **rollout,
            "iterations": 6,
            "batch_size": 8,
            "mini_batch_size": 4,
            "train": {**train, "schedule": "constant", "checkpoint_every": 1},
        },
    }


def prepare(folder: Path) -> None:
    """Import what the command will."""
    for stage in STAGES.values():
        _ = stage.module
    importlib.import_module("matplotlib.pyplot")
    importlib.import_module("torch.utils.tensorboard")
    importlib.import_module("llama2rt.pipeline.dry_run")
    assert command.joined
    loading.outline(folder / "sft")  # torch imports more for its first model without weights


class Group:
    """The ranks of one command."""

    def __init__(self, arguments: Sequence[str], said: Path, torchrun: bool) -> None:
        self._said = said
        self._agent: subprocess.Popen[bytes] | None = None
        self.ranks: list[int] = []
        self._statuses: dict[int, int] = {}
        self._said_before = said.stat().st_size if said.exists() else 0
        if torchrun:
            program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            program += ["--nproc-per-node", str(RANKS), "--no-python"]
            program += [sys.executable, "-m", "llama2rt.cli", *arguments]
            with said.open("ab") as stream:
                self._agent = subprocess.Popen(program, stdout=stream, stderr=stream)
            while len(self.ranks) < RANKS and self._agent.poll() is None:
                self.ranks = children(self._agent.pid)
                time.sleep(0.05)
        else:
            port = free_port()
            self.ranks = [forked(rank, port, arguments, said) for rank in range(RANKS)]

    def ended(self, seconds: float) -> bool:
        """Whether all have ended within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            if self._agent is not None:
                if self._agent.poll() is not None:
                    return True
            else:
                for rank in {*self.ranks} - self._statuses.keys():
                    found, status = os.waitpid(rank, os.WNOHANG)
                    if found:
                        self._statuses[rank] = os.waitstatus_to_exitcode(status)
                if len(self._statuses) == len(self.ranks):
                    return True
            if time.monotonic() > end:
                return False
            time.sleep(0.01)

    @property
    def met(self) -> bool:
        """Whether the ranks have met."""
        with self._said.open("rb") as said:
            said.seek(self._said_before)
            return b" ranks on cpu" in said.read()

    @property
    def has_lost(self) -> bool:
        """Whether some have ended and others not."""
        return 0 < len(self._statuses) < len(self.ranks)

    @property
    def statuses(self) -> list[int]:
        if self._agent is not None:
            return [self._agent.returncode]
        return [self._statuses[rank] for rank in self.ranks]

    def signal(self, ranks: Sequence[int], number: int) -> None:
        for rank in ranks:
            if rank not in self._statuses:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, number)

    def end(self) -> str:
        """Leave no process; what it has said."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()
        self.signal(self.ranks, signal.SIGKILL)
        self.ended(5.0)
        return self._said.read_text()[-3000:]


def children(process: int) -> list[int]:
    """The processes that `process` has started."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return sorted(found)


def forked(rank: int, port: int, arguments: Sequence[str], said: Path) -> int:
    """One rank in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        cli.main(list(arguments))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Wrong(Exception):
    """A group that did not do what it should."""


class Trial:
    """One stage, carried out whole and then with disturbances."""

    def __init__(self, stage: str, recipe: Path, folder: Path, torchrun: bool) -> None:
        self._stage, self._recipe, self._folder = stage, recipe, folder
        self._torchrun = torchrun
        self.counts: collections.Counter[str] = collections.Counter()
        begin = time.monotonic()
        out = folder / f"{stage}-whole"
        group = self._start(out)
        while not (out / "manifest.json").exists() and not group.ended(0.01):
            pass
        self.ready = time.monotonic() - begin
        self._finish(group)
        self.seconds = time.monotonic() - begin
        self.expected = results(out)

    def disturbed(self, name: str, moments: Sequence[float], random_numbers: random.Random) -> None:
        """Carry the stage out with a disturbance at each of `moments` (seconds of the whole run's
        time, ascending). Wrong where a rank stays or the result is another."""
        out = self._folder / name
        reached = 0.0
        for moment in moments:
            group = self._start(out)
            wait = moment - reached + (self.ready if reached else 0.0)
            begin = time.monotonic()
            if not group.ended(wait):
                self._disturb(group, out, random_numbers.choice(KINDS), random_numbers)
            elif any(group.statuses):
                raise Wrong(f"{name}: ended with {group.statuses}: {group.end()}")
            else:  # the whole run met a busier machine
                if not reached:
                    self.seconds = min(self.seconds, time.monotonic() - begin)
                break
            reached = moment
        self._finish(self._start(out))
        if different := differences(self.expected, results(out)):
            raise Wrong(f"{name}: {different} differ")

    def _disturb(self, group: Group, out: Path, kind: str, random_numbers: random.Random) -> None:
        name, _, whom = kind.partition(" to ")
        ranks = group.ranks if whom == "all" else [random_numbers.choice(group.ranks)]
        writing = any(out.rglob("checkpoints/tmp-*"))
        group.signal(ranks, getattr(signal, name))
        if not group.met and not group.ended(10.0) and group.has_lost:
            self.counts["ended before they had met"] += 1
            group.end()
        if not group.ended(PATIENCE):
            raise Wrong(f"{out.name}: {kind}: a rank stays: {group.end()}")
        # A signal to save that came after the last step has nothing left to stop.
        if not any(group.statuses) and name == "SIGKILL" and not (out / "report.html").exists():
            raise Wrong(f"{out.name}: {kind}: ended with {group.statuses}: {group.end()}")
        self.counts[kind] += 1
        self.counts["while a checkpoint was written"] += writing
        self.counts["stopped with status 75"] += 75 in group.statuses

    def _start(self, out: Path) -> Group:
        arguments = [self._stage, str(self._recipe), "--out", str(out), "--resume"]
        return Group(arguments, out.with_suffix(".log"), self._torchrun)

    def _finish(self, group: Group) -> None:
        if not group.ended(600.0) or any(group.statuses):
            raise Wrong(f"{self._stage}: did not finish: {group.end()}")


def main() -> int:
    """Print a line for each stage, and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="of each stage")
    parser.add_argument("--kills-a-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    parser.add_argument("--stage", nargs="+", default=["pretrain", "sft", "reward", "dpo", "ppo"])
    parser.add_argument("--torchrun", action="store_true")
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = world(folder)
        prepare(folder)
        for stage in given.stage:
            random_numbers = random.Random(f"{given.seed} {stage}")
            trial = Trial(stage, paths[stage], folder, given.torchrun)
            kills = runs = 0
            while kills < given.kills and runs < 3 * given.kills:
                count = min(given.kills_a_run, given.kills - kills)
                drawn = sorted(random_numbers.uniform(0, trial.seconds) for _ in range(count))
                try:
                    trial.disturbed(f"{stage}-{runs}", drawn, random_numbers)
                except Wrong as error:
                    wrong += 1
                    print(error, flush=True)
                kills, runs = sum(trial.counts[kind] for kind in KINDS), runs + 1
            counts = ", ".join(f"{name} {count}" for name, count in sorted(trial.counts.items()))
            print(
                f"{stage}: {trial.seconds:.1f} s whole ({trial.ready:.1f} to begin), {kills} kills "
                f"in {runs} runs ({counts}), {len(trial.expected)} results, wrong so far {wrong}",
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
