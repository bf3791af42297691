"""`llama2rt contamination`: evaluation files against training files."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from llama2rt import atomic
from llama2rt.data.files import rows
from llama2rt.data.readers import Reader
from llama2rt.data.records import Comparison, Document, Record, Sample
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.evaluate.contamination.effect import SUBSETS, table
from llama2rt.evaluate.contamination.overlap import LENGTHS, SEED, SKIPS, Overlap
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.evaluate.contamination")

Kind = Literal["document", "dialogue", "prompt", "comparison", "sample"]


@dataclass(frozen=True)
class Evaluated:
    """The samples of one evaluation file."""

    path: Path
    texts: list[str]
    scores: list[float] | None
    score: str
    """name of the scores, empty without any"""


def read_evaluation(path: Path, keys: Sequence[str] = (), score: str | None = None) -> Evaluated:
    """Samples of a file of JSON objects: what the harness logs (lm-eval's `samples_*.jsonl`, whose
    text is that of the document, without shots), or any others.

    `keys`: which of an object's (or a logged document's) texts count, "choices.text" for one inside
    another; without them all of a document's. `score`: the key of a number; by default the first of
    a logged sample's metrics. InputError with FILE:LINE.
    """
    texts: list[str] = []
    scores: list[float] = []
    filtered: str | None = None
    left_out = 0
    for line, row in rows(path, "sample", None):
        where = f"{path}:{line}"
        if isinstance(row, InputError):
            raise InputError(f"{where}: {row}")
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a JSON object")
        logged = isinstance(row.get("doc"), Mapping) and "doc_hash" in row
        if not logged and not keys:
            raise InputError(f"{where}: no logged sample of the harness; name its text by --text")
        if logged and filtered is None:
            filtered = str(row.get("filter"))
            numbers = (name for name in row.get("metrics") or () if _is_number(row.get(name)))
            score = score or next(numbers, None)
        if logged and str(row.get("filter")) != filtered:
            left_out += 1  # the same document again, its answer read by another filter
            continue
        texts.append(_text(row["doc"] if logged else row, keys, where))
        if score is not None:
            scores.append(_number(row, score, where))
    if not texts:
        raise InputError(f"{path}: no samples")
    if left_out:
        logger.info("%s: %d rows of other filters than %s left out", path, left_out, filtered)
    return Evaluated(path, texts, scores if score is not None else None, score or "")


def _text(row: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    found: list[str] = []
    for key in keys:
        value: Any = row
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise InputError(f"{where}: no key {key!r}")
            value = value[part]
        own = list(_strings(value))
        if not own:
            raise InputError(f"{where}: {key}: holds no text")
        found += own
    return "\n".join(found if keys else _strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif _is_number(value):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if not isinstance(value, bool | int | float):
        raise InputError(f"{where}: {key}: expected a number, got {value!r}")
    return float(value)


def texts_of(record: Record) -> list[str]:
    """What a model reads of a training record: a conversation as one text, without roles."""
    if isinstance(record, Document):
        return [record.text]
    messages = record.prompt if isinstance(record, Comparison) else record.messages
    asked = [message["content"] for message in messages]
    if isinstance(record, Comparison):
        return ["\n".join([*asked, record.chosen]), "\n".join([*asked, record.rejected])]
    if isinstance(record, Sample):
        asked.append(record.response)
    return ["\n".join(asked)]


def measure(
    evaluated: Sequence[Evaluated],
    training: Reader,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] = LENGTHS,
    skips: int = SKIPS,
) -> dict[str, Any]:
    """The share of each evaluation file's tokens that training texts hold, by least length of a
    span, and the four subsets with their scores (`effect.table`). Training texts are read once, one
    in memory at a time."""
    overlaps = [Overlap(tokenizer.encode_batch(file.texts), skips) for file in evaluated]
    count = tokens = 0
    for record in training:
        for text in texts_of(record):
            ids = tokenizer.encode(text)
            for overlap in overlaps:
                overlap.add(ids)
            tokens += len(ids)
        count += 1
    training.log()
    files = []
    for file, overlap in zip(evaluated, overlaps, strict=True):
        shares = {length: overlap.shares(length) for length in lengths}
        files.append(
            {
                "file": str(file.path),
                "samples": len(file.texts),
                "tokens": int(overlap.lengths.sum()),
                "score": file.score or None,
                **table(shares, file.scores),
                "shares": {str(length): np.round(s, 6).tolist() for length, s in shares.items()},
            }
        )
    about = {"records": count, "tokens": tokens, "files": [str(p) for p in training.paths]}
    return {"skips": skips, "training": about, "evaluation": files}


def command(
    *,
    evaluation: tuple[Path, ...],
    training: tuple[Source, ...],
    tokenizer: Path,
    kind: Annotated[Kind, tyro.conf.arg(name="as")] = "document",
    text: tuple[str, ...] = (),
    score: str | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    skips: int = SKIPS,
    out: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """How much of evaluation files stands in training files, and whether it raised the scores.

    Args:
        evaluation: Files of JSON lines: samples that `evaluate --tasks` wrote, or any with --text.
        training: Files that a model was trained on, read once, one record in memory at a time.
        tokenizer: A tokenizer's file, or a folder with one.
        kind: What the training files hold.
        text: Keys of an evaluation sample that are its text, such as question choices.text.
        score: Key of a sample's score; by default the first metric of a logged sample.
        lengths: Least lengths of a common span, in tokens.
        skips: Tokens that may differ in a span.
        out: File for the whole result, each sample's share included.
        as_json: Print one JSON object, without the samples' shares.
    """
    if not (evaluation and training):
        raise InputError("name at least one file of --evaluation and one of --training")
    if any(length < SEED for length in lengths) or not lengths:
        raise InputError(f"lengths: expected at least {SEED}, got {lengths}")
    if skips < 0:
        raise InputError(f"skips: expected at least 0, got {skips}")
    loaded = Tokenizer.load(tokenizer)
    evaluated = [read_evaluation(path, text, score) for path in evaluation]
    reader = Reader(training, kind)
    for path in reader.paths:
        if not path.exists():
            raise InputError(f"{path}: no such file")
    result = measure(evaluated, reader, loaded, lengths=sorted(set(lengths)), skips=skips)
    if out is not None:
        atomic.write(out, (json.dumps(result, indent=1) + "\n").encode())
    for file in result["evaluation"]:
        del file["shares"]
    print(json.dumps(result) if as_json else describe(result))


def describe(result: dict[str, Any]) -> str:
    """What `measure` found, as lines for a terminal."""
    about = result["training"]
    lines = [f"against {about['records']} training records of {about['tokens']} tokens"]
    for file in result["evaluation"]:
        lines.append(f"{file['file']}: {file['samples']} samples, {file['tokens']} tokens")
        for row in file["lengths"]:
            lines.append(f"  spans of {row['length']}+: {100 * row['share']:.1f} % of a sample")
            for name in SUBSETS:
                lines.append(_subset(name, row["subsets"][name]))
        if file["score"]:
            at = file["affected_at"]
            verdict = f"raised with spans of {at}+" if at else "no sign that it was raised"
            lines.append(f"  {file['score']}: {verdict}")
    return "\n".join(lines)


def _subset(name: str, row: Mapping[str, Any]) -> str:
    line = f"    {name.replace('_', ' '):<10}{row['samples']:>6} samples"
    if row["score"] is not None:
        score = row["score"]
        line += f"  {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
    if row["z"] is not None:
        line += f"  Z {row['z']:+.2f}"
    return line
