"""What the files beside a tokenizer say of it: special tokens, flags and templates."""

import json

import pytest

from llama2rt.checkpoint.tokenizer_json import write_tokenizer
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
    with pytest.raises(InputError, match=r"eos_token: '<eos>' is named in .* neither a piece nor"):
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


def refuses_dialogues(tokenizer, reason):
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"  # what needs no template works
    for encode, arguments in (
        (chat.encode_prompt, [MESSAGES[:1]]),
        (chat.encode_dialogue, [MESSAGES]),
        (chat.encode_response, [MESSAGES[:1], "fox"]),
    ):
        with pytest.raises(InputError, match=reason):
            encode(tokenizer, *arguments)


def test_templates_of_which_none_is_the_default_are_refused(tmp_path):
    library = byte_level((), map(special, NAMES))
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    tokenizer = write(tmp_path, library, {**CONFIG, "chat_template": named})
    refuses_dialogues(tokenizer, "one that is named default, got tool_use, rag")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_tokenizer(tokenizer, tmp_path / "out", 64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == files[name]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("x")
    unnamed = {key: value for key, value in CONFIG.items() if key != "chat_template"}
    for config in (unnamed, {**CONFIG, "chat_template": None}):
        tokenizer = write(tmp_path, library, config)
        refuses_dialogues(tokenizer, "one that is named default, got rag")
    write_tokenizer(write(tmp_path, library, unnamed), tmp_path / "two", 64)
    assert "chat_template" not in json.loads((tmp_path / "two/tokenizer_config.json").read_text())
    assert (tmp_path / "two/additional_chat_templates/rag.jinja").read_text() == "x"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"chat_template\.jinja: cannot be read: 'utf-8' codec"):
        write(tmp_path, library, CONFIG)


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


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("additional_special_tokens", 5, "expected a list of tokens, got 5"),
        ("additional_special_tokens", True, "expected a list of tokens, got True"),
        ("additional_special_tokens", "<x>", "expected a list of tokens, got '<x>'"),
        ("additional_special_tokens", {"a": "<x>"}, "expected a list of tokens, got {"),
        ("additional_special_tokens", ["<x>", 5], "expected text, or objects with content, got 5"),
        ("extra_special_tokens", "<x>", "expected a list or an object of tokens, got '<x>'"),
        ("extra_special_tokens", [{"a": 1}], "expected text, or objects with content, got {"),
    ],
)
def test_special_tokens_that_are_no_list_are_named(tmp_path, name, key, value, reason):
    library = byte_level((), map(special, NAMES))
    files = {name: {**CONFIG, key: value}} if name == "special_tokens_map" else {}
    config = {**CONFIG, key: value} if not files else CONFIG
    with pytest.raises(InputError, match=f"{name}.json: {key}: {reason}"):
        write(tmp_path, library, config, **files)


def test_special_tokens_by_name_or_none_at_all(tmp_path):
    library = byte_level((), map(special, NAMES))
    config = {**CONFIG, "additional_special_tokens": None, "extra_special_tokens": {"x": "<x>"}}
    tokenizer = write(tmp_path, library, config)
    assert tokenizer.control_tokens["<x>"] == 260 == tokenizer.vocab_size - 1


THINKING = "a<think>b</think> fox"


def thinking_folder(folder, template):
    """<think> and </think> are added, not special, and the template writes them."""
    thoughts = [special(text, special=False) for text in ("<think>", "</think>")]
    return write(folder, byte_level((), [*map(special, NAMES), *thoughts]),
                 {**CONFIG, "chat_template": template})  # fmt: skip


@pytest.mark.parametrize("opened", [False, True])
def test_answers_may_hold_tokens_that_the_template_writes(tmp_path, opened):
    transformers = pytest.importorskip("transformers")
    template = CHATML + "{# <think></think> #}"
    if opened:  # the template itself opens each answer's thoughts
        template = (
            CHATML.replace(
                "'<|im_start|>' + m.role + '\n'",
                "'<|im_start|>' + m.role + '\n' + ('<think>' if m.role == 'assistant' else '')",
            )
            .replace("assistant\n'", "assistant\n<think>'")
            .replace("{% endfor", "{# </think> #}{% endfor")
        )
    ours = thinking_folder(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    content = "b</think> fox" if opened else THINKING
    messages = [MESSAGES[0], {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    tokens, learned = chat.encode_dialogue(ours, messages)
    assert tokens == expected[: len(tokens)] and tokens[-1] == ours.eos
    assert learned[tokens.index(261)] and learned[-1]
    prompt = chat.encode_prompt(ours, messages[:1])
    response, _ = chat.encode_response(ours, messages[:1], content)
    assert response == tokens and response[: len(prompt)] == prompt
    assert ours.decode(response[len(prompt) :]) == content
    longer = [*messages, MESSAGES[0]]
    assert chat.encode_prompt(ours, longer) == theirs.apply_chat_template(
        longer, add_generation_prompt=True, return_dict=False
    )


def test_only_answers_may_hold_them(tmp_path):
    ours = thinking_folder(tmp_path, CHATML + "{# <think></think> #}")
    assert set(ours.control_tokens) == set(NAMES)
    assert set(ours.template_tokens) == {*NAMES, "<think>", "</think>"}
    asked = [{"role": "user", "content": THINKING}]
    with pytest.raises(InputError, match="message 1: user content holds the control token <"):
        chat.encode_prompt(ours, asked)
    answered = [MESSAGES[0], {"role": "assistant", "content": "<think>a</think><|im_start|>"}]
    with pytest.raises(InputError, match=r"assistant content holds the control token <\|im_start"):
        chat.encode_dialogue(ours, answered)
