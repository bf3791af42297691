"""Bytes a rank by component: against what autograd keeps, against sums made by hand, and ordered as
sharding promises."""

from dataclasses import replace

import pytest
import torch

from llama2rt.data.packing import Example, pack
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.planning import Model, Sampling, inference, memory
from llama2rt.planning.memory import Setting
from llama2rt.train.lora import LoraOptions
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions

# kv_heads below heads, ffn_hidden no multiple of dim: a mix-up of two of them shows.
CONFIG = LlamaConfig(dim=32, layers=3, heads=4, kv_heads=2, ffn_hidden=88, vocab_size=300)
ONE = {"pipeline": 1, "data": 1, "shard": 1, "context": 1, "tensor": 1}


def setting(tokens: int = 48, count: int = 1, **changes) -> Setting:
    degrees = ONE | {name: changes.pop(name) for name in list(changes) if name in ONE}
    return replace(Setting(degrees, 4, tokens, count, cuda=False), **changes)


def saved_bytes(
    config: LlamaConfig,
    tokens: int,
    lora: LoraOptions | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Distinct memory that the graph of a forward pass keeps, weights left out."""
    model = Llama(config).initialize(0).to(dtype)
    if lora is not None:
        lora.adapt(model, 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = pack([Example.of(list(range(tokens // 2)))] * 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held, so that no memory is given to two tensors one after the other.
        hidden = model.hidden(batch.tokens, batch.positions, batch.cu_seqlens)
    assert hidden.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [["query", "value"], None])
def test_a_block_under_lora_keeps_what_autograd_keeps(dtype, targets):
    pytest.importorskip("peft")
    lora = LoraOptions(rank=3, **({"targets": targets} if targets else {}))
    more = replace(CONFIG, layers=CONFIG.layers + 1)
    kept = saved_bytes(more, 24, lora, dtype) - saved_bytes(CONFIG, 24, lora, dtype)
    how = setting(24, compute_bytes=dtype.itemsize)
    assert kept == memory.block_activations(Model("m", CONFIG, lora=lora), how)


@pytest.mark.parametrize("tokens", [24, 64])
def test_a_block_keeps_what_autograd_keeps(tokens):
    """One block more keeps exactly `block_activations` more."""
    more = replace(CONFIG, layers=CONFIG.layers + 1)
    kept = saved_bytes(more, tokens) - saved_bytes(CONFIG, tokens)
    assert kept == memory.block_activations(Model("m", CONFIG), setting(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_the_models_own(tied):
    config = replace(CONFIG, tied=tied)
    with torch.device("meta"):
        models = {False: Llama(config), True: ScalarModel(config)}
    for scalar, model in models.items():
        own = sum(p.numel() for p in model.parameters())
        assert memory.parts(Model("m", config, scalar)).total == own
        assert Model("m", config, scalar).parameters == own


def test_hand_computed():
    """A step of one micro-batch, fp32, one process; 2 layers so that gradients decide."""
    config = LlamaConfig(dim=8, layers=2, heads=2, kv_heads=1, ffn_hidden=16, vocab_size=50)
    # query, output 64 each; key, value 32 each; gate, up, down 128 each; two norms.
    block = 2 * 64 + 2 * 32 + 3 * 128 + 2 * 8
    weights = 2 * block + 2 * 400 + 8
    assert config.parameters == weights
    found = memory.training(Model("m", config), setting(tokens=10))
    assert found["weights"] == found["gradients"] == 4 * weights
    assert found["moments"] == 8 * weights and found["masters"] == 0
    # Per token, one block: two sums, two norms' results, q, the attention's result: 6 x 8; k and v:
    # 2 x 4; gate, up, their product: 3 x 16. In fp32: two 1/rms, one log-sum-exp a head. Backward:
    # gradients of gate and up, and two of the stream.
    kept = 4 * (6 * 8 + 2 * 4 + 3 * 16) + 4 * (2 + 2)
    assert found["activations"] == 10 * (kept + 4 * (2 * 16 + 2 * 8))


def test_bf16_keeps_masters_and_its_sums_grow_with_the_second_micro_batch():
    model = Model("m", CONFIG)
    own = model.parameters
    one, two, three = (
        memory.training(model, setting(8, count, compute_bytes=2)) for count in (1, 2, 3)
    )
    assert (one["weights"], one["masters"], one["moments"]) == (2 * own, 4 * own, 8 * own)
    assert (one["gradients"], two["gradients"], three["gradients"]) == (2 * own, 4 * own, 6 * own)
    # FSDP's shards are the masters, and it reduces in fp32.
    half = memory.training(model, setting(8, 1, compute_bytes=2, shard=2))
    assert (half["weights"], half["masters"], half["gradients"]) == (0, 2 * own, 2 * own)


def total(**changes) -> float:
    return sum(memory.training(Model("m", CONFIG), setting(512, 2, **changes)).values())


@pytest.mark.parametrize("dimension", ["shard", "tensor", "context", "pipeline"])
def test_more_ranks_take_less_each(dimension):
    config = replace(CONFIG, layers=8, heads=8, kv_heads=8, dim=64, ffn_hidden=256)

    def bytes_of(ranks: int) -> float:
        other = {"data": 2, dimension: ranks}  # FSDP in all of them
        found = memory.training(Model("m", config), setting(4096, 2, **other))
        return sum(found.values())

    sizes = [bytes_of(ranks) for ranks in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_replicas_take_nothing_off_and_recomputation_does():
    assert total(data=2) == total(data=4)
    assert total(recompute="full") < total(recompute="selective") < total()


def test_sampling_takes_half_of_what_is_free_and_at_least_one_sequence():
    config = LlamaConfig.preset("llama2-7b")
    policy = Model("policy", config, lent=True)
    drawn = Sampling(policy, None, at_once=256, prompt=3072, longest=4096, most=1024)
    how = setting(0, 0, compute_bytes=2, shard=4)
    # K and V of 32 layers, 4096 values each, 2 bytes: 2 GiB a sequence of 4096 tokens.
    assert inference.kv_cache_bytes(config, 2, 4096) == 2 * 32 * 4096 * 2 * 4096 == 2**31
    whole = 2 * config.parameters
    free = whole + 64 * 2**30
    found = inference.rollout(drawn, how, free)
    assert found["gathered"] == whole
    assert found["kv_cache"] + found["activations"] == 32 * 2**30
    assert inference.rollout(drawn, how, 0)["kv_cache"] == 2**31
    bounded = replace(drawn, cache_bytes=3 * 2**30)
    found = inference.rollout(bounded, how, free)
    assert found["kv_cache"] + found["activations"] <= 3 * 2**30
    assert inference.rollout(drawn, replace(how, degrees=ONE), free)["gathered"] == 0
    # A group of tensor ranks shares matrices and heads, and holds norms whole.
    cut = replace(how, degrees=ONE | {"tensor": 4})
    norms = 2 * (2 * config.layers + 1) * config.dim
    found = inference.rollout(drawn, cut, free)
    assert found["gathered"] == (whole - norms) / 4 + norms
    assert inference.rollout(drawn, cut, 0)["kv_cache"] == 2**29
    replicas = replace(how, degrees=ONE | {"data": 4})  # FSDP's too
    assert inference.rollout(drawn, replicas, free)["gathered"] == whole
    loaded = replace(drawn, policy=Model("policy", config))  # by every rank, whole
    found = inference.rollout(loaded, how, free)
    assert found["weights"] == whole and "gathered" not in found
    assert found["kv_cache"] + found["activations"] == 32 * 2**30


def test_what_an_adapter_leaves_alone_stays_in_the_compute_dtype():
    """Also in FSDP's shards (parallel/parallelize.py)."""
    lora = LoraOptions(rank=3)
    found = memory.states(Model("m", CONFIG, lora=lora), setting(compute_bytes=2, shard=2))
    assert found["weights"] == 2 * CONFIG.parameters / 2
    assert found["masters"] == 4 * Model("m", CONFIG, lora=lora).trainable / 2


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kept, precision", [("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "fp32")])
def test_under_an_adapter_states_are_what_the_optimizer_holds(scalar, kept, precision):
    pytest.importorskip("peft", reason="peft (the extra lora) is not installed")
    lora = LoraOptions(rank=3, targets=["query", "key", "down"])
    options = TrainOptions(precision=precision, moments=kept)
    model = (ScalarModel if scalar else Llama)(CONFIG, dtype=options.dtype).initialize(0)
    lora.adapt(model, seed=0)
    state = Optimizer(model, options).state_dict()
    planned = memory.states(
        Model("m", CONFIG, scalar, lora),
        setting(compute_bytes=options.dtype.itemsize, moment_bytes=2 if kept == "bf16" else 4),
    )
    weights = sum(p.nbytes for p in model.parameters())
    assert planned["weights"] == pytest.approx(weights)
    held = {
        name: sum(t.nbytes for n, t in state.items() if n.startswith(name))
        for name in ("master.", "exp_avg")
    }
    assert planned["moments"] == pytest.approx(held["exp_avg"])
    assert planned["masters"] == pytest.approx(held["master."] if precision == "bf16" else 0.0)
    away = memory.states(Model("m", CONFIG, scalar, lora), setting(optimizer_away=True))
    assert away["moments"] == away["masters"] == 0
