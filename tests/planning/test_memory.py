"""Bytes a rank by component: against what autograd keeps, against sums made by hand, and ordered as
sharding promises."""

from dataclasses import replace

import pytest
import torch

from llama2rt.data.packing import Example, pack
from llama2rt.model import Llama, LlamaConfig
from llama2rt.planning import memory
from llama2rt.planning.memory import Setting
from llama2rt.train.recompute import recompute_blocks

# kv_heads below heads, ffn_hidden no multiple of dim: a mix-up of two of them shows.
CONFIG = LlamaConfig(dim=32, layers=3, heads=4, kv_heads=2, ffn_hidden=88, vocab_size=300)
ONE = {"pipeline": 1, "data": 1, "shard": 1, "context": 1, "tensor": 1}


def setting(tokens: int = 48, count: int = 1, **changes) -> Setting:
    degrees = ONE | {name: changes.pop(name) for name in list(changes) if name in ONE}
    return replace(Setting(degrees, 4, tokens, count, cuda=False), **changes)


def saved_bytes(config: LlamaConfig, tokens: int, recompute: bool) -> int:
    """Distinct memory that the graph of a forward pass keeps, weights left out."""
    model = Llama(config).initialize(0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = pack([Example.of(list(range(tokens // 2)))] * 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if recompute:
            with recompute_blocks(model):
                model.hidden(batch.tokens, batch.positions, batch.cu_seqlens)
        else:
            out = model.hidden(batch.tokens, batch.positions, batch.cu_seqlens)
            del out
    return sum(found.values())


@pytest.mark.parametrize("tokens", [24, 64])
def test_a_block_keeps_what_autograd_keeps(tokens):
    """One block more keeps exactly `block_activations` more."""
    more = replace(CONFIG, layers=CONFIG.layers + 1)
    kept = saved_bytes(more, tokens, False) - saved_bytes(CONFIG, tokens, False)
    assert kept == memory.block_activations(CONFIG, setting(tokens))
