"""What the reward models' losses are worth: the first ones trained again without a margin and with
the large one (Llama 2, Table 28), and without the safety classification loss (Table 29)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2rt import report
from llama2rt.pipeline import study
from llama2rt.pipeline.run import Clock
from llama2rt.pipeline.study import StudyRecipe
from llama2rt.quickstart.recipe import QuickstartRecipe
from llama2rt.report import studies as tables

# Title in the report -> folder.
FOLDERS = {"Margins": "study-margins", "Safety loss": "study-safety-loss"}


def recipes(recipe: QuickstartRecipe, directory: Path) -> dict[str, StudyRecipe]:
    """By title. What the job has trained already is measured, the rest trained as it was: the
    reward models of the first batch, because those of all batches take a multiple of the time."""
    helpfulness = directory / "reward-helpfulness-1"
    safety = directory / "reward-safety-1"
    models: dict[str, tuple[Path, list[dict[str, Any]]]] = {
        "Margins": (
            helpfulness,
            [
                {"name": "no margin", "margin": "none"},
                {"name": "small margin", "trained": helpfulness / "model"},
                {"name": "large margin", "margin": "large"},
            ],
        ),
        "Safety loss": (
            safety,
            [
                {"name": "ranking alone", "safety_coefficient": 0.0},
                {"name": "ranking and classification", "trained": safety / "model"},
            ],
        ),
    }
    return {
        title: StudyRecipe(like=like, models=compared, seeds=[recipe.seed])
        for title, (like, compared) in models.items()
    }


def run(recipe: QuickstartRecipe, directory: Path, clock: Clock) -> None:
    """Both, or what is left of them."""
    for title, asked in recipes(recipe, directory).items():
        folder = FOLDERS[title]
        with clock.phase(folder, f"the reward model's {title.lower()} compared"):
            study.run(asked, directory / folder, resume=True)


def sections(numbers: Mapping[str, Any]) -> list[report.Section]:
    """Their tables. `numbers`: of each study, by title."""
    return [
        replace(section, title=f"{title}: {section.title.removeprefix('Test set: ')}")
        for title, of_study in numbers.items()
        for section in tables.sections(of_study, drawn=False)
    ]
