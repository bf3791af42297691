"""What a stage starts from: models, tokenizers and prompts, checked against each other.

Models pass responses on as token ids and have a context each; what does not fit together is found
here, before any weights are loaded, and not hours later.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from llama2rt.checkpoint import load
from llama2rt.data.readers import read
from llama2rt.data.records import Messages, Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.generate.budget import least_bytes
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.rollout import pairwise
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.reward import RewardModels, RewardOptions
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.stages.loading")


Device = torch.device | str | None
"""where a model is loaded; None for `default_device`"""


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_llama(
    folder: Path,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> tuple[Llama, Tokenizer]:
    """A language model and the tokenizer that belongs to it; InputError for anything else."""
    model, own = load(folder, device or default_device(), dtype)
    if not isinstance(model, Llama):
        raise InputError(f"{folder}: expected a language model, found a reward model")
    return model, choose_tokenizer(folder, model.config, own, tokenizer)


def chat_model(recipe: Any, device: Device) -> Llama:
    """The language model that a recipe with init, tokenizer, train, lora and seed fine-tunes."""
    dtype = recipe.lora.load_dtype(recipe.train)
    model, _ = load_llama(recipe.init, recipe.tokenizer, dtype, device)
    recipe.lora.adapt(model, recipe.seed)
    return model


def choose_tokenizer(
    folder: Path, config: LlamaConfig, own: Tokenizer | None, given: Path | None
) -> Tokenizer:
    """The tokenizer `given` or else the model folder's `own`; InputError where there is neither, or
    where the model has fewer embeddings than `given` has pieces."""
    if given is None:
        if own is None:
            raise InputError(f"{folder}: holds no tokenizer; name one with the key tokenizer")
        return own
    tokenizer = Tokenizer.load(given)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer: {given} has {tokenizer.vocab_size} pieces, the model in {folder} only "
            f"{config.vocab_size} embeddings"
        )
    # What ends a sequence belongs to the model, whichever file its tokenizer is read from.
    return tokenizer if own is None else tokenizer.with_generation_of(own)


def load_companion(
    folder: Path,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> Llama:
    """A language model that reads what a policy with `tokenizer` writes, such as its reference."""
    model, own = load(folder, device or default_device(), dtype)
    if not isinstance(model, Llama):
        raise InputError(f"{folder}: expected a language model, found a reward model")
    _require_same_tokens(folder, own, tokenizer)
    return model


def load_scalar(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    device: Device = None,
) -> ScalarModel:
    """A reward model, frozen and ready to score; InputError for a language model, and for one that
    reads other tokens than `tokenizer`, the policy's, writes."""
    model, own = load(folder, device or default_device(), dtype)
    if not isinstance(model, ScalarModel):
        raise InputError(f"{folder}: expected a reward model, found a language model")
    if tokenizer is not None:
        _require_same_tokens(folder, own, tokenizer)
    return model.requires_grad_(False).eval()


def load_reward_models(
    options: RewardOptions,
    micro_tokens: int,
    load: Callable[[Path], ScalarModel],
    load_pairwise: Callable[[Path], PairwiseModel] | None = None,
) -> RewardModels:
    """The models that rank, frozen. `load`, `load_pairwise`: each from its folder to where it
    belongs, before the next one is loaded; the latter where a recipe may name one that compares."""
    preference = None
    if options.preference is not None:
        assert load_pairwise is not None  # the recipes' own check
        preference = load_pairwise(options.preference)
    return RewardModels(
        load(options.helpfulness) if options.helpfulness is not None else None,
        load(options.safety) if options.safety is not None else None,
        options.threshold,
        micro_tokens,
        preference,
        options.ranking,
    )


def _require_same_tokens(folder: Path, own: Tokenizer | None, policy: Tokenizer) -> None:
    # Responses pass between models as ids: another vocabulary would read another text, in silence.
    if own is not None and not own.agrees_with(policy):
        raise InputError(f"{folder}: its tokenizer is not the policy's; all models must share one")


@dataclass(frozen=True)
class Outline:
    """A model without its weights: of a folder, or of a model that a run is still to leave."""

    config: LlamaConfig
    tokenizer: Tokenizer | None
    scalar: bool = False
    longest_sample: int = 0
    """of a run still to come whose samples may be pooled: tokens of the longest with its prompt"""


class Opened:
    """What a stage has read and checked; each has its own below this, with `result`, the model that
    the run will leave, or None."""

    result: Any

    @property
    def models(self) -> Mapping[str, "Outline"]:
        """Models that the run will leave, by their folder in its directory."""
        return {} if self.result is None else {"model": self.result}

    @property
    def files(self) -> tuple[str, ...]:
        """Records that the run will leave in its directory, by file name."""
        return ()


@dataclass(frozen=True)
class Future:
    """What earlier steps of a plan will have left by the time a stage begins."""

    models: dict[Path, Outline] = field(default_factory=dict)
    """by folder"""
    files: set[Path] = field(default_factory=set)
    """files of records"""


def readable(paths: Sequence[Path], future: Future | None) -> list[Path]:
    """Those of `paths` that are there: not the records that an earlier step of a plan is still to
    leave, which the step's own run reads."""
    return [path for path in paths if future is None or path not in future.files]


def outline(folder: Path, future: Future | None = None) -> Outline:
    """What the model in `folder` is. InputError where it could not be loaded: its files are there
    and hold the tensors its configuration asks for; only their values are not read."""
    if future is not None and folder in future.models:
        return future.models[folder]
    model, own = load(folder, "meta")
    return Outline(model.config, own, isinstance(model, ScalarModel))


def outlines(
    tokenizer: Path | None, models: Mapping[str, Path | None], future: Future | None = None
) -> tuple[Tokenizer, dict[str, Outline]]:
    """The tokenizer of the first of `models`, which samples, and what each of them is, by its key
    in the recipe (None: left out there). InputError unless those under `rewards` are reward models,
    all else language models, all share the tokenizer, and each has an embedding for every id that
    the first may sample."""
    found: dict[str, Outline] = {}
    shared: Tokenizer | None = None
    sampled = 0
    for key, folder in models.items():
        if folder is None:
            continue
        model = outline(folder, future)
        expected = "reward" if key.startswith("rewards.") else "language"
        if model.scalar != (expected == "reward"):
            other = "reward" if model.scalar else "language"
            raise InputError(f"{folder}: expected a {expected} model, found a {other} model")
        if shared is None:
            shared = choose_tokenizer(folder, model.config, model.tokenizer, tokenizer)
            sampled = model.config.vocab_size
        else:
            _require_same_tokens(folder, model.tokenizer, shared)
            # The policy may sample any id it has a row for, also one that pads its vocabulary.
            if model.config.vocab_size < sampled:
                raise InputError(
                    f"{folder}: has {model.config.vocab_size} embeddings and could not read what "
                    f"the policy may sample, {sampled} ids; give both as many"
                )
        found[key] = model
    assert shared is not None
    return shared, found


def require_pairwise(
    folder: Path, prompts: Sequence[Prompt], max_tokens: int, future: Future | None = None
) -> None:
    """InputError unless the model in `folder` can compare two answers of `max_tokens` to each of
    the prompts. It reads text, so its tokenizer need not be the policy's."""
    model = outline(folder, future)
    if model.scalar:
        raise InputError(
            f"rewards.preference: {folder}: expected a language model that compares, found a "
            "reward model"
        )
    if model.tokenizer is None:
        raise InputError(f"rewards.preference: {folder}: holds no tokenizer")
    letters = pairwise.Letters.of(model.tokenizer)
    longest = max(
        len(pairwise.encode(model.tokenizer, letters, (prompt.messages, "", "")))
        for prompt in prompts
    )
    if longest + 2 * max_tokens >= model.config.context:
        raise InputError(
            f"rewards.preference: {folder}: its context of {model.config.context} tokens has no "
            f"room for the longest prompt, {longest}, and two answers of sampling.max_tokens, "
            f"{max_tokens}; lower it or use another model"
        )


@dataclass(frozen=True)
class CacheLimit:
    """What a policy may keep keys and values in while it samples."""

    most_bytes: int | None
    """a recipe's cache_bytes; None for what is free when its turn comes"""
    dtype: torch.dtype
    tensor: int = 1
    """ranks that share the heads"""


def read_prompts(
    paths: Sequence[Path | Source],
    tokenizer: Tokenizer,
    policy: Llama | Outline,
    max_tokens: int = 1,
    readers: Mapping[str, Llama | ScalarModel | Outline] | None = None,
    cache: CacheLimit | None = None,
) -> list[Prompt]:
    """The prompts that leave the policy room to answer; the others are left out and counted, as
    too long dialogues are. InputError where none does, and, by its name, where one of the `readers`
    could meet a prompt with a response of `max_tokens` that is longer than its context, or where
    such a one needs more than `cache` may take.
    """
    names = ", ".join(map(str, paths))
    prompts = read(list(paths), "prompt")
    return fitting_prompts(prompts, names, tokenizer, policy, max_tokens, readers, cache)


def fitting_prompts(
    prompts: Sequence[Prompt],
    names: str,
    tokenizer: Tokenizer,
    policy: Llama | Outline,
    max_tokens: int = 1,
    readers: Mapping[str, Llama | ScalarModel | Outline] | None = None,
    cache: CacheLimit | None = None,
) -> list[Prompt]:
    """`read_prompts` of the `prompts` that the files `names` gave."""
    context = policy.config.context
    lengths = []
    for prompt in prompts:
        with naming(f"{names}: prompt {prompt.id!r}"):
            lengths.append(len(chat.encode_prompt(tokenizer, prompt.messages)))
    fitting = [prompt for prompt, n in zip(prompts, lengths, strict=True) if n < context]
    if not fitting:
        raise InputError(
            f"{names}: all {len(prompts)} prompts fill the policy's context of {context} tokens"
        )
    if len(fitting) < len(prompts):
        left_out = len(prompts) - len(fitting)
        logger.warning("%d prompts that fill the context of %d left out", left_out, context)
    longest = min(context, max(n for n in lengths if n < context) + max_tokens)
    if cache is not None and cache.most_bytes is not None:
        needed = least_bytes(policy.config, cache.dtype, longest, cache.tensor)
        if needed > cache.most_bytes:
            raise InputError(
                f"sampling.cache_bytes: expected at least {needed} for the longest prompt in "
                f"{names} with its response, {longest} tokens, got {cache.most_bytes}"
            )
    require_context(readers or {}, longest)
    return fitting


def longest_sample(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, policy: Llama | Outline, max_tokens: int
) -> int:
    """Tokens of the longest prompt with a response of `max_tokens`, within the policy's context; 0
    without prompts."""
    lengths = [len(chat.encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]
    return min(policy.config.context, max(lengths) + max_tokens) if lengths else 0


def require_context(readers: Mapping[str, Llama | ScalarModel | Outline], longest: int) -> None:
    """InputError naming one of `readers` that has no room for so many tokens."""
    for name, model in readers.items():
        if model.config.context < longest:
            raise InputError(
                f"{name}: its context of {model.config.context} tokens is shorter than the "
                f"longest prompt with its response, {longest}; lower sampling.max_tokens or use "
                "another"
            )


def warn_of_shared(training: Iterable[Messages], held_out: Iterable[Messages]) -> None:
    """Say how many prompts a stage trains on although they are in its validation too: what is
    measured there is not what the model does with new ones. They stay, since only their owner knows
    which file is wrong; the reward stage, which mixes public files, leaves them out."""
    seen = {repr(messages) for messages in held_out}
    if shared := sum(repr(messages) in seen for messages in training):
        logger.warning(
            "data: %d prompts are in validation too and are trained on all the same", shared
        )


def file_inputs(recipe: BaseModel) -> dict[str, Path]:
    """Every file and folder that a recipe names, by its key (`rewards.safety`, `data.0`), as
    `Run.open` hashes them."""
    named: dict[str, Path] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, os.PathLike):
            named[key] = Path(value)
        elif isinstance(value, BaseModel):
            for name in type(value).model_fields:
                add(f"{key}.{name}" if key else name, getattr(value, name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                add(f"{key}.{index}", item)
        elif isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}", item)

    add("", recipe)
    return named
