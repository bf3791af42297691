"""Lengths in tokens by source, against tokens counted by hand."""

import io

import pytest
from rich.console import Console

from llama2rt.data.check import check, print_check
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.data.statistics import by_source
from llama2rt.errors import InputError
from llama2rt.text import chat

U, V = {"role": "user", "content": "the fox"}, {"role": "user", "content": "count to twelve"}
A = {"role": "assistant", "content": "lazy dogs"}


def test_the_columns_of_table_6(small_tokenizer, tmp_path):
    records = [
        Comparison([U], "sheep", "dogs and sheep", source="one"),
        Comparison([U, A, V], "one two", "zero", source="two"),
        Comparison([V], "lazy", "quick", source="two"),
    ]

    def length(text):
        return len(small_tokenizer.encode(text))

    def example(messages, *answers):
        return sum(len(chat.encode_response(small_tokenizer, messages, a)[0]) for a in answers) / 2

    rows = by_source(records, small_tokenizer)
    assert [(row["source"], row["records"]) for row in rows] == [
        ("one", 1),
        ("two", 2),
        ("total", 3),
    ]
    assert rows[0] == {
        "source": "one",
        "records": 1,
        "turns": 1,
        "tokens_per_example": example([U], "sheep", "dogs and sheep"),
        "tokens_in_prompt": length("the fox"),
        "tokens_in_response": (length("sheep") + length("dogs and sheep")) / 2,
    }
    both = example([U, A, V], "one two", "zero"), example([V], "lazy", "quick")
    assert rows[1]["tokens_per_example"] == pytest.approx(sum(both) / 2)
    assert rows[1]["turns"] == 1.5
    assert rows[1]["tokens_in_prompt"] == length("count to twelve")
    total = (rows[0]["tokens_per_example"] + 2 * rows[1]["tokens_per_example"]) / 3
    assert rows[2]["tokens_per_example"] == pytest.approx(total)

    write(tmp_path / "x.jsonl", records)
    result = check(tmp_path / "x.jsonl", "comparison", tokenizer=small_tokenizer)
    assert result["statistics"] == rows
    printed = io.StringIO()
    print_check(result, Console(file=printed, width=140))
    assert "tokens per example" in printed.getvalue()


def test_other_kinds(small_tokenizer, tmp_path):
    [prompt, _] = by_source([Prompt("1", [U])], small_tokenizer)
    assert prompt["tokens_per_example"] == len(chat.encode_prompt(small_tokenizer, [U]))
    assert prompt["tokens_in_response"] is None
    [dialogue, _] = by_source([Dialogue([U, A])], small_tokenizer)
    assert dialogue["tokens_in_response"] == len(small_tokenizer.encode("lazy dogs"))
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(InputError, match="tokenizer: documents are not measured"):
        check(tmp_path / "x.txt", "document", tokenizer=small_tokenizer)
