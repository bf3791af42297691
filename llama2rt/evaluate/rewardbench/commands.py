"""`llama2rt rewardbench`: models of three kinds, and published results, in one table."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.position import position_bias
from llama2rt.evaluate.rewardbench import weighting
from llama2rt.evaluate.rewardbench.models import (
    MODEL_TYPES,
    Contender,
    Ranked,
    contenders,
    longest,
    ranked,
)
from llama2rt.evaluate.rewardbench.records import (
    BenchmarkPair,
    read_pairs,
    read_results,
    write_results,
    write_scores,
)

logger = logging.getLogger("llama2rt.evaluate.rewardbench")

TABLE = "rewardbench.json"


def measure(
    models: Sequence[Contender],
    pairs: Sequence[BenchmarkPair],
    out: Path | None = None,
    *,
    skip_long: bool = False,
    micro_tokens: int = 16384,
) -> dict[str, Any]:
    """All `models` on the same `pairs`, one loaded after the other: `models`, a row each (`_row`),
    `pairs` by subset and `left_out` by subset.

    A pair that is too long for any of them is an InputError before any weights are loaded, or, with
    `skip_long`, left out for all and counted. Result files go below `out`.
    """
    kept = _fitting(models, pairs, skip_long)
    comparisons = [pair.comparison for pair in kept]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for model in models:
        found = ranked(model, comparisons, device, micro_tokens)
        row = _row(model, kept, found)
        rows.append(row)
        if out is not None:
            _write(out, model, row, kept, found)
    counts = Counter(pair.subset for pair in kept)
    return {
        "models": rows,
        "pairs": dict(counts),
        "left_out": dict(Counter(pair.subset for pair in pairs) - counts),
    }


def _fitting(
    models: Sequence[Contender], pairs: Sequence[BenchmarkPair], skip_long: bool
) -> list[BenchmarkPair]:
    fits = np.ones(len(pairs), bool)
    for model in models:
        lengths, context = longest(model, [pair.comparison for pair in pairs])
        short = np.array(lengths) <= context
        if not skip_long and not short.all():
            i = int(np.argmin(short))
            raise InputError(
                f"{model.folder}: {pairs[i].subset} pair {pairs[i].id} has {lengths[i]} tokens, "
                f"the model's context is {context}; --skip-long leaves such pairs out for all"
            )
        fits &= short
    if not fits.any():
        raise InputError("no pair fits the context of every model")
    if gone := int((~fits).sum()):
        logger.warning("%d of %d pairs too long for some model left out for all", gone, len(pairs))
    return [pair for pair, short in zip(pairs, fits, strict=True) if short]


def _row(model: Contender, pairs: Sequence[BenchmarkPair], found: Ranked) -> dict[str, Any]:
    """Name, kind, `subsets` (accuracies), `sections` and `all` (over all pairs) with intervals,
    `prior`, `score`, `ties`, and the bias of a model that was asked in both orders."""
    results = found.results(model.kind)
    right: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for pair, result in zip(pairs, results.tolist(), strict=True):
        right[pair.subset] = right.get(pair.subset, 0.0) + result
        counts[pair.subset] += 1
    accuracy = {subset: right[subset] / n for subset, n in counts.items()}
    row = {
        "name": model.name,
        "kind": model.kind,
        "folder": str(model.folder),
        **_scores(accuracy),
        "all": wilson(float(results.sum()), len(pairs))._asdict(),
        "ties": int((found.chosen == found.rejected).sum()),
    }
    intervals = weighting.section_intervals(right, counts)
    row["sections"] = {name: interval._asdict() for name, interval in intervals.items()}
    if found.both_orders is not None:
        row["position_bias"] = position_bias(found.both_orders[:, 0], found.both_orders[:, 1])
    return row


def _scores(accuracy: Mapping[str, float]) -> dict[str, Any]:
    return {
        "subsets": dict(accuracy),
        "prior": weighting.prior_score(accuracy),
        "score": weighting.overall_score(accuracy),
    }


def _published(path: Path) -> dict[str, Any]:
    """A row of a result file, without intervals: it does not say how many pairs there were."""
    name, accuracy = read_results(path)
    sections = weighting.section_scores(accuracy)
    return {
        "name": name,
        "kind": "published",
        "folder": str(path),
        **_scores(accuracy),
        "sections": {
            section: {"mean": mean, "low": None, "high": None} for section, mean in sections.items()
        },
    }


def _write(
    out: Path,
    model: Contender,
    row: Mapping[str, Any],
    pairs: Sequence[BenchmarkPair],
    found: Ranked,
) -> None:
    about = {
        "model": model.name,
        "model_type": MODEL_TYPES[model.kind],
        "chat_template": "tokenizer",
    }
    columns = {
        "results": found.results(model.kind).tolist(),
        "scores_chosen": found.chosen.tolist(),
        "scores_rejected": found.rejected.tolist(),
    }
    write_results(out, model.name, about, row["subsets"])
    write_scores(out, model.name, about, pairs, columns)


def describe(found: Mapping[str, Any]) -> str:
    """The table, as lines for a terminal: per cent, with 95 % intervals where they are known."""
    header = ["model", "kind", *weighting.SECTIONS, "prior sets", "score"]
    rows = [
        [
            row["name"],
            row["kind"],
            *(_cell(row["sections"].get(section)) for section in weighting.SECTIONS),
            _percent(row["prior"]),
            _percent(row["score"]),
        ]
        for row in found["models"]
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    for row in found["models"]:
        if bias := row.get("position_bias"):
            lines.append(
                f"{row['name']}: {100 * bias['first']['mean']:.1f} % for the first position, "
                f"{100 * bias['flipped']['mean']:.1f} % of pairs ranked otherwise in the other "
                "order"
            )
    total = sum(found["pairs"].values())
    if total:
        missing = sorted(weighting.CORE - found["pairs"].keys())
        lines.append(f"{total} pairs of {len(found['pairs'])} subsets, the same for all models")
        if missing:
            lines.append(f"no pairs of: {', '.join(missing)}")
    if left_out := sum(found["left_out"].values()):
        lines.append(f"{left_out} pairs too long for some model left out for all")
    return "\n".join(lines)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return _percent(estimate["mean"])
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{_percent(estimate['mean'])} [{low:.1f}, {high:.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def command(
    files: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    reward: tuple[Path, ...] = (),
    preference: tuple[Path, ...] = (),
    judge: tuple[Path, ...] = (),
    results: tuple[Path, ...] = (),
    out: Path | None = None,
    skip_long: bool = False,
    skip_invalid: int = 0,
    micro_tokens: int = 16384,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Rank RewardBench's pairs by reward models, pairwise preference models and judges.

    Args:
        files: Pairs as in allenai/reward-bench (JSON lines or Parquet), and prior test sets, each
            in a file named after it, such as shp-00000-of-00001.parquet.
        reward: Folders of reward models.
        preference: Folders of pairwise preference models.
        judge: Folders of chat models that are asked A or B, each pair in both orders.
        results: Result files of the rewardbench package, as further rows.
        out: Folder for the table and for result files of that package's form.
        skip_long: Leave pairs out that are too long for one of the models.
        skip_invalid: Bad rows to tolerate.
        micro_tokens: Tokens scored at once.
        as_json: Print one JSON object.
    """
    models = contenders(reward, preference, judge)
    if not (models or results):
        raise InputError("nothing to rank by: give --reward, --preference, --judge or --results")
    if bool(models) != bool(files):
        missing = "files of pairs" if models else "--reward, --preference or --judge"
        raise InputError(f"give {missing} too: models rank the pairs of files")
    if skip_invalid < 0:
        raise InputError(f"skip_invalid: expected at least 0, got {skip_invalid}")
    if micro_tokens < 1:
        raise InputError(f"micro_tokens: expected at least 1, got {micro_tokens}")
    published = [_published(path) for path in results]
    found: dict[str, Any] = {"models": [], "pairs": {}, "left_out": {}}
    if models:
        pairs = read_pairs(files, skip_invalid)
        found = measure(models, pairs, out, skip_long=skip_long, micro_tokens=micro_tokens)
    found["models"] += published
    text = json.dumps(found, indent=2, allow_nan=False)
    if out is not None:
        atomic.write(out / TABLE, text + "\n")
    print(text if as_json else describe(found))
