"""The several files in which a folder says what its tokenizer is, and what holds when they differ.

``tokenizer.model`` is the original of LLaMA's models, ``tokenizer.json`` what transformers reads.
Whoever adds tokens to a model, or gives it another EOS, changes the JSON files and leaves
tokenizer.model as it was; so where they contradict each other the JSON files hold, as they do for
transformers, and a warning says so. Where they agree, tokenizer.model is what ids come from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2rt.errors import InputError
from llama2rt.text import agreement, backends

logger = logging.getLogger("llama2rt.text.folder")

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
FURTHER_TEMPLATES = "additional_chat_templates"  # named ones, for tools and documents

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


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
    names, unclear = special_names(parsed)
    for message in unclear:
        logger.warning("%s: %s", folder, message)
    with _naming(folder):
        added = added_tokens(parsed)
    if fast is not None:
        with _naming(fast):
            definition = _with_missing(fast.read_bytes(), added)
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
    """Errors inside name the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a tokenizer ({error})") from None


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
    """The ids under ``eos_token_id``: one, a list or none; InputError for anything else."""
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


def special_names(parsed: Mapping[str, dict[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """({"bos_token": its text, ...}, contradictions in words).

    tokenizer_config.json holds where it lists added_tokens_decoder, special_tokens_map.json where
    it does not, as in transformers.
    """
    config = _token_names(parsed.get(CONFIG, {}))
    mapped = _token_names(parsed.get(SPECIAL_MAP, {}))
    first = "added_tokens_decoder" in parsed.get(CONFIG, {})
    unclear = [
        f"{key} is {config[key]!r} in {CONFIG} and {mapped[key]!r} in {SPECIAL_MAP}; "
        f"{CONFIG if first else SPECIAL_MAP} holds"
        for key in config.keys() & mapped.keys()
        if config[key] != mapped[key]
    ]
    return ({**mapped, **config} if first else {**config, **mapped}), unclear


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            names[key] = value
    return names


def added_tokens(parsed: Mapping[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Added tokens as the companions list them: id -> an entry as tokenizer.json has it."""
    config = parsed.get(CONFIG, {})
    listed = {}
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise InputError(f"{CONFIG}: added_tokens_decoder: expected an object, got {entries!r}")
    for number, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InputError(
                f"{CONFIG}: added_tokens_decoder: {number}: expected an object with content, got "
                f"{entry!r}"
            )
        listed[_identifier(CONFIG, number)] = {"content": entry["content"]} | {
            flag: bool(entry.get(flag, flag == "normalized")) for flag in _FLAGS
        }
    if "added_tokens_decoder" in config:
        return listed
    names, _ = special_names(parsed)
    special = set(names.values())
    for source in (config, parsed.get(SPECIAL_MAP, {})):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key) or []
            if isinstance(value, list):
                texts = (t.get("content") if isinstance(t, dict) else t for t in value)
                special |= {text for text in texts if isinstance(text, str)}
    for text, number in parsed.get(ADDED, {}).items():
        flags = dict.fromkeys(_FLAGS, False)
        flags |= {"normalized": text not in special, "special": text in special}
        listed[_identifier(ADDED, number)] = {"content": text, **flags}
    return listed


def _identifier(where: str, value: Any) -> int:
    """An id, which JSON objects have as a key and so as text."""
    if isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", str(value)):
        raise InputError(f"{where}: expected the id of an added token, got {value!r}")
    return int(value)


def _with_missing(definition: bytes, added: Mapping[int, dict[str, Any]]) -> bytes:
    """A tokenizer.json with the added tokens that only the files beside it list."""
    known = backends.parse_json(definition)
    missing = {}
    for identifier, entry in added.items():
        found = known.token_to_id(entry["content"])
        if found is None:
            missing[identifier] = entry
        elif found != identifier:
            raise InputError(
                f"{entry['content']!r} has id {found} here and {identifier} in the files beside it"
            )
    return backends.with_added_tokens(definition, missing) if missing else definition


def _contradictions(original: backends.Backend, fast: backends.Backend) -> list[str]:
    """In what a tokenizer.json differs from the tokenizer.model beside it."""
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


def _extended(
    model: Path,
    companions: dict[str, bytes],
    parsed: Mapping[str, dict[str, Any]],
    names: Mapping[str, str],
) -> tuple[bytes, dict[str, bytes]]:
    """A tokenizer.model alone: itself, or the tokenizer.json of itself and the added tokens or the
    other BOS or EOS that the files beside it name."""
    definition = model.read_bytes()
    backend = backends.of(definition, {})
    size = backend.vocab_size
    added = {
        identifier: entry
        for identifier, entry in added_tokens(parsed).items()
        if identifier >= size or backend.piece(identifier) != entry["content"]
    }
    texts = {entry["content"] for entry in added.values()}
    changed = [
        f"{key} {names[key]!r} instead of {backend.piece(own)!r}"
        for key, own in (("bos_token", backend.bos), ("eos_token", backend.eos))
        if key in names and names[key] != backend.piece(own)
    ]
    if not added and not changed:
        return definition, companions
    if added:
        changed.append(f"{len(added)} added tokens, such as {sorted(texts)[0]!r}")
    logger.warning(
        "%s: the files beside it say otherwise (%s); they hold", model, "; ".join(changed)
    )
    # transformers would build a LLaMA tokenizer of its own from the pieces, with its own spaces.
    config = {**parsed.get(CONFIG, {}), "tokenizer_class": "PreTrainedTokenizerFast"}
    extended = backends.with_added_tokens(backend.as_json(), added)
    return extended, {**companions, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
