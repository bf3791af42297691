"""What the compiler made of every CUDA kernel, read from the built module; no GPU is needed.

Of each kernel and architecture: registers and stack per thread (a kernel that spills has a stack),
shared memory and the most threads of a block, the share of a multiprocessor's warps that all this
lets run at once, and how often its machine code holds the instructions that it is written around.
The figures of record are in `resources.json`, with the CUDA version that gave them; a test
(tests/native/test_cuda_resources.py) reads the module again and compares. Kernels need no entry
here: they are found in the module, with the `cuobjdump` of Triton's wheel or of a CUDA toolkit.
Dynamic shared memory is asked for at launch and is in no machine code: the launches themselves say
how much (shared_bytes.h), and a kernel without one is an error.

    python -P csrc/cuda/resources.py                                     prints the table
    python -P csrc/cuda/resources.py --json                              as JSON
    python -P csrc/cuda/resources.py --record csrc/cuda/resources.json   rewrites the record

Left out: loop counts, bank conflicts and cache hits, which a profiler alone knows.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

# Matrix products of sm_80 and of sm_90a, asynchronous copies of both, 16-byte loads.
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "UTMALDG", "LDG.128")


@dataclass(frozen=True)
class Multiprocessor:
    """Limits and allocation units: CUDA C++ Programming Guide, "Technical Specifications per
    Compute Capability", compute capabilities 8.0 and 9.0; "CUDA Occupancy Calculator"."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    register_unit: int = 256  # per warp
    shared_unit: int = 128
    shared_reserved: int = 1024  # by the system, per block
    reserve_is_counted: bool = False  # by ptxas, in the shared memory of a kernel that has any


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 * 1024),
    "sm_90a": Multiprocessor(shared_bytes=228 * 1024, reserve_is_counted=True),
}


@dataclass(frozen=True)
class Resources:
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread: spilled registers and arrays that are indexed at run time."""
    static_shared_bytes: int
    dynamic_shared_bytes: int
    """Per block, both. Where a launch's dynamic part depends on its sizes: the most."""
    threads: int | None
    """The most of a block, from the kernel's launch bounds; None if it states none."""
    occupancy: float | None
    """The most warps at once, as a share of what a multiprocessor holds; None without `threads`.
    0.0: this architecture has not the shared memory for one block."""
    instructions: dict[str, int]
    """INSTRUCTIONS -> how many of them are in the code."""


def occupancy(limits: Multiprocessor, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that run at once in blocks of `threads` threads."""

    def up(value: int, unit: int) -> int:
        return -(-value // unit) * unit

    warps = -(-threads // 32)
    registers_of_warp = up(32 * registers, limits.register_unit)
    shared_of_block = up(shared_bytes + limits.shared_reserved, limits.shared_unit)
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // registers_of_warp // warps,
        limits.shared_bytes // shared_of_block,
    )
    return blocks * warps / limits.warps


def find_cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if found := shutil.which("cuobjdump", path=Path(folder, "backends/nvidia/bin")):
            return found
    if found := shutil.which("cuobjdump"):
        return found
    raise FileNotFoundError("no cuobjdump: neither Triton's wheel nor a CUDA toolkit has one here")


def _output(*command: str | Path, given: str | None = None) -> str:
    run = subprocess.run(command, input=given, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {run.returncode}: {run.stderr}")
    return run.stdout


def _by_architecture(dump: str) -> dict[str, str]:
    """The parts of a dump that come from machine code, "sm_NN" -> text."""
    found: dict[str, str] = {}
    for part in dump.split("\nFatbin elf code:\n")[1:]:
        # What follows may be PTX, which begins with a heading of its own.
        part = part.partition("\nFatbin ptx code:\n")[0]
        match = re.search(r"^arch = (\w+)$", part, re.MULTILINE)
        assert match, part[:200]
        found[match[1]] = found.get(match[1], "") + part
    return found


def _usage(dump: str) -> dict[str, dict[str, int]]:
    """Mangled name -> {"REG": ..., "STACK": ..., "SHARED": ...}."""
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", figures)}
        for name, figures in re.findall(r"^ Function (\w+):\n(.*)$", dump, re.MULTILINE)
    }


def _threads(dump: str) -> dict[str, int]:
    """Mangled name -> threads of the launch bounds, for kernels that state them."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", dump, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        # A section ends where the next one's name begins a line.
        rest = re.split(r"^\.", rest, maxsplit=1, flags=re.MULTILINE)[0]
        bounds = re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(.*)$", rest, re.MULTILINE)
        if bounds:
            x, y, z = (int(size, 16) for size in bounds[1].split())
            found[name] = x * y * z
    return found


_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)((?:\.\w+)*)", re.MULTILINE)


def _instructions(dump: str) -> dict[str, dict[str, int]]:
    """Mangled name -> counts of INSTRUCTIONS."""
    found = {}
    for part in dump.split("\t\tFunction : ")[1:]:
        name, _, code = part.partition("\n")
        counts = Counter(
            "LDG.128" if opcode == "LDG" and ".128" in modifiers else opcode
            for opcode, modifiers in _OPCODE.findall(code)
        )
        found[name] = {key: counts[key] for key in INSTRUCTIONS}
    return found


def short(demangled: str) -> str:
    """ "void llama2rt::(anonymous namespace)::f<__half, 8>(long)" -> "f<fp16, 8>"."""
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = name.replace("llama2rt::", "").replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def dynamic_bytes(launches: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Kernel -> the most that one of its launches asks for, from `_cuda.most_shared_bytes()`."""
    mangled, sizes = zip(*launches, strict=True)
    found: dict[str, int] = {}
    readable = _output("c++filt", "--types", given="\n".join(mangled)).splitlines()
    for name, size in zip(readable, sizes, strict=True):
        # Of a template "llama2rt::Named<&(void f<8>(long))>", else "llama2rt::Named<&f>".
        match = re.fullmatch(r"llama2rt::Named<&(?:\((.*)\)|(.*))>", name)
        assert match, name
        kernel = short(match[1] or match[2])
        found[kernel] = max(size, found.get(kernel, 0))
    return found


def read(module: Path, dynamic: dict[str, int]) -> dict[str, Resources]:
    """ "kernel, sm_NN" -> what each kernel in `module` uses; sorted by name.

    `dynamic` has the shared memory that launches ask for. ValueError where it lacks a kernel of
    `module` or has another; AssertionError where the binary has an architecture that
    MULTIPROCESSORS does not know.
    """
    cuobjdump = find_cuobjdump()
    usage, bounds, code = (
        _by_architecture(_output(cuobjdump, option, module))
        for option in ("--dump-resource-usage", "--dump-elf", "--dump-sass")
    )
    found: dict[str, Resources] = {}
    for architecture, text in usage.items():
        assert architecture in MULTIPROCESSORS, f"no limits are known of {architecture}"
        figures = _usage(text)
        threads = _threads(bounds[architecture])
        counts = _instructions(code[architecture])
        # GNU's name for it; it comes with every C++ compiler that can have built the module.
        readable = _output("c++filt", given="\n".join(figures)).splitlines()
        names = [short(demangled) for demangled in readable]
        if unlike := set(names) ^ dynamic.keys():
            raise ValueError(f"not both compiled for {architecture} and launched: {sorted(unlike)}")
        for mangled, kernel in zip(figures, names, strict=True):
            name = f"{kernel}, {architecture}"
            assert name not in found, f"two kernels are called {name!r}"
            found[name] = _resources(
                MULTIPROCESSORS[architecture],
                figures[mangled],
                dynamic[kernel],
                threads.get(mangled),
                counts[mangled],
            )
    return dict(sorted(found.items()))


def _resources(
    limits: Multiprocessor,
    figures: dict[str, int],
    dynamic: int,
    threads: int | None,
    instructions: dict[str, int],
) -> Resources:
    static, registers = figures["SHARED"], figures["REG"]
    if static and limits.reserve_is_counted:
        static -= limits.shared_reserved
    share = occupancy(limits, threads, registers, static + dynamic) if threads else None
    return Resources(registers, figures["STACK"], static, dynamic, threads, share, instructions)


def table(kernels: dict[str, Resources]) -> str:
    """One line a kernel; static and dynamic are of shared memory."""
    width = max(map(len, kernels))
    heads = ("threads", "registers", "stack", "static", "dynamic", "occupancy", *INSTRUCTIONS)
    lines = [f"{'kernel':<{width}}  " + "  ".join(f"{head:>9}" for head in heads)]
    for name, r in kernels.items():
        share = "-" if r.occupancy is None else f"{100 * r.occupancy:.0f} %"
        shared = (r.static_shared_bytes, r.dynamic_shared_bytes)
        cells = (r.threads or "-", r.registers, r.stack_bytes, *shared, share)
        counts = (r.instructions[key] for key in INSTRUCTIONS)
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>9}" for cell in (*cells, *counts)))
    return "\n".join(lines)


def as_json(kernels: dict[str, Resources], cuda_version: int) -> str:
    rows = [f"  {json.dumps(name)}: {json.dumps(asdict(r))}" for name, r in kernels.items()]
    return f'{{"cuda": {cuda_version}, "kernels": {{\n' + ",\n".join(rows) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--json", action="store_true", help="print JSON instead of a table")
    choice.add_argument("--record", type=Path, metavar="FILE", help="write the JSON to FILE")
    arguments = parser.parse_args()
    try:
        from llama2rt import _cuda
    except ImportError as error:
        sys.exit(f"llama2rt._cuda is not built: {error}")
    kernels = read(Path(_cuda.__file__), dynamic_bytes(_cuda.most_shared_bytes()))
    if arguments.record:
        arguments.record.write_text(as_json(kernels, _cuda.CUDA_VERSION), encoding="utf-8")
    elif arguments.json:
        print(as_json(kernels, _cuda.CUDA_VERSION), end="")
    else:
        print(table(kernels))


if __name__ == "__main__":
    main()
