"""The seven ops: arguments and errors, schema, fake implementation, autograd.

Each op is registered with `torch.library.Library` (a fraction of `custom_op`'s cost per call) under
`torch.ops.llama2rt`. Schemas always return the same tuple, take the backend's name as last argument
and save it for backward. The public wrappers check shapes and dtypes on the host, without touching
data; ids and offsets are checked where the data is at hand (reference and CPU).
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops import backend, logprob_tiles

_LIB = torch.library.Library("llama2rt", "DEF")


def _define(schema: str, fake: Callable) -> Callable:
    """Declare an op whose last argument names the backend that runs it; returns its entry point."""
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        *rest, choice = arguments
        return backend.implementation(name, choice, rest[0].dtype)(*rest)

    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llama2rt::{name}", fake, lib=_LIB)
    overload = getattr(torch.ops.llama2rt, name).default

    def call(*arguments: Any) -> Any:
        # Sampling a small model is bound by the cost of calls, most of it the dispatcher's two
        # detours through Python.
        if torch.is_grad_enabled() or backend.needs_dispatcher(*arguments):
            return overload(*arguments)
        return run(*arguments)

    return call


def _autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    def differentiate_once(ctx: Any, *upstream: Tensor | None) -> tuple:
        # The kernels' own gradients would be missing from a second derivative, without an error.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"llama2rt::{name}: expected a backward without create_graph, got one with it;"
                " the ops have no second derivatives"
            )
        return backward(ctx, *upstream)

    torch.library.register_autograd(
        f"llama2rt::{name}", differentiate_once, setup_context=setup_context, lib=_LIB
    )


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _wide(x: Tensor) -> torch.dtype:
    """dtype of statistics (rstd, log-sum-exp, logprob): fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _error(argument: str, expected: str, got: object) -> ValueError:
    shown = list(got) if isinstance(got, torch.Size) else got
    return ValueError(f"{argument}: expected {expected}, got {shown}")


def _check_floating(argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise _error(argument, "a floating-point dtype", tensor.dtype)


def _check_rows(argument: str, tensor: Tensor) -> None:
    _check_floating(argument, tensor)
    if tensor.dim() == 0:
        raise _error(argument, "at least one dimension", "a scalar")


def _check_like(argument: str, tensor: Tensor, other: Tensor, name: str, shape: tuple) -> None:
    """`tensor` has `shape` and shares dtype and device with `other`, which is called `name`."""
    if tensor.shape != shape:
        raise _error(argument, f"shape {list(shape)}", tensor.shape)
    if tensor.dtype != other.dtype:
        raise _error(argument, f"dtype {other.dtype} (that of {name})", tensor.dtype)
    if tensor.device != other.device:
        raise _error(argument, f"device {other.device} (that of {name})", tensor.device)


def _check_index(argument: str, tensor: Tensor, other: Tensor, name: str, shape: tuple) -> None:
    """`tensor` holds integers, has `shape` and is on the device of `other`, called `name`."""
    if tensor.dtype != torch.int32 and tensor.dtype != torch.int64:
        raise _error(argument, "dtype int32 or int64", tensor.dtype)
    if tensor.shape != shape:
        raise _error(argument, f"shape {list(shape)}", tensor.shape)
    if tensor.device != other.device:
        raise _error(argument, f"device {other.device} (that of {name})", tensor.device)


# --- rms_norm ---------------------------------------------------------------------------------

_run_rms_norm = _define(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
    lambda x, weight, eps, backend: (_like(x), x.new_empty(x.shape[0], dtype=_wide(x))),
)
_run_rms_norm_backward = _define(
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


_autograd("rms_norm", _rms_norm_backward, _rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation: x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., N] and weight [N], one floating dtype; returns x's shape and dtype. Statistics in fp32.
    Source: Zhang and Sennrich 2019; Llama 2, section 2.2. ValueError on a mismatch.
    """
    _check_rows("x", x)
    _check_like("weight", weight, x, "x", (x.shape[-1],))
    choice = backend.resolve(x)
    if x.dim() == 2:
        return _run_rms_norm(x, weight, eps, choice)[0]
    return _run_rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, choice)[0].view(x.shape)


# --- add_rms_norm -----------------------------------------------------------------------------

_run_add_rms_norm = _define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps, backend: (
        _like(x),
        _like(x),
        x.new_empty(x.shape[0], dtype=_wide(x)),
    ),
)
_run_add_rms_norm_backward = _define(
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


_autograd("add_rms_norm", _add_rms_norm_backward, _add_rms_norm_setup)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm that follows it: (rms_norm(x + residual), x + residual).

    x and residual [..., N], weight [N], one floating dtype; both results have x's shape and dtype.
    The norm is taken of the sum as rounded to that dtype. ValueError on a mismatch.
    """
    _check_rows("x", x)
    _check_like("residual", residual, x, "x", x.shape)
    _check_like("weight", weight, x, "x", (x.shape[-1],))
    choice = backend.resolve(x)
    if x.dim() == 2:
        return _run_add_rms_norm(x, residual, weight, eps, choice)[:2]
    rows = (-1, x.shape[-1])
    y, summed, _ = _run_add_rms_norm(x.reshape(rows), residual.reshape(rows), weight, eps, choice)
    return y.view(x.shape), summed.view(x.shape)


# --- swiglu -----------------------------------------------------------------------------------

_run_swiglu = _define(
    "swiglu(Tensor gate, Tensor up, str backend) -> Tensor",
    lambda gate, up, backend: _like(gate),
)
_run_swiglu_backward = _define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    lambda dy, gate, up, backend: (_like(gate), _like(up)),
)


def _swiglu_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _swiglu_backward(ctx: Any, dy: Tensor | None) -> tuple:
    return *_run_swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None


_autograd("swiglu", _swiglu_backward, _swiglu_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise: the gated half of a SwiGLU feed-forward layer.

    gate and up [..., F], one floating dtype; returns their shape and dtype, computed in fp32.
    Source: Shazeer 2020; Llama 2, section 2.2. ValueError on a mismatch.
    """
    _check_rows("gate", gate)
    _check_like("up", up, gate, "gate", gate.shape)
    choice = backend.resolve(gate)
    if gate.dim() == 2:
        return _run_swiglu(gate, up, choice)
    rows = (-1, gate.shape[-1])
    return _run_swiglu(gate.reshape(rows), up.reshape(rows), choice).view(gate.shape)


# --- rope -------------------------------------------------------------------------------------

_run_rope = _define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, str backend)"
    " -> (Tensor, Tensor)",
    lambda q, k, cos, sin, positions, backend: (_like(q), _like(k)),
)
_run_rope_backward = _define(
    "rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor positions, str backend)"
    " -> (Tensor, Tensor)",
    lambda dq, dk, cos, sin, positions, backend: (_like(dq), _like(dk)),
)


def _rope_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, cos, sin, positions, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rope_backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple:
    return *_run_rope_backward(dq, dk, *ctx.saved_tensors, ctx.backend), None, None, None, None


_autograd("rope", _rope_backward, _rope_setup)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, half-split pairs as in Hugging Face weights.

    q [T, Hq, D] and k [T, Hkv, D], one floating dtype; cos and sin [P, D/2], fp32 (or fp64);
    positions [T], int32 or int64, 0 <= position < P. Element i is paired with i + D/2:
    (a, b) -> (a cos - b sin, b cos + a sin), in fp32. Returns new tensors of q's and k's shapes.
    Source: Su et al. 2021. ValueError on a mismatch, and (reference, CPU) on a position outside.
    """
    _check_floating("q", q)
    if q.dim() != 3 or q.shape[2] % 2:
        raise _error("q", "shape [T, Hq, D] with D even", q.shape)
    if k.dim() != 3:
        raise _error("k", "shape [T, Hkv, D]", k.shape)
    _check_like("k", k, q, "q", (q.shape[0], k.shape[1], q.shape[2]))
    if cos.dim() != 2 or cos.shape[1] * 2 != q.shape[2]:
        raise _error("cos", f"shape [P, {q.shape[2] // 2}]", cos.shape)
    if cos.dtype != torch.float32 and cos.dtype != torch.float64:
        raise _error("cos", "dtype float32 or float64", cos.dtype)
    if cos.device != q.device:
        raise _error("cos", f"device {q.device} (that of q)", cos.device)
    _check_like("sin", sin, cos, "cos", cos.shape)
    _check_index("positions", positions, q, "q", (q.shape[0],))
    return _run_rope(q, k, cos, sin, positions, backend.resolve(q))


# --- attention --------------------------------------------------------------------------------

_run_attention = _define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, int max_seqlen, bool causal,"
    " float scale, str backend) -> (Tensor, Tensor)",
    lambda q, k, v, cu_q, cu_k, max_seqlen, causal, scale, backend: (
        _like(q),
        q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q)),
    ),
)
_run_attention_backward = _define(
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


_autograd("attention", _attention_backward, _attention_setup)


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
    _check_floating("q", q)
    if q.dim() != 3:
        raise _error("q", "shape [T, Hq, D]", q.shape)
    if k.dim() != 3 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise _error("k", f"shape [T, Hkv, {q.shape[2]}], Hkv dividing {q.shape[1]}", k.shape)
    tokens = q.shape[0] if cu_seqlens_k is None else k.shape[0]
    _check_like("k", k, q, "q", (tokens, k.shape[1], q.shape[2]))
    _check_like("v", v, k, "k", k.shape)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise _error("cu_seqlens", "shape [B+1]", cu_seqlens.shape)
    _check_index("cu_seqlens", cu_seqlens, q, "q", cu_seqlens.shape)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    else:
        _check_index("cu_seqlens_k", cu_seqlens_k, q, "q", cu_seqlens.shape)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2])
    choice = backend.resolve(q)
    return _run_attention(
        q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen or 0, causal, scale, choice
    )[0]


# --- decode_attention -------------------------------------------------------------------------

_run_decode_attention = _define(
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
    _check_floating("q", q)
    if q.dim() != 3:
        raise _error("q", "shape [B, Hq, D]", q.shape)
    if k_cache.dim() != 4 or k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise _error(
            "k_cache",
            f"shape [pages, page, Hkv, {q.shape[2]}], Hkv dividing {q.shape[1]}",
            k_cache.shape,
        )
    _check_like("k_cache", k_cache, q, "q", (*k_cache.shape[:3], q.shape[2]))
    _check_like("v_cache", v_cache, k_cache, "k_cache", k_cache.shape)
    if block_table.dim() != 2:
        raise _error("block_table", "shape [B, pages]", block_table.shape)
    _check_index("block_table", block_table, q, "q", (q.shape[0], block_table.shape[1]))
    _check_index("lengths", lengths, q, "q", (q.shape[0],))
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


_run_token_logprob = _define(
    "token_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _token_logprob_fake,
)
_run_token_logprob_backward = _define(
    "token_logprob_backward(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor lse, Tensor? entropy, float temperature, str backend)"
    " -> (Tensor, Tensor)",
    lambda dlogprob, dentropy, hidden, weight, *_: (_like(hidden), _like(weight)),
)
# The same with memories for logits between the two, one of which becomes the gradient of weight:
# for backends that have it (logprob_tiles says what it saves).
_run_token_logprob_parked = _define(
    "token_logprob_parked(Tensor hidden, Tensor weight, Tensor targets, float temperature,"
    " bool entropy, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, *rest: (
        *_token_logprob_fake(hidden, weight, *rest),
        *logprob_tiles.Parking.empty(hidden, weight, logprob_tiles.CPU),
    ),
)
_run_token_logprob_parked_backward = _define(
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
    _autograd(_name, _token_logprob_backward, _token_logprob_setup)


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
    where a negative one means "not predicted": logprob 0, entropy 0, no gradient. Returns fp32 [T],
    or with entropy=True also each row's entropy (nats), [T]; both are differentiable, and logprob
    <= 0. The [T, V] logits are never held in memory (except by the reference, the oracle).
    ValueError on a mismatch, temperature <= 0, and (reference, CPU) on a target >= V.
    """
    _check_floating("hidden", hidden)
    if hidden.dim() != 2:
        raise _error("hidden", "shape [T, dim]", hidden.shape)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise _error("weight", f"shape [V, {hidden.shape[1]}] with V > 0", weight.shape)
    _check_like("weight", weight, hidden, "hidden", (weight.shape[0], hidden.shape[1]))
    _check_index("targets", targets, hidden, "hidden", (hidden.shape[0],))
    if not temperature > 0:
        raise _error("temperature", "a number above 0", temperature)
    choice = backend.resolve(hidden)
    run = _run_token_logprob_parked if _can_park(hidden, weight, choice) else _run_token_logprob
    logprob, spread, *_ = run(hidden, weight, targets, temperature, entropy, choice)
    return (logprob, spread) if entropy else logprob
