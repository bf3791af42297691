"""RewardBench's weighting beside the `rewardbench` package's own, on the same accuracies.

    pip download rewardbench==0.1.4 --no-deps -d build/rewardbench
    python3 -m zipfile -e build/rewardbench/rewardbench-0.1.4-py3-none-any.whl build/rewardbench
    python -P benchmarks/preferences/rewardbench_weighting.py build/rewardbench

runs the package's `calculate_scores_per_section` and, for the overall score with the prior sets,
its `get_average_over_rewardbench`, on made accuracies and on random ones of which some subsets are
missing, and prints the largest difference and the worked example that
tests/evaluate/test_rewardbench.py keeps. The libraries that the package imports beside these
functions (fastchat, its models) are not needed, and stand-ins are imported in their place.
"""

import argparse
import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from llama2rt.evaluate.rewardbench import weighting

DRAWS = 500


def package(folder: Path) -> tuple[Any, Any, Any]:
    """The package's constants, its function of sections, and that of the overall score."""
    sys.path.insert(0, str(folder))
    for name in ("rewardbench", "analysis"):  # without what their __init__ imports
        module = ModuleType(name)
        module.__path__ = [str(folder / name)]
        sys.modules[name] = module
    for name in ("fastchat", "fastchat.conversation", "rewardbench.models"):
        sys.modules[name] = MagicMock()
    constants = importlib.import_module("rewardbench.constants")
    sections = importlib.import_module("rewardbench.utils").calculate_scores_per_section
    overall = importlib.import_module("analysis.get_benchmark_results")
    return constants, sections, overall.get_average_over_rewardbench


def example() -> dict[str, float]:
    """Accuracies that differ from subset to subset."""
    names = [*sorted(weighting.CORE), *weighting.PRIOR]
    return {name: (37 * i % 101) / 101 for i, name in enumerate(names, start=1)}


def theirs(functions: tuple[Any, Any, Any], accuracy: dict[str, float]) -> dict[str, float]:
    import pandas

    constants, sections, overall = functions
    core = {name: value for name, value in accuracy.items() if name in weighting.CORE}
    prior = {name: accuracy.get(name, float("nan")) for name in weighting.PRIOR}
    found = sections(constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, core)
    about = {"model": "m", "model_type": "Seq. Classifier"}
    frame = pandas.DataFrame([{**about, **core}])
    priors = pandas.DataFrame([{**about, **prior}])
    return {**found, "score": float(overall(frame, priors)["average"].iloc[0])}


def ours(accuracy: dict[str, float]) -> dict[str, float]:
    score = weighting.overall_score(accuracy)
    assert score is not None
    return {**weighting.section_scores(accuracy), "score": score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the unpacked wheel")
    functions = package(parser.parse_args().folder)
    drawn = random.Random(0)
    worst = 0.0
    tables = [example()]
    for _ in range(DRAWS):
        # At least one subset of each section, and any of the prior sets, also none.
        kept = {
            name for section in weighting.SECTIONS.values() for name in [drawn.choice([*section])]
        }
        kept |= {name for name in [*weighting.CORE, *weighting.PRIOR] if drawn.random() < 0.7}
        tables.append({name: drawn.random() for name in sorted(kept)})
    for table in tables:
        mine, own = ours(table), theirs(functions, table)
        assert mine.keys() == own.keys(), (mine, own)
        worst = max(worst, *(abs(mine[name] - own[name]) for name in own))
    print(json.dumps({"tables": len(tables), "largest_difference": worst}))
    print(json.dumps({"example": example(), "rewardbench": theirs(functions, example())}, indent=1))


if __name__ == "__main__":
    main()
