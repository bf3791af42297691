"""A patched Llama of transformers against the same one as transformers made it. Its loss has a file
of its own."""

import copy
import json

import pytest
import torch
from numerics import judge, same_bits
from patched_llama import (
    CACHE,
    KINDS,
    LAYERS,
    LENGTH,
    ROWS,
    VOCABULARY,
    a_config,
    a_model,
    answers,
    batch,
    both,
    gradients,
    near,
    patch_transformers,
    transformers,
)
from processes import run_python
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llama2rt import ops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_logits_loss_and_every_gradient_equal_transformers(kind, kv_heads, calls):
    ours, theirs = both(num_key_value_heads=kv_heads)
    inputs, counted = batch(kind)
    expected = theirs(**inputs).logits
    assert 0.5 < expected.std() < 2
    assert near(ours(**inputs).logits[counted], expected[counted])

    inputs["labels"] = answers(inputs, counted)
    result = ours.train()(**inputs)
    assert result.logits is None and near(result.loss, theirs.train()(**inputs).loss)
    wanted = gradients(theirs, **inputs)
    for name, gradient in gradients(ours, **inputs).items():
        assert near(gradient, wanted[name]), name
    assert calls == {
        "rms_norm": 3 * (2 * LAYERS + 1),
        "swiglu": 3 * LAYERS,
        "rope": 3 * LAYERS,
        "attention": 3 * LAYERS,
        "token_logprob": 2,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}},
    ],
    ids=["biases", "tied", "linear", "yarn"],
)
def test_shapes_and_rotary_embeddings_of_other_llamas(settings):
    ours, theirs = both(**settings)
    inputs, _ = batch("plain")
    inputs["labels"] = inputs["input_ids"]
    assert near(ours(**inputs).logits, theirs(**inputs).logits)
    wanted = gradients(theirs, **inputs)
    for name, gradient in gradients(ours, **inputs).items():
        assert near(gradient, wanted[name]), name


@pytest.mark.parametrize("kind", ["plain", "left"])
def test_bf16_keeps_the_numerics_rule(kind):
    exact = a_model().bfloat16().float()
    theirs = copy.deepcopy(exact).bfloat16()
    ours = patch_transformers(copy.deepcopy(theirs))
    inputs, counted = batch(kind)
    logits = [model(**inputs).logits[counted] for model in (ours, exact, theirs)]
    judge("logits", logits[0], logits[1].double(), logits[2])
    inputs["labels"] = answers(inputs, counted)
    found = [gradients(model, **inputs) for model in (ours, exact, theirs)]
    for name in found[0]:
        judge(name, found[0][name], found[1][name].double(), found[2][name], gradient=True)


def test_autocast_keeps_the_numerics_rule(monkeypatch):
    seen = []
    inner = ops.token_logprob
    monkeypatch.setattr(
        ops, "token_logprob", lambda *args: seen.append([x.dtype for x in args]) or inner(*args)
    )
    ours, theirs = both()
    inputs, counted = batch("right")
    inputs["labels"] = answers(inputs, counted)
    exact = gradients(copy.deepcopy(theirs), **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = [gradients(model, **inputs) for model in (ours, theirs)]
    for name in exact:
        judge(name, found[0][name], exact[name].double(), found[1][name], gradient=True)
    assert seen == [[torch.bfloat16, torch.bfloat16, torch.int64]]


SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("kind", ["plain", "left"])
def test_generate(kind, search):
    ours, theirs = both()
    inputs, _ = batch(kind)
    wanted, found = (
        model.generate(
            **inputs,
            **search,
            max_new_tokens=12,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for model in (theirs, ours)
    )
    assert found.sequences.shape == (ROWS, LENGTH + 12)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(near(a, b) for a, b in zip(found.scores, wanted.scores, strict=True))


def test_the_prompt_of_generate_runs_on_our_attention_and_its_steps_do_not(calls):
    ours, _ = both()
    inputs, _ = batch("left")
    ours.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert calls["attention"] == LAYERS
    assert calls["rms_norm"] == 5 * (2 * LAYERS + 1)


@pytest.mark.parametrize("search", ["lookup", "assistant"])
def test_assisted_generation(search):
    """Several queries against a cache, of which those that were guessed wrong are taken back."""
    ours, theirs = both()
    ids = torch.randint(0, VOCABULARY, (1, LENGTH)).repeat(1, 2)
    helper = {"prompt_lookup_num_tokens": 3}
    if search == "assistant":
        helper = {"assistant_model": patch_transformers(a_model())}
    for assistance in ({}, helper):
        wanted, found = (
            model.generate(ids, **assistance, max_new_tokens=12, do_sample=False)
            for model in (theirs, ours)
        )
        assert torch.equal(found, wanted)


def test_a_cache_of_an_earlier_call_is_gone_on_with(calls):
    """A second turn of a chat: its cache by the name of this release, and by place."""
    ours, theirs = both()
    inputs, _ = batch("plain")
    turn = torch.randint(0, VOCABULARY, (ROWS, 5))
    found = []
    for model in (ours, theirs):
        kept = [getattr(model(**inputs, use_cache=True), CACHE) for _ in range(2)]
        found.append(
            [model(turn, **{CACHE: kept[0]}).logits, model(turn, None, None, kept[1]).logits]
        )
    assert all(near(a, b) for a, b in zip(*found, strict=True))
    assert calls["attention"] == 2 * LAYERS


def test_sampling_draws_the_same():
    ours, theirs = both()
    inputs, _ = batch("left")
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(model.generate(**inputs, max_new_tokens=12, do_sample=True, top_p=0.9))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_is_honoured(dtype, calls):
    ours, theirs = both()
    inputs, _ = batch("plain")
    mask = torch.rand(ROWS, 1, LENGTH, LENGTH) < 0.5
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    if dtype == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    inputs["attention_mask"] = mask
    assert near(ours(**inputs).logits, theirs(**inputs).logits)
    assert calls["attention"] == 0


@pytest.mark.parametrize(
    "request_",
    [
        {"use_vmap": True, "attention_mask": None, "q_offset": 0},
        {
            "use_vmap": False,
            "attention_mask": torch.tensor([[False, True, True, True]]),
            "q_offset": 0,
        },
        {"use_vmap": False, "attention_mask": None, "q_offset": 2},
        {"use_vmap": False, "attention_mask": None, "q_offset": torch.tensor(2)},
    ],
    ids=["pattern", "packed-and-padded", "after-others", "static-cache"],
)
def test_a_mask_that_documents_cannot_express_is_transformers_own(request_):
    mask = transformers.AttentionMaskInterface()["llama2rt"](
        batch_size=1,
        q_length=4,
        kv_length=4,
        kv_offset=0,
        mask_function=lambda batch, head, query, key: (key <= query) & (key >= query - 1),
        config=a_config(),
        device="cpu",
        allow_is_causal_skip=False,
        **request_,
    )
    offset = int(request_["q_offset"])
    expected = torch.ones(4, 4).tril(offset).triu(offset - 1).bool()
    if request_["attention_mask"] is not None:
        expected &= request_["attention_mask"]
    assert torch.equal(mask, expected[None, None])


def test_a_mask_wider_than_the_batch_is_honoured(calls):
    ours, theirs = both()
    inputs, counted = batch("left")
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = torch.cat((mask, torch.zeros_like(mask)), dim=1)
    inputs["use_cache"] = True
    assert near(ours(**inputs).logits[counted], theirs(**inputs).logits[counted])
    assert calls["attention"] == 0


@pytest.mark.parametrize("where", ["config", "call"])
@pytest.mark.parametrize("kind", ["plain", "right", "packed"])
def test_attention_that_is_not_causal_is_honoured(kind, where, calls):
    ours, theirs = both()
    inputs, counted = batch(kind)
    causal = theirs(**inputs).logits
    if where == "call":
        inputs["is_causal"] = False
    for model in (ours, theirs) if where == "config" else ():
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    expected = theirs(**inputs).logits
    assert not near(causal, expected)
    assert near(ours(**inputs).logits[counted], expected[counted])
    assert calls["attention"] == 0


@pytest.mark.parametrize("kind", ["plain", "left"])
def test_compiled_it_gives_the_same(kind):
    """In one graph where there is no mask of padding. The compiler's own kernels are not tried."""
    ours, _ = both()
    inputs, counted = batch(kind)
    inputs["use_cache"] = False
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=kind == "plain")
    assert near(compiled(**inputs).logits[counted], ours(**inputs).logits[counted])

    inputs["labels"] = answers(inputs, counted)
    wanted = gradients(ours, **inputs)
    for name, gradient in gradients(compiled, **inputs).items():
        assert near(gradient, wanted[name.removeprefix("_orig_mod.")]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    ours, _ = both()
    inputs, counted = batch("left")
    inputs["labels"] = answers(inputs, counted)
    wanted = gradients(ours, **inputs)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert same_bits(list(gradients(ours, **inputs).values()), list(wanted.values()))


def test_saved_and_loaded_it_is_a_model_like_any_other(tmp_path):
    ours, theirs = both()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        one, other = (json.loads((tmp_path / x / name).read_text()) for x in ("ours", "theirs"))
        assert one == other
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(loaded) is transformers.LlamaForCausalLM
    inputs, _ = batch("plain")
    assert same_bits(patch_transformers(loaded)(**inputs).logits, ours(**inputs).logits)


def test_one_instance_is_patched_and_a_second_call_changes_nothing():
    config = a_config()
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    inputs, _ = batch("left")
    before = other(**inputs).logits
    classes = [type(module) for module in other.modules()]
    assert patch_transformers(one) is one
    patched = [type(module) for module in one.modules()]
    assert len(set(patched) - set(classes)) == 5  # norm, MLP, attention, embedding, the model
    assert [type(module) for module in other.modules()] == classes
    assert other.config._attn_implementation == config._attn_implementation == "sdpa"
    assert same_bits(other(**inputs).logits, before)

    logits = one(**inputs).logits
    assert patch_transformers(one) is one
    assert [type(module) for module in one.modules()] == patched
    assert same_bits(one(**inputs).logits, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_from_the_config_of_a_patched_one_works(kind, calls):
    ours, theirs = both()
    made = transformers.LlamaModel(ours.config).eval()
    made.load_state_dict(theirs.model.state_dict())
    inputs, counted = batch(kind)
    found, wanted = (model(**inputs).last_hidden_state for model in (made, theirs.model))
    assert near(found[counted], wanted[counted])
    assert calls["attention"] == LAYERS and calls["rms_norm"] == 0


def test_our_attention_is_refused_where_it_would_not_be_the_models():
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=None,
    )
    inputs, _ = batch("plain")
    for model in (
        transformers.MistralForCausalLM(config),
        transformers.LlamaForCausalLM(a_config(attention_dropout=0.1)),
    ):
        model.set_attn_implementation("llama2rt")
        with pytest.raises(ValueError, match="expected a Llama's without dropout, got"):
            model.train()(**inputs)


def of_layers(name, value):
    def change(model):
        for layer in model.model.layers:
            setattr(layer.self_attn, name, value)

    return change


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"position_bias": torch.zeros(1)}, lambda model: None, "^position_bias: expected None"),
        ({"softcap": 30.0}, lambda model: None, "^softcap: expected None"),
        ({"scaling": 0.5}, lambda model: None, r"^scaling: expected 0\.35"),
        ({}, of_layers("is_causal", False), "^is_causal of a layer: expected True, got False"),
        ({}, of_layers("attention_dropout", 0.1), "^attention_dropout: expected 0, got 0.1"),
    ],
    ids=["bias", "softcap", "scaling", "causal-layers", "dropout-later"],
)
def test_what_transformers_attention_would_heed_is_not_passed_over(settings, change, message):
    ours, _ = both()
    inputs, _ = batch("plain")
    change(ours.train())
    with pytest.raises(ValueError, match=message):
        ours(**inputs, **settings)


def replace_activation(mlp):
    mlp.act_fn = nn.GELU()


def change_activation(mlp):
    mlp.act_fn.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [replace_activation, change_activation])
def test_an_activation_of_the_callers_own_is_used(change, when, calls):
    theirs = a_model()
    ours = copy.deepcopy(theirs)
    if when == "after":
        patch_transformers(ours)
    for model in (ours, theirs):
        change(model.model.layers[1].mlp)
    inputs, _ = batch("plain")
    assert near(patch_transformers(ours)(**inputs).logits, theirs(**inputs).logits)
    assert calls["swiglu"] == LAYERS - 1


def test_attention_alone_goes_back_to_transformers(calls):
    ours, theirs = both()
    inputs, counted = batch("left")
    with pytest.raises(ValueError, match=r"output_attentions: .*set_attn_implementation"):
        ours(**inputs, output_attentions=True)
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    found, wanted = (model(**inputs, output_attentions=True) for model in (ours, theirs))
    assert near(found.logits[counted], wanted.logits[counted])
    assert all(near(a, b) for a, b in zip(found.attentions, wanted.attentions, strict=True))
    assert len(found.attentions) == LAYERS and calls["attention"] == 0


def test_tuples_and_hidden_states_are_given_where_asked_for():
    ours, theirs = both()
    inputs, _ = batch("plain")
    loss, hidden = ours.train()(
        **inputs,
        labels=inputs["input_ids"],
        output_hidden_states=True,
        use_cache=False,
        return_dict=False,
    )
    wanted = theirs(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
    assert near(loss, wanted.loss)
    assert all(near(a, b) for a, b in zip(hidden, wanted.hidden_states, strict=True))


def test_a_norm_of_another_dtype_than_its_input_is_left_to_transformers():
    ours, theirs = both()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert same_bits(ours.model.norm(x), theirs.model.norm(x))


class Subclass(transformers.LlamaForCausalLM):
    pass


@pytest.mark.parametrize(
    "build",
    [
        Subclass,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaModel,
        lambda config: transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **{k: v for k, v in config.to_dict().items() if k in ("vocab_size", "hidden_size")},
                intermediate_size=96,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=4,
            )
        ),
        lambda config: nn.Linear(2, 2),
    ],
    ids=[
        "Subclass",
        "LlamaForSequenceClassification",
        "LlamaModel",
        "MistralForCausalLM",
        "Linear",
    ],
)
def test_other_classes_are_refused_by_name(build, request):
    name = request.node.callspec.id
    with pytest.raises(TypeError, match=rf"expected transformers\.LlamaForCausalLM .*\.{name}$"):
        patch_transformers(build(a_config()))


def replace_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = mlp.forward


def replace_class(model):
    model.model.norm = nn.RMSNorm(64)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"attention_dropout": 0.1}, lambda model: None, "attention_dropout: expected 0, got 0.1"),
        ({"hidden_act": "gelu"}, lambda model: None, "hidden_act: expected 'silu', got 'gelu'"),
        ({}, replace_forward, r"^model\.layers\.1\.mlp: .*LlamaMLP with another forward"),
        ({}, replace_class, r"^model\.norm: .*torch\.nn\.modules\.normalization\.RMSNorm$"),
    ],
    ids=["dropout", "activation", "forward", "class"],
)
def test_what_cannot_be_patched_is_refused_and_left_as_it_is(settings, change, message):
    model = a_model(**settings)
    change(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch_transformers(model)
    assert [type(module) for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


def test_without_transformers_the_error_says_what_is_needed():
    program = (
        "import sys; sys.modules['transformers'] = None; import llama2rt.integrations\n"
        "print('the package itself is there'); import llama2rt.integrations.transformers"
    )
    failed = run_python("-c", program, status=1)
    assert failed.stdout == "the package itself is there\n"
    assert "ImportError: llama2rt.integrations.transformers needs transformers 5" in failed.stderr


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is absent")
    data = [
        {"input_ids": row, "labels": row}
        for row in (torch.randint(0, VOCABULARY, (8, LENGTH)).tolist())
    ]
    histories = []
    for model in both():
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        histories.append(
            [
                entry[key]
                for entry in trainer.state.log_history
                for key in ("loss", "eval_loss")
                if key in entry
            ]
        )
    assert len(histories[0]) == 4 and histories[0][-1] < histories[0][0]
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def test_flops_are_counted_as_over_the_model_as_it_was():
    """Forward and backward. Ours makes attention's scores again in backward, as torch counts it for
    its own kernels too, and no logits of the tokens without a label, the last of each row."""
    ours, theirs = both()
    theirs.set_attn_implementation("eager")
    inputs, _ = batch("plain")
    inputs |= {"labels": inputs["input_ids"], "use_cache": False}
    counts = []
    for model in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            gradients(model, **inputs)
        counts.append(counter.get_total_flops())
    config = ours.config
    product = 2 * ROWS * LENGTH**2 * config.num_attention_heads * config.head_dim
    logits = 2 * ROWS * VOCABULARY * config.hidden_size
    expected = counts[1] + LAYERS * product - 3 * logits
    assert counts[0] == pytest.approx(expected, rel=0.01)
    assert counts[0] == pytest.approx(counts[1], rel=0.1)
