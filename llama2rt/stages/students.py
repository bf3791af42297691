"""What a student of distillation learns from: the selected samples in its own tokens, and the
teacher's distributions at them."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama2rt.data.packing import Batch, Example
from llama2rt.errors import InputError, naming
from llama2rt.model import Llama
from llama2rt.rollout.responses import Response, read_responses, response_example
from llama2rt.stages import loading, selection
from llama2rt.stages.loading import Future, Outline
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import Objective

logger = logging.getLogger("llama2rt.stages.students")


@dataclass(frozen=True)
class StudentInputs:
    """What one student learns from."""

    outline: Outline
    tokenizer: Tokenizer
    examples: list[Example]
    read_as: Literal["tokens", "text"]
    """the samples: as they were sampled, or their text in this student's own tokens"""


def language_model(folder: Path, future: Future | None) -> Outline:
    """What the model in `folder` is; InputError unless it is a language model."""
    model = loading.outline(folder, future)
    if model.scalar:
        raise InputError(f"{folder}: expected a language model, found a reward model")
    return model


def samples_file(path: Path) -> Path:
    """The selected samples of a run directory of rejection sampling; any other path itself."""
    return path / "samples" / selection.BEST if path.is_dir() else path


def read_samples(paths: Sequence[Path], future: Future | None) -> list[Response]:
    """The selected samples of all `paths`; of those that an earlier step is still to leave, none
    yet. InputError naming a line that is none, and where there is no sample at all."""
    responses: list[Response] = []
    awaited = set() if future is None else future.files
    for path in paths:
        if not awaited.intersection((path, path / "samples" / selection.BEST)):
            responses += read_responses(samples_file(path))
    if not responses and not awaited:
        raise InputError(f"data: {', '.join(map(str, paths)) or 'no file'}: no samples")
    return responses


def learn_from(
    responses: Sequence[Response],
    model: Outline,
    teacher: Outline | None,
    distributions: Outline | None,
) -> StudentInputs:
    """What `model` learns from the samples: their own tokens where they mean the same to it, else
    their text. `distributions`: the teacher again where its are wanted. InputError where the model
    has no tokenizer, no sample fits its context, or its distributions are over other tokens."""
    tokenizer = model.tokenizer or (teacher.tokenizer if teacher is not None else None)
    if tokenizer is None:
        raise InputError("holds no tokenizer, and neither does a teacher that the recipe names")
    kept = [response for response in responses if selection.usable_text(response)]
    other = next((r for r in kept if not _same_tokens(r, tokenizer, model)), None)
    same = other is None
    if distributions is not None:
        _require_same_distributions(model, distributions, tokenizer, other)
    if same:
        kept = [response for response in kept if selection.usable(response, tokenizer)]
    make = response_example if same else functools.partial(_example_of_text, tokenizer=tokenizer)
    examples = [make(response) for response in kept]
    fitting = [e for e in examples if len(e.tokens) <= model.config.context]
    if len(fitting) < len(responses):
        logger.warning(
            "%d of %d samples left out: unusable, or longer than the context of %d tokens",
            *(len(responses) - len(fitting), len(responses), model.config.context),
        )
    if responses and not fitting:
        raise InputError("data: no sample can be a target within the student's context")
    outline = Outline(model.config, tokenizer)
    return StudentInputs(outline, tokenizer, fitting, "tokens" if same else "text")


def _same_tokens(response: Response, tokenizer: Tokenizer, model: Outline) -> bool:
    """Whether a sample's tokens are those that its prompt has here, and its text."""
    if max(response.tokens) >= model.config.vocab_size:
        return False
    if response.prompt_tokens != chat.encode_prompt(tokenizer, response.prompt.messages):
        return False
    ended = response.tokens[-1] in tokenizer.stop_ids
    tokens = response.tokens[:-1] if ended else response.tokens
    known = [token for token in tokens if token < tokenizer.vocab_size]
    return tokenizer.decode(known).strip() == response.text.strip()


def _example_of_text(response: Response, tokenizer: Tokenizer) -> Example:
    messages = [*response.prompt.messages, {"role": "assistant", "content": response.text}]
    with naming(f"sample of prompt {response.prompt.id!r}"):
        tokens, _ = chat.encode_dialogue(tokenizer, messages)
        prompt = chat.encode_prompt(tokenizer, response.prompt.messages)
    # Assistant turns of the history are context, as they were when the teacher answered.
    return Example.of(tokens, [index >= len(prompt) for index in range(len(tokens))])


def _require_same_distributions(
    model: Outline, teacher: Outline, tokenizer: Tokenizer, other: Response | None
) -> None:
    """InputError where a probability here is not that of the same token there. `other`: a sample
    whose tokens are not those of its text here."""
    shared = teacher.tokenizer is not None and tokenizer.agrees_with(teacher.tokenizer)
    if other is not None and shared:
        raise InputError(
            f"data: the answer to prompt {other.prompt.id!r} has not the tokens of its text: leave "
            "it as it was sampled, or take loss samples, which reads the text of all"
        )
    if other is not None or not (shared or teacher.tokenizer is None):
        raise InputError(
            "loss: its tokenizer is not the teacher's, and the probability of each token is "
            "compared: take loss samples, which reads their text"
        )
    if model.config.vocab_size != teacher.config.vocab_size:
        raise InputError(
            f"loss: it has {model.config.vocab_size} embeddings and the teacher "
            f"{teacher.config.vocab_size}, and the probability of each token is compared: give "
            "both as many, or take loss samples"
        )


class Teacher:
    """The teacher of a loss on distributions: whole on every rank, loaded when first asked."""

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._model: Llama | None = None

    def objective(self, tokenizer: Tokenizer, beta: float, temperature: float) -> Objective:
        """`ops.divergence` from its distributions at every target, summed over a micro-batch, for
        a student with `tokenizer`."""
        if self._model is None:
            assert self._folder is not None  # the recipe's own check
            model = loading.load_companion(self._folder, tokenizer, self._dtype)
            self._model = model.requires_grad_(False).eval()
        teacher = self._model

        def loss(model: Llama, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            layout = batch.tokens, batch.positions, batch.cu_seqlens
            with torch.no_grad():
                hidden = teacher.hidden(*layout)
            distributions = hidden, teacher.output.weight
            at: dict[str, Any] = {"beta": beta, "temperature": temperature}
            value = model(*layout, batch.targets, tails=batch.tails, teacher=distributions, **at)
            return value.sum(), {}

        return loss
