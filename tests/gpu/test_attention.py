"""attention and decode_attention in Triton and in flash-attn, where that is installed, on a GPU in
bf16, by the rule of `numerics.judge`.

Yardstick: the reference's formulation in bf16 products, one document at a time (torch's math SDPA).
Not yet run on a GPU.
"""

import attention_cases
import decode_cases
import pytest
import torch
from numerics import same_bits

LENGTHS = [1, 2, 0, 113, 203, 1024]
DECODED = [1, 0, 113, 4096, 16, 1000]


@pytest.fixture(params=["triton", "flash_attn"])
def kernels(request, poisoned):
    return request.getfixturevalue(request.param)


def math(sdpa):
    """`sdpa` by torch's own composition of products."""

    def run(*arguments):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sdpa(*arguments)

    return run


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (52, 52)])
def test_attention(heads, kv_heads, dim, causal, kernels, seed):
    case = {
        "queries": LENGTHS,
        "causal": causal,
        "max_seqlen": max(LENGTHS),
        "device": "cuda",
        "yardstick": math(attention_cases.sdpa),
    }
    first, again = (
        attention_cases.check(kernels, heads, kv_heads, dim, torch.bfloat16, seed, **case)
        for _ in range(2)
    )
    assert same_bits(first[2:], again[2:])


@pytest.mark.parametrize("page", [16, 7, 256])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (64, 1)])
def test_decode_attention(heads, kv_heads, dim, page, kernels, seed):
    arguments = decode_cases.make(
        heads, kv_heads, dim, page, torch.bfloat16, "normal", seed, DECODED
    )
    arguments = [x.cuda() for x in arguments]
    decode_cases.check(
        kernels.decode_attention, arguments, dim**-0.5, yardstick=math(decode_cases.sdpa)
    )
    results = [kernels.decode_attention(*arguments, dim**-0.5) for _ in range(2)]
    assert same_bits(*results)


@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (64, 1)])
def test_decode_attention_of_several_queries(heads, kv_heads, dim, page, kernels, seed):
    ragged = decode_cases.RAGGED
    arguments = decode_cases.make(
        heads, kv_heads, dim, page, torch.bfloat16, "normal", seed, **ragged
    )
    arguments = [x.cuda() for x in arguments]
    decode_cases.check(
        *(kernels.decode_attention, arguments, dim**-0.5),
        yardstick=math(decode_cases.sdpa),
        queries=ragged["queries"],
    )
    cu_q = attention_cases.offsets(ragged["queries"]).cuda()
    results = [kernels.decode_attention(*arguments, dim**-0.5, cu_q) for _ in range(2)]
    assert same_bits(*results)
