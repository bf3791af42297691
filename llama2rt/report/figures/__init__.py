"""Figures about models and versions: what the reward models know and what RLHF changed.

Each function takes plain numbers (`report` may not import the packages that compute them) and
gives a `Plot`. An estimate arrives as (mean, low, high). Where there is nothing to draw, the
figure says so: a run that has not got that far yet still has a report.
"""

from llama2rt.report.figures.comparisons import (
    accuracy_by_data,
    accuracy_by_source,
    calibration,
    drift,
)
from llama2rt.report.figures.instructions import attention_by_turn, attention_maps, recall
from llama2rt.report.figures.judges import radar, two_sides
from llama2rt.report.figures.marks import Estimate
from llama2rt.report.figures.policies import best_of_n, temperatures, versions, win_matrix
from llama2rt.report.figures.progress import Panel, by_version, reward_against_judge, reward_by_kl
from llama2rt.report.figures.reward_models import (
    accuracy_by_rating,
    length_correlation,
    reward_distribution,
)

__all__ = [
    "Estimate",
    "Panel",
    "accuracy_by_data",
    "accuracy_by_rating",
    "accuracy_by_source",
    "attention_by_turn",
    "attention_maps",
    "best_of_n",
    "by_version",
    "calibration",
    "drift",
    "length_correlation",
    "radar",
    "recall",
    "reward_against_judge",
    "reward_by_kl",
    "reward_distribution",
    "temperatures",
    "two_sides",
    "versions",
    "win_matrix",
]
