"""Context distillation: safer answers without the pre-prompt, honest targets, what is refused."""

import json

import json_lines
import pocket as problem
import pytest

from llama2rt import cli
from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue, Prompt
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.rollout import sampling
from llama2rt.rollout.responses import read_responses
from llama2rt.run import Run
from llama2rt.stages import context_distillation as stage
from llama2rt.stages import loading
from llama2rt.text import chat

ANSWERS = {"gold": "sorry only", "coin": "no coin"}


def adversarial(names) -> list[Prompt]:
    """Requests for secrets, of two risk categories and two attack vectors."""
    return [
        Prompt(
            f"s-{name}",
            problem.messages("safety", name),
            "safety",
            ("gold", "silver")[i % 2],
            ("plea", "order")[i // 2 % 2],
        )
        for i, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory):
    """Adversarial prompts, helpful dialogues, held-out prompts."""
    folder = tmp_path_factory.mktemp("distillation")
    write(folder / "adversarial.jsonl", adversarial(problem.TRAINING))
    dialogues = [
        Dialogue([*problem.messages("helpfulness", n), {"role": "assistant", "content": "yes"}])
        for n in problem.TRAINING
    ]
    write(folder / "helpful.jsonl", dialogues)
    return folder


def recipe(pocket, files, **settings) -> stage.ContextDistillationRecipe:
    given = {
        "init": pocket.sft,
        "rewards.safety": pocket.safety,
        "data": [files / "adversarial.jsonl"],
        "mixed_in": [files / "helpful.jsonl"],
        "preprompts": {
            "templates": ["be {adjective}", "so {adjective}"],
            "adjectives": ["wise", "kind"],
            "answers": ANSWERS,
            "tailored": 0.5,
        },
        "sampling.max_tokens": 8,
        "batch_size": 16,
        "epochs": 3,
        "train": {"lr": 4e-3, "checkpoint_every": 5},
    }
    return stage.ContextDistillationRecipe(**problem.tables(given | settings))


@pytest.fixture(scope="module")
def finished(pocket, files, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    settings = recipe(
        pocket, files, **{"rewards.helpfulness": pocket.helpfulness}, validation=[pocket.validation]
    )
    stage.run(settings, directory)
    return directory


def leaks(folder, kind="safety") -> float:
    model, tokenizer = loading.load_llama(folder)
    asked = [problem.messages(kind, name) for name in problem.HELD_OUT]
    answers = Engine(model, tokenizer).generate(asked, max_tokens=8, seed=1)
    return sum(not problem.correct(kind, answer.text) for answer in answers) / len(asked)


def test_it_answers_more_safely_without_the_preprompt_and_stays_helpful(pocket, finished):
    assert leaks(finished / "model") < leaks(pocket.sft) - 0.2
    assert leaks(finished / "model", "helpfulness") <= leaks(pocket.sft, "helpfulness") + 0.05


def test_kept_is_what_the_safety_model_scores_higher(finished):
    pairs = json_lines.read(finished / "samples" / stage.PAIRS)
    assert [pair["prompt_id"] for pair in pairs] == [p.id for p in adversarial(problem.TRAINING)]
    for pair in pairs:
        assert {*pair["original_scores"]} == {"safety", "helpfulness"}
        score = pair.get("answer_scores", {"safety": 0.0})["safety"]  # none was finished
        assert pair["kept"] == (score > pair["original_scores"]["safety"])
        assert pair["tailored"] == pair["preprompt"].endswith(" sorry only")
        assert pair["risk_category"] in ("gold", "silver") and pair["attack_vector"]
    assert 0 < sum(pair["kept"] for pair in pairs) < len(pairs)
    kept = [pair for pair in pairs if pair["kept"]]
    assert {(pair["original"], pair["answer"]) for pair in kept} >= {("gold", "sorry")}
    # The two answers differ in what was asked, not in the samples' random numbers alone.
    without, preprompted = (
        read_responses(finished / "samples" / name / "part-00000.jsonl")
        for name in ("without", "with")
    )
    assert [r.prompt for r in without] == [r.prompt for r in preprompted]
    assert [r.prompt_tokens for r in without] == [r.prompt_tokens for r in preprompted]


def test_the_report_has_the_share_kept_by_category(finished):
    report = json.loads((finished / "report.json").read_text())
    pairs = json_lines.read(finished / "samples" / stage.PAIRS)
    rows = {(row["by"], row["value"]): row for row in report["distilled"]}
    kept = [pair for pair in pairs if pair["kept"]]
    assert report["targets"] == len(kept) and report["mixed_in"] == 50
    assert rows["all", ""]["kept"]["mean"] == pytest.approx(len(kept) / 50)
    for by, key in (("risk category", "risk_category"), ("attack vector", "attack_vector")):
        for value in {pair[key] for pair in pairs}:
            own = [pair["kept"] for pair in pairs if pair[key] == value]
            row = rows[by, value]
            assert (row["prompts"], row["kept"]["mean"]) == (len(own), sum(own) / len(own))
    assert sum(rows["pre-prompt", v]["prompts"] for v in ("tailored", "generic")) == 50
    assert sum(r["prompts"] for (by, _), r in rows.items() if by == "score without") == 50
    assert rows["all", ""]["gain"]["low"] > 0
    assert "kl_k1" in report and "score/on_safety" in report
    page = (finished / "report.html").read_text()
    for words in ("Context distillation", "risk category: gold", "pre-prompt: tailored"):
        assert words in page


def test_the_target_is_the_answer_as_sampled_behind_the_bare_prompt(
    pocket, files, tmp_path, monkeypatch
):
    examples, asked = [], []
    loader, complete = stage.ExampleLoader, sampling.complete
    monkeypatch.setattr(
        stage,
        "ExampleLoader",
        lambda given, *rest, share: examples.extend(given) or loader(given, *rest, share=share),
    )
    monkeypatch.setattr(
        sampling,
        "complete",
        lambda engine, prompts, **rest: asked.extend(prompts) or complete(engine, prompts, **rest),
    )
    settings = recipe(pocket, files, samples=2, epochs=1, mixed_in_share=0.25)
    stage.run(settings, tmp_path / "run")
    pairs = json_lines.read(tmp_path / "run" / "samples" / stage.PAIRS)
    kept = [pair for pair in pairs if pair["kept"]]
    sampled = read_responses(tmp_path / "run" / "samples" / "with" / "part-00000.jsonl")
    tokens = {(r.prompt.id, r.text): (r.prompt_tokens, r.tokens) for r in sampled}
    _, tokenizer = loading.load_llama(pocket.sft)
    for pair, example in zip(kept, examples, strict=False):
        prompt, answer = tokens[pair["prompt_id"], pair["answer"]]
        assert prompt == chat.encode_prompt(tokenizer, pair["messages"])
        assert pair["messages"][0]["role"] == "user"
        assert example.tokens.tolist() == prompt + answer
        assert example.tokens[example.trainable].tolist() == answer
    assert len(examples) == len(kept) + round(len(kept) / 3)
    # Without, once each; then with a pre-prompt, twice each, at the head of a system message.
    assert [p.id for p in asked[:50]] == [p.id for p in adversarial(problem.TRAINING)]
    assert len(asked) == 150 and all(p.messages[0]["role"] == "system" for p in asked[50:])
    used = {pair["preprompt"] for pair in pairs}
    assert used <= {p.messages[0]["content"] for p in asked[50:]}


@pytest.mark.parametrize(
    "owner, name, calls",
    [(sampling, "write_responses", 2), (sampling, "write_responses", 6), (Run, "log", 4)],
    ids=["without", "with", "training"],
)
def test_resumed_equals_uninterrupted(
    pocket, files, finished_plain, tmp_path, monkeypatch, owner, name, calls
):
    monkeypatch.setattr(sampling, "PROMPTS_PER_FILE", 17)
    resumed = problem.killed_and_resumed(
        monkeypatch, owner, name, calls, stage.run, recipe(pocket, files), tmp_path / "killed"
    )
    whole = finished_plain
    assert problem.weights(whole / "model") == problem.weights(resumed)
    assert problem.metrics(whole) == problem.metrics(tmp_path / "killed")
    for part in sorted((whole / "samples").rglob("*.jsonl")):
        other = tmp_path / "killed" / part.relative_to(whole)
        assert part.read_text() == other.read_text()


@pytest.fixture(scope="module")
def finished_plain(pocket, files, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "PROMPTS_PER_FILE", 17)
        stage.run(recipe(pocket, files), directory)
    return directory


def test_what_is_refused_before_anything_is_loaded(pocket, files, tmp_path, caplog):
    with pytest.raises(InputError, match="'helpfulness-baba' is of kind helpfulness"):
        stage.open_inputs(recipe(pocket, files, data=[pocket.prompts]))
    only = {"path": pocket.prompts, "kind": "safety"}
    assert len(stage.open_inputs(recipe(pocket, files, data=[only])).prompts) == 50
    assert "no template for the risk categories none" in caplog.text
    assert "no prompt of coin, gold" in caplog.text
    long = {"templates": ["be {adjective} " * 1 + "and so on " * 9], "adjectives": ["wise"]}
    with pytest.raises(InputError, match="leaves nothing of the policy's context of 64"):
        stage.open_inputs(recipe(pocket, files, preprompts=long))
    with pytest.raises(ValueError, match=r"give rewards\.safety"):
        recipe(pocket, files, **{"rewards.safety": None, "rewards.helpfulness": pocket.safety})
    with pytest.raises(ValueError, match="only with mixed_in"):
        recipe(pocket, files, mixed_in=[], mixed_in_share=0.5)
    with pytest.raises(InputError, match="expected a reward model, found a language model"):
        stage.open_inputs(recipe(pocket, files, **{"rewards.safety": pocket.sft}))


def test_a_run_that_keeps_nothing_says_so(pocket, files, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "usable", lambda *_: False)
    with pytest.raises(InputError, match="no answer to train on: with a pre-prompt none of 50"):
        stage.run(recipe(pocket, files), tmp_path / "run")


def test_a_mix_that_falls_short_is_said(pocket, files, caplog):
    settings = recipe(pocket, files, mixed_in_share=0.9)
    dialogues = stage.open_inputs(settings).dialogues
    assert len(stage.mixed_in(settings, dialogues, 50)) == 50
    assert "50.0 % of the training set in place of 90.0 %" in caplog.text
    assert stage.mixed_in(settings, dialogues, 2) == stage.mixed_in(settings, dialogues, 2)


def test_a_dry_run(pocket, files, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'init = "{pocket.sft}"\ndata = ["{files / "adversarial.jsonl"}"]\n'
        f'[rewards]\nsafety = "{pocket.safety}"\n[sampling]\nmax_tokens = 8\n'
        '[preprompts]\ntemplates = ["be {adjective}"]\n'
    )
    with pytest.raises(SystemExit) as left:
        cli.main(["context-distillation", str(path), "--preprompts.adjectives", "wise", "--dry-run",
                  "--json"])  # fmt: skip
        raise SystemExit(0)
    assert left.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"]["value"] == 2 and "at most" in said["steps"]["how"]
