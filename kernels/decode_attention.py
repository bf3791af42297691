"""A sequence's last queries against its paged cache of keys and values: a step of generation.

Bound by memory: every key and value is read once and used by few products. So the query heads that
share a key head, of one query or of several, are the rows of one tile, which reads the cache once
for all of them; and a long context is split over programs (flash-decoding, Dao et al. 2023), since
one program per sequence and key head would leave most of the GPU idle. A second kernel adds the
splits' results in order. Many queries are several tiles, each of which reads the cache.

Only the device knows the lengths, and nothing waits for it: each sequence is cut into the same
number of splits, of a size that follows from its own length. The number of splits follows from the
batch, so a sequence may round differently in another batch, but equal calls give equal bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2rt.kernels import (
    architecture,
    empty_like,
    last_contiguous,
    launch_options,
    multiprocessors,
)
from llama2rt.kernels.aot import Case
from llama2rt.kernels.attention import LOG2E, extent, load_rows, locate, members


@triton.jit(do_not_specialize=["sequences", "tokens", "splits"])
def decode_attention_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    lengths,
    cu_q,  # [sequences + 1]; None: each has one query
    out,  # [splits, tokens, heads, DIM]: the result itself if there is one split
    lse,  # [splits, tokens, heads], in powers of 2; None if there is one split
    scale,
    sequences,
    tokens,
    kv_heads,
    splits,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    table_row,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    head = (program // splits % kv_heads).to(tl.int64)
    tile = program // splits // kv_heads
    row = tl.arange(0, ROWS)
    if cu_q is None:
        sequence = tile.to(tl.int64)
        length = tl.load(lengths + sequence).to(tl.int32)
        token = sequence + row * 0
        member = row
        exists = row < GROUP
        last = length - 1 + row * 0
        seen = length
    else:
        document, first = locate(cu_q, sequences, tile, GROUP, ROWS)
        sequence = document.to(tl.int64)
        length = tl.load(lengths + sequence).to(tl.int32)
        start, queries = extent(cu_q, sequence)
        step, member = members(first, GROUP, ROWS)
        step += first // GROUP
        token = start + step
        exists = first + row < queries * GROUP
        last = length - queries + step  # key that a row sees
        # The tile's last row sees most; past the end of a sequence there is none. From `tl.max` of
        # `last` Triton 3.9 would learn nothing of the loop's addresses: a copy for each element.
        end_row = tl.minimum(first + ROWS, queries * GROUP)
        seen = tl.where(first < end_row, length - queries + (end_row + GROUP - 1) // GROUP, 0)
        seen = tl.maximum(seen, 0)
    # Whole tiles to each split: of a short sequence the last splits get none.
    share = tl.cdiv(tl.cdiv(seen, splits), KEYS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, seen)
    last = tl.minimum(last, end - 1)

    at_q = token * q_token + (head * GROUP + member) * q_head
    q_tile = load_rows(q, at_q, exists, DIM, BLOCK_DIM, True)
    k_cache += head * k_head
    v_cache += head * v_head
    block_table += sequence * table_row
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    scale2 = scale * LOG2E
    for start_key in range(begin, end, KEYS):
        key = start_key + tl.arange(0, KEYS)
        present = key < end
        page = tl.load(block_table + key // PAGE, mask=present, other=0).to(tl.int64)
        slot = (key % PAGE).to(tl.int64)
        k_tile = load_rows(k_cache, page * k_page + slot * k_slot, present, DIM, BLOCK_DIM, True)
        v_tile = load_rows(v_cache, page * v_page + slot * v_slot, present, DIM, BLOCK_DIM, True)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if cu_q is None:
            scores = tl.where(present[None, :], scores, float("-inf"))
            higher = tl.maximum(row_max, tl.max(scores, 1))
            shift = higher
        else:
            visible = tl.arange(0, KEYS)[None, :] <= (last - start_key)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # the row has seen no key yet
        # The difference of near numbers is exact; that of their rounded multiples is not.
        p = tl.exp2((scores - shift[:, None]) * scale2)
        decay = tl.exp2((row_max - shift) * scale2)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        row_max = higher
    # Without keys: 0, and minus infinity as the logarithm of an empty sum.
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    at_out = (split.to(tl.int64) * tokens + token) * (kv_heads * GROUP) + head * GROUP + member
    if lse is not None:
        tl.store(lse + at_out, row_max * scale2 + tl.log2(row_sum), mask=exists)
    column = tl.arange(0, BLOCK_DIM)
    tl.store(
        out + (at_out * DIM)[:, None] + column[None, :],
        (acc * (1 / row_sum)[:, None]).to(out.dtype.element_ty),
        mask=exists[:, None] & (column < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def decode_attention_combine_kernel(
    partial,  # fp32 [splits, rows, DIM]
    lse,  # [splits, rows], in powers of 2
    out,  # [rows, DIM]
    rows,
    splits,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_DIM)
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    row_max = float("-inf")
    row_sum = 0.0
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = split.to(tl.int64) * rows + row
        weight = tl.load(lse + at, mask=split < splits, other=float("-inf"))
        higher = tl.maximum(row_max, tl.max(weight))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no split has seen a key
        weight = tl.exp2(weight - shift)
        decay = tl.exp2(row_max - shift)
        tile = load_rows(partial, at * DIM, split < splits, DIM, BLOCK_DIM, True)
        row_sum = row_sum * decay + tl.sum(weight)
        acc = acc * decay + tl.sum(weight[:, None] * tile, 0)
        row_max = higher
    result = acc / tl.where(row_sum == 0, 1.0, row_sum)
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty), mask=column < DIM)


@dataclass(frozen=True)
class Launch:
    programs: int
    """Splits that share a multiprocessor: one computes while the others wait for memory."""
    tile_bytes: int = 32768
    """K and V of one tile: its number of keys follows from the head dimension."""
    stages: int = 5
    """Page numbers, keys, products: with five stages Triton holds two tiles of keys (with three or
    four, one), so that one arrives while the other is used."""

    def keys(self, block_dim: int, element_bytes: int) -> int:
        return max(16, self.tile_bytes // (2 * max(64, block_dim) * element_bytes))

    def warps(self, element_bytes: int) -> int:
        return 8 if element_bytes == 4 else 4  # fp32 operands sit in registers: 4 would spill


# Two tiles and what a program shares are 73 KB: sm_80 has room for two, sm_90 for three. Memory
# asks for about 11 KB on the way to each multiprocessor of an A100 (2 TB/s times 0.6 us over 108)
# and 25 KB of an H200 (4.8 TB/s times 0.7 us over 132); one tile is 32 KB. Not yet timed.
LAUNCH = {80: Launch(programs=2), 90: Launch(programs=3)}
# A split writes and reads its result, GROUP * D * 8 bytes, against 4 * D bytes of each key and
# value: 6 % at 256 tokens and a group of 8.
SHORTEST_SPLIT = 256
COMBINED = 16
# Of several queries, at most: rows of a tile, and numbers they sum up. More of these spill; and of
# fp32, whose operands sit in registers too, more rows than a product takes.
MOST_ROWS, MOST_SUMS = 64, 32 * 128


def tile_rows(group: int, queries: float, block_dim: int, element_bytes: int) -> int:
    """Rows of a tile, for a group of query heads and so many queries a sequence on average."""
    if queries <= 1:
        return max(16, triton.next_power_of_2(group))
    if element_bytes == 4:
        return 16
    rows = max(16, triton.next_power_of_2(math.ceil(group * queries)))
    return min(rows, MOST_ROWS, max(16, MOST_SUMS // block_dim))


def sums_of_splits(q: Tensor, out: Tensor, splits: int) -> tuple[Tensor, Tensor | None]:
    """Memory for [splits, *q.shape] and their logarithms: the result itself if there is one."""
    if splits == 1:
        return out, None
    partial = q.new_empty(splits, *q.shape, dtype=torch.float32)
    return partial, q.new_empty(partial.shape[:3], dtype=torch.float32)


def split_count(items: int, capacity: int, slots: int) -> int:
    """Splits of each context, for `items` = tiles x key heads that may hold `capacity` tokens.

    As many as fit `slots`, the programs that run at once, rounded down: a second wave of programs
    would cost as much time as the first.
    """
    return max(1, min(slots // items, triton.cdiv(capacity, SHORTEST_SPLIT)))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], caches [pages, page, Hkv, D], block_table [B, most], lengths [B] -> out."""
    if scale <= 0:  # the kernel scales each row's maximum, which would become its minimum
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k_cache, v_cache = last_contiguous(q), last_contiguous(k_cache), last_contiguous(v_cache)
    block_table = last_contiguous(block_table)
    tokens, heads, dim = q.shape
    sequences = len(block_table)
    _, page, kv_heads, _ = k_cache.shape
    out = empty_like(q)
    if 0 in (q.numel(), k_cache.numel(), block_table.numel()):
        return out.zero_()
    launch = LAUNCH[architecture(q)]
    group, block_dim = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    queries = 1 if cu_q is None else tokens / sequences
    rows = tile_rows(group, queries, block_dim, q.element_size())
    # Enough for all sequences, whatever their numbers of queries: see `locate`.
    tiles = sequences if cu_q is None else tokens * group // rows + sequences
    slots = launch.programs * multiprocessors(q)
    splits = split_count(tiles * kv_heads, block_table.shape[1] * page, slots)
    partial, lse = sums_of_splits(q, out, splits)
    with torch.cuda.device_of(q):
        decode_attention_kernel[(tiles * kv_heads * splits,)](
            q,
            k_cache,
            v_cache,
            block_table,
            lengths.contiguous(),
            None if cu_q is None else cu_q.contiguous(),
            partial,
            lse,
            float(scale),
            sequences,
            tokens,
            kv_heads,
            splits,
            *q.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            block_table.stride(0),
            GROUP=group,
            DIM=dim,
            BLOCK_DIM=block_dim,
            PAGE=page,
            ROWS=rows,
            KEYS=launch.keys(block_dim, q.element_size()),
            **launch_options(launch.warps(q.element_size()), launch.stages),
        )
        if lse is not None:
            decode_attention_combine_kernel[(tokens * heads,)](
                partial,
                lse,
                out,
                tokens * heads,
                splits,
                DIM=dim,
                BLOCK_DIM=block_dim,
                SPLITS=COMBINED,
                **launch_options(4),
            )
    return out


def aot_cases() -> Iterator[Case]:
    """Head dimensions 64, 128 and 256, one query head and eight to a key head, split and whole, one
    query a sequence and several."""
    for dtype, dim, group, page, split, queries in (
        ("bf16", 64, 1, 16, True, 1),
        ("bf16", 128, 8, 16, True, 1),
        ("bf16", 128, 1, 256, False, 1),
        ("bf16", 256, 1, 16, True, 1),
        ("fp32", 128, 8, 16, True, 1),
        ("bf16", 64, 1, 16, True, 8),
        ("bf16", 64, 8, 16, False, 64),
        ("bf16", 128, 8, 16, False, 64),
        ("bf16", 256, 1, 16, False, 64),
        ("fp32", 128, 8, 16, False, 64),
    ):
        pointer = f"*{dtype}:16"
        element_bytes = 4 if dtype == "fp32" else 2
        block_dim = max(16, triton.next_power_of_2(dim))
        for arch, launch in LAUNCH.items():
            strides = [name for name in decode_attention_kernel.arg_names if _is_stride(name)]
            yield Case(
                f"decode_attention {dtype} D {dim} group {group} page {page}"
                + " split" * split
                + f" {queries} queries" * (queries > 1),
                decode_attention_kernel,
                dict.fromkeys(("q", "k_cache", "v_cache"), pointer)
                | dict.fromkeys(("block_table", "lengths"), "*i32:16")
                | {"out": "*fp32:16" if split else pointer, "scale": "fp32"}
                | ({"lse": "*fp32:16"} if split else {})
                | ({"cu_q": "*i32:16"} if queries > 1 else {})
                | dict.fromkeys(("sequences", "tokens", "kv_heads", "splits"), "i32")
                | dict.fromkeys(strides, "i32:16")
                | {"table_row": "i32"},
                {
                    "GROUP": group,
                    "DIM": dim,
                    "BLOCK_DIM": block_dim,
                    "PAGE": page,
                    "ROWS": tile_rows(group, queries, block_dim, element_bytes),
                    "KEYS": launch.keys(block_dim, element_bytes),
                }
                | ({} if split else {"lse": None})
                | ({} if queries > 1 else {"cu_q": None}),
                launch.warps(element_bytes),
                launch.stages,
                (arch,),
            )
    yield Case(
        "decode_attention_combine bf16 D 128",
        decode_attention_combine_kernel,
        {
            "partial": "*fp32:16",
            "lse": "*fp32:16",
            "out": "*bf16:16",
            "rows": "i32",
            "splits": "i32",
        },
        {"DIM": 128, "BLOCK_DIM": 128, "SPLITS": COMBINED},
        4,
    )


def _is_stride(argument: str) -> bool:
    return argument.endswith(("_token", "_head", "_page", "_slot"))
