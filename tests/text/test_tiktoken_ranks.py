"""Llama 3's tokenizer.model: tiktoken's own algorithm, its special tokens, damage by name."""

import base64
import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.errors import InputError
from llama2rt.text import Tokenizer, chat
from llama2rt.text.tiktoken_ranks import LLAMA3_PATTERN, LLAMA3_SPECIAL

regex = pytest.importorskip("regex")  # which transformers brings; Python's own knows no \\p{L}

SENTENCE = "the quick brown fox isn't jumping over 12 lazy dogs; \u00e9t\u00e9 \U0001f642\n\n"


def train(text: str, size: int) -> dict[bytes, int]:
    """Byte-pair merges of the most frequent pairs, learned within words."""
    ranks = {bytes([b]): i for i, b in enumerate([*range(255, -1, -1)])}
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(LLAMA3_PATTERN, text)]
    while len(ranks) < size:
        pairs = collections.Counter(p for w in words for p in itertools.pairwise(w))
        (left, right), _ = pairs.most_common(1)[0]
        ranks[left + right] = len(ranks)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


def tiktoken_encode(ranks: dict[bytes, int], text: str) -> list[int]:
    """tiktoken's algorithm: within a word, always the leftmost pair of lowest rank."""
    ids = []
    for word in regex.findall(LLAMA3_PATTERN, text):
        parts = [bytes([b]) for b in word.encode()]
        if word.encode() in ranks:
            ids.append(ranks[word.encode()])
            continue
        while True:
            joined = [ranks.get(a + b) for a, b in itertools.pairwise(parts)]
            known = [rank for rank in joined if rank is not None]
            if not known:
                break
            i = joined.index(min(known))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


RANKS = train(SENTENCE * 3 + "aaaa aaaaa abab ababab   x     y\n" * 4, 310)
DEFINITION = b"".join(
    base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in RANKS.items()
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DEFINITION)


text = st.text(st.sampled_from(list(SENTENCE + "abAB  \n\r\t'sll<|eot_id|>\u4e2d")), max_size=40)


@given(text)
def test_ids_are_tiktokens(tokenizer, example):
    ids, begins = tokenizer.encode_with_offsets(example)
    assert ids == tokenizer.encode(example) == tiktoken_encode(RANKS, example)
    assert tokenizer.decode(ids) == example
    assert begins == sorted(begins)


def test_special_tokens_follow_the_ranks_as_in_metas_code(tokenizer):
    assert len(LLAMA3_SPECIAL) == 256 and tokenizer.vocab_size == len(RANKS) + 256
    at = {tokenizer.piece(i): i - len(RANKS) for i in range(len(RANKS), tokenizer.vocab_size)}
    # As in the published model of 128000 ranks: 128000, 128001, 128006, 128007, 128009, 128255.
    for name, offset in (
        ("<|begin_of_text|>", 0),
        ("<|end_of_text|>", 1),
        ("<|start_header_id|>", 6),
        ("<|end_header_id|>", 7),
        ("<|eot_id|>", 9),
        ("<|reserved_special_token_250|>", 255),
    ):
        assert at[name] == offset
    assert tokenizer.bos == len(RANKS) and tokenizer.eos == len(RANKS) + 1
    assert tokenizer.stop_ids == (len(RANKS) + 1, len(RANKS) + 9)


def test_the_exported_tokenizer_json_gives_the_same_ids(tokenizer, tmp_path):
    from llama2rt.checkpoint.tokenizer_json import write_tokenizer

    transformers = pytest.importorskip("transformers")
    write_tokenizer(tokenizer, tmp_path, 8192)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert (tmp_path / "tokenizer.model").read_bytes() == DEFINITION
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)  # both files agree
    assert ours.digest == tokenizer.digest and ours.agrees_with(tokenizer)
    as_json = Tokenizer.load(tmp_path / "tokenizer.json")
    assert as_json.agrees_with(tokenizer) and tokenizer.agrees_with(as_json)
    assert theirs(SENTENCE)["input_ids"] == tokenizer.encode(SENTENCE, bos=True)
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "the fox"}]
    tokens, trainable = chat.encode_dialogue(tokenizer, messages)
    assert tokens == theirs.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode_rendered(tokens) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nthe fox<|eot_id|>"
    )
    learned = [t for t, learn in zip(tokens, trainable, strict=True) if learn]
    assert tokenizer.decode_rendered(learned) == "the fox<|eot_id|>"


def test_a_response_that_spells_a_control_token_stays_text(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    tokens, trainable = chat.encode_response(tokenizer, messages, "a<|eot_id|>b")
    end = tokenizer.stop_ids[1]
    assert [i for i, token in enumerate(tokens) if token == end and trainable[i]] == [
        len(tokens) - 1
    ]
    prompt = chat.encode_prompt(tokenizer, messages)
    assert tokens[: len(prompt)] == prompt and all(trainable[len(prompt) :])
    assert tokenizer.decode(tokens[len(prompt) : -1]) == "a<|eot_id|>b"


def test_an_answer_that_would_merge_with_the_prompt_is_kept_apart(tokenizer):
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}<|eot_id|>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    folder = {"chat_template.jinja": template.encode()}
    tokenizer = Tokenizer(DEFINITION, companions=folder)
    messages = [{"role": "user", "content": "hi"}]
    prompt = chat.encode_prompt(tokenizer, messages)
    for response in (":;;", "\n\nx", " the"):
        tokens, _ = chat.encode_response(tokenizer, messages, response)
        assert tokens[: len(prompt)] == prompt
        assert tokenizer.decode(tokens[len(prompt) :]) == response


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (DEFINITION + b"!!! 400\n", "line 311: expected a base64 token and its rank"),
        (DEFINITION + b"YWJjZGVm 400\n", "ranks: expected 0 to 310, each once"),
        (DEFINITION[DEFINITION.index(b"\n") + 1 :], "ranks: expected 0 to 308"),
        (b"YQ== 0\nYg== 1\n", "ranks: no token for the byte 0"),
    ],
)
def test_damaged_ranks_are_named(tmp_path, definition, message):
    (tmp_path / "tokenizer.model").write_bytes(definition)
    with pytest.raises(InputError, match=rf"tokenizer\.model: {message}"):
        Tokenizer.load(tmp_path)
