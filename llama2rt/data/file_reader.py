"""Records from the rows of one file: which format a row is in, and which of its keys are read.

A row's own keys (`kind`, `rating`, `safety`, `source`, a prompt's `id`) are read in every format
and validated as in our own form. Where a row has none, a `Source` overrides the origin that the
format gives, and gives the kind where the format does not.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.formats import OWN, Convert, Format, Selection, named, recognise
from llama2rt.data.formats.values import require_no_messages
from llama2rt.data.json_values import misspelt, printable, type_name, without_nulls
from llama2rt.data.records import RECORDS, Comparison, Dialogue, Prompt, Record
from llama2rt.data.removed import Removed
from llama2rt.data.sources import Source
from llama2rt.errors import InputError

Row = dict[str, Any]

# The key under which a kind's records hold their conversation.
_CONVERSATION = {
    "dialogue": "messages",
    "prompt": "messages",
    "comparison": "prompt",
    "sample": "messages",
}

# Columns that an answer may depend on besides its messages, and further ones that files have whose
# conversations are columns of text. Without them, a model would learn to guess the answer.
_PICTURES = ("image", "images")
_BESIDE_MESSAGES = ("system_prompt", "tools", *_PICTURES)
_BESIDE_TEXT = (
    *_BESIDE_MESSAGES,
    "instruction",
    "input",
    "context",
    "history",
    "options",
    "choices",
)

# The columns that formats make a prompt of, or a whole conversation.
_ASKED = (
    "prompt",
    "messages",
    "conversations",
    "context_messages",
    "trajectory",
    "instruction",
    "question",
    "history",
    "input",
)

# Characters of an unknown key that are said and counted.
LONGEST_KEY = 80

# How people write that a column holds nothing in this row.
_NOTHING = ("", "[]", "{}", "null", "none", "n/a", "nan")

# How TRL and LLaMA-Factory mark the answers of unpaired preferences.
_WANTED = ("label", "kto_tag")


@dataclass
class FileCounts:
    """Counts of one file's rows and keys."""

    path: Path
    unknown_keys: Counter[str] = field(default_factory=Counter)
    """keys that nothing reads, by the number of their rows"""
    carried_keys: Counter[str] = field(default_factory=Counter)
    """keys that nothing reads either, and that the file's format is known to carry"""
    first_line: dict[str, int] = field(default_factory=dict)
    """where each of the unknown keys was first met"""
    selection: Selection = field(default_factory=Selection)
    formats: Counter[str] = field(default_factory=Counter)
    """rows by the name of their format, our own included"""
    other_kinds: Counter[str] = field(default_factory=Counter)
    """records left out because they say another kind than their source is taken for"""

    @property
    def removed(self) -> Removed:
        """What filters leave out of the rows."""
        return self.selection.removed

    def warnings(self) -> list[str]:
        """What the file's owner may not expect, a line each."""
        found = []
        if self.unknown_keys:
            keys = ", ".join(
                f"{key} ({count} {'row' if count == 1 else 'rows'}, first in line "
                f"{self.first_line[key]})"
                for key, count in self.unknown_keys.most_common()
            )
            found.append(f"{self.path}: keys not used: {keys}")
        for kind, count in self.other_kinds.items():
            found.append(f"{self.path}: {count} records of the other kind, {kind}, left out")
        if count := self.selection.unsupported:
            found.append(
                f"{self.path}: {count} pairs whose chosen answer has no higher score than the "
                "other kept; minimum_score_difference leaves them out"
            )
        for reason, count in self.selection.left_out.items():
            found.append(f"{self.path}: {count} {reason} left out")
        return found

    def notes(self) -> list[str]:
        """What is usual in files of its format, a line."""
        keys = ", ".join(sorted(self.carried_keys))
        return [f"{self.path}: known keys not used: {keys}"] if keys else []


class FileReader:
    """Makes records of the rows of `source`, and counts them in `counts`. `first_seen` holds the
    ids of prompts read so far, in all files, with their FILE:LINE; prompts without an id get one
    that begins with `name`."""

    def __init__(
        self,
        source: Source,
        kind: str,
        name: str | Path,
        first_seen: dict[str, str],
        filters: Filters = NO_FILTERS,
    ) -> None:
        self.source, self.kind, self.name = source, kind, name
        self.record = RECORDS[kind]
        selection = Selection(
            source.minimum_score_difference,
            small_margin=filters.small_margin,
            removed=Removed(filters.active),
        )
        self.counts = FileCounts(source.path, selection=selection)
        self._named = None if source.format is None else named(source.format, kind)
        self._converters: dict[str, Convert] = {}
        self._first_seen = first_seen

    def take(self, line: int, row: Any) -> tuple[list[Record], InputError | None]:
        """The records of a row, and its first fault: one bad pair does not cost the others. What a
        filter leaves out is no fault."""
        if isinstance(row, InputError):
            return [], row
        self.counts.selection.where = f"{self.source.path}:{line}"
        try:
            return self._take(line, row)
        except RecursionError:
            return [], InputError("nested too deeply")

    def _take(self, line: int, row: Any) -> tuple[list[Record], InputError | None]:
        try:
            row = without_nulls(row)
            if not isinstance(row, dict):
                self.record.from_json(row)  # says what was expected
            foreign = self._format_of(row)
            objects, used = self._own(row) if foreign is None else self._foreign(row, line, foreign)
            self._add_system_message(row, objects, used)
            self._require_whole(row, objects, used, foreign)
        except InputError as error:
            return [], None if self._filtered(error) else error
        records, fault = self._records(line, objects)
        if fault is None:
            self._count(line, row, used, foreign)
        return records, fault

    def _format_of(self, row: Row) -> Format | None:
        if self.source.format is None:
            return recognise(row, self.kind)
        if self._named is not None:
            self._named.require(row)
        return self._named

    def _records(self, line: int, objects: list[Row]) -> tuple[list[Record], InputError | None]:
        records: list[Record] = []
        fault = None
        for obj in objects:
            try:
                record = self.record.from_json(obj)
                _require_no_messages_as_answer(record)
                if isinstance(record, Prompt):
                    self._require_new(record.id, line)
            except InputError as error:
                if not self._filtered(error):
                    fault = fault or error
                continue
            kind = self.source.kind
            if kind is not None and (said := obj["kind"]) != kind:
                self.counts.other_kinds[said] += 1
            else:
                records.append(record)
        return records, fault

    def _filtered(self, error: InputError) -> bool:
        return self.counts.removed.takes(error, self.counts.selection.where)

    def why_none(self) -> str:
        """The reason why no row gave a record."""
        if filtered := "; ".join(self.counts.removed.lines()[:2]):
            return f"none of its rows gives one ({filtered})"
        if said := ", ".join(self.counts.other_kinds):
            return f"all say the kind {said}, and the source is taken for {self.source.kind}"
        if left_out := "; ".join(self.counts.warnings()[-1:]):
            return f"none of its rows gives one ({left_out})"
        return "none of its rows gives one"

    def _own(self, row: Row) -> tuple[list[Row], set[str]]:
        """A row in our own form, and the keys that count."""
        if self.counts.selection.minimum_score_difference:
            raise InputError("minimum_score_difference: the row has no scores of its answers")
        said = {"kind": self.source.kind, "source": self.source.source}
        obj = {key: value for key, value in said.items() if value is not None} | row
        used = {f.name for f in fields(self.record)} | self.record.carried
        return [obj], used & row.keys()

    def _foreign(self, row: Row, line: int, found: Format) -> tuple[list[Row], set[str]]:
        """A row in another format as objects in our own form, and the keys that count."""
        selection = self.counts.selection
        if selection.minimum_score_difference and found.scores is None:
            raise InputError(f"minimum_score_difference: rows of {found.name} have no scores")
        used = found.used(row, selection)
        own = self._own_keys_in(row, found, used)
        convert = self._converters.get(found.name)
        if convert is None:
            convert = self._converters[found.name] = found.start(selection)
        said = {} if self.source.source is None else {"source": self.source.source}
        behind: Row = {} if self.source.kind is None else {"kind": self.source.kind}
        if self.kind == "prompt":
            behind["id"] = f"{self.name}:{line}"
        return [behind | obj | said | own for obj in convert(row)], used | own.keys()

    def _own_keys_in(self, row: Row, found: Format, used: set[str]) -> Row:
        """Our optional keys that a foreign row holds. InputError for one that is misspelt, and for
        one that only the format can give."""
        ours = self.record.optional | ({"id"} if self.kind == "prompt" else set())
        own = {}
        for key, value in row.items():
            if key in used:
                continue
            if key in ours:
                if key in found.decides:
                    raise InputError(f"{key}: a row of {found.name} decides it itself: remove it")
                if key not in found.carries or isinstance(value, str):
                    own[key] = value
            elif key not in found.carries and isinstance(value, str | int | float):
                # Published files have many keys: one is taken for a misspelt key of ours only where
                # its value could be ours. Of `id` only the case may differ: `uid` is another key.
                meant: str | None = key.strip().casefold()
                if meant not in ours:
                    known = tuple(sorted(ours - {"id"}))
                    meant = misspelt(key, known) if isinstance(value, str) else None
                if meant and meant not in row:
                    raise InputError(f"unknown key {key!r}: did you mean {meant!r}?")
        return own

    def _add_system_message(self, row: Row, objects: list[Row], used: set[str]) -> None:
        """Makes a text `system` beside a conversation its system message, as many ShareGPT files
        have it; without it the model would learn to answer so unasked."""
        where = _CONVERSATION.get(self.kind)
        if where is None or "system" in used:
            return
        if "system" not in row:
            for key, value in row.items():
                if key.strip().casefold() == "system" and isinstance(value, str):
                    raise InputError(f"unknown key {key!r}: did you mean 'system'?")
            return
        system = row["system"]
        if not isinstance(system, str):
            raise InputError(f"system: expected text, got {type_name(system)}")
        used.add("system")
        for obj in objects if system.strip() else []:
            messages = obj.get(where)
            if not isinstance(messages, list) or not messages:
                continue
            first = messages[0]
            if isinstance(first, Mapping) and first.get("role") == "system":
                if first.get("content") != system:
                    raise InputError("system: differs from the conversation's system message")
            else:
                obj[where] = [{"role": "system", "content": system}, *messages]

    def _require_whole(
        self, row: Row, objects: list[Row], used: set[str], found: Format | None
    ) -> None:
        """InputError for a key that nothing reads and whose loss would change what a model learns:
        a part of the question, or the mark of an answer that is not to be learned."""
        where = _CONVERSATION.get(self.kind)
        if where is None or self.kind == "sample" or (found is None and where not in row):
            return  # the last case is reported as a missing key
        for key in _WANTED if self.kind == "dialogue" else ():
            if isinstance(row.get(key), bool):
                raise InputError(
                    f"{key}: true or false says whether an answer is wanted (unpaired "
                    "preferences), and all answers of dialogues are learned: keep the wanted "
                    "ones, without the key"
                )
        columns = [row[key] for key in _ASKED if key in used]
        # Without any such column the answers hold the conversation (TRL's implicit prompt).
        of_messages = any(isinstance(value, list) for value in columns or [row.get("chosen")])
        for key in _BESIDE_MESSAGES if of_messages else _BESIDE_TEXT:
            read = key in used or (found is not None and key in found.carries)
            if read or not _says_something(row.get(key)):
                continue
            if key in _PICTURES or not _stands_in(row[key], columns, objects, where):
                raise InputError(
                    f"{key}: the conversation is read without it; put it there, or remove the key"
                )

    def _require_new(self, identifier: str, line: int) -> None:
        if identifier in self._first_seen:
            first = self._first_seen[identifier]
            raise InputError(f"duplicate id {identifier!r}, first used at {first}")
        self._first_seen[identifier] = f"{self.source.path}:{line}"

    def _count(self, line: int, row: Row, used: set[str], found: Format | None) -> None:
        self.counts.formats[OWN if found is None else found.name] += 1
        carries = frozenset() if found is None else found.carries
        for key in (key for key in row if key not in used):
            if key in carries:
                self.counts.carried_keys[key] += 1
            else:
                shown = printable(key, LONGEST_KEY)
                self.counts.unknown_keys[shown] += 1
                self.counts.first_line.setdefault(shown, line)


def _says_something(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().casefold() not in _NOTHING
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(_says_something(item) or isinstance(item, int | float) for item in inner)


def _stands_in(value: Any, columns: list[Any], objects: list[Row], where: str) -> bool:
    """Whether the question holds the text already: in the columns that it is made of, or in the
    messages made of them."""
    if not isinstance(value, str):
        return False
    asked = [column for column in columns if isinstance(column, str)]
    said = objects[0].get(where) if objects else None  # all objects of a row have one prompt
    messages = [m for m in said if isinstance(m, Mapping)] if isinstance(said, list) else []
    if messages and messages[-1].get("role") == "assistant":
        messages.pop()  # a dialogue's answer asks nothing
    asked += [m["content"] for m in messages if isinstance(m.get("content"), str)]
    return any(value.strip() in text for text in asked)


def _require_no_messages_as_answer(record: Record) -> None:
    """InputError for a message list that some program wrote as text, whatever format the row is in.
    A sample is not checked: its response is what a policy wrote."""
    if isinstance(record, Comparison):
        require_no_messages("chosen", record.chosen)
        require_no_messages("rejected", record.rejected)
    elif isinstance(record, Dialogue):
        require_no_messages("messages: the last message", record.messages[-1]["content"])
