"""What a training step cost: tokens per second, MFU against a ceiling measured here, and energy.

Model FLOPs utilisation divides the arithmetic a step needs (recomputation not counted) by what
this machine's matrix multiplication really reaches in the same dtype, not by a data-sheet peak.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama2rt.data.packing import Batch
from llama2rt.energy import Energy, EnergyMeter
from llama2rt.model.llama import Llama
from llama2rt.parallel import gather


@functools.cache
def gemm_ceiling(device_type: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square matrix products; measured once per process (0.3 s, and no
    more than some 2 s on a processor that has no instructions for dtype)."""
    device = torch.device(device_type)
    generator = torch.Generator(device="cpu").manual_seed(0)

    def operand(size: int) -> Tensor:
        # Random: products of zeros run faster than any real step does.
        return torch.randn(size, size, generator=generator).to(device, dtype)

    def seconds(a: Tensor, b: Tensor) -> float:
        _synchronise(device_type)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronise(device_type)
        return time.perf_counter() - start

    size = 8192
    if device_type == "cpu":
        # Products in bf16 without such instructions reach 1 GFLOP/s: 40 s for those of 1024.
        size, small = 256, (operand(256), operand(256))
        seconds(*small)
        whole = 6 * seconds(*small)
        while size < 1024 and 8 * whole < 2.0:
            size, whole = 2 * size, 8 * whole
    operands = operand(size), operand(size)
    seconds(*operands)
    return 4 * 2 * size**3 / min(seconds(*operands) for _ in range(5))


def training_flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of one forward and backward pass over a packed batch: 3 x 2 per weight and token, 2 x 2
    for a frozen one, of which no gradient is taken.

    The output matrix counts for the rows that predict something only (the others never reach it),
    the last block's queries and what follows for the batch's tails, the embedding not at all,
    causal attention over each document by itself, and what documents share once: what is needed,
    where ranks that share a micro-batch, and pipelines, compute the last block at all tokens.
    `model` is a Llama, or a transformer under another head.
    """
    transformer: Any = model.transformer
    config, last = transformer.config, transformer.blocks[-1]
    own = batch.cu_seqlens.diff().to(torch.int64)
    seen = own if batch.keys is None else batch.keys.cu_seqlens.diff().to(torch.int64)
    ending = own if batch.tails is None else batch.tails.cu_seqlens.diff().to(torch.int64)
    left_out = int((own - ending).sum())
    behind = _weights(last.query, last.attention_output, last.gate, last.up, last.down)
    products = _weights(transformer.blocks) * batch.tokens.numel() - behind * left_out
    if isinstance(model, Llama):
        output = model.output.weight
        products += _products(output) * config.vocab_size * config.dim * batch.weight
    # The last `own` rows of a causal triangle of `seen`; length^2 / 2 where a document is whole.
    pairs = (config.layers - 1) * own * (2 * seen - own) + ending * (2 * seen - ending)
    attention = config.dim * int(pairs.sum())  # q.k and p.v: 2 x 2 x dim, half of them masked
    return 2 * (products + 3 * attention)


def _weights(*modules: nn.Module) -> int:
    """Products a token of all their matrices' numbers."""
    matrices = (p for module in modules for p in module.parameters() if p.ndim == 2)
    return sum(_products(p) * p.numel() for p in matrices)


def _products(weight: Tensor) -> int:
    """Matrix products a training step takes with it: the result, its input's gradient, its own."""
    return 3 if weight.requires_grad else 2


class Throughput:
    """Tokens and FLOPs counted since the last reading, per second of wall time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._tokens = 0
        self._flops = 0

    def add(self, tokens: int, flops: int) -> None:
        self._tokens += tokens
        self._flops += flops

    def read(self) -> tuple[float, float]:
        """(tokens per second, FLOP/s) since the last reading."""
        now = self._clock()
        elapsed = max(now - self._start, 1e-9)
        rates = self._tokens / elapsed, self._flops / elapsed
        self._start, self._tokens, self._flops = now, 0, 0
        return rates


class EnergyUse:
    """Joules of all ranks per token and per step, whenever enough time has passed for the counters
    to tell."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter, self._said = meter, ""
        self.restart()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def restart(self) -> None:
        """Forget what was counted: something else than training took the time since."""
        self._tokens = self._steps = 0
        self._meter.lap()

    def step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float | str]:
        """joules_per_token and joules_per_step since the last figures; "energy" with the reason
        where nothing is measured, said once; empty while it is too early. Of all ranks, each of
        which calls this after the same step and gets the same."""
        parts = gather(self._meter.peek())
        if any(part.seconds < part.seconds_needed for part in parts):
            return {}
        used = _of_ranks(parts)
        tokens, steps = self._tokens, self._steps
        self.restart()
        per_token, per_step = used.joules_per(tokens), used.joules_per(steps)
        if per_token is None or per_step is None:
            said, self._said = self._said, used.describe()
            return {} if said == self._said else {"energy": self._said}
        return {"joules_per_token": per_token, "joules_per_step": per_step}


def _of_ranks(parts: Sequence[Energy]) -> Energy:
    """What the devices of all ranks of a job drew in the same time, no device being of two ranks.

    CPUs of two machines share a name and are added under it. There are no joules where one of the
    ranks could measure none of its devices: those of the others would pass for all. A reason that
    several devices have is said of one.
    """
    if len(parts) == 1:
        return parts[0]
    reasons = {why: name for part in parts for name, why in part.not_measured.items()}
    joules: dict[str, float] = {}
    if not any(part.not_measured and not part.joules for part in parts):
        for name, value in (item for part in parts for item in part.joules.items()):
            joules[name] = joules.get(name, 0.0) + value
    return Energy(
        max(part.seconds for part in parts),
        joules,
        {name: why for why, name in reasons.items()},
        max(part.seconds_needed for part in parts),
        {name: other for part in parts for name, other in part.mirrored.items()},
    )


def _synchronise(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()
