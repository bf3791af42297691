"""A message's weight: which answers of a dialogue are learned, from the file to the loss."""

import json_lines
import pytest

from llama2rt.data import readers
from llama2rt.data.check import check
from llama2rt.data.filters import Filters
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError
from llama2rt.stages import sft
from llama2rt.text import chat


def row(*weights, key="weight"):
    messages = [{"role": "system", "content": "s"}]
    for turn, weight in enumerate(weights):
        answer = {"role": "assistant", "content": f"answer {turn}"}
        messages += [{"role": "user", "content": f"question {turn}"}, answer]
        if weight != "":
            answer[key] = weight
    return {"messages": messages}


def test_weights_are_read_and_written(tmp_path):
    rows = [row(0, "", 1), row("", ""), row(1, 1), row(0.0, None), row(None, None)]
    json_lines.write(tmp_path / "rows.jsonl", rows)
    read = readers.read(tmp_path / "rows.jsonl", "dialogue")
    learned = [record.learned for record in read]
    assert learned == [(False, True, True), None, None, (False, True), None]
    assert all(m.keys() == {"role", "content"} for record in read for m in record.messages)
    readers.write(tmp_path / "again.jsonl", read)
    assert readers.read(tmp_path / "again.jsonl", "dialogue") == read
    written = json_lines.read(tmp_path / "again.jsonl")
    assert written[0] == {"messages": row(0, "", "")["messages"]}
    assert written[1] == rows[1]
    assert check(tmp_path / "rows.jsonl", "dialogue")["answers_of_weight_0"] == 2


def test_sharegpt_rows_may_have_weights(tmp_path):
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    said = [
        {"from": roles[m.pop("role")], "value": m.pop("content"), **m}
        for m in row(0, 1)["messages"]
    ]
    json_lines.write(tmp_path / "rows.jsonl", [{"conversations": said}])
    assert readers.read(tmp_path / "rows.jsonl", "dialogue")[0].learned == (False, True)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(0.5), "messages: message 3 weight: expected 0 or 1, got 0.5"),
        (row(True), "messages: message 3 weight: expected 0 or 1, got true"),
        (row("1"), 'messages: message 3 weight: expected 0 or 1, got "1"'),
        (row(0, 0), "messages: every weight is 0, which leaves nothing to learn"),
        (
            row(0, key="weigth"),
            "messages: message 3: expected the keys role and content, got content, role",
        ),
        (
            {"messages": [{**row("")["messages"][1], "weight": 0}, *row("")["messages"][2:]]},
            "messages: message 1 weight: only the assistant's messages are learned",
        ),
    ],
)
def test_a_malformed_weight_is_named(tmp_path, bad, said):
    json_lines.write(tmp_path / "rows.jsonl", [row(""), bad])
    with pytest.raises(InputError) as error:
        readers.read(tmp_path / "rows.jsonl", "dialogue")
    assert f"rows.jsonl:2: {said}" in str(error.value)


def test_only_what_is_learned_is_a_target(small_tokenizer):
    weighted, plain = (Dialogue.from_json(row(*w)) for w in ((0, 1, 0), ("", "", "")))
    (some,), (every,) = (sft.encode([d], small_tokenizer, 400) for d in (weighted, plain))
    assert (some.tokens == every.tokens).all()
    targets = [int(t) for t, on in zip(some.tokens, some.trainable, strict=True) if on]
    assert targets[-1] == small_tokenizer.eos
    assert small_tokenizer.decode(targets[:-1]).strip() == "answer 1"
    tokens, trainable = chat.encode_dialogue(small_tokenizer, plain.messages)
    assert (tokens, trainable) == (every.tokens.tolist(), every.trainable.tolist())


def test_the_same_words_of_which_another_answer_is_learned_are_no_duplicate(tmp_path):
    json_lines.write(tmp_path / "rows.jsonl", [row(0, 1), row(1, 0), row(0, 1), row(1, 1)])
    found = check(tmp_path / "rows.jsonl", "dialogue", filters=Filters(duplicates=True))
    assert found["records"] == 3
    pytest.importorskip("datasketch")
    found = check(tmp_path / "rows.jsonl", "dialogue", filters=Filters(near_duplicates=0.9))
    assert found["records"] == 3
