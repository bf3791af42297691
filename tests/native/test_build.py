"""The native build: what the modules promise about themselves, what CMake says about CUDA, and that
every .cu compiles for both architectures without spilling a register.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ("rms_norm", "swiglu", "rope", "attention", "decode", "logprob")
# Where pip puts programs, whether or not the environment is activated.
SCRIPTS = sysconfig.get_path("scripts")
CMAKE = shutil.which("cmake", path=SCRIPTS) or shutil.which("cmake")
NVCC = shutil.which("nvcc")


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_a_module_imports_alone_and_names_its_kernels(name):
    if importlib.util.find_spec(f"llama2rt.{name}") is None:
        pytest.skip(f"{name} is not built")
    program = (
        f"import sys; from llama2rt import {name} as module;"
        "print(*module.KERNELS); print('torch' in sys.modules)"
    )
    # -P: the installed package, not the source tree, which holds no native module.
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels, torch_loaded = run.stdout.splitlines()
    assert kernels and torch_loaded == "False"
    assert all(any(op in kernel for op in OPS) for kernel in kernels.split())


def configure(folder: Path, choice: str, *, nvcc: bool) -> subprocess.CompletedProcess:
    """CMake's configuration with LLAMA2RT_CUDA=`choice`, with nvcc findable or not."""
    pybind11 = pytest.importorskip("pybind11")
    if CMAKE is None:
        pytest.skip("cmake is not installed")
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("c++", "cc", "g++", "gcc", "make", "ld", "as", "ar", "ranlib", "sh", "uname"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    if nvcc:
        if NVCC is None:
            pytest.skip("nvcc is not on PATH")
        (tools / "nvcc").symlink_to(NVCC)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CMAKE"))}
    return subprocess.run(
        [
            CMAKE,
            *("-S", ROOT, "-B", folder / "build", "-G", "Unix Makefiles"),
            # Off: CMake's own guesses (/usr/local/cuda), so that a machine with nvcc can test this.
            *(() if nvcc else ("-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF",)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        env=environment | {"PATH": str(tools), "LLAMA2RT_CUDA": choice},
        capture_output=True,
        text=True,
    )


def test_auto_without_nvcc_says_so_in_one_line(tmp_path):
    run = configure(tmp_path, "AUTO", nvcc=False)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if "llama2rt" in line and "_cuda" in line]
    assert lines == ["-- llama2rt: _cuda is not built: no nvcc on PATH and CUDACXX is not set."]


def test_on_without_nvcc_is_an_error_of_one_sentence(tmp_path):
    run = configure(tmp_path, "ON", nvcc=False)
    assert run.returncode != 0
    assert "LLAMA2RT_CUDA=ON, but no nvcc was found" in run.stderr


def test_off_asks_for_no_nvcc(tmp_path):
    run = configure(tmp_path, "off", nvcc=False)
    assert run.returncode == 0 and "not built: LLAMA2RT_CUDA=OFF" in run.stdout


def test_any_other_choice_is_refused(tmp_path):
    run = configure(tmp_path, "MAYBE", nvcc=False)
    assert run.returncode != 0 and "must be AUTO, ON or OFF" in run.stderr


def test_on_with_nvcc_builds_for_both_architectures(tmp_path):
    run = configure(tmp_path, "ON", nvcc=True)
    assert run.returncode == 0, run.stderr
    assert "_cuda is built for 80-real;90a-real;80-virtual" in run.stdout


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_a_cuda_source_compiles_without_spills(source, architecture, tmp_path):
    run = subprocess.run(
        [
            *(NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v"),
            *(
                f"-I{source.parent}",
                "--expt-relaxed-constexpr",
                "-cubin",
                "-o",
                tmp_path / "kernels.cubin",
                source,
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", run.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert kernels and all(any(op in kernel for op in OPS) for kernel in kernels)
    assert len(spills) >= len(kernels) and set(spills) == {("0", "0")}, run.stderr
