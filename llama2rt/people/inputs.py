"""The tasks of a configuration, read and checked before the page is there."""

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llama2rt.data import readers
from llama2rt.data.files import rows
from llama2rt.data.records import Messages, Prompt, Sample
from llama2rt.errors import InputError
from llama2rt.people.config import Config, Variant
from llama2rt.people.tasks import NewTask

_PAIR_KEYS = {"part", "id", "prompt_id", "kind", "messages", "first", "second"}


class Fixed:
    """What variants of files have answered, by the prompt's messages."""

    def __init__(self, variants: Sequence[Variant]) -> None:
        self.prompts: dict[str, Prompt] = {}
        """of all of them, by `_key`"""
        self._answers: dict[str, dict[str, str]] = {}
        for variant in variants:
            if not variant.samples_now:
                self._answers[variant.name] = dict(self._read(variant))

    def answer(self, variant: Variant, prompt: Prompt) -> str | None:
        """None where the variant answers when it is asked. KeyError for no answer in its files."""
        if variant.samples_now:
            return None
        return self._answers[variant.name][_key(prompt.messages)]

    def _read(self, variant: Variant) -> Iterator[tuple[str, str]]:
        seen: set[str] = set()
        for prompt, response in _samples(variant) if variant.samples else _dialogues(variant):
            key = _key(prompt.messages)
            self.prompts.setdefault(key, prompt)
            if key not in seen and response.strip():
                seen.add(key)
                yield key, response.strip()


def tasks(config: Config) -> list[NewTask]:
    """All that can be asked before anybody has written anything. InputError for files that are
    wrong, and where no prompt has an answer of each variant."""
    found = [task for path in config.pairs for task in _pairs(path)]
    if len(config.variants) < 2:
        return found
    fixed = Fixed(config.variants)
    prompts = list(fixed.prompts.values())
    if config.prompts:
        prompts = list(readers.read(config.prompts, "prompt"))
    if config.draw is not None:
        prompts = random.Random(config.seed).sample(prompts, len(prompts))
    compared = (list(_compared(config, fixed, prompt)) for prompt in prompts)
    made = [*itertools.chain(*itertools.islice(filter(None, compared), config.draw))]
    if prompts and not made:
        raise InputError("prompts: none has two different answers of the variants' files")
    if not made and not config.write and not found:
        raise InputError("prompts: none are given, and write is false: there is nothing to ask")
    return [*found, *made]


def drawn_variants(config: Config, *parts: str) -> tuple[Variant, Variant]:
    """The two variants of a preference task, by the seed and what names the task."""
    generator = random.Random(json.dumps([config.seed, *parts]))
    first, second = generator.sample(list(config.variants), 2)
    return first, second


def _compared(config: Config, fixed: Fixed, prompt: Prompt) -> Iterator[NewTask]:
    first, *others = config.variants
    couples = [(first, other) for other in others]
    if config.mode == "preference":
        couples = [drawn_variants(config, prompt.id, _key(prompt.messages))]
    for couple in couples:
        try:
            answers = [fixed.answer(variant, prompt) for variant in couple]
        except KeyError:
            continue
        if None not in answers and answers[0] == answers[1]:
            continue  # nobody can say which is better
        names = couple[0].name, couple[1].name
        yield NewTask(prompt, names, (answers[0], answers[1]))


def _samples(variant: Variant) -> Iterator[tuple[Prompt, str]]:
    sample: Sample
    for sample in readers.read(variant.samples, "sample"):
        yield Prompt(sample.prompt_id, sample.messages), sample.response


def _dialogues(variant: Variant) -> Iterator[tuple[Prompt, str]]:
    for source in variant.dialogues:
        for number, dialogue in enumerate(readers.read([source], "dialogue"), start=1):
            *messages, last = dialogue.messages
            yield Prompt(f"{source.path.name}:{number}", messages), last["content"]


def _pairs(path: Path) -> Iterator[NewTask]:
    count = 0
    for line, row in rows(path, "pair", None):
        count += 1
        try:
            if isinstance(row, InputError):
                raise row
            yield _pair(row)
        except InputError as error:
            raise InputError(f"{path}:{line}: {error}") from None
    if not count:
        raise InputError(f"{path}: holds no pairs")


def _pair(row: Mapping[str, object]) -> NewTask:
    if not isinstance(row, Mapping):
        raise InputError("expected a JSON object")
    if wrong := sorted(row.keys() ^ _PAIR_KEYS):
        problem = "unknown" if wrong[0] in row else "missing"
        raise InputError(f"{problem} key {wrong[0]!r}: expected {', '.join(sorted(_PAIR_KEYS))}")
    values = {"id": row["prompt_id"], "messages": row["messages"], "kind": row["kind"]}
    prompt = Prompt.from_json(values)
    texts = [row[key] for key in ("id", "first", "second")]
    for key, text in zip(("id", "first", "second"), texts, strict=True):
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise InputError(f"{key}: expected text that is not blank")
    identifier, first, second = map(str, texts)
    if first == second:
        raise InputError("first and second are equal")
    return NewTask(prompt, ("first", "second"), (first, second), identifier)


def _key(messages: Messages) -> str:
    return json.dumps(messages, sort_keys=True)
