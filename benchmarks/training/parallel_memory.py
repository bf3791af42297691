"""Peak memory of a rank that trains, against what a dry run predicts: 350M parameters, fp32, AdamW.

Every rank is a process of its own (torchrun and gloo for more than one), with the allocator of the
command line (train/allocator.py: the heap keeps what is freed, so that its fragments count). The
peak is the resident size (VmHWM) above what was resident before the model was built, libraries
loaded and warmed by a step of a tiny model. Two steps are taken: the first has no moments to update
yet, and the heap is in its final shape in the second.

    python benchmarks/training/parallel_memory.py --out build/parallel-memory.json
    python benchmarks/training/parallel_memory.py --shard 2
    python benchmarks/training/parallel_memory.py --layers 4 --dim 256 --tokens 256   (seconds)
"""

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

SHAPE = {"dim": 1024, "layers": 22, "heads": 16, "kv_heads": 16, "ffn_hidden": 2816}
DEGREES = ("data", "shard", "tensor", "context")
MIB = 2**20
SECONDS = 1200  # for all of it, ranks that hang included


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def train(settings: dict[str, Any]) -> None:
    """Two steps, in this process; rank 0 prints the row of the fullest rank."""
    import torch

    from llama2rt.model import LlamaConfig
    from llama2rt.parallel import Mesh, ParallelOptions, gather, is_main
    from llama2rt.train.allocator import keep_freed_memory

    tiny = LlamaConfig(**dict(settings["shape"], dim=64, layers=2, ffn_hidden=128, context=64))
    steps(tiny, Mesh.single(), settings | {"tokens": 32}, 1)
    if max(settings[name] for name in DEGREES) > 1:
        importlib.import_module("torch._dynamo")  # a library too: DTensor's first use imports it
    ctypes.CDLL(None).malloc_trim(0)
    if settings["allocator"] == "kept":
        keep_freed_memory()
    config = LlamaConfig(**settings["shape"])
    degrees = {name: settings[name] for name in DEGREES}
    mesh = Mesh.build(ParallelOptions(**degrees), config)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before, begin = resident("VmRSS"), time.perf_counter()
    losses, peaks = steps(config, mesh, settings, 2)
    peak = peaks[-1]
    found = {
        "before_mib": before / MIB,
        "peak_above_mib": (peak - before) / MIB,
        "after_each_step_mib": [(peak - before) / MIB for peak in peaks],
        "seconds": time.perf_counter() - begin,
        "threads": torch.get_num_threads(),
        "losses": losses,
    }
    everyone = gather(found)
    if is_main():
        fullest = max(everyone, key=lambda row: row["peak_above_mib"])
        print(json.dumps(fullest | {"ranks_mib": [row["peak_above_mib"] for row in everyone]}))


def steps(config: Any, mesh: Any, settings: dict[str, Any], count: int) -> Any:
    """(losses, peaks so far) of `count` steps of a model of that shape, each of one micro-batch a
    rank; the first peak is that before any step."""
    import numpy as np

    from llama2rt.data.packing import Example, pack
    from llama2rt.model import Llama
    from llama2rt.train.optimizer import Optimizer
    from llama2rt.train.options import TrainOptions
    from llama2rt.train.recompute import recompute_blocks

    options = TrainOptions(lr=1e-4)
    model: Any = Llama(config).initialize(0)
    if mesh.devices is not None:
        from llama2rt.parallel.parallelize import parallelize

        parallelize(model, mesh)
    optimizer = Optimizer(model, options, mesh)
    tokens = settings["tokens"] // mesh.batch_ranks
    rng = np.random.default_rng(mesh.batch_rank)
    losses, peaks = [], [resident("VmHWM")]
    for _ in range(count):
        recompute = recompute_blocks(model, settings["recompute"])
        ids = rng.integers(3, config.vocab_size, tokens)
        batch = pack([Example.of(part) for part in np.array_split(ids, 2)])
        with recompute:
            logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
            loss = -logprob.sum() / batch.weight
            loss.backward()
        losses.append(loss.item())
        del loss, logprob
        optimizer.step(options.lr)
        peaks.append(resident("VmHWM"))
    return losses, peaks


def predicted_bytes(settings: dict[str, Any]) -> dict[str, float]:
    """What a dry run says of a rank, by component."""
    from llama2rt.model import LlamaConfig
    from llama2rt.parallel import ParallelOptions
    from llama2rt.planning import Model, memory

    options = ParallelOptions(**{name: settings[name] for name in DEGREES})
    degrees = options.degrees(options.least_ranks)
    ranks = degrees["data"] * degrees["shard"]
    how = memory.Setting(
        degrees, 4, settings["tokens"] // ranks, 1, recompute=settings["recompute"], cuda=False
    )
    return memory.training(Model("model", LlamaConfig(**settings["shape"])), how)


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """`train` in as many processes as the degrees ask for; the fullest one's row."""
    ranks = 1
    for name in DEGREES:
        ranks *= settings[name]
    command = [sys.executable, "-P"]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--alone", json.dumps(settings)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if said.returncode:
        sys.exit(said.stderr)
    row: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in DEGREES:
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="of a step, over all ranks")
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--dim", type=int, default=SHAPE["dim"])
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument(
        "--allocator",
        choices=["kept", "glibc"],
        default="kept",
        help="kept: as the command line sets it; glibc: its defaults",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        from llama2rt.parallel.command import joined

        with joined():
            train(json.loads(given.alone))
        sys.stdout.flush()
        os._exit(0)  # as the command ends: gloo's threads may abort what tears them down
    shape = SHAPE | {"layers": given.layers, "dim": given.dim}
    shape |= {"ffn_hidden": 11 * given.dim // 4}
    settings = {
        "shape": shape,
        **{name: getattr(given, name) for name in (*DEGREES, "tokens", "recompute", "allocator")},
    }
    parts = predicted_bytes(settings)
    row = measured(settings)
    row["predicted_mib"] = sum(parts.values()) / MIB
    row["error"] = row["predicted_mib"] / row["peak_above_mib"] - 1
    print(
        f"peak {row['peak_above_mib']:.0f} MiB above start, predicted {row['predicted_mib']:.0f} "
        f"({row['error']:+.1%}), {row['seconds']:.0f} s, after the build and each step "
        f"{[round(size) for size in row['after_each_step_mib']]}"
    )
    if given.out:
        import records

        given.out.parent.mkdir(parents=True, exist_ok=True)
        found = records.header("cpu") | {
            "what": "peak memory of a rank that trains",
            **settings,
            "predicted_mib_by_component": {name: size / MIB for name, size in parts.items()},
            **row,
        }
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
