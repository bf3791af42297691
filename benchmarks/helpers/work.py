"""What an op must move and compute, whatever a kernel does: useful bytes and FLOPs, in one place.

The benchmarks divide by these, and the roofline page turns them into times that no kernel can beat.
Each operand counts once. Of elementwise ops the activations count; weights, norms' `rstd`, rotary
tables and positions are small beside them and left out. Of attention the pairs of query and key
that causality leaves count, of decode_attention the cached keys and values, of token_logprob its
matrix products; no score and no logit needs to reach memory, and none is counted. A multiplication,
an addition, a division and an exponential are one FLOP each. Sixteen-bit elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ELEMENT_BYTES = 2
FP32_BYTES = 4

# (op, direction) -> (activations read or written, FLOPs per element of one activation). Backward
# reads the output's gradient and what forward read, and writes the inputs' gradients.
ELEMENTWISE = {
    ("rms_norm", "forward"): (2, 4),
    ("rms_norm", "backward"): (3, 9),
    ("add_rms_norm", "forward"): (4, 5),
    ("add_rms_norm", "backward"): (4, 10),
    ("swiglu", "forward"): (3, 6),
    ("swiglu", "backward"): (5, 12),
    ("rope", "forward"): (2, 3),
    ("rope", "backward"): (2, 3),
}
# Matrix products of attention: scores and output forward; scores, dv, dp, dq and dk backward.
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5, "forward + backward": 7}
# Of token_logprob: the logits forward; both gradients backward (logits made again are no use).
LOGPROB_PRODUCTS = {"forward": 1, "backward": 2, "forward + backward": 3}


@dataclass(frozen=True)
class Work:
    op: str
    direction: str
    size: str
    """The shape, for people and as a key of records."""
    bytes: int
    flops: int
    unit: str
    """Which of the two a benchmark's rate counts, "bytes" or "flops"."""

    @property
    def useful(self) -> int:
        return self.bytes if self.unit == "bytes" else self.flops


def elementwise(op: str, direction: str, rows: int, columns: int) -> Work:
    """One of rms_norm, add_rms_norm, swiglu, rope on activations [rows, columns] (of rope, q and k
    together)."""
    activations, flops = ELEMENTWISE[op, direction]
    elements = rows * columns
    size = f"{rows} x {columns} bf16"
    moved = activations * elements * ELEMENT_BYTES
    return Work(op, direction, size, moved, flops * elements, "bytes")


def attention(
    direction: str, name: str, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int
) -> Work:
    """Causal, over documents of `lengths` tokens; `name` is what a table calls them."""
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    q = tokens * heads * head_dim * ELEMENT_BYTES
    k = tokens * kv_heads * head_dim * ELEMENT_BYTES
    lse = tokens * heads * FP32_BYTES
    forward = q + 2 * k + q + lse  # reads q, k, v; writes out and the log-sum-exp
    backward = 3 * q + 2 * k + lse + q + 2 * k  # reads q, out, dout, k, v, lse; writes dq, dk, dv
    moved = {"forward": forward, "backward": backward, "forward + backward": forward + backward}
    size = f"{name}, {heads} heads over {kv_heads} of {head_dim}, bf16"
    flops = ATTENTION_PRODUCTS[direction] * 2 * pairs * heads * head_dim
    return Work("attention", direction, size, moved[direction], flops, "flops")


def decode_attention(
    sequences: int, context: int, heads: int, kv_heads: int, head_dim: int
) -> Work:
    """One query a sequence and head, over `context` cached tokens."""
    size = f"{sequences} x {context}, {heads} heads over {kv_heads} of {head_dim}, bf16"
    cache = 2 * sequences * context * kv_heads * head_dim * ELEMENT_BYTES
    flops = 2 * 2 * sequences * context * heads * head_dim
    return Work("decode_attention", "forward", size, cache, flops, "bytes")


def token_logprob(direction: str, tokens: int, dim: int, vocabulary: int) -> Work:
    matrices = (tokens + vocabulary) * dim * ELEMENT_BYTES  # hidden and weight
    vectors = tokens * 2 * FP32_BYTES  # log-probability and log-sum-exp
    moved = {"forward": matrices + vectors, "backward": 2 * matrices + vectors}
    moved["forward + backward"] = moved["forward"] + moved["backward"]
    size = f"{tokens} tokens, dim {dim}, vocabulary {vocabulary}, bf16"
    flops = LOGPROB_PRODUCTS[direction] * 2 * tokens * dim * vocabulary
    return Work("token_logprob", direction, size, moved[direction], flops, "flops")
