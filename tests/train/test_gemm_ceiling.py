"""The ceiling of MFU is measured in seconds, whatever the processor makes of the dtype."""

import pytest
import torch
from torch import Tensor

from llama2rt.train import metrics


@pytest.fixture
def machine(monkeypatch):
    """`machine(flops)`: products take their time at that rate; gives (size, seconds) of each."""
    metrics.gemm_ceiling.cache_clear()
    products: list[tuple[int, float]] = []

    def make(flops: float) -> list[tuple[int, float]]:
        def product(self: Tensor, other: Tensor) -> Tensor:
            products.append((len(self), 2 * len(self) ** 3 / flops))
            return self

        monkeypatch.setattr(Tensor, "__matmul__", product)
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: sum(s for _, s in products))
        return products

    yield make
    metrics.gemm_ceiling.cache_clear()


@pytest.mark.parametrize(("flops", "largest"), [(1e9, 256), (1e10, 512), (1e12, 1024)])
def test_a_slow_dtype_is_measured_on_smaller_products(machine, flops, largest):
    """Some processors reach 1 GFLOP/s in bf16, where 24 products of 1024 would take 50 s."""
    products = machine(flops)
    assert metrics.gemm_ceiling("cpu", torch.bfloat16) == pytest.approx(flops)
    assert max(size for size, _ in products) == largest
    assert sum(seconds for _, seconds in products) < 3.0
