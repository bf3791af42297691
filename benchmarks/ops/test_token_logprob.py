"""token_logprob on a CPU against the matrix products it contains, and against torch eager.

Its products are those of the same arithmetic with all logits in memory: one forward, three for
forward and backward. Eager is F.cross_entropy on those logits. Each round runs all of them, so that
all see the same machine; figures are ratios of medians. Malloc keeps its memory, as in training.

    pytest -s benchmarks/ops/test_token_logprob.py
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from memory import peak_extra_bytes
from torch import Tensor

from llama2rt.ops import backends, cpu
from llama2rt.train.allocator import keep_malloc

ROUNDS = 9


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("tokens", "dim", "vocabulary"), [(2048, 512, 32000), (2048, 768, 32000)], ids=str
)
def test_token_logprob(benchmark, capsys, tokens, dim, vocabulary, dtype):
    assert "cpu" in backends("cpu")["token_logprob"]["native"]
    keep_malloc()
    hidden = torch.randn(tokens, dim).to(dtype)
    weight = (0.05 * torch.randn(vocabulary, dim)).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    upstream = torch.full((tokens,), -1 / tokens)
    _, _, lse = cpu.token_logprob(hidden, weight, targets, 1.0, False)

    def forward() -> tuple[Tensor, ...]:
        return cpu.token_logprob(hidden, weight, targets, 1.0, False)

    def backward() -> tuple[Tensor, ...]:
        return cpu.token_logprob_backward(upstream, None, hidden, weight, targets, lse, None, 1.0)

    def three_products() -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    def eager() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(leaves[0] @ leaves[1].T, targets), leaves)

    runs = {
        "one product": lambda: hidden @ weight.T,
        "three products": three_products,
        "eager forward": lambda: F.cross_entropy(hidden @ weight.T, targets),
        "eager": eager,
        "forward": forward,
        "backward": backward,
    }
    times: dict[str, list[float]] = {name: [seconds(run)] for name, run in runs.items()}
    for values in times.values():
        values.clear()  # the first call pays for memory and for oneDNN's kernels

    def one_round() -> None:
        for name, run in runs.items():
            times[name].append(seconds(run))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    median = {name: statistics.median(values) for name, values in times.items()}
    both = median["forward"] + median["backward"]
    logits_bytes = tokens * vocabulary * dtype.itemsize
    figures = {
        "ms forward": 1e3 * median["forward"],
        "of one product": median["forward"] / median["one product"],
        "of eager forward": median["forward"] / median["eager forward"],
        "ms forward and backward": 1e3 * both,
        "of three products": both / median["three products"],
        "of eager": both / median["eager"],
        "of the logits' memory": max(map(peak_extra_bytes, (forward, backward))) / logits_bytes,
    }
    drift = max(times["one product"]) / min(times["one product"])
    benchmark.extra_info.update(figures, threads=torch.get_num_threads(), product_drift=drift)
    with capsys.disabled():
        row = ", ".join(f"{value:.3g} {name}" for name, value in figures.items())
        print(f"\n({tokens}, {dim}, {vocabulary}) {dtype}: {row} (product varied by {drift:.2f}x)")
