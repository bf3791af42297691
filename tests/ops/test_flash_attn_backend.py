"""The backend of flash-attn, against a stand-in for that library that checks every argument.

What this shows is the convention, the autograd formula and where a call goes; flash-attn's own
numbers need a GPU. Where it is absent it costs nothing, and is named with the reason.
"""

import dataclasses
import importlib
import os
import re
import sys
from importlib.util import spec_from_loader

import flash_attn_stand_in
import pytest
import torch
from attention_cases import offsets
from numerics import draw, judge, judge_gradients, leaves_of, same_bits, wide
from processes import run_python

from llama2rt import ops
from llama2rt.ops import backend, reference

MODULE = "llama2rt.ops.flash_attn"
INTERFACE = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_with_kvcache")


def package(folder, functions=INTERFACE) -> None:
    """A folder flash_attn as the distribution lays it out, whose source has these functions."""
    (folder / "flash_attn").mkdir()
    text = "".join(f"@wrapped\ndef {name}(\n    q,\n): ...\n" for name in functions)
    (folder / "flash_attn/flash_attn_interface.py").write_text(text)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """The backend in use, with the stand-in under it, serving CPU tensors; what it has called."""
    found: list[str] = []
    flash_attn_stand_in.install(monkeypatch, found)
    package(tmp_path)
    spec = spec_from_loader("flash_attn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "flash_attn")]
    sys.modules["flash_attn"].__spec__ = spec
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    loaded = backend._load("flash_attn")
    assert not loaded.unusable
    loaded = dataclasses.replace(loaded, devices=("cpu",))
    monkeypatch.setitem(backend._backends, "flash_attn", loaded)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    with ops.use("flash_attn"):
        yield found
    torch.use_deterministic_algorithms(False)
    sys.modules.pop(MODULE, None)


CASES = {
    "heads": (4, 4, 16, [1, 2, 0, 17, 40], None, True),
    "groups": (8, 2, 64, [1, 2, 0, 17, 40], None, True),
    "one query each, or none": (4, 1, 8, [1, 0, 1, 1], None, True),
    "odd dimension": (2, 1, 13, [3, 9], None, True),
    "rows that see no key": (2, 2, 8, [5, 3, 4], [2, 0, 9], True),
    "not causal": (2, 1, 8, [5, 3], [2, 7], False),
}


@pytest.mark.parametrize("bound", ["given", "to be found"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_attention(name, dtype, bound, calls, seed):
    heads, kv_heads, dim, queries, keys, causal = CASES[name]
    q = draw((sum(queries), heads, dim), dtype, "normal", seed)
    k, v = (draw((sum(keys or queries), kv_heads, dim), dtype, "normal", seed + i) for i in (1, 2))
    dout = draw(q.shape, dtype, "normal", seed + 3)
    cu_q, cu_k = offsets(queries, torch.int64), offsets(keys) if keys else None
    leaves = leaves_of(q, k, v)
    longest = max(queries) + 3 if bound == "given" else None
    out = ops.attention(*leaves, cu_q, cu_seqlens_k=cu_k, max_seqlen=longest, causal=causal)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert calls == ["_flash_attn_varlen_forward", "_flash_attn_varlen_backward"]

    rest = (cu_q, cu_q if cu_k is None else cu_k, 0, causal, dim**-0.5)
    exact, lse = reference.attention(*wide(q, k, v), *rest)
    same, same_lse = reference.attention(q, k, v, *rest)
    judge("out", out.detach(), exact, same)
    expected = reference.attention_backward(*wide(dout, q, k, v), exact, lse, *rest)
    yardstick = reference.attention_backward(dout, q, k, v, same, same_lse, *rest)
    judge_gradients("dq dk dv", gradients, expected, yardstick)
    assert all(x.is_contiguous() for x in (out, *gradients))
    found = backend.implementation("attention", "flash_attn", dtype)(q, k, v, *rest)[1]
    assert torch.equal(found == -torch.inf, lse == -torch.inf), "lse is ours, not flash-attn's"


def test_any_strides_and_no_input_changed(calls):
    """What 16-byte accesses could not read is copied; the rest is handed over as it lies."""
    fused = torch.randn(9, 8 * 24 + 1).bfloat16()
    q, k, v = fused[:, 1:].view(9, 8, 24).split((4, 2, 2), 1)
    dout = torch.randn(9, 1, 1).bfloat16().expand(9, 4, 24)
    copy = fused.clone()
    results = []
    for made in ((q, k, v, dout), [x.contiguous() for x in (q, k, v, dout)]):
        leaves = [x.detach().requires_grad_() for x in made[:3]]
        out = ops.attention(*leaves, offsets([4, 5]))
        results.append((out, *torch.autograd.grad(out, leaves, made[3])))
    assert same_bits(*results)
    assert torch.equal(fused, copy) and len(calls) == 4


@pytest.mark.parametrize("queries", [[0, 0], [3, 4]])
def test_no_tokens_or_no_keys(queries, calls):
    q = torch.randn(sum(queries), 2, 8).bfloat16().requires_grad_()
    k = torch.randn(0, 2, 8).bfloat16().requires_grad_()
    out = ops.attention(q, k, k, offsets(queries), cu_seqlens_k=offsets([0, 0]))
    gradients = torch.autograd.grad(out.sum(), (q, k))
    assert not out.any() and not gradients[0].any() and gradients[1].shape == k.shape
    assert not calls


@pytest.mark.parametrize("reason", ["fp32", "fp64", "negative scale", "wide heads"])
def test_what_it_does_not_take_runs_elsewhere(reason, calls):
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(reason, torch.bfloat16)
    dim = 264 if reason == "wide heads" else 8
    q = torch.randn(5, 2, dim, dtype=dtype, requires_grad=True)
    scale = -0.3 if reason == "negative scale" else 0.3
    results = []
    for name in ("flash_attn", backend.fallback("flash_attn")):
        with ops.use(name):
            out = ops.attention(q, q, q, offsets([2, 3]), scale=scale)
        results.append((out, *torch.autograd.grad(out.sum(), q)))
    assert same_bits(*results) and not calls


def decode_arguments(page, dim=16, dtype=torch.bfloat16):
    q = torch.randn(3, 4, dim).to(dtype)
    k, v = torch.randn(2, 5, page, 2, dim).to(dtype)
    table = torch.tensor([[3, 1], [2, 2**30], [2**30, 2**30]])
    return q, k, v, table, torch.tensor([page + 3, page, 0])


@pytest.mark.parametrize(("page", "dim"), [(256, 16), (512, 64), (16, 16), (256, 12)])
def test_decode_attention(page, dim, calls):
    arguments = decode_arguments(page, dim)
    ours = ops.decode_attention(*arguments, scale=0.2)
    torch.testing.assert_close(ours, reference.decode_attention(*arguments, 0.2))
    assert calls == (["flash_attn_with_kvcache"] if page % 256 == 0 and dim % 8 == 0 else [])
    assert not ours[2].any()


def test_decode_attention_over_caches_it_cannot_read(calls):
    q, k, v, *rest = decode_arguments(256)
    apart = torch.cat((k, v[..., :1]), -1)[..., :16]  # rows of 17 elements
    torch.testing.assert_close(
        ops.decode_attention(q, apart, v, *rest), ops.decode_attention(q, k, v, *rest)
    )
    assert calls == ["flash_attn_with_kvcache"], "only the second call"


@pytest.mark.parametrize("page", [256, 16])
@pytest.mark.parametrize("queries", [[2, 1, 0], [1, 0, 2]])
def test_several_queries_a_sequence(page, queries, calls):
    arguments, cu_q = decode_arguments(page), offsets(queries).long()
    ours = ops.decode_attention(*arguments, cu_seqlens_q=cu_q)
    torch.testing.assert_close(ours, reference.decode_attention(*arguments, 0.25, cu_q))
    assert calls == (["_flash_attn_varlen_forward"] if page == 256 else [])


def test_other_ops_run_as_without_it(calls):
    x = torch.randn(3, 8)
    found = ops.backends()
    assert found["attention"]["native"].count("flash_attn") == 1
    for op in backend.OPS:
        assert found[op]["chosen"] == "flash_attn" and "flash_attn" not in found[op]["unusable"]
        assert ("flash_attn" in found[op]["native"]) == ("attention" in op)
    fallback = backend.fallback("flash_attn")
    assert fallback == ("cpu" if "cpu" in found["swiglu"]["native"] else "reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = backend.implementation("swiglu", "flash_attn", dtype)
        assert given is backend.implementation("swiglu", fallback, dtype)
    with ops.use(fallback):
        expected = ops.swiglu(x, x)
    assert torch.equal(ops.swiglu(x, x), expected)


def test_under_compile_and_opcheck(calls):
    torch._dynamo.reset()
    leaves = [torch.randn(7, 2, 8).bfloat16().requires_grad_() for _ in range(3)]
    cu = offsets([3, 4])

    def run(q, k, v):
        return ops.attention(q, k, v, cu).float().square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert same_bits(*(torch.autograd.grad(f(*leaves), leaves) for f in (run, compiled)))
    torch.library.opcheck(
        torch.ops.llama2rt.attention.default, (*leaves, cu, cu, 0, True, 0.3, "flash_attn")
    )


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("package", "flash-attn is not installed"),
        ("interface", r"has no flash_attn_interface\.py \(flash-attn-4 has another interface\)"),
        ("a function", r"flash_attn_interface\.py has no flash_attn_with_kvcache"),
        ("version", "2.7 or newer is needed, this is 2.6.3"),
        ("cuda", "is a build without CUDA"),
    ],
)
def test_it_says_why_it_cannot_be_used(lacking, reason, monkeypatch, tmp_path):
    interface = tmp_path / "flash_attn/flash_attn_interface.py"
    if lacking == "interface":  # flash-attn-4: a namespace flash_attn with cute/ alone
        interface.unlink()
        (tmp_path / "flash_attn/cute").mkdir()
    elif lacking == "a function":
        interface.unlink()
        interface.parent.rmdir()
        package(tmp_path, INTERFACE[:2])
    elif lacking == "package":
        monkeypatch.delitem(sys.modules, "flash_attn")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif lacking == "version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.3")
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delitem(sys.modules, MODULE)
    monkeypatch.setitem(backend._backends, "flash_attn", backend._load("flash_attn"))
    with ops.use(None):
        assert re.search(reason, ops.backends()["attention"]["unusable"]["flash_attn"])
    with pytest.raises(ValueError, match=f"'flash_attn' cannot be used: .*{reason}"):
        ops.use("flash_attn")


def test_ops_import_neither_flash_attn_nor_triton(tmp_path):
    """Not even where they are installed: until a kernel is wanted."""
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError('imported')")
    program = (
        "import sys, torch; torch.version.cuda = '13.0'; before = set(sys.modules)\n"
        "from llama2rt import ops\n"
        "print(sorted({'triton', 'flash_attn'} & (set(sys.modules) - before)))\n"
        "print(ops.backends('cuda')['attention']['native'].count('flash_attn'))"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = run_python("-c", program, env={"PYTHONPATH": path})
    assert done.stdout.split() == ["[]", "1"]


def test_triton_is_interpreted_where_triton_says_so():
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = importlib.import_module("llama2rt.kernels")
    lazy = importlib.import_module("llama2rt.ops.triton")
    assert lazy.INTERPRETED == kernels.INTERPRETED
    for op in lazy.NATIVE:
        assert getattr(lazy, op).__name__ == op
    with pytest.raises(AttributeError, match="has no attribute 'rope_forward'"):
        _ = lazy.rope_forward
