"""What this installation can do, what it cannot, why, and how to get the rest.

The first page to read when something is slow or missing, so it imports as little as it can and
turns every failure into a line of the report. It changes nothing and needs no network. Where the
command line's own requirements are missing, `python -P -m llama2rt.doctor [--json]` still runs
(without rich, which draws its tables, always as JSON).
"""

import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama2rt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# distribution -> (what it adds here, how to get it)
OPTIONAL = {
    "flash-attn": (
        'attention on a GPU, for ops.use("flash_attn")',
        "pip install flash-attn --no-build-isolation, on a machine with nvcc",
    ),
    "apex": (
        "NVIDIA's fused RMSNorm and Adam, to compare with on a GPU",
        "build https://github.com/NVIDIA/apex (PyPI's apex is another project)",
    ),
    "transformers": (
        "its Llama on our ops (patch_transformers), parity tests and benchmarks",
        "pip install transformers",
    ),
    "trl": ("parity tests of losses", "pip install trl"),
    "pyarrow": ("reading Parquet", "pip install pyarrow"),
    "datasets": ("reading Hugging Face datasets", "pip install datasets"),
    "nvidia-ml-py": ("energy of GPUs", "pip install nvidia-ml-py"),
    "wandb": ("logging to Weights & Biases", "pip install wandb"),
}

# What must be importable from a peer before it can be compared with our kernels.
PEERS = {
    "flash-attn": "flash_attn.flash_attn_interface:_flash_attn_varlen_forward",
    "apex": "apex.normalization:FusedRMSNorm",
}


def _why_not(peer: str) -> str:
    """Why what PEERS names cannot be imported; "" if it can."""
    module, _, name = PEERS[peer].partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # extensions built for another torch fail in many ways
        return f"{module} does not import: {error}"
    return "" if hasattr(found, name) else f"{module} has no {name}"


def _optional(distribution: str, purpose: str, get: str) -> dict[str, Any]:
    found: dict[str, Any] = {"for": purpose, "get": get}
    try:
        found["version"] = version(distribution)
    except PackageNotFoundError:
        return found | {"version": None}
    if distribution in PEERS and (reason := _why_not(distribution)):
        found["reason"] = reason
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


def _triton() -> dict[str, Any]:
    """Triton's version and our kernels in it, or why the backend does not import."""
    try:
        backend = importlib.import_module("llama2rt.ops.triton")
        kernels = importlib.import_module("llama2rt.kernels")  # which the backend only names
    except Exception as error:  # a broken installation fails in many ways, each worth showing
        return {"reason": str(error)}
    return {
        "version": importlib.import_module("triton").__version__,
        "interpreted": kernels.INTERPRETED,
        "kernels": [name for name in backend.NATIVE if not name.endswith("_backward")],
    }


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
    """device -> `ops.backends(device)`."""
    try:
        from llama2rt import ops

        return {device: ops.backends(device) for device in ("cpu", "cuda")}
    except Exception as error:
        return {"reason": f"llama2rt.ops does not import: {error!r}"}


def _decoding() -> dict[str, str]:
    """What a plain model's forward passes on a CPU run on in the engine, and why not faster."""
    try:
        import torch

        from llama2rt.ops import packed

        reason = packed.why_not(torch.empty(1))
    except Exception as error:
        reason = repr(error)
    if not reason:
        return {"runs_on": "packed weights"}
    return {"runs_on": "the model's own modules", "reason": reason}


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
        "triton": _triton(),
        "ops": _ops(),
        "decoding": _decoding(),
        "openmp": _openmp(),
        "optional": {
            name: _optional(name, purpose, get) for name, (purpose, get) in OPTIONAL.items()
        },
    }
    problems = [torch["reason"]] if "reason" in torch else []
    if "reason" in report["_cpu"]:
        problems.append(f"llama2rt._cpu: {report['_cpu']['reason']}")
    if "reason" in report["ops"]:
        problems.append(report["ops"]["reason"])
    report["problems"] = problems
    return report


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts(report: dict[str, Any]) -> "Table":
    """What is installed, a line each, with its kernels or the reason why there are none."""
    torch, cpu, cuda, triton = (report[name] for name in ("torch", "_cpu", "_cuda", "triton"))
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
    decoding = report["decoding"]
    why = f": {decoding['reason']}" if "reason" in decoding else ""
    facts.add_row("decoding", f"on a CPU by {decoding['runs_on']}{why}")
    if "kernels" in cuda:
        facts.add_row("_cuda", f"built for {', '.join(cuda['architectures'])}")
        facts.add_row("", ", ".join(cuda["kernels"]))
    if "reason" in cuda:
        facts.add_row("" if "kernels" in cuda else "_cuda", cuda["reason"])
    if "kernels" in triton:
        how = "interpreted (TRITON_INTERPRET=1)" if triton["interpreted"] else "compiled for CUDA"
        facts.add_row("triton", f"{triton['version']}, kernels {how}")
        facts.add_row("", ", ".join(triton["kernels"]))
    else:
        facts.add_row("triton", triton["reason"])
    return facts


def _print_ops(report: dict[str, Any], console: "Console") -> None:
    """What each op runs on, for the devices that are here, and why not on the others."""
    for device, name in (("cpu", "a CPU"), ("cuda", "a GPU")):
        if device == "cuda" and not report["torch"].get("gpus"):
            continue
        ops = _table(f"\nOps on {name}", "op", "runs on", "native code in")
        for op, found in report["ops"][device].items():
            ops.add_row(op, found["chosen"], ", ".join(found["native"]) or "none: composed")
        console.print(ops)
        for backend, reason in found["unusable"].items():
            console.print(f"not {backend}: {reason}", markup=False, highlight=False)


def _print(report: dict[str, Any], console: "Console") -> None:
    console.print(_facts(report))
    if "reason" not in report["ops"]:
        _print_ops(report, console)
    optional = _table("\nOptional packages", "package", "version", "adds", "get it")
    for name, found in report["optional"].items():
        have = found["version"]
        lacking = found.get("reason", "") if have else found["get"]
        optional.add_row(name, have or "-", found["for"], lacking)
    console.print(optional)
    for problem in report["problems"]:
        console.print(f"\nproblem: {problem}", style="bold red", markup=False)


def doctor(*, json: bool = False) -> None:
    """Print what is built, what is missing, why, and how to get it. Status 1 on a problem."""
    report = examine()
    if json or find_spec("rich") is None:
        print(dumps(report))
    else:
        from rich.console import Console

        _print(report, Console())
    if report["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    doctor(json="--json" in sys.argv)
