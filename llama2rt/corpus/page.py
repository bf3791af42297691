"""report.json and report.html of a corpus: what each step did to each source, with examples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2rt import report
from llama2rt.corpus.personal import KINDS
from llama2rt.corpus.tally import STEPS

_MEANING = {
    "empty": "blank once normalised",
    "language": "another language than those asked for",
    "c4": "C4's rules of lines and pages",
    "gopher": "Gopher's rules of quality",
    "gopher_repetition": "Gopher's rules of repetition",
    "contamination": "words of an evaluation set",
    "personal_data": "of an origin rich in personal data",
    "duplicates": "the text of an earlier document",
    "near_duplicates": "almost the text of an earlier document",
}


def write(directory: Path, manifest: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    """Both files, of `numbers` by source."""
    report.write_json(directory / "report.json", {**manifest["summary"], **numbers})
    sources: dict[str, Any] = numbers["sources"]
    sections = [
        report.Section("Documents", [_counts(sources)], "Each is counted by the step it ends at."),
        report.Section("Personal data", [_personal(sources, numbers["origins_removed"])]),
        report.Section("Examples", [_examples(sources)]),
        report.Section("This run", [report.Text("recipe", str(manifest["recipe"]))]),
    ]
    read, kept = (sum(row[key] for row in sources.values()) for key in ("read", "kept"))
    headlines = [
        report.Headline("documents", f"{kept:,}", f"of {read:,} read"),
        report.Headline("tokens", f"{sum(row['tokens'] for row in sources.values()):,}"),
    ]
    report.write(
        directory / "report.html",
        f"Corpus: {directory.resolve().name}",
        sections,
        headlines=headlines,
    )


def _counts(sources: Mapping[str, Any]) -> report.Table:
    rows: list[list[object]] = [["read", *(row["read"] for row in sources.values())]]
    for step in STEPS:
        counts = [row["removed"].get(step, {}).get("removed", 0) for row in sources.values()]
        if any(counts):
            rows.append([f"{step}: {_MEANING[step]}", *(-count for count in counts)])
    for key, label in (("kept", "kept"), ("kept_bytes", "bytes kept"), ("tokens", "tokens")):
        rows.append([label, *(row[key] for row in sources.values())])
    changed = sorted({step for row in sources.values() for step in row["changed"]})
    for step in changed:
        rows.append([f"changed by {step}", *(r["changed"].get(step, 0) for r in sources.values())])
    return report.Table(["documents", *sources], rows)


def _personal(sources: Mapping[str, Any], removed: Mapping[str, float]) -> report.Table:
    rows: list[list[object]] = [
        [kind, *(row["personal_data"].get(kind, 0) for row in sources.values())] for kind in KINDS
    ]
    origins = ", ".join(f"{name} ({rate:.1f})" for name, rate in [*removed.items()][:20])
    caption = "Items that were replaced."
    if removed:
        caption += f" {len(removed):,} origins removed (items per 1,000 words): {origins}"
    return report.Table(["kind", *sources], rows, caption)


def _examples(sources: Mapping[str, Any]) -> report.Table:
    rows: list[list[object]] = []
    for name, row in sources.items():
        for step, said in row["removed"].items():
            rows += [[name, step, example] for example in said["examples"]]
        rows += [[name, "replaced", example] for example in row["personal_data_examples"]]
    return report.Table(["source", "step", "example"], rows)
