"""What users install: kernels/ is in the wheel and in the source archive, once, where it belongs;
and the wheel of a machine without nvcc works.

In the source tree llama2rt/kernels is a link to kernels/, and a build that followed it would pack
the folder twice. That is asked without compiling.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import toolchain

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(
    path.name for path in (ROOT / "kernels").iterdir() if path.suffix in (".py", ".json")
)


def built(
    function: str, settings: dict[str, str], folder: Path, environment: dict[str, str] | None = None
) -> Path:
    call = f"{function}({str(folder)!r}, {settings})"
    program = f"from scikit_build_core.build import {function}; print({call})"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / run.stdout.splitlines()[-1]


def test_the_wheel_holds_the_kernels_once(tmp_path):
    wheel = built("build_wheel", {"wheel.cmake": "false"}, tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert len(set(names)) == len(names)
    for kernel in KERNELS:
        assert [name for name in names if f"/{name}".endswith(f"/kernels/{kernel}")] == [
            f"llama2rt/kernels/{kernel}"
        ]
    assert not any(name.endswith(".pyc") for name in names)


def test_the_source_archive_holds_the_kernels_once(tmp_path):
    archive = built("build_sdist", {}, tmp_path)
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    top = names[0].partition("/")[0]
    assert len(set(names)) == len(names)
    for kernel in KERNELS:
        assert [name for name in names if f"/{name}".endswith(f"/kernels/{kernel}")] == [
            f"{top}/kernels/{kernel}"
        ]
    assert not any(name.startswith(f"{top}/llama2rt/kernels") for name in names)
    assert f"{top}/csrc/cpu/swiglu.cpp" in names


ON_A_CPU = """
import importlib.util, sys
import llama2rt
assert "torch" not in sys.modules
assert importlib.util.find_spec("llama2rt._cuda") is None
import torch
from llama2rt import ops
x, weight = torch.randn(5, 64), torch.rand(64)
with ops.use("cpu"):
    ours = ops.rms_norm(x, weight, 1e-5)
with ops.use("reference"):
    torch.testing.assert_close(ours, ops.rms_norm(x, weight, 1e-5))
try:
    with ops.use("cuda"):
        ops.rms_norm(x, weight, 1e-5)
except ValueError as error:
    print(llama2rt.__file__, error, sep="\\n")
"""


def test_a_wheel_built_without_nvcc_works_on_a_cpu(tmp_path):
    """It also is what `pip install .` makes there, but not optimised: that takes a quarter of the
    time, and what the kernels compute in an optimised build is the other tests' matter."""
    tools = tmp_path / "bin"
    tools.mkdir()
    environment = toolchain.environment(tools, None) | {"SKBUILD_CMAKE_ARGS": toolchain.HIDE_NVCC}
    environment.pop("LLAMA2RT_CUDA", None)
    settings = {"build-dir": str(tmp_path / "build"), "cmake.build-type": "Debug"}
    wheel = built("build_wheel", settings, tmp_path, environment)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert len(list(site.glob("llama2rt/_*.so"))) == 1
    run = subprocess.run(
        [sys.executable, "-P", "-c", ON_A_CPU],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    where, why = run.stdout.splitlines()
    assert where == str(site / "llama2rt/__init__.py")
    assert "no nvcc" in why and "LLAMA2RT_CUDA=OFF" in why
