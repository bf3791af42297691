"""What selective recomputation keeps, where products are our own kernel's."""

import pytest
import torch

from llama2rt import ops
from llama2rt.model import Llama, LlamaConfig
from llama2rt.ops import linear
from llama2rt.train.recompute import recompute_blocks


@pytest.mark.skipif("cpu" not in ops.backends("cpu")["swiglu"]["native"], reason="_cpu not built")
def test_selective_computes_no_product_of_many_rows_again(monkeypatch):
    monkeypatch.setattr(linear, "_own_blocked", lambda: True)
    monkeypatch.setitem(linear._BY_ONEDNN, torch.bfloat16, True)
    native, rows = linear._native(), linear.MANY_ROWS
    kernel, calls = native.blocked_linear, []
    monkeypatch.setattr(native, "blocked_linear", lambda *xs: calls.append(1) or kernel(*xs))
    config = LlamaConfig(
        dim=32, layers=2, heads=2, kv_heads=2, ffn_hidden=48, vocab_size=50, context=rows
    )
    model = Llama(config, dtype=torch.bfloat16).initialize(0)
    tokens = torch.randint(3, 50, (rows,))
    packed = tokens, torch.arange(rows), torch.tensor([0, rows], dtype=torch.int32)
    found, gradients = {}, []
    for how in ("none", "selective", "full"):
        calls.clear()
        model.zero_grad()
        with recompute_blocks(model, how):
            model(*packed, tokens.roll(-1)).sum().backward()
        found[how] = len(calls)
        gradients.append(model.transformer.blocks[0].query.weight.grad)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
    products = 7 * config.layers
    assert found == {"none": 2 * products, "selective": 2 * products, "full": 3 * products}
