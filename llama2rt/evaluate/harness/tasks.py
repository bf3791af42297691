"""What is asked: the harness's tasks by name, task files of one's own, and the papers' lists.

Tasks are loaded with their data before any weights are, so that a data set that cannot be had ends
a run at once.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.errors import InputError

logger = logging.getLogger("llama2rt.evaluate.harness")

PAPERS: dict[str, dict[str, int | None]] = {
    # Llama 2, section 2.3 and appendix A.2; QuAC, which it has too, is not among lm-eval's tasks.
    "llama2": {
        "humaneval": 0,
        "mbpp": 3,
        "piqa": 0,
        "social_iqa": 0,
        "hellaswag": 0,
        "winogrande": 0,
        "arc_easy": 0,
        "arc_challenge": 0,
        "openbookqa": 0,
        "commonsense_qa": 7,
        "nq_open": 5,
        "triviaqa": 5,
        "squadv2": 0,
        "boolq": 0,
        "gsm8k": 8,
        "minerva_math": 4,
        "mmlu": 5,
        "bbh_cot_fewshot": 3,
        "agieval_en": 3,
        "truthfulqa_mc2": 0,
    },
    # RLHF Workflow, the table of academic benchmarks; ARC's shots are the Open LLM Leaderboard's.
    "rlhf-workflow": {
        "gsm8k": 8,
        "mmlu": 5,
        "humaneval": 0,
        "truthfulqa_mc2": 0,
        "arc_challenge": 25,
        "mbpp": 3,
    },
}
"""tasks of lm-eval 0.4 by paper, with the shots"""

SEED = 1234
"""from which shots are drawn: the harness's default"""


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks, as `lm_eval.evaluate` takes them."""

    loaded: dict[str, Any]
    shots: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.loaded["tasks"])


def load_tasks(
    names: Sequence[str], shots: int | None = None, *, run_unsafe_code: bool = False
) -> Tasks:
    """Tasks by name (the harness's own tasks, groups and tags, and `PAPERS`), or paths of task
    files and of folders with them, with their data.

    `shots` for all that the lists of papers and the tasks themselves do not fix; 0 where nothing
    says. InputError where lm-eval is missing, for a name that is unknown, data that cannot be had,
    a task that is asked for twice, and one that runs a model's code without `run_unsafe_code`.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    wanted: dict[str, int | None] = {}
    for name in names:
        for task, own in (PAPERS.get(name) or dict.fromkeys(_paths(name), None)).items():
            if task in wanted:
                raise InputError(f"tasks: {task} twice")
            wanted[task] = own
    manager = TaskManager(include_defaults=not all(_is_file(name) for name in wanted))
    for name in wanted:
        entry = manager.task_index.get(name)
        if entry is not None and (entry.cfg or {}).get("unsafe_code"):
            _require_allowed(name, run_unsafe_code)
    random.seed(0)  # tasks may draw from either while they load
    np.random.seed(SEED)
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    found: dict[str, int] = {}
    for name, own in wanted.items():
        part = _load(manager, name)
        if twice := sorted(set(part["tasks"]) & set(merged["tasks"])):
            raise InputError(f"tasks: {', '.join(twice)} twice")
        for task_name, task in part["tasks"].items():
            found[task_name] = _set_shots(task, shots if own is None else own)
            if getattr(task, "UNSAFE_CODE", False):
                _require_allowed(task_name, run_unsafe_code)
        for key in merged:
            merged[key] |= part.get(key) or {}
    return Tasks(merged, found)


def _require_allowed(name: str, run_unsafe_code: bool) -> None:
    if not run_unsafe_code:
        raise InputError(f"{name}: runs code that the model writes; --run-unsafe-code allows it")


def require_harness() -> None:
    """InputError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"tasks need lm-eval, of which {error.name} is not installed: "
            "pip install 'llama2rt[lm-eval]'"
        ) from None


def _paths(name: str) -> list[str]:
    """A task's name, or of a folder the task files in it."""
    path = Path(name)
    if not path.is_dir():
        return [name]
    files = sorted(str(file) for file in path.glob("*.yaml"))
    if not files:
        raise InputError(f"{name}: a folder without task files (*.yaml)")
    return files


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager: Any, name: str) -> dict[str, Any]:
    if _is_file(name) and not Path(name).is_file():
        raise InputError(f"{name}: no such task file")
    if not _is_file(name) and name not in manager.task_index:
        raise InputError(
            f"{name}: not a task of the installed lm-eval, nor a task file or folder; lists: "
            f"{', '.join(PAPERS)}"
        )
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # whatever the libraries of data sets raise: there is no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{name}: cannot be loaded ({type(error).__name__}: {reason}); without a network, a "
            "task file that names local data_files can be given instead of a name"
        ) from error
    return loaded


def _set_shots(task: Any, wanted: int | None) -> int:
    """Sets a task's shots and how they are drawn, as the harness's `simple_evaluate` does: a task
    that fixes 0 keeps it."""
    own = task.get_config("num_fewshot")
    shots = own if own == 0 or wanted is None else wanted
    if own == 0 and wanted:
        logger.warning("%s: fixes 0 shots, which stay", task.config.task)
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=SEED)
    return shots or 0
