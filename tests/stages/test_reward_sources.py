"""What a reward model is trained on: the paper's mixes from sources of several kinds and files."""

import json

import json_lines
import pocket as problem
import pytest
from foreign_rows import PKU, ROWS

from llama2rt.data.readers import write
from llama2rt.data.records import Comparison
from llama2rt.errors import InputError
from llama2rt.run import Run
from llama2rt.stages import comparisons, loading, reward
from llama2rt.stages.ppo import PpoRecipe
from llama2rt.stages.reward import RewardRecipe


def pairs(prefix, count, **changes):
    return [
        Comparison([{"role": "user", "content": f"{prefix} {i}"}], "c", "r", **changes)
        for i in range(count)
    ]


def rows(prefix, count):
    """Comparisons that do not say their kind."""
    return [{"prompt": f"{prefix} {i}", "chosen": "c", "rejected": "r"} for i in range(count)]


def asked(comparisons):
    return {comparison.prompt[-1]["content"] for comparison in comparisons}


def recipe(tmp_path, data, mixed_in=(), **changes):
    """A recipe over files of the given rows; a table in place of rows says its path itself."""

    def paths(name, entries):
        found = []
        for i, (content, said) in enumerate(entries):
            path = tmp_path / f"{name}-{i}.jsonl"
            if isinstance(content[0], Comparison):
                write(path, content)
            else:
                json_lines.write(path, content)
            found.append({"path": path, **said})
        return found

    given = {"data": paths("data", data), "mixed_in": paths("mixed", mixed_in)}
    return RewardRecipe(**{"init": "m", "held_out": 0, **given, **changes})


def test_the_papers_safety_mix(shared_data, tmp_path):
    """ "All Meta Safety and Anthropic Harmless, mixed with Meta Helpfulness and open-source
    helpfulness at 90/10" (section 3.2.2): Anthropic's pairs do not say their kind."""
    harmless = {
        "path": shared_data("hh_harmless_base_test.jsonl.gz"),
        "kind": "safety",
        "source": "anthropic harmless",
    }
    meta = pairs("meta safety", 600, kind="safety", safety="both_safe")
    found = recipe(
        tmp_path,
        [(meta, {"source": "meta safety"})],
        [(pairs("meta helpful", 300, kind="helpfulness"), {}), (rows("open", 300), {})],
        kind="safety",
        skip_invalid=100,
    )
    found = RewardRecipe(**{**found.model_dump(), "data": [*found.data, harmless]})
    training, held_out, _ = comparisons.split(found)
    own = [c for c in training if c.kind == "safety"]
    assert not held_out
    assert len(own) == 600 + 2312 - 13
    assert sum(c.source == "anthropic harmless" for c in own) == 2312 - 13
    assert (len(training) - len(own)) / len(training) == pytest.approx(0.1, abs=0.001)


def test_pairs_without_a_kind_are_of_the_models_kind(tmp_path, caplog):
    both = [{**PKU, "prompt": f"pku {i}"} for i in range(5)]
    found = recipe(
        tmp_path, [(rows("silent", 20), {}), (both, {})], [(both, {"kind": "helpfulness"})],
        kind="safety", mixed_in_share=0.1,
    )  # fmt: skip
    training, _, left_out = comparisons.split(found)
    own = [c for c in training if c.kind == "safety"]
    assert len(own) == 25
    assert {c.chosen for c in training if c.kind == "helpfulness"} == {"r"}
    assert left_out == {
        "data: records of kind helpfulness": 5,
        "mixed_in: records of kind safety": 5,
    }
    assert "5 records of the other kind, helpfulness, left out" in caplog.text


def test_a_file_of_the_other_kind_alone_is_refused(tmp_path):
    found = recipe(tmp_path, [(pairs("p", 5, kind="helpfulness"), {})], kind="safety")
    with pytest.raises(InputError, match=r"data-0\.jsonl: no records: all say the kind helpful"):
        comparisons.split(found)


def test_validation_prompts_leave_every_training_file(tmp_path, caplog):
    write(tmp_path / "validation.jsonl", pairs("shared", 10))
    found = recipe(
        tmp_path,
        [(pairs("own", 50) + pairs("shared", 3), {})],
        [(pairs("shared", 10) + pairs("other", 200), {})],
        validation=[tmp_path / "validation.jsonl"],
    )
    training, held_out, left_out = comparisons.split(found)
    assert len(held_out) == 10
    assert not asked(training) & asked(held_out)
    assert len(training) == 100
    assert left_out == {
        "data: comparisons of held-out prompts": 3,
        "mixed_in: comparisons of held-out prompts": 10,
    }
    assert "mixed_in: 10 comparisons whose prompts are held out left out" in caplog.text


def test_so_many_are_held_out_of_each_source(tmp_path):
    found = recipe(
        tmp_path,
        [
            (pairs("first", 100, source="first"), {}),
            (pairs("second", 100, source="second"), {"held_out": 7}),
            (pairs("third", 30, source="third") + pairs("first", 100, source="third"), {}),
        ],
        held_out=20,
    )
    training, held_out, _ = comparisons.split(found)
    counts = {s: sum(c.source == s for c in held_out) for s in ("first", "second", "third")}
    assert counts == {"first": 20, "second": 7, "third": 20}
    assert not asked(training) & asked(held_out)  # prompts of two files, held out of one
    again, _, _ = comparisons.split(found)
    assert again == training


def test_a_source_too_small_to_hold_out_of_is_named(tmp_path):
    found = recipe(tmp_path, [(pairs("a", 50), {}), (pairs("b", 10), {})], held_out=20)
    with pytest.raises(InputError, match=r"data-1\.jsonl: held_out: 20 of 10 comparisons leaves"):
        comparisons.split(found)


def test_pairs_of_close_scores_are_in_the_report(pocket, tmp_path):
    """A whole run: what was left out and the accuracy of each source, and resume finds its inputs
    by the same tables."""
    names = problem.NAMES[:40]
    scored = [
        {
            "prompt": problem.messages("helpfulness", name),
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "score_chosen": 5.0,
            "score_rejected": 4.0 if i < 10 else 1.0,
        }
        for i, name in enumerate(names)
    ]
    json_lines.write(tmp_path / "scored.jsonl", scored)
    table = {"path": tmp_path / "scored.jsonl", "source": "scored", "minimum_score_difference": 2}
    given = problem.reward_recipe(pocket, "helpfulness")
    changed = {**given.model_dump(), "data": [table, *given.data], "held_out": 5, "epochs": 1}
    found = RewardRecipe(**changed)
    folder = reward.run(found, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    reason = "data: pairs below the minimum score difference"
    assert report["left_out"][reason] == 10
    assert report["sources"].keys() == {"none", "scored"}
    assert (
        sum(row["pairs"] for row in report["sources"].values())
        == (report["intervals"][-1]["pairs"])
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["inputs"]["data.0"]["path"] == str(tmp_path / "scored.jsonl")
    assert reward.run(found, tmp_path / "run", resume=True) == folder
    json_lines.write(tmp_path / "scored.jsonl", scored[:-1])
    with pytest.raises(InputError, match=r"data\.0 has changed since"):
        Run.open(tmp_path / "run", found, inputs={"data.0": found.data[0]}, resume=True)


def test_ultrafeedback_and_helpsteer_rows_train_a_model(tmp_path):
    ultra = [{**ROWS["UltraFeedback", "comparison"], "instruction": f"u {i}"} for i in range(20)]
    training, _, left_out = comparisons.split(
        recipe(tmp_path, [(ultra, {"minimum_score_difference": 2.0})])
    )
    assert len(training) == 20 and not left_out


def test_a_source_spelled_absolutely_is_the_same_source(tmp_path, monkeypatch):
    """As a path alone and as the path of a table; what else the table says must stay."""
    monkeypatch.chdir(tmp_path)
    json_lines.write(tmp_path / "a.jsonl", rows("a", 3))
    table = {"path": "a.jsonl", "source": "mine"}
    recipes = [
        RewardRecipe(init="m", data=["a.jsonl", table]),
        RewardRecipe(
            init="m", data=[tmp_path / "a.jsonl", {**table, "path": tmp_path / "a.jsonl"}]
        ),
        RewardRecipe(init="m", data=["a.jsonl", {**table, "source": "yours"}]),
    ]
    inputs = {"data.0": "a.jsonl"}
    Run.open(tmp_path / "run", recipes[0], inputs=inputs)
    Run.open(tmp_path / "run", recipes[1], inputs=inputs, resume=True)
    with pytest.raises(InputError, match=r"started with data\.1\.source = 'mine'"):
        Run.open(tmp_path / "run", recipes[2], inputs=inputs, resume=True)


def test_prompts_of_a_stage_have_the_kind_their_table_says(pocket, tmp_path):
    """What PPO's safety branch goes by."""
    json_lines.write(tmp_path / "adversarial.jsonl", [{"prompt": "baba"}, {"prompt": "lulu"}])
    model, tokenizer = loading.load_llama(pocket.sft)
    found = PpoRecipe(
        init="m",
        rewards={"helpfulness": "h"},
        data=[{"path": tmp_path / "adversarial.jsonl", "kind": "safety"}],
    )
    prompts = loading.read_prompts(found.data, tokenizer, model)
    assert [prompt.kind for prompt in prompts] == ["safety", "safety"]
