"""What `llama2rt cluster bench` shows: its table line by line, its footer and its figure."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2rt import atomic
from llama2rt.cluster.sizes import bytes_text

# Okabe and Ito: told apart by colour-blind readers; markers differ too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_MARKERS = ("o", "s", "^", "D", "v")


def head(record: Mapping[str, Any]) -> list[str]:
    """Lines before the rows: what runs where, under which settings, and the columns."""
    lines = [
        f"{record['ranks']} ranks over {record['backend']}, {record['dtype']}, "
        f"{record['warmup']} calls to warm up, {record['iterations']} timed",
        *(f"{name}={value}" for name, value in record["environment"].items()),
    ]
    if record["ranks"] == 1:
        lines.append("one rank: nothing crosses a link, bus bandwidth is 0 by definition")
    columns = f"{'operation':<15}{'size':>10}{'median us':>13}{'p99 us':>13}{'alg GB/s':>11}"
    return [*lines, f"{columns}{'bus GB/s':>11}{'J/call':>9}  late rank"]


def line(operation: str, size: int, row: Mapping[str, Any]) -> str:
    """One row, or why it was skipped."""
    start = f"{operation:<15}{bytes_text(row.get('bytes', size)):>10}"
    if "skipped" in row:
        return f"{start}  skipped: {row['skipped']}"
    joules = row["joules_per_call"]
    slowest = row["slowest_rank"]
    late = "-"
    if slowest is not None:
        by = row["stragglers"][slowest]["arrives_late_median"]
        late = f"{slowest} by {by * 1e6:.1f} us"
    text = (
        f"{start}{row['median_seconds'] * 1e6:>13.1f}{row['p99_seconds'] * 1e6:>13.1f}"
        f"{row['algorithm_bandwidth_bytes_per_s'] / 1e9:>11.3f}"
        f"{row['bus_bandwidth_bytes_per_s'] / 1e9:>11.3f}"
        f"{'-' if joules is None else f'{joules:.3g}':>9}  {late}"
    )
    if row["overlap"]:
        collective = max(row["overlap"]["collective_slowdown"])
        gemm = max(row["overlap"]["gemm_slowdown"])
        text += f"; beside matrix products x{collective:.2f}, these x{gemm:.2f}"
    return text


def foot(record: Mapping[str, Any]) -> list[str]:
    """Lines after the rows: energy that was not measured, and the machines."""
    footer = record["footer"]
    reasons = sorted({why for row in record["rows"] for why in row["energy"]["not_measured"]})
    lines = [f"energy not measured in full: {'; '.join(reasons)}"] if reasons else []
    lines.append(", ".join(f"{name} {value}" for name, value in footer["versions"].items()))
    lines.append("; ".join(footer["devices"]) + f" on {', '.join(footer['hosts'])}")
    for host, adapters in footer["adapters"].items():
        lines.append(f"{host}: {', '.join(adapters) or 'no network adapter readable'}")
    if record["backend"] == "gloo" and any(row["op"] == "reduce_scatter" for row in record["rows"]):
        lines.append(
            "gloo's reduce-scatter sends as many bytes as its all-reduce: half of a link's rate is "
            "the most that its bus bandwidth can reach"
        )
    if record["stopped"]:
        lines.append(f"stopped early: {record['stopped']}")
    return lines


def comparison(result: Mapping[str, Any]) -> str:
    """A table of ratios with their intervals."""
    share = f"{result['confidence']:.0%}"
    lines = [f"{result['what']} (above 1: A is faster), {share} bootstrap interval of these runs"]
    for row in result["rows"]:
        lines.append(
            f"{row['op']:<15}{bytes_text(row['bytes']):>10}{row['ratio']:>9.3f}"
            f"  [{row['low']:.3f}, {row['high']:.3f}]"
        )
    return "\n".join(lines)


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Bus bandwidth of one or two runs against size, a curve an operation; None without a row."""
    if not any(record["rows"] for record in records):
        return None
    from matplotlib.figure import Figure  # a second of import that --help can do without

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for run, (record, style) in enumerate(zip(records, ("-", "--"), strict=False)):
        label = f" ({'AB'[run]}, {record['preset'] or record['backend']})" if records[1:] else ""
        for index, name in enumerate(dict.fromkeys(row["op"] for row in record["rows"])):
            rows = [row for row in record["rows"] if row["op"] == name]
            axes.plot(
                [row["bytes"] for row in rows],
                [row["bus_bandwidth_bytes_per_s"] / 1e9 for row in rows],
                style,
                marker=_MARKERS[index % len(_MARKERS)],
                color=_COLOURS[index % len(_COLOURS)],
                markersize=4,
                label=name + label,
            )
    sizes = sorted({row["bytes"] for record in records for row in record["rows"]})
    axes.set_xscale("log", base=2)
    ticks = sizes[:: -(-len(sizes) // 8)]
    axes.set_xticks(ticks, [bytes_text(size) for size in ticks])
    axes.minorticks_off()
    axes.set_xlabel("total buffer S")
    axes.set_ylabel("bus bandwidth (GB/s)")
    axes.set_ylim(bottom=0)
    axes.grid(color="#dde1e7")
    axes.legend(frameon=False)
    first = records[0]
    axes.set_title(f"{first['ranks']} ranks over {first['backend']}", loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=160)
    atomic.write(path, buffer.getvalue())
    return path
