"""What holds for the kernels of `_cpu` beside their numbers: any strides, no input changed, nothing
written outside, the same bits for any number of threads, offsets beyond 2^31, no index trusted.
"""

import ctypes
import itertools
import math
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import offsets
from elementwise_cases import EPS
from numerics import same_bits
from processes import run_python
from strides import STRIDES
from torch import Tensor
from torch._subclasses import FakeTensorMode

from llama2rt import _cpu
from llama2rt.ops import cpu, logprob_tiles
from llama2rt.ops.cpu_kernels import attention, elementwise


def calls(dtype: torch.dtype, rows: int = 203, columns: int = 611, variant=lambda x: x) -> list:
    """One (kernel, arguments) for each kernel; `variant` is applied to each activation."""

    def activation(*shape: int) -> Tensor:
        return variant(torch.randn(shape).to(dtype))

    x, residual, dy = (activation(rows, columns) for _ in range(3))
    weight, rstd = torch.randn(columns).to(dtype), torch.rand(rows) + 0.5
    q, k = activation(rows, 8, 40), activation(rows, 2, 40)
    table, positions = torch.randn(2, 64, 20), torch.randint(64, (rows,))
    k_cache, v_cache = activation(30, 4, 2, 40), activation(30, 4, 2, 40)
    pages, lengths = torch.randint(30, (rows, 5)), torch.randint(21, (rows,))
    cu = torch.tensor([0, rows // 3, rows // 3, rows])
    v, out, out_lse = activation(rows, 2, 40), activation(rows, 8, 40), torch.randn(8, rows) + 5
    output = (torch.randn(700, columns) / columns).to(dtype)
    targets, per_row = torch.randint(-1, 700, (rows,)), [variant(torch.rand(rows)) for _ in "123"]
    dlogprob, dentropy, entropy = per_row
    lse = entropy + 6
    several = torch.randint(30, (3, 5)), torch.randint(21, (3,))
    cu_q = torch.tensor([0, min(3, rows), min(3, rows), rows])
    return [
        (cpu.rms_norm, (x, weight, EPS)),
        (cpu.rms_norm_backward, (dy, x, weight, rstd)),
        (cpu.add_rms_norm, (x, residual, weight, EPS)),
        (cpu.add_rms_norm_backward, (dy, residual, x, weight, rstd)),
        (cpu.swiglu, (x, residual)),
        (cpu.swiglu_backward, (dy, x, residual)),
        (cpu.rope, (q, k, *table, positions)),
        (cpu.rope_backward, (q, k, *table, positions)),
        (cpu.attention, (q, k, v, cu, cu, 0, True, 0.2)),
        (cpu.attention_backward, (q, q, k, v, out, out_lse, cu, cu, 0, True, 0.2)),
        (cpu.decode_attention, (q, k_cache, v_cache, pages, lengths, 0.2)),
        (cpu.decode_attention, (q, k_cache, v_cache, *several, 0.2, cu_q)),
        (cpu.token_logprob, (x, output, targets, 0.7, True)),
        (
            cpu.token_logprob_backward,
            (dlogprob, dentropy, x, output, targets, lse, entropy, 0.7),
        ),
        (stashed_logprob, (dlogprob, dentropy, x, output, targets)),
        (cpu.linear, (x, output)),
        (cpu.weight_gradient, (residual, x)),
    ]


def stashed_logprob(
    dlogprob: Tensor, dentropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """The two calls that share the memory of the gradient of weight, as one."""
    inputs = hidden, weight, targets
    logprob, entropy, lse, dweight, tile = cpu.token_logprob_stashed(*inputs, 0.7, True)
    dhidden = cpu.token_logprob_stashed_backward(
        dweight, tile, dlogprob, dentropy, *inputs, lse, entropy, 0.7
    )
    return logprob, entropy, lse, dhidden, dweight


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides, dtype):
    for kernel, arguments in calls(dtype, 9, 75, STRIDES[strides]):
        dense = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        assert same_bits(kernel(*arguments), kernel(*dense)), kernel.__name__


def before_a_hole(x: Tensor) -> Tensor:
    """The same values at the very end of memory: whoever reads on is killed."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return flat.view(x.shape).copy_(x)


@pytest.mark.parametrize("columns", [48, 75])
def test_nothing_is_read_beyond_an_input(columns, isa, dtype):
    for rows in (8, 9, 10, 11):
        for kernel, arguments in calls(dtype, rows, columns):
            at_end = [
                before_a_hole(a) if isinstance(a, Tensor) and a.numel() else a for a in arguments
            ]
            assert same_bits(kernel(*at_end), kernel(*arguments)), kernel.__name__


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_torch_default_dtype_does_not_matter(dtype, default):
    for kernel, arguments in calls(dtype, 9, 75):
        expected = kernel(*arguments)
        torch.set_default_dtype(default)
        try:
            got = kernel(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)
        assert same_bits(got, expected), kernel.__name__


@pytest.mark.parametrize("isa", _cpu.instruction_sets())
def test_a_hidden_key_weighs_nothing(isa):
    """Not even 2^-126 of a value near the largest there is."""
    before = _cpu.isa()
    _cpu.select(isa)
    try:
        q, k, v = torch.randn(3, 2, 1, 8)
        v[1] = 3e38
        cu = torch.tensor([0, 2])
        out, _ = cpu.attention(q, k, v, cu, cu, 2, True, 0.3)
        pages = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2])
        paged = cpu.decode_attention(q, k[None], v[None], *pages, 0.3, cu)
    finally:
        _cpu.select(before)
    assert torch.equal(out[0], v[0]) and torch.equal(paged[0], v[0])


@pytest.mark.parametrize("isa", _cpu.instruction_sets())
def test_a_few_queries_have_the_bits_that_each_has_alone(isa, dtype):
    """What guesses ahead gives what decoding gives. Over the border of a page, of a tile and of the
    tokens of a work item."""
    queries, lengths = [3, 8, 1, 2], torch.tensor([35, 1029, 1500, 4])
    q, cu_q = torch.randn(sum(queries), 4, 40).to(dtype), offsets(queries)
    caches = torch.randn(2, 30, 64, 2, 40).to(dtype)
    table = torch.stack([torch.randperm(30) for _ in queries])
    before = _cpu.isa()
    _cpu.select(isa)
    try:
        several = cpu.decode_attention(q, *caches, table, lengths, 0.3, cu_q)
        for sequence, (begin, end) in enumerate(itertools.pairwise(cu_q.tolist())):
            for row in range(begin, end):
                of_row = table[sequence, None], lengths[sequence, None] - (end - 1 - row)
                alone = cpu.decode_attention(q[row, None], *caches, *of_row, 0.3)
                assert torch.equal(several[row], alone[0])
    finally:
        _cpu.select(before)


def test_inputs_are_left_alone(dtype):
    for kernel, arguments in calls(dtype):
        copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        kernel(*arguments)
        for argument, copy in zip(arguments, copies, strict=True):
            assert not isinstance(argument, Tensor) or torch.equal(argument, copy), kernel.__name__


def test_same_bits_for_any_number_of_threads_and_again(dtype):
    for kernel, arguments in calls(dtype):
        results = []
        for threads in (1, 2, 3, 1):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            results.append(kernel(*arguments))
            torch.set_num_threads(before)
        assert all(same_bits(results[0], other) for other in results[1:]), kernel.__name__


@pytest.mark.parametrize("lengths", [(700, 700), (520, 900), (900, 520)])
def test_a_document_divided_among_threads_has_the_same_bits(lengths, dtype):
    """The only document: with threads to spare its gradient is formed in pieces, twice over."""
    cu_q, cu_k = (torch.tensor([0, length]) for length in lengths)
    q, dout = torch.randn(2, lengths[0], 2, 24).to(dtype).unbind()
    k, v = torch.randn(2, lengths[1], 1, 24).to(dtype).unbind()
    out, lse = cpu.attention(q, k, v, cu_q, cu_k, 0, True, 0.2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.attention_backward(dout, q, k, v, out, lse, cu_q, cu_k, 0, True, 0.2))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_several_python_threads_at_once(dtype):
    work = calls(dtype)
    expected = [kernel(*arguments) for kernel, arguments in work]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(kernel, *arguments) for kernel, arguments in work * 8]
    for index, future in enumerate(futures):
        assert same_bits(future.result(), expected[index % len(work)])


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(rows, dtype):
    for kernel, arguments in calls(dtype, rows):
        for result in as_tuple(kernel(*arguments)):
            assert torch.isfinite(result).all(), kernel.__name__
    for kernel, arguments in calls(dtype, 0):
        if kernel.__name__ in (
            "rms_norm_backward",
            "add_rms_norm_backward",
            "token_logprob_backward",
        ):
            assert not kernel(*arguments)[1].any(), "no rows: a zero weight gradient"


MARGIN = 64  # elements: more than the widest vector


@pytest.fixture
def margins(monkeypatch):
    """Every tensor that a call allocates lies between margins of 7; returns all of them."""
    buffers: list[Tensor] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * MARGIN,), 7.0, dtype=dtype)
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].fill_(value).view(shape)

    def shape_of(sizes: tuple) -> tuple[int, ...]:
        return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes

    def new(value: float):
        def method(self: Tensor, *sizes, dtype: torch.dtype | None = None) -> Tensor:
            return allocate(shape_of(sizes), dtype or self.dtype, value)

        return method

    def empty_like(x: Tensor) -> Tensor:
        return allocate(tuple(x.shape), x.dtype, torch.nan)

    for module in (attention, elementwise, logprob_tiles):
        monkeypatch.setattr(module, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "new_empty", new(torch.nan))
    monkeypatch.setattr(Tensor, "new_zeros", new(0.0))
    return buffers


def test_nothing_is_written_outside(isa, dtype, margins):
    """Nor left unwritten inside: what is allocated starts as NaN."""
    for columns in (1, 2, 7, 8, 15, 16, 17, 31, 33, 49):
        for kernel, arguments in calls(dtype, 5, columns):
            margins.clear()
            results = as_tuple(kernel(*arguments))
            assert margins, f"{kernel.__name__}: allocates in a way this test does not see"
            for buffer in margins:
                edges = torch.cat((buffer[:MARGIN], buffer[-MARGIN:]))
                assert (edges == 7).all(), f"{kernel.__name__}, {columns} columns"
            assert all(x.isfinite().all() for x in results), f"{kernel.__name__}, {columns} columns"


@pytest.mark.parametrize("columns", [32, 64, 608, 611])
def test_past_the_caches_go_the_same_bits(isa, dtype, columns, margins):
    """And nothing outside. Where rows do not fill cache lines, 611 columns, nothing goes past."""
    q, k = torch.randn(2, 9, 3, 2 * columns).to(dtype)
    table, positions = torch.randn(2, 64, columns), torch.randint(64, (9,))
    elementwise = calls(dtype, 9, columns)[:6]
    rotations = [(kernel, (q, k, *table, positions)) for kernel in (cpu.rope, cpu.rope_backward)]
    for kernel, arguments in elementwise + rotations:
        expected = kernel(*arguments)
        margins.clear()
        before = _cpu.stream_from(0)
        try:
            assert same_bits(kernel(*arguments), expected), kernel.__name__
        finally:
            _cpu.stream_from(before)
        for buffer in margins:
            assert (torch.cat((buffer[:MARGIN], buffer[-MARGIN:])) == 7).all(), kernel.__name__


def test_what_exceeds_the_caches_is_what_its_parts_are(isa, dtype):
    """At the limit that users have the whole goes past the caches; its thirds are kept in them."""
    torch.set_num_threads(2)
    rows, columns = 3000, 2048
    x, residual, dy = torch.randn(3, rows, columns).to(dtype)
    weight, rstd = torch.randn(columns).to(dtype), torch.rand(rows) + 0.5
    thirds = [slice(0, 1000), slice(1000, 2000), slice(2000, rows)]

    def backward(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
        return cpu.rms_norm_backward(dy, x, weight, rstd)[0]

    for kernel, of_rows, rest in (
        (cpu.add_rms_norm, (x, residual), (weight, EPS)),
        (backward, (dy, x, rstd), ()),
        (cpu.swiglu, (x, residual), ()),
        (cpu.swiglu_backward, (dy, x, residual), ()),
    ):
        whole = as_tuple(kernel(*of_rows, *rest))
        before = _cpu.stream_from(1 << 62)
        parts = [as_tuple(kernel(*(a[some] for a in of_rows), *rest)) for some in thirds]
        _cpu.stream_from(before)
        joined = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
        assert same_bits(whole, joined), kernel.__name__


def test_a_nan_stays_in_its_row(isa, dtype):
    x, weight = torch.randn(4, 50).to(dtype), torch.ones(50, dtype=dtype)
    x[2, 49] = torch.nan
    for y in (cpu.rms_norm(x, weight, EPS)[0], cpu.swiglu(x, x)):
        assert torch.isfinite(y[[0, 1, 3]]).all() and y[2, 49].isnan()


def test_offsets_beyond_32_bits(far):
    near = torch.randn(3, 64).bfloat16()
    rows, columns = near.shape
    apart = far(near)
    weight, rstd = torch.randn(columns).bfloat16(), torch.rand(rows)
    assert same_bits(
        cpu.add_rms_norm(apart, apart, weight, EPS), cpu.add_rms_norm(near, near, weight, EPS)
    )
    assert same_bits(
        cpu.add_rms_norm_backward(apart, apart, apart, weight, rstd),
        cpu.add_rms_norm_backward(near, near, near, weight, rstd),
    )
    assert same_bits(cpu.swiglu(apart, apart), cpu.swiglu(near, near))
    assert same_bits(
        cpu.swiglu_backward(apart, apart, apart), cpu.swiglu_backward(near, near, near)
    )
    far_heads, near_heads = apart.unflatten(1, (2, 32)), near.unflatten(1, (2, 32))
    table, positions = torch.randn(2, 5, 16), torch.arange(rows)
    assert same_bits(
        cpu.rope(far_heads, far_heads, *table, positions),
        cpu.rope(near_heads, near_heads, *table, positions),
    )
    cu = torch.tensor([0, rows])
    far_out, near_out = (
        cpu.attention(x, x, x, cu, cu, 0, True, 1.0) for x in (far_heads, near_heads)
    )
    assert same_bits(far_out, near_out)
    assert same_bits(
        *(
            cpu.attention_backward(x, x, x, x, *near_out, cu, cu, 0, True, 1.0)
            for x in (far_heads, near_heads)
        )
    )
    far_cache, near_cache = far_heads[:, None], near_heads[:, None]
    pages, lengths = torch.tensor([[2, 1, 0]]).expand(rows, -1), torch.tensor([3, 2, 1])
    assert same_bits(
        cpu.decode_attention(far_heads, far_cache, far_cache, pages, lengths, 1.0),
        cpu.decode_attention(near_heads, near_cache, near_cache, pages, lengths, 1.0),
    )


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_the_tables_is_refused(position):
    q = torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="positions"):
        cpu.rope(q, q, torch.zeros(5, 2), torch.zeros(5, 2), torch.tensor([0, position]))


@pytest.mark.parametrize(
    ("page", "length", "named"), [(3, 2, "block_table"), (-1, 2, "block_table"), (0, 5, "lengths")]
)
def test_a_page_or_length_outside_the_caches_is_refused(page, length, named):
    q, cache = torch.zeros(1, 1, 4), torch.zeros(3, 2, 1, 4)
    with pytest.raises(ValueError, match=named):
        cpu.decode_attention(
            q, cache, cache, torch.tensor([[page, 0]]), torch.tensor([length]), 1.0
        )
    unread = torch.tensor([[0, 99]])
    assert not cpu.decode_attention(q, cache, cache, unread, torch.tensor([2]), 1.0).any()


def test_select_refuses_what_the_processor_lacks():
    with pytest.raises(ValueError, match="not usable"):
        _cpu.select("avx1024")


def test_one_openmp_runtime_beside_torch():
    """Both orders of import end with one pool of threads, torch's own."""
    program = (
        "import {}, {}; torch.randn(4096, 64).sum();"
        "lines = open('/proc/self/maps').read().splitlines();"
        "print(len({{l.split()[-1] for l in lines if 'gomp' in l or 'iomp' in l}}))"
    )
    for order in (("torch", "llama2rt.ops"), ("llama2rt.ops", "torch")):
        assert run_python("-c", program.format(*order)).stdout.strip() == "1"


class Wrapper(torch.Tensor):
    """A subclass that stands for other tensors, as DTensor does, and has no memory of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_the_boundary_refuses_what_it_cannot_read():
    """Callers check arguments; a slip of theirs must not become a read of other memory."""
    x = torch.ones(2, 4)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        _cpu.swiglu([1.0], x, x, 1)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        _cpu.swiglu(x.double(), x.double(), x.double(), 1)
    with pytest.raises(ValueError, match="too few dimensions"):
        _cpu.swiglu(x[0], x, x, 1)
    with pytest.raises(ValueError, match="statistics are float32"):
        _cpu.rms_norm(x, None, x[0], EPS, x.clone(), None, torch.ones(2).double(), 1)
    with pytest.raises(ValueError, match="targets are int64"):
        _cpu.token_logprob(x, torch.ones(2, dtype=torch.int32), 0, 1.0, *x.unbind(1), 1)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        _cpu.swiglu(x, None, x, 1)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="has no memory"):
        _cpu.swiglu(mode.from_tensor(x), x, x, 1)
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, x.shape, dtype=x.dtype)
    with pytest.raises(ValueError, match="has no memory"):
        _cpu.swiglu(wrapper, x, x, 1)


def test_a_parameter_is_read_like_a_tensor():
    x = torch.randn(3, 4)
    weight = torch.nn.Parameter(torch.randn(4))
    assert same_bits(cpu.rms_norm(x, weight, EPS), cpu.rms_norm(x, weight.detach().clone(), EPS))
