"""The report of one run directory: every stage's run gets a page, whatever the stage.

It draws what metrics.jsonl holds and lists what manifest.json says; a stage with figures of its
own passes them as further sections. A run that was killed, or has logged nothing yet, still gets
its page.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2rt.cluster import carbon
from llama2rt.errors import InputError
from llama2rt.report import html, recall, safety, selection, studies, training, versions
from llama2rt.report.files import write_json
from llama2rt.run import Run

DATA = "Data"
TRAINING = "Training"
POSITION = {
    "first": "probability for the first position (0.5: no bias)",
    "accuracy_as_first": "as annotated, the chosen answer shown first",
    "accuracy_as_second": "as annotated, the chosen answer shown second",
    "flipped": "the two orders say opposite things",
}


def of_run(
    directory: str | Path,
    *,
    title: str | None = None,
    sections: Sequence[html.Section] = (),
    numbers: Mapping[str, object] | None = None,
) -> Path:
    """Write report.html and report.json into a run directory; return the path of the page.

    report.json holds the manifest's summary, which is what the stage gave to `Run.finish`, what
    went in by source, and `numbers`. sections: put before the training curves. A summary of a
    reward model or of versions (`evaluate.diagnostics`) gets its figures. InputError where the
    folder holds neither a manifest nor metrics.
    """
    directory = Path(directory)
    return _write(directory, read_manifest(directory), title, sections, numbers)


def _write(
    directory: Path,
    manifest: Mapping[str, Any],
    title: str | None = None,
    sections: Sequence[html.Section] = (),
    numbers: Mapping[str, object] | None = None,
) -> Path:
    metrics = read_metrics(directory / "metrics.jsonl")
    if not manifest and not metrics:
        raise InputError(f"{directory}: no run directory (neither manifest.json nor metrics.jsonl)")
    title = title or f"Run: {directory.resolve().name}"
    summary = manifest.get("summary", {})
    write_json(
        directory / "report.json",
        {
            "complete": bool(manifest.get("complete", False)),
            "steps": int(metrics[-1]["step"]) if metrics else 0,
            **summary,
            **{key: manifest[key] for key in ("composition", "filters") if key in manifest},
            **(numbers or {}),
        },
    )
    sections = [*sections, *compared(summary), *data_sections(manifest)]
    return html.write(
        directory / "report.html",
        title,
        [
            *sections,
            *training_sections(metrics),
            html.Section("This run", _facts(directory, manifest)),
        ],
        subtitle=_status(manifest, metrics),
    )


def compared(summary: Mapping[str, Any]) -> list[html.Section]:
    """The sections that a summary of versions, of a reward model, of a study, of the test of an
    instruction, or of samples that were chosen calls for."""
    if "study" in summary:
        return studies.sections(summary)
    if "recall" in summary or "attention" in summary:
        return recall.sections(summary)
    if "distilled" in summary:
        return safety.distillation(summary)
    if "safety_study" in summary:
        return safety.study(summary)
    if "intervals" in summary:
        name = str(summary.get("kind", "reward model"))
        drift = {name: versions.newest_batch(summary["drift"])} if "drift" in summary else {}
        found = versions.sections({"reward_models": {name: summary}, "drift": drift})
        return [*found, *position(summary)]
    found = versions.sections(summary) if "versions" in summary else []
    return [*selection.sections(summary), *found]


def data_sections(manifest: Mapping[str, Any]) -> list[html.Section]:
    """What went in by source, and what filters left out; none of a run that keeps no account."""
    composition = manifest.get("composition", [])
    used = sum(row["used"] for row in composition)
    if not used:
        return []
    rows = [
        [
            row["key"],
            row["path"],
            row["read"],
            ", ".join(f"{n:,} {reason}" for reason, n in row["left_out"].items()) or None,
            row["used"],
            f"{row['used'] / used:.1%}",
        ]
        for row in composition
    ]
    header = ["key", "file", "read", "left out", "trained on", "share"]
    blocks: list[html.Block] = [html.Table(header, rows, "Records by source")]
    if filters := manifest.get("filters"):
        removed = [[name, f["removed"], " | ".join(f["examples"])] for name, f in filters.items()]
        blocks.append(html.Table(["filter", "left out", "examples"], removed, "Filters"))
    return [html.Section(DATA, blocks)]


def position(summary: Mapping[str, Any]) -> list[html.Section]:
    """Whether a model that compares two answers favours a position (`evaluate.position`)."""
    if "position_bias" not in summary:
        return []
    bias = summary["position_bias"]
    rows = [
        (text, tuple(bias[key][end] for end in ("mean", "low", "high")))
        for key, text in POSITION.items()
    ]
    caption = (
        f"{bias['pairs']} held-out pairs, each asked in both orders, with 95 % intervals; the mean "
        "of the two is what ranks."
    )
    return [html.Section("Position bias", [html.Table(("of all pairs", "share"), rows, caption)])]


def training_sections(metrics: Sequence[Mapping[str, Any]]) -> list[html.Section]:
    """The sections metrics call for: training curves, and PPO's or DPO's own figure."""
    keys = {key for row in metrics for key in row}
    blocks: list[html.Block] = [training.curves(metrics)]
    if {"kl_k1", "reward"} <= keys:
        blocks.append(training.kl_against_reward(metrics))
    if "chosen_logprob" in keys:
        blocks.append(training.margins(metrics))
    return [html.Section(TRAINING, blocks)]


def training_again(directory: Path) -> list[html.Section]:
    """The training sections of a run's own page, as they are drawn there, for another page; drawn
    here where it has none. None of a run that logged no metrics."""
    metrics = read_metrics(directory / "metrics.jsonl")
    if not metrics:
        return []
    if figures := html.drawn(directory / "report.html", TRAINING):
        return [html.Section(TRAINING, figures)]
    return training_sections(metrics)


def facts(directory: str | Path) -> list[html.Block]:
    """What a run was made of: summary, versions, seed, input hashes, and the recipe folded away."""
    return _facts(Path(directory), read_manifest(directory))


def _facts(directory: Path, manifest: Mapping[str, Any]) -> list[html.Block]:
    listed: dict[str, object] = {"directory": str(directory)}
    for key in ("started", "finished", "seed"):
        if manifest.get(key) is not None:
            listed[key] = manifest[key]
    for group in ("summary", "versions", "inputs", "parents"):
        listed |= _flat(manifest.get(group, {}), group)
    metrics = read_metrics(directory / "metrics.jsonl")
    listed["carbon"] = carbon.of_summary({**_energy(metrics), **manifest.get("summary", {})})
    blocks: list[html.Block] = [html.Facts(listed)]
    recipe = directory / "recipe.toml"
    if recipe.exists():
        blocks.append(html.Text("The resolved recipe", recipe.read_text(encoding="utf-8")))
    return blocks


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """manifest.json of a run directory, empty where there is none; InputError if damaged."""
    path = Path(directory) / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected an object, got {type(manifest).__name__}")
    return manifest


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in the order of their steps, empty where there is no file.

    Lines of the same step (training and validation) become one row. A last line cut short by a
    kill is left out; InputError names any other damaged line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
            rows[step] = {**rows.get(step, {}), **row}
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not a row of metrics ({error!r})") from error
    return [rows[step] for step in sorted(rows)]


def _energy(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """energy_kwh of the training steps where a meter ran: the mean reading, in joules a step,
    times the steps. Evaluation and checkpoints are not in it."""
    readings = [row["joules_per_step"] for row in metrics if "joules_per_step" in row]
    if not readings:
        return {}
    return {"energy_kwh": sum(readings) / len(readings) * int(metrics[-1]["step"]) / 3.6e6}


def _status(manifest: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    state = "Complete" if manifest.get("complete") else "Not complete"
    return f"{state}, {metrics[-1]['step']} steps logged." if metrics else f"{state}."


def _flat(value: object, prefix: str) -> dict[str, object]:
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list):
        if prefix.startswith("summary"):
            return {}  # a table is no fact; it is in report.json
        pairs = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in pairs:
        flat |= _flat(item, f"{prefix}.{key}")
    return flat


def finish(run: Run, numbers: Mapping[str, Any]) -> None:
    """The run complete, with its report.json and report.html. Every rank calls it."""
    run.finish(lambda manifest: _write(run.directory, manifest), **numbers)
