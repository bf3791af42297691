"""A figure per op from the records: rate against size, a line per contender, the ceiling dashed.

python benchmarks/helpers/figures.py FOLDER      OP-DEVICE.json -> OP-DEVICE.svg, beside it
"""

import json
import sys
from pathlib import Path
from typing import Any

UNITS = {"bytes": (1e9, "GB/s"), "flops": (1e12, "TFLOP/s")}


def _directions(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["direction"] for row in rows))


def _size(row: dict[str, Any]) -> str:
    return f"{row['x'] / 2**20:g} MiB" if row["axis"].startswith("bytes") else f"{row['x']:,g}"


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel per direction of the rows that share a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = sorted((row for row in record["rows"] if row["on_curve"]), key=lambda row: row["x"])
    panels = _directions(rows)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for direction, axis in zip(panels, axes[0], strict=True):
        points = [row for row in rows if row["direction"] == direction]
        scale, unit = UNITS[points[0]["unit"]]
        names = list(dict.fromkeys(name for row in points for name in row["rows"]))
        for name in names:
            have = [row for row in points if name in row["rows"]]
            ours = name in points[0]["ours"]
            axis.plot(
                [row["x"] for row in have],
                [row["rows"][name]["rate"] / scale for row in have],
                marker="o",
                linewidth=2.5 if ours else 1.2,
                zorder=3 if ours else 2,
                label=f"llama2rt ({name})" if ours else name,
            )
        axis.plot(
            [row["x"] for row in points],
            [row["ceiling_rate"] / scale for row in points],
            linestyle="--",
            color="0.4",
            label=points[0]["ceiling"],
        )
        axis.set(xscale="log", yscale="log", title=direction, xlabel=points[0]["axis"], ylabel=unit)
        axis.set_xticks([row["x"] for row in points], [_size(row) for row in points])
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        for scale_of in (axis.xaxis, axis.yaxis):
            scale_of.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    where = record.get("gpu") or f"{record['machine']}, {threads}"
    figure.suptitle(f"{record['what'].rpartition(' ')[2]}\n{where}, {record['date']}", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if str(record.get("what", "")).startswith("benchmarks: "):
            draw(record, path.with_suffix(".svg"))
            print(path.with_suffix(".svg"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
