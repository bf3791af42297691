"""The backend of `llama2rt._cpu`: torch tensors to addresses and back, one function per kernel.

Arguments have passed the checks of `contract`. What is left to do here is to copy where a kernel
needs the last dimension contiguous, to allocate results, and to keep every temporary referenced
until the call has returned. Each call names its thread count: torch's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# After torch, whose OpenMP runtime the module then shares (see CMakeLists.txt).
from llama2rt import _cpu
from llama2rt.ops import logprob_tiles
from llama2rt.ops.logprob_tiles import Statistics, Upstream
from llama2rt.ops.reference import check_lengths, check_targets

DEVICES = ("cpu",)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy of which that is true."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _offsets(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.long().contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, weight = _rows(x), weight.contiguous()
    y, rstd = _empty(x), x.new_empty(x.shape[0], dtype=torch.float32)
    summed = None
    if residual is not None:
        residual, summed = _rows(residual), _empty(x)
    _cpu.rms_norm(
        _DTYPES[x.dtype],
        *x.shape,
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        0 if summed is None else summed.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, summed, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], weight [N] -> (y, rstd [T] fp32)."""
    y, _, rstd = _rms_norm(x, None, weight, eps)
    return y, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [T, N], weight [N] -> (y, x + residual, rstd [T] fp32)."""
    y, summed, rstd = _rms_norm(x, residual, weight, eps)
    assert summed is not None
    return y, summed, rstd


def add_rms_norm_backward(
    dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, equal to that of residual; gradient of weight)."""
    dy, x, weight, rstd = _rows(dy), _rows(summed), weight.contiguous(), rstd.contiguous()
    if dsummed is not None:
        dsummed = _rows(dsummed)
    dx, dweight = _empty(x), _empty(weight)
    _cpu.rms_norm_backward(
        _DTYPES[x.dtype],
        *x.shape,
        dy.data_ptr(),
        dy.stride(0),
        0 if dsummed is None else dsummed.data_ptr(),
        0 if dsummed is None else dsummed.stride(0),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dweight


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight)."""
    return add_rms_norm_backward(dy, None, x, weight, rstd)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [T, F] -> silu(gate) * up."""
    gate, up = _rows(gate), _rows(up)
    y = _empty(gate)
    _cpu.swiglu(
        _DTYPES[gate.dtype],
        *gate.shape,
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate, gradient of up)."""
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    dgate, dup = _empty(gate), _empty(up)
    _cpu.swiglu_backward(
        _DTYPES[gate.dtype],
        *gate.shape,
        dy.data_ptr(),
        dy.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        dgate.data_ptr(),
        dup.data_ptr(),
        torch.get_num_threads(),
    )
    return dgate, dup


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, positions = _rows(q), _rows(k), positions.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    q_out, k_out = _empty(q), _empty(k)
    _cpu.rope(
        _DTYPES[q.dtype],
        q.shape[0],
        q.shape[2],
        q.data_ptr(),
        q.shape[1],
        q.stride(0),
        q.stride(1),
        q_out.data_ptr(),
        k.data_ptr(),
        k.shape[1],
        k.stride(0),
        k.stride(1),
        k_out.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
        positions.data_ptr(),
        positions.dtype == torch.int64,
        inverse,
        torch.get_num_threads(),
    )
    return q_out, k_out


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], tables [P, D/2] -> both rotated. ValueError on a position."""
    return _rope(q, k, cos, sin, positions, inverse=False)


def rope_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients rotated back."""
    return _rope(dq, dk, cos, sin, positions, inverse=True)


def _heads(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


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
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> (out, lse [Hq, Tq] fp32). ValueError on offsets."""
    check_lengths(cu_q, q.shape[0], "cu_seqlens")
    check_lengths(cu_k, k.shape[0], "cu_seqlens_k")
    q, k, v, cu_q, cu_k = _rows(q), _rows(k), _rows(v), _offsets(cu_q), _offsets(cu_k)
    out, lse = _empty(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _cpu.attention(
        _DTYPES[q.dtype],
        cu_q.shape[0] - 1,
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        q.shape[1],
        *k.shape[1:],
        _heads(q),
        _heads(k),
        _heads(v),
        causal,
        scale,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
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
    """(gradients of q, k and v). ValueError on offsets."""
    check_lengths(cu_q, q.shape[0], "cu_seqlens")
    check_lengths(cu_k, k.shape[0], "cu_seqlens_k")
    dout, q, k, v = _rows(dout), _rows(q), _rows(k), _rows(v)
    out, lse, cu_q, cu_k = out.contiguous(), lse.contiguous(), _offsets(cu_q), _offsets(cu_k)
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    _cpu.attention_backward(
        _DTYPES[q.dtype],
        cu_q.shape[0] - 1,
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        q.shape[1],
        *k.shape[1:],
        _heads(q),
        _heads(k),
        _heads(v),
        causal,
        scale,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
        _heads(dout),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
    )
    return dq, dk, dv


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """q [B, Hq, D], caches [pages, page, Hkv, D] -> [B, Hq, D]. ValueError on a page or length."""
    q, k_cache, v_cache = _rows(q), _rows(k_cache), _rows(v_cache)
    block_table, lengths = block_table.int().contiguous(), lengths.int().contiguous()
    out = _empty(q)
    _cpu.decode_attention(
        _DTYPES[q.dtype],
        *q.shape[:2],
        k_cache.shape[2],
        q.shape[2],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        k_cache.data_ptr(),
        *k_cache.stride()[:3],
        v_cache.data_ptr(),
        *v_cache.stride()[:3],
        *k_cache.shape[:2],
        block_table.data_ptr(),
        *block_table.shape[1:],
        block_table.stride(0),
        lengths.data_ptr(),
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Logprob:
    """`logprob_tiles.Kernels` on this processor."""

    def fold(
        self, logits: Tensor, targets: Tensor, first: int, scale: float, statistics: Statistics
    ) -> None:
        _cpu.token_logprob(
            _DTYPES[logits.dtype],
            *logits.shape,
            logits.data_ptr(),
            logits.stride(0),
            targets.data_ptr(),
            first,
            scale,
            *map(_address, statistics),
            torch.get_num_threads(),
        )

    def differentiate(
        self,
        logits: Tensor,
        dlogits: Tensor,
        targets: Tensor,
        first: int,
        scale: float,
        upstream: Upstream,
    ) -> None:
        _cpu.token_logprob_backward(
            _DTYPES[logits.dtype],
            *logits.shape,
            logits.data_ptr(),
            logits.stride(0),
            dlogits.data_ptr(),
            dlogits.stride(0),
            targets.data_ptr(),
            first,
            scale,
            *map(_address, upstream),
            torch.get_num_threads(),
        )

    def weight_gradient(self, out: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        if _own_products(dlogits.dtype):
            weight_gradient(dlogits, hidden, out)
        else:
            torch.mm(dlogits.T, hidden, out=out)

    def add_weight_gradient(self, total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        if _own_products(dlogits.dtype):
            add_weight_gradient(total, dlogits, hidden)
        else:
            _add_product(total, dlogits.T, hidden)

    def add_hidden_gradient(self, total: Tensor, dlogits: Tensor, weight: Tensor) -> None:
        _add_product(total, dlogits, weight)


def _own_products(dtype: torch.dtype) -> bool:
    """Whether `_cpu` multiplies matrices of this dtype faster than torch does, whose products use
    AMX where there is one."""
    return dtype == torch.bfloat16 and _cpu.isa() == "avx512bf16" and not _cpu.has_amx()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (fp32, contiguous) += a @ b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
        return
    product = torch.mm(a, b)
    _cpu.add_to(
        _DTYPES[product.dtype],
        product.numel(),
        product.data_ptr(),
        total.data_ptr(),
        torch.get_num_threads(),
    )


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D] -> (logprob [T] fp32, entropy [T] or [0], log-sum-exp [T])."""
    check_targets(targets, weight.shape[0])
    return logprob_tiles.forward(
        _Logprob(), logprob_tiles.CPU, hidden, weight, targets, temperature, entropy
    )


def token_logprob_backward(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(gradient of hidden, gradient of weight)."""
    arguments = dlogprob, dentropy, hidden, weight, targets, lse, entropy, temperature
    return logprob_tiles.backward(_Logprob(), logprob_tiles.CPU, *arguments)


def token_logprob_parked(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_logprob's results, and the two memories with logits for backward: that of weight's
    gradient and a tile."""
    check_targets(targets, weight.shape[0])
    parking = logprob_tiles.Parking.empty(hidden, weight, logprob_tiles.CPU)
    arguments = hidden, weight, targets, temperature, entropy, parking
    return *logprob_tiles.forward(_Logprob(), logprob_tiles.CPU, *arguments), *parking


def token_logprob_parked_backward(
    dweight: Tensor,
    tile: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """token_logprob_backward's gradient of hidden; dweight becomes the gradient of weight."""
    parking = logprob_tiles.Parking(dweight, tile)
    arguments = dlogprob, dentropy, hidden, weight, targets, lse, entropy, temperature, parking
    return logprob_tiles.backward(_Logprob(), logprob_tiles.CPU, *arguments)[0]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> x weight^T [T, N]; made for a handful of rows."""
    x, weight = _rows(x), _rows(weight)
    y = x.new_empty(x.shape[0], weight.shape[0])
    _cpu.linear(
        _DTYPES[x.dtype],
        *y.shape,
        x.shape[1],
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """dy [T, N], x [T, K], one dtype -> dy^T x [N, K], summed in fp32: the gradient of `linear`'s
    weight. out: contiguous."""
    out = x.new_empty(dy.shape[1], x.shape[1]) if out is None else out
    _weight_gradient(_rows(dy), _rows(x), out.data_ptr(), 0)
    return out


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """total (fp32, contiguous) += dy^T x, of any of the three dtypes."""
    _weight_gradient(_rows(dy), _rows(x), 0, total.data_ptr())


def _weight_gradient(dy: Tensor, x: Tensor, dweight: int, total: int) -> None:
    _cpu.weight_gradient(
        _DTYPES[x.dtype],
        *dy.shape,
        x.shape[1],
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        dweight,
        total,
        torch.get_num_threads(),
    )


NATIVE: dict[str, Callable] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "add_rms_norm": add_rms_norm,
    "add_rms_norm_backward": add_rms_norm_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "rope": rope,
    "rope_backward": rope_backward,
    "attention": attention,
    "attention_backward": attention_backward,
    "decode_attention": decode_attention,
    "token_logprob": token_logprob,
    "token_logprob_backward": token_logprob_backward,
    "token_logprob_parked": token_logprob_parked,
    "token_logprob_parked_backward": token_logprob_parked_backward,
}
