"""LLaMA's tokenizer: SentencePiece BPE, trained or loaded; tokenizer.json where a checkpoint has
only that.

One small class over two libraries, so that the rest of the house sees text, ids and offsets only.
Special tokens never come out of text: a document that contains the characters ``</s>`` gets
ordinary pieces, whichever library is underneath; BOS and EOS enter through arguments. There is no
pad id, no truncation and no chat template here (``text.chat`` owns the format).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2rt import atomic
from llama2rt.errors import InputError

SPECIAL_AND_BYTE_PIECES = 3 + 256  # unk, bos, eos, then one piece per byte: ids 0-2 and 3-258
MAX_SENTENCE_BYTES = 4192  # SentencePiece's own limit; longer sentences would be skipped silently

# Names under which tokenizer.json files keep the two tokens when tokenizer_config.json is missing.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Tokenizer:
    """Text to ids and back. Make one with ``load`` or ``train``; instances can be pickled.

    Attributes: ``bos``, ``eos``, ``unk`` (ids; ``unk`` is -1 where the vocabulary has none),
    ``vocab_size`` (number of ids) and ``digest`` (sha256 of the defining file, so that token files
    and manifests can say which tokenizer made them).
    """

    bos: int
    eos: int
    unk: int
    vocab_size: int
    file_name: str

    def __init__(self, definition: bytes, config: dict[str, Any] | None = None) -> None:
        """``definition`` is the content of a tokenizer.model or, when it is JSON, a tokenizer.json;
        ``config`` is the content of the tokenizer_config.json beside the latter."""
        self._definition = definition
        self._config = config
        self._backend = (
            _JsonBackend(definition, config or {})
            if definition.lstrip()[:1] == b"{"
            else _SentencePieceBackend(definition)
        )
        self.bos, self.eos, self.unk = self._backend.bos, self._backend.eos, self._backend.unk
        self.vocab_size = self._backend.vocab_size
        self.file_name = self._backend.file_name
        self.digest = hashlib.sha256(definition).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._definition, self._config)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.model`` (SentencePiece) or ``tokenizer.json``; a folder may hold either,
        and tokenizer.model is preferred because it is the original. InputError when there is none
        or it is not what its name says."""
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.model", "tokenizer.json")]
            present = [candidate for candidate in found if candidate.is_file()]
            if not present:
                raise InputError(f"{path}: no tokenizer.model and no tokenizer.json in this folder")
            path = present[0]
        elif not path.is_file():
            raise InputError(f"{path}: no such tokenizer file")
        config_path = path.with_name("tokenizer_config.json")
        try:
            config = json.loads(config_path.read_bytes()) if config_path.is_file() else None
            return cls(path.read_bytes(), config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: cannot be read as a tokenizer ({error})") from None

    @classmethod
    def train(
        cls, texts: Iterable[str] | Iterable[Path], vocab_size: int, path: str | Path
    ) -> Tokenizer:
        """Train SentencePiece BPE in LLaMA's settings and write it to ``path`` (a file, or a folder
        that receives tokenizer.model).

        ``texts`` yields documents (``str``) or UTF-8 text files (``Path``). ``vocab_size`` counts
        everything: 3 specials, 256 bytes, the characters that cover 99.995 % of the text, and the
        merges; from about 350 for ASCII text up to 32000. Training is deterministic. InputError
        when the text has too many different characters for ``vocab_size``, or too few different
        words to fill it. Settings: the trainer spec inside LLaMA's published tokenizer.model.
        """
        import sentencepiece

        if vocab_size <= SPECIAL_AND_BYTE_PIECES:
            raise InputError(
                f"vocab_size {vocab_size} is too small: specials and bytes alone take "
                f"{SPECIAL_AND_BYTE_PIECES}; 512 is a sensible least"
            )
        sentences = _sentences(texts)
        first = next(sentences, None)
        if first is None:
            raise InputError("no text to train a tokenizer on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=chain([first], sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=0.99995,
                normalization_rule_name="identity",
                add_dummy_prefix=True,
                remove_extra_whitespaces=False,
                split_digits=True,
                byte_fallback=True,
                allow_whitespace_only_pieces=True,
                max_sentencepiece_length=16,
                max_sentence_length=MAX_SENTENCE_BYTES,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(_training_error(str(error), vocab_size)) from None
        tokenizer = cls(model.getvalue())
        path = Path(path)
        if path.suffix == ".model":
            atomic.write(path, model.getvalue())
        else:
            tokenizer.save(path)
        return tokenizer

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``. Note that encode(a + b) is not encode(a) + encode(b): SentencePiece puts
        a space before the text, and merges reach across the seam."""
        ids = self._backend.encode(text)
        return [self.bos] * bos + ids + [self.eos] * eos

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and, for each, the index of the first character of ``text`` that it covers. The bytes
        of one character all begin at that character."""
        return self._backend.encode_with_offsets(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, on as many threads as the process may use."""
        return self._backend.encode_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` without special tokens and without the space SentencePiece put in front.
        Bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {i}")
        return self._backend.decode(ids)

    def agrees_with(self, other: Tokenizer) -> bool:
        """Whether a model that knows the one reads the other's ids as they were meant.

        True for the same file, and for two files of one vocabulary (a tokenizer.model and the
        tokenizer.json made from it): BOS and EOS must be equal, and the text of nearly every id
        that both have. Not of all: the libraries decode the unknown piece and a lone space apart.
        """
        if self.digest == other.digest:
            return True
        if (self.bos, self.eos) != (other.bos, other.eos):
            return False
        shared = range(min(self.vocab_size, other.vocab_size))
        same = sum(self.decode([i]) == other.decode([i]) for i in shared)
        return same >= 0.99 * len(shared)

    def save(self, folder: str | Path) -> Path:
        """Write the defining file (and its tokenizer_config.json, if it came with one) byte for
        byte, so that ``digest`` stays the same; returns the file's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._config is not None:
            config = json.dumps(self._config, indent=2) + "\n"
            atomic.write(folder / "tokenizer_config.json", config)
        path = folder / self.file_name
        atomic.write(path, self._definition)
        return path


class _SentencePieceBackend:
    file_name = "tokenizer.model"

    def __init__(self, definition: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.load_from_serialized_proto(definition)
        except (RuntimeError, OSError):
            raise InputError("not a SentencePiece model") from None
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self.unk, self.vocab_size = self.processor.unk_id(), self.processor.vocab_size()
        if self.bos < 0 or self.eos < 0:
            raise InputError("the SentencePiece model has no BOS or no EOS piece")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(_utf8(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode([_utf8(text) for text in texts])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.processor.encode(_utf8(text), return_type="offset_mapping")
        return encoding["ids"], [begin for begin, _ in encoding["offsets"]]

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class _JsonBackend:
    file_name = "tokenizer.json"

    def __init__(self, definition: bytes, config: dict[str, Any]) -> None:
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise InputError(f"not a tokenizer.json ({error})") from None
        # Text that spells a special token must stay text: otherwise a document could end itself.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos = self._special(config, "bos_token", _BOS_NAMES)
        self.eos = self._special(config, "eos_token", _EOS_NAMES)
        name = getattr(self.tokenizer.model, "unk_token", None)
        unk = None if name is None else self.tokenizer.token_to_id(name)
        self.unk = -1 if unk is None else unk

    def _special(self, config: dict[str, Any], key: str, usual: tuple[str, ...]) -> int:
        named = config.get(key)
        if isinstance(named, dict):
            named = named.get("content")
        for name in [named] if named else usual:
            identifier = self.tokenizer.token_to_id(name)
            if identifier is not None:
                return identifier
        raise InputError(
            f"no {key}: name it in a tokenizer_config.json beside tokenizer.json"
            f" (looked for {', '.join([named] if named else usual)})"
        )

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        _utf8(text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text is not valid Unicode: lone surrogate at character {error.start}"
        ) from None
    return text


def _sentences(texts: Iterable[str] | Iterable[Path]) -> Iterator[str]:
    """Lines, cut at spaces where they are longer than the trainer accepts."""
    for text in texts:
        if isinstance(text, Path):
            try:
                text = text.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{text}: cannot be read as UTF-8 text ({error})") from None
        for line in text.replace("\0", "").split("\n"):
            while len(line.encode()) > MAX_SENTENCE_BYTES:
                # At most 4 bytes a character, so this many characters always fit.
                most = MAX_SENTENCE_BYTES // 4
                cut = line.rfind(" ", 1, most)
                cut = most if cut < 0 else cut
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def _training_error(message: str, vocab_size: int) -> str:
    small = re.search(r"smaller than required_chars\.?\s*(\d+) vs (\d+)", message)
    if small:
        return (
            f"vocab_size {vocab_size} is too small for this text: specials, bytes and the "
            f"characters it uses need at least {small.group(2)}"
        )
    large = re.search(r"value <= (\d+)", message)
    if large:
        return (
            f"vocab_size {vocab_size} is too large for this text: it yields at most "
            f"{large.group(1)} pieces; take a smaller vocabulary or more text"
        )
    return f"tokenizer training failed: {message}"
