"""The gradients of attention over packed documents, in Triton.

There are no atomics: one kernel owns the rows of dq, one the keys of dk and dv, so that the bits
repeat. How rows are packed, which tiles there are and what masks cost is as in `attention`.

Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import empty_like, last_contiguous, launch_options
from llama2rt.kernels.aot import Case
from llama2rt.kernels.attention import (
    LOG2E,
    Launch,
    cases,
    constants,
    extent,
    launch_for,
    load_rows,
    locate,
    members,
    query_tile,
    schedule,
    section_for,
    seen_keys,
)


@triton.jit(do_not_specialize=["tokens", "documents", "tiles", "section"])
def attention_dq_kernel(
    dout,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    cu_q,
    cu_k,
    scale,
    tokens,
    documents,
    tiles,
    kv_heads,
    section,
    dout_token,
    dout_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dq, and on the way delta = sum(dout * out) of each row, which the kernel of dk, dv reads."""
    document, first, head = query_tile(cu_q, documents, tiles, kv_heads, section, GROUP, ROWS)
    query_start, queries = extent(cu_q, document)
    key_start, keys = extent(cu_k, document)
    full, end, last = seen_keys(first, queries, keys, GROUP, ROWS, KEYS, CAUSAL)
    if first >= queries * GROUP:
        return
    # Rows count from the tile's first token and query head. Relative positions stay in 32 bits,
    # which spares registers through the loop; no tile is wide enough to overflow them.
    token, q_first = query_start + first // GROUP, head * GROUP
    step, member = members(first, GROUP, ROWS)
    inside = first + tl.arange(0, ROWS) < queries * GROUP
    heads = kv_heads * GROUP
    dense = (token * heads + q_first) * DIM
    at_dense = (step * heads + member) * DIM
    out_tile = load_rows(out + dense, at_dense, inside, DIM, BLOCK_DIM, True)
    dout += token * dout_token + q_first * dout_head
    at_dout = step.to(tl.int64) * dout_token + member.to(tl.int64) * dout_head
    dout_tile = load_rows(dout, at_dout, inside, DIM, BLOCK_DIM, True)
    delta_rows = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    at = q_first * tokens + token + member.to(tl.int64) * tokens + step
    tl.store(delta + at, delta_rows, mask=inside)
    lse2 = tl.load(lse + at, mask=inside, other=0.0) * LOG2E
    q += token * q_token + q_first * q_head
    at_q = step.to(tl.int64) * q_token + member.to(tl.int64) * q_head
    q_tile = load_rows(q, at_q, inside, DIM, BLOCK_DIM, True)
    k += key_start * k_token + head * k_head
    v += key_start * v_token + head * v_head
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    scale2 = scale * LOG2E
    for MASKED in tl.static_range(2):
        for start in range(full if MASKED else 0, end if MASKED else full, KEYS):
            key = start + tl.arange(0, KEYS)
            at_key = key.to(tl.int64)
            k_tile = load_rows(k, at_key * k_token, key < keys, DIM, BLOCK_DIM, MASKED)
            v_tile = load_rows(v, at_key * v_token, key < keys, DIM, BLOCK_DIM, MASKED)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            p = tl.exp2(scores * scale2 - lse2[:, None])
            if MASKED:
                p = tl.where(key[None, :] <= last[:, None], p, 0.0)
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            dscores = (p * (dp - delta_rows[:, None])).to(k_tile.dtype)
            acc = tl.dot(dscores, k_tile, acc, input_precision="ieee")
    column = tl.arange(0, BLOCK_DIM)
    tl.store(
        dq + dense + at_dense[:, None] + column[None, :],
        (acc * scale).to(dq.dtype.element_ty),
        mask=inside[:, None] & (column < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "documents", "tiles", "section"])
def attention_dkdv_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    cu_q,
    cu_k,
    scale,
    tokens,
    documents,
    tiles,
    kv_heads,
    section,
    dout_token,
    dout_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dk and dv of a tile of keys. Scores are transposed, [keys, rows], as both products need them.

    A row that sees no key has no part in any tile: its log-sum-exp of minus infinity is never read.
    """
    tile, head = schedule(tl.program_id(0), tiles, kv_heads, section)
    # The first keys of a document are seen by most rows: here the long tiles lie at the front.
    document, first = locate(cu_k, documents, tile, 1, KEYS)
    query_start, queries = extent(cu_q, document)
    key_start, keys = extent(cu_k, document)
    if first >= keys:
        return
    rows = queries * GROUP
    if CAUSAL:  # rows from `begin` on see the first key of the tile, rows from `full` on all
        shift = keys - queries
        begin = tl.maximum(first - shift, 0) * GROUP
        see_all = tl.maximum(tl.minimum(first + KEYS, keys) - 1 - shift, 0) * GROUP
        full = begin + tl.cdiv(see_all - begin, ROWS) * ROWS
    else:
        shift = 0
        begin = 0
        full = 0
    step = tl.arange(0, KEYS)
    key = first + step
    present = key < keys
    token = key_start + first
    at_k, at_v = step.to(tl.int64) * k_token, step.to(tl.int64) * v_token
    k += token * k_token + head * k_head
    v += token * v_token + head * v_head
    k_tile = load_rows(k, at_k, present, DIM, BLOCK_DIM, True)
    v_tile = load_rows(v, at_v, present, DIM, BLOCK_DIM, True)
    q += query_start * q_token + head * GROUP * q_head
    dout += query_start * dout_token + head * GROUP * dout_head
    lse += head * GROUP * tokens + query_start
    delta += head * GROUP * tokens + query_start
    dk_tile = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv_tile = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    scale2 = scale * LOG2E
    for WHOLE in tl.static_range(2):
        for start in range(full if WHOLE else begin, rows if WHOLE else min(full, rows), ROWS):
            row = start + tl.arange(0, ROWS)
            inside = row < rows
            query = tl.cast(start // GROUP, tl.int64)
            ahead, member = members(start, GROUP, ROWS)
            ahead, member = ahead.to(tl.int64), member.to(tl.int64)
            at_q = ahead * q_token + member * q_head
            q_tile = load_rows(q + query * q_token, at_q, inside, DIM, BLOCK_DIM, True)
            # A row past the end gets probabilities exp2(-inf) = 0.
            at = member * tokens + ahead
            lse_rows = tl.load(lse + query + at, mask=inside, other=float("inf"))
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            p = tl.exp2(scores * scale2 - (lse_rows * LOG2E)[None, :])
            if not WHOLE:
                p = tl.where(key[:, None] <= (row // GROUP + shift)[None, :], p, 0.0)
            at_dout = ahead * dout_token + member * dout_head
            dout_tile = load_rows(dout + query * dout_token, at_dout, inside, DIM, BLOCK_DIM, True)
            dv_tile = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
            delta_rows = tl.load(delta + query + at, mask=inside, other=0.0)
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            dscores = (p * (dp - delta_rows[None, :])).to(q_tile.dtype)
            dk_tile = tl.dot(dscores, q_tile, dk_tile, input_precision="ieee")
    column = tl.arange(0, BLOCK_DIM)
    dense = (token * kv_heads + head) * DIM
    at = (step * kv_heads * DIM)[:, None] + column[None, :]
    mask = present[:, None] & (column < DIM)[None, :]
    tl.store(dk + dense + at, (dk_tile * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + dense + at, dv_tile.to(dv.dtype.element_ty), mask=mask)


# By architecture and padded head dimension, chosen as in `attention`.
DQ = {
    80: {64: Launch(128, 64, 8, 2), 128: Launch(128, 32, 8, 2), 256: Launch(64, 16, 8, 2)},
    90: {64: Launch(128, 128, 8, 2), 128: Launch(128, 64, 8, 2), 256: Launch(128, 32, 8, 2)},
}
# Two accumulators, dk and dv, leave registers for fewer rows.
DKDV = {
    80: {64: Launch(32, 128, 8, 2), 128: Launch(32, 64, 8, 2), 256: Launch(32, 32, 8, 2)},
    90: {64: Launch(64, 128, 8, 2), 128: Launch(32, 128, 8, 2), 256: Launch(64, 32, 8, 2)},
}


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), bitwise repeatable."""
    dout, q, k, v = (last_contiguous(x) for x in (dout, q, k, v))
    out, lse, cu_q, cu_k = (x.contiguous() for x in (out, lse, cu_q, cu_k))
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    dq, dk, dv, delta = empty_like(q), empty_like(k), empty_like(v), torch.empty_like(lse)
    longest, documents = max_seqlen or tokens, cu_q.numel() - 1
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    with torch.cuda.device_of(q):
        if q.numel():
            launch = launch_for(DQ, q)
            tiles = tokens * group // launch.rows + documents
            attention_dq_kernel[(tiles * kv_heads,)](
                dout,
                q,
                k,
                v,
                out,
                lse,
                delta,
                dq,
                cu_q,
                cu_k,
                float(scale),
                tokens,
                documents,
                tiles,
                kv_heads,
                section_for(k, longest, kv_heads, kv_heads),
                *strides,
                **constants(launch, group, dim, causal),
                **launch_options(launch.warps, launch.stages),
            )
        if k.numel():
            launch = launch_for(DKDV, q)
            tiles = k.shape[0] // launch.keys + documents
            attention_dkdv_kernel[(tiles * kv_heads,)](
                dout,
                q,
                k,
                v,
                lse,
                delta,
                dk,
                dv,
                cu_q,
                cu_k,
                float(scale),
                tokens,
                documents,
                tiles,
                kv_heads,
                section_for(q, longest, heads, kv_heads),
                *strides,
                **constants(launch, group, dim, causal),
                **launch_options(launch.warps, launch.stages),
            )
    return dq, dk, dv


def aot_cases() -> Iterator[Case]:
    yield from cases((attention_dq_kernel, DQ), (attention_dkdv_kernel, DKDV))
