"""Whatever a stage will need is read and checked before any weights are loaded: a bad last input
costs seconds, not the hours of sampling and training before its turn."""

import json
import shutil

import pocket as problem
import pytest
import torch
from pydantic import ValidationError

from llama2rt.checkpoint import native
from llama2rt.data.readers import read, write
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.errors import InputError
from llama2rt.generate.budget import forward_bytes
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.pipeline import iterate
from llama2rt.rollout.responses import Response, write_responses
from llama2rt.stages import comparisons, dpo, loading, ppo, rejection, reward, selection, sft
from llama2rt.stages.selection import BEST
from llama2rt.text import backends, chat
from llama2rt.text.template import LLAMA3_TEMPLATE
from llama2rt.text.tokenizer import Tokenizer

LONG = "may baba visit " * 40


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch):
    """A stage that loads weights has begun to spend time; without weights it can neither sample nor
    train."""
    load = loading.load

    def refuse(folder, device="cpu", dtype=None):
        if str(device) != "meta":
            pytest.fail(f"{folder}: its weights were loaded before all inputs were checked")
        return load(folder, device)

    monkeypatch.setattr(loading, "load", refuse)


@pytest.fixture(scope="module")
def bad(pocket, strangers, tmp_path_factory):
    """Inputs by name, each wrong in one way."""
    folder = tmp_path_factory.mktemp("bad")
    prompt = Prompt("short", problem.messages("helpfulness", "baba"))
    long = [{"role": "user", "content": LONG}]
    write(folder / "malformed.jsonl", [prompt])
    with open(folder / "malformed.jsonl", "a") as file:
        file.write('{"id": "x", "messages": []}\n')
    write(folder / "long.jsonl", [Prompt("long", long)])
    answer = {"role": "assistant", "content": "yes"}
    write(folder / "long-dialogues.jsonl", [Dialogue([*long, answer])])
    # A folder whose configuration and tokenizer are right and whose weights are not there.
    shutil.copytree(pocket.sft, folder / "unfinished")
    (folder / "unfinished" / "model.safetensors").unlink()
    # As the policy, but with rows for more ids than the tokenizer has pieces.
    policy, tokenizer = loading.load_llama(pocket.sft)
    padded = LlamaConfig(**dict(vars(policy.config), vocab_size=tokenizer.vocab_size + 8))
    native.save(Llama(padded).initialize(1), tokenizer, folder / "padded")
    # As the policy's, but for a shorter context.
    policy, tokenizer = loading.load_llama(pocket.sft)
    shape = LlamaConfig(**dict(vars(policy.config), context=12))
    native.save(Llama(shape).initialize(1), tokenizer, folder / "short")
    shape = LlamaConfig(**dict(vars(policy.config), context=40))
    native.save(ScalarModel(shape).initialize(1), tokenizer, folder / "reward of 40")
    earlier = {
        "nothing": None,
        "garbled": '{"prompt_id": "x"}\n',
        "foreign": [problem.response("yes", tokens=(7, 8, 2))],
        "oversized": [
            Response(
                prompt, "yes", chat.encode_prompt(tokenizer, prompt.messages),
                [9] * 60 + [tokenizer.eos], True, 0.0, {"helpfulness": 0.5}, "p", 1.0, 0,
            )
        ],
    }  # fmt: skip
    for name, content in earlier.items():
        samples = folder / name / "samples"
        samples.mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
        if isinstance(content, str):
            (samples / BEST).write_text(content)
        elif content:
            write_responses(samples / BEST, content)
    return {path.name: path for path in folder.iterdir()} | {
        "missing": folder / "missing.jsonl",
        "foreign reward": strangers / "reward",
        "foreign policy": strangers / "policy",
        "short reward": strangers / "short",
    }


EVERYWHERE = [
    ({"validation": ["malformed.jsonl"]}, r"malformed\.jsonl:2: "),
    ({"validation": ["missing"]}, r"missing\.jsonl: cannot be read"),
    ({"validation": ["long.jsonl"]}, r"long\.jsonl: all 1 prompts fill"),
    ({"rewards.safety": "foreign reward"}, "reward: its tokenizer is not the policy's"),
    ({"rewards.safety": "short reward"}, "rewards.safety: its context of 12 tokens is shorter"),
    (
        {"rewards.safety": "foreign policy"},
        "policy: expected a reward model, found a language model",
    ),
    ({"reference": "foreign policy"}, "policy: its tokenizer is not the policy's"),
    ({"reference": "short"}, "reference: its context of 12 tokens is shorter"),
    ({"reference": "unfinished"}, "unfinished: no model.safetensors"),
]
REJECTION = [
    ({"init": "foreign policy"}, "policy: its tokenizer is not the policy's"),
    ({"init": "short"}, "init: its context of 12 tokens is shorter"),
    ({"init": "unfinished"}, "unfinished: no model.safetensors"),
    ({"dialogues": ["malformed.jsonl"]}, r"malformed\.jsonl:1: "),
    ({"dialogues": ["long-dialogues.jsonl"]}, "all 1 dialogues are longer than 64 tokens"),
    ({"earlier": ["nothing"]}, r"nothing/samples/best\.jsonl: cannot be read"),
    ({"earlier": ["garbled"]}, r"best\.jsonl:1: not a sample of this stage"),
    ({"earlier": ["foreign"]}, r"best\.jsonl:1: sampled with another tokenizer"),
    ({"earlier": ["oversized"]}, r"best\.jsonl:1: \d+ tokens exceed the context of init, 64"),
]


def resolved(settings, bad):
    return {
        key: [bad[name] for name in value] if isinstance(value, list) else bad[value]
        for key, value in settings.items()
    }


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [(stage, *case) for stage in ("rejection", "ppo", "dpo") for case in EVERYWHERE]
    + [("rejection", *case) for case in REJECTION],
)
def test_rlhf_stages(pocket, bad, tmp_path, stage, settings, said):
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling.max_tokens": 8,
    }
    module, recipe = {
        "rejection": (rejection, rejection.RejectionRecipe),
        "ppo": (ppo, ppo.PpoRecipe),
        "dpo": (dpo, dpo.DpoRecipe),
    }[stage]
    if stage == "rejection":
        given["policy"] = pocket.sft
    with pytest.raises(InputError, match=said):
        module.run(recipe(**problem.tables(given | resolved(settings, bad))), tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize("stage", [sft, reward])
@pytest.mark.parametrize(
    ("name", "said"),
    [("malformed.jsonl", r"malformed\.jsonl:1: "), ("missing", r"missing\.jsonl: cannot be read")],
)
def test_supervised_stages(pocket, bad, tmp_path, stage, name, said):
    good = tmp_path / "good.jsonl"
    messages = problem.messages("helpfulness", "baba")
    if stage is sft:
        write(good, [Dialogue([*messages, {"role": "assistant", "content": "yes"}])])
        recipe = sft.SftRecipe(init=pocket.sft, data=[good], validation=[bad[name]])
    else:
        write(good, [Comparison(messages, "yes", "no")])
        recipe = reward.RewardRecipe(init=pocket.sft, data=[good], validation=[bad[name]])
    with pytest.raises(InputError, match=said):
        stage.run(recipe, tmp_path / "run")


def test_sft_dialogues_longer_than_the_context(pocket, bad, tmp_path):
    messages = problem.messages("helpfulness", "baba")
    write(tmp_path / "a.jsonl", [Dialogue([*messages, {"role": "assistant", "content": "yes"}])])
    held_out = [bad["long-dialogues.jsonl"]]
    recipe = sft.SftRecipe(init=pocket.sft, data=[tmp_path / "a.jsonl"], validation=held_out)
    with pytest.raises(InputError, match="all 1 dialogues are longer than 64 tokens"):
        sft.run(recipe, tmp_path / "run")


@pytest.mark.parametrize("key", ["data", "validation"])
@pytest.mark.parametrize("stage", [sft, reward])
def test_supervised_examples_that_fit_no_context_or_micro_batch(
    pocket, tmp_path, caplog, stage, key
):
    """In no context; what is only longer than a micro-batch passes alone, and is said."""
    messages, longer = problem.messages("helpfulness", "baba"), problem.messages("safety", "baba")
    if stage is sft:
        recipe = sft.SftRecipe
        good, long, large = (
            [Dialogue([*asked, {"role": "assistant", "content": text}])]
            for asked, text in ((messages, "yes"), (messages, LONG), (longer, LONG[:45]))
        )
    else:
        recipe = reward.RewardRecipe
        good, long, large = (
            [Comparison(asked, *texts)]
            for asked, texts in (
                (messages, ("yes", "no")),
                (longer, (LONG, "no")),
                (longer, (LONG[:45], LONG[:30])),
            )
        )
    write(tmp_path / "good.jsonl", good)
    files = {"init": pocket.sft, "data": [tmp_path / "good.jsonl"]}
    write(tmp_path / "long.jsonl", long)
    with pytest.raises(InputError, match=r"all 1 \w+ are longer than 64 tokens"):
        stage.run(
            recipe(**(files | {key: [tmp_path / "long.jsonl"], "held_out": 0})), tmp_path / "a"
        )
    write(tmp_path / "large.jsonl", large)
    train = {"micro_tokens": 32 if stage is sft else 40}  # both sides of a pair pass together
    files |= {key: [tmp_path / "large.jsonl"], "held_out": 0, "train": train}
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        stage.run(recipe(**files), tmp_path / "b")
    assert ("pass alone" in caplog.text) == (key == "data")


V1 = {"name": "V1", "stage": "rejection", "samples": 1, "epochs": 1}


def plan(pocket, steps, **settings):
    given = {
        "sft": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling.max_tokens": 8,
    }
    steps = [problem.tables(step) for step in steps]
    return iterate.IterateRecipe(**problem.tables(given | {"steps": steps} | settings))


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        ("rejection", {"dialogues": ["malformed.jsonl"]}, r"V2: .*malformed\.jsonl:1: "),
        ("rejection", {"earlier": ["garbled"]}, r"V2: .*best\.jsonl:1: not a sample"),
        ("ppo", {"validation": ["long.jsonl"]}, r"V2: .*long\.jsonl: all 1 prompts fill"),
        ("ppo", {"rewards.safety": "foreign reward"}, "V2: .*its tokenizer is not the policy's"),
        ("dpo", {"reference": "unfinished"}, "V2: .*unfinished: no model.safetensors"),
        ("dpo", {"data": ["missing"]}, r"V2: .*missing\.jsonl: cannot be read"),
    ],
)
def test_iterate_reads_the_last_steps_own_inputs_first(
    pocket, bad, tmp_path, stage, settings, said
):
    last = {"name": "V2", "stage": stage, **resolved(settings, bad)}
    with pytest.raises(InputError, match=f"steps: {said}"):
        iterate.run(plan(pocket, [V1, last]), tmp_path / "run")
    assert not (tmp_path / "run" / "V1").exists()


def test_iterate_checks_what_only_the_table_needs(pocket, bad, tmp_path):
    """Each step names a safety model of its own; the one that measures them all is too short."""
    steps = [{**V1, "rewards.safety": pocket.safety}]
    recipe = plan(pocket, steps, **{"rewards.safety": bad["short reward"]})
    with pytest.raises(InputError, match=r"rewards\.safety: its context of 12 tokens is shorter"):
        iterate.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "V1").exists()


def test_iterate_knows_the_models_that_are_still_to_come(pocket, bad, tmp_path):
    """V1 is trained from a base of another shape, so V2's policy will have that one's context."""
    shape = LlamaConfig(**dict(vars(loading.outline(pocket.sft).config), context=128))
    _, tokenizer = loading.load(pocket.sft, "meta")
    native.save(Llama(shape).initialize(1), tokenizer, tmp_path / "base")
    steps = [V1, {"name": "V2", "stage": "dpo", "sampling.max_tokens": 100}]
    with pytest.raises(InputError, match="V2: reference: its context of 64 tokens is shorter"):
        iterate.run(plan(pocket, steps, base=tmp_path / "base"), tmp_path / "run")
    # With room for all, everything is checked and V1 begins: it loads weights.
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        iterate.run(plan(pocket, [V1]), tmp_path / "good")


def test_iterate_bounds_the_samples_that_are_still_to_be_pooled(pocket, bad, tmp_path):
    """V1's longest may be longer than what V2's own reward model can read, V2's own are not."""
    v1 = {**V1, "sampling.max_tokens": 40}
    own = {"rewards.helpfulness": bad["reward of 40"], "sampling.max_tokens": 8}
    v2 = {**V1, "name": "V2", **own}
    with pytest.raises(InputError, match=r"V2: earlier: V1 may leave samples whose \d+ tokens"):
        iterate.run(plan(pocket, [v1, v2], pool_from=2), tmp_path / "run")
    assert not (tmp_path / "run" / "V1").exists()
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        iterate.run(plan(pocket, [v1, v2], pool_from=3), tmp_path / "apart")


STAGES = {
    "rejection": (rejection.run, rejection.RejectionRecipe, {"policy"}),
    "ppo": (ppo.run, ppo.PpoRecipe, set()),
    "dpo": (dpo.run, dpo.DpoRecipe, set()),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_cache_too_small_for_the_last_held_out_prompt(pocket, tmp_path, stage):
    """By a token: both precisions of the two, because a key takes half as much in bf16."""
    run, recipe, policy = STAGES[stage]
    model, tokenizer = loading.load(pocket.sft, "meta")
    message = {"role": "user", "content": "may baba visit " * 3}
    write(tmp_path / "longer.jsonl", [Prompt("longer", [message])])
    tokens = len(chat.encode_prompt(tokenizer, [message])) + 8
    assert tokens <= model.config.context
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        needed = -(-tokens // 16) * 16 * 2 * 2 * 32 * dtype.itemsize
        needed += forward_bytes(model.config, dtype, tokens, 1, restricted=False)
        given = dict.fromkeys({"init", *policy}, pocket.sft) | {
            "rewards.helpfulness": pocket.helpfulness,
            "data": [pocket.prompts],
            "validation": [tmp_path / "longer.jsonl"],
            "sampling.max_tokens": 8,
            "train": {"precision": precision},
        }
        with pytest.raises(
            InputError, match=f"sampling.cache_bytes: expected at least {needed} for the"
        ):
            too_little = given | {"sampling.cache_bytes": needed - 1}
            run(recipe(**problem.tables(too_little)), tmp_path / precision)
        # As much as is needed is enough: the stage begins.
        with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
            enough = given | {"sampling.cache_bytes": needed}
            run(recipe(**problem.tables(enough)), tmp_path / f"{precision}-enough")


def test_iterate_measures_in_fp32_with_the_cache_it_is_given(pocket, tmp_path):
    """V1 samples in bf16, for which the cache is large enough."""
    v1 = {**V1, "train": {"precision": "bf16"}}
    model, tokenizer = loading.load(pocket.sft, "meta")
    texts = [r.messages for r in read(pocket.validation, "prompt")]
    tokens = max(len(chat.encode_prompt(tokenizer, messages)) for messages in texts) + 8
    needed = -(-tokens // 16) * 16 * 2 * 2 * 32 * 4
    needed += forward_bytes(model.config, torch.float32, tokens, 1, restricted=False)
    said = rf"^steps: versions at V1: sampling\.cache_bytes: expected at least {needed} for the"
    with pytest.raises(InputError, match=said):
        too_little = {"sampling.cache_bytes": needed - 1}
        iterate.run(plan(pocket, [v1], **too_little), tmp_path / "run")
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        iterate.run(plan(pocket, [v1], **{"sampling.cache_bytes": needed}), tmp_path / "good")


@pytest.mark.parametrize("stage", [*STAGES, "iterate"])
def test_cache_bytes_are_no_32_bit_number(pocket, tmp_path, stage):
    """A 7B model's cache of 500-token prompts alone takes more than 2 GiB."""
    run, recipe, policy = STAGES.get(stage, (iterate.run, iterate.IterateRecipe, set()))
    models = {"sft"} if stage == "iterate" else {"init", *policy}
    given = dict.fromkeys(models, pocket.sft) | {
        "rewards.helpfulness": pocket.helpfulness,
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling.max_tokens": 8,
    }
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        most = given | {"sampling.cache_bytes": 2**63 - 1}
        run(recipe(**problem.tables(most)), tmp_path / "run")
    with pytest.raises(ValidationError, match=f"cache_bytes: expected at most {2**63 - 1}, got"):
        recipe(**problem.tables(given | {"sampling.cache_bytes": 2**63}))


@pytest.mark.parametrize("stage", STAGES)
def test_a_policy_may_sample_what_no_other_model_has_a_row_for(pocket, bad, tmp_path, stage):
    run, recipe, policy = STAGES[stage]
    given = dict.fromkeys({"init", *policy}, bad["padded"]) | {
        "rewards.helpfulness": pocket.helpfulness,
        "data": [pocket.prompts],
        "sampling.max_tokens": 8,
    }
    with pytest.raises(InputError, match=r"has \d+ embeddings and could not read what"):
        run(recipe(**problem.tables(given)), tmp_path / "run")


def test_earlier_samples_may_hold_ids_that_pad_the_vocabulary(pocket, bad, tmp_path):
    """The last of V3's could otherwise end V4, which all its models could have read."""
    model, tokenizer = loading.load(bad["padded"], "meta")
    prompt = Prompt("short", problem.messages("helpfulness", "baba"))
    tokens = [9, tokenizer.vocab_size, tokenizer.eos]
    kept = Response(
        prompt, "yes", chat.encode_prompt(tokenizer, prompt.messages), tokens, True, 0.0,
        {"helpfulness": 0.5}, "p", 1.0, 0,
    )  # fmt: skip
    (tmp_path / "samples").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    write_responses(tmp_path / "samples" / BEST, [kept])
    padded = loading.Outline(model.config, tokenizer)
    assert selection.read_earlier(tmp_path, tokenizer, {"init": padded}) == [kept]
    short = loading.outline(pocket.sft)
    with pytest.raises(InputError, match=r"best\.jsonl:1: sampled with another tokenizer"):
        selection.read_earlier(tmp_path, tokenizer, {"init": padded, "rewards.safety": short})


def test_a_warmup_longer_than_ppo_is_said_before_it_begins(pocket, tmp_path, caplog):
    recipe = ppo.PpoRecipe(
        init=pocket.sft,
        rewards={"helpfulness": pocket.helpfulness},
        data=[pocket.prompts],
        sampling={"max_tokens": 8},
        iterations=2,
        train={"warmup_steps": 9},
    )
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        ppo.run(recipe, tmp_path / "run")
    assert "the warm-up of 9 steps is longer than the run of 2" in caplog.text


def test_text_that_the_chat_template_forbids_is_named(tmp_path, small_tokenizer):
    """By the record it is in: readers do not know the template."""
    from tokenizers import AddedToken

    library = backends.parse_json(small_tokenizer.as_json())
    library.add_special_tokens([AddedToken("<|eot_id|>", normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA3_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    asked = [{"role": "user", "content": "say <|eot_id|>"}]
    answered = [*asked, {"role": "assistant", "content": "no"}]
    write(tmp_path / "prompts.jsonl", [Prompt("p17", asked)])
    config = LlamaConfig(16, 1, 2, 2, 32, vocab_size=tokenizer.vocab_size)
    said = "message 1: user content holds the control token"
    with pytest.raises(InputError, match=rf"prompts\.jsonl: prompt 'p17': {said}"):
        loading.read_prompts(
            [tmp_path / "prompts.jsonl"], tokenizer, loading.Outline(config, tokenizer)
        )
    with pytest.raises(InputError, match=f"dialogue that begins 'say <.*>': {said}"):
        sft.encode([Dialogue(answered)], tokenizer, 64)
    with pytest.raises(InputError, match=f"comparison whose prompt begins 'say <.*>': {said}"):
        comparisons.encode([Comparison(asked, "a", "b")], tokenizer, 64)
