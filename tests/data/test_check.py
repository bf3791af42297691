"""``check``: the numbers it gives, and that they can be printed and written as JSON."""

import io
import json

import pytest
from rich.console import Console

from llama2rt.data.check import check, print_check
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Dialogue, Document, Prompt, Sample
from llama2rt.errors import InputError

U, A = {"role": "user", "content": "four"}, {"role": "assistant", "content": "fives"}
S = {"role": "system", "content": "be"}
FILES = {
    "document": [Document("ab", "x"), Document("é" * 10, "y"), Document("ab", "x")],
    "dialogue": [Dialogue([U, A]), Dialogue([S, U, A, U, A])],
    "prompt": [Prompt("1", [U]), Prompt("2", [U], "safety"), Prompt("3", [S, U])],
    "comparison": [
        Comparison([U], "long answer", "short", "better", "both_safe", "safety"),
        Comparison([U, A, U], "yes", "no no", "better"),
        Comparison([U], "a", "b", "significantly_better"),
    ],
    "sample": [
        Sample("1", [U], "", {"helpfulness": 0.25}, 1.0, "sft", 0.7),
        Sample("1", [U], "four", {"helpfulness": 0.75}, 2.0, "sft", 1.0),
    ],
}


@pytest.fixture(params=FILES)
def result(request, tmp_path):
    path = tmp_path / "file.jsonl"
    write(path, FILES[request.param])
    return check(path, request.param)


def test_common_numbers_and_printing(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["records"] == result["rows"] == len(FILES[result["kind"]])
    printed = io.StringIO()
    print_check(result, Console(file=printed, width=100))
    assert f"{result['records']} {result['kind']}s in" in printed.getvalue()


def numbers(tmp_path, kind):
    write(tmp_path / "file.jsonl", FILES[kind])
    return check(tmp_path / "file.jsonl", kind)


def test_documents(tmp_path):
    found = numbers(tmp_path, "document")
    assert found["bytes"] == 24
    assert found["duplicates"] == 1
    assert found["sources"] == {"x": 2, "y": 1}
    assert found["characters"]["max"] == 10
    assert found["characters"]["median"] == 2


def test_dialogues(tmp_path):
    found = numbers(tmp_path, "dialogue")
    assert found["turns"] == {"mean": 1.5, "min": 1, "median": 1.5, "p95": 1.95, "max": 2}
    assert found["system_messages"] == 1
    assert found["answer_characters"]["mean"] == 5
    assert found["sources"] == {}


def test_prompts(tmp_path):
    found = numbers(tmp_path, "prompt")
    assert found["kinds"] == {"helpfulness": 2, "safety": 1}
    assert found["duplicates"] == 1
    assert found["system_messages"] == 1


def test_comparisons(tmp_path):
    found = numbers(tmp_path, "comparison")
    assert list(found["ratings"].items()) == [("significantly_better", 1), ("better", 2)]
    assert found["safety"] == {"both_safe": 1, "none": 2}
    assert found["kinds"] == {"helpfulness": 2, "safety": 1}
    assert found["chosen_longer"] == 1


def test_samples(tmp_path):
    found = numbers(tmp_path, "sample")
    assert found["empty_responses"] == 1
    assert found["prompts"] == 1
    assert found["score_helpfulness"]["mean"] == 0.5
    assert found["reward"]["max"] == 2
    assert found["temperatures"] == {"0.7": 1, "1.0": 1}


def test_skipped_records_are_listed(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text('{"text": ""}\n{"text": "t", "extra": 1}\n')
    with pytest.raises(InputError, match=r"file\.jsonl:1: text is blank"):
        check(path, "document")
    found = check(path, "document", skip_invalid=1)
    assert found["skipped"] == [f"{path}:1: text is blank"]
    assert found["ignored_keys"] == {"extra": 1}
    printed = io.StringIO()
    print_check(found, Console(file=printed, width=300))
    assert f"skipped {path}:1: text is blank" in printed.getvalue()
