"""A model answers a benchmark's questions, turn by turn."""

import dataclasses
from collections.abc import Callable, Sequence

from llama2rt.evaluate.chat_benchmarks.records import Answered, Question
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.speakers import Options, Reply, Speaker, replies


def answer(
    speaker: Speaker,
    questions: Sequence[Question],
    options: Options,
    cache: Cache,
    *,
    temperature: Callable[[Question], float] | None = None,
    system: str | None = None,
) -> list[Answered]:
    """All turns of all questions, the answers of earlier turns before those of later ones.

    temperature: of each question, in place of that in `options`. system: a system message for every
    conversation.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    said: list[list[Reply]] = [[] for _ in questions]
    conversations = [list(first) for _ in questions]
    heats = [temperature(q) if temperature else options.temperature for q in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        for heat in dict.fromkeys(heats):
            mine = [
                i
                for i, question in enumerate(questions)
                if heats[i] == heat and turn < len(question.turns)
            ]
            for i in mine:
                conversations[i].append({"role": "user", "content": questions[i].turns[turn]})
            asked = [list(conversations[i]) for i in mine]
            how = dataclasses.replace(options, temperature=heat)
            for i, reply in zip(mine, replies(speaker, asked, how, cache), strict=True):
                conversations[i].append({"role": "assistant", "content": reply.text})
                said[i].append(reply)
    return [Answered(q, tuple(found)) for q, found in zip(questions, said, strict=True)]
