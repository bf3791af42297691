"""The oracle: every op and its backward formula in plain torch, as near to the mathematics as text.

Computes in fp64 when given fp64, else in fp32, and rounds once to the input's dtype at the end. It
is what kernels are judged by, so nothing here is clever: attention walks over documents,
token_logprob holds all logits. `gradcheck` runs on these backward formulas.
"""

import itertools

import torch
from torch import Tensor

from llama2rt.ops.tensors import wide_dtype, zeros_like


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = wide_dtype(tensors[0])
    return [tensor.to(dtype) for tensor in tensors]


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """ValueError for a target id outside the vocabulary (negative ids mean "not predicted")."""
    if targets.numel() and (highest := int(targets.max())) >= vocabulary:
        raise ValueError(
            f"targets: expected ids below the vocabulary size {vocabulary}, got {highest}"
        )


def check_lengths(cu_seqlens: Tensor, tokens: int, name: str) -> list[int]:
    """cu_seqlens as a list; ValueError unless it rises from 0 to the number of tokens."""
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(
            f"{name}: expected offsets rising from 0 to {tokens}, got {bounds[:4]}..{bounds[-2:]}"
        )
    return bounds


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide, w = _wide(x, weight)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    # LLaMA rounds before it multiplies by the weight; one rounding is at least as exact.
    return (wide * rstd[:, None] * w).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    g, wide, w = _wide(dy, x, weight)
    normed = wide * rstd[:, None]
    dnormed = g * w
    dx = rstd[:, None] * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (g * normed).sum(0).to(weight.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x + residual
    y, rstd = rms_norm(summed, weight, eps)
    return y, summed, rstd


def add_rms_norm_backward(
    dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    g, wide, w = _wide(dy, summed, weight)
    dx, dweight = rms_norm_backward(g, wide, w, rstd)
    if dsummed is not None:
        dx = dx + dsummed
    return dx.to(summed.dtype), dweight.to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    g, u = _wide(gate, up)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d, g, u = _wide(dy, gate, up)
    s = torch.sigmoid(g)
    dgate = d * u * s * (1 + g * (1 - s))
    return dgate.to(gate.dtype), (d * g * s).to(up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    (wide,) = _wide(x)
    try:
        c = cos.index_select(0, positions)[:, None].to(wide.dtype)
        s = sin.index_select(0, positions)[:, None].to(wide.dtype)
    except IndexError:
        raise ValueError(
            f"positions: expected 0 <= position < {cos.shape[0]} (rows of cos), "
            f"got {int(positions.min())}..{int(positions.max())}"
        ) from None
    a, b = wide.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin, positions), _rotate(k, cos, sin, positions)


def rope_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    # A rotation's transpose is the rotation by the opposite angle.
    return rope(dq, dk, cos, -sin, positions)


def _documents(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    bounds_q = check_lengths(cu_q, q.shape[0], "cu_seqlens")
    bounds_k = check_lengths(cu_k, k.shape[0], "cu_seqlens_k")
    return [
        (slice(*pair_q), slice(*pair_k))
        for pair_q, pair_k in zip(
            itertools.pairwise(bounds_q),
            itertools.pairwise(bounds_k),
            strict=True,
        )
    ]


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[H, Lq, Lk] scaled scores; bottom-right aligned causal mask: the last query sees all keys."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        queries, keys = scores.shape[1:]
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~allowed.tril(keys - queries), -torch.inf)
    return scores


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
    group = q.shape[1] // k.shape[1]
    wq, wk, wv = _wide(q, k, v)
    wk, wv = wk.repeat_interleave(group, 1), wv.repeat_interleave(group, 1)
    out = zeros_like(wq)
    lse = wq.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for rows, keys in _documents(q, k, cu_q, cu_k):
        scores = _scores(wq[rows], wk[keys], causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        # A query that sees no key (empty key document, or causal with fewer keys) gives 0.
        probabilities = (scores - lse[:, rows, None]).exp().nan_to_num(0.0)
        out[rows] = torch.einsum("hqk,khd->qhd", probabilities, wv[keys])
    return out.to(q.dtype), lse


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
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    d, wq, wk, wv, wo = _wide(dout, q, k, v, out)
    wk, wv = wk.repeat_interleave(group, 1), wv.repeat_interleave(group, 1)
    dq, dk, dv = (zeros_like(t) for t in (wq, wk, wv))
    delta = (d * wo).sum(-1).T
    for rows, keys in _documents(q, k, cu_q, cu_k):
        scores = _scores(wq[rows], wk[keys], causal, scale)
        probabilities = (scores - lse[:, rows, None]).exp().nan_to_num(0.0)
        dv[keys] = torch.einsum("hqk,qhd->khd", probabilities, d[rows])
        dprobabilities = torch.einsum("qhd,khd->hqk", d[rows], wv[keys])
        dscores = probabilities * (dprobabilities - delta[:, rows, None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, wk[keys])
        dk[keys] = torch.einsum("hqk,qhd->khd", dscores, wq[rows])
    dk, dv = (t.unflatten(1, (kv_heads, group)).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
) -> Tensor:
    group = q.shape[1] // k_cache.shape[2]
    out = zeros_like(q)
    page = k_cache.shape[1]
    bounds = range(len(q) + 1) if cu_q is None else check_lengths(cu_q, len(q), "cu_seqlens_q")
    for row, length in enumerate(lengths.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        queries = slice(max(begin, end - length), end)  # those before them see no token, and stay 0
        pages = block_table[row, : -(-length // page)].long()
        wq, wk, wv = _wide(
            *(q[queries], k_cache[pages].flatten(0, 1)[:length]),
            v_cache[pages].flatten(0, 1)[:length],
        )
        wk, wv = wk.repeat_interleave(group, 1), wv.repeat_interleave(group, 1)
        probabilities = _scores(wq, wk, True, scale).softmax(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", probabilities, wv).to(q.dtype)
    return out


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    h, w = _wide(hidden, weight)
    return h @ w.T / temperature


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(targets, weight.shape[0])
    logits = _logits(hidden, weight, temperature)
    lse = logits.logsumexp(-1)
    predicted = targets >= 0
    chosen = logits.gather(1, targets.clamp_min(0).long()[:, None])[:, 0]
    logprob = torch.where(predicted, chosen - lse, 0.0)
    if not entropy:
        return logprob, logprob.new_empty(0), lse
    log_p = logits - lse[:, None]
    return logprob, torch.where(predicted, -(log_p.exp() * log_p).sum(-1), 0.0), lse


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
    log_p = _logits(hidden, weight, temperature) - lse[:, None]
    p = log_p.exp()
    predicted = targets >= 0
    upstream = torch.where(predicted, dlogprob, 0.0)[:, None]
    dlogits = -upstream * p
    column = targets.clamp(0, weight.shape[0] - 1).long()[:, None]
    dlogits.scatter_add_(1, column, upstream * (targets < weight.shape[0])[:, None])
    if dentropy is not None and entropy is not None:
        dlogits -= torch.where(predicted, dentropy, 0.0)[:, None] * p * (log_p + entropy[:, None])
    dlogits /= temperature
    h, w = _wide(hidden, weight)
    return (dlogits @ w).to(hidden.dtype), (dlogits.T @ h).to(weight.dtype)


def _log_distributions(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """log s, log t and log(beta t + (1 - beta) s), [T, V]."""
    s = _logits(hidden, weight, temperature).log_softmax(-1)
    t = _logits(teacher_hidden, teacher_weight, temperature).log_softmax(-1)
    return s, t, (beta * t.exp() + (1 - beta) * s.exp()).log()


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    s, t, m = _log_distributions(hidden, weight, teacher_hidden, teacher_weight, beta, temperature)
    if beta == 0:
        return (t.exp() * (t - s)).sum(-1), s.new_zeros(s.shape[0])
    student_kl = (s.exp() * (s - m)).sum(-1)
    if beta == 1:
        return student_kl, student_kl.clone()
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * student_kl, student_kl


def divergence_backward(
    dvalue: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_kl: Tensor,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    s, t, m = _log_distributions(hidden, weight, teacher_hidden, teacher_weight, beta, temperature)
    if beta == 0:
        dlogits = s.exp() - t.exp()
    else:
        scale = 1 if beta == 1 else 1 - beta
        dlogits = scale * s.exp() * (s - m - student_kl[:, None])
    dlogits *= dvalue[:, None] / temperature
    h, w = _wide(hidden, weight)
    return (dlogits @ w).to(hidden.dtype), (dlogits.T @ h).to(weight.dtype)
