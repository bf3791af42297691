"""attention over packed documents, and decode_attention over pages of a cache."""

import math
from typing import Any

from torch import Tensor

from llama2rt.ops import backend
from llama2rt.ops.checks import check_floating, check_index, check_like, mismatch
from llama2rt.ops.registration import autograd, define
from llama2rt.ops.tensors import empty_like, wide_dtype

# --- attention --------------------------------------------------------------------------------

_run_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, int max_seqlen, bool causal,"
    " float scale, str backend) -> (Tensor, Tensor)",
    lambda q, k, v, cu_q, cu_k, max_seqlen, causal, scale, backend: (
        empty_like(q),
        q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q)),
    ),
)
_run_attention_backward = define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_q, Tensor cu_k, int max_seqlen, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda dout, q, k, v, *_: (empty_like(q), empty_like(k), empty_like(v)),
)


def _attention_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    q, k, v, cu_q, cu_k, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple:
    if dout is None:
        return (None,) * 9
    gradients = _run_attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None, None, None


autograd("attention", _attention_backward, _attention_setup)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over packed documents; a document's queries see only its own keys.

    q [Tq, Hq, D], k and v [Tk, Hkv, D], one floating dtype, Hq a multiple of Hkv (grouped queries:
    query head h reads key head h // (Hq / Hkv)). cu_seqlens [B+1] int32 or int64 holds the
    documents' offsets in q, and in k and v unless cu_seqlens_k [B+1] gives those. Empty documents
    are legal. causal aligns bottom-right: the last query of a document sees its last key, so a
    query of a document with fewer keys than queries may see none and gives 0. max_seqlen: an upper
    bound on document length in q, which spares some backends a device synchronisation. scale
    defaults to 1/sqrt(D). Returns [Tq, Hq, D] in q's dtype. Softmax in fp32; bitwise repeatable.
    ValueError on a mismatch, and (reference, CPU) on offsets that do not rise from 0 to T.
    """
    check_floating("q", q)
    if q.dim() != 3:
        raise mismatch("q", "shape [T, Hq, D]", q.shape)
    if k.dim() != 3 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise mismatch("k", f"shape [T, Hkv, {q.shape[2]}], Hkv dividing {q.shape[1]}", k.shape)
    tokens = q.shape[0] if cu_seqlens_k is None else k.shape[0]
    check_like("k", k, q, "q", (tokens, k.shape[1], q.shape[2]))
    check_like("v", v, k, "k", k.shape)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise mismatch("cu_seqlens", "shape [B+1]", cu_seqlens.shape)
    check_index("cu_seqlens", cu_seqlens, q, "q", cu_seqlens.shape)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    else:
        check_index("cu_seqlens_k", cu_seqlens_k, q, "q", cu_seqlens.shape)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2])
    choice = backend.resolve(q)
    return _run_attention(
        q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen or 0, causal, scale, choice
    )[0]


# --- decode_attention -------------------------------------------------------------------------

_run_decode_attention = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths,"
    " float scale, Tensor? cu_q, str backend) -> Tensor",
    lambda q, *_: empty_like(q),
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The last queries of each sequence against its paged key/value cache: a step of generation.

    q [T, Hq, D]; k_cache and v_cache [pages, page, Hkv, D], same dtype, Hq a multiple of Hkv;
    block_table [B, most] int32 or int64: entry j is the page of tokens j*page ... (j+1)*page - 1,
    entries past a sequence's end are not read; lengths [B]: tokens in the cache, those of the
    sequence's own queries included. cu_seqlens_q [B+1] int32 or int64 holds the sequences' offsets
    in q; without it each has one query, T = B. Causal, aligned bottom-right as in `attention`: of a
    sequence's n queries, query i sees its first length - n + i + 1 tokens, and gives 0 where those
    are none. Sequences without a query are legal. scale defaults to 1/sqrt(D). Not differentiable.
    Returns [T, Hq, D] in q's dtype; equal calls give equal bits. ValueError on a mismatch, and
    (reference, CPU) on offsets that do not rise from 0 to T. Source: Kwon et al. 2023 (paged
    attention).
    """
    check_floating("q", q)
    if q.dim() != 3:
        raise mismatch("q", "shape [T, Hq, D]", q.shape)
    if k_cache.dim() != 4 or k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise mismatch(
            "k_cache",
            f"shape [pages, page, Hkv, {q.shape[2]}], Hkv dividing {q.shape[1]}",
            k_cache.shape,
        )
    check_like("k_cache", k_cache, q, "q", (*k_cache.shape[:3], q.shape[2]))
    check_like("v_cache", v_cache, k_cache, "k_cache", k_cache.shape)
    if block_table.dim() != 2:
        raise mismatch("block_table", "shape [B, pages]", block_table.shape)
    sequences = q.shape[0] if cu_seqlens_q is None else block_table.shape[0]
    check_index("block_table", block_table, q, "q", (sequences, block_table.shape[1]))
    check_index("lengths", lengths, q, "q", (sequences,))
    if cu_seqlens_q is not None:
        check_index("cu_seqlens_q", cu_seqlens_q, q, "q", (sequences + 1,))
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2])
    choice = backend.resolve(q)
    return _run_decode_attention(
        q, k_cache, v_cache, block_table, lengths, scale, cu_seqlens_q, choice
    )
