"""The dialogues of a fine-tuning recipe with `[[sources]]` or `[filters]`: read by source,
filtered, held out, and mixed by shares as prompts and comparisons are."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama2rt.data import mixture
from llama2rt.data.filters import tokens
from llama2rt.data.mixture import Account, draw
from llama2rt.data.records import Dialogue
from llama2rt.data.sources import MixSource, Source
from llama2rt.errors import InputError
from llama2rt.stages import mixing
from llama2rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama2rt.stages.sft import SftRecipe


def check_recipe(recipe: "SftRecipe") -> None:
    """ValueError for sources and filters that cannot be together with the recipe's other keys."""
    mixing.check_sources(recipe.data, recipe.sources, recipe.filters, "dialogue")
    if recipe.sources and recipe.limit is not None:
        raise ValueError("limit: bounds data; of sources, shares say how much is drawn")


def split(
    recipe: "SftRecipe", tokenizer: Tokenizer, context: int, account: Account
) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held-out) dialogues; `account` is told what becomes of each that is read to train
    on. Those longer than `context` go before anything is drawn. Without validation, held_out of
    each source without a share is held out, or of each source where all have one, before shares are
    drawn. InputError where a source cannot fill its share, or nothing is left to train on."""
    sources = recipe.sources or [MixSource(path=path) for path in recipe.data]
    key = "sources" if recipe.sources else "data"
    read = _fitting(_read(recipe, sources, tokenizer, account, key), tokenizer, context, account)
    held_out: list[Dialogue] = []
    if recipe.validation:
        held = [Source.of(path) for path in recipe.validation]
        apart = Account()  # what is measured on is no part of what is trained on
        for found in _read(recipe, held, tokenizer, apart, "validation"):
            held_out += found
        account.removed.update(apart.removed)
    elif recipe.held_out:
        whole = [i for i, source in enumerate(sources) if source.share is None]
        for index in whole or range(len(sources)):
            read[index], aside = _hold_out(read[index], recipe.held_out, recipe.seed, index)
            held_out += aside
        account.leave_out("held out", held_out)
    if recipe.limit is not None:
        chosen = [dialogue for source in read for dialogue in source]
        taken = draw(len(chosen), recipe.limit, recipe.seed, 0)
        others = set(range(len(chosen))).difference(taken)
        account.leave_out("beyond the limit", (chosen[i] for i in others))
        training = [chosen[i] for i in taken]
    else:
        training = mixture.mix(sources, read, recipe.seed, account)
    if not training:
        raise InputError(f"{key}: no dialogue is left to train on")
    return training, held_out


def _read(
    recipe: "SftRecipe",
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    account: Account,
    table: str,
) -> list[list[Dialogue]]:
    return mixing.read(
        sources, recipe.filters, tokenizer, account, table, "dialogue", recipe.skip_invalid
    )


def _fitting(
    read: Sequence[Sequence[Dialogue]], tokenizer: Tokenizer, context: int, account: Account
) -> list[list[Dialogue]]:
    """Those of each source that are not longer than `context`."""
    fits = [[tokens(dialogue, tokenizer) <= context for dialogue in source] for source in read]
    left, gone = (
        [
            [dialogue for dialogue, fit in zip(source, own, strict=True) if fit == wanted]
            for source, own in zip(read, fits, strict=True)
        ]
        for wanted in (True, False)
    )
    account.leave_out("longer than the context", itertools.chain.from_iterable(gone))
    return left


def _hold_out(
    dialogues: Sequence[Dialogue], fraction: float, seed: int, source: int
) -> tuple[list[Dialogue], list[Dialogue]]:
    """(the others, so many of them drawn for that source)."""
    aside = set(draw(len(dialogues), round(fraction * len(dialogues)), seed, source))
    kept = [dialogue for i, dialogue in enumerate(dialogues) if i not in aside]
    return kept, [dialogue for i, dialogue in enumerate(dialogues) if i in aside]
