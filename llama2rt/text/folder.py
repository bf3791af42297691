"""The files that define a folder's tokenizer, and their precedence when they differ.

`tokenizer.model` is the original of LLaMA's models; transformers reads `tokenizer.json`. Whoever
adds tokens to a model, or gives it another EOS, changes the JSON files and leaves tokenizer.model
as it was. So where they contradict each other the JSON files are used, as in transformers, and a
warning says so. Where they agree, ids come from tokenizer.model.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2rt.errors import InputError, naming
from llama2rt.text import added, agreement, backends, sentencepiece_model
from llama2rt.text.added import ADDED, CONFIG, SPECIAL_MAP

logger = logging.getLogger("llama2rt.text.folder")

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
_SPACES = ("\u2581", "\u0120")  # as SentencePiece and byte-level vocabularies write one
FURTHER_TEMPLATES = "additional_chat_templates"  # named ones, for tools and documents


def read(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """(defining file, other files by name) of a tokenizer in a folder, or in one file with what
    lies beside it. InputError names the file that cannot be read, or that contradicts itself."""
    if path.is_dir():
        folder = path
        found = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
        model, fast = (file if file.is_file() else None for file in found)
        if model is None and fast is None:
            raise InputError(f"{path}: no tokenizer.model and no tokenizer.json in this folder")
    elif path.is_file():
        folder = path.parent
        is_json = path.read_bytes().lstrip()[:1] == b"{"
        model, fast = (None, path) if is_json else (path, None)
    else:
        raise InputError(f"{path}: no such tokenizer file")
    companions = _companions(folder)
    parsed = parse(companions, folder)
    names, unclear = added.special_names(parsed)
    for message in unclear:
        logger.warning("%s: %s", folder, message)
    with _naming(folder):
        listed = added.listed(parsed)
        extra = added.extra(parsed, names)
        _tokenizer_class(parsed)
    if fast is not None:
        with _naming(fast):
            definition = added.complete(
                fast.read_bytes(),
                listed,
                extra,
                replace="added_tokens_decoder" in parsed.get(CONFIG, {}),
            )
            definition = _without_prefix(fast, definition, parsed)
        if model is None:
            return definition, companions
        with _naming(model):
            original = model.read_bytes()
            reasons = _contradictions(
                backends.of(original, {}), backends.JsonBackend(definition, names)
            )
        if not reasons:
            return original, {"tokenizer.json": definition, **companions}
        logger.warning(
            "%s: tokenizer.json contradicts tokenizer.model (%s); tokenizer.json holds",
            folder,
            "; ".join(reasons),
        )
        return definition, companions
    assert model is not None
    with _naming(model):
        return _extended(model, companions, parsed, names)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors inside name the file, those of the libraries below too."""
    with naming(f"{path}"):
        try:
            yield
        except InputError:
            raise
        except (ValueError, OSError) as error:
            raise InputError(f"cannot be read as a tokenizer ({error})") from None


def _companions(folder: Path) -> dict[str, bytes]:
    names = [CONFIG, SPECIAL_MAP, ADDED, TEMPLATE, GENERATION]
    further = folder / FURTHER_TEMPLATES
    if further.is_dir():
        names += sorted(f"{FURTHER_TEMPLATES}/{path.name}" for path in further.glob("*.jinja"))
    companions = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    generation = _generation(folder, companions)
    if generation is not None:
        companions[GENERATION] = generation
    return companions


def _generation(folder: Path, companions: Mapping[str, bytes]) -> bytes | None:
    """generation_config.json with the EOS ids that only the model's config.json names, or None
    where it has nothing to add."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = _json(path.read_bytes(), path)
    if config.get("model_type") != "llama":
        return None
    named = eos_ids(config, path)
    own = _json(companions.get(GENERATION, b"{}"), folder / GENERATION)
    known = eos_ids(own, folder / GENERATION)
    both = [*known, *(identifier for identifier in named if identifier not in known)]
    if both == known:
        return None
    eos = both if len(both) > 1 else both[0]
    return (json.dumps({**own, "eos_token_id": eos}, indent=2) + "\n").encode()


def eos_ids(config: Mapping[str, Any], where: object) -> list[int]:
    """The ids under `eos_token_id`: one, a list or none; InputError for anything else."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for identifier in ids:
        if not isinstance(identifier, int) or isinstance(identifier, bool) or identifier < 0:
            raise InputError(
                f"{where}: eos_token_id: expected an id or a list of ids, got {value!r}"
            )
    return list(dict.fromkeys(ids))


def parse(companions: Mapping[str, bytes], folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The JSON objects among the companions by name; InputError naming file and line."""
    where = folder or Path()
    return {
        name: _json(content, where / name)
        for name, content in companions.items()
        if name in (CONFIG, SPECIAL_MAP, ADDED, GENERATION)
    }


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _contradictions(original: backends.Backend, fast: backends.Backend) -> list[str]:
    """The differences of a tokenizer.json from the tokenizer.model beside it."""
    reasons = []
    if fast.vocab_size != original.vocab_size:
        reasons.append(f"{fast.vocab_size} pieces instead of {original.vocab_size}")
    for name in ("bos", "eos"):
        ours, theirs = getattr(original, name), getattr(fast, name)
        if ours != theirs:
            reasons.append(f"{name.upper()} {theirs} instead of {ours}")
    if reasons:
        return reasons
    if not agreement.same_pieces(fast, original):
        return ["other pieces"]
    text = agreement.difference(fast, original, agreement.probes(original, joined=300))
    return [] if text is None else [f"other ids for {text!r}"]


def _tokenizer_class(parsed: Mapping[str, dict[str, Any]]) -> str | None:
    """The name in tokenizer_config.json, where null counts as absent; InputError if no text."""
    name = parsed.get(CONFIG, {}).get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{CONFIG}: tokenizer_class: expected text, got {name!r}")
    return name


def _without_prefix(fast: Path, definition: bytes, parsed: Mapping[str, dict[str, Any]]) -> bytes:
    """A tokenizer.json without the space before text, where its folder asks for that and names
    LLaMA's class, the only one for which transformers 5 does it."""
    config = parsed.get(CONFIG, {})
    if config.get("add_prefix_space") is not False or "Llama" not in (
        _tokenizer_class(parsed) or ""
    ):
        return definition
    definition = backends.with_spaces(definition, backends.Spaces(first=False))
    tokens = backends.parse_json(definition).encode("a", add_special_tokens=False).tokens
    if tokens and tokens[0][:1] in _SPACES:
        logger.warning(
            "%s: puts a space before text in a way that add_prefix_space false in %s cannot turn "
            "off here; the space stays",
            fast,
            CONFIG,
        )
    return definition


def _spaces_off(backend: backends.Backend, config: Mapping[str, Any]) -> list[str]:
    """The settings that remove spaces which the tokenizer.model puts before text."""
    if not isinstance(backend, backends.SentencePieceBackend):
        return []
    if not sentencepiece_model.read(backend.definition).add_dummy_prefix:
        return []
    return [key for key in ("add_prefix_space", "legacy") if config.get(key) is False]


def _convertible(model: Path, backend: backends.Backend, wishes: list[str]) -> bytes | None:
    """A tokenizer.json to which the settings of the files beside it can be applied. None, with a
    warning, where the model has none: the pieces can be read without it."""
    try:
        return backend.as_json()
    except InputError as error:
        logger.warning(
            "%s: not applied: %s in the files beside it (%s); its own spaces and pieces hold",
            model,
            " and ".join(wishes),
            error,
        )
        return None


def _extended(
    model: Path,
    companions: dict[str, bytes],
    parsed: Mapping[str, dict[str, Any]],
    names: Mapping[str, str],
) -> tuple[bytes, dict[str, bytes]]:
    """A tokenizer.model without a tokenizer.json: itself, or the tokenizer.json made of it and of
    what the files beside it change: added tokens, another BOS or EOS, other spaces before text."""
    definition = model.read_bytes()
    backend = backends.of(definition, {})
    own = {backend.piece(backend.unk) if backend.unk >= 0 else "", *backend.added}
    listed = {
        number: entry
        for number, entry in added.listed(parsed).items()
        if entry["content"] not in own or backend.piece(number) != entry["content"]
    }
    extra = {text: entry for text, entry in added.extra(parsed, names).items() if text not in own}
    if all(entry[added.ROLE] == "other" for entry in extra.values()):
        extra = {}  # a pad token that no model knows
    changed = [
        f"{key} {names[key]!r} instead of {backend.piece(identifier)!r}"
        for key, identifier in (("bos_token", backend.bos), ("eos_token", backend.eos))
        if names.get(key) and names[key] != backend.piece(identifier)
    ]
    config = parsed.get(CONFIG, {})
    off = _spaces_off(backend, config)
    converted = None
    if (off or extra) and not (listed or changed):
        wishes = [f"{key} false" for key in off] + [f"the special token {text!r}" for text in extra]
        converted = _convertible(model, backend, wishes)
        if converted is None:
            return definition, companions
    if listed or extra:
        texts = sorted({*extra, *(entry["content"] for entry in listed.values())})
        changed.append(f"{len(texts)} added tokens, such as {texts[0]!r}")
    if off:
        changed.append(f"{' and '.join(off)} false")
    if not changed:
        return definition, companions
    logger.warning(
        "%s: the files beside it say otherwise (%s); they hold", model, "; ".join(changed)
    )
    # transformers would build a LLaMA tokenizer of its own from the pieces, with its own spaces.
    # Which pads on the left, unlike the class that takes any file.
    name = _tokenizer_class(parsed)
    side = {"padding_side": "left"} if name is None or "Llama" in name else {}
    config = {**side, **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    spaces = backends.Spaces(first="add_prefix_space" not in off, every="legacy" not in off)
    converted = backend.as_json() if converted is None else converted
    extended = added.complete(backends.with_spaces(converted, spaces), listed, extra)
    return extended, {**companions, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
