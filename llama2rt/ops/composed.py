"""Fast compositions of torch calls, for every op a backend has no native kernel for.

Written for the CPU, able to run on any device; no [T, V] logits in memory. Same signatures and
semantics as `reference`, whose attention serves as it is: in a dtype or on a device for which no
kernel was made, packed documents have no faster torch call.
"""

import torch
from torch import Tensor

from llama2rt.ops import reference
from llama2rt.ops.divergence_tiles import divergence, divergence_backward
from llama2rt.ops.reference import (  # what torch calls do no better elsewhere
    add_rms_norm,
    add_rms_norm_backward,
    attention,
    attention_backward,
    check_targets,
    rms_norm,
    rms_norm_backward,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
)
from llama2rt.ops.tensors import empty_like, wide_dtype, zeros_like

__all__ = [
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "decode_attention",
    "divergence",
    "divergence_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_backward",
    "swiglu",
    "swiglu_backward",
    "token_logprob",
    "token_logprob_backward",
]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
) -> Tensor:
    if cu_q is not None:  # ragged queries have no faster torch call than one for each sequence
        return reference.decode_attention(q, k_cache, v_cache, block_table, lengths, scale, cu_q)
    rows, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    longest = int(lengths.max()) if rows else 0
    if longest == 0:
        return zeros_like(q)
    pages = block_table[:, : -(-longest // page)]
    # Table entries past a sequence's end may hold anything; page 0 stands in for them.
    used = torch.arange(pages.shape[1], device=q.device) * page < lengths[:, None]
    pages = torch.where(used, pages, 0).flatten()
    k, v = (
        cache.index_select(0, pages).view(rows, -1, kv_heads, dim).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    wide = wide_dtype(q)
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
    scores = (grouped @ k.transpose(2, 3)).to(wide).mul_(scale)
    hidden = torch.arange(k.shape[2], device=q.device) >= lengths[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    # A page beyond the length may hold NaN or inf, which 0 * would spread: not read, but zeroed.
    v = v.masked_fill(hidden[:, None, :, None], 0)
    probabilities = scores.softmax(-1).nan_to_num_(0.0).to(q.dtype)
    return (probabilities @ v).reshape(rows, heads, dim).contiguous()


# Logits exist one [ROWS, COLUMNS] tile at a time, 4 MiB in fp32. Halving or doubling either side
# changed forward + backward by under 10 % on a CPU (V 512 to 32000, bf16 and fp32).
ROWS = 1024
COLUMNS = 1024


def tiles(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _tile_logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = torch.mm(hidden, weight.T).to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if hidden.device.type == "cpu":
        check_targets(targets, vocabulary)
    wide = wide_dtype(hidden)
    # The target's logit is read from the tile that its log-sum-exp is made of: a logit rounded any
    # other way could exceed it, and give a positive log-probability.
    target_logit = torch.zeros(tokens, dtype=wide, device=hidden.device)
    columns = tiles(vocabulary, COLUMNS)
    sums = torch.empty(len(columns), tokens, dtype=wide, device=hidden.device)
    entropies = torch.empty_like(sums) if entropy else sums
    for rows in tiles(tokens, ROWS):
        for number, part in enumerate(columns):
            logits = _tile_logits(hidden[rows], weight[part], temperature, wide)
            sums[number, rows] = logits.logsumexp(-1)
            local = targets[rows].long() - part.start
            inside = (local >= 0) & (local < logits.shape[1])
            picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target_logit[rows] += torch.where(inside, picked, 0.0)
            if entropy:
                log_p = logits.sub_(sums[number, rows, None])
                entropies[number, rows] = log_p.exp().mul_(log_p).sum(-1).neg_()
    lse = sums.logsumexp(0)
    predicted = targets >= 0
    logprob = torch.where(predicted, target_logit - lse, 0.0)
    if not entropy:
        return logprob, logprob.new_empty(0), lse
    # That of the choice of a tile and of the choices inside it: terms that are never below 0, where
    # lse less the mean logit would lose its digits for a nearly certain token.
    log_share = sums - lse
    all_entropy = (log_share.exp() * (entropies - log_share)).sum(0)
    return logprob, torch.where(predicted, all_entropy, 0.0), lse


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
    predicted = targets >= 0
    upstream = torch.where(predicted, dlogprob, 0.0)[:, None] / temperature
    if dentropy is not None:
        entropy_upstream = torch.where(predicted, dentropy, 0.0)[:, None] / temperature
    dweight = empty_like(weight)
    dhidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device)
    for part in tiles(weight.shape[0], COLUMNS):
        # fp32 sums over row tiles, but for one slice of the vocabulary at a time
        acc = torch.zeros(weight[part].shape, dtype=lse.dtype, device=hidden.device)
        for rows in tiles(hidden.shape[0], ROWS):
            log_p = _tile_logits(hidden[rows], weight[part], temperature, lse.dtype)
            log_p -= lse[rows, None]
            if dentropy is not None and entropy is not None:
                dlogits = log_p.exp()
                dlogits *= -upstream[rows] - entropy_upstream[rows] * (log_p + entropy[rows, None])
            else:
                dlogits = log_p.exp_().mul_(-upstream[rows])
            local = targets[rows].long() - part.start
            inside = (local >= 0) & (local < dlogits.shape[1])
            index = local.clamp(0, dlogits.shape[1] - 1)[:, None]
            dlogits.scatter_add_(1, index, torch.where(inside[:, None], upstream[rows], 0.0))
            dlogits = dlogits.to(hidden.dtype)
            if dlogits.dtype == lse.dtype:
                dhidden[rows].addmm_(dlogits, weight[part])
                acc.addmm_(dlogits.T, hidden[rows])
            else:
                dhidden[rows] += torch.mm(dlogits, weight[part])
                acc += torch.mm(dlogits.T, hidden[rows])
        dweight[part] = acc
    return dhidden.to(hidden.dtype), dweight
