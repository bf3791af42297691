"""The file of samples: any text survives it, damage is named."""

import json

import pytest
from pocket import response

from llama2rt.errors import InputError
from llama2rt.rollout.responses import read_responses, write_responses


def test_a_damaged_sample_file_is_named(tmp_path):
    write_responses(tmp_path / "a.jsonl", [response("yes"), response("no")])
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace('"no"', '"no', 1))
    with pytest.raises(InputError, match=r"a\.jsonl:2"):
        read_responses(tmp_path / "a.jsonl")


def test_any_text_survives_the_sample_file(tmp_path):
    texts = ["a\u2028b", "nul \0", "\x85", "\r\n", "é\U0001f600", ""]
    write_responses(tmp_path / "a.jsonl", [response(text) for text in texts])
    assert [r.text for r in read_responses(tmp_path / "a.jsonl")] == texts


def test_a_sample_file_of_another_hand(tmp_path):
    """A last line without its end counts; what is no text, or no answer, is named."""
    path = tmp_path / "a.jsonl"
    write_responses(path, [response("yes"), response("no")])
    whole = read_responses(path)
    path.write_text(path.read_text().removesuffix("\n"))
    assert read_responses(path) == whole
    first = json.loads(path.read_text().split("\n")[0])
    for key, value in (("response", None), ("finished", "no")):
        path.write_text(json.dumps(first | {key: value}))
        with pytest.raises(InputError, match=rf"a\.jsonl:1: .*{key}: expected"):
            read_responses(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"a\.jsonl: not UTF-8"):
        read_responses(path)
