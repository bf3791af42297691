"""Leaving out of the last block what nobody reads changes nothing: values, log-probabilities,
distances and gradients of every weight."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llama2rt.data.packing import UNREAD, Example, at_ends, pack, tails
from llama2rt.data.shared import pack_shared
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.model.heads import last_token
from llama2rt.model.tails import Tails
from llama2rt.train.metrics import training_flops
from llama2rt.train.recompute import recompute_blocks


def examples(seed: int = 0) -> list[Example]:
    """Prompts of 3 to 30 tokens with 1 to 4 answers of 1 to 12; one is in two pieces."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(9):
        prompt = rng.integers(0, 97, rng.integers(3, 31))
        for _ in range(rng.integers(1, 5)):
            tokens = np.concatenate([prompt, rng.integers(0, 97, rng.integers(1, 13))])
            found.append(Example.of(tokens, np.arange(len(tokens)) >= len(prompt)))
    found[0].trainable[2] = True
    return found


def model(kind, layers: int = 2):
    config = LlamaConfig(32, layers, 4, 2, 64, vocab_size=97, context=64)
    built = kind(config).initialize(1)
    with torch.no_grad():  # far from uniform attention, in which a wrong key would hide
        for block in built.transformer.blocks:
            block.query.weight.mul_(20)
            block.key.weight.mul_(20)
    return built


def logprobs(built, batch):
    layout = batch.tokens, batch.positions, batch.cu_seqlens, batch.targets
    more = {"keys": batch.keys, "tails": batch.tails, "temperature": 0.7, "entropy": True}
    return torch.stack(built(*layout, **more))


def apart(built, batch):
    layout = batch.tokens, batch.positions, batch.cu_seqlens
    teacher = model(Llama, layers=1).requires_grad_(False)
    distributions = teacher.hidden(*layout, batch.keys), teacher.output.weight
    more = {"keys": batch.keys, "tails": batch.tails, "teacher": distributions, "beta": 0.5}
    return built(*layout, batch.targets, **more)


def values(built, batch):
    layout = batch.tokens, batch.positions, batch.cu_seqlens
    found = built(*layout, keys=batch.keys, tails=batch.tails)
    return found.masked_fill(batch.targets < 0, 0)


def scores(built, batch):
    layout = batch.tokens, batch.positions, batch.cu_seqlens
    ends = batch.tails and Tails.of_last_tokens(batch.cu_seqlens)
    return last_token(built(*layout, keys=batch.keys, tails=ends), batch.cu_seqlens)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [pack, pack_shared])
@pytest.mark.parametrize(
    "kind, read", [(Llama, logprobs), (Llama, apart), (ScalarModel, values), (ScalarModel, scores)]
)
def test_nothing_changes_but_the_work(kind, read, packed, recompute):
    batch = packed(examples())
    assert batch.tails is not None and (batch.keys is None) == (packed is pack)
    built = model(kind)
    found, products = [], []
    for one in (batch, replace(batch, tails=None)):
        built.zero_grad()
        with recompute_blocks(built, recompute), FlopCounterMode(display=False) as counter:
            result = read(built, one)
            (result * torch.linspace(-1, 2, result.shape[-1])).sum().backward()
        gradients = {name: p.grad.clone() for name, p in built.named_parameters()}
        found.append((result.detach(), gradients))
        products.append(counter.get_total_flops())
    (result, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, error)
    assert products[0] < 0.9 * products[1]


@given(st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=6))
def test_tails_begin_at_the_first_target(documents):
    """Also of empty documents, and of those without a target, which have none."""
    predicting = np.array([wanted for d in documents for wanted in d], np.bool_)
    cu_seqlens = np.cumsum([0, *map(len, documents)]).astype(np.int32)
    rows = [
        [begin + i for i in range(len(d)) if any(d[: i + 1])]
        for begin, d in zip(cu_seqlens.tolist(), documents, strict=False)
    ]
    count = sum(map(len, rows))
    found = tails(predicting, cu_seqlens)
    if count == 0 or len(predicting) - count < UNREAD * len(predicting):
        assert found is None
        return
    assert found.rows.tolist() == [row for d in rows for row in d]
    assert found.cu_seqlens.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert (found.rows.dtype, found.cu_seqlens.dtype) == (torch.int64, torch.int32)


def test_one_layer_in_bf16_beside_an_empty_document():
    batch = pack([*examples()[:6], Example.of([], [])])
    built = model(Llama, layers=1).to(torch.bfloat16)
    found = logprobs(built, batch), logprobs(built, replace(batch, tails=None))
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
    whole = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logprobs(whole, batch), found[0], rtol=0.02, atol=0.02)


def test_documents_without_a_target_are_read_nowhere():
    batch = pack(
        [Example.of([5, 6, 7], [False] * 3), Example.of(range(9), [False] * 5 + [True] * 4)]
    )
    assert batch.tails.cu_seqlens.tolist() == [0, 0, 5]
    built = model(Llama)
    layout = batch.tokens, batch.positions, batch.cu_seqlens, batch.targets
    torch.testing.assert_close(built(*layout, tails=batch.tails), built(*layout))


def test_an_empty_document_has_no_last_token():
    with pytest.raises(ValueError, match="empty one"):
        Tails.of_last_tokens(torch.tensor([0, 3, 3], dtype=torch.int32))


@pytest.mark.parametrize("kind, read", [(Llama, logprobs), (ScalarModel, scores)])
def test_a_step_counts_the_products_it_computes(kind, read):
    """As torch counts them, but for attention, which is no product of torch's."""
    batch = pack_shared(examples())
    if kind is ScalarModel:
        batch = at_ends(pack_shared)(examples())
    built, found, products = model(kind), [], []
    for one in (batch, replace(batch, tails=None)):
        with FlopCounterMode(display=False) as counter:
            read(built, one).sum().backward()
        by_op = counter.get_flop_counts()["Global"]
        products.append(sum(n for op, n in by_op.items() if "attention" not in str(op)))
        own, seen = one.cu_seqlens.diff().long(), one.keys.cu_seqlens.diff().long()
        ending = own if one.tails is None else one.tails.cu_seqlens.diff().long()
        pairs = own * (2 * seen - own) + ending * (2 * seen - ending)
        found.append(training_flops(built, one) - 6 * 32 * int(pairs.sum()))
    assert products[1] - products[0] == found[1] - found[0] > 0


def test_tails_may_have_no_rows():
    batch, built = pack(examples()), model(Llama)
    none = Tails(torch.empty(0, dtype=torch.int64), torch.zeros_like(batch.cu_seqlens))
    layout = batch.tokens, batch.positions, batch.cu_seqlens
    found = built(*layout, torch.full_like(batch.targets, -1), tails=none)
    assert torch.equal(found, torch.zeros(len(batch.tokens)))
    found.sum().backward()
    assert not built.transformer.blocks[-1].query.weight.grad.any()
