"""What users install: kernels/ is in the wheel and in the source archive, once, where it belongs.

In the source tree llama2rt/kernels is a link to kernels/, and a build that followed it would pack
the folder twice. Packed without compiling: the native modules are not what is asked about.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(
    path.name for path in (ROOT / "kernels").iterdir() if path.suffix in (".py", ".json")
)


def built(function: str, settings: dict[str, str], folder: Path) -> Path:
    call = f"{function}({str(folder)!r}, {settings})"
    program = f"from scikit_build_core.build import {function}; print({call})"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / run.stdout.splitlines()[-1]


def test_the_wheel_holds_the_kernels_once(tmp_path):
    wheel = built("build_wheel", {"wheel.cmake": "false"}, tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert len(set(names)) == len(names)
    for kernel in KERNELS:
        assert [name for name in names if name.endswith(f"kernels/{kernel}")] == [
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
        assert [name for name in names if name.endswith(f"kernels/{kernel}")] == [
            f"{top}/kernels/{kernel}"
        ]
    assert not any(name.startswith(f"{top}/llama2rt/kernels") for name in names)
    assert f"{top}/csrc/cpu/swiglu.cpp" in names
