"""Whether two tokenizers give the same ids, tried on texts that show differences.

Nobody can compare all texts. These are made of what tokenizers are known to treat differently
(spaces in front, behind and in runs, characters that normalization maps, combining marks, text that
looks like special tokens) and of the tokenizer's own pieces, alone and joined at random.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

AWKWARD = (
    "",
    " ",
    "   ",
    "hello world",
    " hi",
    "  two ",
    "x  y   z    w",
    "a b\n",
    "\n\nx\r\n\ty",
    "</s> ok <s> <unk> <pad>",
    "<0x0A>",
    "a<0x0A>",
    "\uff12 \u2026 \ufb01",
    "\u00e9\u4e2d\U0001f600e\u0301\u00a0\u3000\ufeff",
    "\u3300\u0327\u00a0\u0323",
    "a\u2581b\u2581",
    "\u2581\u2581x",
    "12345 3.14 1e9",
    "[INST] <<SYS>>\na\n<</SYS>>\n\nb [/INST] c ",
    "a\x00b",
)


class Encoder(Protocol):
    """What is compared."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def piece(self, identifier: int) -> str: ...


def probes(encoder: Encoder, joined: int, every_piece: bool = False) -> Iterator[str]:
    """AWKWARD, runs of spaces, `joined` texts of one to six pieces each; where `every_piece` is
    asked for, also each piece alone and runs of each character of which a run is a piece."""
    yield from AWKWARD
    yield from (f"{before}{' ' * n}x" for n in range(1, 70) for before in ("", "a"))
    pieces = [encoder.piece(i).replace("\u2581", " ") for i in range(encoder.vocab_size)]
    if every_piece:
        yield from pieces
        repeated = {piece[0] for piece in pieces if len(piece) > 1 and len(set(piece)) == 1}
        yield from (character * n for character in sorted(repeated) for n in range(2, 70))
    generator = random.Random(0)
    for _ in range(joined):
        yield "".join(generator.choices(pieces, k=generator.randint(1, 6)))


def difference(one: Encoder, other: Encoder, texts: Iterable[str]) -> str | None:
    """The first text of which the two make other ids, None where there is none among `texts`."""
    texts = list(texts)
    for text, ours, theirs in zip(
        texts, one.encode_batch(texts), other.encode_batch(texts), strict=True
    ):
        if ours != theirs:
            return text
    return None


def same_pieces(one: Encoder, other: Encoder) -> bool:
    """Whether each id of `other` is the same piece in `one`."""
    if other.vocab_size > one.vocab_size:
        return False
    return all(one.piece(i) == other.piece(i) for i in range(other.vocab_size))
