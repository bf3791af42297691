"""Files that appear whole or not at all, since a half-written one might be read as complete."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
_OURS = re.compile(rf"\..+\.[a-z0-9_]+{re.escape(PARTIAL)}")


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for writing, which replaces `path` when the block ends without an error.

    Until then, and after an error, `path` is unchanged. Its folder is created. OSError as of
    `open`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        # The error of a full disk comes from a descriptor, which has no name.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | Path, content: bytes | str) -> None:
    """Replace the file `path` by `content` (text as UTF-8)."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sweep(directory: Path, keep_out: str) -> None:
    """Remove what killed processes left half-written in `directory`, which this one must have to
    itself. Folders inside that hold a file of the name `keep_out` are left alone."""
    for folder, folders, names in os.walk(directory):
        if keep_out in names and Path(folder) != directory:
            folders.clear()
            continue
        for name in filter(_OURS.fullmatch, names):
            (Path(folder) / name).unlink()
        for name in filter(_OURS.fullmatch, folders.copy()):
            folders.remove(name)
            shutil.rmtree(Path(folder) / name)


def sync(path: Path) -> None:
    """Flush a file or folder to disk: a rename survives a power cut once its folder is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
