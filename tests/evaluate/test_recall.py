"""The multi-turn test of an instruction: what is counted, and the command on model folders."""

import json

import pytest

from llama2rt import cli
from llama2rt.data.instructions import Attribute, Check, Chosen, Instruction
from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError
from llama2rt.evaluate import recall
from llama2rt.evaluate.recall import RecallOptions
from llama2rt.rollout.turns import NO_ROOM, Answered, Turns

ATTRIBUTES = [
    Attribute(
        name=name,
        full="{value}!",
        terse="{value}",
        values=["yes", "no"],
        check=Check(contains=["{value}"]) if name != "unchecked" else None,
    )
    for name in ("one", "other", "unchecked")
]
UNCHECKED = ATTRIBUTES[2]


def told(**values):
    known = {attribute.name: attribute for attribute in ATTRIBUTES}
    return Instruction(
        tuple(
            Chosen(known[name], next(v for v in known[name].values if v.value == value))
            for name, value in values.items()
        ),
        terse=False,
    )


def test_what_is_counted():
    answered = [
        Answered(["yes no", "yes no", "yes"]),
        Answered(["yes", "no", "yes"]),
        Answered(["yes", "yes"], ended=NO_ROOM),
    ]
    instructions = [told(one="yes", other="no"), told(one="yes"), told(one="yes", unchecked="no")]
    found = recall.table(answered, instructions, [1, 2, 3, 9])
    rows = {row["turn"]: row for row in found["turns"]}
    assert rows.keys() == {1, 2, 3}  # no dialogue has nine turns
    assert [(row["dialogues"], row["mean"]) for row in rows.values()] == [
        (3, 1.0),
        (3, pytest.approx(2 / 3)),
        (2, 0.5),
    ]
    assert rows[3]["attributes"]["other"] == {
        "dialogues": 1, "mean": 0.0, "low": 0.0, "high": pytest.approx(0.793, abs=1e-3)
    }  # fmt: skip
    assert rows[1]["attributes"].keys() == {"one", "other"}
    assert found["ended"] == {NO_ROOM: 1}
    assert "turn   3:  50.0 %" in recall.describe("model", found)


def test_what_is_asked():
    dialogues = [Turns(("a",) * n) for n in (1, 4, 2, 5)]
    options = RecallOptions(turns=[1, 3], limit=1)
    assert recall.questions(dialogues, options) == [Turns(("a",) * 3)]
    with pytest.raises(InputError, match=r"recall.turns: 9: no held-out .* \(most: 5\)"):
        recall.questions(dialogues, RecallOptions(turns=[9]))
    drawn = recall.draw(ATTRIBUTES, 50, 0)
    assert all(one.follows("yes no") for one in drawn)
    with pytest.raises(InputError, match="no attribute has a check"):
        recall.draw([UNCHECKED], 5, 0)


FILE = """
[[attributes]]
name = "answer"
full = "Say {value}."
terse = "{value}"
values = ["yes", "no"]
check = { contains = ["{value}"] }
"""


def test_the_command_on_two_folders(pocket, tmp_path, capsys):
    messages = [{"role": "user", "content": "may baba visit"}]
    answer = {"role": "assistant", "content": "yes"}
    write(tmp_path / "dialogues.jsonl", [Dialogue([*messages, answer])] * 5)
    (tmp_path / "attributes.toml").write_text(FILE)
    given = [pocket.sft, "--dialogues", tmp_path / "dialogues.jsonl", "--max-tokens", 8]
    given += ["--attributes", tmp_path / "attributes.toml", "--turns", 1]

    def run(*more):
        with pytest.raises(SystemExit) as end:
            cli.main(["recall", *map(str, (*given, *more))])
        return end.value.code, capsys.readouterr()

    cli.main(["recall", *map(str, (*given, "--json"))])
    found = json.loads(capsys.readouterr().out)[str(pocket.sft)]
    (row,) = found["turns"]
    assert row["turn"] == 1 and row["dialogues"] == 5
    # What is too long is left out, wherever it stands.
    long = Dialogue([{"role": "user", "content": "may baba visit " * 12}, answer])
    write(tmp_path / "dialogues.jsonl", [long, *[Dialogue([*messages, answer])] * 4])
    cli.main(["recall", *map(str, (*given, "--json"))])
    found = json.loads(capsys.readouterr().out)[str(pocket.sft)]
    assert found["turns"][0]["dialogues"] == 4
    for bad, said in [
        (["--turns", 2], "recall.turns: 2: no held-out dialogue has so many turns"),
        (["--turns", 2, 1], "turns: expected turns from 1 on, rising"),
        (["--max-tokens", 64], "its context of 64 tokens has no room"),
        (["--limit", 0], "limit: expected at least 1"),
    ]:
        status, captured = run(*bad)
        assert status == 2 and said in captured.err
