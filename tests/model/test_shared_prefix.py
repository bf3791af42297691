"""Documents that share tokens give what whole ones give: values, log-probabilities, gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llama2rt.data.packing import Example, pack
from llama2rt.data.shared import pack_shared
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.model.shared_prefix import SharedPrefixAttention
from llama2rt.train.metrics import training_flops

SHAPES = [(4, 4), (4, 2), (4, 1)]


def groups(seed: int, count: int = 12) -> list[Example]:
    """Prompts of 1 to 30 tokens, each with 1 to 6 answers of 1 to 12."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        prompt = rng.integers(0, 97, rng.integers(1, 31))
        for _ in range(rng.integers(1, 7)):
            answer = rng.integers(0, 97, rng.integers(1, 13))
            tokens = np.concatenate([prompt, answer])
            examples.append(Example.of(tokens, np.arange(len(tokens)) >= len(prompt)))
    return examples


def config(heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(32, 2, heads, kv_heads, 64, vocab_size=97, context=64)


def logprobs(model, batch):
    found, entropy = model(
        batch.tokens,
        batch.positions,
        batch.cu_seqlens,
        batch.targets,
        keys=batch.keys,
        entropy=True,
    )
    return torch.stack([found, entropy])[:, batch.targets >= 0]


def ends(model, batch):
    values = model(batch.tokens, batch.positions, batch.cu_seqlens, keys=batch.keys)
    return values[batch.cu_seqlens[1:].long() - 1]


@pytest.mark.parametrize("heads, kv_heads", SHAPES)
@pytest.mark.parametrize("kind, read", [(Llama, logprobs), (ScalarModel, ends)])
def test_values_and_gradients_are_those_of_whole_documents(heads, kv_heads, kind, read):
    examples = groups(seed=heads + kv_heads)
    shared, whole = pack_shared(examples), pack(examples)
    assert len(shared.tokens) < 0.8 * len(whole.tokens)
    model = kind(config(heads, kv_heads)).initialize(1)
    with torch.no_grad():  # far from uniform attention, in which a wrong key would hide
        for block in model.transformer.blocks:
            block.query.weight.mul_(20)
            block.key.weight.mul_(20)
    found = []
    for batch in (shared, whole):
        model.zero_grad()
        values = read(model, batch)
        weights = torch.linspace(-1, 2, values.shape[-1])
        (values * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((values.detach(), gradients))
    (values, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, error)


def test_a_step_counts_what_it_computes():
    """Of a document of n tokens with p of them shared: n - p rows, n^2 - p^2 pairs of tokens."""
    examples = groups(seed=5)
    shared, whole = pack_shared(examples), pack(examples)
    model = Llama(config(4, 4))
    found, expected = (
        training_flops(model, replace(batch, tails=None)) for batch in (shared, whole)
    )
    saved = whole.cu_seqlens.diff() - shared.cu_seqlens.diff()
    blocks = sum(p.numel() for p in model.transformer.blocks.parameters() if p.ndim == 2)
    pairs = model.config.layers * model.config.dim * int(saved.long().square().sum())
    assert expected - found == 6 * (blocks * int(saved.sum()) + pairs)


def test_a_batch_gives_the_same_bits_every_time():
    examples = groups(seed=5)
    model = ScalarModel(config(4, 2)).initialize(1)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        ends(model, pack_shared(examples)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_shared_tokens_gradient_is_summed_in_fp32():
    """Of 600 answers to one prompt: a sum in bf16 would stop at 256 equal parts."""
    examples = [Example.of([1, 2, 3], [False, False, True])] * 600
    batch = pack_shared(examples)
    assert len(batch.tokens) == 3 + 2 * 599
    k = torch.zeros(len(batch.tokens), 1, 8, dtype=torch.bfloat16, requires_grad=True)
    gathered = SharedPrefixAttention(batch.cu_seqlens, batch.keys)._gather(k)
    gathered.sum().backward()
    assert k.grad[0].unique().tolist() == [600.0]
    assert k.grad[1:].unique().tolist() == [1.0]


def test_the_compiler_takes_shared_documents():
    batch = pack_shared(groups(seed=2, count=4))
    model = ScalarModel(config(4, 2)).initialize(1).eval()
    compiled = torch.compile(model.hidden, fullgraph=True, backend="aot_eager")
    arguments = batch.tokens, batch.positions, batch.cu_seqlens, batch.keys
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), model.hidden(*arguments))
