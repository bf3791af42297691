"""token_logprob in Triton at the sizes it is made for, in bf16. Not yet run on a GPU.

Yardstick in the same dtype: on logits of a GEMM in that dtype made fp32, the chosen one less
torch.logsumexp; the oracle is computed in fp64 on the same GPU.
"""

import importlib

import pytest
import torch
from numerics import draw, judge

from llama2rt.ops import reference


@pytest.fixture(scope="module")
def kernels():
    if not torch.cuda.is_available():
        pytest.skip(f"no usable NVIDIA GPU (torch {torch.__version__})")
    pytest.importorskip("triton", reason="Triton is not installed")
    if importlib.import_module("llama2rt.kernels").INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: kernels are not compiled")
    return importlib.import_module("llama2rt.kernels.token_logprob")


def inputs(tokens, depth, vocabulary, seed):
    hidden = draw((tokens, depth), torch.bfloat16, "normal", seed).cuda()
    weight = draw((vocabulary, depth), torch.bfloat16, "normal", seed + 1).cuda() * depth**-0.5
    targets = torch.randint(-1, vocabulary, (tokens,), device="cuda")
    targets[-1] = vocabulary - 1
    return hidden, weight, targets


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    ("tokens", "depth", "vocabulary"),
    [(1, 4096, 32000), (2048, 512, 32000), (1031, 4096, 32003), (515, 1001, 5000)],
)
def test_numerics(kernels, tokens, depth, vocabulary, with_entropy, seed):
    hidden, weight, targets = inputs(tokens, depth, vocabulary, seed)
    upstream = torch.randn(2, tokens, device="cuda")
    dentropy = upstream[1] if with_entropy else None
    wide = (hidden.double(), weight.double(), targets)
    logprob, entropy, lse = kernels.token_logprob(hidden, weight, targets, 0.7, with_entropy)
    exact = reference.token_logprob(*wide, 0.7, True)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    log_p = ((leaves[0] @ leaves[1].T).float() / 0.7).log_softmax(-1)
    predicted = targets >= 0
    theirs = [
        torch.where(predicted, x, 0.0)
        for x in (
            log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0],
            -(log_p.exp() * log_p).sum(-1),
        )
    ]
    judge("logprob", logprob, exact[0], theirs[0].detach())
    if with_entropy:
        judge("entropy", entropy, exact[1], theirs[1].detach())
    chosen = slice(0, 2 if with_entropy else 1)
    yardstick = torch.autograd.grad(theirs[chosen], leaves, list(upstream)[chosen])
    expected = reference.token_logprob_backward(
        upstream[0].double(),
        None if dentropy is None else dentropy.double(),
        *wide,
        exact[2],
        exact[1],
        0.7,
    )
    arguments = (upstream[0], dentropy, hidden, weight, targets, lse, entropy, 0.7)
    ours = kernels.token_logprob_backward(*arguments)
    for name, *three in zip(("dhidden", "dweight"), ours, expected, yardstick, strict=True):
        judge(name, *three, gradient=True)
    again = kernels.token_logprob_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_peak_memory(kernels, seed):
    """Beside arguments and results: an eighth of the logits a plain implementation holds in fp32.

    A vocabulary of 128256, since the fp32 sum for dhidden alone is D / V of those logits.
    """
    tokens, vocabulary = 8192, 128256
    hidden, weight, targets = inputs(tokens, 4096, vocabulary, seed)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, _, lse = kernels.token_logprob(hidden, weight, targets, 1.0, False)
    logits = 4 * tokens * vocabulary
    assert torch.cuda.max_memory_allocated() - before <= logits / 64
    results = kernels.token_logprob_backward(lse, None, hidden, weight, targets, lse, None, 1.0)
    returned = sum(x.nbytes for x in results)
    assert torch.cuda.max_memory_allocated() - before - returned <= logits / 8
