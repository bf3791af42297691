"""What `torch.utils.flop_counter.FlopCounterMode` counts for our ops: its own conventions.

Torch counts matrix products, 2 FLOPs a multiply-add, and nothing elementwise; attention without
regard to causality, a whole rectangle a document; and the scores that attention's backward makes
again. So counts over a patched or a packed model compare with those over torch's own calls. (The
rates of docs/benchmarks.md count useful work instead, half of a causal rectangle.)

The module of the counter imports Triton, and few processes want it: the formulas are registered
when somebody imports it, not when ops are imported.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama2rt.ops.linear import BLOCKED, FEW_ROWS, GRADIENT

COUNTER = "torch.utils.flop_counter"


def _holds_numbers(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


def _pairs(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen: int) -> int:
    """Pairs of a query and a key of its document. Offsets of a compiler's trace hold no numbers:
    then an upper bound, documents of max_seqlen, or one of all tokens."""
    if not (_holds_numbers(cu_q) and _holds_numbers(cu_k)):
        return k.shape[0] * min(max_seqlen or q.shape[0], q.shape[0])
    return int((cu_q.long().diff() * cu_k.long().diff()).sum())


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen: int, *_: Any, **__: Any
) -> int:
    """Scores and their product with v."""
    return 2 * 2 * _pairs(q, k, cu_q, cu_k, max_seqlen) * q.shape[1] * q.shape[2]


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, *rest: Any, **_: Any) -> int:
    """Scores again, and the gradients of v, probabilities, q and k."""
    _v, _out, _lse, cu_q, cu_k, max_seqlen, *_settings = rest
    return 5 * 2 * _pairs(q, k, cu_q, cu_k, max_seqlen) * q.shape[1] * q.shape[2]


def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> int:
    if not all(_holds_numbers(x) for x in (lengths, cu_q) if x is not None):
        pairs = q.shape[0] * block_table.shape[1] * k_cache.shape[1]
    elif cu_q is None:
        pairs = int(lengths.sum())
    else:
        pairs = int((cu_q.long().diff() * lengths.long()).sum())
    return 2 * 2 * pairs * q.shape[1] * q.shape[2]


def _token_logprob(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * hidden.shape[0] * weight.numel()


def _token_logprob_backward(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, *_: Any, **__: Any
) -> int:
    """Logits again, and the gradients of hidden and weight."""
    return 3 * 2 * hidden.shape[0] * weight.numel()


def _token_logprob_stashed_backward(dweight: Tensor, tile: Tensor, *rest: Any, **_: Any) -> int:
    """Logits again where the gradient of weight had no room for them, beyond D tokens (the tile
    that backward works in holds a few more, which is not counted off)."""
    _dlogprob, _dentropy, hidden, weight, *_settings = rest
    tokens, dim = hidden.shape
    return 2 * (2 * tokens + max(0, tokens - dim)) * weight.numel()


def _divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """The logits of both."""
    return 2 * hidden.shape[0] * (weight.numel() + teacher_weight.numel())


def _divergence_backward(
    dvalue: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, *rest: Any, **_: Any
) -> int:
    """Both logits again, and the gradients of hidden and weight."""
    teacher_weight = rest[0]
    return 2 * hidden.shape[0] * (3 * weight.numel() + teacher_weight.numel())


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * weight.numel()


def _weight_gradient(dy: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * dy.numel() * x.shape[1]


def _elementwise(*_: Any, **__: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("rms_norm", "rms_norm_backward"), _elementwise),
    **dict.fromkeys(("add_rms_norm", "add_rms_norm_backward"), _elementwise),
    **dict.fromkeys(("swiglu", "swiglu_backward", "rope", "rope_backward"), _elementwise),
    "attention": _attention,
    "attention_backward": _attention_backward,
    "decode_attention": _decode_attention,
    "token_logprob": _token_logprob,
    "token_logprob_backward": _token_logprob_backward,
    "token_logprob_stashed": _token_logprob,
    "token_logprob_stashed_backward": _token_logprob_stashed_backward,
    "divergence": _divergence,
    "divergence_backward": _divergence_backward,
    **dict.fromkeys((FEW_ROWS, BLOCKED), _linear),
    GRADIENT: _weight_gradient,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.llama2rt, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _OnImport(MetaPathFinder):
    """Finds nothing itself; lets the counter's module be loaded as ever, then registers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Give the counter our formulas: now if it is imported already, else as soon as it is."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
