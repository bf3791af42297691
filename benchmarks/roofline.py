"""Writes docs/roofline.md: what each op must move and compute, and the time no kernel can beat.

The work is that of benchmarks/helpers/work.py, the shapes are those of benchmarks/ops, the limits
are HARDWARE's, and the measured fraction comes from the records that `make gpu` leaves in
benchmarks/results. Nothing is typed in by hand, and a test writes the page again and compares.

    python -P benchmarks/roofline.py      rewrites docs/roofline.md and docs/images/roofline.svg

Left out: caches, launch times, clocks that fall under load. They make a floor higher, never lower.
"""

import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # pytest has them from pyproject.toml
    sys.path[:0] = [str(ROOT / "benchmarks/helpers"), str(ROOT / "tests/helpers")]

import work  # noqa: E402
from work import Work  # noqa: E402

from llama2rt.ops.cuda_kernels import decode_attention as decode  # noqa: E402

PAGE, FIGURE = ROOT / "docs/roofline.md", ROOT / "docs/images/roofline.svg"
RESULTS = ROOT / "benchmarks/results"
NOT_RUN = "not yet run on a GPU"
MATRIX_OPS = ("attention", "decode_attention", "token_logprob")


@dataclass(frozen=True)
class Hardware:
    """Peaks as the maker states them, without sparsity."""

    name: str
    bytes_per_s: float
    matrix_flops_per_s: float
    """bf16 products on tensor cores."""
    vector_flops_per_s: float
    """fp32 arithmetic outside them."""
    multiprocessors: int
    sources: str
    """Where each of the four figures stands."""

    def peak(self, op: str) -> float:
        return self.matrix_flops_per_s if op in MATRIX_OPS else self.vector_flops_per_s

    def floor_s(self, todo: Work) -> float:
        return max(todo.bytes / self.bytes_per_s, todo.flops / self.peak(todo.op))

    def bound(self, todo: Work) -> str:
        memory_bound = todo.bytes / self.bytes_per_s >= todo.flops / self.peak(todo.op)
        return "memory" if memory_bound else "arithmetic"


HARDWARE = (
    Hardware(
        "A100",
        2.039e12,
        312e12,
        19.5e12,
        108,
        'NVIDIA, "A100 Tensor Core GPU" data sheet, A100 80GB SXM: bandwidth, "BFLOAT16 Tensor '
        'Core" (312 without sparsity, 624 with), "FP32". Multiprocessors: NVIDIA, "A100 Tensor '
        'Core GPU Architecture" (2020)',
    ),
    Hardware(
        "H200",
        4.8e12,
        989e12,
        67e12,
        132,
        'NVIDIA, "H200 Tensor Core GPU" data sheet, H200 SXM: bandwidth, "BFLOAT16 Tensor Core" '
        '(1,979 with sparsity, halved), "FP32". Multiprocessors: NVIDIA, "H100 Tensor Core GPU '
        'Architecture" (2022), whose SXM5 chip it has',
    ),
)


def _benchmark(name: str) -> ModuleType:
    """The module benchmarks/ops/`name`.py, whose sizes these are."""
    path = ROOT / f"benchmarks/ops/{name}.py"
    spec = importlib.util.spec_from_file_location(f"roofline_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of a class
    spec.loader.exec_module(module)
    return module


def decode_shapes() -> list[tuple[int, int, int, int, int]]:
    """Sequences, context, query heads, key heads and head dimension, by the size of the batch."""
    heads, batches = _benchmark("test_attention").DECODE["cuda"]
    return [(n, context, *heads) for n in sorted(batches) for context in batches[n]]


def all_work() -> list[Work]:
    """Of every op and direction, at the shapes that benchmarks/ops runs on a GPU."""
    found = [
        work.elementwise(op, direction, rows, columns)
        for op, direction in work.ELEMENTWISE
        for rows, columns in _benchmark("test_elementwise").SIZES["cuda"]
    ]
    attention, logprob = _benchmark("test_attention"), _benchmark("test_token_logprob")
    found += [
        work.attention(direction, name, s.lengths, s.heads, s.kv_heads, s.head_dim)
        for direction in work.ATTENTION_PRODUCTS
        for name, s in attention.SHAPES["cuda"].items()
    ]
    found += [work.decode_attention(*shape) for shape in decode_shapes()]
    found += [
        work.token_logprob(direction, tokens, dim, vocabulary)
        for direction in work.LOGPROB_PRODUCTS
        for tokens, dim, vocabulary, _ in logprob.SIZES["cuda"]
    ]
    return found


def records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured on GPUs: the files that benchmarks/helpers/records.py wrote there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/*-cuda.json")]


def measured(todo: Work, gpu: Hardware, found: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Backend -> the floor as a share of the time it took on `gpu`; {} where it did not run."""
    shares = {}
    for record in found:
        if record["what"] != f"benchmarks/ops: {todo.op}" or gpu.name not in record["gpu"]:
            continue
        for row in record["rows"]:
            if (row["direction"], row["size"]) == (todo.direction, todo.size):
                for backend in row["ours"]:
                    shares[backend] = gpu.floor_s(todo) / row["rows"][backend]["seconds"]
    return shares


def _line(todo: Work, found: list[dict[str, Any]]) -> str:
    cells = [todo.size.removesuffix(", bf16").removesuffix(" bf16"), todo.direction]
    cells += [f"{todo.bytes / 1e6:.0f}", f"{todo.flops / 1e9:.3g}"]
    cells.append(f"{todo.flops / todo.bytes:.3g}")
    said = []
    for gpu in HARDWARE:
        cells.append(f"{1e6 * gpu.floor_s(todo):.1f}, {gpu.bound(todo)}")
        said += [f"{gpu.name} {k} {v:.0%}" for k, v in measured(todo, gpu, found).items()]
    return "| " + " | ".join([*cells, "; ".join(said) or NOT_RUN]) + " |"


def decode_launch(sequences: int, context: int, kv_heads: int, dim: int, gpu: Hardware) -> str:
    """How the CUDA kernel's launch divides the caches over `gpu`: splits of a context, and blocks
    that have keys; these take turns where they are more than run at once."""
    slots, items = decode.blocks_at_once(dim, gpu.multiprocessors), sequences * kv_heads
    splits = decode.split_count(items, context, slots)
    tile = decode.SHORTEST_SPLIT  # of keys: the kernel gives each split a whole number of them
    share = -(-context // (splits * tile)) * tile
    splits_with_keys = -(-context // share)
    blocks = items * splits_with_keys
    busy = min(blocks, gpu.multiprocessors) / gpu.multiprocessors
    return f"{splits_with_keys} | {blocks} | {busy:.0%} | {blocks / slots:.2f}"


def _decode_launches() -> list[str]:
    columns = ("splits", "blocks", "multiprocessors busy", "rounds")
    heads = " | ".join(f"{gpu.name}: {column}" for gpu in HARDWARE for column in columns)
    lines = [DECODE_HEAD, f"| shape | {heads} |", "|---|" + "---|" * len(columns) * len(HARDWARE)]
    for sequences, context, _, kv_heads, dim in decode_shapes():
        cells = [decode_launch(sequences, context, kv_heads, dim, gpu) for gpu in HARDWARE]
        lines.append(f"| {sequences} x {context} | " + " | ".join(cells) + " |")
    return lines


HEAD = """# Roofline: the time no kernel can beat

Written by `benchmarks/roofline.py` from the same formulas the benchmarks count with
(`benchmarks/helpers/work.py`) and the same shapes (`benchmarks/ops`); a test writes it again and
compares. An op that must move *B* bytes and do *F* floating-point operations takes at least
max(*B* / bandwidth, *F* / peak). Which of the two is larger says what binds it, and a kernel's
**measured fraction** is that floor divided by its time. Peaks are the maker's, without sparsity: a
copy and a large product stay below them, and so does every kernel.

![attainable rate against arithmetic intensity](images/roofline.svg)
"""

DECODE_HEAD = """
How the CUDA kernel's launch fills a GPU, from the code that chooses it
(`llama2rt/ops/cuda_kernels/decode_attention.py`). The heads of a group share a block; `splits` cut
each context, and `blocks` are those that have keys. Two run at once on a multiprocessor, as the
[resources](../csrc/cuda/resources.json) of the kernel allow; `rounds` is blocks by as many as run
at once. Each has 32 KiB of keys and values on the way while it computes on as many, so a last round
that is not full need not be slower: with latencies of 0.6 and 0.7 us, assumed and not measured, the
memory of an A100 asks for 38 such blocks, that of an H200 for 103.
"""

NOTES = """## What is counted

- Each operand once, 16-bit elements. Of elementwise ops the activations; weights, `rstd`, rotary
  tables and positions are left out, which makes a floor lower by 2 % at most.
- Of attention the pairs of query and key that causality leaves: two products forward, five
  backward. Scores and weights need not reach memory and count nothing there.
- Of decode_attention the cached keys and values; of token_logprob one product forward and two
  backward. Logits need not reach memory; a backward that computes them again does four products
  where three count, so that three quarters of the peak is its own ceiling.
- An exponential counts as one operation, which is kind to it.
"""


def page(found: list[dict[str, Any]]) -> str:
    columns = ("bandwidth, TB/s", "bf16 products, TFLOP/s", "fp32, TFLOP/s", "multiprocessors")
    lines = [HEAD, f"| GPU | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for gpu in HARDWARE:
        rates = (gpu.bytes_per_s, gpu.matrix_flops_per_s, gpu.vector_flops_per_s)
        figures = " | ".join(f"{rate / 1e12:g}" for rate in rates)
        lines.append(f"| {gpu.name} | {figures} | {gpu.multiprocessors} |")
    lines += ["", *(f"- {gpu.name}: {gpu.sources}." for gpu in HARDWARE)]
    lines += ["", "The data sheets were read in second-hand copies."]
    every = all_work()
    for op in dict.fromkeys(todo.op for todo in every):
        floors = " | ".join(f"{gpu.name} floor, us" for gpu in HARDWARE)
        lines += [
            f"\n## {op}\n",
            f"| shape | direction | MB | GFLOP | FLOP/byte | {floors} | measured fraction |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(todo, found) for todo in every if todo.op == op]
        if op == "decode_attention":
            lines += _decode_launches()
    return "\n".join([*lines, "", NOTES])


def _labels(points: list[Work]) -> dict[float, list[str]]:
    """Intensity -> what is there; neighbours too near for two lines of text share one."""
    found: dict[float, list[str]] = {}
    for todo in sorted(points, key=lambda todo: todo.flops / todo.bytes):
        if todo.direction == "forward + backward":
            continue
        intensity = todo.flops / todo.bytes
        last = max(found, default=0.0)
        name = todo.op if todo.direction == "forward" else f"{todo.op} {todo.direction}"
        found.setdefault(last if intensity < 1.1 * last else intensity, []).append(name)
    return found


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """Roofs of both GPUs; of each op and direction its largest shape on them, and where it ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = {(todo.op, todo.direction): todo for todo in all_work()}
    for todo in all_work():
        if todo.flops > largest[todo.op, todo.direction].flops:
            largest[todo.op, todo.direction] = todo
    with matplotlib.rc_context({"svg.hashsalt": "roofline", "svg.fonttype": "none"}):
        figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
        intensities = [10 ** (x / 20) for x in range(-10, 91)]
        for gpu, color in zip(HARDWARE, ("tab:green", "tab:blue"), strict=True):
            for peak, style in ((gpu.matrix_flops_per_s, "-"), (gpu.vector_flops_per_s, ":")):
                roof = [min(peak, x * gpu.bytes_per_s) / 1e12 for x in intensities]
                label = f"{gpu.name}, {'products' if style == '-' else 'fp32'}"
                axis.plot(intensities, roof, style, color=color, label=label)
            for todo in largest.values():
                x, floor_s = todo.flops / todo.bytes, gpu.floor_s(todo)
                axis.plot(x, todo.flops / floor_s / 1e12, "o", color=color, fillstyle="none")
                for share in measured(todo, gpu, found).values():
                    axis.plot(x, share * todo.flops / floor_s / 1e12, "o", color=color)
        for intensity, names in _labels(list(largest.values())).items():
            axis.axvline(intensity, color="0.8", linewidth=0.8, zorder=0)
            axis.text(intensity, 0.012, ", ".join(names), rotation=90, ha="right", size=7)
        axis.set_ylim(0.01, 3000)
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
        axis.grid(which="major", alpha=0.25)
        axis.legend(fontsize=8, title="hollow: the floor; full: measured", title_fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    measurements = records()
    PAGE.write_text(page(measurements), encoding="utf-8")
    draw(FIGURE, measurements)
