"""Collecting comparisons: what is written, which prompts are asked, people in the loop, resumption
to the bit."""

import json
import shutil

import json_lines
import pocket as problem
import pytest

from llama2rt import atomic, cli
from llama2rt.data.readers import read, write
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.stages import annotate, loading

FILES = [
    f"{kind}-{part}.jsonl"
    for kind in ("helpfulness", "safety")
    for part in ("training", "held_out")
]


def recipe(pocket, **settings) -> annotate.AnnotateRecipe:
    given = {
        "policy": pocket.sft,
        "data": [pocket.prompts],
        "held_out": [pocket.validation],
        "annotator": {"python": "kill_plan:annotator"},
        "sampling": {"max_tokens": 8},
    }
    return annotate.AnnotateRecipe.model_validate(given | settings)


@pytest.fixture(scope="module")
def collected(pocket, tmp_path_factory):
    return annotate.run(recipe(pocket), tmp_path_factory.mktemp("annotate") / "batch-1")


def test_what_is_written_is_what_was_said(pocket, collected):
    report = json.loads((collected / "report.json").read_text())
    pairs = {row["id"]: row for row in json_lines.read(collected / "pairs.jsonl")}
    assert report["pairs"] == len(pairs) > 20
    counted = 0
    for name in FILES:
        kind, _, part = name.removesuffix(".jsonl").partition("-")
        found = read(collected / name, "comparison")
        counted += len(found)
        assert report[f"{kind}/{part}"] == len(found) > 0
        names = problem.TRAINING if part == "training" else problem.HELD_OUT
        asked = [problem.messages(kind, n) for n in names]
        for comparison in found:
            assert (comparison.kind, comparison.source) == (kind, "batch-1")
            assert comparison.prompt in asked
            right = [problem.correct(kind, t) for t in (comparison.chosen, comparison.rejected)]
            assert right[0] >= right[1]
            assert comparison.chosen != comparison.rejected
            if kind == "safety":
                labels = {(True, False): "chosen_safe", (True, True): "both_safe"}
                assert comparison.safety == labels.get(tuple(right), "both_unsafe")
            else:
                assert comparison.safety is None
    assert counted + sum(report["left_out"].values()) == len(pairs)
    shown = {row["part"]: row["id"].split(":")[0] for row in pairs.values()}
    assert shown == {"training": "training", "held_out": "held_out"}


def test_a_reward_model_learns_from_what_was_written(pocket, collected, tmp_path):
    from llama2rt.stages import reward

    settings = {
        "data": [collected / "safety-training.jsonl"],
        "validation": [collected / "safety-held_out.jsonl"],
        "held_out": 0,
        "previous": pocket.helpfulness,
    }
    reward.run(problem.reward_recipe(pocket, "safety", **settings), tmp_path / "safety")
    report = json.loads((tmp_path / "safety" / "report.json").read_text())
    assert report["accuracy"]["average"] > 0.8
    # The helpfulness model, which it is said to replace, prefers the other answer.
    drift = report["drift"]["batch-1"]
    assert drift["before"]["mean"] < 0.5 < 0.8 < drift["after"]["mean"]
    assert drift["after"]["mean"] == report["accuracy"]["average"]
    assert drift["change"]["low"] > 0


@pytest.mark.parametrize("calls", [1, 3, 4, 6])
def test_the_same_bytes_after_a_kill_anywhere(pocket, collected, tmp_path, monkeypatch, calls):
    """While recipe.toml, the pairs, the first or the third file of comparisons is written."""
    directory = tmp_path / "batch-1"
    problem.killed_and_resumed(
        *(monkeypatch, atomic, "replacing", calls), *(annotate.run, recipe(pocket), directory)
    )
    for name in ("pairs.jsonl", *FILES):
        assert (directory / name).read_bytes() == (collected / name).read_bytes()


def test_two_policies_answer_side_by_side(pocket, collected, tmp_path, monkeypatch):
    loaded = []
    original = loading.load_llama

    def load(folder, *rest):
        loaded.append(folder)
        return original(folder, *rest)

    monkeypatch.setattr(loading, "load_llama", load)
    shutil.copytree(pocket.sft, tmp_path / "other")
    settings = recipe(pocket, other=tmp_path / "other", temperatures=(1.0, 0.7), held_out=[])
    annotate.run(settings, tmp_path / "batch-1")
    assert loaded == [pocket.sft, tmp_path / "other"]
    names = {path.name for path in (tmp_path / "batch-1").glob("*-*.jsonl")}
    assert names == {"helpfulness-training.jsonl", "safety-training.jsonl"}
    same = (collected / "helpfulness-training.jsonl").read_bytes()
    assert (tmp_path / "batch-1" / "helpfulness-training.jsonl").read_bytes() == same


def test_each_batch_asks_new_prompts(pocket, tmp_path):
    """10 prompts, 5, 3 and 4 of them a batch: an epoch ends in the third, and none comes twice
    before."""
    write(tmp_path / "ten.jsonl", problem.prompts(problem.TRAINING[:5]))
    batches = [
        [
            prompt.id
            for prompt in annotate.open_inputs(
                recipe(pocket, data=[tmp_path / "ten.jsonl"], prompts=n, asked=asked, seed=asked)
            ).prompts["training"]
        ]
        for n, asked in ((5, 0), (3, 5), (4, 8), (4, 12))
    ]
    assert len(set(batches[0] + batches[1])) == 8
    assert all(len(set(batch)) == len(batch) for batch in batches)
    assert {*batches[0], *batches[1], *batches[2]} == {
        p.id for p in problem.prompts(problem.TRAINING[:5])
    }
    everything = annotate.open_inputs(recipe(pocket, data=[tmp_path / "ten.jsonl"], prompts=99))
    assert len(everything.prompts["training"]) == 10


def test_one_id_for_two_prompts_is_refused(pocket, tmp_path):
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, name in zip(files, ("baba", "bado"), strict=True):
        write(path, [Prompt("same", problem.messages("safety", name), "safety")])
    with pytest.raises(InputError, match=r"two\.jsonl:1: duplicate id 'same'"):
        annotate.run(recipe(pocket, data=files), tmp_path / "run")


def test_an_annotator_who_decides_nothing_leaves_no_file(pocket, tmp_path, monkeypatch):
    import kill_plan

    few = tmp_path / "few.jsonl"
    write(few, problem.prompts(problem.TRAINING[:10]))
    settings = recipe(pocket, data=[few], held_out=[])
    undecided = lambda self, pairs, seed: [None] * len(pairs)  # noqa: E731
    monkeypatch.setattr(kill_plan.Knowing, "__call__", undecided)
    with pytest.raises(InputError, match="no comparison of helpfulness came of the prompts"):
        annotate.run(settings, tmp_path / "run")
    monkeypatch.setattr(kill_plan.Knowing, "__call__", lambda self, pairs, seed: [])
    with pytest.raises(InputError, match="annotator: gave 0 judgements of"):
        annotate.run(settings, tmp_path / "run", resume=True)
    assert list((tmp_path / "run").glob("*-*.jsonl")) == []


def test_people_judge_between_two_calls(pocket, collected, tmp_path, capsys):
    """The first call stops with the pairs written; with judgements of all, --resume completes."""
    said = tmp_path / "judgements.jsonl"
    out = tmp_path / "batch-1"
    path = tmp_path / "annotate.toml"
    path.write_text(
        f'policy = "{pocket.sft}"\ndata = ["{pocket.prompts}"]\n'
        f'held_out = ["{pocket.validation}"]\n'
        f'sampling.max_tokens = 8\nannotator.files = ["{said}"]\n'
    )

    def command(*options: str) -> tuple[int, str]:
        try:
            cli.main(["annotate", str(path), "--out", str(out), *options])
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    status, message = command()
    assert status == 2 and "pairs.jsonl wait for a judgement each" in message
    assert (out / "pairs.jsonl").read_bytes() == (collected / "pairs.jsonl").read_bytes()
    assert not (out / "report.json").exists()

    rows = []
    for pair in json_lines.read(out / "pairs.jsonl"):
        first = problem.correct(pair["kind"], pair["first"])
        second = problem.correct(pair["kind"], pair["second"])
        row = {"pair": pair["id"], "chosen": "first" if first >= second else "second"}
        if pair["kind"] == "safety":
            row |= {"first_safe": first, "second_safe": second}
        rows.append(row)
    said.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    status, message = command("--resume")
    assert status == 2 and f"1 of {len(rows)} pairs" in message
    with said.open("a") as file:
        file.write(json.dumps({"pair": rows[-1]["pair"], "chosen": "neither"}) + "\n")
    status, message = command("--resume")
    assert status == 0, message
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == {"undecided": 1}
    assert sum(len(json_lines.read(out / name)) for name in FILES) == len(rows) - 1
