"""Rejection sampling: better answers, honest targets, pooling, resumption in every phase."""

import json
from dataclasses import replace

import numpy as np
import pocket as problem
import pytest
import torch
from pocket import response

from llama2rt.checkpoint import native
from llama2rt.data.readers import read, write
from llama2rt.data.records import Dialogue, Prompt
from llama2rt.rollout import metrics, sampling
from llama2rt.rollout.responses import read_responses, write_responses
from llama2rt.run import Run
from llama2rt.stages import loading, rejection, selection
from llama2rt.stages.selection import BEST
from llama2rt.text import backends, chat
from llama2rt.text.tokenizer import Tokenizer


def recipe(pocket, **settings) -> rejection.RejectionRecipe:
    given = {
        "policy": pocket.sft,
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "samples": 6,
        "sampling.max_tokens": 8,
        "batch_size": 16,
        "train": {"lr": 4e-3, "checkpoint_every": 5},
    }
    return rejection.RejectionRecipe(**problem.tables(given | settings))


def test_fine_tuned_on_its_best_samples_it_answers_better(pocket, tmp_path):
    folder = rejection.run(recipe(pocket, epochs=4), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sampled/max_reward"] > report["sampled/median_reward"]
    assert report["reward"] > report["sampled/mean_reward"] + 1
    sampled = read_responses(tmp_path / "run" / "samples" / "part-00000.jsonl")
    held_out = read_responses(tmp_path / "run" / "samples" / "held_out.jsonl")
    before, after = (
        np.mean([problem.correct(r.prompt.kind, r.text) for r in responses])
        for responses in (sampled, held_out)
    )
    assert after > before + 0.15
    assert folder == tmp_path / "run" / "model"


def test_samples_are_records_and_keep_their_tokens(pocket, tmp_path):
    rejection.run(recipe(pocket, samples=2, epochs=1), tmp_path / "run")
    path = tmp_path / "run" / "samples" / "part-00000.jsonl"
    records = read(path, "sample")
    responses = read_responses(path)
    assert len(records) == len(responses) == 200
    assert [r.prompt_id for r in records] == [r.prompt.id for r in responses]
    _, tokenizer = loading.load_llama(pocket.sft)
    for record, kept in zip(records, responses, strict=True):
        assert record.response == kept.text and record.reward == kept.reward
        assert kept.finished == (kept.tokens[-1] == tokenizer.eos)
        assert len(kept.tokens) <= 8


def test_best_usable_response_of_each_prompt_is_kept(pocket):
    tokenizer = Tokenizer.load(pocket.sft)
    groups = [
        [response("no", 1.0), response("yes", 2.0), response("maybe", 2.0)],
        [response("cut", 9.0, tokens=(7,)), response("", 8.0), response("yes", -1.0)],
        [response("[INST] me [/INST]", 5.0), response(" \n", 4.0)],
        # BOS, which opens a turn and does not show in the text.
        [response("yes", 7.0, tokens=(9, 1, 2)), response("no", 3.0)],
    ]
    best = [(r.text, r.reward) for r in selection.select(groups, tokenizer)]
    assert best == [("yes", 2.0), ("yes", -1.0), ("no", 3.0)]


@pytest.fixture
def reasoner(small_tokenizer, tmp_path):
    """A tokenizer whose template writes a special token and, around a thought, tokens of text."""
    from tokenizers import AddedToken

    library = backends.parse_json(small_tokenizer.as_json())
    library.add_special_tokens(["<|user|>", "<|end|>"])
    library.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    library.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|user|>' + m.content.split('</think>')[-1] + '<|end|>' }}"
        "{% endfor %}{{ '<think>' }}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("tags", "usable"),
    [("<|end|>", True), ("</s>", True), ("</think><|end|>", True), ("<|user|><|end|>", False)],
)
def test_a_response_that_opens_another_turn_is_no_target(reasoner, tags, usable):
    """A thought that ends is text; a special token inside does not show in the text."""
    tokens = reasoner.encode_rendered(f"yes{tags}")[0]
    assert len(tokens) > tags.count("<") and reasoner.decode(tokens).startswith("yes")
    sampled = replace(response(reasoner.decode(tokens), tokens=tuple(tokens)), finished=True)
    assert selection.usable(sampled, reasoner) == usable


def test_pool_keeps_one_answer_a_prompt_the_better():
    best = [response("a", 1.0, name="baba"), response("b", 1.0, name="lulu")]
    earlier = [response("c", 2.0, name="baba"), response("d", 0.5, name="lulu")]
    earlier.append(response("e", -3.0, name="kiki"))
    assert [r.text for r in selection.pool(best, earlier)] == ["c", "b", "e"]


def test_earlier_versions_are_pooled_under_todays_reward_models(pocket, tmp_path):
    rejection.run(recipe(pocket, epochs=1), tmp_path / "v1")
    best = tmp_path / "v1" / "samples" / BEST
    responses = read_responses(best)
    # Rewards written by other models must not count: all claim to be perfect.
    write_responses(best, [replace(r, reward=1e9) for r in responses])
    settings = recipe(pocket, seed=5, samples=1, epochs=1, earlier=[tmp_path / "v1"])
    rejection.run(settings, tmp_path / "v2")
    pooled = read_responses(tmp_path / "v2" / "samples" / BEST)
    manifest = json.loads((tmp_path / "v2" / "manifest.json").read_text())
    assert manifest["parents"][0]["path"] == str(tmp_path / "v1")
    assert len(pooled) == 100 and max(r.reward for r in pooled) < 100
    tokenizer = Tokenizer.load(pocket.sft)
    own = {repr(r.prompt.messages): r for r in read_responses(
        tmp_path / "v2" / "samples" / "part-00000.jsonl")}  # fmt: skip
    old = {repr(r.prompt.messages): r for r in responses}
    for kept in pooled:
        key = repr(kept.prompt.messages)
        assert kept.reward == pytest.approx(
            max(r[key].reward for r in (own, old) if selection.usable(r[key], tokenizer)),
            abs=1e-4,
        )


def test_a_pool_recovers_a_skill_that_no_prompt_asks_for_any_more(pocket, tmp_path):
    """The paper's rhymes: V1 kept secrets, and no prompt of V2 asks for one. On the quickstart's
    toy: benchmarks/rlhf/pooling.py."""
    _, tokenizer = loading.load_llama(pocket.sft)
    kept = [
        problem.sampled(tokenizer, prompt, problem.ANSWERS[prompt.kind][0])
        for prompt in problem.prompts(problem.TRAINING)
    ]
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "manifest.json").write_text("{}")
    write_responses(tmp_path / "v1" / "samples" / BEST, kept)
    visits = [p for p in problem.prompts(problem.TRAINING) if p.kind == "helpfulness"]
    write(tmp_path / "visits.jsonl", visits)
    kept_share = {}
    for name, earlier in {"preceding": [], "pooled": [tmp_path / "v1"]}.items():
        settings = recipe(
            pocket, data=[tmp_path / "visits.jsonl"], samples=2, epochs=4, earlier=earlier
        )
        rejection.run(settings, tmp_path / name)
        answers = read_responses(tmp_path / name / "samples" / "held_out.jsonl")
        secrets = [r for r in answers if r.prompt.kind == "safety"]
        kept_share[name] = np.mean([problem.correct("safety", r.text) for r in secrets])
    assert kept_share["pooled"] > 0.9 and kept_share["preceding"] < 0.6


@pytest.fixture
def trained(monkeypatch):
    """The examples that a run trains on."""
    examples = []
    loader = rejection.ExampleLoader
    monkeypatch.setattr(
        rejection,
        "ExampleLoader",
        lambda given, *rest, share: examples.extend(given) or loader(given, *rest, share=share),
    )
    return examples


def test_only_the_selected_response_is_a_target_and_as_sampled(pocket, tmp_path, trained):
    """Not the assistant's turns in a prompt's history; not the response's text encoded again, in
    today's samples or pooled ones."""
    history = [*problem.messages("safety", "lulu"), {"role": "assistant", "content": "gold"}]
    prompts = [
        Prompt(name, [*history, *problem.messages("helpfulness", name)])
        for name in problem.TRAINING[:6]
    ]
    write(tmp_path / "prompts.jsonl", prompts)
    _, tokenizer = loading.load_llama(pocket.sft)
    # "yes" byte by byte: tokens that encoding its text would not give.
    old = response("yes", tokens=(*(3 + byte for byte in b"yes"), tokenizer.eos), name="elder")
    asked = chat.encode_prompt(tokenizer, old.prompt.messages)
    assert tokenizer.decode(old.tokens[:-1]) == "yes"
    (tmp_path / "v0").mkdir()
    (tmp_path / "v0" / "manifest.json").write_text("{}")
    write_responses(tmp_path / "v0" / "samples" / BEST, [replace(old, prompt_tokens=asked)])
    settings = recipe(
        pocket,
        data=[tmp_path / "prompts.jsonl"],
        validation=[],
        earlier=[tmp_path / "v0"],
        samples=2,
        epochs=1,
    )
    rejection.run(settings, tmp_path / "run")
    best = read_responses(tmp_path / "run" / "samples" / BEST)
    assert len(trained) == len(best) > 1
    assert old.tokens in [kept.tokens for kept in best]
    for example, kept in zip(trained, best, strict=True):
        assert example.tokens.tolist() == kept.prompt_tokens + kept.tokens
        assert example.tokens[example.trainable].tolist() == kept.tokens
        assert kept.tokens[-1] == tokenizer.eos


def test_dialogues_are_trained_on_besides(pocket, tmp_path, trained):
    messages = [*problem.messages("safety", "lulu"), {"role": "assistant", "content": "sorry"}]
    write(tmp_path / "dialogues.jsonl", [Dialogue(messages)])
    settings = recipe(pocket, samples=1, epochs=1, dialogues=[tmp_path / "dialogues.jsonl"])
    rejection.run(settings, tmp_path / "run")
    best = read_responses(tmp_path / "run" / "samples" / BEST)
    _, tokenizer = loading.load_llama(pocket.sft)
    tokens, trainable = chat.encode_dialogue(tokenizer, messages)
    assert len(trained) == len(best) + 1
    assert trained[-1].tokens.tolist() == tokens
    assert trained[-1].trainable.tolist() == trainable


def test_held_out_kl_is_to_the_reference(pocket, tmp_path, monkeypatch):
    """Not to the base that each version is fine-tuned from."""
    _, tokenizer = loading.load_llama(pocket.sft)
    base, _ = loading.load_llama(pocket.sft)
    with torch.no_grad():
        base.output.weight.mul_(1.1)
    native.save(base, tokenizer, tmp_path / "base")
    seen = []
    monkeypatch.setattr(
        metrics, "measure", lambda path, sampler, reference, *_, **__: seen.append(reference) or {}
    )
    settings = recipe(pocket, init=tmp_path / "base", reference=pocket.sft, samples=1, epochs=1)
    rejection.run(settings, tmp_path / "run")
    sft, _ = loading.load_llama(pocket.sft)
    assert torch.equal(seen[0].output.weight, sft.output.weight)


def test_the_base_needs_no_tokenizer_of_its_own(pocket, tmp_path):
    """The policy's encodes the prompts; the base reads token ids."""
    base, _ = loading.load_llama(pocket.sft)
    native.save(base, None, tmp_path / "base")
    settings = recipe(pocket, init=tmp_path / "base", samples=1, epochs=1)
    folder = rejection.run(settings, tmp_path / "run")
    assert loading.load_llama(folder)[1].digest == Tokenizer.load(pocket.sft).digest


def test_a_model_that_did_not_move_has_no_kl(pocket, tmp_path):
    """In bf16 too: the reference is rounded as the model is."""
    train = {"precision": "bf16", "lr": 1e-30, "weight_decay": 0.0}
    rejection.run(recipe(pocket, samples=1, epochs=1, train=train), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["kl_k1"] == report["kl_k3"] == 0.0


TUNE = {"tune.temperatures": [3.0, 0.8], "tune.prompts": 30}


def in_files_of_25(patch) -> None:
    patch.setattr(sampling, "PROMPTS_PER_FILE", 25)


@pytest.fixture(scope="module")
def whole(pocket, tmp_path_factory):
    """The directory of a run that nobody stopped."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        in_files_of_25(patch)
        rejection.run(recipe(pocket, samples=2, epochs=1), directory)
    return directory


@pytest.mark.parametrize(
    "owner, name, calls, tune",
    [
        (sampling, "write_responses", 2, TUNE),
        (sampling, "write_responses", 3, {}),
        (rejection, "write_responses", 1, {}),
        (Run, "log", 7, {}),
    ],
    ids=["tuning", "sampling", "selecting", "training"],
)
def test_resumed_equals_uninterrupted(
    pocket, whole, tmp_path, monkeypatch, owner, name, calls, tune
):
    in_files_of_25(monkeypatch)
    settings = recipe(pocket, samples=2, epochs=1, **tune)
    killed = tmp_path / "killed"
    if tune:
        whole = rejection.run(settings, tmp_path / "whole").parent
    resumed = problem.killed_and_resumed(
        monkeypatch, owner, name, calls, rejection.run, settings, killed
    )
    assert problem.weights(whole / "model") == problem.weights(resumed)
    assert problem.metrics(whole) == problem.metrics(killed)
    for sample in (whole / "samples").glob("*.jsonl"):
        mine, theirs = (
            (directory / "samples" / sample.name).read_text().replace(str(directory), "")
            for directory in (whole, killed)
        )  # those held out name the run
        assert mine == theirs
    if tune:
        tuned(whole, killed)


def tuned(whole, killed):
    """The tuning of a run, of which the half that a kill had left was kept."""
    found, same = (json.loads((d / "report.json").read_text()) for d in (whole, killed))
    assert found["tuning"] == same["tuning"]
    rows = found["tuning"]["temperatures"]
    assert [row["temperature"] for row in rows] == [0.8, 3.0]
    assert (found["tuning"]["n"], found["tuning"]["prompts"]) == (2, 30)
    # At 3 the pocket policy writes letters, and runs into the limit.
    assert rows[0]["cut"] < rows[1]["cut"] and rows[1]["behind"]["low"] > 0
    drawn = read_responses(whole / "samples" / "part-00000.jsonl")
    assert {response.temperature for response in drawn} == {found["tuning"]["temperature"]} == {0.8}
    assert "Sampled at 0.8" in (whole / "report.html").read_text()
    kept = [read_responses(path) for path in sorted((whole / "samples" / "tuning").iterdir())]
    assert [len(part) for part in kept] == [25 * 4, 5 * 4]


def test_what_was_chosen_is_described(pocket, tmp_path):
    """Beside the policy's first answers; and of a pool, whose answers were kept."""
    groups = [
        [response("no way out", 1.0), response("yes do", 2.0), response("cut", 3.0, tokens=(7,))],
        [response("yes do", 0.0, name="lulu"), response("", 1.0, name="lulu")] * 2,
    ]
    groups[1] = groups[1][:3]
    best = selection.select(groups, Tokenizer.load(pocket.sft))
    elder = replace(response("gold", 9.0), policy="elder")
    found = selection.describe(groups, best, selection.pool(best, [elder]))
    assert found["best_cut"]["mean"] == 0.5
    assert found["curves"]["n"] == [1, 2, 3] and found["sampled/max_reward"] == 2.0
    first, chosen, pooled = found["selection"]
    assert (first["name"], first["responses"], first["reward"]["mean"]) == ("first sample", 2, 0.5)
    assert chosen["reward"]["mean"] == 1.0 and chosen["distinct_1"] == 0.5
    assert first["self_bleu"] < chosen["self_bleu"] == pytest.approx(1)
    assert pooled["responses"] == 2 and found["pooled"] == {"elder": 1, "p": 1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tune.temperatures": [1.0]}, "two or more different ones"),
        ({"tune.temperatures": [1.0, 1.0]}, "two or more different ones"),
        ({"tune.samples": 9}, "tune.samples: only with temperatures"),
        ({"tune.temperatures": [1.0, 0.7], "tune.samples": 5}, "at least samples, 6"),
        ({"tune.temperatures": [1.0, 0.7], "temperature": 1.2}, "leave one of them out"),
    ],
)
def test_what_cannot_be_tuned(pocket, settings, said):
    with pytest.raises(ValueError, match=said.removeprefix("tune.")):
        recipe(pocket, **settings)
