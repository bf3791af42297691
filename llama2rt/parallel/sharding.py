"""The seven ops on DTensors: which cuts of arguments each takes, and how its results lie then.

Importing this module tells torch; `ops` knows nothing of it. Norms take tokens cut, swiglu tokens
or hidden features, rope and attention heads (rope tokens too), decoding heads or sequences.
A weight's gradient from cut tokens is a sum still to be made (`Partial`). Other cuts are gathered
first: of features that a norm averages, of tokens that attend to each other, of heads that come out
uneven where queries share keys. `token_logprob` has a rule of another kind, since ranks must talk
inside it (`vocabulary`).
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from llama2rt.parallel import vocabulary

_OPS = torch.ops.llama2rt
_WHOLE, _SUM = Replicate(), Partial()
_TOKENS, _SECOND = Shard(0), Shard(1)  # dimension 1 is that of heads, or of features

Rule = tuple[list[Placement], list[Placement | None]]
"""(placements of the results, of the arguments; None for what is no tensor)"""


def _rule(results: tuple[Placement, ...], tensors: tuple[Placement | None, ...], rest: int) -> Rule:
    return list(results), [*tensors, *(None,) * rest]


def _whole(results: int, tensors: int, rest: int) -> Rule:
    return _rule((_WHOLE,) * results, (_WHOLE,) * tensors, rest)


@register_sharding(_OPS.rms_norm.default)
def _rms_norm(*_: Any) -> list[Rule]:
    return [_whole(2, 2, 2), _rule((_TOKENS, _TOKENS), (_TOKENS, _WHOLE), 2)]


@register_sharding(_OPS.rms_norm_backward.default)
def _rms_norm_backward(*_: Any) -> list[Rule]:
    tokens = _rule((_TOKENS, _SUM), (_TOKENS, _TOKENS, _WHOLE, _TOKENS), 1)
    return [_whole(2, 4, 1), tokens]


@register_sharding(_OPS.add_rms_norm.default)
def _add_rms_norm(*_: Any) -> list[Rule]:
    return [_whole(3, 3, 2), _rule((_TOKENS,) * 3, (_TOKENS, _TOKENS, _WHOLE), 2)]


@register_sharding(_OPS.add_rms_norm_backward.default)
def _add_rms_norm_backward(dy: Any, dsummed: Any, *_: Any) -> list[Rule]:
    rules = []
    for rows, of_weight in ((_WHOLE, _WHOLE), (_TOKENS, _SUM)):
        tensors = (rows, None if dsummed is None else rows, rows, _WHOLE, rows)
        rules.append(_rule((rows, of_weight), tensors, 1))
    return rules


@register_sharding([_OPS.swiglu.default, _OPS.swiglu_backward.default])
def _swiglu(*arguments: Any) -> list[Rule]:
    tensors = len(arguments) - 1
    results = tensors - 1  # one forward, two backward
    return [
        _rule((placement,) * results, (placement,) * tensors, 1)
        for placement in (_WHOLE, _TOKENS, _SECOND)
    ]


def _heads_come_out(q: Any, k: Any) -> bool:
    """Whether every rank's query heads find their key heads there, at dimension 1 of both."""
    return q.shape[1] == k.shape[1] or k.shape[1] % q.mesh.size() == 0


@register_sharding([_OPS.rope.default, _OPS.rope_backward.default])
def _rope(q: Any, k: Any, *_: Any) -> list[Rule]:
    cut = [_WHOLE, _SECOND] if _heads_come_out(q, k) else [_WHOLE]
    rules = [_rule((p, p), (p, p, _WHOLE, _WHOLE, _WHOLE), 1) for p in cut]
    tokens = _rule((_TOKENS,) * 2, (_TOKENS, _TOKENS, _WHOLE, _WHOLE, _TOKENS), 1)
    return [*rules, tokens]


@register_sharding(_OPS.attention.default)
def _attention(q: Any, k: Any, *_: Any) -> list[Rule]:
    rules = [_whole(2, 5, 4)]
    if _heads_come_out(q, k):
        # The log-sum-exp is [heads, tokens].
        rules.append(_rule((_SECOND, Shard(0)), (*(_SECOND,) * 3, _WHOLE, _WHOLE), 4))
    return rules


@register_sharding(_OPS.attention_backward.default)
def _attention_backward(dout: Any, q: Any, k: Any, *_: Any) -> list[Rule]:
    rules = [_whole(3, 8, 4)]
    if _heads_come_out(q, k):
        tensors = (*(_SECOND,) * 5, Shard(0), _WHOLE, _WHOLE)
        rules.append(_rule((_SECOND,) * 3, tensors, 4))
    return rules


@register_sharding(_OPS.decode_attention.default)
def _decode_attention(q: Any, k_cache: Any, *others: Any) -> list[Rule]:
    *_, cu_q, _backend = others
    last = None, None if cu_q is None else _WHOLE  # scale and offsets
    rules = [_rule((_WHOLE,), ((_WHOLE,) * 5 + last), 1)]
    if cu_q is None:  # offsets of cut sequences would count from another token
        cut = (Shard(0), _WHOLE, _WHOLE, Shard(0), Shard(0), *last)
        rules.append(_rule((Shard(0),), cut, 1))
    if q.shape[1] == k_cache.shape[2] or k_cache.shape[2] % q.mesh.size() == 0:
        heads = (_SECOND, Shard(2), Shard(2), _WHOLE, _WHOLE, *last)
        rules.append(_rule((_SECOND,), heads, 1))
    return rules


torch.library.register_torch_dispatch("llama2rt::token_logprob", DTensor, vocabulary.forward)
torch.library.register_torch_dispatch(
    "llama2rt::token_logprob_backward", DTensor, vocabulary.backward
)
