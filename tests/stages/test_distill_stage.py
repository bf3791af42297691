"""Distillation: one set of samples, several students; losses on distributions; what is refused."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pocket as problem
import pytest
import torch
from parallel_rollouts import run_stage

from llama2rt import ops
from llama2rt.checkpoint import native
from llama2rt.data.packing import pack
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.pipeline import dry_run, iterate
from llama2rt.pipeline.plan import check, resolve
from llama2rt.planning import Options
from llama2rt.rollout.responses import read_responses, response_example, write_responses
from llama2rt.run import Run
from llama2rt.stages import distill, loading
from llama2rt.stages.selection import BEST
from llama2rt.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def given(pocket, tmp_path_factory):
    """A run directory's best samples, all right; a student of half the width, one of another
    tokenizer, and one whose vocabulary is padded."""
    root = tmp_path_factory.mktemp("distill")
    tokenizer = Tokenizer.load(pocket.sft)
    samples = [
        problem.sampled(tokenizer, prompt, problem.ANSWERS[prompt.kind][0])
        for prompt in problem.prompts(problem.TRAINING)
    ]
    (root / "v1" / "samples").mkdir(parents=True)
    (root / "v1" / "manifest.json").write_text("{}")
    write_responses(root / "v1" / "samples" / BEST, samples)
    other = Tokenizer.train([text.upper() for text in problem.texts()], 300, root / "other")
    shapes = {"half": tokenizer, "foreign": other, "padded": tokenizer, "bare": None}
    for name, own in shapes.items():
        size = tokenizer.vocab_size if own is None else own.vocab_size
        config = LlamaConfig(
            dim=16, layers=1, heads=2, kv_heads=2, ffn_hidden=32, context=64,
            vocab_size=size + 8 * (name == "padded"),
        )  # fmt: skip
        native.save(Llama(config).initialize(1), own, root / name)
    return root


def recipe(pocket, given, students=("half",), **settings):
    values = {
        "students": {name: {"init": given / name} for name in students},
        "data": [given / "v1"],
        "teacher": pocket.sft,
        "batch_size": 20,
        "epochs": 2,
        "train": {"lr": 1e-2, "micro_tokens": 200, "checkpoint_every": 3},
        "sampling.max_tokens": 8,
    }
    return distill.DistillRecipe(**problem.tables(values | settings))


def losses(directory, student="half"):
    return [line["loss"] for line in problem.metrics(directory / f"student-{student}")]


def killed_at(calls, monkeypatch, settings, directory):
    """A run that is killed when it logs for the `calls`-th time."""
    original, counted = Run.log, itertools.count(1)

    def log(*arguments, **metrics):
        if next(counted) == calls:
            raise problem.Killed
        original(*arguments, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(problem.Killed):
            distill.run(settings, directory, resume=True)


def test_students_learn_from_one_set_beside_their_teacher(pocket, given, tmp_path, monkeypatch):
    """One by the samples' tokens, one of another tokenizer by their text; each resumes alone."""
    settings = recipe(pocket, given, ("half", "foreign")).model_dump(mode="json")
    settings["students"]["foreign"] |= {"batch_size": 50, "epochs": 1, "lr": 3e-3}
    settings = distill.DistillRecipe(**settings)
    whole = distill.run(settings, tmp_path / "whole")
    # In the first student's eighth step, and, of what is left then, in the second's first.
    killed_at(8, monkeypatch, settings, tmp_path / "killed")
    killed_at(5, monkeypatch, settings, tmp_path / "killed")
    resumed = distill.run(settings, tmp_path / "killed", resume=True)
    for name in settings.students:
        folders = [path / f"student-{name}" / "model" for path in (whole, resumed)]
        assert problem.weights(folders[0]) == problem.weights(folders[1])
        _, tokenizer = loading.load_llama(folders[0])
        assert tokenizer.digest == Tokenizer.load(given / name).digest
        assert losses(whole, name)[-1] < losses(whole, name)[0]
        assert losses(whole, name) == losses(resumed, name)
    report = json.loads((whole / "report.json").read_text())
    half, foreign = report["students"]
    assert (half["read_as"], foreign["read_as"]) == ("tokens", "text")
    assert (half["steps"], foreign["steps"]) == (10, 2)
    assert (half["batch_size"], foreign["batch_size"], foreign["lr"]) == (20, 50, 3e-3)
    assert half["samples"] == 100 and half["loss"] == losses(whole)[-1]
    assert "foreign" in (whole / "report.html").read_text()
    parents = json.loads((whole / "manifest.json").read_text())["parents"]
    assert [parent["path"] for parent in parents] == [str(given / "v1")]


def test_the_teacher_is_the_first_row_of_the_comparison(pocket, given, tmp_path):
    settings = recipe(
        pocket,
        given,
        epochs=12,
        train={"lr": 2e-2, "micro_tokens": 200, "checkpoint_every": 0},
        validation=[pocket.validation],
        **{"rewards.helpfulness": pocket.helpfulness, "rewards.safety": pocket.safety},
    )
    out = distill.run(settings, tmp_path / "run")
    report = json.loads((out / "report.json").read_text())
    teacher, student = report["versions"]
    assert (teacher["name"], student["name"]) == ("teacher", "half")
    assert student["reward"]["mean"] > teacher["reward"]["mean"]
    assert teacher["kl"]["k3"]["mean"] == 0 < student["kl"]["k3"]["mean"]
    # The teacher tosses a coin, and its selected samples are all right.
    shares = [
        np.mean([problem.correct(r.prompt.kind, r.text) for r in read_responses(path)])
        for name in ("half", "teacher")
        for path in (out / "evaluate" / "samples").glob(f"{name}-*/part-00000.jsonl")
    ]
    assert shares[0] > shares[1] + 0.15


def test_a_longer_run_compares_the_students_that_it_has_trained(pocket, given, tmp_path):
    train = {"lr": 1e-2, "micro_tokens": 200, "checkpoint_every": 0, "schedule": "constant"}
    compared = {"validation": [pocket.validation], "rewards.helpfulness": pocket.helpfulness}
    reports = []
    for epochs in (1, 3):
        settings = recipe(pocket, given, epochs=epochs, train=train, **compared)
        out = distill.run(settings, tmp_path / "run", resume=True)
        reports.append(json.loads((out / "report.json").read_text())["versions"])
    (teacher, before), (again, after) = reports
    assert teacher["reward"] == again["reward"] and before["reward"] != after["reward"]


def test_an_answer_that_was_edited_is_named(pocket, given, tmp_path):
    """Its tokens are not those of its text: read as text it is as good as any."""
    samples = read_responses(given / "v1" / "samples" / BEST)[:6]
    blank = replace(samples[1], text=" ")  # no target either way
    edited = replace(samples[2], text="no")
    write_responses(tmp_path / "best.jsonl", [samples[0], blank, edited, *samples[3:]])
    data = {"data": [tmp_path / "best.jsonl"]}
    with pytest.raises(
        InputError, match=f"data: the answer to prompt '{edited.prompt.id}' has not"
    ):
        distill.open_inputs(recipe(pocket, given, **data, loss="forward_kl"))
    (student,) = distill.open_inputs(recipe(pocket, given, **data)).students.values()
    assert student.read_as == "text" and len(student.examples) == 5


@pytest.mark.parametrize(
    ("loss", "settings"), [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"beta": 0.3})]
)
def test_distributions_come_nearer_to_the_teachers(pocket, given, tmp_path, loss, settings):
    """What is minimised is what is logged; in bf16 and at another temperature too."""
    if loss == "jsd":
        settings |= {"temperature": 2.0, "train": {"lr": 1e-2, "precision": "bf16"}}
    out = distill.run(recipe(pocket, given, loss=loss, epochs=6, **settings), tmp_path / "run")
    found = losses(out)
    assert found[-1] < 0.75 * found[0]
    if loss == "forward_kl":
        teacher, _ = loading.load_llama(pocket.sft)
        batch = pack([response_example(r) for r in read_responses(given / "v1" / "samples" / BEST)])
        layout = batch.tokens, batch.positions, batch.cu_seqlens
        values = []
        for folder in (given / "half", out / "student-half" / "model"):
            student, _ = loading.load_llama(folder)
            with torch.no_grad(), ops.use("reference"):
                distributions = teacher.hidden(*layout), teacher.output.weight
                values.append(student(*layout, batch.targets, teacher=distributions).sum())
        assert float(values[0]) / batch.weight == pytest.approx(found[0], rel=0.1)
        assert float(values[1]) / batch.weight < found[0] / 2


def test_a_student_without_a_tokenizer_has_its_teachers(pocket, given, tmp_path):
    out = distill.run(recipe(pocket, given, ["bare"], epochs=1), tmp_path / "run")
    _, tokenizer = loading.load_llama(out / "student-bare" / "model")
    assert tokenizer.digest == Tokenizer.load(pocket.sft).digest


def test_on_two_ranks_as_in_one_process(on_ranks, pocket, given, tmp_path):
    settings = recipe(pocket, given, loss="jsd", epochs=1)
    distill.run(settings, tmp_path / "alone")
    on_ranks(2, run_stage, "distill", settings, tmp_path / "ranks")
    first, second = (
        loading.load_llama(tmp_path / name / "student-half" / "model")[0]
        for name in ("alone", "ranks")
    )
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("students", "settings", "said"),
    [
        (["foreign"], {"loss": "jsd"}, "students.foreign: loss: its tokenizer is not the teacher"),
        (["padded"], {"loss": "jsd"}, r"students.padded: loss: it has \d+ embeddings and the"),
        (["bare"], {"teacher": None}, "students.bare: holds no tokenizer"),
        (["half"], {"data": ["nothing.jsonl"]}, "nothing.jsonl: cannot be read"),
        (["v1"], {}, "students.v1: .*v1"),
    ],
)
def test_what_cannot_be_learned_is_said_before_anything_is(
    pocket, given, tmp_path, students, settings, said
):
    with pytest.raises(InputError, match=said):
        distill.open_inputs(recipe(pocket, given, students, **settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"students": {}}, "name at least one"),
        ({"students": {"Teacher": {"init": "a"}}}, "another name than 'teacher'"),
        ({"students": {"a/b": {"init": "a"}}}, "'a/b': expected letters"),
        ({"loss": "jsd", "teacher": None}, "teacher: missing: loss jsd is taken from it"),
        ({"loss": "jsd", "parallel": {"tensor": 2}}, "parallel.tensor: loss jsd needs"),
        ({"loss": "jsd", "parallel": {"context": 2}}, "parallel.context: loss jsd needs"),
        ({"beta": 0.3}, "beta: only with loss jsd"),
        ({"temperature": 2.0}, "temperature: only with a loss on distributions"),
        ({"validation": ["p.jsonl"]}, "name teacher and rewards.helpfulness"),
        ({"rewards": {"helpfulness": "a"}}, "rewards: only with validation"),
    ],
)
def test_recipes_that_contradict_themselves(pocket, given, settings, said):
    with pytest.raises(ValueError, match=said):
        recipe(pocket, given, **settings)


def test_a_dry_run_counts_every_student(pocket, given):
    settings = recipe(
        pocket,
        given,
        ["half", "padded"],
        validation=[pocket.validation],
        **{"rewards.helpfulness": pocket.helpfulness},
    )
    settings = settings.model_copy(update={"students": {"half": settings.students["half"]}})
    plan = dry_run.stage("distill", settings, Options(), None)
    assert plan.work.steps is not None and plan.work.steps.value == 10
    assert {"training half", "sampling teacher", "sampling half"} <= plan.memory.keys()
    shape = loading.outline(given / "half").config
    assert plan.trainable == shape.parameters


def test_as_a_step_of_iterate(pocket, given, tmp_path):
    """It takes the newest samples and version; later steps know the students before they are."""
    settings = {
        "sft": pocket.sft,
        "rewards": {"helpfulness": pocket.helpfulness},
        "data": [pocket.prompts],
        "validation": [pocket.validation],
        "sampling": {"max_tokens": 8},
        "steps": [
            {"name": "V1", "stage": "rejection"},
            {"name": "V2", "stage": "rejection"},
            {"name": "small", "stage": "distill", "students": {"half": {"init": given / "half"}}},
            {
                "name": "all",
                "stage": "evaluate",
                "versions": {"V2": "@V2", "half": "@small/student-half/model"},
            },
        ],
    }
    plan = resolve(iterate.Plan(iterate.IterateRecipe.model_validate(settings)).steps(), tmp_path)
    taught = plan[2].recipe
    assert taught.data == [tmp_path / "V2"] and taught.teacher == tmp_path / "V2" / "model"
    assert taught.rewards.helpfulness == pocket.helpfulness and taught.validation
    check(plan)


def test_the_answers_in_a_history_are_context_in_another_tokenizer_too(given):
    tokenizer = Tokenizer.load(given / "foreign")
    history = [*problem.messages("safety", "lulu"), {"role": "assistant", "content": "gold"}]
    prompt = Prompt("two turns", [*history, *problem.messages("helpfulness", "lulu")])
    outline = loading.outline(given / "foreign")
    samples = [problem.sampled(Tokenizer.load(given / "half"), prompt, "yes")]
    found = distill.students.learn_from(samples, outline, None, None)
    (example,) = found.examples
    assert found.read_as == "text"
    assert tokenizer.decode(example.tokens[example.trainable].tolist()[:-1]).strip() == "yes"
    assert example.tokens[-1] == tokenizer.eos
