"""The model against published runs: how far off it is, run by run and group by group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama2rt.cluster import calibration
from llama2rt.cluster.output import table
from llama2rt.cluster.rows import Row
from llama2rt.cluster.step_time import Constants
from llama2rt.cluster.workload import Layout, fits


@dataclass(frozen=True)
class Checked:
    """A published run and what the model predicts for it under `layout`."""

    row: Row
    layout: Layout
    predicted: float

    @property
    def error(self) -> float:
        """predicted / published - 1"""
        return self.predicted / self.row.published - 1

    def as_json(self) -> dict[str, object]:
        row = self.row
        layout = self.layout
        return {
            "model": row.shape.name,
            "gpus": row.cluster.gpus,
            "gpu": row.cluster.gpu.name,
            "seq": layout.seq,
            "layout": {**vars(layout)},
            "fits": fits(row.shape, layout, row.cluster),
            "metric": row.metric,
            "published": row.published,
            "predicted": self.predicted,
            "error": self.error,
            "split": row.split,
            "group": row.group,
            "source": row.source,
            "where": row.where,
        }


def check(rows: Sequence[Row], constants: Constants = calibration.FITTED) -> list[Checked]:
    """Every row with its prediction, under one set of constants."""
    checked = []
    for row in rows:
        layout, seconds = row.fastest(constants)
        checked.append(Checked(row, layout, row.quantity(layout, seconds)))
    return checked


def errors(checked: Sequence[Checked]) -> dict[str, float]:
    """Mean and largest absolute error of some rows; there must be at least one."""
    sizes = np.abs([item.error for item in checked])
    return {"mean_error": float(sizes.mean()), "max_error": float(sizes.max())}


def by_group(checked: Sequence[Checked]) -> dict[str, dict[str, float]]:
    """Errors of each group, in the order of the file."""
    groups: dict[str, list[Checked]] = {}
    for item in checked:
        groups.setdefault(item.row.group, []).append(item)
    return {
        group: {
            "rows": len(items),
            "bias": float(np.mean([item.error for item in items])),
            **errors(items),
        }
        for group, items in groups.items()
    }


def as_json(checked: Sequence[Checked]) -> dict[str, object]:
    """Rows, errors and groups, as `validate --json` prints them."""
    return {
        "rows": [item.as_json() for item in checked],
        **errors(checked),
        "groups": by_group(checked),
    }


def print_tables(title: str, checked: Sequence[Checked]) -> None:
    """One table of the rows and one of the groups."""
    units = {
        "tokens_per_s_per_gpu": "tokens/s/GPU",
        "tflops_per_gpu": "TFLOP/s/GPU",
        "step_seconds": "s a step",
    }
    found = errors(checked)
    table(
        f"{title}: mean error {found['mean_error']:.1%}, worst {found['max_error']:.1%}",
        ("group", "model", "GPUs", "GPU", "published", "predicted", "unit", "error"),
        [
            (
                item.row.group,
                item.row.shape.name,
                str(item.row.cluster.gpus),
                item.row.cluster.gpu.name,
                f"{item.row.published:,.4g}",
                f"{item.predicted:,.4g}",
                units[item.row.metric],
                f"{100 * item.error:+.1f} %",
            )
            for item in checked
        ],
    )
    table(
        "By group",
        ("group", "rows", "mean error", "worst", "bias"),
        [
            (
                group,
                f"{numbers['rows']:.0f}",
                f"{numbers['mean_error']:.1%}",
                f"{numbers['max_error']:.1%}",
                f"{100 * numbers['bias']:+.1f} %",
            )
            for group, numbers in by_group(checked).items()
        ],
    )
