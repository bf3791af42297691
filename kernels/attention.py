"""Attention over packed documents in Triton: forward, and what backward shares with it.

The query heads that share a key head are packed into the rows of one tile: row r of a document is
token r // GROUP, head r % GROUP of the group. Keys and values are then read once for the group, a
short document with grouped queries fills its tile (17 tokens of 8 heads are 136 rows), the causal
mask stays one comparison, and the sum over the group in the gradients of k and v is part of the
matrix product. With one query head per key head nothing changes.

No tile is wasted on a mask: loops end where the last row of a tile stops seeing keys, and only the
tiles that the diagonal or the end of a document crosses compare indices.

Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691); order of the tiles: FlashAttention-3's
scheduler (Shah et al. 2024, arXiv:2407.08608). Left out: dropout, biases, sliding windows.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import architecture, empty_like, last_contiguous, launch_options
from llama2rt.kernels.aot import Case

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def schedule(program, tiles, kv_heads, section):
    """(tile, key head) of a program: all tiles of `section` key heads, then of the next ones.

    Inside a section the tiles come in order, so that the caller can start with the longest.
    """
    index = program // (tiles * section)
    first = index * section
    width = tl.minimum(section, kv_heads - first)
    inside = program - index * (tiles * section)
    return inside // width, (first + inside % width).to(tl.int64)


@triton.jit
def locate(cu, documents, tile, GROUP: tl.constexpr, BLOCK: tl.constexpr):
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
def extent(cu, document):
    """(first token, number of tokens) of a document."""
    start = tl.load(cu + document).to(tl.int64)
    return start, (tl.load(cu + document + 1) - start).to(tl.int32)


@triton.jit
def members(first, GROUP: tl.constexpr, ROWS: tl.constexpr):
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
def query_tile(cu_q, documents, tiles, kv_heads, section, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(document, its first row in the tile, key head) of a program that owns query rows."""
    tile, head = schedule(tl.program_id(0), tiles, kv_heads, section)
    # The last tiles of a document see most keys: they start first, and short ones fill the end.
    document, first = locate(cu_q, documents, tiles - 1 - tile, GROUP, ROWS)
    return document, first, head


@triton.jit
def seen_keys(
    first,
    queries,
    keys,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """(full, end, last) of the tile from row `first` on, in a document of so many queries and keys:
    all rows see keys 0..full, none sees those from `end` on, in between row r those up to last[r].
    """
    row = first + tl.arange(0, ROWS)
    if CAUSAL:
        shift = keys - queries
        last = row // GROUP + shift
        end = tl.minimum(first + ROWS, queries * GROUP)
        end = tl.maximum((end - 1) // GROUP + shift + 1, 0)
        full = tl.maximum(first // GROUP + shift + 1, 0) // KEYS * KEYS
    else:
        last = row * 0 + keys - 1
        end = keys
        full = keys // KEYS * KEYS
    return full, end, last


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
    q += token * q_token + q_first * q_head
    at_q = step.to(tl.int64) * q_token + member.to(tl.int64) * q_head
    q_tile = load_rows(q, at_q, inside, DIM, BLOCK_DIM, True)
    k += key_start * k_token + head * k_head
    v += key_start * v_token + head * v_head
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    scale2 = scale * LOG2E
    for MASKED in tl.static_range(2):
        for start in range(full if MASKED else 0, end if MASKED else full, KEYS):
            key = start + tl.arange(0, KEYS)
            at_key = key.to(tl.int64)
            k_tile = load_rows(k, at_key * k_token, key < keys, DIM, BLOCK_DIM, MASKED)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if MASKED:
                scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
            higher = tl.maximum(row_max, tl.max(scores, 1) * scale2)
            shift = higher
            if MASKED:  # a row that has seen no key yet has no maximum to subtract
                shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores * scale2 - shift[:, None])
            decay = tl.exp2(row_max - shift)
            row_sum = row_sum * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]
            v_tile = load_rows(v, at_key * v_token, key < keys, DIM, BLOCK_DIM, MASKED)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            row_max = higher
    # A row that sees no key: 0, and minus infinity as the logarithm of an empty sum.
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    at = member.to(tl.int64) * tokens + step
    tl.store(lse + q_first * tokens + token + at, (row_max + tl.log2(row_sum)) / LOG2E, mask=inside)
    column = tl.arange(0, BLOCK_DIM)
    heads = kv_heads * GROUP
    tl.store(
        out
        + (token * heads + q_first) * DIM
        + ((step * heads + member) * DIM)[:, None]
        + column[None, :],
        (acc * (1 / row_sum)[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (column < DIM)[None, :],
    )


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
# fp32 multiplies without tensor cores, which would round to 10 bits: operands sit in registers, so
# tiles are small (of dq some still spill).
EXACT = {64: Launch(32, 32, 8, 1), 128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 8, 1)}


def launch_for(table: dict[int, dict[int, Launch]], q: Tensor) -> Launch:
    width = max(64, triton.next_power_of_2(q.shape[2]))
    if width > 256:
        raise ValueError(f"q: expected a head dimension of at most 256, got {q.shape[2]}")
    return EXACT[width] if q.dtype == torch.float32 else table[architecture(q)][width]


def constants(launch: Launch, group: int, dim: int, causal: bool) -> dict[str, int]:
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


def section_for(x: Tensor, longest: int, heads: int, kv_heads: int) -> int:
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
    if scale <= 0:  # the kernel scales each row's maximum, which would become its minimum
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out, lse = empty_like(q), q.new_empty(heads, tokens, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    launch = launch_for(FORWARD, q)
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
            section_for(k, max_seqlen or tokens, kv_heads, kv_heads),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            **constants(launch, group, dim, causal),
            **launch_options(launch.warps, launch.stages),
        )
    return out, lse


def cases(*kernels: tuple[Any, dict[int, dict[int, Launch]]]) -> Iterator[Case]:
    """Of each (kernel, table) every setting in bf16, and of one: grouped queries, a padded head, no
    mask, fp32."""
    for kernel, table in kernels:
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
                constant = constants(launch, group, dim, causal)
                yield Case(
                    f"{kernel.__name__.removesuffix('_kernel')} {dtype} D {dim} group {group}"
                    + " not causal" * (not causal),
                    kernel,
                    {
                        name: _aot_type(name, dtype)
                        for name in kernel.arg_names
                        if name not in constant
                    },
                    constant,
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


def aot_cases() -> Iterator[Case]:
    yield from cases((attention_forward_kernel, FORWARD))
