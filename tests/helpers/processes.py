"""Python in a process of its own, and files of Python that are no modules of a package."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType


def run_python(
    *arguments: object,
    python: object = sys.executable,
    status: int | None = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_seconds: float | None = None,
) -> "subprocess.CompletedProcess[str]":
    """`python -P arguments...` with `env` added to the environment.

    AssertionError, with what it said, unless it ends with `status` (None: whatever it is). -P: the
    installed package is imported, not the source tree, which holds no native module.
    """
    done = subprocess.run(
        [str(python), "-P", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
    assert status in (None, done.returncode), f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done


def load_script(path: Path) -> ModuleType:
    """The file as a module of its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for the module of a class
    spec.loader.exec_module(module)
    return module
