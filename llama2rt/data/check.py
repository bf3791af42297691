"""`llama2rt check FILE --as KIND`: whether a file is valid, and what it holds.

Counts, lengths in characters and in turns, labels, exact duplicates, and what was skipped, left out
or not used. Lengths are in tokens only where a tokenizer is given: a file of records has none.
Filters say what they would leave out, and the rest is described; no file is changed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llama2rt.data import statistics
from llama2rt.data.filters import NO_FILTERS, Filters, keep
from llama2rt.data.readers import Paths, Reader
from llama2rt.data.records import KINDS, RATINGS, SAFETY, Comparison, Dialogue, Document, Prompt
from llama2rt.data.statistics import by_source
from llama2rt.errors import InputError
from llama2rt.text.tokenizer import Tokenizer

# Counts by name of rows that may have several of the names: shares are of all rows.
OF_ROWS = ("ignored_keys", "known_keys_not_used")
MEASURED = ("dialogue", "prompt", "comparison")


def check(
    path: Paths,
    kind: str,
    skip_invalid: int = 0,
    format: str | None = None,
    filters: Filters = NO_FILTERS,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Read `path` as records of `kind`, in `format` where one is named (as `readers.read` takes
    it), and describe those that `filters` leave, JSON-able. InputError with FILE:LINE on the first
    bad record beyond `skip_invalid` tolerated ones.

    `ignored_keys` counts the rows of each key that nothing reads; `known_keys_not_used` those of
    keys that the rows' format is known to have; `left_out` what a rule leaves out, by reason;
    `warnings` are what a stage would log about each file; `filters` what each filter that is on
    leaves out (`Removed.report`); `statistics`, with a tokenizer, lengths (`statistics.by_source`).
    """
    if tokenizer is not None and kind not in MEASURED:
        raise InputError(f"tokenizer: {kind}s are not measured in tokens")
    reader = Reader(path, kind, skip_invalid, format=format, filters=filters)
    found = [record for file in reader.located_by_file() for record in file]
    removed = reader.removed
    kept = keep(filters, found, removed, tokenizer)
    records = [found[i].record for i in kept]
    return {
        "files": [str(file) for file in reader.paths],
        "kind": kind,
        "records": len(records),
        "rows": reader.rows,
        "rows_without_records": reader.rows_without_records,
        "formats": dict(reader.formats),
        "ignored_keys": dict(reader.ignored_keys),
        "known_keys_not_used": dict(reader.carried_keys),
        "left_out": dict(reader.left_out),
        "warnings": [message for file in reader.files for message in file.warnings()],
        "skipped": reader.skipped,
        **({"filters": removed.report()} if filters.active else {}),
        **(_describe(records) if records else {}),
        **({"statistics": by_source(records, tokenizer)} if tokenizer and records else {}),
    }


def print_check(result: dict[str, Any], console: Console | None = None) -> None:
    """`check`'s result as tables for a reader."""
    console = console or Console()
    title = f"{result['records']} {result['kind']}s in {', '.join(result['files'])}"
    console.print(title, style="bold", soft_wrap=True, highlight=False, markup=False)
    lengths = Table("what", "mean", "least", "median", "95 %", "most")
    counts = Table("what", "value", "count", "share")
    filtered, measured = result.get("filters", {}), result.get("statistics", ())
    for key, value in result.items():
        if key == "filters":
            continue
        if isinstance(value, dict) and "median" in value:
            cells = [value[name] for name in ("mean", "min", "median", "p95", "max")]
            shown = [f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}" for cell in cells]
            lengths.add_row(key.replace("_", " "), *shown)
        elif isinstance(value, dict) and value:
            total = result["rows"] if key in OF_ROWS else sum(value.values())
            for name, count in value.items():
                share = f"{count / total:.1%}" if total and key != "left_out" else ""
                counts.add_row(key.replace("_", " "), name, f"{count:,}", share)
        elif isinstance(value, int) and key != "records":
            counts.add_row(key.replace("_", " "), "", f"{value:,}", "")
    console.print(lengths)
    console.print(counts)
    if measured:
        tokens = Table(*statistics.header(measured[0]), title="means in tokens (as in Table 6)")
        for row in measured:
            tokens.add_row(*statistics.cells(row))
        console.print(tokens)
    for name, what in filtered.items():
        console.print(f"filters.{name}: {what['removed']:,} left out", highlight=False)
        for example in what["examples"]:
            console.print(f"  {example}", soft_wrap=True, highlight=False, markup=False)
    for message in result["warnings"]:
        console.print(message, style="yellow", soft_wrap=True, highlight=False, markup=False)
    for message in result["skipped"]:
        console.print(f"skipped {message}", style="yellow", soft_wrap=True, markup=False)


def _describe(records: Sequence[Any]) -> dict[str, Any]:
    first = records[0]
    if isinstance(first, Document):
        texts = [r.text for r in records]
        return {
            "characters": _summary(map(len, texts)),
            "bytes": sum(len(text.encode()) for text in texts),
            "duplicates": len(texts) - len(set(texts)),
            "sources": _counts(r.source for r in records),
        }
    if isinstance(first, Dialogue):
        answers = [m["content"] for r in records for m in r.messages if m["role"] == "assistant"]
        unlearned = sum(not learned for r in records for learned in r.learned or ())
        return {
            **_conversations([r.messages for r in records]),
            "answer_characters": _summary(map(len, answers)),
            **({"answers_of_weight_0": unlearned} if unlearned else {}),
            "sources": _counts(r.source for r in records),
        }
    if isinstance(first, Prompt):
        return {
            **_conversations([r.messages for r in records]),
            "kinds": _counts((r.kind for r in records), KINDS),
        }
    if isinstance(first, Comparison):
        longer = [len(r.chosen) > len(r.rejected) for r in records]
        return {
            **_conversations([r.prompt for r in records]),
            "chosen_characters": _summary(len(r.chosen) for r in records),
            "rejected_characters": _summary(len(r.rejected) for r in records),
            "chosen_longer": sum(longer),
            "ratings": _counts((r.rating for r in records), RATINGS),
            "safety": _counts((r.safety for r in records), SAFETY),
            "kinds": _counts((r.kind for r in records), KINDS),
            "sources": _counts(r.source for r in records),
            "raters": _counts(r.rater for r in records),
            "votes": _counts(str(len(r.votes)) if r.votes else None for r in records),
        }
    names = sorted({name for r in records for name in r.scores})
    rewards = [r.reward for r in records if r.reward is not None]
    return {
        **_conversations([r.messages for r in records]),
        "prompts": len({r.prompt_id for r in records}),
        "response_characters": _summary(len(r.response) for r in records),
        "empty_responses": sum(not r.response for r in records),
        **{f"score_{n}": _summary(r.scores[n] for r in records if n in r.scores) for n in names},
        **({"reward": _summary(rewards)} if rewards else {}),
        "policies": _counts(r.policy for r in records),
        "temperatures": _counts(
            None if r.temperature is None else str(r.temperature) for r in records
        ),
    }


def _conversations(conversations: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
    keys = [tuple((m["role"], m["content"]) for m in messages) for messages in conversations]
    return {
        "turns": _summary(sum(role == "user" for role, _ in key) for key in keys),
        "characters": _summary(sum(len(content) for _, content in key) for key in keys),
        "system_messages": sum(key[0][0] == "system" for key in keys),
        "duplicates": len(keys) - len(set(keys)),
    }


def _summary(values: Iterable[float]) -> dict[str, float]:
    array = np.fromiter(values, dtype=float)
    return {
        "mean": float(array.mean()),
        "min": float(array.min()),
        "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95)),
        "max": float(array.max()),
    }


def _counts(values: Iterable[str | None], order: Sequence[str] = ()) -> dict[str, int]:
    """Counts by value, in `order` where one is given, else most frequent first; empty where no
    record says anything."""
    counter = Counter(value or "none" for value in values)
    names = [*order, "none"] if order else [name for name, _ in counter.most_common()]
    return (
        {name: counter[name] for name in names if counter[name]}
        if counter.keys() - {"none"}
        else {}
    )
