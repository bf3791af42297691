"""The preference stage: what is learned, in which order, on which blocks; and that it ranks for
rejection sampling, online DPO and annotation."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import json_lines
import numpy as np
import pocket as problem
import pytest

from llama2rt.annotate.options import AnnotatorOptions
from llama2rt.annotate.pairs import AnswerPair
from llama2rt.checkpoint import load, native
from llama2rt.data.loader import BlockLoader
from llama2rt.data.mixture import Account
from llama2rt.data.packing import Example
from llama2rt.data.readers import write
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.rollout import pairwise
from llama2rt.rollout.pairwise import Letters, PairwiseModel
from llama2rt.rollout.responses import read_responses
from llama2rt.rollout.reward import RewardOptions
from llama2rt.stages import dpo, ppo, preference, rejection
from llama2rt.stages.loading import Future, Outline
from llama2rt.stages.selection import BEST
from llama2rt.text import Tokenizer

CONTEXT = 96


@dataclass(frozen=True)
class Base:
    """What the preference models of these tests start from."""

    chat: Path
    comparisons: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with room for two answers, and a tokenizer that knows the layout: not the policy's,
    as this model reads text."""

    class Plain:
        template_tokens: ClassVar[dict] = {}

    texts = (
        f"[INST] {pairwise.question(Plain(), problem.messages(kind, name), *order).strip()} [/INST]"
        f" {letter} "
        for kind, answers in problem.ANSWERS.items()
        for name in problem.NAMES
        for order in itertools.product(answers, repeat=2)
        for letter in "AB"
    )
    folder = tmp_path_factory.mktemp("preference")
    tokenizer = Tokenizer.train(texts, 420, folder / "tokenizer")
    config = LlamaConfig(32, 2, 4, 4, 64, vocab_size=tokenizer.vocab_size, context=CONTEXT)
    native.save(Llama(config).initialize(0), tokenizer, folder / "chat")
    sure = [
        comparison
        for comparison in problem.comparisons("helpfulness", problem.NAMES, 0)
        if comparison.rating == "significantly_better"
    ]
    write(folder / "comparisons.jsonl", sure)
    return Base(folder / "chat", folder / "comparisons.jsonl")


def recipe(base: Base, **settings) -> preference.PreferenceRecipe:
    given = {
        "init": base.chat,
        "data": [base.comparisons],
        "held_out": 30,
        "block_tokens": 256,
        "batch_size": 2,
        "epochs": 20,
        "train": {"lr": 1e-2, "weight_decay": 0.0, "checkpoint_every": 0, "log_every": 20},
    }
    return preference.PreferenceRecipe(**(given | settings))


@pytest.fixture(scope="module")
def trained(base):
    directory = base.chat.parent / "run"
    preference.run(recipe(base), directory)
    return directory


def test_it_learns_what_people_prefer_in_either_order(trained):
    report = json.loads((trained / "report.json").read_text())
    sure = report["accuracy"]["significantly_better"]
    assert sure > 0.9, report["accuracy"]
    bias = report["position_bias"]
    assert 0.4 < bias["first"]["mean"] < 0.6
    assert bias["flipped"]["mean"] < 0.2
    assert report["calibration"]["pairs"] == bias["pairs"] >= 20
    page = (trained / "report.html").read_text()
    assert "Position bias" in page and "the two orders say opposite things" in page


def test_the_letter_alone_is_learned_and_orders_are_drawn(base):
    inputs = preference.open_inputs(recipe(base))
    letters = Letters.of(inputs.tokenizer)
    learned = [example.tokens[example.trainable].tolist() for example in inputs.training]
    assert {tuple(tokens) for tokens in learned} == {(letters.first,), (letters.second,)}
    assert all(example.trainable[-1] for example in inputs.training)
    share = np.mean([tokens == [letters.first] for tokens in learned])
    assert 0.3 < share < 0.7
    text = inputs.tokenizer.decode(inputs.training[0].tokens[:-1])
    first, second = text.split("[RESPONSE A] ")[1].split(" [/INST]")[0].split(" [RESPONSE B] ")
    training, _ = preference.split(recipe(base), inputs.tokenizer, Counter(), Account())
    by_text = {(c.chosen, c.rejected) for c in training}
    pair = (first, second) if learned[0] == [letters.first] else (second, first)
    assert pair in by_text
    again, other = (preference.open_inputs(recipe(base, seed=seed)).training for seed in (0, 1))
    assert [e.tokens.tolist() for e in again] == [e.tokens.tolist() for e in inputs.training]
    assert [e.tokens.tolist() for e in other] != [e.tokens.tolist() for e in inputs.training]


def test_a_prompt_that_is_held_out_is_not_trained_on(base, tmp_path):
    lines = base.comparisons.read_text().splitlines(True)
    (tmp_path / "validation.jsonl").write_text(lines[0])
    inputs = preference.open_inputs(recipe(base, validation=[tmp_path / "validation.jsonl"]))
    assert inputs.left_out["data: comparisons of held-out prompts"] >= 1
    assert len(inputs.training) < len(lines) and len(inputs.held_out) == 1


def test_what_went_in_is_kept_and_filters_apply(base, tmp_path):
    """Twice the same file: by source in the manifest, a duplicate counted by its filter."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text(base.comparisons.read_text())
    given = recipe(base, data=[base.comparisons, copy], filters={"duplicates": True}, held_out=3)
    inputs = preference.open_inputs(given)
    report = inputs.account.report()
    first, second = report["composition"]
    count = len(copy.read_text().splitlines())
    assert first["used"] == len(inputs.training) > 0 and second["used"] == 0
    assert report["filters"]["duplicates"]["removed"] == second["left_out"]["filtered"] == count


def test_blocks_are_full_and_every_example_comes_once():
    examples = [Example.of(np.full(n, i)) for i, n in enumerate([5, 9, 30, 7, 7, 12, 3, 20])]
    loader = BlockLoader(examples, 32, 2, 16, seed=3)
    steps = [loader.next() for _ in range(loader.steps_per_epoch)]
    seen = [int(b.tokens[at]) for step in steps for b in step for at in b.cu_seqlens[:-1].tolist()]
    assert sorted(seen) == list(range(8))
    # A step is two blocks, and passes in micro-batches of its own.
    tokens = [sum(len(b.tokens) for b in step) for step in steps]
    assert max(tokens) <= 64 and len(steps) > 1
    assert all(len(b.tokens) <= 16 or b.documents == 1 for step in steps for b in step)
    resumed = BlockLoader(examples, 32, 2, 16, seed=3)
    resumed.load_state_dict(loader.state_dict())
    assert [b.tokens.tolist() for b in resumed.next()] == [b.tokens.tolist() for b in loader.next()]
    with pytest.raises(InputError, match="cannot resume: "):
        BlockLoader(examples, 48, 2, 16, seed=3).load_state_dict(loader.state_dict())


def test_killed_it_resumes_to_the_same_bits(base, tmp_path, monkeypatch):
    from llama2rt.train.optimizer import Optimizer

    short = recipe(base, epochs=2, held_out=0, train={"lr": 1e-3, "checkpoint_every": 2})
    whole = preference.run(short, tmp_path / "whole")
    killed = problem.killed_and_resumed(
        monkeypatch, Optimizer, "step", 4, preference.run, short, tmp_path / "killed"
    )
    assert problem.weights(whole) == problem.weights(killed)


def test_what_does_not_fit_is_said_before_weights_are_loaded(
    pocket, base, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(preference, "chat_model", None)
    rows = json_lines.read(base.comparisons)
    rows[0]["chosen"] = "yes " * 90
    json_lines.write(tmp_path / "long.jsonl", rows)
    inputs = preference.open_inputs(recipe(base, data=[tmp_path / "long.jsonl"], held_out=0))
    assert inputs.left_out["data: comparisons longer than 96 tokens"] == 1
    assert "1 comparisons longer than 96 tokens left out" in caplog.text
    with pytest.raises(InputError, match=r"block_tokens: all .* are longer than 20 tokens"):
        preference.open_inputs(recipe(base, block_tokens=20))
    with pytest.raises(InputError, match="expected a language model, found a reward model"):
        preference.open_inputs(recipe(base, init=pocket.helpfulness))
    with pytest.raises(ValueError, match="only sources of data, without validation"):
        recipe(base, validation=[{"path": "a.jsonl", "held_out": 3}])
    # Comparisons that a plan's earlier step is to collect: the model alone is checked.
    later = tmp_path / "collected.jsonl"
    future = Future(files={later})
    inputs = preference.open_inputs(recipe(base, data=[later]), future)
    assert inputs.training == [] and inputs.result.config.context == CONTEXT
    with pytest.raises(InputError, match="no such file, and no earlier step leaves it"):
        preference.open_inputs(recipe(base, data=[tmp_path / "no.jsonl"]), future)


def rollout(pocket, trained, **settings):
    given = {
        "init": pocket.sft,
        "rewards.preference": trained / "model",
        "data": [pocket.prompts],
        "samples": 4,
        "sampling.max_tokens": 6,
        "epochs": 1,
        "train": {"lr": 1e-3, "checkpoint_every": 0},
    }
    return problem.tables(given | settings)


@pytest.fixture(scope="module")
def sampled(pocket, trained, tmp_path_factory):
    """An iteration of online DPO without any reward model."""
    directory = tmp_path_factory.mktemp("ranked") / "dpo"
    given = rollout(pocket, trained, iterations=1, prompts_per_iteration=30, batch_size=16)
    dpo.run(dpo.DpoRecipe(**given), directory)
    return directory


def test_online_dpo_pairs_the_best_with_the_worst_by_win_rate(pocket, trained, sampled):
    folder = sampled / "iteration-1"
    responses = read_responses(folder / "samples" / "part-00000.jsonl")
    model, tokenizer = load(trained / "model")
    judge = PairwiseModel(model, tokenizer)
    groups = [responses[i : i + 4] for i in range(0, len(responses), 4)]
    best = {}
    for group in groups:
        texts = [r.text for r in group]
        others = [(group[0].prompt.messages, a, b) for a in texts for b in texts]
        table = judge.first_wins(others).reshape(4, 4)
        expected = (table.sum(axis=1) - 0.5) / 3
        assert [r.scores["preference"] for r in group] == pytest.approx(expected, abs=1e-5)
        rewards = [r.reward for r in group]
        assert np.allclose(rewards, np.log(expected / (1 - expected)), atol=1e-3)
        if max(rewards) > min(rewards):
            best[group[0].prompt.messages[0]["content"]] = (
                {t for t, x in zip(texts, expected, strict=True) if x > max(expected) - 1e-6},
                {t for t, x in zip(texts, expected, strict=True) if x < min(expected) + 1e-6},
            )
    pairs = json_lines.read(folder / "pairs.jsonl")
    assert len(pairs) > 10
    for row in pairs:
        chosen, rejected = best[row["prompt"][0]["content"]]
        assert row["chosen"] in chosen and row["rejected"] in rejected
    report = json.loads((folder / "report.json").read_text())
    assert 0 < report["score/preference"] < 1


def test_rejection_sampling_by_tournament_and_pooling(pocket, trained, tmp_path):
    given = rollout(pocket, trained, policy=pocket.sft, **{"rewards.ranking": "tournament"})
    first, second = tmp_path / "v1", tmp_path / "v2"
    rejection.run(rejection.RejectionRecipe(**given), first)
    samples = read_responses(first / "samples" / "part-00000.jsonl")
    found = {tuple(sorted(r.scores["preference"] for r in samples[:4]))}
    # Four answers: three rounds of wins and losses in all, the best and the worst alone.
    (standings,) = found
    assert len(set(standings)) >= 3 and standings[0] < standings[1] and standings[2] < standings[3]
    again = {**given, "samples": 1, "seed": 5, "earlier": [first]}
    rejection.run(rejection.RejectionRecipe(**again), second)
    pooled = read_responses(second / "samples" / BEST)
    assert len({repr(r.prompt.messages) for r in pooled}) == len(pooled)
    earlier = {repr(r.prompt.messages): r for r in read_responses(first / "samples" / "best.jsonl")}
    own = {
        repr(r.prompt.messages): r
        for r in read_responses(second / "samples" / "part-00000.jsonl")
        if r.finished and r.text
    }
    model, tokenizer = load(trained / "model")
    judge = PairwiseModel(model, tokenizer)
    for kept in pooled[:20]:
        key = repr(kept.prompt.messages)
        if key in own and key in earlier:
            mine, theirs = own[key].text, earlier[key].text
            (better,) = judge.first_wins([(kept.prompt.messages, mine, theirs)])
            assert kept.text == (mine if better >= 0.5 else theirs)


def test_recipes_that_cannot_rank_so_are_refused(pocket, base, trained, tmp_path):
    def refused(said, **settings):
        with pytest.raises(ValueError, match=said):
            dpo.DpoRecipe(**rollout(pocket, trained, **settings))

    refused("give rewards.helpfulness or rewards.preference", **{"rewards.preference": None})
    refused("preference ranks alone", **{"rewards.safety": pocket.safety})
    refused("held-out answers have nothing to be compared with", validation=[pocket.validation])
    refused("tournament's standings", **{"rewards.ranking": "tournament", "length_penalty": 0.1})
    with pytest.raises(ValueError, match="ranking: only with preference"):
        RewardOptions(helpfulness=pocket.helpfulness, ranking="tournament")
    both = {"helpfulness": pocket.helpfulness, "preference": trained / "model"}
    with pytest.raises(ValueError, match="here each is scored by itself"):
        ppo.PpoRecipe(init=pocket.sft, data=[pocket.prompts], rewards=both)
    # Beside a reward model, which measures, it ranks.
    dpo.DpoRecipe(
        **rollout(
            pocket,
            trained,
            validation=[pocket.validation],
            **{"rewards.helpfulness": pocket.helpfulness},
        )
    )
    for settings, said in (
        ({"sampling.max_tokens": 40}, r"rewards\.preference: .* no room for the longest prompt"),
        ({"rewards.preference": pocket.safety}, "expected a language model that compares"),
    ):
        with pytest.raises(InputError, match=said):
            dpo.open_inputs(dpo.DpoRecipe(**rollout(pocket, trained, **settings)))
    # One that an earlier step of a plan is to leave.
    to_come = tmp_path / "to-come"
    _, tokenizer = load(base.chat, "meta")
    config = load(base.chat, "meta")[0].config
    future = Future(models={to_come: Outline(config, tokenizer)})
    later = dpo.DpoRecipe(**rollout(pocket, trained, **{"rewards.preference": to_come}))
    assert dpo.open_inputs(later, future).prompts


def test_it_annotates(pocket, trained):
    options = AnnotatorOptions(preference=trained / "model")
    options.check(longest=30)
    with pytest.raises(InputError, match=r"annotator\.preference: .* its context of 96"):
        options.check(longest=CONTEXT + 1)
    annotator = options.annotator(trained / "pairs.jsonl", "cpu")
    prompts = [Prompt(name, problem.messages("helpfulness", name)) for name in problem.HELD_OUT]
    pairs = [AnswerPair(p.id, p, *("yes", "no")[:: 1 - 2 * (i % 2)]) for i, p in enumerate(prompts)]
    pairs.append(AnswerPair("long", prompts[0], "yes", "no " * 90))
    *said, undecided = annotator(pairs, "0")
    assert undecided is None
    right = [j.chosen == ("first" if i % 2 == 0 else "second") for i, j in enumerate(said)]
    assert np.mean(right) > 0.9
    with pytest.raises(ValueError, match=r"give one of files, .*, or preference"):
        AnnotatorOptions(preference=trained, judge=trained)


def test_the_shipped_recipes_are_valid():
    from llama2rt.cli import find_recipe, read_recipe

    for name in ("preference-gsm8k", "llama2-7b-preference"):
        found = preference.PreferenceRecipe.model_validate(read_recipe(find_recipe(name)))
        assert found.parallel is not None
    defaults = preference.PreferenceRecipe(init="m", data=["d"])
    # arXiv 2405.07863, section 2.
    assert (defaults.block_tokens, defaults.batch_size, defaults.epochs) == (3072, 128, 1)
    assert (defaults.train.lr, defaults.train.schedule) == (5e-6, "cosine")
