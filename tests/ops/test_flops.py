"""What torch's FlopCounterMode counts for our ops, by its own conventions."""

import pytest
import torch
from attention_cases import offsets
from processes import run_python
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from llama2rt import ops
from llama2rt.ops import backend, flops
from llama2rt.ops.linear import linear


def counted(function) -> dict[str, int]:
    """FLOPs of one call, by our op's name; other ops' under their own."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {
        str(op).removeprefix("llama2rt."): count
        for op, count in counter.get_flop_counts()["Global"].items()
    }


def test_every_op_has_a_formula():
    defined = {name.partition(".")[0] for name in dir(torch.ops.llama2rt)} & set(flops.FORMULAS)
    for name in [*backend.OPS, *(f"{op}_backward" for op in backend.OPS)]:
        if hasattr(torch.ops.llama2rt, name):
            assert getattr(torch.ops.llama2rt, name) in flop_registry, name
    assert defined == set(flops.FORMULAS)


@pytest.mark.parametrize(
    ("queries", "keys", "kv_heads"),
    [([5, 3], None, 4), ([5, 0, 3, 1], None, 2), ([2, 3], [7, 4], 1)],
    ids=["packed", "grouped", "other-keys"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_attention(queries, keys, kv_heads, causal):
    """Two products forward and five backward, of whole rectangles, as torch counts its own."""
    heads, dim = 4, 8
    q = torch.randn(sum(queries), heads, dim, requires_grad=True)
    k, v = (torch.randn(sum(keys or queries), kv_heads, dim, requires_grad=True) for _ in "kv")
    cu_k = offsets(keys) if keys else None

    def run():
        out = ops.attention(q, k, v, offsets(queries), cu_seqlens_k=cu_k, causal=causal)
        out.sum().backward()

    pairs = sum(a * b for a, b in zip(queries, keys or queries, strict=True))
    product = 2 * pairs * heads * dim
    assert counted(run) == {"attention": 2 * product, "attention_backward": 5 * product}


def test_attention_as_torch_counts_its_own():
    """By its formulas: its CPU kernel has none, and is counted as nothing."""
    rows, length, heads, kv_heads, dim = 3, 6, 4, 2, 8
    q = torch.randn(rows * length, heads, dim, requires_grad=True)
    k = torch.randn(rows * length, kv_heads, dim, requires_grad=True)
    shapes = [(rows, n, length, dim) for n in (heads, kv_heads, kv_heads)]
    assert counted(lambda: ops.attention(q, k, k, offsets([length] * rows)).sum().backward()) == {
        "attention": flop_counter.sdpa_flop_count(*shapes),
        "attention_backward": flop_counter.sdpa_backward_flop_count(
            shapes[0], shapes[0], shapes[0], shapes[0]
        ),
    }


@pytest.mark.parametrize("grad", [False, True])
def test_decode_attention(grad):
    q, lengths = torch.randn(3, 4, 8), torch.tensor([5, 0, 9])
    caches = torch.randn(2, 6, 4, 2, 8)
    table = torch.arange(9).view(3, 3) % 6
    with torch.set_grad_enabled(grad):
        found = counted(lambda: ops.decode_attention(q, *caches, table, lengths))
    assert found == {"decode_attention": 4 * (5 + 9) * 4 * 8}
    cu_q = torch.tensor([0, 2, 2, 3])  # a rectangle a sequence, as attention counts documents
    with torch.set_grad_enabled(grad):
        found = counted(lambda: ops.decode_attention(q, *caches, table, lengths, cu_seqlens_q=cu_q))
    assert found == {"decode_attention": 4 * (2 * 5 + 9) * 4 * 8}


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("which", ["reference", None])
def test_token_logprob(tokens, which):
    """Logits forward; backward them again, unless they were stashed, and two gradients."""
    dim, vocabulary = 16, 50
    hidden = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(vocabulary, dim, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    with ops.use(which):
        found = counted(lambda: ops.token_logprob(hidden, weight, targets).sum().backward())
    forward, backward = found.values()
    product = 2 * tokens * dim * vocabulary
    assert forward == product
    if "token_logprob_stashed" in found:
        again = 2 * max(0, tokens - dim) * dim * vocabulary
        assert backward == 2 * product + again
    else:
        assert backward == 3 * product


def test_token_logprob_counts_the_rows_with_a_target():
    hidden, weight = torch.randn(6, 16), torch.randn(50, 16)
    targets = torch.tensor([3, -1, -1, 0, -100, 49])
    assert counted(lambda: ops.token_logprob(hidden, weight, targets)) == {
        "token_logprob": 2 * 3 * 16 * 50
    }


@pytest.mark.parametrize("rows", [2, 9, 300])
def test_a_linear_layer_counts_whichever_product_runs(rows):
    """Few and many rows of 16 bits have kernels of their own on some CPUs, where they are built."""
    x, weight = torch.ones(rows, 16).bfloat16(), torch.ones(8, 16).bfloat16()
    with torch.no_grad():
        found = counted(lambda: linear(x, weight))
    assert sum(found.values()) == 2 * rows * 16 * 8
    x.requires_grad_(), weight.requires_grad_()
    found = counted(lambda: linear(x, weight).sum().backward())
    assert sum(found.values()) == 3 * 2 * rows * 16 * 8


def test_elementwise_ops_count_nothing_as_torchs_do():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    q, cos = torch.randn(5, 2, 8, requires_grad=True), torch.ones(5, 4)

    def run():
        total = ops.rms_norm(x, weight, 1e-5).sum() + ops.swiglu(x, x).sum()
        total = total + sum(y.sum() for y in ops.add_rms_norm(x, x, weight, 1e-5))
        total = total + sum(y.sum() for y in ops.rope(q, q, cos, cos, torch.arange(5)))
        total.backward()

    found = counted(run)
    names = ("rms_norm", "add_rms_norm", "swiglu", "rope")
    assert found == dict.fromkeys([n + end for n in names for end in ("", "_backward")], 0)


def test_offsets_without_numbers_give_an_upper_bound():
    q, cu = torch.empty(8, 2, 4, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    formula = flops.FORMULAS["attention"]
    assert formula(q, q, q, cu, cu, 5, True, 1.0, "reference") == 4 * 8 * 5 * 2 * 4
    assert formula(q, q, q, cu, cu, 0, True, 1.0, "reference") == 4 * 8 * 8 * 2 * 4
    table = torch.empty(8, 3, device="meta")
    cache = torch.empty(6, 16, 2, 4, device="meta")
    for lengths, cu_q in ((cu, None), (torch.ones(8), cu)):
        found = flops.FORMULAS["decode_attention"](
            q, cache, cache, table, lengths, 1.0, cu_q, "reference"
        )
        assert found == 4 * 8 * 3 * 16 * 2 * 4


def test_ops_do_not_import_the_counter_and_either_order_registers():
    """The counter imports Triton, which takes longer than the ops do."""
    run_python(
        "-c",
        "import sys, torch\nfrom llama2rt import ops\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.llama2rt.attention in flop_registry\n"
        "from llama2rt.ops import flops\nfinders = len(sys.meta_path)\nflops.register()\n"
        "assert len(sys.meta_path) == finders\n"
        "assert not any(isinstance(f, flops._OnImport) for f in sys.meta_path)\n"
        "for name in flops.FORMULAS: del flop_registry[getattr(torch.ops.llama2rt, name)]\n"
        "flops.register(); assert torch.ops.llama2rt.attention in flop_registry",
    )
