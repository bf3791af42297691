"""tokenizer.json from SentencePiece models of other settings: equal ids, or a refusal by name."""

import io
import struct

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt.checkpoint.tokenizer_json import write_tokenizer
from llama2rt.errors import InputError
from llama2rt.text import Tokenizer
from llama2rt.text import sentencepiece_model as spm

SENTENCE = "the quick brown fox jumps over lazy dogs and counts sheep from zero to twelve"
WORDS = SENTENCE.split()
LINES = [f"{a} {b} {c}, {a}{c}. 2+2=4; [INST]" for a in WORDS for b in WORDS for c in WORDS[::3]]


def train(**changed) -> Tokenizer:
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    } | changed
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **options
    )
    return Tokenizer(model.getvalue())


def exported(tokenizer: Tokenizer, folder) -> Tokenizer:
    write_tokenizer(tokenizer, folder, 256)
    return Tokenizer.load(folder / "tokenizer.json")


SYMBOLS = ["<|im_start|>", "<|im", "<0x0A>x", "fox", "ju"]
EXPRESSIBLE = {
    "symbols": {"user_defined_symbols": SYMBOLS},
    "symbols, no prefix": {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
    "symbols, spaces": {"user_defined_symbols": SYMBOLS, "remove_extra_whitespaces": True},
    "control symbols": {"control_symbols": ["<c>"]},
    "spaces removed": {"remove_extra_whitespaces": True},
    "no prefix": {"add_dummy_prefix": False},
    "no prefix, spaces removed": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False, "vocab_size": 200},
    "other names": {"unk_piece": "UNK", "bos_piece": "[B]", "eos_piece": "[E]"},
    "across words": {"split_by_whitespace": False},
    "whitespace pieces": {"allow_whitespace_only_pieces": True, "split_digits": True},
}
PARTS = [
    *("<|im_start|>", "<|im", "<0x0A>", "x", "fox", "ju", "mps", "jumps", "the", " ", "  ", "\n"),
    *("<s>", "<c>", "\u2581", "\u00e9", "e\u0301", "\uff12", "zz", "[E]", "UNK", "2+2"),
]


@pytest.fixture(scope="module", params=EXPRESSIBLE)
def both(request, tmp_path_factory):
    tokenizer = train(**EXPRESSIBLE[request.param])
    return tokenizer, exported(tokenizer, tmp_path_factory.mktemp("export"))


@settings(max_examples=100)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=8))
def test_equal_ids_for_each_setting(both, parts):
    tokenizer, other = both
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert other.encode(text) == ids
    assert other.decode(ids).replace("\u2047", "") == tokenizer.decode(ids).replace(" \u2047 ", "")


def test_the_two_agree(both):
    tokenizer, other = both
    assert tokenizer.agrees_with(other) and other.agrees_with(tokenizer)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalization rule 'nmt_nfkc'"),
        ({"normalization_rule_name": "nfkc_cf"}, "the normalization rule 'nfkc_cf'"),
        ({"model_type": "unigram", "vocab_size": 300}, "only SentencePiece BPE .* got unigram"),
        ({"model_type": "char"}, "only SentencePiece BPE .* got char"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is set"),
        ({"user_defined_symbols": ["a b"]}, "the user-defined symbol 'a b' holds a space"),
    ],
)
def test_what_cannot_be_equal_is_refused_before_anything_is_written(tmp_path, changed, reason):
    with pytest.raises(InputError, match=rf"tokenizer\.model: cannot be written as.*{reason}"):
        write_tokenizer(train(**changed), tmp_path, 256)
    assert not list(tmp_path.iterdir())


def test_agreement_sees_settings_that_share_every_piece():
    """The same pieces with and without a space put in front."""
    plain = train()
    # A second normalizer_spec, merged into the first: add_dummy_prefix is false.
    other = Tokenizer(plain._definition + b"\x1a\x02\x18\x00")
    assert other.encode("fox") != plain.encode("fox")
    assert [other.piece(i) for i in range(420)] == [plain.piece(i) for i in range(420)]
    assert not other.agrees_with(plain) and not plain.agrees_with(other)


def with_pieces(tokenizer: Tokenizer, pieces: list[str], score: float = 0.0) -> Tokenizer:
    """The model with pieces of one score appended, as vocabularies are extended."""
    added = b""
    for piece in pieces:
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        added += b"\x0a" + bytes([len(body)]) + body
    return Tokenizer(tokenizer._definition + added)


def test_pieces_of_equal_score_are_refused_where_a_list_cannot_follow(tmp_path):
    """Each of "mf", "fq" and "qm" may overlap the next one: leftmost, whichever comes."""
    cyclic = with_pieces(train(), ["mf", "fq", "qm"], -5000.0)
    assert cyclic.encode("mfqm")[-2:] == [420, 422]  # "mf" and "qm", not "fq"
    assert cyclic.encode("2fqmf")[-2:] == [421, 420]  # "fq" and "mf", not "qm"
    with pytest.raises(InputError, match=r"pieces of equal score, such as '\w\w' and '\w\w'"):
        write_tokenizer(cyclic, tmp_path, 256)
    chained = with_pieces(train(), ["fq", "fqm"], -5000.0)
    with pytest.raises(InputError, match="pieces of equal score, such as 'fq' and 'fqm'"):
        write_tokenizer(chained, tmp_path, 256)


@pytest.fixture(scope="module")
def equal_scores(tmp_path_factory):
    """Overlapping pieces of one score whose order exists, against the order of their ids."""
    tokenizer = with_pieces(train(), ["qmm", "qm", "xq", "pxx", "fx", "zf"], -5000.0)
    with pytest.raises(InputError):  # "qm" is a part of "qmm"
        exported(tokenizer, tmp_path_factory.mktemp("refused"))
    tokenizer = with_pieces(train(), ["qm", "xq", "fx", "zf"], -5000.0)
    return tokenizer, exported(tokenizer, tmp_path_factory.mktemp("equal"))


@settings(max_examples=100)
@given(text=st.text("qmxfz ", max_size=12))
def test_equal_scores_in_an_order_give_equal_ids(equal_scores, text):
    tokenizer, other = equal_scores
    assert other.encode(text) == tokenizer.encode(text)


def test_llamas_fifteen_runs_of_spaces_have_one_score(shared_data):
    model = spm.read(shared_data("llama_tokenizer.model").read_bytes())
    runs = [p for p in model.pieces if p.type == spm.NORMAL and set(p.text) == {"\u2581"}]
    assert sorted(len(p.text) for p in runs) == list(range(1, 17))
    assert len({p.score for p in runs if len(p.text) > 1}) == 1
    tokenizer = Tokenizer.load(shared_data("llama_tokenizer.model"))
    assert Tokenizer(tokenizer.as_json()).agrees_with(tokenizer)  # compares runs of 1 to 69
