"""The seven ops: arguments and errors, schema, fake implementation, autograd.

Each op is registered (`registration`) under `torch.ops.llama2rt`. Schemas always return the same
tuple, take the backend's name as last argument and save it for backward. The public wrappers check
shapes and dtypes on the host (`checks`), without touching data; ids and offsets are checked where
the data is at hand (reference and CPU).
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend, logprob_tiles
from llama2rt.ops.checks import check_floating, check_index, check_like, check_rows, mismatch
from llama2rt.ops.registration import autograd, define


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _wide(x: Tensor) -> torch.dtype:
    """dtype of statistics (rstd, log-sum-exp, logprob): fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- rms_norm ---------------------------------------------------------------------------------

_run_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
    lambda x, weight, eps, backend: (_like(x), x.new_empty(x.shape[0], dtype=_wide(x))),
)
_run_rms_norm_backward = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, str backend)"
    " -> (Tensor, Tensor)",
    lambda dy, x, weight, rstd, backend: (_like(x), _like(weight)),
)


def _rms_norm_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _rms_norm_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple:
    if dy is None:
        return None, None, None, None
    return *_run_rms_norm_backward(dy, *ctx.saved_tensors, ctx.backend), None, None


autograd("rms_norm", _rms_norm_backward, _rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation: x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., N] and weight [N], one floating dtype; returns x's shape and dtype. Statistics in fp32.
    Source: Zhang and Sennrich 2019; Llama 2, section 2.2. ValueError on a mismatch.
    """
    check_rows("x", x)
    check_like("weight", weight, x, "x", (x.shape[-1],))
    choice = backend.resolve(x)
    if x.dim() == 2:
        return _run_rms_norm(x, weight, eps, choice)[0]
    return _run_rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, choice)[0].view(x.shape)


# --- add_rms_norm -----------------------------------------------------------------------------

_run_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps, backend: (
        _like(x),
        _like(x),
        x.new_empty(x.shape[0], dtype=_wide(x)),
    ),
)
_run_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor dy, Tensor? dsummed, Tensor summed, Tensor weight, Tensor rstd,"
    " str backend) -> (Tensor, Tensor)",
    lambda dy, dsummed, summed, weight, rstd, backend: (_like(summed), _like(weight)),
)


def _add_rms_norm_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, weight, _, ctx.backend = inputs
    _, summed, rstd = output
    ctx.save_for_backward(summed, weight, rstd)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)


def _add_rms_norm_backward(
    ctx: Any, dy: Tensor | None, dsummed: Tensor | None, _: Tensor | None
) -> tuple:
    if dy is None:  # the normed half went unused
        return dsummed, dsummed, None, None, None
    dx, dweight = _run_add_rms_norm_backward(dy, dsummed, *ctx.saved_tensors, ctx.backend)
    return dx, dx, dweight, None, None


autograd("add_rms_norm", _add_rms_norm_backward, _add_rms_norm_setup)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm that follows it: (rms_norm(x + residual), x + residual).

    x and residual [..., N], weight [N], one floating dtype; both results have x's shape and dtype.
    The norm is taken of the sum as rounded to that dtype. ValueError on a mismatch.
    """
    check_rows("x", x)
    check_like("residual", residual, x, "x", x.shape)
    check_like("weight", weight, x, "x", (x.shape[-1],))
    choice = backend.resolve(x)
    if x.dim() == 2:
        return _run_add_rms_norm(x, residual, weight, eps, choice)[:2]
    rows = (-1, x.shape[-1])
    y, summed, _ = _run_add_rms_norm(x.reshape(rows), residual.reshape(rows), weight, eps, choice)
    return y.view(x.shape), summed.view(x.shape)


# --- swiglu -----------------------------------------------------------------------------------

_run_swiglu = define(
    "swiglu(Tensor gate, Tensor up, str backend) -> Tensor",
    lambda gate, up, backend: _like(gate),
)
_run_swiglu_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    lambda dy, gate, up, backend: (_like(gate), _like(up)),
)


def _swiglu_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _swiglu_backward(ctx: Any, dy: Tensor | None) -> tuple:
    return *_run_swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None


autograd("swiglu", _swiglu_backward, _swiglu_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise: the gated half of a SwiGLU feed-forward layer.

    gate and up [..., F], one floating dtype; returns their shape and dtype, computed in fp32.
    Source: Shazeer 2020; Llama 2, section 2.2. ValueError on a mismatch.
    """
    check_rows("gate", gate)
    check_like("up", up, gate, "gate", gate.shape)
    choice = backend.resolve(gate)
    if gate.dim() == 2:
        return _run_swiglu(gate, up, choice)
    rows = (-1, gate.shape[-1])
    return _run_swiglu(gate.reshape(rows), up.reshape(rows), choice).view(gate.shape)


# --- rope -------------------------------------------------------------------------------------

_run_rope = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, str backend)"
    " -> (Tensor, Tensor)",
    lambda q, k, cos, sin, positions, backend: (_like(q), _like(k)),
)
_run_rope_backward = define(
    "rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor positions, str backend)"
    " -> (Tensor, Tensor)",
    lambda dq, dk, cos, sin, positions, backend: (_like(dq), _like(dk)),
)


def _rope_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, cos, sin, positions, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rope_backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple:
    return *_run_rope_backward(dq, dk, *ctx.saved_tensors, ctx.backend), None, None, None, None


autograd("rope", _rope_backward, _rope_setup)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, half-split pairs as in Hugging Face weights.

    q [T, Hq, D] and k [T, Hkv, D], one floating dtype; cos and sin [P, D/2], fp32 (or fp64);
    positions [T], int32 or int64, 0 <= position < P. Element i is paired with i + D/2:
    (a, b) -> (a cos - b sin, b cos + a sin), in fp32. Returns new tensors of q's and k's shapes.
    Source: Su et al. 2021. ValueError on a mismatch, and (reference, CPU) on a position outside.
    """
    check_floating("q", q)
    if q.dim() != 3 or q.shape[2] % 2:
        raise mismatch("q", "shape [T, Hq, D] with D even", q.shape)
    if k.dim() != 3:
        raise mismatch("k", "shape [T, Hkv, D]", k.shape)
    check_like("k", k, q, "q", (q.shape[0], k.shape[1], q.shape[2]))
    if cos.dim() != 2 or cos.shape[1] * 2 != q.shape[2]:
        raise mismatch("cos", f"shape [P, {q.shape[2] // 2}]", cos.shape)
    if cos.dtype != torch.float32 and cos.dtype != torch.float64:
        raise mismatch("cos", "dtype float32 or float64", cos.dtype)
    if cos.device != q.device:
        raise mismatch("cos", f"device {q.device} (that of q)", cos.device)
    check_like("sin", sin, cos, "cos", cos.shape)
    check_index("positions", positions, q, "q", (q.shape[0],))
    return _run_rope(q, k, cos, sin, positions, backend.resolve(q))


# --- attention --------------------------------------------------------------------------------

_run_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, int max_seqlen, bool causal,"
    " float scale, str backend) -> (Tensor, Tensor)",
    lambda q, k, v, cu_q, cu_k, max_seqlen, causal, scale, backend: (
        _like(q),
        q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q)),
    ),
)
_run_attention_backward = define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_q, Tensor cu_k, int max_seqlen, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda dout, q, k, v, *_: (_like(q), _like(k), _like(v)),
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
    " float scale, str backend) -> Tensor",
    lambda q, *_: _like(q),
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """One query per sequence against its paged key/value cache: a step of generation.

    q [B, Hq, D]; k_cache and v_cache [pages, page, Hkv, D], same dtype; block_table [B, most] int32
    or int64: entry j is the page of tokens j*page ... (j+1)*page - 1, entries past a sequence's end
    are not read; lengths [B]: tokens in the cache, this one included. Length 0 gives 0. Not
    differentiable. Returns [B, Hq, D] in q's dtype. Source: Kwon et al. 2023 (paged attention).
    """
    check_floating("q", q)
    if q.dim() != 3:
        raise mismatch("q", "shape [B, Hq, D]", q.shape)
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
    check_index("block_table", block_table, q, "q", (q.shape[0], block_table.shape[1]))
    check_index("lengths", lengths, q, "q", (q.shape[0],))
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2])
    choice = backend.resolve(q)
    return _run_decode_attention(q, k_cache, v_cache, block_table, lengths, scale, choice)


# --- token_logprob ----------------------------------------------------------------------------


def _token_logprob_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    logprob = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden))
    return logprob, torch.empty_like(logprob) if entropy else logprob.new_empty(0), _like(logprob)


_run_token_logprob = define(
    "token_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _token_logprob_fake,
)
_run_token_logprob_backward = define(
    "token_logprob_backward(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor lse, Tensor? entropy, float temperature, str backend)"
    " -> (Tensor, Tensor)",
    lambda dlogprob, dentropy, hidden, weight, *_: (_like(hidden), _like(weight)),
)
# The same with memories for logits between the two, one of which becomes the gradient of weight:
# for backends that have it (logprob_tiles says what it saves).
_run_token_logprob_parked = define(
    "token_logprob_parked(Tensor hidden, Tensor weight, Tensor targets, float temperature,"
    " bool entropy, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, *rest: (
        *_token_logprob_fake(hidden, weight, *rest),
        *logprob_tiles.Parking.empty(hidden, weight, logprob_tiles.CPU),
    ),
)
_run_token_logprob_parked_backward = define(
    "token_logprob_parked_backward(Tensor(a!) dweight, Tensor(b!) tile, Tensor dlogprob,"
    " Tensor? dentropy, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, Tensor? entropy,"
    " float temperature, str backend) -> Tensor",
    lambda dweight, tile, dlogprob, dentropy, hidden, *_: _like(hidden),
)


class _Parked:
    """Memories that hold logits, from a forward to its backward or its graph's end."""

    def __init__(self, dweight: Tensor, tile: Tensor) -> None:
        self.dweight, self.tile = dweight, tile


# id of a weight -> what is parked for it. Once per weight: a graph of many calls would hold as many
# gradients of it at a time, where without parking they are added up as they come.
_parked: weakref.WeakValueDictionary[int, _Parked] = weakref.WeakValueDictionary()


def _token_logprob_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    hidden, weight, targets, ctx.temperature, _, ctx.backend = inputs
    _, entropy, lse, *memory = output
    ctx.save_for_backward(hidden, weight, targets, lse, entropy)
    ctx.parked = None
    if memory:
        ctx.parked = _parked[id(weight)] = _Parked(*memory)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, *memory)


def _token_logprob_backward(
    ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None, *_: Tensor | None
) -> tuple:
    hidden, weight, targets, lse, entropy = ctx.saved_tensors
    # Used once: a second backward through a retained graph makes the logits anew.
    parked, ctx.parked = ctx.parked, None
    if dlogprob is None and dentropy is None:
        return (None,) * 6
    if dlogprob is None:
        dlogprob = torch.zeros_like(lse)
    if dentropy is None:
        entropy = None
    arguments = (dlogprob, dentropy, hidden, weight, targets, lse, entropy, ctx.temperature)
    if parked is not None:
        dweight = parked.dweight
        dhidden = _run_token_logprob_parked_backward(dweight, parked.tile, *arguments, ctx.backend)
    else:
        dhidden, dweight = _run_token_logprob_backward(*arguments, ctx.backend)
    return dhidden, dweight, None, None, None, None


for _name in ("token_logprob", "token_logprob_parked"):
    autograd(_name, _token_logprob_backward, _token_logprob_setup)


def _can_park(hidden: Tensor, weight: Tensor, choice: str) -> bool:
    """Whether forward may lay out the gradient of weight: it will be wanted, of a plain tensor for
    which none is laid out yet, and outside of a compiled graph, which would copy what backward
    changes in place."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and type(weight) in backend.PLAIN_TENSORS
        and not torch.compiler.is_compiling()
        and id(weight) not in _parked
        and backend.has_native("token_logprob_parked", choice, hidden.dtype)
    )


def _predicted_rows(hidden: Tensor, targets: Tensor) -> Tensor | None:
    """[n] rows with a target, where some have none: prompt tokens predict nothing and need not
    enter the largest product of all. None where all rows stay: under compile, in a CUDA graph or
    another tracing their number would depend on the data, and tensors of other types (DTensor) hold
    only a part."""
    if (
        torch.compiler.is_compiling()
        or (targets.is_cuda and torch.cuda.is_current_stream_capturing())
        or torch._C._are_functorch_transforms_active()
        or targets.device.type == "meta"
        or type(hidden) not in backend.PLAIN_TENSORS
        or type(targets) not in backend.PLAIN_TENSORS
    ):
        return None
    rows = (targets >= 0).nonzero()[:, 0]
    return rows if rows.shape[0] < targets.shape[0] else None


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (nats) of each target under softmax(hidden @ weight.T / temperature).

    hidden [T, dim] and weight [V, dim], one floating dtype; targets [T] int32 or int64 below V,
    where a negative one means "not predicted": logprob 0, entropy 0, no gradient, and outside of
    compiled graphs no cost. Returns fp32 [T], or with entropy=True also each row's entropy (nats),
    [T]; both are differentiable, and logprob <= 0. The [T, V] logits are never held in memory
    (except by the reference, the oracle).
    ValueError on a mismatch, temperature <= 0, and (reference, CPU) on a target >= V.
    """
    check_floating("hidden", hidden)
    if hidden.dim() != 2:
        raise mismatch("hidden", "shape [T, dim]", hidden.shape)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise mismatch("weight", f"shape [V, {hidden.shape[1]}] with V > 0", weight.shape)
    check_like("weight", weight, hidden, "hidden", (weight.shape[0], hidden.shape[1]))
    check_index("targets", targets, hidden, "hidden", (hidden.shape[0],))
    if not temperature > 0:
        raise mismatch("temperature", "a number above 0", temperature)
    choice = backend.resolve(hidden)
    tokens, rows = targets.shape[0], _predicted_rows(hidden, targets)
    if rows is not None:
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    run = _run_token_logprob_parked if _can_park(hidden, weight, choice) else _run_token_logprob
    logprob, entropies, *_ = run(hidden, weight, targets, temperature, entropy, choice)
    if rows is not None:
        logprob = logprob.new_zeros(tokens).index_copy(0, rows, logprob)
        if entropy:
            entropies = entropies.new_zeros(tokens).index_copy(0, rows, entropies)
    return (logprob, entropies) if entropy else logprob
