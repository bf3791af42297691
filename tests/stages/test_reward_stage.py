"""Reward modelling: it learns, reads the right token, holds prompts out, resumes to the bit."""

import json
from dataclasses import asdict

import numpy as np
import pocket as problem
import pytest
import torch
from pydantic import ValidationError
from small_models import packed

from llama2rt.algorithms import losses
from llama2rt.data.packing import pack, pack_pairs
from llama2rt.data.readers import read, write
from llama2rt.data.records import Comparison
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError
from llama2rt.model import ScalarModel
from llama2rt.model.heads import Normalization
from llama2rt.rollout.reward import RewardModels
from llama2rt.run import Run
from llama2rt.stages import comparisons, loading, reward
from llama2rt.text import chat


def comparison(name, rating=None, safety=None, answer="yes"):
    return Comparison(problem.messages("helpfulness", name), answer, "no", rating, safety)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_accuracy_beats_chance_by_5_sigma(pocket, tmp_path, seed):
    held_out = problem.comparisons("helpfulness", problem.HELD_OUT, seed=9)
    write(tmp_path / "held_out.jsonl", held_out)
    recipe = problem.reward_recipe(
        pocket, "helpfulness", seed=seed, validation=[tmp_path / "held_out.jsonl"]
    )
    reward.run(recipe, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"]["average"] > 0.5 + 5 * (0.25 / len(held_out)) ** 0.5
    assert report["accuracy"]["significantly_better"] >= report["accuracy"]["negligibly_better"]


def test_safety_model_recalls_unsafe_answers(pocket):
    report = json.loads((pocket.safety.parent / "report.json").read_text())
    assert report["accuracy"]["average"] > 0.8
    assert report["unsafe_recall"] > 0.8


@pytest.mark.parametrize("layout", [pack, pack_shared])
def test_objective_reads_last_tokens_and_adds_margins(pocket, layout):
    """Against each response alone in the model: the score is the value at its EOS."""
    llama, tokenizer = loading.load_llama(pocket.sft)
    model = ScalarModel.from_llama(llama, seed=3)
    records = [
        comparison("baba", "significantly_better", "chosen_safe"),
        comparison("dodokiki", "slightly_better", None),
        comparison("lu", None, "both_unsafe"),
    ]
    recipe = problem.reward_recipe(pocket, "safety", margin="large", safety_coefficient=0.5)
    pairs, kept = comparisons.encode(records, tokenizer, 64)
    assert kept == records
    batch = pack_pairs(pairs, reward.targets(records, recipe), layout)
    assert (batch.batch.keys is not None) == (layout is pack_shared)
    loss, metrics = reward.objective(recipe)(model, batch)
    alone = []
    for example in (side for pair in pairs for side in pair):
        assert example.tokens[-1] == tokenizer.eos
        alone.append(model(*packed(example.tokens.astype(np.int64)))[-1])
    chosen, rejected = torch.stack(alone).view(-1, 2).unbind(1)
    margins = torch.tensor([3.0, 1.0, 0.0])
    safety = losses.safety(
        torch.stack([chosen[0], rejected[0], chosen[2], rejected[2]]),
        torch.tensor([True, False, False, False]),
    )
    expected = losses.ranking(chosen, rejected, margins).sum() + 0.5 * safety.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["safety_loss"], safety.sum().detach())
    assert int(metrics["accuracy"]) == int((chosen > rejected).sum())


def test_no_prompt_is_trained_on_and_held_out():
    names = problem.NAMES
    records = [comparison(name, answer=a) for name in names for a in ("yes", "of course", "sure")]
    kept, held_out = comparisons.hold_out(records, 40, seed=1)
    assert 40 <= len(held_out) < 43
    assert len(kept) + len(held_out) == len(records)
    assert not {c.prompt[0]["content"] for c in kept} & {c.prompt[0]["content"] for c in held_out}
    assert comparisons.hold_out(records, 40, seed=1) == (kept, held_out)
    assert comparisons.hold_out(records, 40, seed=2) != (kept, held_out)
    assert comparisons.hold_out(records, 0, seed=1)[1] == []
    with pytest.raises(InputError, match="leaves none"):
        comparisons.hold_out(records, len(records), seed=1)


def test_mixed_in_prompts_are_not_held_out_ones(pocket, tmp_path):
    write(tmp_path / "own.jsonl", [comparison(name) for name in problem.NAMES])
    write(tmp_path / "other.jsonl", [comparison(n, answer="sure") for n in problem.NAMES])
    recipe = problem.reward_recipe(
        pocket,
        "helpfulness",
        data=[tmp_path / "own.jsonl"],
        mixed_in=[tmp_path / "other.jsonl"],
    )
    training, held_out, _ = comparisons.split(recipe)
    assert len(held_out) == 20
    assert not {repr(c.prompt) for c in held_out} & {repr(c.prompt) for c in training}
    assert sum(c.chosen == "sure" for c in training) == 80


@pytest.mark.parametrize("share, expected", [(0.5, 90), (0.1, 10), (0.0, 0), (0.9, 200)])
def test_mix_draws_its_share_uniformly(share, expected):
    own = [comparison(f"own{i}") for i in range(90)]
    other = [comparison(f"other{i}") for i in range(200)]
    mixed = comparisons.mix(own, other, share, seed=0)
    assert mixed[:90] == own
    assert len(mixed) == 90 + expected
    assert len({repr(c.prompt) for c in mixed}) == len(mixed)


def test_shares_are_the_papers(pocket, tmp_path):
    write(tmp_path / "other.jsonl", [comparison(f"o{i}") for i in range(200)])
    sizes = {}
    for kind in ("helpfulness", "safety"):
        recipe = problem.reward_recipe(
            pocket, kind, mixed_in=[tmp_path / "other.jsonl"], held_out=0
        )
        own = len(read(recipe.data, "comparison"))
        sizes[kind] = (len(comparisons.split(recipe)[0]) - own) / own
    assert sizes["helpfulness"] == 1.0  # an equal amount
    assert sizes["safety"] == pytest.approx(1 / 9, abs=0.01)  # 90/10


def test_pairs_beyond_the_context_are_left_out_not_cut(pocket, caplog):
    _, tokenizer = loading.load_llama(pocket.sft)
    records = [comparison("baba"), comparison("lulu", answer="yes " * 60)]
    pairs, kept = comparisons.encode(records, tokenizer, 64)
    assert kept == records[:1] and len(pairs) == 1
    assert "1 comparisons longer than the context of 64 left out" in caplog.text


def test_resumed_equals_uninterrupted(pocket, tmp_path, monkeypatch):
    train = {"lr": 3e-3, "checkpoint_every": 2, "validate_every": 3}
    recipe = problem.reward_recipe(pocket, "safety", epochs=1, train=train)
    whole = reward.run(recipe, tmp_path / "whole")
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "log", 5, reward.run, recipe, tmp_path / "killed"
    )
    assert problem.weights(whole) == problem.weights(resumed)
    assert problem.metrics(tmp_path / "whole") == problem.metrics(tmp_path / "killed")
    reports = [(tmp_path / name / "report.json").read_text() for name in ("whole", "killed")]
    assert reports[0] == reports[1]


def test_a_language_model_is_no_reward_model(pocket):
    with pytest.raises(InputError, match="expected a reward model"):
        loading.load_scalar(pocket.sft)
    with pytest.raises(InputError, match="expected a language model"):
        loading.load_llama(pocket.safety)


def test_recipe_needs_a_start(pocket):
    with pytest.raises(ValidationError, match="give init, or model and tokenizer"):
        reward.RewardRecipe(data=[pocket.prompts])
    with pytest.raises(ValidationError, match="leave out model"):
        reward.RewardRecipe(init=pocket.sft, data=[pocket.prompts], model={"dim": 8})


def test_defaults_are_the_papers():
    recipe = reward.RewardRecipe(init="x", data=["y"])
    assert (recipe.batch_size, recipe.epochs, recipe.train.lr) == (512, 1, 1e-5)
    assert (recipe.train.warmup_ratio, recipe.train.warmup_minimum) == (0.03, 5)
    assert (recipe.train.schedule, recipe.train.min_lr_ratio) == ("cosine", 0.1)


def test_scores_do_not_depend_on_neighbours(pocket):
    """What held-out accuracy rests on: packed equals one by one."""
    _, tokenizer = loading.load_llama(pocket.sft)
    model = loading.load_scalar(pocket.helpfulness)
    records = [comparison(name) for name in problem.NAMES[:9]]
    pairs, _ = comparisons.encode(records, tokenizer, 64)
    together, _ = reward.score(model, pairs, 4096)
    apart = np.concatenate([reward.score(model, [pair], 4096)[0] for pair in pairs])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


def test_a_pair_shares_its_earlier_turns(pocket):
    """Answers before the last are no targets: both sides have them in common."""
    _, tokenizer = loading.load_llama(pocket.sft)
    turns = [*problem.messages("helpfulness", "baba"), {"role": "assistant", "content": "yes"}]
    asked = Comparison([*turns, *problem.messages("helpfulness", "lulu")], "of course", "no")
    ((chosen, rejected),), _ = comparisons.encode([asked], tokenizer, 200)
    prompt = len(chat.encode_prompt(tokenizer, asked.prompt))
    assert chosen.trainable.tolist() == [i >= prompt for i in range(len(chosen.tokens))]
    batch = pack_shared([chosen, rejected])
    # The prompt's last token predicts each side's first.
    assert len(batch.tokens) == len(chosen.tokens) + len(rejected.tokens) - (prompt - 1)


@pytest.mark.parametrize("share, expected", [(None, True), (True, True), (False, False)])
def test_a_recipe_says_whether_prompts_are_shared(pocket, tmp_path, monkeypatch, share, expected):
    def stop(run, model, loader, *rest, **settings):
        assert {micro.batch.keys is not None for micro in loader.next()} == {expected}
        raise problem.Killed

    monkeypatch.setattr(reward, "fit", stop)
    recipe = problem.reward_recipe(pocket, "helpfulness", share_prompts=share)
    with pytest.raises(problem.Killed):
        reward.run(recipe, tmp_path / "run")


def test_rewards_have_unit_scale_where_asked(pocket, tmp_path):
    """Over the responses named, wherever a folder's model ranks; its weights stay as they are."""
    write(tmp_path / "few.jsonl", read([pocket.helpfulness_comparisons], "comparison")[:60])
    few = {"data": [tmp_path / "few.jsonl"], "epochs": 1}
    raw = reward.run(problem.reward_recipe(pocket, "helpfulness", **few), tmp_path / "raw")
    assert "normalization" not in (raw / "config.json").read_text()
    for over, which in (("training", 0), ("held_out", 1)):
        recipe = problem.reward_recipe(pocket, "helpfulness", **few, normalize=over)
        folder = reward.run(recipe, tmp_path / over)
        assert problem.weights(folder) == problem.weights(raw)
        model, tokenizer = loading.load_scalar(folder), reward.open_inputs(recipe).tokenizer
        report = json.loads((tmp_path / over / "report.json").read_text())
        assert report["normalization"] == asdict(model.normalization)
        pairs, _ = comparisons.encode(comparisons.split(recipe)[which], tokenizer, 64)
        sequences = [side.tokens.tolist() for pair in pairs for side in pair]
        rewards, _ = RewardModels(model).score(sequences, np.zeros(len(sequences), bool))
        assert rewards.mean() == pytest.approx(0, abs=1e-5)
        assert rewards.std() == pytest.approx(1, abs=1e-5)
        plain = np.stack(reward.score(loading.load_scalar(raw), pairs, 4096), 1).ravel()
        assert np.corrcoef(rewards, plain)[0, 1] == pytest.approx(1)


def test_normalization_of_what_has_no_scale_is_refused(pocket):
    with pytest.raises(ValidationError, match="normalize: a safety model's score says"):
        problem.reward_recipe(pocket, "safety", normalize="training")
    recipe = problem.reward_recipe(pocket, "helpfulness", normalize="held_out", held_out=0)
    with pytest.raises(InputError, match="normalize: there are no held-out comparisons"):
        reward.open_inputs(recipe)
    equal = Normalization.over(torch.full((3,), 0.7))
    assert equal.std == 1 and equal.mean == pytest.approx(0.7)
    for scores in ([], [1.0, torch.nan]):
        with pytest.raises(ValueError, match="expected a finite mean"):
            Normalization.over(torch.tensor(scores))
