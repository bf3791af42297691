"""A study of reward models: trained, found trained, of transformers, a judge; killed, resumed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pocket as problem
import pytest
import torch

from llama2rt import cli
from llama2rt.checkpoint import load, native
from llama2rt.checkpoint.convert import convert
from llama2rt.data.readers import read, write
from llama2rt.data.records import Comparison
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.pipeline import scorers, study
from llama2rt.pipeline.plan import resolve
from llama2rt.pipeline.trainings import recipe_of
from llama2rt.run import Run
from llama2rt.stages import loading, reward
from llama2rt.stages.comparisons import prompt_key

TRAIN = {"lr": 3e-3, "log_every": 5, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory):
    """Held-out comparisons of both kinds, the helpfulness model as transformers reads it, and the
    policy with a context that a judge's question fits into."""
    folder = tmp_path_factory.mktemp("study")
    for kind in ("helpfulness", "safety"):
        write(folder / f"{kind}.jsonl", problem.comparisons(kind, problem.HELD_OUT[:25], 7))
    convert(pocket.helpfulness, folder / "exported", to="hf")
    policy, tokenizer = loading.load_llama(pocket.sft)
    judge = Llama(dataclasses.replace(policy.config, context=512), dtype=torch.float32)
    judge.load_state_dict(policy.state_dict())
    native.save(judge, tokenizer, folder / "judge")
    return folder


def recipe(pocket, files, **settings) -> study.StudyRecipe:
    keys = {
        "init": pocket.sft,
        "data": [pocket.helpfulness_comparisons],
        "validation": [files / "helpfulness.jsonl"],
        "batch_size": 16,
        "epochs": 4,
        "train": TRAIN,
    }
    given = {
        "defaults": {"reward": keys},
        "models": [{"name": "none", "margin": "none"}, {"name": "small", "margin": "small"}],
    }
    return study.StudyRecipe.model_validate(given | settings)


def baselines(pocket, files) -> list[dict]:
    return [
        {"name": "ours", "trained": pocket.helpfulness},
        {"name": "exported", "classifier": files / "exported"},
        {"name": "pairwise", "preference": files / "judge"},
        {"name": "asked", "judge": files / "judge"},
    ]


@pytest.fixture(scope="module")
def whole(pocket, files, tmp_path_factory):
    """A study of everything at once, uninterrupted."""
    settings = recipe(
        pocket,
        files,
        models=[{"name": "small", "margin": "small"}, *baselines(pocket, files)],
        data_limits=[30, 100],
        tests={"helpful": [files / "helpfulness.jsonl"], "safe": [files / "safety.jsonl"]},
        length={
            "policy": pocket.sft,
            "data": [pocket.validation],
            "prompts": 6,
            "samples": 4,
            "temperature": 2.0,
            "sampling": {"max_tokens": 6},
        },
    )
    directory = tmp_path_factory.mktemp("whole") / "run"
    study.run(settings, directory)
    return settings, directory, json.loads((directory / "report.json").read_text())


def test_models_on_the_same_pairs(whole, files):
    _, directory, found = whole
    assert list(found["tests"]) == ["helpful", "safe"]
    models = found["tests"]["helpful"]["models"]
    labels = ["small, 30 comparisons", "small, 100 comparisons"]
    assert list(models) == [*labels, "ours", "exported", "pairwise", "asked"]
    average = {name: of["intervals"][-1]["mean"] for name, of in models.items()}
    # A tenth of the annotators' judgements are coin tosses.
    assert average["small, 100 comparisons"] > 0.85
    rising = [row["mean"] for row in models["small, 100 comparisons"]["intervals"]]
    assert rising[0] > 0.95 > rising[1] and len(rising) == 3
    # Safety wants the opposite where a secret is asked for.
    crossed = found["tests"]["safe"]["models"]["small, 100 comparisons"]
    assert crossed["intervals"][-1]["mean"] < average["small, 100 comparisons"]
    unsafe = [c for c in read(files / "safety.jsonl", "comparison") if c.safety == "chosen_safe"]
    assert crossed["unsafe"]["recall"]["responses"] == len(unsafe)
    curve = found["scaling"]["helpful"]["small"]
    assert [row["comparisons"] for row in curve] == [30, 100]
    assert found["study"]["draw"] == [labels[1], "ours", "exported", "pairwise", "asked"]
    assert found["study"]["trainings"] == 2
    text = (directory / "tables.md").read_text()
    assert "| small, 100 comparisons |" in text and "| exported |" in text
    assert (directory / "report.html").is_file()


def test_an_exported_model_scores_in_transformers_as_here(whole):
    _, directory, found = whole
    ours, exported = (
        json.loads((directory / "scores" / f"{i}-0" / "0.json").read_text())["sums"] for i in (2, 3)
    )
    for side in ("chosen", "rejected"):
        assert exported[side] == pytest.approx(ours[side], abs=2e-4)
    assert found["length"]["models"]["ours"]["mean"] == pytest.approx(
        found["length"]["models"]["exported"]["mean"], abs=2e-3
    )


def test_length_bias_of_what_scores_single_answers(whole):
    _, _, found = whole
    lengths = found["length"]
    assert (lengths["prompts"], lengths["samples"]) == (6, 4)
    assert "asked" not in lengths["models"] and len(lengths["models"]) == 4
    for of in lengths["models"].values():
        defined = [r for r in of["per_prompt"] if r is not None]
        assert len(of["per_prompt"]) == 6 and len(defined) == 6 - of["undefined"]
        assert all(-1 - 1e-9 <= r <= 1 + 1e-9 for r in defined)


def test_killed_and_resumed(whole, tmp_path, monkeypatch):
    """Stopped in the second training, then in the scores."""
    settings, directory, found = whole
    other = tmp_path / "run"
    for owner, name, calls in ((Run, "log", 4), (scorers.Judge, "pairs", 2)):
        with pytest.raises(problem.Killed):
            killed(monkeypatch, owner, name, calls, settings, other)
        assert not (other / "report.json").exists()
    assert len(list(other.glob("scores/*/*.json"))) > 6
    study.run(settings, other, resume=True)
    assert json.loads((other / "report.json").read_text()) == found
    for step in sorted(path.parent for path in directory.glob("*/model")):
        assert problem.weights(step / "model") == problem.weights(other / step.name / "model")
    study.run(settings, other, resume=True)  # which leaves it as it is


def killed(monkeypatch, owner, name, calls, settings, directory):
    """Begin, or go on, until `owner.name` is called for the `calls`-th time."""
    original, left = getattr(owner, name), iter(range(calls - 1))

    def counted(*args, **kwargs):
        if next(left, None) is None:
            raise problem.Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        study.run(settings, directory, resume=True)


def test_further_seeds_make_a_study_longer(pocket, files, tmp_path):
    models = [{"name": "small"}]
    once = recipe(pocket, files, models=models)
    study.run(once, tmp_path / "run")
    first = problem.weights(tmp_path / "run" / "small-seed-0" / "model")
    more = [*models, {"name": "ours", "trained": pocket.helpfulness}]
    study.run(recipe(pocket, files, models=more, seeds=[0, 1]), tmp_path / "run", resume=True)
    assert problem.weights(tmp_path / "run" / "small-seed-0" / "model") == first
    assert problem.weights(tmp_path / "run" / "small-seed-1" / "model") != first
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    row = report["tests"]["helpfulness"]["models"]["small"]["intervals"][-1]
    assert len(row["by_seed"]) == 2 and row["mean"] == pytest.approx(sum(row["by_seed"]) / 2)
    with pytest.raises(InputError, match=r"started with models\.1\.name"):
        study.run(once, tmp_path / "run", resume=True)


def test_amounts_of_data_lie_within_each_other(pocket, files):
    def trained_on(limit):
        settings = recipe(pocket, files, data_limits=[limit] if limit else [])
        inputs = reward.open_inputs(settings.trainings()[0].recipe)
        return {prompt_key(comparison) for comparison in inputs.comparisons}

    few, more, every = trained_on(20), trained_on(50), trained_on(None)
    assert len(few) >= 10 and few < more < every


def test_pairs_whose_prompts_a_model_is_trained_on_are_left_out(pocket, files, tmp_path):
    seen = read(pocket.helpfulness_comparisons, "comparison")[:6]
    new = read(files / "helpfulness.jsonl", "comparison")[:10]
    write(tmp_path / "mixed.jsonl", [*seen, *new])
    settings = recipe(pocket, files, tests={"mixed": [tmp_path / "mixed.jsonl"]})
    plan = resolve(study.steps(settings), tmp_path)
    inputs = study.open_inputs(settings, plan)
    assert inputs.tests == {"mixed": new} and inputs.left_out == {"mixed": 6}
    settings = recipe(pocket, files, tests={"seen": [pocket.helpfulness_comparisons]})
    with pytest.raises(InputError, match="tests: seen: a model is trained on the prompts of all"):
        study.open_inputs(settings, plan)


def test_kinds_are_tested_apart(pocket, files, tmp_path):
    both = [
        *read(files / "helpfulness.jsonl", "comparison"),
        *read(files / "safety.jsonl", "comparison"),
    ]
    write(tmp_path / "both.jsonl", both)
    settings = recipe(pocket, files, tests={"both": [tmp_path / "both.jsonl"]})
    tests = study.open_inputs(settings, []).tests
    assert list(tests) == ["both, helpfulness", "both, safety"]


def test_like_an_earlier_run(pocket, files, tmp_path, monkeypatch, capsys):
    """Its recipe with paths as they were then, from another folder."""
    monkeypatch.chdir(files)
    earlier = problem.reward_recipe(
        pocket, "helpfulness", data=[Path("helpfulness.jsonl")], epochs=1, previous=pocket.safety
    )
    Run.open(Path("earlier"), earlier)
    monkeypatch.chdir(tmp_path)
    keys = recipe_of(files / "earlier")
    assert keys["data"] == [str(files / "helpfulness.jsonl")] and "previous" not in keys
    mix = [{"path": "helpfulness.jsonl"}, {"path": "safety.jsonl", "share": 0.1}]
    given = earlier.model_dump(mode="json", exclude={"data", "held_out"}) | {"sources": mix}
    mixed = type(earlier).model_validate(given)
    monkeypatch.chdir(files)
    Run.open(Path("mixed"), mixed)
    monkeypatch.chdir(tmp_path)
    paths = [str(files / source["path"]) for source in mix]
    found = type(mixed).model_validate(recipe_of(files / "mixed")).sources
    assert [str(source.path) for source in found] == paths
    tests = {"safe": [str(files / "safety.jsonl")]}
    found = study.StudyRecipe.model_validate(
        {
            "like": files / "earlier",
            "models": [{"name": "a"}, {"name": "b", "model": {"dim": 16, "layers": 1, "heads": 2}}],
            "tests": tests,
        }
    )
    a, b = (training.recipe for training in found.trainings())
    assert (a.init, a.epochs, a.seed) == (pocket.sft, 1, 0)
    assert (b.init, b.tokenizer, b.model.dim) == (None, pocket.sft, 16)
    command = ["study", "study-margins", "--like", str(files / "earlier"), "--dry-run", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)  # that run's recipe holds out part of its data, and names no test
    assert ended.value.code == 2 and "tests: no held-out comparisons" in capsys.readouterr().err


def test_a_dry_run_says_how_many_trainings(pocket, files, capsys, tmp_path, monkeypatch):
    import tomli_w

    monkeypatch.chdir(tmp_path)
    settings = recipe(pocket, files).model_dump(mode="json", exclude_none=True)
    Path("study.toml").write_text(tomli_w.dumps(settings))
    cli.main(["study", "study.toml", "--data-limits", "20", "40", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("study: 4 steps, ")
    assert any(line.startswith("small-40-seed-0") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_shipped_studies_are_valid():
    for name, models in (("margins", 3), ("safety-loss", 2), ("scaling", 3)):
        values = cli.read_recipe(cli.find_recipe(f"study-{name}"))
        assert len(study.StudyRecipe.model_validate(values).models) == models


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"models": []}, "models: name at least one"),
        ({"models": [{"name": "a"}, {"name": "A"}]}, "models: 'a' is taken"),
        ({"models": [{"name": "scores"}]}, "expected the name of a folder of its own"),
        ({"models": [{"name": "a", "margins": "none"}]}, "margins"),
        ({"models": [{"name": "a", "seed": 1}]}, "models: a: seed: seeds of the study says it"),
        ({"models": [{"name": "a", "mixed_in_share": 2.0}]}, "mixed_in_share"),
        ({"models": [{"name": "a", "judge": "m", "margin": "none"}]}, "so margin says nothing"),
        ({"seeds": [1, 1]}, "seeds: one stands there twice"),
        ({"defaults": {"sft": {}}}, "a study runs the reward stage alone"),
        ({"length": {"prompts": 3, "policy": "m"}}, "policy and data"),
        ({"like": Path("nowhere")}, "like: nowhere: no run directory"),
    ],
)
def test_studies_that_cannot_be(pocket, files, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        study.run(recipe(pocket, files, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_baselines_are_checked_before_anything_is_trained(pocket, files, tmp_path):
    headless = tmp_path / "headless"
    convert(pocket.sft, headless, to="hf")
    many = tmp_path / "many"
    shutil.copytree(files / "exported", many)
    config = json.loads((many / "config.json").read_text())
    config["id2label"] = {str(i): str(i) for i in range(3)}
    config.pop("num_labels", None)
    (many / "config.json").write_text(json.dumps(config))
    for key, folder, message in [
        ("trained", pocket.sft, "a: trained: .*expected a reward model"),
        ("judge", pocket.safety, "a: judge: .*expected a language model"),
        ("classifier", headless, "expected a model for sequence classification"),
        ("classifier", many, "expected one output"),
        ("classifier", tmp_path, "transformers cannot read it"),
    ]:
        settings = recipe(pocket, files, models=[{"name": "x"}, {"name": "a", key: folder}])
        with pytest.raises(InputError, match=message):
            study.run(settings, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_head_that_is_not_in_the_folder_is_not_drawn_at_random(files, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(files / "exported", tmp_path / "m")
    (weights,) = (tmp_path / "m").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "score" not in k}, weights, {"format": "pt"})
    model = scorers.Classifier(tmp_path / "m", 1024)
    model.check()
    with pytest.raises(InputError, match=r"lacks weights: score\.weight"):
        model.answers([(problem.messages("helpfulness", "baba"), "yes")])


def test_what_cannot_be_read_is_not_a_number(pocket):
    model = scorers.RewardModel(pocket.helpfulness, 1024)
    asked = problem.messages("helpfulness", "baba")
    context = load(pocket.helpfulness, "meta")[0].config.context
    found = model.answers([(asked, "yes"), (asked, "yes " * context)])
    assert found[0] == found[0] and found[1] != found[1]
    with pytest.raises(InputError, match="cannot read any of 1"):
        model.answers([(asked, "yes " * context)])
    judge = scorers.Judge(pocket.sft, 1024)
    pair = Comparison(asked, "yes", "no " * context)
    with pytest.raises(InputError, match="cannot read any of 1"):
        judge.pairs([pair])
