"""An environment to build in whose compilers are known: with an nvcc, or with none to be found."""

import os
import shutil
import sysconfig
from pathlib import Path

TOOLS = (
    *("c++", "cc", "g++", "gcc", "ld", "as", "ar", "ranlib", "strip", "make", "ninja", "cmake"),
    *("sh", "uname"),
)
# Where pip puts programs, whether or not the environment is activated.
SCRIPTS = sysconfig.get_path("scripts")
# CMake's own guesses (/usr/local/cuda) off, so that a machine with nvcc can test its absence.
HIDE_NVCC = "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"


def program(name: str) -> str | None:
    return shutil.which(name, path=SCRIPTS) or shutil.which(name)


def environment(folder: Path, nvcc: Path | None) -> dict[str, str]:
    """This process's, but on PATH only TOOLS and `nvcc`; what is linked lies in `folder`."""
    # Debian's Python names its compilers by their target, and scikit-build-core goes by that.
    named = (str(sysconfig.get_config_var(name) or "").split()[:1] for name in ("CC", "CXX"))
    for tool in {*TOOLS, *(Path(tool).name for tools in named for tool in tools)}:
        if found := program(tool):
            (folder / tool).symlink_to(found)
    if nvcc:
        (folder / "nvcc").symlink_to(nvcc)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CMAKE", "SKBUILD"))}
    return kept | {"PATH": str(folder)}
