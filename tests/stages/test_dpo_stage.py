"""Online DPO: best against worst, pi0 fixed, margins grow, it resumes to the bit."""

import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pocket as problem
import pytest
import torch
from pocket import response
from pydantic import ValidationError

from llama2rt.algorithms import losses
from llama2rt.checkpoint import native
from llama2rt.data.packing import pack, pack_pairs
from llama2rt.data.readers import read
from llama2rt.data.shared import pack_shared
from llama2rt.rollout import sampling
from llama2rt.rollout.logprobs import response_logprobs
from llama2rt.rollout.responses import read_responses, response_example
from llama2rt.run import Run
from llama2rt.stages import direct, dpo, history, loading, pairs
from llama2rt.stages.history import History


def recipe(pocket, **settings) -> dpo.DpoRecipe:
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "iterations": 2,
        "prompts_per_iteration": 60,
        "samples": 4,
        "sampling.max_tokens": 8,
        "batch_size": 16,
        "train": {"lr": 1e-3, "checkpoint_every": 3},
    }
    return dpo.DpoRecipe(**problem.tables(given | settings))


@pytest.fixture(scope="module")
def finished(pocket, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dpo") / "run"
    dpo.run(recipe(pocket), directory)
    return directory


def test_margin_grows_and_answers_improve_on_unseen_prompts(finished):
    lines = [
        line
        for i in (1, 2)
        for line in problem.metrics(finished / f"iteration-{i}")
        if "margin" in line
    ]
    assert lines[0]["margin"] == pytest.approx(0.0, abs=1e-4)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    margins = [line["margin"] for line in lines]
    assert np.mean(margins[-4:]) > np.mean(margins[:4]) + 0.1
    assert lines[-1]["accuracy"] > 0.8
    shares = []
    for path in ("iteration-1/samples/part-00000.jsonl", "iteration-2/samples/held_out.jsonl"):
        responses = read_responses(finished / path)
        shares.append(np.mean([problem.correct(r.prompt.kind, r.text) for r in responses]))
    assert shares[1] > shares[0] + 0.1


def test_each_iteration_samples_from_the_one_before_and_all_prompts_come(pocket, finished):
    first, second = (
        read_responses(finished / f"iteration-{i}" / "samples" / "part-00000.jsonl") for i in (1, 2)
    )
    assert {r.policy for r in first} == {str(pocket.sft)}
    assert {r.policy for r in second} == {str(finished / "iteration-1" / "model")}
    assert len({r.prompt.id for r in first + second}) == 100
    assert [r.temperature for r in first[:4]] == [1.0, 1.0, 0.7, 0.7]
    assert len({r.prompt.id for r in first[:4]}) == 1
    assert problem.weights(finished / "model") == problem.weights(
        finished / "iteration-2" / "model"
    )


@pytest.mark.parametrize("named", [False, True], ids=["init", "another"])
def test_the_reference_is_pi0_in_every_iteration(pocket, tmp_path, monkeypatch, named):
    """The second iteration's reference values are pi0's, for old and new pairs: those of the model
    it starts from, or of the one that the recipe names."""
    seen = []
    loader = direct.PairLoader

    def remember(pairs, extras, *rest, **share):
        seen.append((pairs, {name: value.copy() for name, value in extras.items()}))
        found = loader(pairs, extras, *rest, **share)
        assert {micro.batch.keys is None for micro in found.next()} == {named}
        return loader(pairs, extras, *rest, **share)

    monkeypatch.setattr(direct, "PairLoader", remember)
    settings = {"prompts_per_iteration": 12, "epochs": 1, "validation": []}
    if named:
        parent, tokenizer = loading.load_llama(pocket.sft)
        with torch.no_grad():
            parent.output.weight.mul_(1.1)
        native.save(parent, tokenizer, tmp_path / "parent")
        settings |= {"init": tmp_path / "parent", "reference": pocket.sft}
    settings |= {"share_prompts": False} if named else {}
    dpo.run(recipe(pocket, **settings), tmp_path / "run")
    pi0, _ = loading.load_llama(pocket.sft)
    (first, _), (second, extras) = seen
    assert len(second) > len(first)
    for old, kept in zip(first, second, strict=False):
        assert np.array_equal(old[0].tokens, kept[0].tokens)
    for side, name in enumerate(("reference_chosen", "reference_rejected")):
        for pair, value in zip(second, extras[name], strict=True):
            logprob, _ = response_logprobs(pi0, [pair[side]], 1.0, 4096)
            assert float(logprob.sum()) == pytest.approx(value, abs=1e-3)


def test_pairs_are_comparison_records(finished):
    for i in (1, 2):
        folder = finished / f"iteration-{i}"
        records = read(folder / "pairs.jsonl", "comparison")
        report = json.loads((folder / "report.json").read_text())
        assert len(records) == report["new_pairs"] > 10
        sampled = read_responses(folder / "samples" / "part-00000.jsonl")
        rewards = {(r.prompt.messages[0]["content"], r.text): r.reward for r in sampled}
        kinds = {r.prompt.messages[0]["content"]: r.prompt.kind for r in sampled}
        for record in records:
            asked = record.prompt[0]["content"]
            assert rewards[asked, record.chosen] > rewards[asked, record.rejected]
            assert record.kind == kinds[asked]


def test_a_pair_that_no_record_can_hold_is_left_out_and_counted(tmp_path, caplog):
    good = (response("yes"), response("no"))
    pairs.write_pairs(tmp_path / "pairs.jsonl", [good, (response("yes"), response("n\0o"))])
    assert [r.rejected for r in read(tmp_path / "pairs.jsonl", "comparison")] == ["no"]
    assert "1 pairs left out that no record can hold" in caplog.text


def test_sampling_leaves_its_memory_and_a_resumed_run_needs_no_reference(
    pocket, tmp_path, monkeypatch
):
    settings = recipe(pocket, iterations=1, prompts_per_iteration=12, epochs=1, validation=[])
    sampled_with = []

    class Watched(sampling.Engine):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            sampled_with.extend([weakref.ref(model), weakref.ref(self)])

    def killed(*args, **kwargs):
        gc.collect()
        assert sampled_with and all(held() is None for held in sampled_with)
        raise problem.Killed

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "Engine", Watched)
        patch.setattr(dpo, "fit", killed)
        with pytest.raises(problem.Killed):
            dpo.run(settings, tmp_path / "run")
    monkeypatch.setattr(direct, "reference_sums", lambda *_: pytest.fail("computed again"))
    dpo.run(settings, tmp_path / "run", resume=True)


def test_kept_sums_are_of_their_source_and_whole(tmp_path, caplog):
    path = tmp_path / "sums.json"
    numbers = {"a": np.float32([0.1, -3e-38, 1 / 3]), "b": np.float32([-7.25, 1e9, 2])}
    calls = []

    def compute():
        calls.append(1)
        return numbers

    for _ in range(2):
        for name, values in pairs.kept_sums(path, ["pi0", [1, 2]], compute).items():
            assert values.dtype == np.float32 and np.array_equal(values, numbers[name])
    assert len(calls) == 1 and not caplog.text
    pairs.kept_sums(path, ["another pi0", [1, 2]], compute)
    assert len(calls) == 2 and "of another reference, other pairs or another loss" in caplog.text
    text = path.read_text()
    for damaged in (text[:-9], text.replace("-7.25", "-7.5"), "[]", "{}", ""):
        path.write_text(damaged)
        caplog.clear()
        pairs.kept_sums(path, ["another pi0", [1, 2]], compute)
        assert "damaged" in caplog.text
        assert path.read_text() == text
    assert len(calls) == 7


def test_more_iterations_go_on_from_those_there_are(pocket, tmp_path):
    small = {"prompts_per_iteration": 12, "epochs": 1, "validation": []}
    whole = dpo.run(recipe(pocket, iterations=2, **small), tmp_path / "whole")
    dpo.run(recipe(pocket, iterations=1, **small), tmp_path / "run")
    begun = problem.weights(tmp_path / "run" / "iteration-1" / "model")
    longer = dpo.run(recipe(pocket, iterations=2, **small), tmp_path / "run", resume=True)
    assert problem.weights(longer) == problem.weights(whole) != begun
    assert problem.weights(tmp_path / "run" / "iteration-1" / "model") == begun


def test_best_against_worst():
    groups = [
        [response("good", 3.0), response("bad", -1.0), response("fair", 0.0)],
        [response("same", 1.0), response("same", 1.0)],
        [response("", 5.0, tokens=(2,)), response("bad", -1.0), response("", -5.0, tokens=(2,))],
        [response("", 5.0, tokens=(2,)), response("bad", -1.0), response("fair", 0.0)],
        [response("a", 1.0), response("b", 1.0)],
    ]
    found = history.best_against_worst(groups, 0.0)
    assert [(a.text, b.text) for a, b in found] == [("good", "bad"), ("fair", "bad")]


def test_length_penalty_is_per_character():
    groups = [[response("short", 1.0), response("a long answer", 1.5)]]
    assert history.best_against_worst(groups, 0.0)[0][0].text == "a long answer"
    assert history.best_against_worst(groups, 0.1)[0][0].text == "short"


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "nca", "robust", "exo", "simpo", "orpo"])
def test_objective_equals_one_response_at_a_time(pocket, tmp_path, kind):
    """Sums or averages over response tokens only, whatever the lengths, cut responses included."""
    model, _ = loading.load_llama(pocket.sft)
    reference, _ = loading.load_llama(pocket.sft)
    with torch.no_grad():
        model.output.weight.mul_(1.1)
    pairs = [
        (response("x", 1.0, tokens=(9, 10, 11, 12, 2)), response("y", 0.0, tokens=(13, 2))),
        (
            response("z", 1.0, tokens=(14, 2)),
            response("w", 0.0, tokens=(15, 16, 17, 18, 19, 20, 21, 22)),
        ),
    ]
    extra = {"label_smoothing": 0.1} if kind in ("robust", "exo") else {}
    extra |= {"gamma": 0.5} if kind == "simpo" else {}
    settings = recipe(pocket, kind=kind, **extra)
    examples = [tuple(response_example(side) for side in pair) for pair in pairs]
    past = direct.with_reference(
        settings, History(examples), SimpleNamespace(reference=reference), "", tmp_path / "sums"
    )
    assert (past.extras == {}) == (kind in losses.REFERENCE_FREE)
    extras = {}
    if past.extras:
        sums = past.extras["reference"].reshape(-1, 2).T
        extras = dict(zip(("reference_chosen", "reference_rejected"), sums, strict=True))
    assert pack_shared([side for pair in examples for side in pair]).keys is not None

    def alone(llama, side):
        logprob, _ = response_logprobs(llama, [response_example(side)], 1.0, 4096)
        assert len(logprob) == len(side.tokens)
        return logprob.mean() if kind in losses.AVERAGED else logprob.sum()

    policy = [torch.stack([alone(model, pair[i]) for pair in pairs]) for i in (0, 1)]
    base = [torch.stack([alone(reference, pair[i]) for pair in pairs]) for i in (0, 1)]
    expected = losses.preference(*policy, *base, kind=kind, beta=0.1, **extra).sum()
    for packed in (pack, pack_shared):
        batch = pack_pairs(examples, extras, packed)
        loss, metrics = direct.loss(settings)(model, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        chosen = metrics["chosen_logprob"]
        torch.testing.assert_close(chosen, policy[0].sum(), rtol=1e-4, atol=1e-4)


def short(pocket) -> dpo.DpoRecipe:
    train = {"lr": 1e-3, "checkpoint_every": 2}
    return recipe(pocket, prompts_per_iteration=20, batch_size=8, train=train)


@pytest.fixture(scope="module")
def whole(pocket, tmp_path_factory):
    """A short run that nobody stopped."""
    return dpo.run(short(pocket), tmp_path_factory.mktemp("whole") / "run").parent


@pytest.mark.parametrize("calls", [3, 8])
def test_resumed_equals_uninterrupted(pocket, whole, tmp_path, monkeypatch, calls):
    killed = tmp_path / "run"
    resumed = problem.killed_and_resumed(
        monkeypatch, Run, "log", calls, dpo.run, short(pocket), killed
    )
    assert problem.weights(whole / "model") == problem.weights(resumed)
    for folder in ("", "iteration-1", "iteration-2"):
        assert problem.metrics(whole / folder) == problem.metrics(killed / folder)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"samples": 3}, "no multiple of the 2 temperatures"),
        ({"temperatures": [1.0, 1.0]}, "temperatures: expected different ones"),
        ({"temperatures": [1.0, 0.0]}, "greater than 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"kind": "exo"}, "label_smoothing"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"gamma": 1.0}, "gamma"),
        ({"kind": "slic"}, "kind"),
    ],
)
def test_impossible_settings_are_refused_with_the_recipe(pocket, settings, named):
    with pytest.raises(ValidationError, match=named):
        recipe(pocket, **settings)


def test_defaults_are_the_papers():
    settings = dpo.DpoRecipe(init="x", rewards={"helpfulness": "y"}, data=["z"])
    assert (settings.iterations, settings.prompts_per_iteration) == (3, 20_000)
    assert (settings.samples, settings.temperatures) == (8, [1.0, 0.7])
    assert (settings.beta, settings.batch_size, settings.epochs) == (0.1, 128, 2)
    assert (settings.train.lr, settings.train.warmup_ratio) == (5e-7, 0.03)
    assert json.loads(settings.model_dump_json())["kind"] == "dpo"
