"""One process at a time in a run directory. The kernel drops the lock of a process that dies."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from llama2rt.errors import InputError

FILE = ".lock"

# Locked run directories of this process: path of the lock -> descriptor.
_held: dict[Path, int] = {}


def lock(directory: Path) -> None:
    """Hold `directory` for this process until `unlock` or until the process ends, however it ends.

    Held already, it stays held. InputError while another process holds it.
    """
    path = directory.resolve() / FILE
    if path in _held:
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(_held[path]).st_ino == path.stat().st_ino:
                return
        os.close(_held.pop(path))  # the directory was deleted, and made anew, since
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise InputError(
                f"{directory}: another process is at work in it; wait for it or stop it first"
            ) from None
        # A file system without locks: nothing can be held there, and nothing is lost by it.
    _held[path] = descriptor


def unlock(directory: Path) -> None:
    """Let go of `directory` if this process holds it."""
    path = directory.resolve() / FILE
    if path in _held:
        path.unlink(missing_ok=True)
        os.close(_held.pop(path))
