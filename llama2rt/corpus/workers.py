"""Processes that take chunks through a step, and what each of them holds.

What a chunk becomes does not depend on which process takes it, or when. Progress is said; after the
first error no further chunk is begun, and what was written stays.
"""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama2rt.corpus import cleaning, output
from llama2rt.corpus.chunks import Chunk
from llama2rt.corpus.compare import FATES
from llama2rt.corpus.contamination import EvaluationSets
from llama2rt.corpus.duplicates import KEPT
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.data.tokens import dtype_of
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.text.words import WordEncoder
from llama2rt.train.progress import ProgressLine

Result = TypeVar("Result")


class Worker:
    """What a process holds from chunk to chunk."""

    def __init__(self, recipe: CorpusRecipe, out: Path) -> None:
        self._recipe, self._out = recipe, out
        self._sets: EvaluationSets | None = None
        self._encoder: WordEncoder | None = None

    def clean(self, chunk: Chunk) -> dict[str, Any]:
        """`cleaning.clean`."""
        if self._recipe.evaluation and self._sets is None:
            self._sets = EvaluationSets(self._recipe.evaluation, self._recipe.ngram)
        return cleaning.clean(self._recipe, chunk, self._sets, self._out / output.WORK)

    def write(self, part: tuple[Chunk, int, int]) -> tuple[int, int, int]:
        """`output.write` of a chunk and where its documents begin and end among all."""
        chunk, begin, end = part
        if self._recipe.tokenizer is not None and self._encoder is None:
            tokenizer = Tokenizer.load(self._recipe.tokenizer)
            self._encoder = WordEncoder(tokenizer, dtype_of(tokenizer))
        fates = np.load(self._out / output.WORK / FATES, mmap_mode="r")[begin:end]
        kept = (fates == KEPT).tolist()
        return output.write(self._recipe, chunk, kept, self._encoder, self._out)


_worker: Worker | None = None  # of this process, where it is one of several


def _start(recipe: CorpusRecipe, out: Path) -> None:
    global _worker
    _worker = Worker(recipe, out)
    # A pool's processes hold both ends of its queue: of a parent that was killed they would not
    # hear, and wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(method: str, item: Any) -> Any:
    return getattr(_worker, method)(item)


def count(recipe: CorpusRecipe) -> int:
    """Processes that are used."""
    return recipe.workers or len(os.sched_getaffinity(0))


class Workers:
    """`with Workers(recipe, out) as workers: workers.map("clean", "cleaned", chunks, sizes)`."""

    def __init__(self, recipe: CorpusRecipe, out: Path) -> None:
        self._recipe, self._out = recipe, out
        self._pool: ProcessPoolExecutor | None = None
        self._alone: Worker | None = None
        if count(recipe) == 1:
            self._alone = Worker(recipe, out)
        else:
            # Forking a process that has threads may deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                count(recipe), context, initializer=_start, initargs=(recipe, out)
            )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            # What others are at work on is finished, and need not be done again.
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, method: str, name: str, items: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """[what `Worker.method` returned, by item]. `sizes`: bytes of input of each, for the
        progress line, which is called `name`."""
        results: list[Any] = [None] * len(items)
        with ProgressLine(name, len(items), 0) as line:
            done = read = 0
            for index, result in self._each(method, items):
                results[index] = result
                done, read = done + 1, read + sizes[index]
                line.update(done, f"{read / 1e6:,.0f} of {sum(sizes) / 1e6:,.0f} MB")
        return results

    def _each(self, method: str, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(index, result), as they come."""
        if self._pool is None:
            call: Callable[[Any], Any] = getattr(self._alone, method)
            yield from ((index, call(item)) for index, item in enumerate(items))
            return
        waiting: dict[concurrent.futures.Future[Any], int] = {}
        remaining = enumerate(items)
        # Two a process: neither waits for this one, and few are begun when one fails.
        while True:
            while len(waiting) < 2 * count(self._recipe) and (one := next(remaining, None)):
                waiting[self._pool.submit(_do, method, one[1])] = one[0]
            if not waiting:
                return
            finished, _ = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in sorted(finished, key=waiting.__getitem__):
                yield waiting.pop(future), future.result()
