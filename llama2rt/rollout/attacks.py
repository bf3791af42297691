"""Attacks of several turns: a user who tries again, answered by the policy at every turn.

A prompt's last message is one question; the user's messages before it were answered by somebody
else. Here the policy answers them all, each in the conversation that its own answers have led to,
and the answers in the file only say where the user's turns are.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from llama2rt.data.records import Prompt, Sample
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.rollout.sampling import complete, derived_seed
from llama2rt.text import chat

logger = logging.getLogger("llama2rt.rollout.attacks")


def converse(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    policy: str,
    temperature: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
) -> list[Sample]:
    """An answer to every turn of the user's in `prompts`, a prompt's turns after each other. A
    conversation ends early where an answer can be no message (blank, or with a tag of the chat
    format), or where it has filled the policy's context."""
    system = [[m for m in prompt.messages if m["role"] == "system"] for prompt in prompts]
    asked = [[m for m in prompt.messages if m["role"] == "user"] for prompt in prompts]
    said: list[list[Sample]] = [[] for _ in prompts]
    active = {
        i: [*system[i], asked[i][0]]
        for i in range(len(prompts))
        if _room(engine, [*system[i], asked[i][0]])
    }
    if len(active) < len(prompts):
        left_out = len(prompts) - len(active)
        logger.warning("%d prompts that fill the policy's context left out", left_out)
    if prompts and not active:
        raise InputError("prompts: none leaves the policy room to answer")
    turn = 0
    while active:
        now = [replace(prompts[i], messages=messages) for i, messages in active.items()]
        completions = complete(
            engine,
            now,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=derived_seed(seed, "turn", turn),
        )
        turn += 1
        following = {}
        for (i, messages), completion in zip(active.items(), completions, strict=True):
            prompt = prompts[i]
            said[i].append(
                Sample.of(
                    replace(prompt, messages=messages),
                    completion.text,
                    policy=policy,
                    temperature=temperature,
                    seed=seed,
                )
            )
            if turn < len(asked[i]):
                answer = {"role": "assistant", "content": completion.text}
                after = [*messages, answer, asked[i][turn]]
                if _room(engine, after):
                    following[i] = after
        active = following
    return [sample for samples in said for sample in samples]


def _room(engine: Engine, messages: list[dict[str, str]]) -> bool:
    try:
        tokens = chat.encode_prompt(engine.tokenizer, messages)
    except InputError:
        return False
    return len(tokens) < engine.model.config.context
