"""The tokenizer: LLaMA's settings, parity with SentencePiece and transformers, errors."""

import json
import pickle
import random

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from llama2rt.errors import InputError
from llama2rt.text.agreement import AWKWARD
from llama2rt.text.tokenizer import Tokenizer

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def llama(shared_data):
    return Tokenizer.load(shared_data("llama_tokenizer.model"))


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """A folder with LLaMA's tokenizer as the Hugging Face export writes it."""
    from llama2rt.checkpoint.tokenizer_json import write_tokenizer

    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(llama, folder, 4096)
    return folder


def shakespeare_pieces(path, count):
    whole, generator = path.read_text(), random.Random(0)
    starts = [generator.randrange(len(whole)) for _ in range(count)]
    return [whole[start : start + generator.randrange(200)] for start in starts]


def test_llama_ids_are_those_of_the_published_model(llama):
    assert (llama.unk, llama.bos, llama.eos, llama.vocab_size) == (0, 1, 2, 32000)
    # From the docstring of transformers' LlamaTokenizer.
    assert llama.encode("Hello this is a test", bos=True) == [1, 15043, 445, 338, 263, 1243]
    assert llama.encode("\n") == [29871, 13]  # dummy prefix, then the newline's byte piece
    assert llama.encode("10") == [29871, 29896, 29900]  # one piece a digit


def test_tokenizer_json_is_identical_to_the_model(llama, exported, shared_data):
    other = Tokenizer.load(exported / "tokenizer.json")
    assert (other.bos, other.eos, other.unk) == (llama.bos, llama.eos, llama.unk)
    assert other.vocab_size == llama.vocab_size
    generator = random.Random(0)
    alphabet = "ab  \n1[]é中▁😀<>/s"
    mixed = ["".join(generator.choices(alphabet, k=generator.randrange(14))) for _ in range(3000)]
    pieces = shakespeare_pieces(shared_data("tinyshakespeare.txt"), 300)
    for example in [*AWKWARD, *mixed, *pieces]:
        assert other.encode_with_offsets(example) == llama.encode_with_offsets(example), example
        ids = llama.encode(example)
        assert other.decode(ids) == llama.decode(ids), example


def test_agreement_is_about_what_ids_mean(llama, exported, small_tokenizer, tmp_path):
    as_json = Tokenizer.load(exported / "tokenizer.json")
    assert as_json.digest != llama.digest
    assert as_json.agrees_with(llama) and llama.agrees_with(as_json)
    # As many pieces, of another text.
    other = Tokenizer.train(
        ["sphinx of black quartz judge my vow " * 9] * 9 + ["0123456789"], 310, tmp_path
    )
    same_size = Tokenizer.train(
        ["pack my box with five dozen liquor jugs " * 9] * 9 + ["0123456789"], 310, tmp_path
    )
    assert not other.agrees_with(same_size)
    assert not small_tokenizer.agrees_with(llama)


def test_transformers_tokenises_the_export_identically(llama, exported, shared_data):
    transformers = pytest.importorskip("transformers")
    (exported / "config.json").write_text('{"model_type": "llama"}')  # as in a model folder
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for example in [*AWKWARD, *shakespeare_pieces(shared_data("tinyshakespeare.txt"), 200)]:
        assert theirs.encode(example, split_special_tokens=True) == llama.encode(example, bos=True)
        assert theirs.decode(llama.encode(example)) == llama.decode(llama.encode(example))


def test_parity_with_transformers_own_llama_tokenizer(llama, shared_data, tmp_path):
    """On text without runs of spaces, where transformers 5 departs from SentencePiece and Meta."""
    transformers = pytest.importorskip("transformers")
    llama.save(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for example in shakespeare_pieces(shared_data("tinyshakespeare.txt"), 300):
        single_spaced = " ".join(example.split())
        ours = llama.encode(single_spaced)
        assert theirs.encode(single_spaced, add_special_tokens=False) == ours


@pytest.mark.parametrize("kind", ["model", "json"])
def test_special_tokens_never_come_out_of_text(llama, exported, kind):
    tokenizer = llama if kind == "model" else Tokenizer.load(exported / "tokenizer.json")
    ids = tokenizer.encode("<s> a </s> <unk></s>")
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.unk} & set(ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == "<s> a </s> <unk></s>"


def test_encode_of_a_sum_is_not_the_sum(llama):
    assert llama.encode("ab") != llama.encode("a") + llama.encode("b")


@given(text)
def test_any_text_survives(small_tokenizer, example):
    ids, begins = small_tokenizer.encode_with_offsets(example)
    assert ids == small_tokenizer.encode(example)
    assert small_tokenizer.decode(ids) == example.replace("\u2581", " ")  # its sign for a space
    assert begins == sorted(begins)
    assert all(0 <= begin <= len(example) for begin in begins)
    assert small_tokenizer.unk not in ids


@given(st.lists(text, max_size=5))
def test_batches_equal_single_texts(small_tokenizer, texts):
    assert small_tokenizer.encode_batch(texts) == [small_tokenizer.encode(t) for t in texts]


def test_bytes_begin_at_their_character(small_tokenizer):
    ids, begins = small_tokenizer.encode_with_offsets("a😀b")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=small_tokenizer._definition)
    assert [pieces.id_to_piece(i) for i in ids[-5:]] == [
        *("<0xF0>", "<0x9F>", "<0x98>", "<0x80>"),
        "b",
    ]
    assert begins[-5:] == [1, 1, 1, 1, 2]


def test_training_settings_are_llamas(small_tokenizer):
    tokenizer = small_tokenizer
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.vocab_size == 400
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._definition)
    assert [pieces.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert pieces.pad_id() == -1
    ordinary = [pieces.id_to_piece(i) for i in range(259, 400)]
    assert not any(len(p) > 1 and any(c.isdigit() for c in p) for p in ordinary)  # split_digits
    assert pieces.id_to_piece(tokenizer.encode("the")[0]).startswith("\u2581")  # dummy prefix
    assert not any("\u2581" in p.lstrip("\u2581") for p in ordinary)  # pieces end with their word
    assert len(tokenizer.encode("  x")) > len(tokenizer.encode("x"))  # extra whitespace is kept


def test_training_is_deterministic_and_reads_files(tmp_path):
    lines = [f"number {i} is {i * i} and {i % 7} remains" for i in range(500)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    first = Tokenizer.train(lines, 310, tmp_path / "a")
    second = Tokenizer.train([tmp_path / "corpus.txt"], 310, tmp_path / "b.model")
    assert first.digest == second.digest
    assert Tokenizer.load(tmp_path / "a").digest == first.digest
    assert Tokenizer.load(tmp_path / "b.model").digest == first.digest


def test_training_sees_text_beyond_sentencepieces_line_limit(tmp_path):
    """SentencePiece silently skips lines of more than 4192 bytes."""
    tokenizer = Tokenizer.train(["short line", "zanzibar " * 5000], 285, tmp_path)
    assert len(tokenizer.encode("zanzibar")) == 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["some text"], 259, "vocab_size 259 is too small: specials and bytes alone take 259"),
        (["some text"], 3_000_000_000, "vocab_size: expected at most 2147483647, got 3000000000"),
        (
            ["".join(map(chr, range(0x4E00, 0x4F00)))],
            300,
            r"too small for this text.*at least 5\d\d",
        ),
        (["a b c d"], 512, r"vocab_size 512 is too large for this text: .*at most \d+ pieces"),
        ([], 300, "no text"),
        (["", " \n "], 300, "no text"),
    ],
)
def test_training_errors_say_what_to_do(tmp_path, texts, vocab_size, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.train(texts, vocab_size, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_least_vocabulary_that_the_message_names_works(tmp_path):
    with pytest.raises(InputError) as error:
        Tokenizer.train(["hello world"], 261, tmp_path)
    least = int(str(error.value).split()[-1])
    assert Tokenizer.train(["hello world"], least, tmp_path).vocab_size == least


def test_training_on_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"x\.txt: cannot be read as UTF-8"):
        Tokenizer.train([tmp_path / "x.txt"], 300, tmp_path)


def test_save_keeps_the_bytes_and_pickle_the_tokenizer(small_tokenizer, tmp_path):
    path = small_tokenizer.save(tmp_path / "folder")
    assert path.name == "tokenizer.model"
    assert Tokenizer.load(tmp_path / "folder").digest == small_tokenizer.digest
    again = pickle.loads(pickle.dumps(small_tokenizer))
    assert again.encode("the fox", bos=True, eos=True) == small_tokenizer.encode(
        "the fox", bos=True, eos=True
    )


def test_tokenizer_json_keeps_its_special_names(exported, tmp_path):
    """The names of BOS and EOS come from tokenizer_config.json, and survive saving and pickling."""
    definition = json.loads((exported / "tokenizer.json").read_text())
    definition["added_tokens"].append(
        {
            **definition["added_tokens"][-1],
            "id": 32000,
            "content": "<|eot_id|>",
        }
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|eot_id|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 32000, 32001)
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos == 32000
    assert pickle.loads(pickle.dumps(tokenizer)).eos == 32000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"not a model", "not a SentencePiece model"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b'{"truncated', "not a tokenizer.json"),
        ("other.txt", b"", "no tokenizer.model and no tokenizer.json"),
    ],
)
def test_loading_what_is_no_tokenizer(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path)


def test_loading_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"absent\.model: no such tokenizer file"):
        Tokenizer.load(tmp_path / "absent.model")


def test_truncated_model_is_refused(small_tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer._definition[:-100])
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_bad_arguments(small_tokenizer):
    with pytest.raises(ValueError, match="ids: expected 0 to 399, got 400"):
        small_tokenizer.decode([5, 400])
    with pytest.raises(ValueError, match="got -1"):
        small_tokenizer.decode([-1])
    with pytest.raises(InputError, match="lone surrogate at character 1"):
        small_tokenizer.encode("a\ud800")
