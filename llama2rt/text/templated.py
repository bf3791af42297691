"""Dialogues in a folder's own chat template: tokens, and which of them a model should learn.

The text is the template's, and its special tokens are parsed out of it. The template itself says
which part a model is to write: its {% generation %} blocks where it has them; otherwise what
follows the prompt that it makes of the messages before an answer, up to the first token that ends a
sequence. A template for which this does not work (it drops parts of an answer, or changes an answer
once more messages follow) is an InputError, because the model would learn text that generation
never asks for.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from llama2rt.errors import InputError
from llama2rt.text.template import ChatTemplate

if TYPE_CHECKING:
    from llama2rt.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


def require_no_control_tokens(tokenizer: "Tokenizer", messages: Messages) -> None:
    """InputError where a message holds a special token's text, with which its author could end
    their turn and speak as somebody else. Tokens that the template writes but the folder does not
    call special (`</think>`) are part of an answer, and only there."""
    for index, message in enumerate(messages):
        answer = message["role"] == "assistant"
        for token in tokenizer.control_tokens if answer else tokenizer.template_tokens:
            if token in message["content"]:
                raise InputError(
                    f"message {index + 1}: {message['role']} content holds the control token "
                    f"{token}"
                )


def encode_prompt(tokenizer: "Tokenizer", messages: Messages) -> list[int]:
    """Tokens of the messages and of the opening of the answer to them."""
    return tokenizer.encode_rendered(_prompt(_template(tokenizer), messages))[0]


def encode_answers(
    tokenizer: "Tokenizer",
    messages: Messages,
    *,
    sampled: bool = False,
    learned: Sequence[bool] | None = None,
) -> tuple[list[int], list[bool]]:
    """(tokens, whether each is to be learned) of messages that end with an answer; of the answers
    those that are `learned`, None for all.

    The last token is the one that ends the last answer: what a template writes after it (a newline)
    is never generated. A last answer that is `sampled` may hold anything, and the tokens begin with
    those of `encode_prompt`.
    """
    template = _template(tokenizer)
    text, spans = _answers(template, messages)
    if learned is not None and len(learned) != len(spans):
        raise InputError(
            f"the chat template's {{% generation %}} blocks enclose {len(spans)} parts of "
            f"{len(learned)} answers, so that an answer's weight cannot be told"
        )
    cuts = {start for start, _ in spans}
    prompt: list[int] = []
    literal = (0, 0)  # the part of the text in which control tokens do not count
    if sampled:
        opening = _prompt(template, messages[:-1])
        if not text.startswith(opening):
            raise InputError(
                "the chat template shows the prompt otherwise once it is answered, so that an "
                "answer cannot be told from it"
            )
        cuts.add(len(opening))
        prompt = tokenizer.encode_rendered(opening)[0]
        content = messages[-1]["content"].strip()
        if any(token in content for token in tokenizer.control_tokens):
            at = text.index(content, len(opening))
            literal = (at, at + len(content))
    ids, offsets = tokenizer.encode_rendered(text)
    straddled = any(begin < cut < end for cut in cuts for begin, end in offsets)
    if straddled or literal[1] or ids[: len(prompt)] != prompt:
        ids, offsets = _encode_apart(tokenizer, text, cuts, literal)
    trainable = [False] * len(ids)
    last = 0
    for index, (start, end) in enumerate(spans):
        final = index == len(spans) - 1
        on = learned is None or learned[index]
        following = len(text) if final else spans[index + 1][0]
        lower = start if template.marks_answers else end
        stops = (
            i
            for i, (begin, stop) in enumerate(offsets)
            if start <= begin < following and stop >= lower and ids[i] in tokenizer.stop_ids
        )
        ending = next(stops, None)
        if ending is None and (final or not template.marks_answers):
            raise InputError(_endless(tokenizer))
        for i, (begin, _) in enumerate(offsets):
            within = end if template.marks_answers else following
            if start <= begin < within and (ending is None or i <= ending):
                trainable[i] = on
        if ending is not None:
            trainable[ending] = on
            last = ending
    return ids[: last + 1], trainable[: last + 1]


def answer_end(tokenizer: "Tokenizer") -> int | None:
    """The special token with which the chat template ends an answer; None without a template, or
    where it ends one in another way."""
    known = tokenizer.template_tokens
    if tokenizer.template is None or not known:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zyx"}]
    try:
        text = tokenizer.template.render(messages)
        following = text[text.rindex("zyx") + 3 :].lstrip()
    except (InputError, ValueError):
        return None
    ending = max((t for t in known if following.startswith(t)), key=len, default="")
    return known.get(ending)


def _template(tokenizer: "Tokenizer") -> ChatTemplate:
    assert tokenizer.template is not None
    return tokenizer.template


def _prompt(template: ChatTemplate, messages: Messages) -> str:
    return template.render(messages, add_generation_prompt=True)


def _answers(template: ChatTemplate, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The dialogue's text, and for each answer where it begins and where its content ends."""
    if template.marks_answers:
        text, spans = template.render_marked(messages)
        if not spans:
            raise InputError("the chat template's {% generation %} blocks enclose no answer")
        return text, spans
    text = template.render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _prompt(template, messages[:index])
        if not text.startswith(prompt):
            raise InputError(
                f"message {index + 1}: the chat template shows the messages before this answer "
                "otherwise in a finished dialogue than in a prompt, and has no {% generation %} "
                "blocks that would say what to learn"
            )
        content = message["content"].strip()
        at = text.find(content, len(prompt))
        if at < 0:
            raise InputError(
                f"message {index + 1}: the chat template does not show this answer as it stands, "
                "and has no {% generation %} blocks that would say what to learn"
            )
        spans.append((len(prompt), at + len(content)))
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start < end:
            raise InputError("the chat template does not show the messages in their order")
    return text, spans


def _endless(tokenizer: "Tokenizer") -> str:
    names = ", ".join(tokenizer.piece(i) for i in tokenizer.stop_ids if i < tokenizer.vocab_size)
    return (
        f"the chat template ends an answer without an end-of-sequence token ({names}): a model "
        "trained on it would never stop"
    )


def _encode_apart(
    tokenizer: "Tokenizer", text: str, cuts: Iterable[int], literal: tuple[int, int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the parts of `text` between `cuts`, where no token may reach across one, as none
    does in generation. InputError for a tokenizer that adds spaces to each part."""
    edges = sorted({0, len(text), *cuts, *literal})
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(edges):
        part = text[begin:end]
        if literal[0] <= begin < literal[1]:
            part_ids, begins = tokenizer.encode_with_offsets(part)
            part_offsets = [(a, a) for a in begins]
        else:
            part_ids, part_offsets = tokenizer.encode_rendered(part)
        ids += part_ids
        offsets += [(begin + a, begin + b) for a, b in part_offsets]
    if tokenizer.decode_rendered(ids) != text:
        raise InputError(
            "this tokenizer joins the answer's beginning, or a special token's text in it, with "
            "what stands before it in the chat template"
        )
    return ids, offsets
