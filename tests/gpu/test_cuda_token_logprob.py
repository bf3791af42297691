"""token_logprob of `_cuda` at the sizes it is made for. Not yet run on a GPU.

The yardstick and the inputs are in `logprob`; the oracle is computed in fp64 on the same GPU.
"""

import math

import pytest
import torch
from logprob import both, check, same_bits, small

pytestmark = pytest.mark.usefixtures("cuda")


def on_gpu(tensors):
    return tuple(x.cuda() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize(
    ("tokens", "depth", "vocabulary"), [(1, 512, 32000), (1031, 1024, 32003), (515, 1001, 5000)]
)
def test_numerics(cuda, tokens, depth, vocabulary, kind, dtype, seed):
    scale = depth**-0.5
    check(
        *(cuda, tokens, depth, vocabulary, kind, dtype, 0.7, seed),
        device="cuda",
        weight_scale=scale,
    )


def test_more_rows_than_a_tile(cuda, seed):
    check(cuda, 9001, 256, 9000, "normal", torch.bfloat16, 1.0, seed, device="cuda")


def test_again_the_same_bits(cuda):
    hidden, weight, targets = on_gpu(small(torch.bfloat16, tokens=999, depth=512, vocabulary=32000))
    upstream = torch.randn(2, 999, device="cuda")
    results = [both(cuda, hidden, weight, targets, *upstream) for _ in range(3)]
    assert all(same_bits(results[0], other) for other in results[1:])


def test_certain_targets(cuda):
    """Where one logit is all, no gradient is left: an ulp of lse would be one."""
    hidden, weight, _ = on_gpu(small(torch.float32, depth=64))
    targets = (hidden @ weight.T).argmax(-1)
    logprob, entropy, lse = cuda.token_logprob(hidden, weight, targets, 0.05, True)
    assert (logprob <= 0).all() and (logprob == 0).any() and (entropy >= 0).all()
    dhidden, _ = cuda.token_logprob_backward(
        torch.ones_like(lse), None, hidden, weight, targets, lse, None, 0.05
    )
    assert dhidden[logprob == 0].abs().max() < 1e-5


def test_weight_gradient_is_summed_in_fp32(cuda):
    """A row that contributes much, and many too little for a bf16 sum to notice each: it would
    lose 3 % (Liger #1323)."""
    hidden = torch.full((257, 4), 0.125, dtype=torch.bfloat16, device="cuda")
    hidden[0] = 1024
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, device="cuda")
    targets = torch.zeros(257, dtype=torch.int64, device="cuda")
    lse = torch.full((257,), math.log(8), device="cuda")
    _, dweight = cuda.token_logprob_backward(
        torch.ones_like(lse), None, hidden, weight, targets, lse, None, 1.0
    )
    total = 1024 + 256 * 0.125
    assert dweight[0, 0].item() == pytest.approx(total * 7 / 8, rel=0.004)
    assert dweight[1, 0].item() == pytest.approx(-total / 8, rel=0.004)


def test_peak_memory(cuda):
    """Beside arguments and results: an eighth of the logits a plain implementation holds in fp32.

    A vocabulary of 128256, since the fp32 sum for dhidden alone is D / V of those logits.
    """
    tokens, vocabulary = 8192, 128256
    hidden = torch.randn(tokens, 4096, device="cuda").bfloat16()
    weight = torch.randn(vocabulary, 4096, device="cuda").bfloat16() / 64
    targets = torch.randint(-1, vocabulary, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, _, lse = cuda.token_logprob(hidden, weight, targets, 1.0, False)
    logits = 4 * tokens * vocabulary
    assert torch.cuda.max_memory_allocated() - before <= logits / 64
    results = cuda.token_logprob_backward(lse, None, hidden, weight, targets, lse, None, 1.0)
    returned = sum(x.nbytes for x in results)
    assert torch.cuda.max_memory_allocated() - before - returned <= logits / 8


def test_in_a_cuda_graph(cuda):
    hidden, weight, targets = on_gpu(small(torch.bfloat16, tokens=99, depth=64, vocabulary=5000))
    upstream = torch.randn(2, 99, device="cuda")
    expected = both(cuda, hidden, weight, targets, *upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(cuda, hidden, weight, targets, *upstream)
    graph.replay()
    assert same_bits(captured, expected)
