"""What sharding costs: two FSDP processes of one thread against one process of two, the same step.

The step is that of `step.py`: 134M weights, 4 documents of 512 tokens, forward, backward, clip,
AdamW on fp32 masters. Both sides stay loaded and take turns, round by round, so that what else the
machine does falls on both; medians are compared. The bytes that each rank hands to all-gather and
reduce-scatter are counted where FSDP calls them and compared with what it should move:

    all-gather      every block's weights twice (forward and backward), the rest once, in the
                    compute dtype
    reduce-scatter  every gradient once, in fp32

    python benchmarks/training/parallel_cost.py [--rounds 9] [--precision bf16] [--out FILE.json]
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import step

RANKS = 2


def set_up(precision: str) -> tuple[Callable[[], float], dict[str, int]]:
    """(a function that takes this process's part of a step and returns the loss of the whole,
    bytes that this rank should hand to each collective)."""
    import torch

    from llama2rt.model import Llama, LlamaConfig
    from llama2rt.parallel import Mesh, ParallelOptions, world
    from llama2rt.parallel.parallelize import parallelize
    from llama2rt.train import Optimizer, TrainOptions

    (shape,) = list(step.SHAPES.values())[:1]
    config = LlamaConfig(**shape, vocab_size=step.VOCABULARY, context=step.LENGTH)
    options = TrainOptions(lr=step.LR, precision=precision)
    mesh = Mesh.build(ParallelOptions(), config)
    model = Llama(config).initialize(0)
    blocks = sum(p.numel() for p in model.transformer.blocks.parameters())
    weights = sum(p.numel() for p in model.parameters())
    expected = {
        "all_gather": options.dtype.itemsize * (weights + blocks),
        "reduce_scatter": 4 * weights,
    }
    parallelize(model, mesh, options.dtype)
    optimizer = Optimizer(model, options, mesh)
    own = step.tokens()[mesh.batch_rank :: mesh.batch_ranks]
    targets = torch.full_like(own, -1)
    targets[:, :-1] = own[:, 1:]
    cu_seqlens = torch.arange(0, own.numel() + 1, step.LENGTH, dtype=torch.int32)
    positions = torch.arange(step.LENGTH).repeat(len(own))
    weight = step.DOCUMENTS * (step.LENGTH - 1)

    def take() -> float:
        loss = -model(own.flatten(), positions, cu_seqlens, targets.flatten()).sum() / weight
        loss.backward()
        optimizer.step(step.LR)
        (total,) = mesh.totals([float(loss.detach())])
        return total

    return take, expected if world().size > 1 else {}


@contextmanager
def counted(handed: dict[str, int]) -> Any:
    """Inside, `handed` counts the bytes of whole tensors that FSDP's collectives give or take,
    through shared memory or, where there is none, by torch.distributed."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as by_torch

    from llama2rt.parallel import shared_memory as by_memory

    def counts(name: str, whole: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(self: Any, **tensors: Any) -> Any:
            handed[name] += tensors[whole].nbytes
            return call(self, **tensors)

        return counting

    handed |= {"all_gather": 0, "reduce_scatter": 0}
    with ExitStack() as patches:
        for kind, name, whole in (
            (by_torch.DefaultAllGather, "all_gather", "output_tensor"),
            (by_torch.DefaultReduceScatter, "reduce_scatter", "input_tensor"),
            (by_memory.SharedAllGather, "all_gather", "output_tensor"),
            (by_memory.SharedReduceScatter, "reduce_scatter", "input_tensor"),
        ):
            counting = counts(name, whole, kind.__call__)
            patches.enter_context(mock.patch.object(kind, "__call__", counting))
        yield


def serve(pipe: Connection, rank: int, ranks: int, port: int, precision: str) -> None:
    """One process of a side: a step for every word on `pipe`, its seconds and loss for an answer;
    for "count" also the bytes."""
    threads = RANKS // ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from llama2rt.parallel.world import start, stop
    from llama2rt.train.allocator import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    start()
    take, expected = set_up(precision)
    while (word := pipe.recv()) != "end":
        handed: dict[str, int] = {}
        begin = time.perf_counter()
        if word == "count":
            with counted(handed):
                loss = take()
        else:
            loss = take()
        pipe.send((time.perf_counter() - begin, loss, handed, expected))
    stop()
    os._exit(0)  # as `parallel.command.finish` says


class Side:
    """The processes of one side."""

    def __init__(self, ranks: int, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(RANKS // ranks)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._pipes = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, ranks, port, precision))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def step(self, word: str = "step") -> tuple[float, float, list[tuple[dict, dict]]]:
        """(seconds of the slowest process, loss, bytes handed and expected by rank)."""
        for pipe in self._pipes:
            pipe.send(word)
        answers = [pipe.recv() for pipe in self._pipes]
        bytes_by_rank = [(handed, expected) for *_, handed, expected in answers]
        return max(seconds for seconds, *_ in answers), answers[0][1], bytes_by_rank

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send("end")
        for process in self._processes:
            process.join()


def measure(rounds: int, precision: str) -> dict[str, Any]:
    """The record: seconds of each round, medians, their ratio, losses, bytes."""
    sides = {"one": Side(1, precision), "fsdp": Side(RANKS, precision)}
    first = {name: side.step()[1] for name, side in sides.items()}
    traffic = sides["fsdp"].step("count")[2]
    sides["one"].step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sorted(sides, reverse=turn % 2 == 1):
            seconds[name].append(sides[name].step()[0])
    for side in sides.values():
        side.end()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": next(iter(step.SHAPES)),
        "tokens": step.DOCUMENTS * step.LENGTH,
        "precision": precision,
        "ranks": RANKS,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": medians["fsdp"] / medians["one"],
        "first_loss": first,
        "bytes": [{"handed": handed, "expected": expected} for handed, expected in traffic],
        "bytes_as_expected": all(handed == expected for handed, expected in traffic),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = json.dumps(measure(options.rounds, options.precision), indent=2)
    if options.out:
        options.out.write_text(record + "\n")
    print(record)
    if not json.loads(record)["bytes_as_expected"]:
        sys.exit("bytes handed to collectives differ from those expected")


if __name__ == "__main__":
    main()
