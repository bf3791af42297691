"""Published training runs as rows of a CSV file: reading, checking, and what an empty cell means.

Columns: model, dim, layers, heads, kv_heads, ffn_hidden, mlp, vocab, seq, gpus, gpu, fabric, tp,
pp, dp, sharding, micro_batch, global_batch, recompute, metric, value, and, optional, cp,
interleave, watts, stack, split, group, source. docs/cluster-validation.md lists the default of
each. A default never depends on the published value.
"""

import csv
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from llama2rt.cluster import hardware
from llama2rt.cluster.hardware import Cluster
from llama2rt.cluster.step_time import Constants, step_time
from llama2rt.cluster.workload import (
    RECOMPUTES,
    SHARDINGS,
    STACKS,
    Layout,
    Recompute,
    Shape,
    Stack,
    fits,
)
from llama2rt.errors import InputError
from llama2rt.model.config import LlamaConfig

Metric = Literal["tokens_per_s_per_gpu", "tflops_per_gpu", "step_seconds"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# fmt: off
COLUMNS = [
    "model", "dim", "layers", "heads", "kv_heads", "ffn_hidden", "mlp",
    "vocab", "seq", "gpus", "gpu", "fabric", "tp", "pp", "dp",
    "sharding", "micro_batch", "global_batch", "recompute", "metric", "value",
]
# fmt: on
OPTIONAL = ["cp", "interleave", "watts", "stack", "split", "group", "source"]

_log = logging.getLogger(__name__)

_BATCH_TOKENS = 4 * 2**20  # Llama 2's global batch
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_LARGEST = 1e12  # beyond any run: a larger number is a mistake, and might overflow


@dataclass(frozen=True)
class Row:
    """One published run."""

    where: str
    """FILE:LINE"""
    shape: Shape
    cluster: Cluster
    layouts: tuple[Layout, ...]
    """those that the row's cells allow; the fastest is taken"""
    metric: Metric
    published: float
    split: str = ""
    group: str = ""
    source: str = ""

    def predict(self, constants: Constants) -> float:
        """The published quantity as the model predicts it, in the metric's unit."""
        return self.quantity(*self.fastest(constants))

    def quantity(self, layout: Layout, seconds: float) -> float:
        """The row's metric for a step that takes so long."""
        if self.metric == "step_seconds":
            return seconds
        gpu_seconds = seconds * self.cluster.gpus
        tokens = layout.global_batch * layout.seq
        if self.metric == "tokens_per_s_per_gpu":
            return tokens / gpu_seconds
        flops = self.shape.step_flops(tokens, layout.seq, layout.recompute)
        return flops / gpu_seconds / 1e12

    def error(self, constants: Constants) -> float:
        """Prediction over publication, less 1."""
        return self.predict(constants) / self.published - 1

    def fastest(self, constants: Constants) -> tuple[Layout, float]:
        """The layout taken and its step in seconds."""
        times = {
            layout: step_time(self.shape, layout, self.cluster, constants).seconds
            for layout in self.layouts
        }
        best = min(times, key=lambda layout: times[layout])
        return best, times[best]


@lru_cache(maxsize=1)
def published() -> tuple[Row, ...]:
    """The runs that are shipped: split "calibration" (fitted) and "validation" (never fitted)."""
    file = resources.files("llama2rt.cluster") / "data" / "published_runs.csv"
    return tuple(read(file.read_text(encoding="utf-8").splitlines(), "published_runs.csv"))


def read_file(path: Path) -> list[Row]:
    """Rows of a user's file; InputError naming FILE:LINE."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    rows = read(text.splitlines(), str(path))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def read(lines: Iterable[str], name: str) -> list[Row]:
    """Rows of CSV text; `name` stands for the file in messages."""
    reader = csv.reader(lines)
    rows = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        _check_header(header, name)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(_line(header, cells, f"{name}:{reader.line_num}"))
    except csv.Error as error:  # a cell longer than the reader takes, a lone carriage return
        raise InputError(f"{name}:{reader.line_num}: {error}") from None
    return rows


def _line(header: list[str], cells: list[str], where: str) -> Row:
    if len(cells) != len(header):
        raise InputError(f"{where}: {len(cells)} cells, expected {len(header)}")
    try:
        return _row(_Cells(dict(zip(header, cells, strict=True))), where)
    except ValueError as error:  # InputError, or a shape that LlamaConfig refuses
        raise InputError(f"{where}: {error}") from None


def _check_header(header: list[str], name: str) -> None:
    """A missing column reads as empty cells; an unknown one is ignored with a warning."""
    twice = sorted({column for column in header if column and header.count(column) > 1})
    if twice:
        raise InputError(f"{name}:1: column {', '.join(twice)} stands there twice")
    if missing := [column for column in ("gpus", "value") if column not in header]:
        raise InputError(
            f"{name}:1: no column {' and no column '.join(missing)}; columns are "
            f"{', '.join(COLUMNS + OPTIONAL)}"
        )
    for column in header:
        if column not in COLUMNS + OPTIONAL:
            _log.warning("%s:1: column %r is unknown and not read", name, column)


class _Cells:
    """A line's cells, read by type; InputError names the column."""

    def __init__(self, cells: dict[str, str]) -> None:
        self._cells = {name: cell.strip() for name, cell in cells.items()}

    def text(self, name: str, default: str = "") -> str:
        return self._cells.get(name, "") or default

    def count(self, name: str, default: int | None) -> int:
        cell = self.text(name)
        if not cell:
            if default is None:
                raise InputError(f"{name}: empty, and the other cells do not imply it")
            return default
        try:
            value = int(cell)
        except ValueError:
            raise InputError(f"{name}: expected a whole number, got {cell!r}") from None
        if not 1 <= value <= _LARGEST:
            raise InputError(f"{name}: expected 1 to {_LARGEST:g}, got {cell[:40]}")
        return value

    def number(self, name: str, default: float | None) -> float:
        cell = self.text(name)
        if not cell:
            if default is None:
                raise InputError(f"{name}: empty, expected a number")
            return default
        try:
            value = float(cell)
        except ValueError:
            raise InputError(f"{name}: expected a number, got {cell!r}") from None
        if not 1 / _LARGEST <= value <= _LARGEST:
            raise InputError(
                f"{name}: expected a number from {1 / _LARGEST:g} to {_LARGEST:g}, got {cell[:40]}"
            )
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        cell = self.text(name, default).lower()
        if cell not in choices:
            raise InputError(f"{name}: expected {' | '.join(choices)}, got {cell!r}")
        return cell


def _row(cells: _Cells, where: str) -> Row:
    shape, context = _shape(cells)
    gpu = hardware.gpu(cells.text("gpu", "a100-80gb"))
    gpus = cells.count("gpus", None)
    fabric = hardware.fabric(cells.text("fabric", "ib" if gpus > 8 else "nvlink"))
    cluster = Cluster(gpu, gpus, fabric, cells.number("watts", gpu.max_watts))
    metric = cells.choice("metric", METRICS, "tokens_per_s_per_gpu")
    return Row(
        where,
        shape,
        cluster,
        _layouts(cells, shape, cluster, context),
        metric,  # type: ignore[arg-type]
        cells.number("value", None),
        group=cells.text("group", shape.name),
        **{name: cells.text(name) for name in ("split", "source")},
    )


def _shape(cells: _Cells) -> tuple[Shape, int]:
    """The model and its context; a preset's name fills cells that are empty."""
    name = cells.text("model", "model")
    preset = LlamaConfig.preset(name) if name in LlamaConfig.presets() else None
    gated = cells.choice("mlp", ("gated", "plain"), "gated" if preset else "plain") == "gated"
    dim = cells.count("dim", preset.dim if preset else None)
    heads = cells.count("heads", preset.heads if preset else None)
    # GPT's feed-forward is four times as wide; a gated one has as many weights in three matrices.
    wide = -(-8 * dim // (3 * 256)) * 256 if gated else 4 * dim
    config = LlamaConfig(
        dim=dim,
        layers=cells.count("layers", preset.layers if preset else None),
        heads=heads,
        kv_heads=cells.count("kv_heads", preset.kv_heads if preset else heads),
        ffn_hidden=cells.count("ffn_hidden", preset.ffn_hidden if preset else wide),
        vocab_size=cells.count(
            "vocab", preset.vocab_size if preset else (32000 if gated else 51200)
        ),
    )
    shape = replace(Shape.of(name, config), gated=gated, tied=not gated)
    return shape, preset.context if preset else 2048


def _layouts(cells: _Cells, shape: Shape, cluster: Cluster, context: int) -> tuple[Layout, ...]:
    """The layouts a row allows. Empty sharding and recompute: the lightest with which it fits."""
    tp, pp, cp = cells.count("tp", 1), cells.count("pp", 1), cells.count("cp", 1)
    dp = cells.count("dp", max(1, cluster.gpus // (tp * pp * cp)))
    seq = cells.count("seq", context)
    given = cells.count("micro_batch", None) if cells.text("micro_batch") else None
    whole = Layout(
        seq=seq,
        micro_batch=1,
        global_batch=cells.count("global_batch", max(dp * (given or 1), _BATCH_TOKENS // seq)),
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        interleave=cells.count("interleave", 1),
    )
    whole.check(shape, cluster)
    shardings = _open(cells, "sharding", SHARDINGS)
    recomputes = _open(cells, "recompute", RECOMPUTES)
    if given is not None and given * dp > whole.global_batch and given > 1:
        raise InputError(
            f"micro_batch: {given} sequences on each of {dp} ranks exceed the global batch of "
            f"{whole.global_batch}"
        )
    sizes = [given] if given else [s for s in _MICRO_BATCHES if s * dp <= whole.global_batch]
    for sharding, recompute in product(shardings, recomputes):
        stack = _stack(cells, shape, cluster, recompute)
        layouts = [
            replace(
                whole,
                micro_batch=size,
                sharding=sharding,
                recompute=recompute,
                interleave=cells.count("interleave", _interleave(shape, pp, stack)),
                stack=stack,
            )
            for size in sizes
        ]
        fitting = [layout for layout in layouts if fits(shape, layout, cluster)]
        if fitting:
            return tuple(fitting)
    # The run took place, so it did fit: the memory model is wrong here, or a cell is.
    return (layouts[0],)


def _interleave(shape: Shape, pp: int, stack: Stack) -> int:
    """Model chunks a stage where the row does not say: one in tables of 2021, many since.

    Stages of Llama 3 405B differ in layers, so that they need not divide evenly.
    """
    return max(1, shape.layers // pp) if pp > 1 and stack != "2021" else 1


def _open(cells: _Cells, name: str, choices: tuple) -> tuple:
    return (cells.choice(name, choices, ""),) if cells.text(name) else choices


def _stack(cells: _Cells, shape: Shape, cluster: Cluster, recompute: Recompute) -> Stack:
    """The software's year, by what a row does not say but implies.

    GPTs with recomputation on A100 are Megatron-LM's and its kin's, from before FlashAttention,
    unless they shard weights in one node, by node or on 40 GB, or run on RoCE, as FSDP's tables do.
    LLaMA's gated feed-forward or training without recomputation came after. On later GPUs FSDP's
    tables are of 2023; Megatron-LM's and NeMo's have newer kernels.
    """
    sharding = cells.text("sharding").lower()
    sharded = sharding in ("zero3", "hybrid") and cells.count("pp", 1) == 1
    small = cluster.gpus <= cluster.gpus_per_node or cluster.gpu.name == "a100-40gb"
    if not cluster.gpu.name.startswith("a100"):
        implied = "2023" if sharded else "2024"
    elif shape.gated or recompute == "none" or cluster.fabric.name == "roce":
        implied = "2023"
    else:
        implied = "2023" if sharded and (small or sharding == "hybrid") else "2021"
    return cells.choice("stack", STACKS, implied)  # type: ignore[return-value]
