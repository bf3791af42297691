"""Activation checkpointing: compute a block's activations again in the backward pass.

"full" keeps a block's inputs alone, for a third more arithmetic. "selective" keeps what is dear as
well, the results of matrix products and of attention, and computes norms, rotations and SwiGLU
again (Korthikanti et al. 2022, section 5, who single out attention's insides; the op has none).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llama2rt import ops
from llama2rt.model.transformer import Block

Recompute = Literal["none", "selective", "full"]


@contextlib.contextmanager
def recompute_blocks(model: nn.Module, recompute: Recompute = "full") -> Iterator[None]:
    """Inside, the blocks of the model's `transformer` compute their activations again."""
    transformer: Any = model.transformer
    before = transformer.run_block
    if recompute != "none":
        transformer.run_block = {"full": run_recomputed, "selective": run_selective}[recompute]
    try:
        yield
    finally:
        transformer.run_block = before


def run_recomputed(block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The `BlockRunner` that keeps a block's inputs alone."""
    return _run(block, inputs, ops.checkpoint_context)


def run_selective(block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The `BlockRunner` that keeps a block's inputs, matrix products and attention."""
    return _run(block, inputs, _selective)


def _run(block: Block, inputs: tuple, contexts: Callable[[], tuple]) -> tuple[Tensor, Tensor]:
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        # No op is random: only an adapter's dropout has to be drawn a second time.
        preserve_rng_state=any(isinstance(module, nn.Dropout) for module in block.modules()),
        context_fn=contexts,
    )


def _selective() -> tuple:
    """Contexts of the forward pass and of the recomputation: in the second the operations below
    return what they returned in the first."""
    own = torch.ops.llama2rt
    dear = [torch.ops.aten.mm.default, own.blocked_linear.default, own.attention.default]
    keep, give_back = create_selective_checkpoint_contexts(dear)
    first, again = ops.checkpoint_context()
    return _both(first, keep), _both(again, give_back)


@contextlib.contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield
