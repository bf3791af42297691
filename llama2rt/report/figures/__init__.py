"""Figures about models and versions: what the reward models know and what RLHF changed.

Each function takes plain numbers (`report` may not import the packages that compute them) and
gives a `Plot`. An estimate arrives as (mean, low, high). Where there is nothing to draw, the
figure says so: a run that has not got that far yet still has a report.
"""

from llama2rt.report.figures.marks import Estimate
from llama2rt.report.figures.policies import best_of_n, temperatures, versions, win_matrix
from llama2rt.report.figures.reward_models import (
    accuracy_by_rating,
    length_correlation,
    reward_distribution,
)

__all__ = [
    "Estimate",
    "accuracy_by_rating",
    "best_of_n",
    "length_correlation",
    "reward_distribution",
    "temperatures",
    "versions",
    "win_matrix",
]
