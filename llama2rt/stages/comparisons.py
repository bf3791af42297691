"""The comparisons that a reward model is trained on and tested on (section 3.2.2): read by source,
divided by prompts, and mixed with those of other kinds."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama2rt.data.packing import Example
from llama2rt.data.readers import Reader
from llama2rt.data.records import Comparison
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama2rt.stages.loading import Future
    from llama2rt.stages.reward import RewardRecipe

logger = logging.getLogger("llama2rt.stages.comparisons")


class Division(NamedTuple):
    """The comparisons of a recipe, none of whose prompts is in both of the first two."""

    training: list[Comparison]
    held_out: list[Comparison]
    left_out: Counter[str]
    """how many are in neither, by key of the recipe and reason"""


def to_come(recipe: "RewardRecipe", future: "Future") -> bool:
    """Whether some of the comparisons are still to be collected. InputError for a file that is not
    there and that no earlier step leaves."""
    paths = {source.path for source in [*recipe.data, *recipe.mixed_in, *recipe.validation]}
    for path in sorted(paths - future.files):
        if not path.exists():
            raise InputError(
                f"{path}: no such file, and no earlier step leaves it (are there prompts of "
                "its kind?)"
            )
    return bool(paths & future.files)


def split(recipe: "RewardRecipe") -> Division:
    """All comparisons, read and divided. InputError where a source has none of the model's kind, or
    none to train on."""
    left_out: Counter[str] = Counter()
    own = read_sources("data", recipe, left_out)
    if recipe.validation:
        aside = read_sources("validation", recipe, left_out)
    else:
        aside = []
        for i, source in enumerate(recipe.data):
            count = recipe.held_out if source.held_out is None else source.held_out
            with naming(f"{source}"):
                own[i], taken = hold_out(own[i], count, recipe.seed)
            aside.append(taken)
    held_out = [comparison for source in aside for comparison in source]
    seen = {prompt_key(comparison) for comparison in held_out}
    mixed_in = read_sources("mixed_in", recipe, left_out) if recipe.mixed_in else []
    training = without_prompts(own, seen, "data", left_out)
    if not training:
        raise InputError("data: the prompts of all its comparisons are held out")
    share = recipe.mixed_in_share
    if share is None:
        share = {"helpfulness": 0.5, "safety": 0.1}[recipe.kind]
    other = without_prompts(mixed_in, seen, "mixed_in", left_out)
    return Division(mix(training, other, share, recipe.seed), held_out, left_out)


def read_sources(
    key: str, recipe: "RewardRecipe", left_out: Counter[str]
) -> list[list[Comparison]]:
    """The comparisons of each source under `key`: in data and validation those of the model's
    kind, which are all that do not say another. A pair judged by both kinds may be ranked one way
    by each. InputError for a source of which nothing is left."""
    sources: list[Source] = getattr(recipe, key)
    if key != "mixed_in":
        sources = [source.model_copy(update={"kind": recipe.kind}) for source in sources]
    reader = Reader(sources, "comparison", recipe.skip_invalid)
    found = reader.by_file()
    reader.log()
    left_out += Counter({f"{key}: {reason}": n for reason, n in reader.left_out.items()})
    return found


def without_prompts(
    sources: Sequence[Sequence[Comparison]], prompts: set[str], key: str, left_out: Counter[str]
) -> list[Comparison]:
    """The comparisons of all `sources` but for those of the held-out `prompts`, which are said and
    counted."""
    everything = [comparison for source in sources for comparison in source]
    kept = [c for c in everything if prompt_key(c) not in prompts]
    if gone := len(everything) - len(kept):
        logger.warning("%s: %d comparisons whose prompts are held out left out", key, gone)
        left_out[f"{key}: comparisons of held-out prompts"] += gone
    return kept


def prompt_key(comparison: Comparison) -> str:
    return repr(comparison.prompt)


def hold_out(
    comparisons: Sequence[Comparison], count: int, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Set about `count` comparisons aside: all those of prompts drawn at random, so that no
    held-out prompt is trained on. InputError when nothing would be left to train on."""
    keys = list(dict.fromkeys(prompt_key(comparison) for comparison in comparisons))
    order = np.random.default_rng(seed).permutation(len(keys))
    sizes = dict.fromkeys(keys, 0)
    for comparison in comparisons:
        sizes[prompt_key(comparison)] += 1
    taken: set[str] = set()
    total = 0
    for i in order:
        if total >= count:
            break
        taken.add(keys[i])
        total += sizes[keys[i]]
    kept = [c for c in comparisons if prompt_key(c) not in taken]
    if not kept:
        raise InputError(
            f"held_out: {count} of {len(comparisons)} comparisons leaves none to train; lower it"
        )
    return kept, [c for c in comparisons if prompt_key(c) in taken]


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
