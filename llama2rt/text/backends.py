"""The libraries under `Tokenizer`, behind the same few methods: SentencePiece, and `tokenizers` for
tokenizer.json and tiktoken's ranks. Nothing here reads a folder."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2rt.errors import InputError

# Names under which tokenizer.json files keep the two tokens when tokenizer_config.json is missing.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")

_RANKS_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")


def of(definition: bytes, names: Mapping[str, str]) -> "Backend":
    """The backend of a tokenizer.json, of tiktoken's ranks or of a SentencePiece model. `names`:
    the texts of bos_token and eos_token, where the folder gives them."""
    if definition.lstrip()[:1] == b"{":
        return JsonBackend(definition, names)
    if _RANKS_LINE.match(definition):
        return TiktokenBackend(definition, names)
    return SentencePieceBackend(definition)


class SentencePieceBackend:
    file_name = "tokenizer.model"

    def __init__(self, definition: bytes) -> None:
        import sentencepiece

        self.definition = definition
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
        return self.processor.encode(require_unicode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode([require_unicode(text) for text in texts])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.processor.encode(require_unicode(text), return_type="offset_mapping")
        return encoding["ids"], [begin for begin, _ in encoding["offsets"]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def piece(self, identifier: int) -> str:
        return self.processor.id_to_piece(identifier)

    @property
    def unk_in_text(self) -> bool:
        """Whether a text can hold characters that become the unknown piece."""
        return not any(self.processor.is_byte(i) for i in range(self.vocab_size))

    @functools.cached_property
    def added(self) -> dict[str, int]:
        """Pieces that are one id wherever they are parsed: control and user-defined ones."""
        from llama2rt.text import sentencepiece_model as spm

        model = spm.read(self.definition)
        ids = model.of_type(spm.CONTROL) + model.of_type(spm.USER_DEFINED)
        return {model.pieces[i].text: i for i in ids}

    @functools.cached_property
    def special(self) -> set[int]:
        return {i for i in self.added.values() if self.processor.is_control(i)}

    def as_json(self) -> bytes:
        """A tokenizer.json of equal ids, compared on many texts; InputError where there is none."""
        from llama2rt.text import agreement
        from llama2rt.text.sentencepiece_json import from_sentencepiece

        converted = from_sentencepiece(self.definition, self.bos, self.eos, self.unk)
        definition = converted.to_str(pretty=True).encode()
        names = {"bos_token": self.piece(self.bos), "eos_token": self.piece(self.eos)}
        texts = list(agreement.probes(self, joined=2000, every_piece=True))
        text = agreement.difference(self, JsonBackend(definition, names), texts)
        if text is not None:
            raise InputError(
                "tokenizer.model: cannot be written as a tokenizer.json of equal ids: the two "
                f"differ on {text!r}"
            )
        return definition


class JsonBackend:
    file_name = "tokenizer.json"

    def __init__(self, definition: bytes, names: Mapping[str, str]) -> None:
        self._take(parse_json(definition), names)

    def _take(self, tokenizer: Any, names: Mapping[str, str]) -> None:
        # Text that spells a special token must stay text: otherwise a document could hold an EOS.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        # The library's own count is smaller where the numbering has gaps.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos = self._special(names, "bos_token", _BOS_NAMES)
        self.eos = self._special(names, "eos_token", _EOS_NAMES)
        name = getattr(tokenizer.model, "unk_token", None)
        unk = None if name is None else tokenizer.token_to_id(name)
        self.unk = -1 if unk is None else unk
        decoder = tokenizer.get_added_tokens_decoder()
        self.added = {token.content: number for number, token in decoder.items()}
        self.special = {number for number, token in decoder.items() if token.special}

    def _special(self, names: Mapping[str, str], key: str, usual: tuple[str, ...]) -> int:
        named = names.get(key)
        for name in [named] if named else usual:
            identifier = self.tokenizer.token_to_id(name)
            if identifier is not None:
                return identifier
        if named:
            raise InputError(
                f"{key}: {named!r} is named in the files beside it, but is neither a piece nor an "
                "added token of this vocabulary"
            )
        raise InputError(
            f"no {key}: name it in a tokenizer_config.json beside tokenizer.json"
            f" (looked for {', '.join(usual)})"
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(require_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [require_unicode(text) for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self.tokenizer.encode(require_unicode(text), add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        # Those that the folder calls special, not those protected here: "<think>" is text.
        shown = [identifier for identifier in ids if identifier not in self.special]
        return self.tokenizer.decode(shown, skip_special_tokens=False)

    def piece(self, identifier: int) -> str:
        # An id that the file leaves out (a gap in its numbering) has no text of its own.
        return self.tokenizer.id_to_token(identifier) or f"<{identifier}>"

    @property
    def unk_in_text(self) -> bool:
        return not getattr(self.tokenizer.model, "byte_fallback", False)

    def as_json(self) -> bytes:
        return self.tokenizer.to_str(pretty=True).encode()

    def protect(self, tokens: Sequence[str]) -> None:
        """Make added tokens special, so that text which spells them stays text."""
        kept = [t for t in self.tokenizer.get_added_tokens_decoder().values() if not t.special]
        for token in kept:
            if token.content in tokens:
                token.special = True
                self.tokenizer.add_special_tokens([token])

    def parsing(self) -> Any:
        """A copy of the library's tokenizer in which special tokens in the text count."""
        import tokenizers

        parsing = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        parsing.encode_special_tokens = False
        return parsing


class TiktokenBackend(JsonBackend):
    """Llama 3's tokenizer.model as Meta distributes it: lines of a base64 token and its rank."""

    file_name = "tokenizer.model"

    def __init__(self, definition: bytes, names: Mapping[str, str]) -> None:
        from llama2rt.text import tiktoken_ranks

        self._take(tiktoken_ranks.to_tokenizers(tiktoken_ranks.read(definition)), names)


Backend = SentencePieceBackend | JsonBackend


def parse_json(definition: bytes) -> Any:
    """The library's tokenizer of a tokenizer.json; InputError where it is none."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(definition)
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise InputError(f"not a tokenizer.json ({error})") from None


def with_added_tokens(definition: bytes, added: Mapping[int, Mapping[str, Any]]) -> bytes:
    """A tokenizer.json with these added tokens (id -> its entry in `added_tokens`, without id),
    which replace those of the same id; InputError where one would leave a gap."""
    known = parse_json(definition)
    size = known.get_vocab_size(with_added_tokens=True)
    content = json.loads(definition)
    entries = {entry["id"]: entry for entry in content.get("added_tokens") or []}
    for number in sorted(added):
        text = added[number]["content"]
        if known.id_to_token(number) != text:
            if number != size:
                raise InputError(
                    f"added token {text!r}: expected id {size}, the first that is free, got "
                    f"{number}"
                )
            size += 1
        entries[number] = {"id": number, **added[number]}
    content["added_tokens"] = [entries[number] for number in sorted(entries)]
    return json.dumps(content, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Spaces:
    """Where a space is put before text."""

    first: bool = True
    """at its beginning"""
    every: bool = True
    """after each special token in it too, as SentencePiece does with the parts between them"""


def with_spaces(definition: bytes, spaces: Spaces) -> bytes:
    """A tokenizer.json made of a SentencePiece model, with spaces where `spaces` says, as in
    transformers (`legacy`, `add_prefix_space`): text that begins with a space gets no other.
    Unchanged where its normalizer puts none."""
    content = json.loads(definition)
    before = (content.get("normalizer") or {}).get("normalizers") or []
    steps = [step for step in before if step["type"] != "Prepend"]
    if spaces == Spaces() or steps == before:
        return definition
    content["normalizer"]["normalizers"] = steps
    if not spaces.first:
        decoder = content.get("decoder") or {}
        if decoders := decoder.get("decoders"):
            decoder["decoders"] = [step for step in decoders if step.get("start") != 1]
    else:
        first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
        steps = [{**first, "split": False}]
        if own := content.get("pre_tokenizer"):
            steps += own["pretokenizers"]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return json.dumps(content, ensure_ascii=False).encode()


def require_unicode(text: str) -> str:
    """The text; InputError where it holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text is not valid Unicode: lone surrogate at character {error.start}"
        ) from None
    return text
