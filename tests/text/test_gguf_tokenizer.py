"""A tokenizer rebuilt from a GGUF file's lists gives the ids of the one that they were made of."""

import json

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llama2rt.errors import InputError
from llama2rt.text import Tokenizer, agreement
from llama2rt.text import sentencepiece_model as spm
from llama2rt.text.chat import encode_prompt
from llama2rt.text.gguf_tokenizer import PREFIX, of_metadata
from llama2rt.text.tiktoken_ranks import LLAMA3_PATTERN

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def metadata(tokenizer, *further):
    """The lists that llama.cpp's converter makes of a tokenizer.model, and `further` pieces."""
    pieces = [*spm.read(tokenizer._definition).pieces, *(spm.Piece(*piece) for piece in further)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [float(piece.score) for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_equal_ids(small_tokenizer, prefix):
    original, described = small_tokenizer, metadata(small_tokenizer)
    if not prefix:
        model = spm.read(original._definition)
        model.add_dummy_prefix = False
        original = Tokenizer(spm.write(model, {"unk": 0, "bos": 1, "eos": 2}))
        described[f"{PREFIX}add_space_prefix"] = False
    rebuilt = of_metadata(described)
    texts = list(agreement.probes(original, joined=2000, every_piece=True))
    assert rebuilt.encode_batch(texts) == original.encode_batch(texts)
    ids = original.encode_batch(texts[:300])
    assert [rebuilt.decode(i) for i in ids] == [original.decode(i) for i in ids]
    found = (rebuilt.bos, rebuilt.eos, rebuilt.unk, rebuilt.vocab_size, rebuilt.template)
    assert found == (original.bos, original.eos, original.unk, original.vocab_size, None)
    assert rebuilt.agrees_with(original)


def test_what_is_written_is_what_was_read(small_tokenizer):
    model = spm.read(small_tokenizer._definition)
    assert spm.read(spm.write(model, {"unk": 0, "bos": 1, "eos": 2})) == model


def test_added_tokens_padding_and_chat_template(small_tokenizer, tmp_path):
    """As in a chat model whose tokens were added to LLaMA's: the same ids as from its folder."""
    further = [("<|im_start|>", -1000.0, spm.CONTROL), ("<|im_end|>", -1000.0, spm.CONTROL)]
    further += [("<think>", -1000.0, spm.USER_DEFINED)]
    padding = [(f"[PAD{i}]", -10000.0, spm.UNUSED) for i in range(403, 416)]
    described = metadata(small_tokenizer, *further, *padding) | {
        "tokenizer.ggml.eot_token_id": 401,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
        "tokenizer.chat_template.tool_use": "x",
    }
    rebuilt = of_metadata(described)
    assert rebuilt.vocab_size == 403 and rebuilt.stop_ids == (2, 401)
    # Text never gives control tokens, and gives user-defined ones as whole pieces.
    assert 401 not in rebuilt.encode("the fox<|im_end|>")
    assert 402 in rebuilt.encode("so <think> of")
    messages = [{"role": "user", "content": "the fox"}]
    ids = encode_prompt(rebuilt, messages)
    assert ids[0] == 400 and ids.count(401) == 1
    again = Tokenizer.load(rebuilt.save(tmp_path).parent)
    assert again.stop_ids == rebuilt.stop_ids and encode_prompt(again, messages) == ids
    assert again.config["add_bos_token"] is False and again.config["pad_token"] == "<unk>"
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").read_text() == "x"


def test_a_symbol_of_spaces_is_met_as_in_sentencepiece(small_tokenizer):
    """The converter writes the spaces of user-defined symbols as in text."""
    pieces = [*spm.read(small_tokenizer._definition).pieces]
    pieces.append(spm.Piece("\u2581\u2581", 0.0, spm.USER_DEFINED))
    model = spm.Model(pieces, "bpe", byte_fallback=True, normalization="identity")
    model.remove_extra_whitespaces = False
    original = Tokenizer(spm.write(model, {"unk": 0, "bos": 1, "eos": 2}))
    rebuilt = of_metadata(metadata(small_tokenizer, ("  ", -1000.0, spm.USER_DEFINED)))
    texts = list(agreement.probes(original, joined=500))
    assert rebuilt.encode_batch(texts) == original.encode_batch(texts)
    assert any(400 in ids for ids in original.encode_batch(texts))


CUTS = {
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


@pytest.fixture(scope="module", params=list(CUTS))
def byte_level(request):
    """(name of the cut, a tokenizer as a folder has it, the lists made of it). SmolLM's special
    tokens come first in its vocabulary, Llama 3's last."""
    name = request.param
    original = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    original.pre_tokenizer, original.decoder = CUTS[name](), decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special if name == "smollm" else [],
        show_progress=False,
    )
    text = "the quick brown fox isn't 2024 or 12345; it's \u00e9t\u00e9\n\n  twelve  lazy dogs!! "
    original.train_from_iterator([text * 3] * 40, trainer)
    if name != "smollm":
        original.add_special_tokens(special)
    vocabulary = sorted(original.get_vocab(with_added_tokens=True).items(), key=lambda x: x[1])
    merges = json.loads(original.to_str())["model"]["merges"]
    described = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": original.token_to_id("<|begin|>"),
        "tokenizer.ggml.eos_token_id": original.token_to_id("<|end|>"),
    }
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return name, Tokenizer(original.to_str().encode(), config=config), described


def test_byte_level_gives_equal_ids(byte_level):
    name, original, described = byte_level
    rebuilt = of_metadata(described)
    texts = list(agreement.probes(original, joined=1000, every_piece=True))
    texts += ["the 12345 foxes'll\r\n  run <|end|>", "isn't  ISN'T 3.14\t\n \n x"]
    assert rebuilt.encode_batch(texts) == original.encode_batch(texts)
    assert [rebuilt.decode(ids) for ids in original.encode_batch(texts)] == texts
    assert (rebuilt.bos, rebuilt.eos) == (original.bos, original.eos)
    assert rebuilt.agrees_with(original) and original.agrees_with(rebuilt)
    adds_bos = rebuilt._parsing.encode("fox").ids[0] == rebuilt.bos
    assert adds_bos == (name == "llama-bpe")


def test_a_file_without_a_tokenizer():
    assert of_metadata({}) is None and of_metadata({"tokenizer.ggml.model": "no_vocab"}) is None


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"scores": [-1000.0] * 400}, "scores: all are -1000, so that the order of merges is lost"),
        ({"scores": [0.5] * 399}, "scores: expected 400, one a token, got 399"),
        ({"scores": None}, "scores: missing"),
        ({"tokens": []}, "tokens: missing, empty"),
        ({"tokens": [1] * 400}, "tokens: expected a list of str"),
        ({"tokens": ["x"] * 400}, "tokens: 0 and 1 are both 'x'"),
        ({"tokens": ["", *map(str, range(399))]}, "tokens: 0: empty"),
        ({"token_type": [9] * 400}, "token_type: 0: expected 1 to 6, got 9"),
        ({"token_type": [2, 2, *[1] * 398]}, "token_type: expected one unknown piece, got 2"),
        ({"eos_token_id": 400}, "eos_token_id: expected 0 to 399, got 400"),
        ({"eot_token_id": -1}, "eot_token_id: expected 0 to 399, got -1"),
        ({"add_space_prefix": 1}, "add_space_prefix: expected true or false, got 1"),
    ],
)
def test_sentencepiece_that_is_refused_by_name(small_tokenizer, changes, pattern):
    changes = {f"{PREFIX}{key}": value for key, value in changes.items()}
    with pytest.raises(InputError, match=f"^tokenizer.ggml.{pattern}"):
        of_metadata(metadata(small_tokenizer) | changes)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"pre": "qwen2"}, "pre: expected one of llama-bpe, .* got 'qwen2'"),
        ({"pre": None}, "pre: expected one of llama-bpe, .* got None"),
        ({"merges": ["ab"]}, "merges: 0: expected two pieces, got 'ab'"),
        ({"merges": ["never seen"]}, "merges: "),
        ({"bos_token_id": None}, "bos_token_id: missing"),
    ],
)
def test_byte_level_that_is_refused_by_name(byte_level, changes, pattern):
    changes = {f"{PREFIX}{key}": value for key, value in changes.items()}
    with pytest.raises(InputError, match=f"^tokenizer.ggml.{pattern}"):
        of_metadata(byte_level[2] | changes)
