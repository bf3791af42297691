"""Where a space is put before text, as the files beside a tokenizer say."""

import io
import json
import shutil

import pytest

from llama2rt.errors import InputError
from llama2rt.text import Tokenizer, chat

MESSAGES = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "fox"}]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = ("the fox", " two", "  x  y ", "a</s>b</s> c", "\u00e9\n")
SPACED = "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "settings",
    [{"legacy": False}, {"add_prefix_space": False}, {"legacy": False, "add_prefix_space": False}],
)
def test_spaces_before_text_are_the_folders(tmp_path, small_tokenizer, settings, caplog):
    """A tokenizer.model alone, whose folder puts none after special tokens, or none at all."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "m"
    small_tokenizer.save(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **names, "chat_template": SPACED, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ours = Tokenizer.load(folder)
    assert f"say otherwise ({' and '.join(sorted(settings))} false); they hold" in caplog.text
    if settings == {"add_prefix_space": False}:  # transformers 5 takes `legacy` for false
        config["legacy"] = False
        shutil.copytree(folder, tmp_path / "theirs")
        (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(config))
        folder = tmp_path / "theirs"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the fox", " two", "  x  y ", "a</s>b</s> c", "\u00e9\n"):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode_rendered(text)[0] == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    tokens, _ = chat.encode_dialogue(ours, MESSAGES)
    assert tokens == theirs.apply_chat_template(MESSAGES, return_dict=False)


def configure(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMES, **config}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def trained(**options) -> bytes:
    import sentencepiece

    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "counts"]
    lines = [f"{a} {b} {c}" for a in words for b in words for c in words[::3]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=288,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"legacy": False}, "legacy false"),
        ({"add_prefix_space": False}, "add_prefix_space false"),
        ({"additional_special_tokens": ["<x>"]}, "the special token '<x>'"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bpe", "the normalization rule 'nmt_nfkc'"), ("unigram", "only SentencePiece BPE")],
)
def test_a_model_of_which_there_is_no_json_is_read_as_it_is(
    tmp_path, setting, named, kind, reason, caplog
):
    """Neither nmt_nfkc, SentencePiece's default, nor unigram can be written as tokenizer.json."""
    definition = trained(model_type=kind)
    (tmp_path / "tokenizer.model").write_bytes(definition)
    tokenizer = Tokenizer.load(configure(tmp_path, tokenizer_class=None, **setting))
    assert f"tokenizer.model: not applied: {named} in the files beside it" in caplog.text
    assert reason in caplog.text
    assert tokenizer.encode("the fox") == Tokenizer(definition).encode("the fox")
    chat.encode_dialogue(tokenizer, MESSAGES)


def test_a_setting_without_effect_changes_nothing(tmp_path, caplog):
    definition = trained(model_type="bpe", add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(definition)
    tokenizer = Tokenizer.load(configure(tmp_path, legacy=False, add_prefix_space=False))
    assert tokenizer.digest == Tokenizer(definition).digest and not caplog.records


def test_a_tokenizer_class_is_text_or_absent(tmp_path, small_tokenizer):
    small_tokenizer.save(tmp_path)
    configure(tmp_path, tokenizer_class=None, legacy=False)
    assert Tokenizer.load(tmp_path).config["padding_side"] == "left"
    configure(tmp_path, tokenizer_class=5, legacy=False)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: tokenizer_class: .* got 5"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_no_space_before_text_also_with_a_tokenizer_json(tmp_path, small_tokenizer, name, beside):
    """transformers 5 heeds add_prefix_space in LLaMA's class, and not in the one for any file."""
    transformers = pytest.importorskip("transformers")
    if beside:
        small_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer.as_json())
    configure(tmp_path, tokenizer_class=name, add_prefix_space=False)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode_rendered(text)[0] == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert (ours.encode("fox") == small_tokenizer.encode("fox")) == (name == "TokenizersBackend")
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode("fox") == ours.encode("fox")


def test_a_space_that_cannot_be_turned_off_is_named(tmp_path, small_tokenizer, caplog):
    content = json.loads(small_tokenizer.as_json())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    configure(tmp_path, tokenizer_class="LlamaTokenizer", add_prefix_space=False)
    ours = Tokenizer.load(tmp_path)
    assert "a way that add_prefix_space false in tokenizer_config.json cannot" in caplog.text
    assert ours.encode("fox") == small_tokenizer.encode("fox")
