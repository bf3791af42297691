"""Tokens that a folder adds to its vocabulary, and the roles of some (BOS, EOS, padding).

Four files list them: tokenizer.json (`added_tokens`), tokenizer_config.json
(`added_tokens_decoder`, `eos_token` and the like), special_tokens_map.json and added_tokens.json.
Their precedence is that of transformers (5.24, `TokenizersBackend.__init__`).
"""

import re
from collections.abc import Mapping
from typing import Any

from llama2rt.errors import InputError
from llama2rt.text import backends

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ROLE = "role"  # beside the keys of an entry in tokenizer.json
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def special_names(parsed: Mapping[str, dict[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """({"bos_token": its text, ...}, contradictions in words).

    As in transformers, tokenizer_config.json takes precedence where it lists added_tokens_decoder,
    and special_tokens_map.json where it does not.
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


def listed(parsed: Mapping[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Added tokens that the files beside tokenizer.json list: id -> an entry as it has them."""
    config = parsed.get(CONFIG, {})
    found = {}
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise InputError(f"{CONFIG}: added_tokens_decoder: expected an object, got {entries!r}")
    for number, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InputError(
                f"{CONFIG}: added_tokens_decoder: {number}: expected an object with content, got "
                f"{entry!r}"
            )
        found[_identifier(CONFIG, number)] = _entry(entry, bool(entry.get("special", False)))
    if "added_tokens_decoder" in config:
        return found
    names, _ = special_names(parsed)
    special = {*names.values(), *_extra_special(parsed)}
    for text, number in parsed.get(ADDED, {}).items():
        found[_identifier(ADDED, number)] = _entry(text, text in special)
    return found


def extra(
    parsed: Mapping[str, dict[str, Any]], names: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Entries, by text, of tokens that are special by name only: BOS and EOS (their ROLE is
    "end"), the pad token and its like ("other"), additional special tokens (None).

    A pad token that is an ordinary piece ("!" in some folders) stays one, unlike in transformers,
    where every "!" in a prompt is then a control token.
    """
    further = _extra_special(parsed)
    entries = {}
    for key in sorted(names, key=lambda key: _order(key.removesuffix("_token"))):
        value = parsed.get(CONFIG, {}).get(key)
        flags = value if isinstance(value, dict) else parsed.get(SPECIAL_MAP, {}).get(key)
        entry = _entry(flags if isinstance(flags, dict) else names[key], True)
        ends = key in ("bos_token", "eos_token")
        entries[names[key]] = {**entry, "content": names[key], ROLE: "end" if ends else "other"}
    for text, value in further.items():
        entries[text] = {**_entry(value, True), ROLE: None}
    return {text: entry for text, entry in entries.items() if text}


def complete(
    definition: bytes,
    listed: Mapping[int, dict[str, Any]],
    extra: Mapping[str, dict[str, Any]],
    *,
    replace: bool = True,
) -> bytes:
    """A tokenizer.json with what the files beside it list (`listed`) and name (`extra`).

    `replace`: whether listed flags take precedence over other ones of tokenizer.json, as those of
    added_tokens_decoder do and those of added_tokens.json do not. InputError where two files give
    a token two ids, or an id would leave a gap.
    """
    known = backends.parse_json(definition)
    entries = {token.content for token in known.get_added_tokens_decoder().values()}
    wanted = {
        number: entry
        for number, entry in listed.items()
        if replace or entry["content"] not in entries
    }
    for identifier, entry in listed.items():
        found = known.token_to_id(entry["content"])
        if found not in (None, identifier):
            raise InputError(
                f"{entry['content']!r} has id {found} here and {identifier} in the files beside it"
            )
        if identifier in wanted and entry["content"] in extra:
            wanted[identifier] = {**entry, "special": True}
    entries |= {entry["content"] for entry in listed.values()}
    size = max([known.get_vocab_size(with_added_tokens=True), *(i + 1 for i in listed)])
    new = [text for text in extra if text not in entries and known.token_to_id(text) is None]
    if all(extra[text][ROLE] for text in new):
        new = []  # a pad token that no model knows and nothing here needs; BOS, EOS: an error later
    for text, entry in extra.items():
        found = known.token_to_id(text)
        flags = {key: value for key, value in entry.items() if key != ROLE}
        if text in new:
            wanted[size + new.index(text)] = flags
        elif found is not None and text not in entries and entry[ROLE] != "other":
            wanted[found] = flags
    return backends.with_added_tokens(definition, wanted) if wanted else definition


def _identifier(where: str, value: Any) -> int:
    """An id, also one written as text, as the keys of JSON objects are."""
    if isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", str(value)):
        raise InputError(f"{where}: expected the id of an added token, got {value!r}")
    return int(value)


def _extra_special(parsed: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Text of each additional special token, and what the file says of it."""
    found: dict[str, Any] = {}
    for name in (CONFIG, SPECIAL_MAP):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = parsed.get(name, {}).get(key)
            if value is None:
                continue
            if isinstance(value, dict) and key == "extra_special_tokens":
                value = list(value.values())
            if not isinstance(value, list):
                kinds = "a list" if key == "additional_special_tokens" else "a list or an object"
                raise InputError(f"{name}: {key}: expected {kinds} of tokens, got {value!r}")
            for token in value:
                text = token.get("content") if isinstance(token, dict) else token
                if not isinstance(text, str):
                    raise InputError(
                        f"{name}: {key}: expected text, or objects with content, got {token!r}"
                    )
                found.setdefault(text, token)
    return found


def _entry(token: Any, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`, without its id, of a text or of an object with flags."""
    flags = token if isinstance(token, dict) else {"content": token}
    found = {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
    found["normalized"] = bool(flags.get("normalized", not special))
    return {"content": flags.get("content"), **found, "special": special}


def _order(name: str) -> int:
    return _NAMED.index(name) if name in _NAMED else len(_NAMED)
