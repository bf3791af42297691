"""What this installation can do, what it cannot, why, and how to get the rest.

The first page to read when something is slow or missing, so it imports as little as it can and
turns every failure into a line of the report. It changes nothing and needs no network. Where the
command line's own requirements are missing, `python -P -m llama2rt.doctor [--json]` still runs.
"""

import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import llama2rt

# distribution -> (what it adds here, how to get it)
OPTIONAL = {
    "triton": ("compiler of the Triton kernels", "comes with CUDA builds of torch"),
    "flash-attn": (
        "attention to compare with on a GPU",
        "pip install flash-attn --no-build-isolation, on a machine with nvcc",
    ),
    "apex": (
        "NVIDIA's fused RMSNorm, to compare with on a GPU",
        "build https://github.com/NVIDIA/apex (PyPI's apex is another project)",
    ),
    "transformers": ("parity tests and benchmarks", "pip install transformers"),
    "trl": ("parity tests of losses", "pip install trl"),
    "pyarrow": ("reading Parquet", "pip install pyarrow"),
    "datasets": ("reading Hugging Face datasets", "pip install datasets"),
    "wandb": ("logging to Weights & Biases", "pip install wandb"),
}


def _version(distribution: str) -> str | None:
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return None
    if distribution == "apex":
        spec = find_spec("apex")
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not any((Path(folder) / "normalization").is_dir() for folder in folders):
            return None
    return found


def _native(name: str, not_built: str) -> dict[str, Any]:
    """The native module `name`: where it is and its kernels, or why it cannot be used."""
    if find_spec(f"llama2rt.{name}") is None:
        return {"built": False, "reason": not_built}
    try:
        module = importlib.import_module(f"llama2rt.{name}")
    except ImportError as error:
        return {"built": True, "reason": f"it does not load: {error}"}
    return {"built": True, "path": module.__file__, "kernels": list(module.KERNELS)}


def _cpu() -> dict[str, Any]:
    found = _native("_cpu", "it was not built: install llama2rt with pip, with a C++ compiler")
    if "kernels" in found:
        from llama2rt import _cpu

        found["instruction_set"] = _cpu.isa()
        found["instruction_sets"] = list(_cpu.instruction_sets())
    return found


def _cuda() -> dict[str, Any]:
    found = _native(
        "_cuda",
        "it was not built: no nvcc when llama2rt was installed, or LLAMA2RT_CUDA=OFF; put nvcc on "
        "PATH and reinstall with LLAMA2RT_CUDA=ON",
    )
    if "kernels" in found:
        from llama2rt import _cuda

        found["architectures"] = _cuda.ARCHITECTURES.split()
        found["driver_version"] = _cuda.driver_version()
        try:
            importlib.import_module("llama2rt.ops.cuda")
        except ImportError as error:
            found["reason"] = str(error)
    return found


def _openmp() -> list[str]:
    """OpenMP runtimes in this process. More than one means more than one pool of threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp")))


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways, each worth showing
        return {"reason": f"torch does not import: {error!r}"}
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": [],
    }
    if torch.version.cuda is None:
        found["no_gpu"] = "this torch is a build without CUDA"
    elif not torch.cuda.is_available():
        found["no_gpu"] = "torch sees no usable NVIDIA GPU"
    else:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            found["gpus"].append(
                {
                    "name": gpu.name,
                    "architecture": f"sm_{gpu.major}{gpu.minor}",
                    "memory_bytes": gpu.total_memory,
                }
            )
    return found


def _ops() -> dict[str, Any]:
    try:
        from llama2rt import ops

        return ops.backends()
    except Exception as error:
        return {"reason": f"llama2rt.ops does not import: {error!r}"}


def examine() -> dict[str, Any]:
    """The report as a dictionary; `problems` lists what keeps the library from working at all."""
    # torch first: the native module then finds its OpenMP runtime loaded.
    torch = _torch()
    report: dict[str, Any] = {
        "llama2rt": llama2rt.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch,
        "_cpu": _cpu(),
        "_cuda": _cuda(),
        "ops": _ops(),
        "openmp": _openmp(),
        "optional": {
            name: {"version": _version(name), "for": purpose, "get": get}
            for name, (purpose, get) in OPTIONAL.items()
        },
    }
    problems = [torch["reason"]] if "reason" in torch else []
    if "reason" in report["_cpu"]:
        problems.append(f"llama2rt._cpu: {report['_cpu']['reason']}")
    if "reason" in report["ops"]:
        problems.append(report["ops"]["reason"])
    report["problems"] = problems
    return report


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(report: dict[str, Any], console: Console) -> None:
    torch, cpu, cuda = report["torch"], report["_cpu"], report["_cuda"]
    facts = _table("", "", "")
    facts.show_header = False
    facts.add_row("llama2rt", f"{report['llama2rt']}, Python {report['python']}")
    facts.add_row("machine", report["machine"])
    if "version" in torch:
        facts.add_row("torch", f"{torch['version']}, {torch['threads']} threads")
        gpus = [f"{g['name']} ({g['architecture']})" for g in torch["gpus"]]
        facts.add_row("GPU", ", ".join(gpus) or f"none: {torch['no_gpu']}")
    if report["openmp"]:
        facts.add_row("OpenMP", "\n".join(report["openmp"]))
    if "kernels" in cpu:
        usable = ", ".join(cpu["instruction_sets"])
        facts.add_row("_cpu", f"{cpu['instruction_set']} (usable: {usable})")
        facts.add_row("", ", ".join(cpu["kernels"]))
    else:
        facts.add_row("_cpu", cpu["reason"])
    if "kernels" in cuda:
        facts.add_row("_cuda", f"built for {', '.join(cuda['architectures'])}")
        facts.add_row("", ", ".join(cuda["kernels"]))
    if "reason" in cuda:
        facts.add_row("" if "kernels" in cuda else "_cuda", cuda["reason"])
    console.print(facts)

    if "reason" not in report["ops"]:
        ops = _table("\nOps on a CPU", "op", "runs on", "native code in")
        for op, found in report["ops"].items():
            ops.add_row(op, found["chosen"], ", ".join(found["native"]) or "none: composed")
        console.print(ops)

    optional = _table("\nOptional packages", "package", "version", "adds", "get it")
    for name, found in report["optional"].items():
        have = found["version"]
        optional.add_row(name, have or "-", found["for"], "" if have else found["get"])
    console.print(optional)
    for problem in report["problems"]:
        console.print(f"\nproblem: {problem}", style="bold red", markup=False)


def doctor(*, json: bool = False) -> None:
    """Print what is built, what is missing, why, and how to get it. Status 1 on a problem."""
    report = examine()
    if json:
        print(dumps(report))
    else:
        _print(report, Console())
    if report["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    doctor(json="--json" in sys.argv)
