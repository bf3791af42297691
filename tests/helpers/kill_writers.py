"""Ranks that do nothing but save, killed at random moments: is the newest checkpoint always whole?

    python tests/helpers/kill_writers.py --kills 300 --ranks 2 --seed 0

(with OMP_NUM_THREADS=1) starts a group, kills (SIGKILL) one of its ranks or all of them at a moment
drawn uniformly, and starts it anew in the same folder, which it resumes from. After each kill one
process reads the folder. Exit status 1 unless, every time, what it finds has the right bits, is the
last checkpoint that a rank has begun or the one before, and nothing had to be passed over; and
unless every group found its own parts again.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo  # which DTensor imports at its first use: once here, not in every fork
from rank_pool import free_port  # beside this file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llama2rt.checkpoint import store
from llama2rt.checkpoint.store import Store
from llama2rt.parallel import world
from llama2rt.parallel.group_store import GroupStore
from llama2rt.parallel.world import start

LONGEST = 1.0  # seconds from the first save of a group to the kill
PATIENCE = 30.0  # seconds that the ranks left have to notice
WRONG = 3  # exit status of a rank that did not find what it had saved


def whole(step: int) -> dict[str, Tensor]:
    """What step `step` saves."""
    generator = torch.Generator().manual_seed(step)
    return {f"master.{i}": torch.randn(64, 33, generator=generator) for i in range(6)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )


def save_for_ever(folder: Path) -> None:
    """What a rank does: resume, then save one step after the other, each named in a file first."""
    store.SHARD_BYTES = 10_000  # several files a rank
    start()
    mesh = init_device_mesh("cpu", (world().size,))
    kept = GroupStore(folder / "checkpoints")
    blank = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)])
        for name, tensor in whole(0).items()
    }
    found = kept.latest(into=blank)
    step = 0
    if found is not None:
        step, tensors, state = found
        ours = {name: tensor.full_tensor() for name, tensor in tensors.items()}
        if state != {"step": step} or not same(ours, whole(step)):
            os._exit(WRONG)
    with open(folder / f"begun-{world().rank}", "a") as begun:
        while True:
            step += 1
            parts = {
                name: distribute_tensor(tensor, mesh, [Shard(0)])
                for name, tensor in whole(step).items()
            }
            kept.wait()
            begun.write(f"{step}\n")
            begun.flush()
            kept.save(step, parts, {"step": step})


def group(folder: Path, ranks: int) -> list[int]:
    """The processes of a group, forked from this one, by rank."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if not process:
            try:
                said = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(said, stream)
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                torch.set_num_threads(1)
                save_for_ever(folder)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        processes.append(process)
    return processes


def last_begun(folder: Path) -> int:
    """The last step that any rank has begun to save; the one before it is on the disk then."""
    lines = [line for path in folder.glob("begun-*") for line in path.read_text().splitlines()]
    return max(map(int, lines), default=0)


def killed(folder: Path, ranks: int, moments: random.Random) -> tuple[str, list[str]]:
    """Start a group and kill it; (who was killed, what is wrong)."""
    before = last_begun(folder)
    processes = group(folder, ranks)
    until = time.monotonic() + 120
    while last_begun(folder) == before and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(moments.uniform(0, LONGEST))
    victim = moments.choice([*range(ranks), None])
    for rank, process in enumerate(processes):
        if victim in (rank, None):
            os.kill(process, signal.SIGKILL)
    wrong = ended(processes)
    if last_begun(folder) == before:
        wrong.append("no rank began to save")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = Store(folder / "checkpoints").latest()
    wrong += [str(warning.message) for warning in said]
    begun, step = last_begun(folder), 0 if found is None else found[0]
    if step not in (begun - 1, begun):
        wrong.append(f"step {step} is the newest, {begun} was begun")
    if found is not None and not same(found[1], whole(step)):
        wrong.append(f"step {step} has other bits")
    return ("all" if victim is None else f"rank {victim}"), wrong


def ended(processes: list[int]) -> list[str]:
    """Wait for the ranks left, which a dead one ends; what is wrong with how they end."""
    wrong, left = [], set(processes)
    until = time.monotonic() + PATIENCE
    while left:
        for process in list(left):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                left.remove(process)
                if os.waitstatus_to_exitcode(status) == WRONG:
                    wrong.append("a rank did not find its own parts again")
        if left and time.monotonic() > until:
            wrong.append(f"{len(left)} ranks did not notice in {PATIENCE:.0f} s")
            for process in left:
                os.kill(process, signal.SIGKILL)
            until += PATIENCE
        time.sleep(0.005)
    return wrong


def main() -> int:
    """Print what was wrong after each kill, and how many of whom there were."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    given = parser.parse_args()
    moments = random.Random(given.seed)
    victims: collections.Counter[str] = collections.Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kill in range(given.kills):
            victim, wrong = killed(folder, given.ranks, moments)
            victims[victim] += 1
            failures += bool(wrong)
            if wrong:
                print(f"kill {kill} ({victim}): {'; '.join(wrong)}", flush=True)
        print(
            f"{given.kills} kills ({dict(sorted(victims.items()))}) of {given.ranks} ranks, "
            f"{last_begun(folder)} checkpoints begun: {failures} found wrong"
        )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
