"""The comparisons that a reward model is trained on and tested on (section 3.2.2): read by source,
divided by prompts, and mixed with those of other kinds."""

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from llama2rt.data import mixture
from llama2rt.data.filters import Filters, Located, keep
from llama2rt.data.mixture import Account
from llama2rt.data.packing import Example
from llama2rt.data.readers import Reader
from llama2rt.data.records import Comparison, Messages
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.stages.loading import Future, Outline
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama2rt.stages.reward import RewardRecipe

logger = logging.getLogger("llama2rt.stages.comparisons")


class Division(NamedTuple):
    """The comparisons of a recipe, none of whose prompts is in both of the first two."""

    training: list[Comparison]
    held_out: list[Comparison]
    left_out: Counter[str]
    """how many are in neither, by key of the recipe and reason"""


def check_sources(recipe: "RewardRecipe") -> None:
    """ValueError for sources that a recipe cannot have together, or not in that place."""
    if bool(recipe.data) == bool(recipe.sources):
        raise ValueError("give data, or sources in its place")
    if recipe.sources and (recipe.mixed_in or recipe.mixed_in_share is not None):
        raise ValueError("mixed_in: sources say what is mixed in, by their share")
    if recipe.sources and recipe.data_limit is not None:
        raise ValueError("data_limit: bounds data; of sources, shares say how much is drawn")
    mixture.pools(recipe.sources)
    recipe.filters.require_meaning("comparison")
    whole = [source for source in recipe.sources if source.share is None]
    named: list[tuple[str, Sequence[Source]]] = [
        ("data", recipe.data),
        ("validation", recipe.validation),
        ("sources", whole),
    ]
    for key, sources in named:
        for source in sources:
            if source.kind not in (None, recipe.kind):
                raise ValueError(
                    f"{key}: {source} is declared {source.kind}, the model is of {recipe.kind}: "
                    + ("give it a share" if key == "sources" else "name it under mixed_in")
                )
    check_held_out([*recipe.data, *recipe.sources], recipe.validation, recipe.mixed_in)


def check_held_out(
    data: Sequence[Source], validation: Sequence[Source], others: Sequence[Source] = ()
) -> None:
    """ValueError for a number of held-out comparisons where none are kept back: of `validation`
    and `others`, and of `data` beside validation."""
    for source in [*validation, *others, *(data if validation else ())]:
        if source.held_out is not None:
            raise ValueError(
                f"held_out of {source}: only sources of data, without validation, have one"
            )


class Reading(Protocol):
    """What a recipe says of the comparisons that are read."""

    @property
    def data(self) -> Sequence[Source]: ...
    @property
    def validation(self) -> Sequence[Source]: ...
    @property
    def held_out(self) -> int: ...
    @property
    def filters(self) -> Filters: ...
    @property
    def skip_invalid(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Unit(NamedTuple):
    """A source of a recipe, and what it is for."""

    key: str
    """where it stands: data.0, sources.2, validation.0"""
    source: Source
    held_out: int = 0
    """how many of its comparisons are kept back"""
    pool: int | None = None
    """the pool of `sources` that it belongs to"""

    @property
    def table(self) -> str:
        return self.key.split(".")[0]


def split(
    recipe: "RewardRecipe",
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    account: Account | None = None,
) -> Division:
    """All comparisons, read, filtered, divided and mixed. InputError where a source has none of the
    model's kind, or none to train on, or too few for its share. `tokenizer` and the model's
    `context`: of a mix by shares, what is too long must go before it is drawn; a filter may ask for
    the tokenizer too. `account`: told what becomes of every comparison."""
    account = Account() if account is None else account
    left_out: Counter[str] = Counter()
    units = units_of(recipe)
    read = read_units(units, recipe, left_out, account)
    found = filtered(read, limited(recipe, context), account, tokenizer)
    if recipe.validation:
        held_out = [c for unit in units for c in found[unit.key] if unit.table == "validation"]
    else:
        held_out = hold_out_of_each(units, found, recipe.seed)
        account.leave_out("held out", held_out)
    seen = {prompt_key(comparison) for comparison in held_out}

    def training(table: str) -> list[list[Comparison]]:
        of_table = [found[unit.key] for unit in units if unit.table == table]
        return without_prompts(of_table, seen, table, left_out, account)

    if recipe.sources:
        mixed = mixture.mix(recipe.sources, training("sources"), recipe.seed, account)
        if not mixed:
            raise InputError("sources: the prompts of all their comparisons are held out")
        return Division(mixed, held_out, left_out)
    own = list(itertools.chain(*training("data")))
    if not own:
        raise InputError("data: the prompts of all its comparisons are held out")
    if recipe.data_limit is not None:
        drawn = drawn_prompts(own, recipe.data_limit, recipe.seed)
        account.leave_out("beyond data_limit", (c for c in own if prompt_key(c) not in drawn))
        own = of_prompts(own, drawn)
    share = recipe.mixed_in_share
    if share is None:
        share = {"helpfulness": 0.5, "safety": 0.1}[recipe.kind]
    other = list(itertools.chain(*training("mixed_in")))
    mixed = mix(own, other, share, recipe.seed)
    taken = set(map(id, mixed))
    account.leave_out("not drawn", (c for c in other if id(c) not in taken))
    return Division(mixed, held_out, left_out)


def units_of(recipe: "RewardRecipe") -> list[Unit]:
    """Every source of the recipe. Those of its own kind, which are all that do not say another, are
    data, validation, and sources without a share; of the others any kind is taken that their table
    does not exclude."""

    def own(source: Source) -> Source:
        return source.model_copy(update={"kind": recipe.kind})

    def held_out(source: Source, default: int) -> int:
        if recipe.validation:
            return 0
        return default if source.held_out is None else source.held_out

    units = [
        Unit(f"data.{i}", own(source), held_out(source, recipe.held_out))
        for i, source in enumerate(recipe.data)
    ]
    units += [Unit(f"validation.{i}", own(source)) for i, source in enumerate(recipe.validation)]
    units += [Unit(f"mixed_in.{i}", source) for i, source in enumerate(recipe.mixed_in)]
    pools = mixture.pools(recipe.sources)
    pool_of = {i: number for number, pool in enumerate(pools) for i in pool.members}
    # Where every source has a share, all are measured on.
    whole = len(pool_of) < len(recipe.sources)
    for i, source in enumerate(recipe.sources):
        if i in pool_of:
            kept = held_out(source, 0 if whole else recipe.held_out)
            units.append(Unit(f"sources.{i}", source, kept, pool_of[i]))
        else:
            kept = held_out(source, recipe.held_out)
            units.append(Unit(f"sources.{i}", own(source), kept))
    return units


def read_units(
    units: Sequence[Unit],
    recipe: Reading,
    left_out: Counter[str],
    account: Account,
) -> dict[str, list[Located]]:
    """The comparisons of each source by its key. A pair judged by both kinds may be ranked one way
    by each. InputError for a source of which nothing is left."""
    found: dict[str, list[Located]] = {}
    for table in dict.fromkeys(unit.table for unit in units):
        of_table = [unit for unit in units if unit.table == table]
        reader = Reader(
            [unit.source for unit in of_table],
            "comparison",
            recipe.skip_invalid,
            filters=recipe.filters,
        )
        by_file = reader.located_by_file()
        reader.log()
        left_out += Counter({f"{table}: {reason}": n for reason, n in reader.left_out.items()})
        for unit, file, located in zip(of_table, reader.files, by_file, strict=True):
            found[unit.key] = located
            if table != "validation":
                records = (one.record for one in located)
                account.add(unit.key, unit.source, records, file.removed.counts.total())
        account.removed.update(reader.removed)
    return found


def limited(recipe: "RewardRecipe", context: int | None) -> Filters:
    """The recipe's filters; of a mix by shares, what is longer than the context must be gone before
    anything is drawn."""
    filters = recipe.filters
    if not recipe.sources or context is None:
        return filters
    return filters.model_copy(update={"longest": min(context, filters.longest or context)})


def filtered(
    found: Mapping[str, Sequence[Located]],
    filters: Filters,
    account: Account,
    tokenizer: Tokenizer | None,
) -> dict[str, list[Comparison]]:
    """The comparisons that the filters leave of each source. Of equal ones one of validation stays
    before one to train on, and else the first. InputError where they leave nothing to train on."""
    order = sorted(found, key=lambda key: not key.startswith("validation"))
    every = [(key, one) for key in order for one in found[key]]
    account.removed.activate(filters.active)
    kept = set(keep(filters, [one for _, one in every], account.removed, tokenizer))
    left: dict[str, list[Comparison]] = {key: [] for key in found}
    for index, (key, one) in enumerate(every):
        if index in kept:
            left[key].append(one.record)
        elif not key.startswith("validation"):
            account.leave_out("filtered", [one.record])
    if not any(left[key] for key in order if not key.startswith("validation")):
        counts = ", ".join(f"{name} {n:,}" for name, n in account.removed.counts.items())
        raise InputError(f"filters: leave nothing to train on ({counts})")
    return left


def to_come(sources: Sequence[Source], future: Future) -> bool:
    """Whether some of the comparisons are still to be collected. InputError for a file that is not
    there and that no earlier step leaves."""
    paths = {source.path for source in sources}
    for path in sorted(paths - future.files):
        if not path.exists():
            raise InputError(
                f"{path}: no such file, and no earlier step leaves it (are there prompts of "
                "its kind?)"
            )
    return bool(paths & future.files)


def hold_out_of_each(
    units: Sequence[Unit], found: dict[str, list[Comparison]], seed: int
) -> list[Comparison]:
    """The comparisons kept back of each source, which are taken out of `found`."""
    held_out = []
    for unit in units:
        whole = unit.pool is None and unit.table != "mixed_in"
        if found[unit.key] and (unit.held_out or whole):
            with naming(f"{unit.source}"):
                found[unit.key], taken = hold_out(found[unit.key], unit.held_out, seed)
            held_out += taken
    return held_out


def without_prompts(
    sources: Sequence[Sequence[Comparison]],
    prompts: set[str],
    key: str,
    left_out: Counter[str],
    account: Account,
) -> list[list[Comparison]]:
    """The comparisons of each of the `sources` but for those of the held-out `prompts`, which are
    said and counted."""
    gone = [c for source in sources for c in source if prompt_key(c) in prompts]
    if gone:
        logger.warning("%s: %d comparisons whose prompts are held out left out", key, len(gone))
        left_out[f"{key}: comparisons of held-out prompts"] += len(gone)
        account.leave_out("of held-out prompts", gone)
    return [[c for c in source if prompt_key(c) not in prompts] for source in sources]


def prompt_key(comparison: Comparison) -> str:
    return messages_key(comparison.prompt)


def messages_key(messages: Messages) -> str:
    """The same of the same messages, whatever the order of their keys in a file."""
    return repr([(message["role"], message["content"]) for message in messages])


def hold_out(
    comparisons: Sequence[Comparison], count: int, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Set about `count` comparisons aside: all those of prompts drawn at random, so that no
    held-out prompt is trained on. InputError when nothing would be left to train on."""
    taken = drawn_prompts(comparisons, count, seed)
    kept = [c for c in comparisons if prompt_key(c) not in taken]
    if not kept:
        raise InputError(
            f"held_out: {count} of {len(comparisons)} comparisons leaves none to train; lower it"
        )
    return kept, of_prompts(comparisons, taken)


def drawn_prompts(comparisons: Sequence[Comparison], count: int, seed: int) -> set[str]:
    """The prompts, as `prompt_key` gives them, of about `count` comparisons: drawn at random one
    after the other until there are as many. A larger count of the same seed draws these too."""
    keys = list(dict.fromkeys(prompt_key(comparison) for comparison in comparisons))
    order = np.random.default_rng(seed).permutation(len(keys))
    sizes = Counter(prompt_key(comparison) for comparison in comparisons)
    taken: set[str] = set()
    total = 0
    for i in order:
        if total >= count:
            break
        taken.add(keys[i])
        total += sizes[keys[i]]
    return taken


def of_prompts(comparisons: Sequence[Comparison], prompts: set[str]) -> list[Comparison]:
    return [comparison for comparison in comparisons if prompt_key(comparison) in prompts]


def mix(
    own: Sequence[Comparison], other: Sequence[Comparison], share: float, seed: int
) -> list[Comparison]:
    """All of `own` and a uniform draw from `other`, without replacement, that makes up `share` of
    the whole, or all of `other` where there are too few (section 3.2.2, data composition)."""
    wanted = min(len(other), round(len(own) * share / (1 - share)))
    drawn = np.random.default_rng(seed).permutation(len(other))[:wanted]
    return [*own, *(other[i] for i in sorted(drawn))]


def encode(
    comparisons: Sequence[Comparison], tokenizer: Tokenizer, context: int
) -> tuple[list[tuple[Example, Example]], list[Comparison]]:
    """(chosen, rejected) token pairs, and the comparisons they stand for: one with a side longer
    than the context is left out, because its score would be read inside a cut answer."""
    pairs, kept = [], []
    for comparison in comparisons:
        with naming(f"comparison whose prompt begins {comparison.prompt[0]['content'][:60]!r}"):
            chosen, rejected = (
                last_answer(Example.of(*chat.encode_response(tokenizer, comparison.prompt, text)))
                for text in (comparison.chosen, comparison.rejected)
            )
        if max(len(chosen.tokens), len(rejected.tokens)) <= context:
            pairs.append((chosen, rejected))
            kept.append(comparison)
    if len(kept) < len(comparisons):
        left_out = len(comparisons) - len(kept)
        logger.warning("%d comparisons longer than the context of %d left out", left_out, context)
    if comparisons and not kept:
        raise InputError(
            f"context: all {len(comparisons)} comparisons are longer than {context} tokens"
        )
    return pairs, kept


def last_answer(example: Example) -> Example:
    """The same tokens, of which the last run of trainable ones alone stays so: a pair has its
    earlier turns in common, and targets are not shared (`data.shared`)."""
    masked = np.flatnonzero(~example.trainable)
    trained = np.flatnonzero(example.trainable)
    if not len(trained):
        return example
    begin = masked[masked < trained[-1]].max(initial=-1) + 1
    trainable = example.trainable.copy()
    trainable[:begin] = False
    return Example(example.tokens, trainable)


def require_readable(
    previous: Outline, tokenizer: Tokenizer, held_out: Sequence[tuple[Example, Example]]
) -> None:
    """InputError where the replaced reward model could not score what the new one is tested on,
    which would be found after training only."""
    if previous.tokenizer is not None and not previous.tokenizer.agrees_with(tokenizer):
        raise InputError("previous: its tokenizer is not the new model's; both must share one")
    longest = max((len(side.tokens) for pair in held_out for side in pair), default=0)
    if longest > previous.config.context:
        raise InputError(
            f"previous: its context of {previous.config.context} tokens is shorter than the "
            f"longest held-out comparison, {longest}"
        )
