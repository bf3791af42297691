"""The subcommands of `llama2rt cluster` that time whole training steps: search, compare, validate.

They print tables, or one JSON object with --json. An InputError names the option that is wrong.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from llama2rt.cluster import calibration, figures, hardware, power_curve, prediction
from llama2rt.cluster import compare as comparison
from llama2rt.cluster import rows as published_rows
from llama2rt.cluster import search as layout_search
from llama2rt.cluster import validate as validation
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.options import Figure, Json
from llama2rt.cluster.output import print_json, ranged, table
from llama2rt.errors import InputError

_MODELS = ("llama2-7b", "llama2-13b", "llama2-34b", "llama2-70b")
_SIZES = (8, 64, 512, 2048, 100_000)


def search(
    *,
    model: str = "llama2-70b",
    gpus: int = 2048,
    gpu: str = "a100-80gb",
    fabric: str = "ib",
    watts: float | None = None,
    seq: int = 4096,
    global_batch: int | None = None,
    tokens: float = 2e12,
    keep: int = 5,
    as_json: Json = False,
) -> None:
    """The fastest layouts of a model on a cluster that fit into memory, and what training costs.

    Args:
        model: A preset, such as llama2-70b.
        gpus: GPUs in the cluster.
        gpu: a100-40gb, a100-80gb, h100 or h200.
        fabric: nvlink (one node), ib or roce.
        watts: Power cap; by default the GPU's largest.
        seq: Tokens in a sequence.
        global_batch: Sequences a step; by default about 4M tokens.
        tokens: Tokens of the whole training.
        keep: Layouts to show.
    """
    for name, value in (("seq", seq), ("keep", keep), ("global-batch", global_batch)):
        if value is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, got {value}")
    if not 0 < tokens < float("inf"):
        raise InputError(f"--tokens: expected a positive number, got {tokens:g}")
    shape, cluster = prediction.preset(model), _cluster(gpu, gpus, fabric, watts)
    batch = global_batch or max(1, prediction.global_batch(gpus) * 4096 // seq)
    found = [
        prediction.predict(shape, candidate.layout, cluster, tokens)
        for candidate in layout_search.search(shape, cluster, seq, batch, keep=keep)
    ]
    if as_json:
        print_json(
            {
                "model": model,
                "gpus": gpus,
                "tokens": tokens,
                "layouts": [one.as_json() for one in found],
            }
        )
        return
    _print_layouts(f"{model} on {gpus} {gpu}", cluster, found, tokens)


def _print_layouts(
    subject: str, cluster: Cluster, found: list[prediction.Prediction], tokens: float
) -> None:
    best = found[0]
    table(
        f"{subject}, {cluster.fabric.name}, {cluster.watts:g} W: fastest layouts",
        (
            "tp",
            "pp",
            "cp",
            "dp",
            "sharding",
            "micro",
            "recompute",
            "step (s)",
            "tokens/s/GPU",
            "MFU",
            "GB/GPU",
        ),
        [
            (
                str(one.layout.tp),
                f"{one.layout.pp}" + (f" x{one.layout.interleave}" * (one.layout.pp > 1)),
                str(one.layout.cp),
                str(one.layout.dp),
                one.layout.sharding,
                str(one.layout.micro_batch),
                one.layout.recompute,
                ranged(one.step_seconds, 2),
                ranged(one.tokens_per_s_per_gpu, 0),
                f"{one.model_flops_utilisation.value:.0%}",
                f"{one.memory_bytes.value / 1e9:.0f}",
            )
            for one in found
        ],
        f"{tokens:.3g} tokens with the first: {ranged(best.gpu_hours, 0)} GPU hours, "
        f"{ranged(best.energy_kwh.times(1e-3), 0)} MWh, {ranged(best.tco2eq, 0)} tCO2eq. "
        f"Times: {best.step_seconds.provenance}.",
    )


def compare(
    *,
    model: str | None = None,
    gpus: int | None = None,
    gpu: str = "a100-80gb",
    fabrics: tuple[str, str] = ("ib", "roce"),
    watts: tuple[float, float] | None = None,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Two clusters on the same work: InfiniBand at 400 W against RoCE at 350 W, and the reasons.

    Without --model and --gpus: 7B to 70B on 8 to 100,000 GPUs. With both: one case in full.

    Args:
        model: A preset, such as llama2-70b.
        gpus: GPUs in each cluster.
        gpu: a100-40gb, a100-80gb, h100 or h200.
        fabrics: The first and the second fabric: ib or roce.
        watts: Their power caps; by default the GPU's largest and 7/8 of it, as 400 and 350 W are.
        figure: Draw what the gap is made of (needs --model and --gpus).
    """
    figures.check_path(figure)
    if figure is not None and (model is None or gpus is None):
        raise InputError("--figure: draws one case; give --model and --gpus")
    if watts is None:
        largest = hardware.gpu(gpu).max_watts
        watts = (largest, 7 / 8 * largest)
    cases = [
        _case(name, [_cluster(gpu, count, fabrics[i], watts[i]) for i in (0, 1)])
        for name in ([model] if model is not None else _MODELS)
        for count in ([gpus] if gpus is not None else _SIZES)
    ]
    if len(cases) == 1 and cases[0].found is None:
        raise layout_search.NoLayout(cases[0].reason)
    single = cases[0].found if len(cases) == 1 else None
    if figure is not None and single is not None:
        figures.waterfall(single, cases[0].model, figure)
    if as_json and single is not None:
        print_json({"model": cases[0].model, **single.as_json()})
    elif as_json:
        print_json({"cases": [case.as_json() for case in cases]})
    else:
        _print_cases(
            f"{fabrics[1]} {watts[1]:g} W over {fabrics[0]} {watts[0]:g} W on {gpu}", cases
        )


class _Case(NamedTuple):
    """One line of the table: a model on both clusters."""

    model: str
    gpus: int
    found: comparison.Comparison | None
    """None where no layout fits"""
    reason: str
    """why none fits"""

    def as_json(self) -> dict[str, object]:
        numbers = self.found.as_json() if self.found else {"ratio": None, "reason": self.reason}
        return {"model": self.model, "gpus": self.gpus, **numbers}


def _case(model: str, clusters: Sequence[Cluster]) -> _Case:
    shape, (first, second) = prediction.preset(model), clusters
    try:
        return _Case(model, first.gpus, comparison.compare(shape, first, second), "")
    except layout_search.NoLayout as error:
        return _Case(model, first.gpus, None, str(error))


def _print_cases(clusters: str, cases: Sequence[_Case]) -> None:
    causes = (*comparison.CAUSES, "residual")
    table(
        f"{clusters}: share of throughput that is left, and what takes the rest",
        ("model", "GPUs", "ratio", "own layouts", *causes),
        [
            (
                case.model,
                f"{case.gpus}",
                ranged(c.ratio, 3) if c else "no layout fits",
                f"{c.own_layouts:.3f}" if c else "",
                *(f"{100 * c.waterfall[cause]:+.1f} %" if c else "" for cause in causes),
            )
            for case in cases
            for c in (case.found,)
        ],
        f"Published: about {comparison.PUBLISHED_RATIO:.0%} ({comparison.PUBLISHED_WHERE}). "
        f"{power_curve.NO_SWEEP}",
    )


def validate(
    *,
    rows: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None,
    cross_validate: bool = False,
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Predicted against published training runs, under one set of constants.

    Without --rows: the shipped runs. Calibration rows are those the constants were fitted to;
    held-out rows were never fitted. docs/cluster-validation.md explains columns and empty cells.

    Args:
        rows: Your own rows instead, as CSV.
        cross_validate: Also fit without each group and predict it (needs scipy).
        figure: Draw predicted over published.
    """
    figures.check_path(figure)
    if rows is not None and cross_validate:
        raise InputError("--cross-validate: works on the shipped calibration rows, not on --rows")
    given = published_rows.read_file(rows) if rows is not None else published_rows.published()
    checked = validation.check(given)
    main, held_out = checked, []
    if rows is None:
        main = [item for item in checked if item.row.split == "calibration"]
        held_out = [item for item in checked if item.row.split != "calibration"]
    left_out = (
        calibration.leave_one_group_out([item.row for item in main]) if cross_validate else []
    )
    if figure is not None:
        figures.parity(checked, figure)
    if as_json:
        result = validation.as_json(main)
        if held_out:
            result["held_out"] = validation.as_json(held_out)
        if left_out:
            result["leave_one_group_out"] = [vars(group) for group in left_out]
        print_json({**result, "constants": vars(calibration.FITTED)})
        return
    validation.print_tables("Published runs" if rows is not None else "Calibration rows", main)
    if held_out:
        validation.print_tables("Held-out rows (never fitted)", held_out)
    if left_out:
        table(
            "Each calibration group under constants fitted to the others",
            ("group", "rows", "mean error", "worst"),
            [(g.group, str(g.rows), f"{g.mean_error:.1%}", f"{g.max_error:.1%}") for g in left_out],
        )


def _cluster(gpu: str, gpus: int, fabric: str, watts: float | None) -> Cluster:
    chip = hardware.gpu(gpu)
    return Cluster(chip, gpus, hardware.fabric(fabric), chip.max_watts if watts is None else watts)
