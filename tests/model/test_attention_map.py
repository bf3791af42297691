"""The numbers of Figure 9 against attention weights written out; memory stays bounded."""

import pytest
import torch
from small_models import far_from_flat

from llama2rt.model import attention_map as module
from llama2rt.model.attention_map import attention_map
from llama2rt.model.transformer import PackedAttention

TOKENS = torch.randint(1, 400, (37,), generator=torch.Generator().manual_seed(1)).tolist()


class _Written:
    """Attention weights of every layer, [layers, heads, T, T]."""

    def __init__(self):
        self.weights = []
        self.own = PackedAttention(torch.tensor([0, len(TOKENS)], dtype=torch.int32))

    def attend(self, layer, q, k, v):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5
        mask = torch.ones(len(TOKENS), len(TOKENS)).triu(1).bool()
        self.weights.append(scores.masked_fill(mask, -torch.inf).softmax(-1))
        return self.own.attend(layer, q, k, v)


@pytest.mark.parametrize("rows", [1, 5, 37])
def test_largest_weights(monkeypatch, rows):
    """Whatever number of rows is computed at once."""
    model = far_from_flat(kv_heads=2)
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", rows * 4 * len(TOKENS))
    written = _Written()
    with torch.no_grad():
        model.transformer(torch.tensor(TOKENS), torch.arange(len(TOKENS)).int(), written)
    largest = torch.stack(written.weights).amax((0, 1))
    found = attention_map(model, TOKENS, slice(3, 6), bins=8)
    torch.testing.assert_close(found.to_span, largest[:, 3:6].amax(-1), atol=1e-5, rtol=1e-5)
    of = [i * 8 // len(TOKENS) for i in range(len(TOKENS))]
    expected = torch.zeros(8, 8)
    for i, row in enumerate(of):
        for j, column in enumerate(of):
            expected[row, column] = max(expected[row, column], largest[i, j])
    torch.testing.assert_close(found.bins, expected, atol=1e-5, rtol=1e-5)
    assert attention_map(model, TOKENS, slice(0, 1)).bins.shape == (37, 37)
    assert (found.to_span[:3] == 0).all()
