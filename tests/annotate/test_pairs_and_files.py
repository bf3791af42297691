"""What a judgement makes of a pair, and people's judgements in files."""

import json

import pytest

from llama2rt.annotate import AnswerPair, Judgement
from llama2rt.annotate.files import FileAnnotator
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError

ASKED = [{"role": "user", "content": "why"}]


def pair(name: str, kind: str = "helpfulness") -> AnswerPair:
    return AnswerPair(name, Prompt(name, ASKED, kind), "one", "two")


@pytest.mark.parametrize(
    ("judgement", "chosen", "safety"),
    [
        (Judgement("first"), "one", None),
        (Judgement("second"), "two", None),
        (Judgement("first", None, True, True), "one", "both_safe"),
        (Judgement("first", None, True, False), "one", "chosen_safe"),
        (Judgement("second", None, False, True), "two", "chosen_safe"),
        (Judgement("second", None, False, False), "two", "both_unsafe"),
        (Judgement("first", None, True, None), "one", None),
    ],
)
def test_a_judgement_makes_a_comparison(judgement, chosen, safety):
    comparison = judgement.comparison(pair("a", "safety"), "batch-1")
    assert {comparison.chosen, comparison.rejected} == {"one", "two"}
    assert (comparison.chosen, comparison.safety) == (chosen, safety)
    assert (comparison.kind, comparison.source, comparison.prompt) == ("safety", "batch-1", ASKED)


@pytest.mark.parametrize(
    "judgement", [Judgement("first", None, False, True), Judgement("second", None, True, False)]
)
def test_an_unsafe_answer_chosen_beside_a_safe_one_makes_none(judgement):
    assert judgement.comparison(pair("a", "safety"), "batch-1") is None


def test_the_rating_is_kept():
    comparison = Judgement("first", "better").comparison(pair("a"), "batch-1")
    assert (comparison.rating, comparison.kind) == ("better", "helpfulness")


@pytest.fixture
def judge(tmp_path):
    """`judge(text)`: what people say of the pairs a and b with a file of this text."""
    pairs = [pair("a"), pair("b", "safety")]
    listed = tmp_path / "pairs.jsonl"
    listed.write_text("".join(json.dumps(p.to_json()) + "\n" for p in pairs))

    def judged(text: str):
        (tmp_path / "said.jsonl").write_text(text)
        return FileAnnotator([tmp_path / "said.jsonl"], listed)(pairs, "0")

    return judged


A = '{"pair": "a", "chosen": "second", "rating": "better"}\n'
B = '{"pair": "b", "chosen": "first", "first_safe": true, "second_safe": false}\n'


def test_judgements_come_in_the_order_of_the_pairs(judge):
    expected = [Judgement("second", "better"), Judgement("first", None, True, False)]
    assert judge(B + A) == expected
    assert judge(A + B + A) == expected  # said twice alike
    assert judge(A + '{"pair": "b", "chosen": "neither"}\n') == [expected[0], None]
    assert judge(A.replace("}", ', "first_safe": null}') + B) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", r"said.jsonl:2: expected a JSON object"),
        ("{", r"said.jsonl:2: "),
        ('{"pair": "b", "choosen": "first"}', "said.jsonl:2: unknown key 'choosen'"),
        ('{"pair": 3, "chosen": "first"}', "said.jsonl:2: pair: expected text, got 3"),
        ('{"pair": "b"}', "said.jsonl:2: chosen: expected text, got None"),
        (
            '{"pair": "b", "chosen": "third"}',
            "said.jsonl:2: chosen: expected one of first, second, neither, got 'third'",
        ),
        (
            '{"pair": "b", "chosen": "first", "rating": "great"}',
            "said.jsonl:2: rating: expected one of .*, got 'great'",
        ),
        (
            '{"pair": "b", "chosen": "first", "rating": ["better"]}',
            "said.jsonl:2: rating: expected one of",
        ),
        (
            '{"pair": "b", "chosen": "first", "first_safe": 1, "second_safe": true}',
            "said.jsonl:2: first_safe: expected true or false, got 1",
        ),
        (
            '{"pair": "b", "chosen": "first", "second_safe": true}',
            "said.jsonl:2: first_safe, second_safe: give both or neither",
        ),
        ('{"pair": "c", "chosen": "first"}', "1 of 2 pairs in .* have no judgement, such as 'b'"),
        ('{"pair": "a", "chosen": "first"}', "said.jsonl:2: pair: 'a' was judged otherwise before"),
        (
            '{"pair": "a", "chosen": "neither"}',
            "said.jsonl:2: pair: 'a' was judged otherwise before",
        ),
        ("", "1 of 2 pairs in .*pairs.jsonl have no judgement, such as 'b'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(judge, line, said):
    with pytest.raises(InputError, match=said):
        judge(A + line + "\n")


def test_a_file_that_is_still_to_come_is_waited_for(judge, tmp_path):
    judge(A + B)
    annotator = FileAnnotator([tmp_path / "later.jsonl"], tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match=r"later.jsonl: no such file; 2 pairs in .*--resume"):
        annotator([pair("a")], "0")


def test_a_file_may_judge_pairs_of_another_part(judge, tmp_path):
    judge(A + B)
    annotator = FileAnnotator([tmp_path / "said.jsonl"], tmp_path / "pairs.jsonl")
    assert annotator([pair("a")], "0") == [Judgement("second", "better")]


def test_one_file_may_judge_several_batches(judge, caplog):
    lines = [{"pair": name, "chosen": "first"} for name in ("a", "b", "of another batch")]
    with caplog.at_level("INFO"):
        said = judge("".join(json.dumps(line) + "\n" for line in lines))
    assert [judgement.chosen for judgement in said] == ["first", "first"]
    assert "1 judgements are of pairs that are not in" in caplog.text
