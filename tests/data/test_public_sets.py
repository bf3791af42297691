"""Shapes of public files that were read into a wrong training signal, or lost part of one unsaid.

Rows are our own, in the shape that the sets' cards describe.
"""

import json
import logging
import time

import pytest
from foreign_rows import PKU
from turns import assistant, user

from llama2rt.data.check import check
from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Comparison, Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError

CONTEXT = [user("q"), assistant("a"), user("r")]


def steer(prompt, response, helpfulness):
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 2}


@pytest.mark.parametrize(
    "prompt",
    [
        "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr",  # HelpSteer2, 29 % of its prompts
        "q\n\n<extra_id_1>Assistant\na\n\n<extra_id_1>User\nr\n<extra_id_1>Assistant\n",
        "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",  # HH's form, stripped
        "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",
    ],
)
def test_a_conversation_written_as_text_is_one(rows_file, prompt):
    for row in ({"prompt": prompt}, steer(prompt, "c", 4)):
        assert read(rows_file(row), "prompt") == [Prompt("rows.jsonl:1", CONTEXT)]
    pair = {"prompt": prompt, "chosen": "c", "rejected": "d"}
    assert read(rows_file(pair), "comparison") == [Comparison(CONTEXT, "c", "d")]
    [found] = read(rows_file({"prompt": prompt, "completion": "c"}), "dialogue")
    assert found.messages == [*CONTEXT, assistant("c")]
    rows = [steer(prompt, "c", 4), steer(prompt, "d", 1)]
    [found] = read(rows_file(*rows), "comparison")
    assert (found.prompt, found.chosen, found.rejected) == (CONTEXT, "c", "d")


@pytest.mark.parametrize("prompt", ["Human: resources, what are they?", "What is\n\nHuman: about?"])
def test_a_prompt_that_only_speaks_of_humans_is_plain(rows_file, prompt):
    assert read(rows_file({"prompt": prompt}), "prompt") == [Prompt("rows.jsonl:1", [user(prompt)])]


def test_stripped_transcripts_are_a_pair(rows_file):
    row = {"chosen": "Human: q\n\nAssistant: c", "rejected": "Human: q\n\nAssistant: d"}
    [found] = read(rows_file(row), "comparison")
    assert (found.prompt, found.chosen, found.rejected) == ([user("q")], "c", "d")


def test_helpsteer_rows_of_one_prompt_need_not_follow_each_other(rows_file):
    """A shuffled file lost nearly all of its pairs, unsaid."""
    rows = [steer("q", "a", 1), steer("r", "x", 3), steer("q", "b", 3), steer("r", "y", 1)]
    found = read(rows_file(*rows), "comparison")
    assert [(c.prompt[0]["content"], c.chosen, c.rejected) for c in found] == [
        ("q", "b", "a"),
        ("r", "x", "y"),
    ]


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "c"},
        {"prompt": [user("q")], "completion": [assistant("c")]},
        {"messages": [user("q"), assistant("c")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}]},
    ],
)
def test_unpaired_preferences_are_no_dialogues(rows_file, row, label, key):
    """KTO rows as TRL and LLaMA-Factory have them: sft would learn the answers marked as bad."""
    path = rows_file(row, {**row, key: label})
    with pytest.raises(InputError, match=f":2: {key}: true or false says whether an answer is"):
        read(path, "dialogue")


def test_a_label_of_another_type_is_a_key_not_used(rows_file):
    row = {"messages": [user("q"), assistant("c")], "label": {"topic": ["x"]}}
    reader = Reader(rows_file(row), "dialogue")
    assert len(list(reader)) == 1
    assert reader.ignored_keys == {"label": 1}


PAIR = {"chosen": "c", "rejected": "d"}


@pytest.mark.parametrize(
    ("kind", "row", "key"),
    [
        # LLaMA-Factory's pairs: the prompt was the input without its instruction.
        ("comparison", {"instruction": "translate", "input": "dog", **PAIR}, "instruction"),
        ("comparison", {"context": "passage", "question": "who?", **PAIR}, "context"),
        ("comparison", {"prompt": "q", "history": [["p", "o"]], **PAIR}, "history"),
        ("comparison", {"prompt": "q", "system_prompt": "be brief", **PAIR}, "system_prompt"),
        # Questions about a text, a table or a list: the model learned to guess.
        ("dialogue", {"question": "q", "context": "CREATE TABLE t", "answer": "a"}, "context"),
        ("dialogue", {"question": "q", "options": {"A": "x"}, "answer": "A"}, "options"),
        ("dialogue", {"question": "q", "choices": ["x"], "answer": "x"}, "choices"),
        ("dialogue", {"prompt": "sum up", "context": "text", "completion": "c"}, "context"),
        ("dialogue", {"messages": [user("q"), assistant("c")], "tools": [{"name": "f"}]}, "tools"),
        (
            "dialogue",
            {"messages": [user("q"), assistant("c")], "system_prompt": "be brief"},
            "system_prompt",
        ),
        (
            "dialogue",
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}],
                "image": "a.jpg",
            },
            "image",
        ),
        ("prompt", {"prompt": "sum up", "input": "text"}, "input"),
        ("prompt", {"id": "1", "messages": [user("q")], "images": ["a.jpg"]}, "images"),
    ],
)
def test_what_the_answer_rests_on_is_not_left_out(rows_file, kind, row, key):
    with pytest.raises(InputError, match=rf":1: {key}: the conversation is .* without it"):
        read(rows_file(row), kind)
    empty = {**row, key: type(row[key])()}
    reader = Reader(rows_file(empty), kind)
    assert len(list(reader)) == 1
    assert reader.ignored_keys == {key: 1}


def test_a_format_that_is_not_read_is_said_by_its_missing_key(rows_file):
    row = {"instruction": "i", "context": "x", "response": "o"}  # Dolly
    with pytest.raises(InputError, match=":1: missing key 'messages'"):
        read(rows_file(row), "dialogue")
    row = {"context": [user("q")], "response_a": "a", "response_b": "b"}
    with pytest.raises(InputError, match=":1: missing key 'prompt'"):
        read(rows_file(row), "comparison")


def test_a_conversation_in_messages_needs_no_columns_of_text(rows_file):
    """Sets that keep the raw columns beside the messages made of them."""
    row = {"messages": [user("translate: dog"), assistant("chien")]}
    reader = Reader(rows_file({**row, "instruction": "translate", "input": "dog"}), "dialogue")
    assert len(list(reader)) == 1
    assert reader.ignored_keys == {"instruction": 1, "input": 1}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([user("q")]),
        json.dumps([{"from": "human", "value": "q"}], indent=1),
        str([user("q")]),  # as pandas writes a list to CSV
        json.dumps(["q"]),  # the turns of arena-human-preference-55k
    ],
)
def test_messages_as_json_text_are_refused(rows_file, text):
    """A column of strings that another program made of lists: their JSON became the user's turn."""
    for kind, row in (("prompt", {"prompt": text}), ("comparison", {"prompt": text, **PAIR})):
        with pytest.raises(InputError, match=":1: prompt: holds a list written as text"):
            read(rows_file(row), kind)
    with pytest.raises(InputError, match=":1: question: holds a list written as text"):
        read(rows_file({"question": text, "answer": "a"}), "dialogue")


def test_an_answer_may_be_json_but_not_messages(rows_file):
    listed = {"prompt": "name two", "completion": '["a", "b"]'}
    assert len(read(rows_file(listed), "dialogue")) == 1
    with pytest.raises(InputError, match=":1: completion: holds a list written as text"):
        read(rows_file({"prompt": "q", "completion": json.dumps([assistant("c")])}), "dialogue")
    with pytest.raises(InputError, match=":1: chosen: holds a list written as text"):
        read(
            rows_file({"prompt": "q", "chosen": str([assistant("c")]), "rejected": "d"}),
            "comparison",
        )


@pytest.mark.parametrize(
    "spelling", ["score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating"]
)
def test_scores_of_a_pair_in_every_common_spelling(rows_file, caplog, spelling):
    """UltraFeedback binarized, RLHFlow, Capybara, Argilla's mixes: each has its own spelling."""

    def row(chosen, rejected):
        scores = {spelling.format("chosen"): chosen, spelling.format("rejected"): rejected}
        return {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("d")]} | (
            scores
        )

    path = rows_file(row(4, 2), row(3, 3), row(1, 5.0), row(3.5, "3"))
    source = Source(path=path, minimum_score_difference=1)
    reader = Reader(source, "comparison")
    assert len(list(reader)) == 1
    assert reader.left_out == {"pairs below the minimum score difference": 3}
    assert not reader.ignored_keys

    with caplog.at_level(logging.WARNING):
        assert len(read(path, "comparison")) == 4
    [said] = [record.message for record in caplog.records]
    assert said == (
        f"{path}: 2 pairs whose chosen answer has no higher score than the other kept; "
        "minimum_score_difference leaves them out"
    )
    assert said in check(path, "comparison")["warnings"]


def test_what_a_format_leaves_out_is_counted_by_reason(rows_file):
    tie = {"input": "q", **PAIR, "status": "tie"}
    unsafe = {**PKU, "better_response_id": 0, "safer_response_id": 1}
    equal = {
        "instruction": "q",
        "completions": [
            {"response": "a", "fine-grained_score": 2},
            {"response": "b", "fine-grained_score": 2},
            {"response": "c", "fine-grained_score": 4},
            {"response": "c", "fine-grained_score": 3},
        ],
    }
    path = rows_file(tie, unsafe, equal, {**tie, "status": "unchanged"})
    reader = Reader(path, "comparison")
    assert len(list(reader)) == 1 + 4 + 1
    assert reader.left_out == {
        "pairs called a tie": 1,
        "safety pairs that prefer an unsafe answer to a safe one": 1,
        "pairs of equal score": 1,
        "pairs of one text": 1,
    }


def test_ultrafeedback_means_are_over_the_same_aspects(rows_file):
    """A null aspect left the mean of the others, which ranks as if it were all of them."""

    def completion(text, helpfulness, honesty):
        aspects = {"helpfulness": helpfulness, "honesty": honesty}
        annotations = {k: None if v is None else {"Rating": str(v)} for k, v in aspects.items()}
        return {"response": text, "annotations": annotations}

    row = {
        "instruction": "q",
        "completions": [completion("a", 1, 1), completion("b", 3, None), completion("c", 5, 1)],
    }
    reader = Reader(rows_file(row), "comparison")
    assert [(c.chosen, c.rejected) for c in reader] == [("c", "a")]
    assert reader.left_out == {"answers without a rating": 1}


def test_a_saved_dataset_with_an_index_is_refused(tmp_path):
    """datasets 1 saved a selection as all rows and their indices: all rows were read."""
    pytest.importorskip("pyarrow")
    files = [{"filename": "indices.arrow"}]
    state = {"_data_files": [{"filename": "x.arrow"}], "_indices_data_files": files}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"state\.json: a selection of its rows"):
        read(tmp_path, "comparison")


MESSAGES = {"prompt": [user("q")], **PAIR}


@pytest.mark.parametrize("key", ["Kind", "KIND", " kind", "SAFETY", "Rating ", "System"])
@pytest.mark.parametrize("row", [{"prompt": "q", **PAIR}, MESSAGES])
def test_a_key_in_another_case_is_misspelt(rows_file, row, key):
    """KIND is too far from kind for a spelling: safety pairs trained the helpfulness model."""
    meant = key.strip().lower()
    with pytest.raises(InputError, match=rf":1: unknown key '{key}': did you mean '{meant}'\?"):
        read(rows_file({**row, key: "both_safe"}), "comparison")


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"context_messages": [user("q")]}])
def test_an_id_in_another_case_is_misspelt(rows_file, row):
    with pytest.raises(InputError, match=":1: unknown key 'ID': did you mean 'id'"):
        read(rows_file({**row, "ID": "p-7"}), "prompt")


@pytest.mark.parametrize("further", [{"content": "other"}, {"role": "user"}])
def test_a_turn_in_both_spellings_is_refused(rows_file, further):
    """What stood under role and content took the place of from and value."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **further}]
    with pytest.raises(InputError, match=r":1: messages: message 2: expected the keys role and"):
        read(rows_file({"conversations": turns}), "dialogue")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table([["q"], ["c"], ["d"], ["e"]], names=["prompt", *PAIR, "chosen"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: column 'chosen' occurs twice"):
        read(tmp_path / "x.parquet", "comparison")


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>",
        "<s><|user|>\nq</s>\n<|assistant|>\n",
        "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n",
        "### Human: q\n### Assistant:",
    ],
)
def test_a_prompt_that_a_template_laid_out_is_refused(rows_file, text):
    """Laid out again as a user's turn, its markers would be learned as text."""
    for kind, row in (
        ("prompt", {"prompt": text}),
        ("comparison", {"prompt": text, **PAIR}),
        ("dialogue", {"prompt": text, "completion": "c"}),
    ):
        with pytest.raises(InputError, match=":1: prompt: laid out by a chat template"):
            read(rows_file(row), kind)
    about = {"prompt": f"What does {text!r} mean?", "completion": text}
    assert len(read(rows_file(about), "dialogue")) == 1


def test_what_check_says_is_in_the_order_of_the_row(rows_file):
    keys = [f"key {i}" for i in range(8)]
    found = check(rows_file({**MESSAGES, **dict.fromkeys(keys, 1)}), "comparison")
    assert list(found["ignored_keys"]) == keys


def test_long_runs_of_whitespace_are_read_at_once(rows_file):
    """Patterns that look for the whitespace before a marker take its length squared."""
    text = " \n" * 200_000 + "q" + "\n " * 200_000
    begin = time.perf_counter()
    assert len(read(rows_file({"prompt": text, "completion": text + "c"}), "dialogue")) == 1
    assert time.perf_counter() - begin < 10
