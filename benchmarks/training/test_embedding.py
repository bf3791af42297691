"""The embedding's gradient, ours against what torch offers: 16384 skewed tokens, fp32 and bf16.

Ours is ops.embedding: rows of one token brought together by a sort and summed in fp32. `embedding`
is torch's nn.Embedding, which sums in bf16 on a CPU and is wrong there (tests/ops/test_embedding.py
says by how much); `index_select` is right with int64 ids. Useful traffic: the gradient's
rows read and written, tokens x dim each, and a weight's gradient written. The ceiling is `clone`.

`training step` times a whole step with our lookup and with torch's in its place, in turns.

    pytest -s benchmarks/training/test_embedding.py
"""

import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from measure import DEVICES, SMOKE, Case, Contender, SetUp, compare
from torch import Tensor
from torch.nn import functional as F

from llama2rt.model import Llama, LlamaConfig, transformer
from llama2rt.ops.embedding import embedding

pytest.importorskip("pydantic", reason="train options are pydantic models")
sys.path.append(str(Path(__file__).parent))

import step

from llama2rt.train import Optimizer, TrainOptions

TOKENS = 64 if SMOKE else 16384
SHAPES = [(64, 8)] if SMOKE else [(32000, 768), (32000, 512), (1024, 768), (1024, 512)]
DTYPES = [torch.float32, torch.bfloat16]
STEPS = 1 if SMOKE else 7


def skewed(count: int, vocabulary: int) -> Tensor:
    """Tokens as frequent as words are (Zipf)."""
    generator = torch.Generator().manual_seed(0)
    weight = 1.0 / torch.arange(1, vocabulary + 1)
    return torch.multinomial(weight, count, replacement=True, generator=generator)


def set_up(vocabulary: int, dim: int, dtype: torch.dtype, device: str) -> SetUp:
    tokens = skewed(TOKENS, vocabulary).to(device)
    weight = torch.randn(vocabulary, dim, device=device).to(dtype)
    dy = torch.randn(TOKENS, dim, device=device).to(dtype)
    lookups = {
        "ours": lambda w: embedding(tokens, w),
        "embedding": lambda w: F.embedding(tokens, w),
        "index_select": lambda w: w.index_select(0, tokens),
    }
    return SetUp(
        torch.randn(vocabulary * dim, device=device).to(dtype).clone,
        {name: Contender(lookup, (weight,), (dy,)) for name, lookup in lookups.items()},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocabulary", "dim"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_embedding(benchmark, capsys, device, vocabulary, dim, dtype):
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip("no usable NVIDIA GPU" if device == "cuda" else "the GPU is measured")
    moved = (4 * TOKENS + vocabulary) * dim * dtype.itemsize
    case = Case(
        op="embedding",
        direction="forward + backward",
        device=device,
        size=f"{TOKENS} tokens of {vocabulary} x {dim}, {str(dtype)[6:]}",
        x=moved,
        axis="bytes",
        work=moved,
        unit="bytes",
        ceiling="clone",
        ceiling_work=2 * vocabulary * dim * dtype.itemsize,
        set_up=lambda: set_up(vocabulary, dim, dtype, device),
        input_bytes=(vocabulary + TOKENS) * dim * dtype.itemsize,
        judged=False,
    )
    compare(benchmark, capsys, case, ["ours"])


def take_step(model: Llama, optimizer: Optimizer, tokens: Tensor) -> float:
    count = tokens.shape[0]
    length = min(512, count)
    start = time.perf_counter()
    positions = torch.arange(length).repeat(count // length)
    cu_seqlens = torch.arange(0, count + 1, length, dtype=torch.int32)
    (-model(tokens, positions, cu_seqlens, tokens.roll(-1)).mean()).backward()
    optimizer.step(1e-4)
    return time.perf_counter() - start


@pytest.mark.parametrize("shape", step.SHAPES)
def test_training_step(capsys, monkeypatch, shape):
    """Ratio of medians, torch's lookup over ours, of steps of 2048 tokens in turns: in bf16, or in
    fp32 on a processor without instructions for bf16's products, where a step takes minutes."""
    if torch.cuda.is_available():
        pytest.skip("timed on a CPU")
    config = LlamaConfig(**step.SHAPES[shape], vocab_size=step.VOCABULARY)
    model = Llama(config).initialize(0)
    native = pytest.importorskip("llama2rt._cpu", reason="llama2rt._cpu is not built")
    precision = "bf16" if "avx512bf16" in native.instruction_sets() else "fp32"
    optimizer = Optimizer(model, TrainOptions(precision=precision))
    tokens = skewed(step.DOCUMENTS * step.LENGTH, config.vocab_size)
    ways = {"ours": embedding, "torch": lambda tokens, weight: F.embedding(tokens, weight)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(STEPS + 1):
        for name, lookup in ways.items():
            monkeypatch.setattr(transformer, "embedding", lookup)
            times[name].append(take_step(model, optimizer, tokens))
        if i == 0:
            times = {name: [] for name in ways} if STEPS > 1 else times
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    with capsys.disabled():
        print(
            f"\n{shape} training step, {precision}: ours {medians['ours']:.3f} s, torch's lookup "
            f"{medians['torch']:.3f} s, ratio {medians['torch'] / medians['ours']:.3f} "
            f"(malloc keeps memory: {os.environ.get('MALLOC_MMAP_MAX_') == '0'})"
        )
    assert all(seconds > 0 for seconds in medians.values())
