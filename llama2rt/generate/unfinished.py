"""A file of samples while it is written: a line as each sample ends, so that a run that was killed
goes on where it stopped.

`OUT.partial` holds first what was asked for, with hashes of the model and the prompts, and then the
samples in the order in which they ended. When all are there, OUT appears, in the prompts' order,
and the partial file goes.
"""

import errno
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from llama2rt.data import readers
from llama2rt.data.records import Sample
from llama2rt.errors import InputError

_FORMAT = "llama2rt unfinished samples"


class Finished(NamedTuple):
    """A sample and how it ended."""

    sample: Sample
    tokens: int
    finish_reason: str


class Unfinished:
    """Samples by (index of the prompt, index of the sample), on disk as soon as they are added. A
    context: without a single sample, no file is left."""

    def __init__(self, out: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        """`asked`: everything that decides the samples, as JSON has it. InputError where a partial
        file is there and `resume` is not set, was asked for something else, is damaged before its
        last line, or is being written by another process."""
        self.out, self.path = out, self.path_of(out)
        self.finished: dict[tuple[int, int], Finished] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size and not resume:
            raise InputError(
                f"{self.path}: samples of a run that did not finish: --resume goes on with it; "
                "otherwise delete it"
            )
        self._file = open(self.path, "ab+")  # noqa: SIM115 - for as long as samples come
        try:
            self._lock()
            self._recover(dict(asked))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.finished:
            self.path.unlink(missing_ok=True)
        self._file.close()

    @staticmethod
    def path_of(out: Path) -> Path:
        """Where the samples for `out` are until all are there."""
        return out.with_name(f"{out.name}.partial")

    def add(self, prompt: int, sample: int, finished: Finished) -> None:
        """Write a sample at once; one that is there already stays."""
        if (prompt, sample) in self.finished:
            return
        row = finished._asdict() | {"sample": finished.sample.to_json()}
        self._write({"prompt": prompt, "index": sample, **row})
        self.finished[prompt, sample] = finished

    def complete(self) -> list[Finished]:
        """Write OUT, remove the partial file; returns all samples in the prompts' order."""
        ordered = [self.finished[key] for key in sorted(self.finished)]
        readers.write(self.out, [finished.sample for finished in ordered])
        self.path.unlink()
        return ordered

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise InputError(f"{self.path}: another process is writing it") from None
            # A file system without locks: nothing can be held there, and nothing is lost by it.

    def _recover(self, asked: dict[str, Any]) -> None:
        """What is there already, without a last line that was not written to its end."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(json.loads(line), asked, first=number == 1)
            except InputError as error:
                raise InputError(f"{self.path}:{number}: {error}") from None
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path}:{number}: damaged ({error})") from None
            end += len(line)
        self._file.truncate(end)
        if not end:
            self._write({"format": _FORMAT, "asked": asked})

    def _take(self, row: dict[str, Any], asked: dict[str, Any], first: bool) -> None:
        if first:
            if row["format"] != _FORMAT:
                raise InputError(f"format: expected {_FORMAT!r}, got {row['format']!r}")
            for key in sorted(row["asked"].keys() | asked.keys()):
                before, now = row["asked"].get(key), asked.get(key)
                if before != now:
                    raise InputError(f"{key}: begun with {before!r}, resumed with {now!r}")
            return
        sample = Sample(**row["sample"])  # with --raw, its text may be no valid message
        where = (int(row["prompt"]), int(row["index"]))
        self.finished[where] = Finished(sample, int(row["tokens"]), str(row["finish_reason"]))

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
