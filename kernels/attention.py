"""Attention over packed documents, forward and backward, in Triton.

The query heads that share a key head are packed into the rows of one tile: row r of a document is
token r // GROUP, head r % GROUP of the group. Keys and values are then read once for the group, a
short document with grouped queries fills its tile (17 tokens of 8 heads are 136 rows), the causal
mask stays one comparison, and the sum over the group in the gradients of k and v is part of the
matrix product. With one query head per key head nothing changes.

No tile is wasted on a mask: loops end where the last row of a tile stops seeing keys, and only the
tiles that the diagonal or the end of a document crosses compare indices. The backward pass has no
atomics: one kernel owns the rows of dq, one the keys of dk and dv, so that the bits repeat.

Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691); order of the tiles: FlashAttention-3's
scheduler (Shah et al. 2024, arXiv:2407.08608). Left out: dropout, biases, sliding windows.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import architecture, empty_like, last_contiguous, launch_options
from llama2rt.kernels.aot import Case

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _schedule(program, tiles, kv_heads, section):
    """(tile, key head) of a program: all tiles of `section` key heads, then of the next ones.

    Inside a section the tiles come in order, so that the caller can start with the longest.
    """
    index = program // (tiles * section)
    first = index * section
    width = tl.minimum(section, kv_heads - first)
    inside = program - index * (tiles * section)
    return inside // width, (first + inside % width).to(tl.int64)


@triton.jit
def _locate(cu, documents, tile, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(document, first of its rows) of a tile of BLOCK rows, GROUP rows a token.

    Document i owns the tiles from cu[i] * GROUP // BLOCK + i on: always enough for its rows, at
    most one too many, and known without a table, so that nothing waits for the host.
    """
    low = tile * 0
    high = low + documents
    while high - low > 1:
        middle = (low + high) // 2
        owned = tl.load(cu + middle).to(tl.int64) * GROUP // BLOCK + middle <= tile
        low = tl.where(owned, middle, low)
        high = tl.where(owned, high, middle)
    first_tile = tl.load(cu + low).to(tl.int64) * GROUP // BLOCK + low
    return low, ((tile - first_tile) * BLOCK).to(tl.int32)


@triton.jit
def _extent(cu, document):
    """(first token, number of tokens) of a document."""
    start = tl.load(cu + document).to(tl.int64)
    return start, (tl.load(cu + document + 1) - start).to(tl.int32)


@triton.jit
def _members(first, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(token, head of the group) of ROWS rows from row `first` on, relative to the first's token.

    Where the group divides ROWS, `first` begins a token, and both follow from the thread's own
    index: no register has to hold them through the loop until the rows are stored (Triton 3.9
    spilled these).
    """
    row = tl.arange(0, ROWS)
    if ROWS % GROUP == 0:
        return row // GROUP, row % GROUP
    else:
        return (first + row) // GROUP - first // GROUP, (first + row) % GROUP


@triton.jit
def load_rows(
    base, offset, present, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Rows at `offset` [N] as [N, BLOCK_DIM]; 0 beyond DIM and, if MASKED, where not `present`."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + offset[:, None] + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=present[:, None] & (column < DIM)[None, :], other=0.0)
    elif BLOCK_DIM != DIM:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _query_tile(
    cu_q,
    cu_k,
    documents,
    tiles,
    kv_heads,
    section,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """A program's query rows and the keys they see.

    (whether there are any; its first token and first query head; the row's token and head relative
    to those; whether it exists; key head; first token and number of keys; full, end, last): keys
    0..full are seen by all rows of the tile, keys from `end` on by none, in between row r sees
    those up to last[r]. Relative positions stay in 32 bits, which spares registers that would
    live through the loop; no tile is wide enough to overflow them.
    """
    tile, head = _schedule(tl.program_id(0), tiles, kv_heads, section)
    # The last tiles of a document see most keys: they start first, and short ones fill the end.
    document, first = _locate(cu_q, documents, tiles - 1 - tile, GROUP, ROWS)
    query_start, queries = _extent(cu_q, document)
    key_start, keys = _extent(cu_k, document)
    rows = queries * GROUP
    row = first + tl.arange(0, ROWS)
    step, member = _members(first, GROUP, ROWS)
    if CAUSAL:
        shift = keys - queries
        last = row // GROUP + shift
        end = tl.maximum((tl.minimum(first + ROWS, rows) - 1) // GROUP + shift + 1, 0)
        full = tl.maximum(first // GROUP + shift + 1, 0) // KEYS * KEYS
    else:
        last = row * 0 + keys - 1
        end = keys
        full = keys // KEYS * KEYS
    return (
        first < rows,
        query_start + first // GROUP,
        head * GROUP,
        step,
        member,
        row < rows,
        head,
        key_start,
        keys,
        full,
        end,
        last,
    )


@triton.jit(do_not_specialize=["tokens", "documents", "tiles", "section"])
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    scale,
    tokens,
    documents,
    tiles,
    kv_heads,
    section,
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
    any_row, token, q_first, step, member, inside, head, key_start, keys, full, end, last = (
        _query_tile(cu_q, cu_k, documents, tiles, kv_heads, section, GROUP, ROWS, KEYS, CAUSAL)
    )
    if not any_row:
        return
    q += token * q_token + q_first * q_head
    at_q = step.to(tl.int64) * q_token + member.to(tl.int64) * q_head
    q_tile = load_rows(q, at_q, inside, DIM, BLOCK_DIM, True)
    k += key_start * k_token + head * k_head
    v += key_start * v_token + head * v_head
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    scale2 = scale * LOG2E
    for MASKED in tl.static_range(2):
        for start in range(full if MASKED else 0, end if MASKED else full, KEYS):
            key = start + tl.arange(0, KEYS)
            at_key = key.to(tl.int64)
            k_tile = load_rows(k, at_key * k_token, key < keys, DIM, BLOCK_DIM, MASKED)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if MASKED:
                scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1) * scale2)
            shift = higher
            if MASKED:  # a row that has seen no key yet has no maximum to subtract
                shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores * scale2 - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]
            v_tile = load_rows(v, at_key * v_token, key < keys, DIM, BLOCK_DIM, MASKED)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            peak = higher
    # A row that sees no key: 0, and minus infinity as the logarithm of an empty sum.
    total = tl.where(total == 0, 1.0, total)
    at = member.to(tl.int64) * tokens + step
    tl.store(lse + q_first * tokens + token + at, (peak + tl.log2(total)) / LOG2E, mask=inside)
    column = tl.arange(0, BLOCK_DIM)
    heads = kv_heads * GROUP
    tl.store(
        out
        + (token * heads + q_first) * DIM
        + ((step * heads + member) * DIM)[:, None]
        + column[None, :],
        (acc * (1 / total)[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (column < DIM)[None, :],
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
    any_row, token, q_first, step, member, inside, head, key_start, keys, full, end, last = (
        _query_tile(cu_q, cu_k, documents, tiles, kv_heads, section, GROUP, ROWS, KEYS, CAUSAL)
    )
    if not any_row:
        return
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
    tile, head = _schedule(tl.program_id(0), tiles, kv_heads, section)
    # The first keys of a document are seen by most rows: here the long tiles lie at the front.
    document, first = _locate(cu_k, documents, tile, 1, KEYS)
    query_start, queries = _extent(cu_q, document)
    key_start, keys = _extent(cu_k, document)
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
            ahead, member = _members(start, GROUP, ROWS)
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


@dataclass(frozen=True)
class Launch:
    rows: int
    """Query rows of a tile."""
    keys: int
    """Keys of a tile."""
    warps: int
    stages: int
    """Tiles of the loop in shared memory at once, those on their way included."""


# By architecture and padded head dimension (64 serves smaller ones). Chosen from the compiler's
# report, not yet by time: the largest tiles that spill nothing with Triton 3.6 and, but for a few
# bytes backward, 3.9 (resources.json), since a tile's reuse of what it reads grows with it. sm_80
# also serves chips with 99 KB of shared memory, so its settings stay below that; sm_90 has 227 KB.
# Eight warps where a tile has 128 rows: four would hold twice the accumulators each and spill. Two
# stages at least, so that the next tile arrives while this one is multiplied.
FORWARD = {
    80: {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 3), 256: Launch(64, 32, 8, 2)},
    90: {64: Launch(128, 128, 8, 3), 128: Launch(128, 128, 8, 3), 256: Launch(128, 32, 8, 3)},
}
DQ = {
    80: {64: Launch(128, 64, 8, 2), 128: Launch(128, 32, 8, 2), 256: Launch(64, 16, 8, 2)},
    90: {64: Launch(128, 128, 8, 2), 128: Launch(128, 64, 8, 2), 256: Launch(128, 32, 8, 2)},
}
# Two accumulators, dk and dv, leave registers for fewer rows.
DKDV = {
    80: {64: Launch(32, 128, 8, 2), 128: Launch(32, 64, 8, 2), 256: Launch(32, 32, 8, 2)},
    90: {64: Launch(64, 128, 8, 2), 128: Launch(32, 128, 8, 2), 256: Launch(64, 32, 8, 2)},
}
# fp32 multiplies without tensor cores, which would round to 10 bits: operands sit in registers, so
# tiles are small (of dq some still spill).
EXACT = {64: Launch(32, 32, 8, 1), 128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 8, 1)}


def _launch(table: dict[int, dict[int, Launch]], q: Tensor) -> Launch:
    width = max(64, triton.next_power_of_2(q.shape[2]))
    if width > 256:
        raise ValueError(f"q: expected a head dimension of at most 256, got {q.shape[2]}")
    return EXACT[width] if q.dtype == torch.float32 else table[architecture(q)][width]


def _constants(launch: Launch, group: int, dim: int, causal: bool) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "GROUP": group,
        "DIM": dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),  # the least that tl.dot takes
        "ROWS": launch.rows,
        "KEYS": launch.keys,
        "CAUSAL": causal,
    }


@functools.cache
def _cache_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _section(x: Tensor, longest: int, heads: int, kv_heads: int) -> int:
    """Key heads that programs work on at a time: what they all read fits in half of the L2 cache.

    They read two tensors like x of `heads` heads, for documents of up to `longest` tokens. The
    other half is for what each reads once. (In the interpreter: 64 KB, to have several sections.)
    """
    cache = _cache_bytes(x.get_device()) if x.is_cuda else 2**16
    read = 2 * longest * x.shape[2] * x.element_size() * heads // kv_heads
    return max(1, min(kv_heads, cache // 2 // max(1, read)))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, D], natural log-sum-exp of the scaled scores [Hq, Tq] fp32).

    max_seqlen, 0 if unknown, decides in which order tiles run and nothing else.
    """
    if scale <= 0:  # the kernel scales maxima, which would become minima
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out, lse = empty_like(q), q.new_empty(heads, tokens, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    launch = _launch(FORWARD, q)
    documents = cu_q.numel() - 1
    tiles = tokens * group // launch.rows + documents
    with torch.cuda.device_of(q):
        attention_forward_kernel[(tiles * kv_heads,)](
            q,
            k,
            v,
            out,
            lse,
            cu_q.contiguous(),
            cu_k.contiguous(),
            float(scale),
            tokens,
            documents,
            tiles,
            kv_heads,
            _section(k, max_seqlen or tokens, kv_heads, kv_heads),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            **_constants(launch, group, dim, causal),
            **launch_options(launch.warps, launch.stages),
        )
    return out, lse


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
            launch = _launch(DQ, q)
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
                _section(k, longest, kv_heads, kv_heads),
                *strides,
                **_constants(launch, group, dim, causal),
                **launch_options(launch.warps, launch.stages),
            )
        if k.numel():
            launch = _launch(DKDV, q)
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
                _section(q, longest, heads, kv_heads),
                *strides,
                **_constants(launch, group, dim, causal),
                **launch_options(launch.warps, launch.stages),
            )
    return dq, dk, dv


def aot_cases() -> Iterator[Case]:
    """Every setting in bf16, and of one: grouped queries, a padded head, no mask, fp32."""
    for kernel, table in (
        (attention_forward_kernel, FORWARD),
        (attention_dq_kernel, DQ),
        (attention_dkdv_kernel, DKDV),
    ):
        for dtype, dim, group, causal, archs in (
            ("bf16", 64, 1, True, (80, 90)),
            ("bf16", 128, 1, True, (80, 90)),
            ("bf16", 128, 8, True, (80, 90)),
            ("bf16", 256, 1, True, (80, 90)),
            ("bf16", 80, 1, True, (90,)),
            ("bf16", 128, 1, False, (90,)),
            ("fp32", 128, 1, True, (80,)),
        ):
            for arch in archs:
                width = max(64, triton.next_power_of_2(dim))
                launch = EXACT[width] if dtype == "fp32" else table[arch][width]
                constants = _constants(launch, group, dim, causal)
                yield Case(
                    f"{kernel.__name__.removesuffix('_kernel')} {dtype} D {dim} group {group}"
                    + " not causal" * (not causal),
                    kernel,
                    {
                        name: _aot_type(name, dtype)
                        for name in kernel.arg_names
                        if name not in constants
                    },
                    constants,
                    launch.warps,
                    launch.stages,
                    (arch,),
                )


def _aot_type(argument: str, dtype: str) -> str:
    if argument.endswith(("_token", "_head")):
        return "i32:16"
    if argument in ("tokens", "documents", "tiles", "section", "kv_heads"):
        return "i32"
    known = {"scale": "fp32", "cu_q": "*i32:16", "cu_k": "*i32:16"}
    return known.get(argument, "*fp32:16" if argument in ("lse", "delta") else f"*{dtype}:16")
