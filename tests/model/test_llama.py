"""The model against transformers on the same weights, and packing against one by one."""

import contextlib
import copy
import weakref
from unittest import mock

import pytest
import torch
from small_models import packed, transformers_twin
from torch import Tensor

from llama2rt import Llama, LlamaConfig, ops
from llama2rt.checkpoint.hf import hf_name
from llama2rt.model import ScalarModel, Transformer, last_token
from llama2rt.ops import backend
from llama2rt.train.recompute import recompute_blocks

CONFIG = LlamaConfig(64, 2, 4, 4, 96, vocab_size=150, context=64, rope_theta=500.0)


def unit_scale(model: Llama, seed: int = 0) -> Llama:
    """Random weights large enough that every layer matters and logits have about unit scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


def documents(*lengths: int, vocabulary: int = 150) -> list[Tensor]:
    return [torch.randint(0, vocabulary, (length,)) for length in lengths]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])  # heads, heads / 4, 1
def test_logits_and_every_gradient_equal_transformers(kv_heads, backend):
    config = LlamaConfig(64, 2, 8, kv_heads, 96, vocab_size=150, context=64, rope_theta=500.0)
    model = unit_scale(Llama(config))
    theirs = transformers_twin(model)
    (tokens,) = documents(40)
    targets = torch.randint(0, 150, (40,))
    targets[::5] = -1
    with ops.use(backend):
        batch = packed(tokens)
        logits = model.logits(*batch)
        expected = theirs(tokens[None]).logits[0]
        assert 0.5 < expected.std() < 2
        assert (logits - expected).abs().max() < 1e-4

        model(*batch, targets).sum().backward()
    loss = torch.nn.functional.cross_entropy(expected, targets, reduction="sum", ignore_index=-1)
    (-loss).backward()
    theirs_grad = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        expected_grad = theirs_grad[hf_name(name)]
        difference = (parameter.grad - expected_grad).abs().max()
        assert difference < 1e-4 * max(1.0, expected_grad.abs().max()), name


@pytest.mark.parametrize("tied", [False, True])
def test_packed_equals_one_by_one(tied):
    config = LlamaConfig(64, 2, 4, 2, 96, vocab_size=150, context=64, tied=tied)
    model = unit_scale(Llama(config))
    parts = documents(7, 1, 30, 31, 2)
    tokens, positions, cu = packed(*parts)
    cu = torch.cat((cu[:2], cu[1:]))  # and an empty document between the first two
    together = model.logits(tokens, positions, cu)
    alone = torch.cat([model.logits(*packed(part)) for part in parts])
    assert (together - alone).abs().max() < 1e-5

    targets = torch.randint(0, 150, tokens.shape)
    model(tokens, positions, cu, targets).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part, wanted in zip(parts, targets.split([len(p) for p in parts]), strict=True):
        model(*packed(part), wanted).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_forward_gives_logprob_and_entropy_of_the_logits():
    model = unit_scale(Llama(CONFIG))
    batch = packed(*documents(9, 5))
    targets = torch.randint(-1, 150, (14,))
    targets[3] = -1
    distribution = torch.distributions.Categorical(logits=model.logits(*batch) / 1.3)
    logprob, entropy = model(*batch, targets, temperature=1.3, entropy=True)
    predicted = targets >= 0
    expected = distribution.log_prob(targets.clamp_min(0)) * predicted
    torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy() * predicted, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(*batch, targets, temperature=1.3), logprob)
    nothing = model(*batch, torch.full((14,), -1))
    nothing.sum().backward()
    assert torch.equal(nothing, torch.zeros(14))
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_hidden_states_of_rows_without_a_target_are_freed():
    """Before the logits are made; in training too the norm in front does not hold its output."""
    model = unit_scale(Llama(CONFIG))
    batch, targets = packed(*documents(9, 5)), torch.randint(0, 150, (14,))
    targets[:9] = -1
    held, seen = [], []
    model.transformer.register_forward_hook(lambda module, inputs, x: held.append(weakref.ref(x)))
    run = backend.implementation

    def noted(op, *rest):
        if op.startswith("token_logprob") and not op.endswith("backward"):
            seen.append(held[-1]() is None)
        return run(op, *rest)

    with mock.patch.object(backend, "implementation", noted):
        model(*batch, targets)
        with torch.no_grad():
            model(*batch, targets, entropy=True)
    assert seen == [True, True]


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_compiled_one_by_one(recomputed):
    """In the order of parallel training: recomputation around what is compiled."""
    torch._dynamo.reset()
    model = unit_scale(Llama(CONFIG))
    plain = copy.deepcopy(model)
    for block in model.transformer.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for lengths in ((5, 9), (3, 8)):
        batch, targets = packed(*documents(*lengths)), torch.randint(0, 150, (sum(lengths),))
        with recompute_blocks(model) if recomputed else contextlib.nullcontext():
            model(*batch, targets).sum().backward()
        plain(*batch, targets).sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    model = unit_scale(Llama(CONFIG))  # never run before: compile also builds the rotary tables
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ((5, 9), (3, 8)):
        batch = packed(*documents(*lengths))
        targets = torch.randint(-1, 150, batch[0].shape)
        torch.testing.assert_close(
            compiled(*batch, targets), copy.deepcopy(model)(*batch, targets), rtol=1e-5, atol=1e-5
        )


def test_activation_checkpointing_gives_the_same_gradients():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = unit_scale(Llama(CONFIG))
    wrapped = copy.deepcopy(plain)
    for i, block in enumerate(wrapped.transformer.blocks):
        wrapped.transformer.blocks[i] = checkpoint_wrapper(block, context_fn=ops.checkpoint_context)
    batch, targets = packed(*documents(11, 6)), torch.randint(0, 150, (17,))
    for model in (plain, wrapped):
        model(*batch, targets).sum().backward()
    for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_sampling_first_does_not_spoil_training():
    model = unit_scale(Llama(CONFIG))
    batch = packed(*documents(8, 3))
    with torch.inference_mode():
        before = model.logits(*batch)
    after = model.logits(*batch)
    after.sum().backward()
    assert torch.equal(before, after)


def test_a_block_asks_its_attention_for_all_of_it():
    model = unit_scale(Llama(CONFIG))
    tokens, positions, cu = packed(*documents(6, 4))
    seen = []

    class Recorded:
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append((layer, q.shape, k.shape, v.shape))
            return ops.attention(q, k, v, cu)

    recorded = model.transformer(tokens, positions, Recorded())
    assert torch.equal(recorded, model.hidden(tokens, positions, cu))
    assert [s[0] for s in seen] == [0, 1] and seen[0][1:] == ((10, 4, 16),) * 3


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_belongs_to_a_module_with_a_name(tied):
    """What a parallelism plan names; a part that is not a module of its own cannot be sharded."""
    config = LlamaConfig(64, 2, 4, 2, 96, vocab_size=150, tied=tied)
    layers = ["query", "key", "value", "attention_output", "attention_norm"]
    layers += ["gate", "up", "down", "ffn_norm"]
    names = {f"transformer.blocks.{i}.{layer}" for i in range(2) for layer in layers}
    names |= {"transformer.embedding", "transformer.norm"}
    for model, head in ((Llama(config), "output"), (ScalarModel(config), "head")):
        owners = {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}
        assert owners.keys() == names | {head}
        assert all([n for n, _ in m.named_parameters()] == ["weight"] for m in owners.values())


def test_building_draws_from_torchs_generator_for_the_layers_alone():
    """The output's weights, the largest, are drawn once, by `initialize`."""
    torch.manual_seed(0)
    Llama(CONFIG)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    Transformer(CONFIG)
    assert torch.equal(after, torch.get_rng_state())


def test_initialize():
    one, two = (Llama(CONFIG).initialize(5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.output.weight, Llama(CONFIG).initialize(6).output.weight)
    block = one.transformer.blocks[0]
    assert block.gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.down.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)  # sqrt(2 * 2 layers)
    assert block.attention_output.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(one.transformer.norm.weight, torch.ones(64))
    assert sum(p.numel() for p in one.parameters()) == CONFIG.parameters
    tied = Llama(LlamaConfig(64, 1, 4, 2, 96, vocab_size=150, tied=True)).initialize(0)
    assert tied.output.weight is tied.transformer.embedding.weight
    assert sum(p.numel() for p in tied.parameters()) == tied.config.parameters


def test_positions_beyond_the_context_are_an_error():
    model = unit_scale(Llama(CONFIG))
    with pytest.raises(ValueError, match="positions: "):
        model.hidden(torch.zeros(1, dtype=torch.int64), torch.tensor([64]), torch.tensor([0, 1]))


def test_scalar_model_equals_sequence_classification():
    model = ScalarModel.from_llama(unit_scale(Llama(CONFIG)), seed=3)
    assert not any("output" in name.split(".") for name, _ in model.named_parameters())
    theirs = transformers_twin(model)
    theirs.config.pad_token_id = None
    parts = documents(12, 5, 1)
    batch = packed(*parts)
    values = model(*batch)
    scores = last_token(values, batch[2])
    assert values.dtype == torch.float32 and values.shape == (18,)
    expected = torch.stack([theirs(part[None]).logits[0, 0] for part in parts])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)

    scores.sum().backward()
    expected.sum().backward()
    theirs_grad = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_grad[hf_name(name)], rtol=1e-3, atol=1e-4)


def test_scalar_model_starts_from_a_copy():
    llama = unit_scale(Llama(CONFIG))
    model = ScalarModel.from_llama(llama, seed=3)
    assert torch.equal(model.transformer.embedding.weight, llama.transformer.embedding.weight)
    with torch.no_grad():
        model.transformer.embedding.weight.zero_()
    assert llama.transformer.embedding.weight.any()
    values = model(*packed(*documents(20)))
    assert values.abs().max() < 5  # unit scale at most: rewards start small
    again = ScalarModel.from_llama(llama, seed=3)
    assert torch.equal(again.head.weight, model.head.weight)


def test_scores_of_a_bf16_model_are_fp32():
    model = ScalarModel(CONFIG, dtype=torch.bfloat16).initialize(0)
    values = model(*packed(*documents(40)))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())  # and not rounded on the way


def test_last_token_refuses_empty_documents():
    with pytest.raises(ValueError, match="cu_seqlens: expected documents with at least one token"):
        last_token(torch.ones(3), torch.tensor([0, 2, 2, 3]))


def test_bf16_runs_in_bf16():
    model = unit_scale(Llama(CONFIG, dtype=torch.bfloat16))
    exact = Llama(CONFIG)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    batch = packed(*documents(30, 20))
    assert model.hidden(*batch).dtype == torch.bfloat16
    targets = torch.randint(0, 150, (50,))
    logprob = model(*batch, targets)
    assert logprob.dtype == torch.float32
    assert (logprob - exact(*batch, targets)).abs().mean() < 0.03
