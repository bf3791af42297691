"""Weights in panels: every instruction set, any shape, the same bits whatever rows there are."""

import pytest
import torch
from numerics import judge, same_bits
from small_models import Ids
from torch.nn import functional as F

from llama2rt import _cpu
from llama2rt.generate import Engine
from llama2rt.model import Llama, LlamaConfig
from llama2rt.ops import packed, sample

SHAPES = [(1, 1), (3, 5), (31, 130), (32, 128), (70, 257), (130, 515)]
"""[columns, inner]"""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, isa, dtype):
    columns, inner = shape
    weight = torch.randn(columns, inner).to(dtype)
    taken = packed.pack([weight])
    for rows in (1, 2, 3, 4, 5, 7, 13, 67):
        x = torch.randn(rows, inner).to(dtype)
        reference, theirs = F.linear(x.double(), weight.double()), F.linear(x, weight)
        judge(f"{rows} rows", taken.linear(x), reference, theirs)
        judge(f"{rows} rows, fp32", taken.linear(x, torch.float32), reference, theirs.float())


def test_a_row_has_the_same_bits_beside_any_others(isa, dtype):
    weight = torch.randn(75, 390).to(dtype)
    x = torch.randn(530, 390).to(dtype)
    for storage in (None, "int8"):
        taken = packed.pack([weight], storage)
        torch.set_num_threads(3)
        everything, wide = taken.linear(x), taken.linear(x, torch.float32)
        torch.set_num_threads(1)
        for first, rows in [(64, 70), (200, 100), *((31 * rows, rows) for rows in range(1, 17))]:
            part = slice(first, first + rows)
            assert same_bits(taken.linear(x[part]), everything[part]), (storage, rows)
            # 16 bits round away what a sum's last bit shows.
            assert same_bits(taken.linear(x[part], torch.float32), wide[part]), (storage, rows)
        assert same_bits(taken.linear(x.T.contiguous().T), everything)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_packed_on_the_spot_or_from_its_transposed(shape, isa, dtype):
    columns, inner = shape
    weight, x = torch.randn(columns, inner).to(dtype), torch.randn(67, inner).to(dtype)
    wanted, threads = packed.pack([weight]).linear(x), torch.get_num_threads()
    for transposed, given in ((False, weight), (True, weight.T.contiguous())):
        # Beyond it lies what must not be read: NaN would show.
        wide = torch.full((given.shape[0], given.shape[1] + 9), torch.nan, dtype=dtype)
        wide[:, : given.shape[1]] = given
        y = torch.full((67, columns), torch.nan, dtype=dtype)
        _cpu.blocked_linear(x, wide[:, : given.shape[1]], transposed, y, threads)
        assert same_bits(y, wanted), transposed


@pytest.mark.parametrize("offset, stride", [(0, 96), (1, 97), (1, 96), (2, 2048), (0, 0)])
def test_rows_of_a_larger_matrix(offset, stride, isa, dtype):
    """Whole pairs of bf16 or not, at any address, 4 KiB apart, or one row again and again."""
    memory = torch.randn(5 * 2048 + 100).to(dtype)
    x = memory.as_strided((5, 70), (stride, 1), offset)
    taken = packed.pack([torch.randn(45, 70).to(dtype)])
    assert same_bits(taken.linear(x), taken.linear(x.clone(memory_format=torch.contiguous_format)))


def test_several_weights_stand_one_below_another(isa, dtype):
    weights = [torch.randn(rows, 36).to(dtype) for rows in (40, 8, 24)]
    x = torch.randn(6, 36).to(dtype)
    for storage in (None, "int8"):
        together = packed.pack(weights, storage).linear(x)
        apart = [packed.pack([weight], storage).linear(x) for weight in weights]
        assert same_bits(together, torch.cat(apart, 1))


@pytest.mark.parametrize("inner", [1, 37, 256])
def test_int8_keeps_a_row_to_half_a_step(inner, isa, dtype):
    weight = torch.randn(45, inner).mul(torch.rand(45, 1) * 30).to(dtype)
    weight[3] = 0
    taken = packed.pack([weight], "int8")
    got = taken.linear(torch.eye(inner).to(dtype), torch.float32).T
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((got - weight.float()).abs() <= step * (0.5 + 1e-5)).all()
    steps = got / step.clamp(min=1e-30)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.abs().amax().round() == 127 and not got[3].any()
    x = torch.randn(9, inner).to(dtype)
    judge(
        "int8",
        taken.linear(x),
        F.linear(x.double(), got.double()),
        F.linear(x, got.to(dtype)),
    )


def test_an_int8_answer_is_the_same_in_any_company(isa, dtype):
    """Of prompts that are computed and decoded together, log-probabilities included."""
    model = Llama(LlamaConfig(192, 2, 4, 4, 300, vocab_size=64, context=64)).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    engine = Engine(model.to(dtype), Ids(), weights="int8")
    prompts = [[3 + (7 * i + j) % 20 for j in range(1 + i)] for i in range(13)]
    together = engine.generate(prompts, max_tokens=6, temperature=0)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], max_tokens=6, temperature=0)
        assert list(alone.tokens) == list(found.tokens), len(prompt)
        assert list(alone.logprobs) == list(found.logprobs), len(prompt)


def as_int16(x):
    """x [T, K] as the kernel takes it beside int8 weights, and its scales [T, chains]."""
    chains = F.pad(x.double(), (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    scales = chains.abs().amax(-1).float() / 32767
    return (chains / scales.clamp(min=1e-38)[..., None]).round(), scales


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("inner", [5, 128, 300, 515])
def test_int8_sums_of_16_bit_rows_are_exact_within_a_chain(inner, dtype16, isa):
    """int16 of a chain's own scale times int8, summed as integers; fp32 from there on."""
    weight, x = torch.randn(45, inner).to(dtype16), torch.randn(40, inner).to(dtype16)
    x[:, 0] *= 1000  # whose chain alone gets coarser
    x[3], x[4, 1:] = 0, 0
    taken = packed.pack([weight], "int8")
    step = weight.float().abs().amax(1) / 127
    exact = taken.linear(torch.eye(inner)).T  # fp32 rows are multiplied as they are
    small = F.pad((exact.double() / step[:, None]).round(), (0, -inner % 128))
    integers, scales = as_int16(x)
    sums = torch.einsum("tck,nck->tcn", integers, small.unflatten(1, (-1, 128)))
    expected = (sums * scales.double()[..., None]).sum(1) * step
    size = (sums.abs() * scales.double()[..., None]).sum(1) * step
    for rows in (1, 3, 5, 12, 40):
        got = taken.linear(x[:rows], torch.float32)
        # A number in the middle of two steps may go to either.
        tie = scales[:rows].sum(1, keepdim=True) * 127 * step
        assert ((got - expected[:rows]).abs() <= 4e-7 * size[:rows] + tie).all()
    assert not got[3].any()


def test_int8_shows_what_is_no_number_and_survives_what_is_small(isa, dtype):
    taken = packed.pack([torch.randn(40, 260).to(dtype)], "int8")
    x = torch.randn(7, 260).to(dtype)
    clean = taken.linear(x)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 127, 128, 259):
            bad = x.clone()
            bad[2, at] = wrong
            got = taken.linear(bad)
            assert not got[2].isfinite().any(), (wrong, at)
            assert same_bits(got[:2], clean[:2]) and same_bits(got[3:], clean[3:])
    tiny = torch.finfo(dtype).smallest_normal / 8
    assert taken.linear(torch.full_like(x, tiny)).isfinite().all()


def test_what_does_not_fit_is_refused():
    weight = torch.randn(8, 16)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, 16\], got \[3, 15\]"):
        packed.pack([weight]).linear(torch.randn(3, 15))
    with pytest.raises(ValueError, match="of its input's dtype or int8"):
        packed.pack([weight]).linear(torch.randn(3, 16).bfloat16())
    with pytest.raises(ValueError, match="in its own dtype or as int8"):
        packed.pack([weight], "bf16")
    with pytest.raises(ValueError, match="storage: expected fp32, bf16, fp16 or int8, got 'int4'"):
        packed.pack([weight], "int4")
    data = torch.empty(100, dtype=torch.uint8)
    with pytest.raises(ValueError, match="data: too small"):
        _cpu.PackedWeight(data, None, 8, 16, "fp32")


def test_a_fingerprint_sees_one_bit_and_the_order():
    tensors = [torch.randn(300_000), torch.randn(3).bfloat16()]
    before = packed.fingerprint(tensors)
    torch.set_num_threads(3)
    assert packed.fingerprint([t.clone() for t in tensors]) == before
    for tensor in tensors:
        for at in (0, -1):
            tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)[at] ^= 1
            assert packed.fingerprint(tensors) != before
            tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)[at] ^= 1
    assert packed.fingerprint(tensors) == before
    assert packed.fingerprint([tensors[0].flip(0), tensors[1]]) != before


@pytest.mark.parametrize("columns", [1, 7, 513, 3000])
def test_sampling_inverts_the_distribution(columns, isa):
    rows = 40
    logits = torch.randn(rows, columns) * 3
    if columns > 1:
        logits[1, columns // 2] = -torch.inf
    uniform = torch.rand(rows, dtype=torch.float64)
    uniform[2], uniform[3] = 2.0**-49, 1 - 2.0**-49
    temperatures = torch.rand(rows) + 0.5
    temperatures[4:6], temperatures[6] = 0, 1
    tokens, logprobs = sample.draw(logits.clone(), temperatures, uniform)
    argmax = temperatures == 0
    scaled = logits.double() / torch.where(argmax, 1, temperatures)[:, None].double()
    expected = scaled.log_softmax(-1)
    got = expected.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), got, rtol=1e-5, atol=2e-6)
    cumulative = expected.exp().cumsum(-1)
    upper = cumulative.gather(1, tokens[:, None])[:, 0]
    lower = upper - got.exp()
    assert ((lower <= uniform + 1e-6) & (uniform <= upper + 1e-6))[~argmax].all()
    assert torch.equal(tokens[argmax], logits[argmax].argmax(-1))
    torch.set_num_threads(3)
    assert same_bits(sample.draw(logits, temperatures, uniform), (tokens, logprobs))
    logits[0, 0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 0] = torch.inf
    tokens, logprobs = sample.draw(logits, temperatures, uniform)
    assert logprobs[:3].isnan().all() and not logprobs[3:].isnan().any()
    assert ((tokens >= 0) & (tokens < columns)).all()
