"""An answer's text in pieces: the same text as at once, and nothing shown that is taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2rt.generate.text import TextStream


class Bytes:
    """A tokenizer whose ids are bytes, and 256.. words that a space precedes; like SentencePiece's
    it drops the space in front of the whole text. 300 is a special token without text."""

    vocab_size = 301
    words = ("a", "stop", "sto", "now")

    def decode(self, ids):
        parts = [
            b"" if i == 300 else bytes([i]) if i < 256 else b" " + self.words[i % 4].encode()
            for i in ids
        ]
        return b"".join(parts).decode(errors="replace").removeprefix(" ")


IDS = st.lists(
    st.one_of(st.sampled_from(list("é€😀 \nsto".encode())), st.integers(256, 259), st.just(300)),
    max_size=25,
)


def _pieces(stream, tokens, sizes):
    shown, taken, at = [], 0, 0
    while at < len(tokens) and not stream.stopped:
        size = sizes[at % len(sizes)]
        taken += stream.add(tokens[at : at + size])
        at += size
        shown.append(stream.show())
    shown.append(stream.show(final=True))
    return shown, taken


@settings(max_examples=100, deadline=None)
@given(
    prompt=IDS.filter(lambda ids: any(i != 300 for i in ids)),
    tokens=IDS,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    strip=st.booleans(),
)
def test_pieces_make_the_whole_text(prompt, tokens, sizes, strip):
    decode = Bytes().decode
    whole = decode(tokens).strip() if strip else decode(prompt + tokens)[len(decode(prompt)) :]
    if not strip and not decode(prompt + tokens).startswith(decode(prompt)):
        return  # the prompt ends within a character that the answer completes
    shown, taken = _pieces(TextStream(Bytes(), prompt, strip=strip), tokens, sizes)
    assert "".join(shown) == whole
    assert taken == len(tokens)


@settings(max_examples=100, deadline=None)
@given(
    tokens=IDS,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    stop=st.lists(st.text("stop now", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_a_stop_text_ends_it_wherever_tokens_divide_it(tokens, sizes, stop):
    whole = Bytes().decode(tokens).strip()
    raw = Bytes().decode(tokens)
    shown, taken = _pieces(TextStream(Bytes(), [], strip=True, stop=tuple(stop)), tokens, sizes)
    ends = [raw.find(each) for each in stop if each in raw]
    if not ends:
        assert ("".join(shown), taken) == (whole, len(tokens))
        return
    text = "".join(shown)
    # The first stop text to be complete ends it, which need not be the first to begin.
    assert any(text == raw[:end].strip() for end in range(len(raw)) if _stops(raw, end, stop))
    assert not any(each in text for each in stop if each.strip() == each)


def _stops(raw, end, stop):
    return any(raw.startswith(each, end) for each in stop)


def test_held_back_until_sure():
    stream = TextStream(Bytes(), [], strip=True, stop=("stop now",))
    shown = []
    for token in (256, ord("é".encode()[:1]), "é".encode()[1], 257, ord(" "), ord("x"), 257, 259):
        stream.add([token])
        shown.append(stream.show())
    shown.append(stream.show(final=True))
    assert shown == ["a", "", "é", "", "", " stop x", "", "", ""]
    assert stream.stopped


@pytest.mark.parametrize("strip", [True, False])
def test_incomplete_bytes_are_shown_at_the_end(strip):
    stream = TextStream(Bytes(), [256], strip=strip)
    stream.add([256, "é".encode()[0]])
    assert stream.show() == ""
    assert stream.show(final=True) == ("a" if strip else " a") + "\N{REPLACEMENT CHARACTER}"
