"""Dialogues as tokens, and which of them a model should learn.

A folder's own chat template decides the format (`templated`). Without one, and where the template
writes the same text, it is Llama-2-Chat's.

There each finished pair of turns is `BOS [INST] user [/INST] answer EOS`, tokenised as one text.
The boundary between prompt and answer is found by the pieces' offsets, because a prompt tokenised
alone may have other tokens than in context. There is no default system prompt. Source: Meta's
`chat_completion` (Llama 2 repository, generation.py).
"""

import functools
from collections.abc import Mapping, Sequence

from llama2rt.errors import InputError
from llama2rt.text import templated
from llama2rt.text.template import ChatTemplate
from llama2rt.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

# The same format for transformers' apply_chat_template, which exported tokenizers carry: the
# template published with Llama-2-chat, without its default system prompt.
HUGGING_FACE_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns, the user first') }}{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + turn['content']).strip()"
    " + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def check_messages(messages: Messages, *, last: str) -> None:
    """InputError unless `messages` are an optional system message, then user and assistant in
    turns, ending with role `last` ("user" to be answered, "assistant" when finished), none blank
    (a finished dialogue's last answer included) and none holding a format tag, with which a user
    could speak as somebody else."""
    if not messages:
        raise InputError("no messages", "role_order")
    for index, message in enumerate(messages):
        where = f"message {index + 1}"
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: expected an object with role and content")
        if set(message) != {"role", "content"}:
            keys = ", ".join(sorted(map(str, message))) or "none"
            raise InputError(f"{where}: expected the keys role and content, got {keys}")
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            reason = f"role {role!r} is not system, user or assistant"
            raise InputError(f"{where}: {reason}", "role_order")
        if not isinstance(content, str):
            raise InputError(f"{where}: content must be text, got {type(content).__name__}")
        if role == "system":
            if index:
                raise InputError(f"{where}: a system message may only come first", "role_order")
        else:
            turn = index - (messages[0]["role"] == "system")
            expected = "assistant" if turn % 2 else "user"
            if role != expected:
                raise InputError(f"{where}: expected role {expected}, got {role}", "role_order")
        if not content.strip():
            raise InputError(f"{where}: {role} content is blank", "empty_turns")
        for tag in TAGS:
            if tag in content:
                raise InputError(f"{where}: {role} content holds the format tag {tag}")
    if messages[-1]["role"] != last:
        raise InputError(
            f"the last message must be from the {last}, not the {messages[-1]['role']}",
            "role_order",
        )


def encode_dialogue(
    tokenizer: Tokenizer, messages: Messages, learned: Sequence[bool] | None = None
) -> tuple[list[int], list[bool]]:
    """Tokens of a finished dialogue, and for each whether the model should learn to predict it:
    True on the assistants' tokens and the one that ends their turn (section 3.1: the loss on prompt
    tokens is zeroed). `learned`: which of the assistants' messages count so, first to last; None
    for all of them. InputError as `check_messages`, for a message that holds a control token
    of the folder's chat template, and for a template that cannot be trained on."""
    check_messages(messages, last="assistant")
    if _llama2_format(tokenizer.template):
        return _encode_pairs(tokenizer, _turns(messages), learned)
    templated.require_no_control_tokens(tokenizer, messages)
    return templated.encode_answers(tokenizer, messages, learned=learned)


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Tokens of a dialogue whose last message, the user's, is to be answered: open after [/INST],
    or after what the folder's chat template writes before an answer. Always a prefix of
    `encode_response`'s tokens. InputError as `encode_dialogue`."""
    check_messages(messages, last="user")
    if not _llama2_format(tokenizer.template):
        templated.require_no_control_tokens(tokenizer, messages)
        return templated.encode_prompt(tokenizer, messages)
    turns = _turns(messages)
    tokens, _ = _encode_pairs(tokenizer, turns[:-1])
    return tokens + tokenizer.encode(_instruction(turns[-1]), bos=True)


def encode_response(
    tokenizer: Tokenizer, messages: Messages, response: str
) -> tuple[list[int], list[bool]]:
    """`encode_dialogue` of the prompt `messages` answered by `response`, where the response
    may be anything a model said: blank, or holding tags, which stay text. Only the messages are
    checked."""
    check_messages(messages, last="user")
    if _llama2_format(tokenizer.template):
        return _encode_pairs(tokenizer, [*_turns(messages), response])
    templated.require_no_control_tokens(tokenizer, messages)
    answered = [*messages, {"role": "assistant", "content": response}]
    return templated.encode_answers(tokenizer, answered, sampled=True)


@functools.lru_cache(maxsize=16)
def _llama2_format(template: ChatTemplate | None) -> bool:
    """Whether dialogues are encoded pair by pair in Llama-2-Chat's format: without a template, and
    with a template that writes the same text."""
    if template is None:
        return True
    tokens = dict(template.tokens)
    if not {"bos_token", "eos_token"} <= tokens.keys():
        return False
    system, turns = {"role": "system", "content": " s "}, []
    for role, content in (
        ("user", " u "),
        ("assistant", " a\n"),
        ("user", "v"),
        ("assistant", "b"),
    ):
        turns.append({"role": role, "content": content})
        for messages in (turns, [system, *turns]):
            spoken = _turns(messages)
            text = "".join(
                f"{tokens['bos_token']}{_instruction(turn)}"
                if number % 2 == 0
                else f" {turn.strip()} {tokens['eos_token']}"
                for number, turn in enumerate(spoken)
            )
            try:
                if template.render(messages) != text:
                    return False
            except InputError:
                return False
    return True


def _turns(messages: Messages) -> list[str]:
    """User, assistant, user, ...; the system text folded into the first user turn."""
    turns = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, *turns = turns
        if not turns:
            raise InputError("a system message alone cannot be answered")
        turns[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0]}"
    return turns


def _instruction(user: str) -> str:
    return f"[INST] {user.strip()} [/INST]"


def _encode_pairs(
    tokenizer: Tokenizer, turns: Sequence[str], learned: Sequence[bool] | None = None
) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    trainable: list[bool] = []
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    for (user, answer), on in zip(pairs, learned or [True] * len(pairs), strict=True):
        instruction = _instruction(user)
        ids, begins = tokenizer.encode_with_offsets(f"{instruction} {answer.strip()} ")
        tokens += [tokenizer.bos, *ids, tokenizer.eos]
        trainable += [False, *(on and begin >= len(instruction) for begin in begins), on]
    return tokens, trainable
