"""The subcommands of `llama2rt cluster` that one formula answers: carbon, collectives, power caps.

They print tables, or one JSON object with --json. An InputError names the option that is wrong.
"""

from collections.abc import Sequence
from typing import Annotated

import tyro

from llama2rt.cluster import carbon as carbon_model
from llama2rt.cluster import collectives, congestion, figures, hardware, power_curve
from llama2rt.cluster.options import Figure, Json
from llama2rt.cluster.output import or_else, print_json, ranged, table
from llama2rt.cluster.sizes import parse_bytes
from llama2rt.errors import InputError


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
    total = float(carbon_model.total(runs))
    if as_json:
        rows = [_carbon(run) for run in runs]
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


def _carbon(run: carbon_model.Run) -> dict[str, object]:
    return {
        "model": run.model,
        "gpu_hours": run.gpu_hours,
        "watts": run.watts,
        "tco2eq": float(carbon_model.floored(carbon_model.tco2eq(run))),
        "tco2eq_uncut": float(carbon_model.tco2eq(run)),
        "tco2eq_with_host": carbon_model.with_host(run).as_json(),
        "tco2eq_measured": carbon_model.measured(run),
    }


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
    ranks, chip = collectives.group(gpus), hardware.gpu(gpu)
    net, total = hardware.fabric(fabric), parse_bytes(size)
    timing = collectives.time(op, total, chip, net, ranks)
    rate = total * collectives.bus_factor(op, gpus) / timing.seconds
    error = collectives.RELATIVE_RANGE
    result = {
        "op": op,
        "gpus": gpus,
        "bytes": total,
        "fabric": net.name,
        "seconds": timing.seconds,
        "seconds_low": timing.seconds * (1 - error),
        "seconds_high": timing.seconds * (1 + error),
        "bus_bandwidth_bytes_per_s": rate,
        "algorithm": timing.algorithm,
        "protocol": timing.protocol,
        "provenance": collectives.PROVENANCE,
    }
    if as_json:
        print_json(result)
        return
    taken = (timing.algorithm, timing.protocol)
    table(
        f"{op} of {total:,} bytes over {gpus} {gpu} on {net.name}: {timing.seconds * 1e6:,.1f} us "
        f"(within {error:.0%}), bus bandwidth {rate / 1e9:.1f} GB/s",
        ("algorithm", "protocol", "NCCL expects (us)", ""),
        [
            (o.algorithm, o.protocol, f"{o.seconds * 1e6:,.1f}", "chosen" if same else "")
            for o in collectives.options(op, total, chip, net, ranks)
            for same in ((o.algorithm, o.protocol) == taken,)
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
