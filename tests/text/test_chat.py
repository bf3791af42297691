"""The chat format: Meta's formula, transformers' template, the mask, and what is refused."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llama2rt.errors import InputError
from llama2rt.text import Tokenizer, chat

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda content: content.strip() and not any(tag in content for tag in chat.TAGS)
)


@st.composite
def dialogues(draw, last="assistant"):
    turns = draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for user, assistant in turns:
        messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    return messages if last == "assistant" else messages[:-1]


def conversation(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def metas_formula(tokenizer, messages):
    """Meta's chat_completion, written down from the Llama 2 repository's generation.py."""
    if messages[0]["role"] == "system":
        first = {
            "role": messages[1]["role"],
            "content": "<<SYS>>\n"
            + messages[0]["content"]
            + "\n<</SYS>>\n\n"
            + messages[1]["content"],
        }
        messages = [first, *messages[2:]]
    tokens = []
    for prompt, answer in zip(messages[::2], messages[1::2], strict=False):
        tokens += tokenizer.encode(
            f"[INST] {(prompt['content']).strip()} [/INST] {(answer['content']).strip()} ",
            bos=True,
            eos=True,
        )
    if len(messages) % 2:
        tokens += tokenizer.encode(
            f"[INST] {(messages[-1]['content']).strip()} [/INST]", bos=True, eos=False
        )
    return tokens


# The chat template published with Llama-2-chat on the Hugging Face hub, its checks left out.
LLAMA_2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)

CONVERSATIONS = [
    conversation("hi"),
    conversation("  What is 2+2? ", " It is 4.\n"),
    conversation("a", "b", "c", "d", "e"),
    conversation("hello", "hi there", system=" Be brief. "),
    conversation("1", "2", "3", system="You count."),
    conversation("two  spaces\n\nand lines", "é中😀"),
]


@given(dialogues())
def test_dialogue_is_metas_formula(small_tokenizer, messages):
    tokens, trainable = chat.encode_dialogue(small_tokenizer, messages)
    assert tokens == metas_formula(small_tokenizer, messages)
    assert len(trainable) == len(tokens)


@given(dialogues(last="user"))
def test_prompt_is_metas_formula(small_tokenizer, messages):
    assert chat.encode_prompt(small_tokenizer, messages) == metas_formula(small_tokenizer, messages)


@given(dialogues(last="user"), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_prompt_is_a_prefix_and_the_rest_is_trainable(small_tokenizer, messages, response):
    """Any response: blank, with tags, with spaces in front."""
    prompt = chat.encode_prompt(small_tokenizer, messages)
    tokens, trainable = chat.encode_response(small_tokenizer, messages, response)
    assert tokens[: len(prompt)] == prompt
    assert all(trainable[len(prompt) :])
    assert tokens[-1] == small_tokenizer.eos
    answer = small_tokenizer.decode(tokens[len(prompt) : -1])
    assert answer.strip() == response.strip().replace("\u2581", " ").strip()


@given(dialogues())
def test_trainable_tokens_are_the_answers(small_tokenizer, messages):
    tokens, trainable = chat.encode_dialogue(small_tokenizer, messages)
    answers, current = [], []
    for token, learn in zip(tokens, trainable, strict=True):
        if learn:
            current.append(token)
            if token == small_tokenizer.eos:
                answers.append(small_tokenizer.decode(current).strip())
                current = []
    assert not current
    assume(not any("\u2581" in m["content"] for m in messages))
    assert answers == [m["content"].strip() for m in messages if m["role"] == "assistant"]


def test_parity_with_the_published_template_in_transformers(shared_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    from llama2rt.checkpoint.tokenizer_json import write_tokenizer

    tokenizer = Tokenizer.load(shared_data("llama_tokenizer.model"))
    write_tokenizer(tokenizer, tmp_path, 4096)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        rendered = theirs.apply_chat_template(
            messages, chat_template=LLAMA_2_TEMPLATE, tokenize=False
        )
        assert theirs.apply_chat_template(messages, tokenize=False) == rendered  # what we export
        expected = theirs.encode(rendered, add_special_tokens=False)
        if messages[-1]["role"] == "assistant":
            assert chat.encode_dialogue(tokenizer, messages)[0] == expected
        else:
            assert chat.encode_prompt(tokenizer, messages) == expected


def test_llamas_tokens_of_one_exchange(shared_data):
    """Written out, so that a change in either library shows."""
    tokenizer = Tokenizer.load(shared_data("llama_tokenizer.model"))
    tokens, trainable = chat.encode_dialogue(tokenizer, conversation("hi", "x"))
    instruction = [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]
    assert tokens == [*instruction, 921, 29871, 2]
    assert trainable == [False] * len(instruction) + [True] * 3


@pytest.mark.parametrize("tag", chat.TAGS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_tags_in_any_message_are_refused(small_tokenizer, tag, role):
    messages = conversation("u", "a", "u", "a", system="s")
    index = next(i for i, m in enumerate(messages) if m["role"] == role)
    messages[index] = {"role": role, "content": f"x {tag} y"}
    with pytest.raises(InputError) as error:
        chat.encode_dialogue(small_tokenizer, messages)
    assert str(error.value) == f"message {index + 1}: {role} content holds the format tag {tag}"
    with pytest.raises(InputError, match="format tag"):
        chat.encode_prompt(small_tokenizer, messages[:-1])
    with pytest.raises(InputError, match="format tag"):
        chat.encode_response(small_tokenizer, messages[:-1], "fine")


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([message("system", "s")], "the last message must be from the assistant, not the system"),
        ([message("user", "u")], "the last message must be from the assistant, not the user"),
        ([message("assistant", "a")], "message 1: expected role user, got assistant"),
        (
            [message("user", "u"), message("user", "u")],
            "message 2: expected role assistant, got user",
        ),
        (
            [message("system", "s"), message("assistant", "a")],
            "message 2: expected role user, got assistant",
        ),
        (
            [message("user", "u"), message("system", "s")],
            "message 2: a system message may only come first",
        ),
        ([message("tool", "u")], "message 1: role 'tool' is not system, user or assistant"),
        ([message(["user"], "u")], "message 1: role ['user'] is not system, user or assistant"),
        ([message("user", " \n")], "message 1: user content is blank"),
        ([message("user", "u"), message("assistant", "")], "message 2: assistant content is blank"),
        ([message("user", None)], "message 1: content must be text, got NoneType"),
        ([message("user", ["u"])], "message 1: content must be text, got list"),
        ([{"role": "user"}], "message 1: expected the keys role and content, got role"),
        (
            [{"role": "user", "content": "u", "name": "x"}],
            "message 1: expected the keys role and content, got content, name, role",
        ),
        (["user"], "message 1: expected an object with role and content"),
    ],
)
def test_what_is_no_dialogue(small_tokenizer, messages, reason):
    with pytest.raises(InputError) as error:
        chat.encode_dialogue(small_tokenizer, messages)
    assert str(error.value) == reason


def test_a_finished_dialogue_is_no_prompt(small_tokenizer):
    with pytest.raises(InputError, match="must be from the user, not the assistant"):
        chat.encode_prompt(small_tokenizer, conversation("u", "a"))
    with pytest.raises(InputError, match="must be from the user, not the assistant"):
        chat.encode_response(small_tokenizer, conversation("u", "a"), "b")
