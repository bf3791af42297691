"""flash-attn's interface as it is since 2.7, computed by our reference: what the backend calls.

The real one needs a GPU and hours of building. This one holds the backend to the argument
convention instead: names and order of parameters, dtypes, layouts, what its C++ refuses, what it
cannot see (NaN in a row that no query reads), its value for a query without keys, and that
gradients are written into the tensors given. Installed by `install` under the real names.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llama2rt.ops import reference


def _readable(name: str, x: Tensor) -> None:
    assert x.dtype in (torch.float16, torch.bfloat16), f"{name}: {x.dtype}"
    assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0, f"{name}: last dimension"
    assert all(s > 0 and s % 8 == 0 for s in x.stride()[:-1]), f"{name}: strides {x.stride()}"
    assert x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, f"{name}: head dimension {x.shape[-1]}"


def _offsets(name: str, cu: Tensor, tokens: int, longest: int) -> None:
    assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.numel() > 1, name
    assert cu[0] == 0 and cu[-1] == tokens, name
    assert isinstance(longest, int) and longest >= int(cu.diff().max()), name


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _readable(name, x)
    _offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    if block_table is None:
        _offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    else:
        _offsets("cu_seqlens_k", cu_seqlens_k, int(cu_seqlens_k[-1]), max_seqlen_k)
        assert block_table.dtype == torch.int32 and block_table.is_contiguous()
        assert block_table.shape[1] and block_table.shape[0] == cu_seqlens_k.numel() - 1
        assert k.shape[1] % 256 == 0 and causal
    # With one query each it reshapes q to [batch, ...].
    assert max_seqlen_q > 1 or q.shape[0] == cu_seqlens_q.numel() - 1
    assert q.numel() and k.numel(), "an empty grid"
    assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    assert dropout_p == 0.0 and not return_softmax and softmax_scale > 0
    if block_table is None:
        out, lse = reference.attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, softmax_scale
        )
    else:
        table = block_table, cu_seqlens_k.diff()
        out = reference.decode_attention(q, k, v, *table, softmax_scale, cu_seqlens_q)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    for name, x in (("dout", dout), ("q", q), ("k", k), ("v", v), ("out", out)):
        _readable(name, x)
    _offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    _offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    assert deterministic is True
    assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    assert dropout_p == 0.0 and softmax_lse.dtype == torch.float32
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    assert not (softmax_lse == -torch.inf).any(), "its own forward marks such rows with +inf"
    gradients = reference.attention_backward(
        *(dout, q, k, v, out, softmax_lse.masked_fill(softmax_lse == torch.inf, -torch.inf)),
        *(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, softmax_scale),
    )
    for given, like, value in zip((dq, dk, dv), (q, k, v), gradients, strict=True):
        assert given.is_contiguous() and given.shape == like.shape and given.dtype == like.dtype
        given.copy_(value)
    return softmax_lse.new_empty(0)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _readable(name, x)
    assert q.dim() == 4 and q.shape[1] == 1 and k_cache.shape[1] % 256 == 0
    for index in (cache_seqlens, block_table):
        assert index.dtype == torch.int32 and index.is_contiguous()
    assert block_table.shape[1] and block_table.shape[0] == q.shape[0] == cache_seqlens.shape[0]
    return reference.decode_attention(
        q[:, 0], k_cache, v_cache, block_table, cache_seqlens, softmax_scale
    )[:, None]


def install(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Put the functions where flash-attn's are; `calls` receives the names of those that run."""

    def counted(function):
        def run(*arguments, **keywords):
            calls.append(function.__name__)
            return function(*arguments, **keywords)

        return run

    interface = ModuleType("flash_attn.flash_attn_interface")
    for function in (
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
        flash_attn_with_kvcache,
    ):
        setattr(interface, function.__name__, counted(function))
    package = ModuleType("flash_attn")
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
