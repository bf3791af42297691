"""The native build: what the modules promise about themselves, and what CMake says about CUDA.

What the compiler made of the CUDA kernels is test_cuda_resources.py's.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toolchain

ROOT = Path(__file__).resolve().parents[2]
OPS = ("rms_norm", "swiglu", "rope", "attention", "decode", "logprob")
CMAKE = toolchain.program("cmake")
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
    folder: Path,
    choice: str,
    *,
    nvcc: Path | None = None,
    build: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess:
    """CMake's configuration with LLAMA2RT_CUDA=`choice`, `nvcc` the only one on PATH, and
    environment variables; in `folder`/build, or in a `build` of before."""
    pybind11 = pytest.importorskip("pybind11")
    if CMAKE is None:
        pytest.skip("cmake is not installed")
    tools = folder / "bin"
    tools.mkdir()
    environment = toolchain.environment(tools, nvcc) | {"MAX_JOBS": ""} | variables
    return subprocess.run(
        [
            CMAKE,
            *("-S", ROOT, "-B", build or folder / "build", "-G", "Unix Makefiles"),
            *(() if nvcc else (toolchain.HIDE_NVCC,)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        env=environment | {"LLAMA2RT_CUDA": choice},
        capture_output=True,
        text=True,
    )


def installs(folder: Path) -> set[str]:
    """The native modules that a wheel of this configuration holds."""
    script = (folder / "build/cmake_install.cmake").read_text(encoding="utf-8")
    return {name for name in ("_cpu", "_cuda") if f"/{name}." in script}


@pytest.fixture(params=["none", "broken", "a wrong CUDACXX"])
def unusable(request, tmp_path) -> dict[str, Path | str]:
    """Arguments of `configure` for a machine without an nvcc that works."""
    if request.param == "none":
        return {}
    if request.param == "a wrong CUDACXX":
        return {"CUDACXX": str(tmp_path / "nvcc")}
    broken = tmp_path / "broken-nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    return {"nvcc": broken}


def test_auto_without_nvcc_says_so_in_one_line(tmp_path, unusable):
    run = configure(tmp_path, "AUTO", **unusable)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if "llama2rt" in line and "_cuda" in line]
    assert lines == [
        "-- llama2rt: _cuda is not built: no working nvcc is on PATH, and CUDACXX names none."
    ]
    assert installs(tmp_path) == {"_cpu"}


def test_on_without_nvcc_is_an_error_of_one_sentence(tmp_path, unusable):
    run = configure(tmp_path, "ON", **unusable)
    assert run.returncode != 0
    assert run.stderr.count("CMake Error") == 1
    sentence = "LLAMA2RT_CUDA=ON, but no working nvcc is on PATH, and CUDACXX names none."
    assert sentence in run.stderr, run.stderr


def test_off_asks_for_no_nvcc(tmp_path):
    run = configure(tmp_path, "off")
    assert run.returncode == 0 and "not built: LLAMA2RT_CUDA=OFF" in run.stdout
    assert installs(tmp_path) == {"_cpu"}


def test_any_other_choice_is_refused(tmp_path):
    run = configure(tmp_path, "MAYBE")
    assert run.returncode != 0 and "must be AUTO, ON or OFF" in run.stderr


def test_with_nvcc_builds_for_both_architectures_and_for_none_without_the_instructions(tmp_path):
    """In one folder, as what takes long is to find out what nvcc can do."""
    if NVCC is None:
        pytest.skip("nvcc is not on PATH")
    build = tmp_path / "build"
    for architecture in ("75-real", "all-major"):
        (tmp_path / architecture).mkdir()
        settings = {"nvcc": Path(NVCC), "build": build, "CUDAARCHS": architecture}
        run = configure(tmp_path / architecture, "AUTO", **settings)
        assert run.returncode != 0
        assert f"CUDA architecture {architecture}: expected 80 (A100) or later" in run.stderr
    run = configure(tmp_path, "ON", nvcc=Path(NVCC), build=build, CUDAARCHS="")
    assert run.returncode == 0, run.stderr
    assert "_cuda is built for 80-real;90a-real;80-virtual" in run.stdout
    assert installs(tmp_path) == {"_cpu", "_cuda"}


def test_max_jobs_is_honoured_and_memory_bounds_it_otherwise(tmp_path):
    for jobs in ("3", ""):
        (tmp_path / f"jobs{jobs}").mkdir()
        run = configure(tmp_path / f"jobs{jobs}", "OFF", MAX_JOBS=jobs)
        found = re.search(r"at most (\d+) compile jobs at once: (.*)\.", run.stdout)
        assert run.returncode == 0 and found, run.stdout + run.stderr
        if jobs:
            assert found.groups() == ("3", "MAX_JOBS")
        else:
            cores, memory = re.search(r"(\d+) cores, 2048 MiB .* of (\d+) MiB", found[2]).groups()
            assert int(found[1]) == max(1, min(int(cores), int(memory) // 2048))


def test_max_jobs_that_is_no_number_is_refused(tmp_path):
    run = configure(tmp_path, "OFF", MAX_JOBS="-2")
    assert run.returncode != 0 and "MAX_JOBS is '-2'; it must be a positive" in run.stderr
