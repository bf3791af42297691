"""What the files beside a tokenizer say of it: special tokens, flags, templates, spaces."""

import json
import shutil

import pytest

from llama2rt.errors import InputError
from llama2rt.text import Tokenizer, chat
from llama2rt.text.template import ChatTemplate

NAMES = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "fox"}]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": NAMES[0],
    "eos_token": NAMES[3],
    "chat_template": CHATML,
}


def byte_level(pieces=(), added=()):
    """A tokenizer of the 256 bytes, with `pieces` and then `added` tokens from id 256 on."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *pieces])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    for token in added:
        library.add_tokens([token])
    return library


def special(text, **flags):
    from tokenizers import AddedToken

    return AddedToken(text, **{"special": True, "normalized": False, **flags})


def write(folder, library, config, **files):
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


def entries(first=256, **flags):
    """`added_tokens_decoder` of the four."""
    flags = {"special": True, "normalized": False, "single_word": False} | flags
    return {str(first + i): {"content": text} | flags for i, text in enumerate(NAMES)}


KINDS = {
    "pieces that are named": (True, {"additional_special_tokens": NAMES[1:3]}, {}),
    "pieces that are listed": (
        True,
        {"added_tokens_decoder": entries(lstrip=False, rstrip=False)},
        {},
    ),
    "pieces in the map": (
        True,
        {},
        {"special_tokens_map": {"additional_special_tokens": NAMES[1:3]}},
    ),
    "listed with other flags": (
        False,
        {"added_tokens_decoder": entries(lstrip=True, rstrip=True)},
        {},
    ),
    "new and named": (None, {"pad_token": "[PAD]", "additional_special_tokens": NAMES[2:3]}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_of_the_files_beside_count(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    as_pieces, config, files = KINDS[kind]
    tokens = NAMES if as_pieces is not None else [NAMES[0], NAMES[1], NAMES[3]]
    library = byte_level(tokens) if as_pieces else byte_level((), map(special, tokens))
    ours = write(tmp_path, library, {**CONFIG, **config}, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    text = "a <|im_start|> b <|im_end|>c[PAD]"
    assert ours.encode_rendered(text)[0] == theirs.encode(text, add_special_tokens=False)
    opened = theirs.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    assert chat.encode_prompt(ours, MESSAGES[:1]) == opened
    tokens, _ = chat.encode_dialogue(ours, MESSAGES)
    assert tokens[-1] == ours.eos == theirs.eos_token_id
    assert ours.eos not in ours.encode("a<|im_end|>b")  # text stays text


def test_a_pad_token_of_no_model_or_of_ordinary_text_changes_nothing(tmp_path):
    library = byte_level((), map(special, NAMES))
    for pad in ("[PAD]", "!"):
        tokenizer = write(tmp_path, library, {**CONFIG, "pad_token": pad})
        assert tokenizer.vocab_size == 260
        chat.encode_prompt(tokenizer, [{"role": "user", "content": "hi!"}])
    with pytest.raises(InputError, match=r"no eos_token: .* \(looked for <eos>\)"):
        write(tmp_path, library, {**CONFIG, "eos_token": "<eos>"})


def test_flags_of_tokenizer_json_hold_against_added_tokens_json(tmp_path):
    library = byte_level((), [special(name, lstrip=True) for name in NAMES])
    listed = {name: 256 + i for i, name in enumerate(NAMES)}
    tokenizer = write(tmp_path, library, CONFIG, added_tokens=listed)
    assert tokenizer.encode_rendered("a <|im_end|>")[0] == [*tokenizer.encode("a"), 259]


def test_tokens_that_are_not_special_stay_in_decoded_text(tmp_path):
    """They are protected in text because the template writes them, as `<think>`."""
    added = [*map(special, NAMES), special("<think>", special=False)]
    template = CHATML.replace("assistant\n'", "assistant\n<think>'")
    tokenizer = write(tmp_path, byte_level((), added), {**CONFIG, "chat_template": template})
    ids = tokenizer.encode_rendered("<think>a<|im_end|>")[0]
    assert ids[0] == 260 and tokenizer.decode(ids) == "<think>a"
    assert 260 not in tokenizer.encode("<think>a")


def test_ids_above_a_gap_are_ids(tmp_path):
    """The library counts 260 entries; an answer's last tokens and its EOS lie above."""
    library = byte_level(NAMES)
    content = json.loads(library.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {p: i + 40 * (p in NAMES[2:]) for p, i in vocabulary.items()}
    tokenizer = write(tmp_path, type(library).from_str(json.dumps(content)), CONFIG)
    assert (tokenizer.vocab_size, tokenizer.eos) == (300, 299)
    assert tokenizer.decode([tokenizer.encode("a")[0], 270, 298]) == "a<|im_start|>"


def test_a_template_sees_no_bos_where_the_folder_has_none(tmp_path):
    config = {**CONFIG, "bos_token": None, "chat_template": "{{ bos_token }}" + CHATML}
    library = byte_level((), map(special, ["<s>", *NAMES]))
    tokenizer = write(tmp_path, library, config)
    assert chat.encode_prompt(tokenizer, MESSAGES[:1])[0] == library.token_to_id("<|im_start|>")


def test_templates_of_which_none_is_the_default_are_refused(tmp_path):
    library = byte_level((), map(special, NAMES))
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    with pytest.raises(InputError, match="one that is named default, got tool_use, rag"):
        write(tmp_path, library, {**CONFIG, "chat_template": named})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("x")
    with pytest.raises(InputError, match="one that is named default, got rag"):
        write(tmp_path, library, {**CONFIG, "chat_template": None})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"chat_template\.jinja: cannot be read: 'utf-8' codec"):
        write(tmp_path, library, CONFIG)


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
    assert "add_prefix_space or legacy is false" in caplog.text
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


def test_generation_blocks_inside_a_captured_text():
    """What encloses them may change the text: it is then not marked wrongly, but refused."""
    source = (
        "{% for m in messages %}{% set x %}{% generation %} {{ m.content }} {% endgeneration %}"
        "{% endset %}{{ x | trim }}{% endfor %}"
    )
    template = ChatTemplate(source, ())
    assert template.render(MESSAGES) == "hifox"
    with pytest.raises(InputError, match=r"changes what its \{% generation %\} blocks enclose"):
        template.render_marked(MESSAGES)
