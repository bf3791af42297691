"""Files that appear whole or not at all, since a half-written one might be read as complete."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger("llama2rt.atomic")

PARTIAL = ".llama2rt-partial"
# What a process writes, until it is whole: .NAME.PID.llama2rt-partial, a file, or, with eight
# letters more, a folder that holds "new" and, while it takes the place of another, "old".
_OURS = re.compile(rf"\.(?P<name>.+)\.(?P<pid>\d+)(\.[a-z0-9_]{{8}})?{re.escape(PARTIAL)}")
NEW, OLD = "new", "old"


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


def sweep(directory: Path, keep_out: Collection[str]) -> None:
    """Remove what processes of this machine that are no more left half-written in `directory`; a
    folder that one was about to replace gets its name back. Folders inside that hold all files of
    the names `keep_out` are left alone. What cannot be removed is said and stays."""
    for folder, folders, names in os.walk(directory):
        if set(keep_out) <= set(names) and Path(folder) != directory:
            folders.clear()
            continue
        for name in (*names, *folders):
            found = _OURS.fullmatch(name)
            if found is None or _alive(int(found["pid"])):
                continue
            try:
                _put_away(Path(folder) / name, Path(folder) / found["name"])
            except OSError as error:
                logger.warning("%s: left by a process that was killed (%s)", name, error)
        folders[:] = [name for name in folders if not _OURS.fullmatch(name)]


def _alive(pid: int) -> bool:
    """Whether another process has that number. In a container the next one often has the dead one's
    own, and has nothing half-written where it only begins."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _put_away(path: Path, target: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not target.exists():
        with contextlib.suppress(FileNotFoundError):
            (path / OLD).rename(target)
    shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk: a rename survives a power cut once its folder is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
