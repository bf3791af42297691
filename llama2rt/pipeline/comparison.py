"""`llama2rt compare`: one page about versions, from what other commands have measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from llama2rt import report
from llama2rt.data import strict_json
from llama2rt.errors import InputError
from llama2rt.evaluate.judges.commands import read_versions
from llama2rt.report import judged, versions

_SHOWN = 6


def page(
    out: Path,
    *,
    judged_file: Path | None = None,
    measured: Path | None = None,
    tasks: Path | None = None,
    samples: Sequence[Path] = (),
    prompts: int = _SHOWN,
) -> Path:
    """Write the page; InputError for a file that is none of its kind, before anything is drawn."""
    sections: list[report.Section] = []
    if judged_file is not None:
        sections += _of(judged_file, "llama2rt judge", judged.sections)
    if tasks is not None:
        scores = read_tasks(tasks)
        sections += judged.tasks(scores)
    if measured is not None:
        sections += _of(measured, "the stage evaluate", versions.sections)
    sections += judged.answers(_side_by_side(samples, prompts))
    if not sections:
        raise InputError("give --judged, --report, --tasks or --samples: there is nothing to show")
    return report.write(out, "Versions compared", sections)


def read_tasks(path: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """{version: {task: score}}, a score a number in [0, 1] or {mean, low, high}; InputError
    otherwise."""
    found = _read(path)
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for version, tasks in found.items():
        if not isinstance(tasks, Mapping):
            raise InputError(f"{path}: {version}: expected an object of scores by task")
        scores[version] = {}
        for task, given in tasks.items():
            value = given if isinstance(given, Mapping) else {"mean": given}
            known = {key: value.get(key) for key in ("mean", "low", "high")}
            numbers = [n for n in known.values() if n is not None]
            if known["mean"] is None or not all(_share(number) for number in numbers):
                raise InputError(
                    f"{path}: {version}.{task}: expected a number in [0, 1] or "
                    f"{{mean, low, high}}, got {json.dumps(given)[:60]}"
                )
            scores[version][task] = known
    return scores


def _share(number: Any) -> bool:
    return not isinstance(number, bool) and isinstance(number, int | float) and 0 <= number <= 1


def _of(
    path: Path, maker: str, draw: Callable[[Mapping[str, Any]], list[report.Section]]
) -> list[report.Section]:
    try:
        return draw(_read(path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not what {maker} writes ({error!r})") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = strict_json.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object")
    return found


def _side_by_side(samples: Sequence[Path], prompts: int) -> list[report.Answers]:
    """The first prompts that all versions answer, of each kind as many, so that none is missed."""
    if not samples:
        return []
    found = read_versions(samples)
    first = next(iter(found.values()))
    shared = [prompt for prompt in first if all(prompt in answers for answers in found.values())]
    if not shared:
        raise InputError("samples: no prompt is answered by all")
    by_kind: dict[str, list[str]] = {}
    for prompt in shared:
        by_kind.setdefault(first[prompt].kind, []).append(prompt)
    each = -(-prompts // len(by_kind))
    shown = [prompt for asked in by_kind.values() for prompt in asked[:each]]
    return [
        report.Answers(first[prompt].messages, {name: found[name][prompt].text for name in found})
        for prompt in shown
    ]


def command(
    out: tyro.conf.Positional[Path],
    *,
    judged: Path | None = None,
    report: Path | None = None,
    tasks: Path | None = None,
    samples: tuple[Path, ...] = (),
    prompts: int = _SHOWN,
) -> None:
    """One page about versions: who wins by which judge, tasks, length, KL against reward, answers.

    Args:
        out: The page, one HTML file.
        judged: judged.json of `llama2rt judge`.
        report: report.json of the stage evaluate: reward, length, KL, win rates.
        tasks: Scores in [0, 1] as JSON, {version: {task: score}}.
        samples: Files of samples, one a version, to show side by side.
        prompts: How many prompts to show of them.
    """
    if prompts < 1:
        raise InputError(f"prompts: expected at least 1, got {prompts}")
    written = page(
        out, judged_file=judged, measured=report, tasks=tasks, samples=samples, prompts=prompts
    )
    print(written)
