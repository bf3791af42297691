"""What judges have said, on disk as soon as they say it: a run that is repeated, or goes on after a
kill, asks nothing twice.

JSON lines, appended, each under a hash of everything that it depends on. A line that a kill has cut
is dropped when the file is opened again; one process writes at a time.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from llama2rt.data import strict_json
from llama2rt.errors import InputError

Said = dict[str, Any]
Tell = Callable[[int, Said], None]
"""called with an index into what was asked, and what was said to it"""


def key_of(*parts: Any) -> str:
    """SHA-256 of `parts` as JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Answers by key, in the file `path`, or in memory alone. A context."""

    def __init__(self, path: Path | None = None) -> None:
        """InputError where another process writes the file, or a whole line of it is no entry."""
        self.asked = 0
        """answers that were asked for since it was opened"""
        self.found = 0
        """answers that were there"""
        self._said: dict[str, Said] = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")  # noqa: SIM115 - for as long as it is written to
        try:
            self._open(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def complete(
        self, keys: Sequence[str], ask: Callable[[Sequence[int], Tell], None]
    ) -> list[Said]:
        """What is said to each of `keys`. `ask` is called with the indices that are lacking, the
        first of each key, and tells each answer as it comes; what it has told is kept when it
        raises."""
        lacking = list(dict.fromkeys(key for key in keys if key not in self._said))
        first = {key: keys.index(key) for key in lacking} if lacking else {}
        self.asked += len(lacking)
        self.found += len(keys) - len(lacking)
        if lacking:
            ask([first[key] for key in lacking], lambda i, said: self._add(keys[i], said))
        return [self._said[key] for key in keys]

    def _add(self, key: str, said: Said) -> None:
        if self._file is not None:
            line = json.dumps({"key": key, "said": said}, ensure_ascii=False)
            self._file.write(f"{line}\n".encode())
            self._file.flush()
        self._said[key] = said

    def _open(self, path: Path) -> None:
        assert self._file is not None
        try:  # the kernel drops the lock of a process that dies
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing it") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                entry = strict_json.parse(line.decode())
                self._said[entry["key"]] = dict(entry["said"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}:{number}: not an entry of this cache ({error})") from None
