"""The tokenizer in a GGUF file's metadata: SentencePiece's pieces and scores, or byte-level BPE.

A GGUF file has no tokenizer.model and no tokenizer.json, but the lists that llama.cpp needs of
them. What else decides the ids is in llama.cpp's code, hence here: identity normalization and a
space before text for SentencePiece; for byte-level BPE how text is cut into words before merging,
of which the file has only a name. Source: docs/gguf.md of ggml, src/llama-vocab.cpp and
convert_hf_to_gguf.py of llama.cpp. Left out are vocabularies that LLaMA's models do not have
(unigram, WordPiece).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from llama2rt.errors import InputError, naming
from llama2rt.text import backends, folder
from llama2rt.text import sentencepiece_model as spm
from llama2rt.text.sentencepiece_json import SPACE
from llama2rt.text.tiktoken_ranks import LLAMA3_PATTERN
from llama2rt.text.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"

_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}
_ENDINGS = ("eos_token_id", "eot_token_id", "eom_token_id")
# What llama.cpp takes for SentencePiece where the file is silent: LLaMA's own.
_DEFAULT_IDS = {"bos": 1, "eos": 2}
# `tokenizer.ggml.pre` -> how text is cut: as Llama 3, as GPT-2, as GPT-2 with each digit alone.
_LLAMA3, _GPT2, _DIGITS = "llama-bpe", "gpt-2", "smollm"
_CUTS = {
    _LLAMA3: _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    _GPT2: _GPT2,
    _DIGITS: _DIGITS,
}


def of_metadata(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that a file's metadata describe, with its special tokens and chat templates;
    None where they describe none. InputError naming the key that is missing, damaged or of a kind
    that is not read here."""
    kind = metadata.get(f"{PREFIX}model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("llama", "gpt2"):
        raise InputError(
            f"{PREFIX}model: expected 'llama' (SentencePiece) or 'gpt2' (byte-level BPE), got "
            f"{kind!r}"
        )
    pieces = _pieces(metadata, scored=kind == "llama")
    special = _special(metadata, pieces, _DEFAULT_IDS if kind == "llama" else {})
    if kind == "llama":
        definition = _sentencepiece(metadata, pieces, special)
    else:
        definition = _byte_level(metadata, pieces, special)
    companions = _companions(metadata, pieces, special)
    with naming(f"{PREFIX}tokens"):
        return Tokenizer(definition, companions=companions)


# --- what the file lists ----------------------------------------------------------------------


def _pieces(metadata: Mapping[str, Any], scored: bool) -> list[spm.Piece]:
    """The vocabulary, without the pieces at its end that only pad it to the embedding's size."""
    tokens = _list(metadata, "tokens", str)
    scores = _list(metadata, "scores", float, len(tokens)) if scored else [0.0] * len(tokens)
    types = [spm.NORMAL] * len(tokens)
    if f"{PREFIX}token_type" in metadata:
        types = list(_list(metadata, "token_type", int, len(tokens)))
    while types and types[-1] == spm.UNUSED:
        types.pop()
    first: dict[str, int] = {}
    for identifier, (text, kind) in enumerate(zip(tokens, types, strict=False)):
        if not spm.NORMAL <= kind <= spm.BYTE:
            raise InputError(f"{PREFIX}token_type: {identifier}: expected 1 to 6, got {kind}")
        if not text:
            raise InputError(f"{PREFIX}tokens: {identifier}: empty")
        if first.setdefault(text, identifier) != identifier:
            raise InputError(f"{PREFIX}tokens: {first[text]} and {identifier} are both {text!r}")
    return [spm.Piece(*piece) for piece in zip(tokens, scores, types, strict=False)]


def _list(metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list:
    values = metadata.get(PREFIX + key)
    if not isinstance(values, list) or not values:
        raise InputError(f"{PREFIX}{key}: missing, empty or no list")
    if not all(type(value) is kind for value in values):
        raise InputError(f"{PREFIX}{key}: expected a list of {kind.__name__}")
    if length is not None and len(values) != length:
        raise InputError(f"{PREFIX}{key}: expected {length}, one a token, got {len(values)}")
    return values


def _special(
    metadata: Mapping[str, Any], pieces: Sequence[spm.Piece], default: Mapping[str, int]
) -> dict[str, int]:
    """Ids of BOS, EOS, the unknown piece and padding, of those that there are."""
    special = {}
    for role, key in _ROLES.items():
        identifier = _identifier(metadata, key, pieces, default.get(role))
        if identifier is not None:
            special[role] = identifier
        elif role in ("bos", "eos"):
            raise InputError(f"{PREFIX}{key}: missing")
    return special


def _identifier(
    metadata: Mapping[str, Any], key: str, pieces: Sequence[spm.Piece], default: int | None = None
) -> int | None:
    identifier = metadata.get(PREFIX + key, default)
    if identifier is None:
        return None
    if type(identifier) is not int or not 0 <= identifier < len(pieces):
        raise InputError(f"{PREFIX}{key}: expected 0 to {len(pieces) - 1}, got {identifier!r}")
    return identifier


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, bool):
        raise InputError(f"{PREFIX}{key}: expected true or false, got {value!r}")
    return value


# --- tokenizer.model --------------------------------------------------------------------------


def _sentencepiece(
    metadata: Mapping[str, Any], pieces: Sequence[spm.Piece], special: dict[str, int]
) -> bytes:
    """The tokenizer.model of these pieces; `special` gets the unknown piece's id."""
    normal = [piece.score for piece in pieces if piece.type == spm.NORMAL]
    if len(normal) > 1 and len(set(normal)) == 1:
        raise InputError(
            f"{PREFIX}scores: all are {normal[0]:g}, so that the order of merges is lost (as "
            "llama.cpp converts a folder with tokenizer.json and without tokenizer.model): read "
            "that folder instead"
        )
    unknown = [i for i, piece in enumerate(pieces) if piece.type == spm.UNKNOWN]
    if len(unknown) > 1:
        raise InputError(f"{PREFIX}token_type: expected one unknown piece, got {len(unknown)}")
    special["unk"] = unknown[0] if unknown else special.get("unk", 0)
    kinds = dict.fromkeys((special["bos"], special["eos"]), spm.CONTROL)
    kinds[special["unk"]] = spm.UNKNOWN
    model = spm.Model(
        pieces=[
            spm.Piece(_spelling(piece), piece.score, kinds.get(identifier, piece.type))
            for identifier, piece in enumerate(pieces)
        ],
        type="bpe",
        byte_fallback=any(piece.type == spm.BYTE for piece in pieces),
        normalization="identity",
        add_dummy_prefix=_flag(metadata, "add_space_prefix", True),
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", False),
    )
    return spm.write(model, {role: special[role] for role in ("unk", "bos", "eos")})


def _spelling(piece: spm.Piece) -> str:
    """A piece as SentencePiece has it: llama.cpp's converter writes the spaces of user-defined
    symbols as they are in text, so that a symbol of spaces alone would never be met."""
    if piece.type == spm.USER_DEFINED and not piece.text.strip(" "):
        return SPACE * len(piece.text)
    return piece.text


# --- tokenizer.json ---------------------------------------------------------------------------


def _byte_level(
    metadata: Mapping[str, Any], pieces: Sequence[spm.Piece], special: Mapping[str, int]
) -> bytes:
    """The tokenizer.json of these pieces and the file's merges."""
    name = metadata.get(f"{PREFIX}pre")
    cut = _CUTS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise InputError(
            f"{PREFIX}pre: expected one of {', '.join(_CUTS)}, got {name!r}: the file does not say "
            "how that cuts text into words"
        )
    merges = []
    for number, merge in enumerate(_list(metadata, "merges", str)):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise InputError(f"{PREFIX}merges: {number}: expected two pieces, got {merge!r}")
        merges.append((left, right))
    # Tokens after the last ordinary piece were added to the vocabulary; those before it are in it.
    size = max((i + 1 for i, p in enumerate(pieces) if p.type == spm.NORMAL), default=0)
    vocabulary = {piece.text: identifier for identifier, piece in enumerate(pieces[:size])}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=cut == _LLAMA3)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{PREFIX}merges: {error}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    if _flag(metadata, "add_bos_token", cut == _LLAMA3):
        bos = pieces[special["bos"]].text
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, special["bos"])],
        )
    ends = (special["bos"], special["eos"])
    added = {
        identifier: {
            "content": piece.text,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": identifier in ends or piece.type != spm.USER_DEFINED,
        }
        for identifier, piece in enumerate(pieces)
        if identifier in ends or piece.type != spm.NORMAL
    }
    with naming(f"{PREFIX}tokens"):
        return backends.with_added_tokens(tokenizer.to_str().encode(), added)


def _pre_tokenizer(cut: str) -> pre_tokenizers.PreTokenizer:
    if cut == _LLAMA3:
        first = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([first, bytes_])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut == _GPT2:
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


# --- the files beside it ----------------------------------------------------------------------


def _companions(
    metadata: Mapping[str, Any], pieces: Sequence[spm.Piece], special: Mapping[str, int]
) -> dict[str, bytes]:
    """The files that a Hugging Face folder would have beside the tokenizer."""
    config: dict[str, Any] = {f"{role}_token": pieces[i].text for role, i in special.items()}
    for key in ("add_bos_token", "add_eos_token"):
        if PREFIX + key in metadata:
            config[key] = _flag(metadata, key, False)
    companions = {}
    for key, source in metadata.items():
        if key != TEMPLATE and not key.startswith(f"{TEMPLATE}."):
            continue
        if not isinstance(source, str):
            raise InputError(f"{key}: expected text, got {type(source).__name__}")
        name = key.removeprefix(TEMPLATE).removeprefix(".")
        if not name:
            config["chat_template"] = source
        elif re.fullmatch(r"[A-Za-z0-9_-]+", name):
            companions[f"{folder.FURTHER_TEMPLATES}/{name}.jinja"] = source.encode()
        else:
            raise InputError(f"{key}: expected letters, digits, - and _ in a template's name")
    companions[folder.CONFIG] = _json(config)
    found = (_identifier(metadata, key, pieces) for key in _ENDINGS)
    ends = [special["eos"], *(identifier for identifier in found if identifier is not None)]
    if len(set(ends)) > 1:
        ids = {"bos_token_id": special["bos"], "eos_token_id": list(dict.fromkeys(ends))}
        companions[folder.GENERATION] = _json(ids)
    return companions


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
