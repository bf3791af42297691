"""Ahead-of-time compilation of every kernel, for both architectures, on a machine without a GPU.

What it proves: that the kernels compile with the settings they ship with, and what they then use:
registers and stack per thread (a kernel that spills has a stack), shared memory per block. The
figures of record are in `resources.json`, one table for each release of Triton that is looked
after: the one `make test` installs and the newest. The tests compile again with the release that is
installed and compare with its table.

    python -P -m llama2rt.kernels.aot                                  prints the table
    python -P -m llama2rt.kernels.aot --record kernels/resources.json  puts it into the record

For another release than the installed one, before the second command:

    pip install --no-deps --target build/triton triton==3.9.0 && export PYTHONPATH=build/triton
"""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama2rt.kernels import launch_options

ARCHITECTURES = (80, 90)
MODULES = (
    "rms_norm",
    "swiglu",
    "rope",
    "attention",
    "attention_backward",
    "decode_attention",
    "token_logprob",
    "token_logprob_backward",
)


@dataclass(frozen=True)
class Case:
    """One kernel as a host function would launch it."""

    name: str
    """Kernel, dtype and what else is special ("columns 4096"); unique per architecture."""
    kernel: Any
    signature: Mapping[str, str]
    """Run-time arguments in Triton's notation: "*bf16", "i32", "i64", "fp32"; ":16" appended to a
    pointer or integer says that it is divisible by 16, as the launcher finds at run time."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    architectures: tuple[int, ...] = ARCHITECTURES
    """Those that have these settings."""


@dataclass(frozen=True)
class Resources:
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread; Triton's kernels have one only where registers are spilled."""
    shared_bytes: int
    """Per block, statically or dynamically allocated."""


def cases() -> dict[str, tuple[Case, int]]:
    """ "name, sm_NN" -> (case, architecture)."""
    found: dict[str, tuple[Case, int]] = {}
    for module in MODULES:
        for case in importlib.import_module(f"llama2rt.kernels.{module}").aot_cases():
            for architecture in case.architectures:
                key = f"{case.name}, sm_{architecture}"
                assert key not in found, f"two cases are called {key!r}"
                found[key] = case, architecture
    return found


def compile_case(case: Case, architecture: int) -> Any:
    """The compiled kernel; its `.asm` holds "ptx" and "cubin"."""
    names = case.kernel.arg_names
    typed = {name: kind.partition(":") for name, kind in case.signature.items()}
    source = ASTSource(
        fn=case.kernel,
        signature={name: typed[name][0] if name in typed else "constexpr" for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", int(hint)]]
            for name, (_, _, hint) in typed.items()
            if hint
        },
    )
    options = launch_options(case.num_warps, case.num_stages)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(case: Case, architecture: int) -> Resources:
    """What `case` uses when it is compiled for sm_`architecture`."""
    compiled = compile_case(case, architecture)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    figures = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return Resources(figures["REG"], figures["STACK"], compiled.metadata.shared)


def _row(key: str) -> dict[str, int]:
    return asdict(resources(*cases()[key]))


def table(workers: int = 2) -> dict[str, dict[str, int]]:
    """ "name, sm_NN" -> resources of every case, compiled by `workers` processes."""
    keys = list(cases())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(keys, pool.map(_row, keys, chunksize=4), strict=True))


def record_text(tables: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """JSON of release -> table, a line for each kernel, so that a diff of it can be read."""
    texts = []
    for release, kernels in tables.items():
        rows = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in kernels.items()]
        texts.append(f"{json.dumps(release)}: {{\n" + ",\n".join(rows) + "\n}")
    return "{" + ",\n".join(texts) + "}\n"


def main(arguments: list[str]) -> None:
    if not arguments:
        print(record_text({triton.__version__: table()}), end="")
    elif len(arguments) == 2 and arguments[0] == "--record":
        path = Path(arguments[1])
        tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        tables[triton.__version__] = table()
        path.write_text(record_text(tables), encoding="utf-8")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
