"""The native build: what the modules promise about themselves, and what CMake says about CUDA.

What the compiler made of the CUDA kernels is test_cuda_resources.py's.
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


def configure(
    folder: Path, choice: str, *, nvcc: bool, jobs: str = ""
) -> subprocess.CompletedProcess:
    """CMake's configuration with LLAMA2RT_CUDA=`choice`, MAX_JOBS=`jobs`, nvcc findable or not."""
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
        env=environment | {"PATH": str(tools), "LLAMA2RT_CUDA": choice, "MAX_JOBS": jobs},
        capture_output=True,
        text=True,
    )


def installs(folder: Path) -> set[str]:
    """The native modules that a wheel of this configuration holds."""
    script = (folder / "build/cmake_install.cmake").read_text(encoding="utf-8")
    return {name for name in ("_cpu", "_cuda") if f"/{name}." in script}


def test_auto_without_nvcc_says_so_in_one_line(tmp_path):
    run = configure(tmp_path, "AUTO", nvcc=False)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if "llama2rt" in line and "_cuda" in line]
    assert lines == ["-- llama2rt: _cuda is not built: no nvcc on PATH and CUDACXX is not set."]
    assert installs(tmp_path) == {"_cpu"}


def test_on_without_nvcc_is_an_error_of_one_sentence(tmp_path):
    run = configure(tmp_path, "ON", nvcc=False)
    assert run.returncode != 0
    said = " ".join(run.stderr.split())
    assert said.count("CMake Error") == 1
    assert "LLAMA2RT_CUDA=ON, but no nvcc was found: put it on PATH or set CUDACXX to it." in said


def test_off_asks_for_no_nvcc(tmp_path):
    run = configure(tmp_path, "off", nvcc=False)
    assert run.returncode == 0 and "not built: LLAMA2RT_CUDA=OFF" in run.stdout
    assert installs(tmp_path) == {"_cpu"}


def test_any_other_choice_is_refused(tmp_path):
    run = configure(tmp_path, "MAYBE", nvcc=False)
    assert run.returncode != 0 and "must be AUTO, ON or OFF" in run.stderr


def test_on_with_nvcc_builds_for_both_architectures(tmp_path):
    run = configure(tmp_path, "ON", nvcc=True)
    assert run.returncode == 0, run.stderr
    assert "_cuda is built for 80-real;90a-real;80-virtual" in run.stdout
    assert installs(tmp_path) == {"_cpu", "_cuda"}


def test_max_jobs_is_honoured_and_memory_bounds_it_otherwise(tmp_path):
    for jobs in ("3", ""):
        (tmp_path / f"jobs{jobs}").mkdir()
        run = configure(tmp_path / f"jobs{jobs}", "OFF", nvcc=False, jobs=jobs)
        found = re.search(r"at most (\d+) compile jobs at once: (.*)\.", run.stdout)
        assert run.returncode == 0 and found, run.stdout + run.stderr
        if jobs:
            assert found.groups() == ("3", "MAX_JOBS")
        else:
            cores, memory = re.search(r"(\d+) cores, 2048 MiB .* of (\d+) MiB", found[2]).groups()
            assert int(found[1]) == max(1, min(int(cores), int(memory) // 2048))


def test_max_jobs_that_is_no_number_is_refused(tmp_path):
    run = configure(tmp_path, "OFF", nvcc=False, jobs="-2")
    assert run.returncode != 0 and "MAX_JOBS is '-2'; it must be a positive" in run.stderr
