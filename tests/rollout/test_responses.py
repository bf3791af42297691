"""The file of samples: any text survives it, damage is named."""

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
