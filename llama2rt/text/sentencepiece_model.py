"""The contents of a SentencePiece model file: its pieces and the settings that change ids.

The library's processor gives neither the settings nor which scores are equal, and its protobuf
module clashes with the copy inside transformers 4 (two different files of one name in one
descriptor pool), so the few fields needed are read and written in the wire format here. Field
numbers: sentencepiece_model.proto of SentencePiece 0.2.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# Fields of the trainer's settings that name a special piece: (number of its id, of its text).
_SPECIAL = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "pad": (43, 48)}


@dataclass(frozen=True)
class Piece:
    """What the vocabulary says of one id."""

    text: str
    score: float
    """for BPE: the higher is merged first"""
    type: int
    """NORMAL to BYTE"""


@dataclass
class Model:
    """Pieces in id order, and settings with SentencePiece's own defaults."""

    pieces: list[Piece] = field(default_factory=list)
    type: str = "unigram"
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    normalization: str = ""
    has_normalization_table: bool = False
    has_denormalization_table: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def of_type(self, kind: int) -> list[int]:
        """Ids of the pieces of one type."""
        return [number for number, piece in enumerate(self.pieces) if piece.type == kind]


def read(definition: bytes) -> Model:
    """The model in a tokenizer.model that SentencePiece itself has accepted."""
    model = Model()
    sections = {2: b"", 3: b"", 5: b""}  # a message written in parts is their concatenation
    for number, value in _fields(definition):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            model.pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
        elif number in sections:
            sections[number] += value
    trainer, normalizer, denormalizer = (dict(_fields(part)) for part in sections.values())
    model.type = MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    model.whitespace_as_suffix = bool(trainer.get(24, 0))
    model.byte_fallback = bool(trainer.get(35, 0))
    model.normalization = normalizer.get(1, b"").decode()
    model.has_normalization_table = bool(normalizer.get(2))
    model.add_dummy_prefix = bool(normalizer.get(3, 1))
    model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    model.escape_whitespaces = bool(normalizer.get(5, 1))
    model.has_denormalization_table = bool(denormalizer.get(2))
    return model


def write(model: Model, special: Mapping[str, int]) -> bytes:
    """A tokenizer.model with these pieces and settings. `special`: ids of "unk", "bos", "eos" and
    "pad", those that there are; the library finds them by their pieces, whose types (one UNKNOWN,
    the others CONTROL) must fit. Normalization tables are not written."""
    kinds = {name: number for number, name in MODEL_TYPES.items()}
    message = b""
    for piece in model.pieces:
        score = _tag(2, 5) + struct.pack("<f", piece.score)
        message += _bytes(1, _bytes(1, piece.text.encode()) + score + _number(3, piece.type))
    trainer = _number(3, kinds[model.type]) + _number(4, len(model.pieces))
    trainer += _number(24, model.whitespace_as_suffix) + _number(35, model.byte_fallback)
    for name, (identifier, text) in _SPECIAL.items():
        trainer += _number(identifier, special.get(name, -1))
        if name in special:
            trainer += _bytes(text, model.pieces[special[name]].text.encode())
    normalizer = _bytes(1, model.normalization.encode()) + _number(3, model.add_dummy_prefix)
    normalizer += _number(4, model.remove_extra_whitespaces) + _number(5, model.escape_whitespaces)
    return message + _bytes(2, trainer) + _bytes(3, normalizer)


def _tag(number: int, kind: int) -> bytes:
    return _as_varint(number << 3 | kind)


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _as_varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, 2) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    value &= 2**64 - 1  # a negative number is its two's complement
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an int for a varint, else its bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
