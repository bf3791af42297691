"""What a recipe says of a file (kind, origin, least score difference), as table and as option."""

import json
import os
import tomllib
from pathlib import Path

import json_lines
import pytest
from foreign_rows import HELPSTEER, PKU, ROWS
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama2rt import cli
from llama2rt.data.readers import Reader, read
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.stages.ppo import PpoRecipe
from llama2rt.stages.reward import RewardRecipe

PAIR = {"prompt": "u", "chosen": "c", "rejected": "r"}

paths = st.text("abc /.-_é", min_size=1, max_size=9).map(lambda text: f"d{text}x")
sources = st.builds(
    Source,
    path=paths.map(Path),
    kind=st.sampled_from([None, "helpfulness", "safety"]),
    source=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    minimum_score_difference=st.sampled_from([0.0, 0.5, 2.0]),
    held_out=st.none() | st.integers(0, 9),
)


@given(sources)
def test_a_source_comes_back_from_toml_and_from_an_option(source):
    import tomli_w

    said = source.model_dump(mode="json")
    table = tomllib.loads(tomli_w.dumps({"data": [said]}))
    assert Source.model_validate(table["data"][0]) == source
    assert Source.parse(source.as_option()) == source


def test_a_path_alone_stays_a_path():
    assert Source.model_validate("a/b.jsonl").model_dump(mode="json") == "a/b.jsonl"
    assert Source.of(Path("a")).as_option() == "a"
    source = Source(path="a", kind="safety")
    assert (Path(source), os.fspath(source), str(source)) == (Path("a"), "a", "a")
    recipe = RewardRecipe(init="m", data=["a", {"path": "b", "held_out": 3}])
    assert recipe.model_dump(mode="json", exclude_none=True)["data"] == [
        "a",
        {"path": "b", "held_out": 3},
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{path="a", kin="safety"}', "kin: Extra inputs are not permitted"),
        ('{path="a", kind="harmless"}', "kind: Input should be 'helpfulness' or 'safety'"),
        ('{kind="safety"}', "path: Field required"),
        ('{path="a"', "Unclosed inline table"),
        ('{path="a", minimum_score_difference=-1}', "minimum_score_difference: "),
    ],
)
def test_a_wrong_table_is_said(text, reason):
    with pytest.raises(InputError) as error:
        Source.parse(text)
    assert str(error.value).startswith(f"{text}: {reason}")


def options(recipe, values, *arguments):
    return cli._stage_options("x", recipe, "x.toml", values, ["--out", "o", *arguments]).recipe


def test_options_take_paths_and_tables():
    values = {"init": "m", "data": ["a.jsonl", {"path": "b", "kind": "helpfulness"}]}
    assert options(RewardRecipe, values).data == [
        Source(path="a.jsonl"),
        Source(path="b", kind="helpfulness"),
    ]
    given = ("--data", "c d.jsonl", '{path="e", source="mine"}', "--mixed-in", "f")
    recipe = options(RewardRecipe, values, *given)
    assert recipe.data == [Source(path="c d.jsonl"), Source(path="e", source="mine")]
    assert recipe.mixed_in == [Source(path="f")]
    values = {"init": "m", "rewards": {"helpfulness": "h"}, "data": ["a"]}
    recipe = options(PpoRecipe, values, "--validation", '{path="v", kind="safety"}')
    assert recipe.validation == [Source(path="v", kind="safety")]


def test_a_wrong_table_as_an_option_is_status_two(capsys):
    with pytest.raises(SystemExit) as leaving:
        options(RewardRecipe, {"init": "m", "data": ["a"]}, "--data", '{path="a", kin="safety"}')
    assert leaving.value.code == 2
    assert "kin: Extra inputs are not permitted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"path": "a", "kind": "safety"}]}, "a is declared safety, the model is of help"),
        ({"mixed_in": [{"path": "b", "held_out": 3}]}, "held_out of b: only sources of data"),
        ({"data": [{"path": "a", "held_out": 3}], "validation": ["v"]}, "held_out of a: only"),
    ],
)
def test_what_a_reward_recipe_cannot_mean(changes, message):
    with pytest.raises(ValidationError, match=message):
        RewardRecipe(**{"init": "m", "data": ["a"], **changes})


def test_the_kind_is_that_of_records_which_say_none(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    json_lines.write(path, [PAIR, {**PAIR, "kind": "helpfulness"}, {**PAIR, "kind": "safety"}])
    assert [c.kind for c in read(Source(path=path), "comparison")] == [
        "helpfulness",
        "helpfulness",
        "safety",
    ]
    assert [c.kind for c in read(Source(path=path, kind="safety"), "comparison")] == ["safety"] * 2
    assert f"{path}: 1 records of the other kind, helpfulness, left out" in caplog.text
    json_lines.write(path, [{"prompt": "u"}, {"prompt": "v", "kind": "helpfulness"}])
    [prompt] = read(Source(path=path, kind="safety"), "prompt")
    assert (prompt.kind, prompt.id) == ("safety", "x.jsonl:1")


def test_a_source_of_another_kind_than_all_its_records(tmp_path):
    path = tmp_path / "x.jsonl"
    json_lines.write(path, [{**PAIR, "kind": "helpfulness"}])
    with pytest.raises(InputError, match=r"no records: all say the kind helpfulness, and the sou"):
        read(Source(path=path, kind="safety"), "comparison")


def test_a_pair_judged_twice_gives_the_kind_that_is_asked(tmp_path):
    path = tmp_path / "pku.jsonl"
    json_lines.write(path, [PKU])
    for kind, chosen in (("helpfulness", "r"), ("safety", "c")):
        [pair] = read(Source(path=path, kind=kind), "comparison")
        assert (pair.kind, pair.chosen) == (kind, chosen)


def test_the_origin_stands_between_the_rows_and_the_formats(tmp_path):
    path = tmp_path / "x.jsonl"
    hh = ROWS["Anthropic HH transcripts", "comparison"]
    json_lines.write(path, [hh, {**hh, "source": "row's"}, PAIR])
    found = read(Source(path=path, source="recipe's"), "comparison")
    assert [c.source for c in found] == ["recipe's", "row's", "recipe's"]
    assert [c.source for c in read(path, "comparison")] == ["hh", "row's", ""]


SCORED = {
    "UltraFeedback": [ROWS["UltraFeedback", "comparison"]],  # 4.5 against 2.5
    "HelpSteer": HELPSTEER,  # 8 against 3
    "binarized": [ROWS["UltraFeedback binarized", "prompt"]],  # 8 against 5
}


@pytest.mark.parametrize(
    ("rows", "difference"), [("UltraFeedback", 2.0), ("HelpSteer", 5.0), ("binarized", 3.0)]
)
def test_pairs_of_close_scores_are_left_out_and_counted(tmp_path, rows, difference):
    path = tmp_path / "x.jsonl"
    json_lines.write(path, SCORED[rows])
    source = Source(path=path, minimum_score_difference=difference)
    assert len(read(source, "comparison")) == 1
    reader = Reader(Source(path=path, minimum_score_difference=difference + 0.01), "comparison")
    reason = "pairs below the minimum score difference"
    with pytest.raises(InputError, match=f"none of its rows gives one .*1 {reason} left out"):
        list(reader)
    assert reader.left_out == {reason: 1}


def test_scores_that_decide_are_not_among_the_keys_not_used(tmp_path):
    path = tmp_path / "x.jsonl"
    json_lines.write(path, SCORED["binarized"])
    for difference, carried in ((0.0, True), (1.0, False)):
        reader = Reader(Source(path=path, minimum_score_difference=difference), "comparison")
        list(reader)
        assert ("score_chosen" in reader.carried_keys) == carried


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIR, "the row has no score_chosen"),
        (ROWS["SHP", "comparison"], "rows of SHP have no scores"),
        (
            {**PAIR, "prompt": [{"role": "user", "content": "u"}]},
            "the row has no scores of its answers",
        ),
    ],
)
def test_a_least_difference_needs_scores(tmp_path, row, reason):
    path = tmp_path / "x.jsonl"
    json_lines.write(path, [row])
    with pytest.raises(InputError, match=rf":1: minimum_score_difference: {reason}"):
        read(Source(path=path, minimum_score_difference=1), "comparison")


@pytest.mark.parametrize(
    ("kind", "said", "key"),
    [
        ("dialogue", {"kind": "safety"}, "kind"),
        ("prompt", {"source": "mine"}, "source"),
        ("prompt", {"held_out": 0}, "held_out"),
        ("document", {"minimum_score_difference": 1}, "minimum_score_difference"),
    ],
)
def test_a_key_that_means_nothing_to_a_file_is_refused(tmp_path, kind, said, key):
    with pytest.raises(InputError, match=f"x: {key}: means nothing to a file of {kind}s"):
        Reader(Source(path="x", **said), kind)


def test_check_takes_a_table(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    json_lines.write(path, [PKU])
    table = f'{{path={json.dumps(str(path))}, kind="safety"}}'
    cli.main(["check", table, "--as", "comparison", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["kinds"]) == (1, {"safety": 1})
    assert found["left_out"] == {"records of kind helpfulness": 1}
