"""A model's run over loaded tasks, and the files of the harness that it leaves.

`results_*.json` and `samples_TASK_*.jsonl` are written by lm-eval's own tracker, so that whatever
reads its files reads these.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama2rt.checkpoint import load
from llama2rt.errors import InputError
from llama2rt.evaluate.calibration import expected_error
from llama2rt.evaluate.harness.tasks import SEED, Tasks
from llama2rt.evaluate.intervals import bootstrap, wilson
from llama2rt.model import Llama

logger = logging.getLogger("llama2rt.evaluate.harness")

# The metric that a table shows of a task that has several: the first of these, or its own first.
_SHOWN = ("exact_match", "acc", "pass@1", "f1", "word_perplexity")


@dataclass(frozen=True)
class RunOptions:
    """How tasks are asked."""

    limit: int | None = None
    """documents of each task, the first ones"""
    chat: bool = False
    """each prompt as a dialogue in the model's chat format"""
    system: str | None = None
    """system message of these dialogues"""
    add_bos_token: bool = True
    run_unsafe_code: bool = False
    micro_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("micro_tokens", self.micro_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        if self.system is not None and not self.chat:
            raise InputError("system: a system message needs --chat")


def require_language_model(folder: Path) -> None:
    """InputError unless `folder` holds a language model and its tokenizer; reads no weights."""
    model, tokenizer = load(folder, "meta")
    if not isinstance(model, Llama):
        raise InputError(f"{folder}: expected a language model, found a reward model")
    if tokenizer is None:
        raise InputError(f"{folder}: holds no tokenizer")


def run_tasks(folder: Path, tasks: Tasks, options: RunOptions, out: Path | None) -> dict[str, Any]:
    """The harness's results of the model in `folder`: `results`, `samples` and the rest of its own
    dictionary. With `out` its files are written below it, in a folder of the model's name."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.loggers.utils import add_env_info

    from llama2rt.evaluate.harness.model import HarnessModel

    tracker = EvaluationTracker(output_path=None if out is None else str(out))
    model, tokenizer = load(folder, "cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(model, Llama) and tokenizer is not None
    lm = HarnessModel(
        model,
        tokenizer,
        micro_tokens=options.micro_tokens,
        add_bos_token=options.add_bos_token,
        chat=options.chat,
        seed=options.seed,
    )
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # each model gets the same shots
    tracker.general_config_tracker.log_experiment_args(
        model_source="llama2rt",
        model_args={"path": str(folder)},
        system_instruction=options.system,
        chat_template=lm.chat_template(options.chat),
        fewshot_as_multiturn=options.chat,
    )
    results: dict[str, Any] = lm_eval.evaluate(
        lm,
        tasks.loaded,
        limit=options.limit,
        system_instruction=options.system,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
        confirm_run_unsafe_code=options.run_unsafe_code,
    )
    results["config"] = {
        "model": "llama2rt",
        "model_args": {"path": str(folder)},
        **lm.get_model_info(),
        "limit": options.limit,
        "fewshot_seed": SEED,
        "seed": options.seed,
    }
    results["date"] = time.time()
    add_env_info(results)
    if out is not None:
        _write(tracker, results, out)
    return results


def _write(tracker: Any, results: dict[str, Any], out: Path) -> None:
    """By the tracker, which only warns of what it cannot write; so the files are looked for."""
    samples = results["samples"]
    tracker.save_results_aggregated(
        results={key: value for key, value in results.items() if key != "samples"}, samples=samples
    )
    for task, rows in samples.items():
        # It rewrites the rows that it is given, which the tables still need.
        tracker.save_results_samples(task_name=task, samples=[dict(row) for row in rows])
    folder = out / str(tracker.general_config_tracker.model_name_sanitized)
    date = getattr(tracker, "date_id", "")
    wanted = [f"results_{date}.json", *(f"samples_{task}_{date}.jsonl" for task in samples)]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise OSError(f"{folder}: lm-eval could not write {', '.join(missing)}")
    logger.info("%s: %d files", folder, len(wanted))


def summary(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each task's shown metric: `metric`, `filter`, `shots`, `samples`, `value` (the harness's own
    figure), its 95 % interval `low`, `high` where it is a mean over documents, `values` (each
    document's, by its number) and, of questions with options, the `calibration` error."""
    return {
        task: _of_task(task, rows, results) for task, rows in results["samples"].items() if rows
    }


def _of_task(task: str, rows: list[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    metrics = rows[0]["metrics"]
    metric = next((name for name in _SHOWN if name in metrics), metrics[0])
    by = rows[0]["filter"]
    own = {row["doc_id"]: row for row in rows if row["filter"] == by}
    found: dict[str, Any] = {
        "metric": metric,
        "filter": by,
        "shots": results["n-shot"].get(task),
        "samples": len(own),
        "value": results["results"][task][f"{metric},{by}"],
        "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
    }
    values = {number: row[metric] for number, row in own.items()}
    if all(isinstance(value, bool | int | float | np.number) for value in values.values()):
        numbers = np.array(list(values.values()), np.float64)
        if np.isclose(numbers.mean(), found["value"]):
            found["values"] = {number: float(value) for number, value in values.items()}
            shares = np.isin(numbers, (0, 1)).all()
            interval = wilson(numbers.sum(), len(numbers)) if shares else bootstrap(numbers)
            found |= {"low": interval.low, "high": interval.high}
    if results["configs"][task].get("output_type") == "multiple_choice" and "acc" in metrics:
        found["calibration"] = _calibration(list(own.values()))
    return found


def _calibration(rows: list[dict[str, Any]]) -> float:
    """Expected calibration error of the chosen options: what the model gives them, of all options'
    probability, against how often they are right."""
    claims, right = [], []
    for row in rows:
        # Mutual information asks for each option without its question too, behind the others.
        count = len(row["resps"]) // (2 if "acc_mutual_info" in row["metrics"] else 1)
        options = np.array([answer[0] for answer in row["filtered_resps"][:count]], np.float64)
        likely = np.exp(options - options.max())
        claims.append(float(likely.max() / likely.sum()))
        right.append(bool(row["acc"]))
    return expected_error(claims, right)
