"""token_logprob against the matrix products it contains, eager torch and Inductor; on a GPU also
against Liger-Kernel's fused loss and cut-cross-entropy.

The ceiling is those products alone with all logits in memory: one forward, three for forward and
backward, which is also the useful work that is counted. Eager is F.cross_entropy on such logits.
The peers return a mean loss, ours each token's log-probability; gradients are those of the mean.

    pytest -s benchmarks/ops/test_token_logprob.py
"""

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICES, SMOKE, Case, Contender, SetUp, compare, inductor, on, ours_for
from torch import Tensor

from llama2rt import ops

# (tokens, dim, vocabulary, whether it is of the figure's curve)
SIZES = {
    "cpu": [(512, 512, 32000, True), (2048, 512, 32000, True), (2048, 768, 32000, False)],
    "cuda": [(4096, 4096, 32000, True), (8192, 4096, 32000, True), (16384, 4096, 32000, True)],
}
JUDGED = ((2048, 512), (16384, 4096))  # tokens and dim that the targets speak of
if SMOKE:
    SIZES = {device: [(17, 64, 130, True)] for device in DEVICES}


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def token_logprob(
    tokens: int, dim: int, vocabulary: int, products: int, device: str, ours: list[str]
) -> SetUp:
    hidden = torch.randn(tokens, dim, device=device).bfloat16()
    weight = (0.05 * torch.randn(vocabulary, dim, device=device)).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    inputs = (hidden, weight)
    each = torch.full((tokens,), -1 / tokens, device=device)
    contenders = {
        name: Contender(on(name, lambda h, w: ops.token_logprob(h, w, targets)), inputs, (each,))
        for name in ours
    }
    functions = {"eager": cross_entropy, "inductor": inductor(cross_entropy)}
    for name, function in (functions | peers.functions("token_logprob", device)).items():
        # None: a gradient of 1 in the loss's own dtype, which is bf16 or fp32.
        contenders[name] = Contender(lambda h, w, f=function: f(h, w, targets), inputs, (None,))

    def three() -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    return SetUp((lambda: hidden @ weight.T) if products == 1 else three, contenders)


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize(
    ("device", "size"), [(d, size) for d in DEVICES for size in SIZES[d]], ids=str
)
def test_token_logprob(benchmark, capsys, device, size, direction):
    ours = ours_for("token_logprob", device)
    tokens, dim, vocabulary, on_curve = size
    products = 1 if direction == "forward" else 3
    work = products * 2 * tokens * dim * vocabulary
    case = Case(
        op="token_logprob",
        direction=direction,
        device=device,
        size=f"{tokens} tokens, dim {dim}, vocabulary {vocabulary}, bf16",
        x=tokens,
        axis="tokens",
        work=work,
        unit="flops",
        ceiling="its product" if products == 1 else "three products",
        ceiling_work=work,
        set_up=lambda: token_logprob(tokens, dim, vocabulary, products, device, ours),
        input_bytes=2 * dim * (tokens + vocabulary),
        on_curve=on_curve,
        judged=(tokens, dim) in JUDGED,
        limit_bytes=2 * tokens * vocabulary,
    )
    compare(benchmark, capsys, case, ours)
