"""token_logprob in Triton and CUDA C++, on a GPU, at the sizes it is made for.

The yardstick and the inputs are in `logprob_cases`; the oracle is computed in fp64 on the same GPU.
Not yet run on a GPU.
"""

import logprob_cases
import pytest
import torch
from logprob_cases import both_directions, check, small
from numerics import same_bits


@pytest.fixture
def kernels(request, backend):
    """The functions of each backend in turn."""
    return request.getfixturevalue(backend)


def on_gpu(tensors):
    return tuple(x.cuda() for x in tensors)


@pytest.mark.parametrize("kind", ["normal", "small", "tail"])
@pytest.mark.parametrize(
    ("tokens", "depth", "vocabulary"), [(1, 512, 32000), (1031, 1024, 32003), (515, 1001, 5000)]
)
def test_numerics(cuda, tokens, depth, vocabulary, kind, dtype, seed):
    case = {"device": "cuda", "weight_scale": depth**-0.5}
    check(cuda, tokens, depth, vocabulary, kind, dtype, 0.7, seed, **case)


@pytest.mark.parametrize(
    ("tokens", "depth", "vocabulary"),
    [(1, 4096, 32000), (2048, 512, 32000), (1031, 4096, 32003), (515, 1001, 5000)],
)
def test_numerics_at_the_width_of_models(triton, tokens, depth, vocabulary, seed):
    case = {"device": "cuda", "weight_scale": depth**-0.5}
    check(triton, tokens, depth, vocabulary, "normal", torch.bfloat16, 0.7, seed, **case)


def test_more_rows_than_a_tile(cuda, seed):
    check(cuda, 9001, 256, 9000, "normal", torch.bfloat16, 1.0, seed, device="cuda")


def test_again_the_same_bits(kernels):
    hidden, weight, targets = on_gpu(small(torch.bfloat16, tokens=999, depth=512, vocabulary=32000))
    upstream = torch.randn(2, 999, device="cuda")
    results = [both_directions(kernels, hidden, weight, targets, *upstream) for _ in range(3)]
    assert all(same_bits(results[0], other) for other in results[1:])


def test_certain_targets_are_never_positive_and_leave_no_gradient(cuda):
    logprob_cases.check_gradient_of_certain_targets(cuda, torch.float32, "cuda")


def test_weight_gradient_is_summed_in_fp32(cuda):
    logprob_cases.check_weight_gradient_is_summed_in_fp32(cuda, device="cuda")


def test_peak_memory(kernels):
    """Beside arguments and results: an eighth of the logits a plain implementation holds in fp32.

    A vocabulary of 128256, since the fp32 sum for dhidden alone is D / V of those logits.
    """
    tokens, vocabulary = 8192, 128256
    hidden = torch.randn(tokens, 4096, device="cuda").bfloat16()
    weight = torch.randn(vocabulary, 4096, device="cuda").bfloat16() / 64
    targets = torch.randint(-1, vocabulary, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, _, lse = kernels.token_logprob(hidden, weight, targets, 1.0, False)
    logits = 4 * tokens * vocabulary
    assert torch.cuda.max_memory_allocated() - before <= logits / 64
    results = kernels.token_logprob_backward(lse, None, hidden, weight, targets, lse, None, 1.0)
    returned = sum(x.nbytes for x in results)
    assert torch.cuda.max_memory_allocated() - before - returned <= logits / 8


def test_in_a_cuda_graph(cuda):
    hidden, weight, targets = on_gpu(small(torch.bfloat16, tokens=99, depth=64, vocabulary=5000))
    upstream = torch.randn(2, 99, device="cuda")
    expected = both_directions(cuda, hidden, weight, targets, *upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_directions(cuda, hidden, weight, targets, *upstream)
    graph.replay()
    assert same_bits(captured, expected)
