"""A model's tokenizer: SentencePiece BPE, trained or loaded, or a tokenizer.json or tiktoken ranks.

One class over two libraries, so that the rest of the package sees text, ids and offsets only. Text
never gives special tokens: a document that contains the characters `</s>` gets ordinary pieces with
either library, and BOS and EOS are added by arguments. The folder's other settings (chat template,
EOS ids, generation defaults) are kept unchanged. There is no padding and no truncation here;
dialogue formats are in `text.chat`.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2rt import atomic
from llama2rt.errors import InputError, naming
from llama2rt.text import added, agreement, backends, folder, templated
from llama2rt.text.template import LLAMA3_TEMPLATE, ChatTemplate

SPECIAL_AND_BYTE_PIECES = 3 + 256  # unk, bos, eos, then one piece per byte: ids 0-2 and 3-258
MOST_PIECES = 2**31 - 1  # ids are 32-bit integers
MAX_SENTENCE_BYTES = 4192  # SentencePiece's own limit: it skips longer sentences in silence


class Tokenizer:
    """Text to ids and back. Make one with `load` or `train`; instances can be pickled.

    Attributes: `bos`, `eos`, `unk` (ids; `unk` is -1 where the vocabulary has none),
    `vocab_size` (number of ids), `digest` (sha256 of the defining file, so that token files
    and manifests can say which tokenizer made them), `config` and `generation` (contents of
    the folder's tokenizer_config.json and generation_config.json, empty where it has none),
    `template` (its chat template, or None) and `special_names` (`{"bos_token": text, ...}`).
    """

    bos: int
    eos: int
    unk: int
    vocab_size: int
    file_name: str

    def __init__(
        self,
        definition: bytes,
        config: dict[str, Any] | None = None,
        companions: Mapping[str, bytes] | None = None,
    ) -> None:
        """`definition` is the content of a tokenizer.model (SentencePiece's or tiktoken's) or,
        when it is JSON, a tokenizer.json; `companions` are the other files of its folder by
        name, of which `config` is one, tokenizer_config.json, already parsed."""
        self._definition = definition
        self._companions = dict(companions or {})
        if config is not None:
            self._companions[folder.CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        parsed = folder.parse(self._companions)
        self.config = parsed.get(folder.CONFIG, {})
        self.generation = parsed.get(folder.GENERATION, {})
        names, _ = added.special_names(parsed)
        self._backend = backends.of(definition, names)
        self.bos, self.eos, self.unk = self._backend.bos, self._backend.eos, self._backend.unk
        self.special_names = names | {
            "bos_token": self._backend.piece(self.bos),
            "eos_token": self._backend.piece(self.eos),
        }
        self.template = self._own_template()
        if self.template is not None and isinstance(self._backend, backends.JsonBackend):
            source = self.template.source
            self._backend.protect([t for t in self._backend.added if t in source and t.strip()])
        self.vocab_size = self._backend.vocab_size
        self.file_name = self._backend.file_name
        self.digest = hashlib.sha256(definition).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._definition, None, self._companions)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer from a folder, or from its `tokenizer.model` or `tokenizer.json`.

        A folder may hold both, and further files that add to them; where tokenizer.model and the
        JSON files contradict each other the JSON files are used, and a warning says so. InputError
        when there is no tokenizer or a file is not what its name says."""
        path = Path(path)
        definition, companions = folder.read(path)
        with naming(f"{path}"):
            return cls(definition, companions=companions)

    @classmethod
    def train(
        cls, texts: Iterable[str] | Iterable[Path], vocab_size: int, path: str | Path
    ) -> "Tokenizer":
        """Train SentencePiece BPE in LLaMA's settings and write it to `path` (a file, or a folder
        that receives tokenizer.model).

        `texts` yields documents (`str`) or UTF-8 text files (`Path`). `vocab_size` counts
        everything: 3 specials, 256 bytes, the characters that cover 99.995 % of the text, and the
        merges; from about 350 for ASCII text up to 32000. Training is deterministic. InputError
        when the text has too many different characters for `vocab_size`, or too few different
        words to fill it. Settings: the trainer spec inside LLaMA's published tokenizer.model.
        """
        import sentencepiece

        if vocab_size <= SPECIAL_AND_BYTE_PIECES:
            raise InputError(
                f"vocab_size {vocab_size} is too small: specials and bytes alone take "
                f"{SPECIAL_AND_BYTE_PIECES}; 512 is a sensible least"
            )
        if vocab_size > MOST_PIECES:
            raise InputError(f"vocab_size: expected at most {MOST_PIECES}, got {vocab_size}")
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
        """Ids of `text`. encode(a + b) is not encode(a) + encode(b): SentencePiece puts a space
        before the text, and merges reach across the boundary."""
        ids = self._backend.encode(text)
        return [self.bos] * bos + ids + [self.eos] * eos

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and, for each, the index of the first character of `text` that it covers. The bytes
        of one character all begin at that character."""
        return self._backend.encode_with_offsets(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on as many threads as the process may use."""
        return self._backend.encode_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens and without the space SentencePiece put in front.
        Bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {i}")
        return self._backend.decode(ids)

    def piece(self, identifier: int) -> str:
        """The text that the vocabulary itself gives an id, as in tokenizer.json's `vocab`."""
        return self._backend.piece(identifier)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence: EOS, those that generation_config.json or config.json name, and
        the special token with which the folder's chat template ends an answer."""
        ids = [self.eos, *folder.eos_ids(self.generation, folder.GENERATION)]
        ending = templated.answer_end(self)
        return tuple(dict.fromkeys(ids if ending is None else [*ids, ending]))

    @functools.cached_property
    def hidden_ids(self) -> frozenset[int]:
        """BOS, EOS and the folder's special tokens: ids that decoded text does not show."""
        return frozenset({self.bos, self.eos, *self._backend.special})

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Texts, with their ids, of the special tokens: those that the folder calls special, and
        those that begin a text or end one. No message may hold them. Empty without a template."""
        control = self.hidden_ids.union(self.stop_ids)
        return {text: i for text, i in self.template_tokens.items() if i in control}

    @functools.cached_property
    def template_tokens(self) -> dict[str, int]:
        """Texts, with their ids, that are parsed in a chat template's output: special tokens, and
        other added ones that the template writes. An answer may hold some of the latter, such as
        `</think>`; a user's message may not. Empty without a template."""
        if self.template is None:
            return {}
        source, special = self.template.source, self._backend.special
        return {
            text: identifier
            for text, identifier in self._backend.added.items()
            if identifier in special or (text in source and text.strip())
        }

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a chat template's output, special tokens in it included, and for each the
        characters (begin, end) that it covers. InputError where the text is no Unicode, or where
        a SentencePiece model has no tokenizer.json of equal ids, which alone can parse it."""
        backends.require_unicode(text)
        encoding = self._parsing.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode_rendered(self, ids: Sequence[int]) -> str:
        """Text of ids with the special tokens written out."""
        return self._parsing.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def _parsing(self) -> Any:
        """The `tokenizers` library's object for text in which special tokens count."""
        if isinstance(self._backend, backends.JsonBackend):
            return self._backend.parsing()
        return backends.JsonBackend(self.as_json(), self.special_names).parsing()

    def as_json(self) -> bytes:
        """This tokenizer as a tokenizer.json: the folder's own, or one of equal ids. InputError
        naming the setting of a SentencePiece model that allows none."""
        if isinstance(self._backend, backends.JsonBackend) and self.file_name == "tokenizer.json":
            return self._definition
        own = self._companions.get("tokenizer.json")
        return self._backend.as_json() if own is None else own

    def pad_candidate(self) -> int:
        """An id to pad with that is never a text's last token. In this order: the folder's own pad
        token unless it also ends sequences, the unknown piece where unknown characters become
        bytes, a special token with "pad" or "reserved" in its name, BOS."""
        backend = self._backend
        named = backend.added.get(self.special_names.get("pad_token", ""))
        if named is not None and named not in self.stop_ids:
            return named
        if self.unk >= 0 and not backend.unk_in_text and self.unk not in self.stop_ids:
            return self.unk
        used = {self.bos, *self.stop_ids}
        written = "" if self.template is None else self.template.source
        for word in ("pad", "reserved"):
            for text, identifier in backend.added.items():
                free = identifier not in used and text not in written
                if free and identifier in backend.special and word in text.lower():
                    return identifier
        return self.bos

    def agrees_with(self, other: "Tokenizer") -> bool:
        """Whether the other's ids mean the same to a model that was trained with this one.

        True for the same file, and for two files of one vocabulary (a tokenizer.model and the
        tokenizer.json made from it): BOS and EOS must be equal, every id of the other must be the
        same piece here, and both must give the same ids to many texts that tell tokenizers apart
        (`agreement`). This one may have further ids, such as a pad token.
        """
        if (self.bos, self.eos) != (other.bos, other.eos):
            return False
        if self.digest == other.digest:
            return True
        if not agreement.same_pieces(self, other):
            return False
        return agreement.difference(self, other, agreement.probes(other, joined=300)) is None

    def with_generation_of(self, other: "Tokenizer") -> "Tokenizer":
        """This tokenizer with the other's generation_config.json where it has none itself."""
        if folder.GENERATION in self._companions or folder.GENERATION not in other._companions:
            return self
        content = other._companions[folder.GENERATION]
        companions = {**self._companions, folder.GENERATION: content}
        return Tokenizer(self._definition, companions=companions)

    def save(self, directory: str | Path) -> Path:
        """Write the defining file and the other files that it came with, byte for byte, so that
        `digest` stays the same; returns the defining file's path."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._companions.items():
            (directory / name).parent.mkdir(exist_ok=True)
            atomic.write(directory / name, content)
        path = directory / self.file_name
        atomic.write(path, self._definition)
        return path

    def _own_template(self) -> ChatTemplate | None:
        source: Any = self.config.get("chat_template")
        names = [Path(n).stem for n in self._companions if n.startswith(folder.FURTHER_TEMPLATES)]
        if isinstance(source, list):  # named ones, as transformers 4 writes them
            if not all(isinstance(named, dict) for named in source):
                raise InputError("chat_template: expected text, or a list of objects")
            names += [str(named.get("name")) for named in source]
            source = next((t.get("template") for t in source if t.get("name") == "default"), None)
        if folder.TEMPLATE in self._companions:
            try:
                source = self._companions[folder.TEMPLATE].decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{folder.TEMPLATE}: cannot be read: {error}") from None
        elif source is None and names:
            # Pretraining and conversion need none; the message comes where one is rendered.
            return ChatTemplate(
                "",
                (),
                f"chat_template: expected one that is named default, got {', '.join(names)}",
            )
        elif source is None and isinstance(self._backend, backends.TiktokenBackend):
            source = LLAMA3_TEMPLATE
        if source is None:
            return None
        if not isinstance(source, str):
            raise InputError(f"chat_template: expected text, got {type(source).__name__}")
        absent = {key for key, value in self.config.items() if value is None}  # "bos_token": null
        tokens = {k: text for k, text in self.special_names.items() if k not in absent}
        return ChatTemplate(source, tuple(sorted(tokens.items())))


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
