"""The CUDA kernels on this CPU: builds csrc/emulator and runs `llama2rt.ops.cuda_kernels` on it."""

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from llama2rt.ops import cuda_kernels

ROOT = Path(__file__).resolve().parents[2]
# Kept between runs: only what has changed is compiled.
FOLDER = ROOT / "build" / "emulator"
# Where pip puts programs, whether or not the environment is activated.
SCRIPTS = sysconfig.get_path("scripts")


def _program(name: str) -> str | None:
    return shutil.which(name, path=SCRIPTS) or shutil.which(name)


def why_not() -> str:
    """Why the emulator cannot be built here; "" if it can."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"the emulator needs Linux on x86-64, this is {sys.platform} {platform.machine()}"
    missing = [name for name in ("cmake", "g++") if _program(name) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return f"the emulator needs {' and '.join(missing)}" if missing else ""


def _run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")


def build(name: str) -> ModuleType:
    """The module `name` of csrc/emulator, compiled from the sources as they are now."""
    import pybind11

    FOLDER.mkdir(parents=True, exist_ok=True)
    cmake, ninja = _program("cmake"), _program("ninja")
    with (FOLDER / "lock").open("w") as lock:  # another pytest may be building
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = (
            *(cmake, "-S", ROOT, "-B", FOLDER, "-DLLAMA2RT_EMULATOR=ON"),
            *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
            f"-DCMAKE_CXX_COMPILER={_program('g++')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        try:
            _run(*configure)
        except RuntimeError:  # the folder was made by another generator, or for another path
            _run(*configure, "--fresh")
        _run(cmake, "--build", FOLDER, "--target", name, "--parallel", os.cpu_count())
    path = FOLDER / f"csrc/emulator/{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Checked:
    """A module of emulated kernels, told before each call which memory the call hands over."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def hand_over(self, arguments: tuple) -> None:
        """The next call may touch the tensors of `arguments`, each from its first element to its
        last."""
        buffers = []
        for x in arguments:
            if isinstance(x, Tensor) and x.numel():
                last = sum(
                    (size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)
                )
                buffers.append((x.data_ptr(), (last + 1) * x.element_size()))
        self.module.set_buffers(buffers)
        self.module.set_os_threads(torch.get_num_threads())

    def __getattr__(self, name: str) -> Callable:
        kernel = getattr(self.module, name)

        def call(*arguments: object) -> object:
            self.hand_over(arguments)
            return kernel(*arguments)

        return call


class Emulated:
    """A `cuda_kernels.Device` whose kernels run on the emulator, over CPU tensors."""

    def __init__(self, module: ModuleType) -> None:
        self.native = Checked(module)

    def stream(self, x: Tensor) -> tuple[int, int]:
        return 0, 0

    def multiprocessors(self, x: Tensor) -> int:
        return self.native.module.MULTIPROCESSORS

    def cache_bytes(self, x: Tensor) -> int:
        return 2**16  # little, so that small tests come by several sections of a grid


def functions(module: ModuleType) -> dict[str, Callable]:
    return cuda_kernels.on(Emulated(module))
