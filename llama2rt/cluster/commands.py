"""The model's subcommands of `llama2rt cluster`: numbers to stdout as tables or one JSON object.

Arguments become options; what is wrong with one is an InputError that names it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from llama2rt.cluster import (
    calibration,
    collectives,
    congestion,
    figures,
    hardware,
    power_curve,
    prediction,
)
from llama2rt.cluster import (
    carbon as carbon_model,
)
from llama2rt.cluster import (
    compare as comparison,
)
from llama2rt.cluster import (
    rows as published_rows,
)
from llama2rt.cluster import (
    search as layout_search,
)
from llama2rt.cluster import (
    validate as validation,
)
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.output import or_else, print_json, ranged, table
from llama2rt.cluster.sizes import parse_bytes
from llama2rt.errors import InputError

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print one JSON object.")]
Figure = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
_MODELS = ("llama2-7b", "llama2-13b", "llama2-34b", "llama2-70b")
_SIZES = (8, 64, 512, 2048, 100_000)


def carbon(
    *,
    model: str = "run",
    gpu_hours: float | None = None,
    watts: float | None = None,
    measured_kwh: float | None = None,
    as_json: Json = False,
) -> None:
    """Carbon of training: Table 2 of the Llama 2 paper, or the same for a run of yours.

    Three figures stand side by side: the paper's method (GPU hours x power limit x PUE 1.1 x
    0.385 kg/kWh, cut to two decimals as the paper prints it), the same with the host's power, and
    measured energy. Without --gpu-hours: the paper's four models.

    Args:
        model: Name of your run.
        gpu_hours: GPU hours of your run.
        watts: Power limit of its GPUs, in watts.
        measured_kwh: Energy that a meter saw its GPUs use; left out: "not measured".
    """
    if (gpu_hours is None) != (watts is None):
        raise InputError("--gpu-hours and --watts: give both, or neither for the paper's table")
    if gpu_hours is None or watts is None:
        if measured_kwh is not None:
            raise InputError("--measured-kwh: needs the run's --gpu-hours and --watts")
        runs: Sequence[carbon_model.Run] = carbon_model.LLAMA2
    else:
        runs = [carbon_model.Run(model, gpu_hours, watts, measured_kwh)]
    rows = [
        {
            "model": run.model,
            "gpu_hours": run.gpu_hours,
            "watts": run.watts,
            "tco2eq": float(carbon_model.floored(carbon_model.tco2eq(run))),
            "tco2eq_uncut": float(carbon_model.tco2eq(run)),
            "tco2eq_with_host": carbon_model.with_host(run).as_json(),
            "tco2eq_measured": carbon_model.measured(run),
        }
        for run in runs
    ]
    total = float(carbon_model.total(runs))
    if as_json:
        print_json({"method": carbon_model.METHOD, "rows": rows, "total_tco2eq": total})
        return
    table(
        f"Carbon: {carbon_model.METHOD}",
        ("model", "GPU hours", "W", "tCO2eq", "with host", "measured"),
        [
            (
                run.model,
                f"{run.gpu_hours:,.0f}" if run.gpu_hours >= 100 else f"{run.gpu_hours:g}",
                f"{run.watts:g}",
                f"{carbon_model.floored(carbon_model.tco2eq(run))}",
                ranged(carbon_model.with_host(run), 2),
                or_else(carbon_model.measured(run), "{:.2f}", "not measured"),
            )
            for run in runs
        ]
        + [("total", f"{sum(r.gpu_hours for r in runs):,.0f}", "", f"{total:.2f}", "", "")],
        "Cut to two decimals, not rounded; the total is cut once, from the uncut sum.",
    )


def collective(
    *,
    op: collectives.Operation = "all_reduce",
    gpus: int,
    size: Annotated[str, tyro.conf.arg(name="bytes", metavar="BYTES")],
    fabric: str = "ib",
    gpu: str = "a100-80gb",
    as_json: Json = False,
) -> None:
    """Time and bus bandwidth of one collective, by the cost model NCCL chooses algorithms with.

    Args:
        op: The collective.
        gpus: Ranks; more than 8 must be a multiple of 8.
        size: Buffer S of nccl-tests in bytes: 1048576, 64MiB, 8GiB.
        fabric: nvlink (one node), ib or roce.
        gpu: a100-40gb, a100-80gb, h100 or h200.
    """
    where, chip = collectives.group(gpus), hardware.gpu(gpu)
    net, total = hardware.fabric(fabric), parse_bytes(size)
    timing = collectives.time(op, total, chip, net, where)
    rate = total * collectives.bus_factor(op, gpus) / timing.seconds
    spread = collectives.RELATIVE_RANGE
    result = {
        "op": op,
        "gpus": gpus,
        "bytes": total,
        "fabric": net.name,
        "seconds": timing.seconds,
        "seconds_low": timing.seconds * (1 - spread),
        "seconds_high": timing.seconds * (1 + spread),
        "bus_bandwidth_bytes_per_s": rate,
        "algorithm": timing.algorithm,
        "protocol": timing.protocol,
        "provenance": collectives.PROVENANCE,
    }
    if as_json:
        print_json(result)
        return
    chosen = (timing.algorithm, timing.protocol)
    table(
        f"{op} of {total:,} bytes over {gpus} {gpu} on {net.name}: {timing.seconds * 1e6:,.1f} us "
        f"(within {spread:.0%}), bus bandwidth {rate / 1e9:.1f} GB/s",
        ("algorithm", "protocol", "NCCL expects (us)", ""),
        [
            (o.algorithm, o.protocol, f"{o.seconds * 1e6:,.1f}", "chosen" if picked else "")
            for o in collectives.options(op, total, chip, net, where)
            for picked in ((o.algorithm, o.protocol) == chosen,)
        ],
        collectives.PROVENANCE,
    )


def ecmp(*, flows: int, uplinks: int, hosts: int = 16, as_json: Json = False) -> None:
    """What ECMP hashing leaves of a rack's bandwidth when flows collide on uplinks.

    Args:
        flows: Queue pairs that each host keeps busy.
        uplinks: Uplinks of the rack, each as fast as a host's NIC.
        hosts: Hosts in the rack.
    """
    left = congestion.efficiency(flows, uplinks, hosts)
    fullest = congestion.expected_fullest(flows * hosts, uplinks)
    if as_json:
        print_json(
            {
                "flows": flows,
                "uplinks": uplinks,
                "hosts": hosts,
                "efficiency": left,
                "expected_fullest_uplink": fullest,
            }
        )
        return
    print(
        f"{hosts} hosts x {flows} flows on {uplinks} uplinks: the fullest carries {fullest:.2f} "
        f"flows, {left:.1%} of the line rate is left"
    )


def power(
    *,
    workload: power_curve.Workload = "matmul",
    watts: float = 350.0,
    gpu: str = "a100-80gb",
    figure: Figure = None,
    as_json: Json = False,
) -> None:
    """Throughput under a power cap, by a curve fitted to published results; nothing is measured.

    Args:
        workload: Matrix-bound, mixed or memory-bound work.
        watts: The cap, in watts.
        gpu: a100-40gb, a100-80gb, h100 or h200.
        figure: Also draw throughput and energy per token against the cap.
    """
    figures.check_path(figure)
    chip = hardware.gpu(gpu)
    if figure is not None and not chip.name.startswith("a100"):
        raise InputError(f"--figure: draws an A100's curves, got --gpu {chip.name}")
    relative = power_curve.relative_throughput(workload, watts, chip)
    if figure is not None:
        figures.caps(figure)
    if as_json:
        print_json(
            {
                "workload": workload,
                "watts": watts,
                "gpu": gpu,
                "relative_throughput": relative.value,
                "low": relative.low,
                "high": relative.high,
                "provenance": relative.provenance,
                "note": power_curve.NO_SWEEP,
            }
        )
        return
    caps = sorted({watts, *(c for c in (400.0, 350.0, 300.0, 250.0) if c <= chip.max_watts)})
    table(
        f"{workload} work on {gpu}: {relative.provenance}",
        ("cap (W)", "throughput", "range", "drawn (W)", "energy per token"),
        [
            (
                f"{cap:g}",
                f"{speed.value:.1%}",
                f"{speed.low:.1%}-{speed.high:.1%}",
                f"{drawn:.0f}",
                f"{drawn / speed.value / full:.1%}",
            )
            for full in (power_curve.draw_watts(workload, chip.max_watts, chip),)
            for cap in caps
            for speed in (power_curve.relative_throughput(workload, cap, chip),)
            for drawn in (power_curve.draw_watts(workload, cap, chip),)
        ],
        power_curve.NO_SWEEP,
    )


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
    best = found[0]
    table(
        f"{model} on {gpus} {gpu}, {cluster.fabric.name}, {cluster.watts:g} W: fastest layouts",
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
        (name, count)
        for name in ([model] if model is not None else _MODELS)
        for count in ([gpus] if gpus is not None else _SIZES)
    ]
    results: list[tuple[str, int, comparison.Comparison | None]] = []
    reasons = {}
    for name, count in cases:
        ends = [_cluster(gpu, count, fabrics[i], watts[i]) for i in (0, 1)]
        shape = prediction.preset(name)
        try:
            results.append((name, count, comparison.compare(shape, *ends)))
        except layout_search.NoLayout as error:
            if len(cases) == 1:
                raise
            results.append((name, count, None))  # a table goes on past a model that does not fit
            reasons[name, count] = str(error)
    single = results[0][2] if len(results) == 1 else None
    if figure is not None and single is not None:
        figures.waterfall(single, cases[0][0], figure)
    if as_json:
        if single is not None:
            print_json({"model": cases[0][0], **single.as_json()})
        else:
            print_json(
                {
                    "cases": [
                        {"model": m, "gpus": n}
                        | (c.as_json() if c else {"ratio": None, "reason": reasons[m, n]})
                        for m, n, c in results
                    ]
                }
            )
        return
    causes = (*comparison.CAUSES, "residual")
    table(
        f"{fabrics[1]} {watts[1]:g} W over {fabrics[0]} {watts[0]:g} W on {gpu}: share of "
        "throughput that is left, and what takes the rest",
        ("model", "GPUs", "ratio", "own layouts", *causes),
        [
            (
                name,
                f"{count}",
                ranged(c.ratio, 3) if c else "no layout fits",
                f"{c.own_layouts:.3f}" if c else "",
                *(f"{100 * c.waterfall[cause]:+.1f} %" if c else "" for cause in causes),
            )
            for name, count, c in results
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
