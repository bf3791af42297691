"""The model against published runs: how far off it is, run by run and group by group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama2rt.cluster import calibration
from llama2rt.cluster.rows import Row
from llama2rt.cluster.step_time import Constants
from llama2rt.cluster.workload import Layout, fits


@dataclass(frozen=True)
class Checked:
    """A published run and what the model says of it under `layout`, its cells and their defaults;
    error is predicted / published - 1."""

    row: Row
    layout: Layout
    predicted: float

    @property
    def error(self) -> float:
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
