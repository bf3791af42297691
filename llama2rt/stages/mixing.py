"""Where a stage's data came from: prompts of several sources, filtered and mixed, and what is kept
of it in the stage's log and its run's manifest."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from llama2rt.data import filters, mixture
from llama2rt.data.filters import Filters
from llama2rt.data.mixture import Account
from llama2rt.data.readers import Reader
from llama2rt.data.records import Prompt
from llama2rt.data.sources import MixSource, Source
from llama2rt.run import Run
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.stages.mixing")


def check_sources(
    data: Sequence[Any], sources: Sequence[MixSource], chosen: Filters, kind: str
) -> None:
    """ValueError where a recipe has both `data` and `sources`, or neither, and for sources or
    filters that mean nothing to records of `kind`."""
    if bool(data) == bool(sources):
        raise ValueError("give data, or sources in its place")
    mixture.pools(sources)
    chosen.require_meaning(kind)


def read(
    sources: Sequence[Source],
    chosen: Filters,
    tokenizer: Tokenizer,
    account: Account,
    table: str = "data",
    kind: str = "prompt",
    skip_invalid: int = 0,
) -> list[list[Any]]:
    """The records of each source, of `kind`, that the filters `chosen` leave."""
    reader = Reader(sources, kind, skip_invalid, filters=chosen)
    by_file = reader.located_by_file()
    reader.log()
    for index, (file, located) in enumerate(zip(reader.files, by_file, strict=True)):
        removed = file.removed.counts.total()
        account.add(f"{table}.{index}", sources[index], (one.record for one in located), removed)
    account.removed.update(reader.removed)
    every = [(index, one) for index, located in enumerate(by_file) for one in located]
    kept = filters.keep(chosen, [one for _, one in every], account.removed, tokenizer)
    left: list[list[Any]] = [[] for _ in sources]
    for position in kept:
        index, one = every[position]
        left[index].append(one.record)
    taken = set(kept)
    gone = (one.record for position, (_, one) in enumerate(every) if position not in taken)
    account.leave_out("filtered", gone)
    return left


def fitting(
    prompts: Sequence[Sequence[Prompt]],
    fit: Callable[[list[Prompt]], list[Prompt]],
    account: Account,
) -> list[list[Prompt]]:
    """Those `prompts` of each source that `fit` leaves of all."""
    left = set(map(id, fit([prompt for source in prompts for prompt in source])))
    gone = (p for source in prompts for p in source if id(p) not in left)
    account.leave_out("that fill the context", gone)
    return [[prompt for prompt in source if id(prompt) in left] for source in prompts]


def record(run: Run, account: Account) -> None:
    """Say what went in and what did not, by source, and keep it in the manifest, where a run that
    is killed has it too. Every rank calls it."""
    for line in account.lines():
        logger.info("%s", line)
    if report := account.report():
        run.keep(**report)


def notes(recipe: Any, inputs: Any | None) -> list[str]:
    """What went in, for `--dry-run`; where no file is read, what the recipe says of it."""
    return mixture.declared(recipe.sources) if inputs is None else inputs.account.lines()
