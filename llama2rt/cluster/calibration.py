"""The constants of the step-time model, where they come from, and how to find them again.

Five are fitted to the calibration rows of data/published_runs.csv, all rows at once; the others
are published measurements. `fit` repeats the fit. `leave_one_group_out` gives the model's errors on
groups of runs that the fit has not seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from llama2rt.cluster.step_time import Constants
from llama2rt.errors import InputError

if TYPE_CHECKING:
    from llama2rt.cluster.rows import Row

# Before the fit, with the relative width that the sources allow.
# - products: 267.9 of 312 TFLOP/s is the best of any shape on an A100 (stas00/ml-engineering,
#   "Maximum Achievable Matmul FLOPS"), a model's shapes reach less.
# - traffic: 1 is a stack that fuses everything which can be fused.
# - a GPU's own NIC and overlap: nothing published; wide.
PRIOR = {
    "gemm_share_of_peak": (0.80, 0.05),
    "traffic_2021": (1.3, 0.5),
    "traffic_2023": (1.3, 0.5),
    "gathered_share_of_nic": (0.78, 0.3),
    "overlap_2021": (0.6, 0.3),
}
_BOUNDS = {
    "gemm_share_of_peak": (0.3, 1.0),
    "traffic_2021": (1.0, 8.0),
    "traffic_2023": (1.0, 8.0),
    "gathered_share_of_nic": (0.2, 1.0),
    "overlap_2021": (0.05, 1.0),
}
# Not fitted.
# - overlap: FSDP gathers the next block while one is computed; the first cannot be hidden.
# - speed_spread: GPUs of one node differ by up to 5 % in speed; a step averages over its kernels.
START = Constants(
    **{name: value for name, (value, _) in PRIOR.items()},
    overlap_2023=0.9,
    speed_spread=0.005,
)
# `fit(published calibration rows)`; tests/cluster/test_validation.py repeats it.
FITTED = replace(
    START,
    gemm_share_of_peak=0.805,
    traffic_2021=1.238,
    traffic_2023=1.0,
    gathered_share_of_nic=0.771,
    overlap_2021=0.584,
)
# Of a step's predicted time: tuned benchmarks lie within 12 %, production runs on other software
# take up to a quarter longer (data/published_runs.csv, group "production").
FASTER, SLOWER = 0.12, 0.26

_PRIOR_WEIGHT = 0.02  # a prior pulls as hard as one row that is off by 2 %
_ROBUST_ABOVE = 0.08  # rows off by more pull linearly, not quadratically


@dataclass(frozen=True)
class HeldOut:
    """A group that was left out of the fit, and how far the prediction was off."""

    group: str
    rows: int
    mean_error: float
    max_error: float


def fit(rows: Sequence["Row"]) -> Constants:
    """Constants that fit `rows` best: least squares on log errors, held by the priors.

    InputError where scipy is not installed.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise InputError("fitting needs scipy: pip install scipy") from None
    names = list(PRIOR)
    residual = _residual(rows, names)
    found = least_squares(
        residual,
        [PRIOR[name][0] for name in names],
        bounds=tuple(zip(*(_BOUNDS[name] for name in names), strict=True)),
        loss="soft_l1",
        f_scale=_ROBUST_ABOVE,
    )
    return _with(names, found.x)


def leave_one_group_out(rows: Sequence["Row"]) -> list[HeldOut]:
    """For each group of rows: its errors under constants fitted to all the others."""
    results = []
    for group in dict.fromkeys(row.group for row in rows):
        constants = fit([row for row in rows if row.group != group])
        errors = [abs(row.error(constants)) for row in rows if row.group == group]
        results.append(HeldOut(group, len(errors), float(np.mean(errors)), max(errors)))
    return results


def _residual(rows: Sequence["Row"], names: list[str]) -> Callable[[np.ndarray], np.ndarray]:
    def residual(values: np.ndarray) -> np.ndarray:
        constants = _with(names, values)
        misses = [np.log1p(row.error(constants)) for row in rows]
        pulls = [
            _PRIOR_WEIGHT * np.log(value / PRIOR[name][0]) / PRIOR[name][1]
            for name, value in zip(names, values, strict=True)
        ]
        return np.array([*misses, *pulls])

    return residual


def _with(names: list[str], values: Sequence[float] | np.ndarray) -> Constants:
    known = {field.name for field in fields(Constants)}
    assert set(names) <= known
    return replace(START, **{n: float(v) for n, v in zip(names, values, strict=True)})
