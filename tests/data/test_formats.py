"""Other people's rows, hand-made in their published shape, and the real files where present."""

from collections import Counter

import json_lines
import pytest
from foreign_rows import PKU
from turns import assistant, user

from llama2rt.data.readers import Reader, read
from llama2rt.data.records import Comparison, Dialogue, Prompt
from llama2rt.errors import InputError


@pytest.fixture
def read_rows(tmp_path):
    def read_rows(kind, *rows):
        path = tmp_path / "rows.jsonl"
        json_lines.write(path, rows)
        return read(path, kind)

    return read_rows


PAIR = Comparison([user("u")], "c", "r")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "u", "chosen": "c", "rejected": "r"},
        {"prompt": "u", "chosen": "c", "rejected": "r", "score_chosen": 9.0, "prompt_id": "x"},
        {"prompt": [user("u")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        {
            "prompt": "u",
            "chosen": [user("u"), assistant("c")],
            "rejected": [user("u"), assistant("r")],
        },
        {"chosen": [user("u"), assistant("c")], "rejected": [user("u"), assistant("r")]},
        {
            "chosen": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "c"}],
            "rejected": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "r"}],
        },
        {
            "prompt": [{**user("u"), "tool_calls": None}],
            "chosen": [assistant("c")],
            "rejected": [assistant("r")],
        },
    ],
)
def test_trl_comparisons(read_rows, row):
    assert read_rows("comparison", row) == [PAIR]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": [user("u"), assistant("c")], "rejected": [user("v"), assistant("r")]},
            "rejected: its context differs from the prompt",
        ),
        (
            {"prompt": "u", "chosen": [user("c")], "rejected": [assistant("r")]},
            "chosen: the last message must be the assistant's",
        ),
        ({"prompt": "u", "chosen": "", "rejected": "r"}, "chosen is blank"),
        ({"prompt": "u", "chosen": [], "rejected": []}, "chosen: the last message must be"),
        ({"chosen": [], "rejected": []}, "chosen: the last message must be"),
        (
            {"prompt": 3, "chosen": [assistant("c")], "rejected": "r"},
            "prompt: expected text or a list",
        ),
    ],
)
def test_bad_trl_comparisons(read_rows, row, reason):
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: {reason}"):
        read_rows("comparison", row)


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
            ],
            "id": "x",
        },
        {"conversations": [{"role": "system", "content": "s"}, user("u"), assistant("a")]},
        {"prompt": [{"role": "system", "content": "s"}, user("u")], "completion": [assistant("a")]},
        {"prompt": [{"role": "system", "content": "s"}, user("u")], "completion": "a"},
        {
            "messages": [{"role": "system", "content": "s"}, user("u"), assistant("a")],
            "prompt": "other",
            "completion": "other",
        },
    ],
)
def test_dialogues(read_rows, row):
    expected = Dialogue([{"role": "system", "content": "s"}, user("u"), assistant("a")])
    assert read_rows("dialogue", row) == [expected]


def test_plain_prompt_and_completion(read_rows):
    [dialogue] = read_rows("dialogue", {"prompt": "u", "completion": "a"})
    assert dialogue == Dialogue([user("u"), assistant("a")])


def test_prompts_without_ids_get_their_place(read_rows):
    prompts = read_rows("prompt", {"prompt": "u"}, {"prompt": [user("v")]})
    assert prompts == [
        Prompt("rows.jsonl:1", [user("u")]),
        Prompt("rows.jsonl:2", [user("v")]),
    ]


def test_capybara_takes_the_answers_context_for_the_prompt(read_rows):
    context = [user("u"), assistant("a"), user("v")]
    row = {
        "prompt": "v",
        "chosen": [*context, assistant("c")],
        "rejected": [*context, assistant("r")],
        "rating_chosen": 5,
    }
    assert read_rows("comparison", row) == [Comparison(context, "c", "r")]
    row["rejected"] = [user("u"), assistant("other"), user("v"), assistant("r")]
    with pytest.raises(InputError, match="rejected: its context differs from the prompt"):
        read_rows("comparison", row)


def test_ultrainteract(read_rows):
    trajectory = [
        {"from": "user", "value": "u"},
        {"from": "assistant", "value": "a"},
        {"from": "user", "value": "wrong"},
    ]
    row = {"trajectory": trajectory, "chosen": "c", "rejected": "r", "id": "1", "parent_id": "0"}
    context = [user("u"), assistant("a"), user("wrong")]
    expected = Comparison(context, "c", "r", source="ultrainteract")
    assert read_rows("comparison", row) == [expected]


@pytest.mark.parametrize("question", ["input", "question"])
def test_orca(read_rows, question):
    row = {"system": "s", question: "u", "chosen": "c", "rejected": "r", "rating": [9, 3]}
    system = {"role": "system", "content": "s"}
    found = read_rows("comparison", row, {**row, "system": ""}, {**row, "status": "tie"})
    assert [c.prompt for c in found] == [[system, user("u")], [user("u")]]
    assert {(c.chosen, c.rejected) for c in found} == {("c", "r")}


def test_hh_transcripts(read_rows):
    context = "\n\nHuman: hi\n\nAssistant: hello\n\nthere\n\nHuman: and? "
    row = {
        "chosen": context + "\n\nAssistant: yes",
        "rejected": context + "\n\nAssistant: no: Human: x",
    }
    assert read_rows("comparison", row) == [
        Comparison(
            [user("hi"), assistant("hello\n\nthere"), user("and?")],
            "yes",
            "no: Human: x",
            source="hh",
        )
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: u\n\nAssistant: c", "\n\nHuman: v\n\nAssistant: r", "different contexts"),
        ("\n\nHuman: u\n\nAssistant: c", "plain", "rejected: a transcript must begin with"),
        ("\n\nHuman: u\n\nAssistant: c", "", "rejected: a transcript must begin with"),
        ("\n\nHuman: u\n\nAssistant: c", 3, "rejected: expected text, got a number"),
        ("\n\nHuman: u\n\nAssistant: c", None, "missing key 'prompt'"),
        ("\n\nHuman: u", "\n\nHuman: u\n\nAssistant: r", "chosen: the transcript must end with"),
        ("\n\nHuman: u\n\nAssistant: ", "\n\nHuman: u\n\nAssistant: r", "chosen is blank"),
        (
            "\n\nHuman: u\n\nHuman: u\n\nAssistant: c",
            "\n\nHuman: u\n\nHuman: u\n\nAssistant: r",
            "prompt: message 2: expected role assistant, got user",
        ),
        (
            "\n\nAssistant: c",
            "\n\nAssistant: r",
            "prompt: no messages",
        ),
    ],
)
def test_bad_hh_transcripts(read_rows, chosen, rejected, reason):
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*{reason}"):
        read_rows("comparison", {"chosen": chosen, "rejected": rejected})


def test_gsm8k(read_rows):
    row = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
    expected = Dialogue([user("1+1?"), assistant(row["answer"])], "gsm8k")
    assert read_rows("dialogue", row) == [expected]
    assert read_rows("prompt", row) == [Prompt("rows.jsonl:1", [user("1+1?")])]


def solutions(*pairs):
    models = {f"m{i}": {"is_correct": ok, "solution": text} for i, (ok, text) in enumerate(pairs)}
    return {"question": "q", "ground_truth": "g", **models}


def test_gsm8k_solutions_are_correct_against_incorrect(read_rows):
    found = read_rows(
        "comparison",
        solutions((True, "a"), (False, "b"), (True, "c"), (False, "b")),  # one solution repeats
        solutions((True, "a"), (True, "b")),
    )
    assert [(c.chosen, c.rejected) for c in found] == [("a", "b"), ("c", "b")]
    assert found[0].prompt == [user("q")]
    with pytest.raises(InputError, match=":1: m0: expected is_correct true or false"):
        read_rows("comparison", solutions(("yes", "a")))


def test_ultrafeedback_pairs_by_mean_score(read_rows):
    def completion(text, *ratings):
        annotations = {f"aspect {i}": {"Rating": str(r)} for i, r in enumerate(ratings)}
        return {"response": text, "annotations": annotations}

    row = {
        "instruction": "u",
        "completions": [
            completion("low", 1, 2),
            completion("high", 5, 4),
            completion("also low", 2, 1),
            completion("unrated", 5, "N/A"),
        ],
    }
    pairs = [(c.chosen, c.rejected) for c in read_rows("comparison", row)]
    assert pairs == [("high", "low"), ("high", "also low")]
    row["completions"] = [
        {"response": "a", "fine-grained_score": 2.5},
        {"response": "b", "fine-grained_score": 3.5},
        {"response": "b", "fine-grained_score": 2.5},  # said twice, rated apart
    ]
    assert [(c.chosen, c.rejected) for c in read_rows("comparison", row)] == [("b", "a")]
    row["completions"] = [{"response": "a"}]
    with pytest.raises(InputError, match="completions: item 1 has no scores"):
        read_rows("comparison", row)


def test_helpsteer_pairs_rows_of_one_prompt(read_rows):
    def row(prompt, response, helpfulness, correctness):
        rest = {"coherence": 4, "complexity": 1, "verbosity": 1}
        scores = {"helpfulness": helpfulness, "correctness": correctness}
        return {"prompt": prompt, "response": response, **scores, **rest}

    found = read_rows(
        "comparison",
        row("u", "a", 2, 2),
        row("u", "b", 4, 3),
        row("u", "c", 3, 1),  # ties with a
        row("v", "d", 4, 4),
        row("v", "e", 0, 1),
    )
    assert [(c.prompt[0]["content"], c.chosen, c.rejected) for c in found] == [
        ("u", "b", "a"),
        ("u", "b", "c"),
        ("v", "d", "e"),
    ]
    with pytest.raises(InputError, match='helpfulness: expected a number, got "much"'):
        read_rows("comparison", row("u", "a", "much", 2))


def test_shp_takes_clear_pairs_and_five_a_post(read_rows):
    def row(post, label, ratio):
        refs = {"human_ref_A": f"A{ratio}", "human_ref_B": f"B{ratio}"}
        return {"post_id": post, "history": "u", **refs, "labels": label, "score_ratio": ratio}

    clear = [row("p", 1, 3.0 + i) for i in range(7)]
    found = read_rows("comparison", row("p", 1, 2.0), row("q", 0, 2.5), *clear)
    assert [(c.chosen, c.rejected) for c in found] == [
        ("B2.5", "A2.5"),
        *((f"A{3.0 + i}", f"B{3.0 + i}") for i in range(5)),
    ]
    with pytest.raises(InputError, match="labels: expected 0 or 1, got 2"):
        read_rows("comparison", row("p", 2, 3.0))
    votes = row("p", 1, 3.0) | {"score_A": 6, "score_B": 2}
    assert read_rows("comparison", votes)[0].chosen == "A3.0"
    with pytest.raises(InputError, match="labels: 0 is for human_ref_B, but score_A is 6 and"):
        read_rows("comparison", votes | {"labels": 0})


SHP = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 3.0}
STEER = {"prompt": "u", "response": "a", "helpfulness": 1, "correctness": 1}


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("comparison", {**SHP, "post_id": ["p"]}, "post_id: expected text"),
        ("comparison", {**SHP, "post_id": "p", "score_ratio": "nan"}, "score_ratio: expected a fi"),
        ("comparison", {**STEER, "correctness": 10**400}, "correctness: a number too large"),
        ("dialogue", {"conversations": [{"from": [], "value": "x"}]}, r"role \[\] is not system"),
        ("dialogue", {"conversations": [{"from": {}, "value": "x"}]}, "role {} is not system"),
    ],
)
def test_values_of_another_type_are_named(read_rows, kind, row, reason):
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*{reason}"):
        read_rows(kind, row)


@pytest.mark.parametrize(
    ("safe", "label"),
    [((True, True), "both_safe"), ((False, True), "chosen_safe"), ((False, False), "both_unsafe")],
)
def test_saferlhf_gives_one_comparison_of_each_kind(read_rows, safe, label):
    row = {
        "prompt": "u",
        "response_0": "helps",
        "response_1": "refuses",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    helpful, safer = read_rows("comparison", row)
    assert (helpful.chosen, helpful.kind, helpful.safety) == ("helps", "helpfulness", None)
    assert (safer.chosen, safer.kind, safer.safety) == ("refuses", "safety", label)


def test_saferlhf_leaves_out_an_unsafe_answer_chosen_over_a_safe_one(read_rows):
    row = {**PKU, "better_response_id": 0, "safer_response_id": 1}
    assert [c.kind for c in read_rows("comparison", row)] == ["helpfulness"]
    with pytest.raises(InputError, match="better_response_id: expected 0 or 1, got -1"):
        read_rows("comparison", {**row, "better_response_id": -1})


def test_real_gsm8k(shared_data):
    dialogues = read(shared_data("gsm8k_train.jsonl"), "dialogue")
    assert len(dialogues) == 7473
    assert all("\n#### " in d.messages[-1]["content"] for d in dialogues)


def test_real_gsm8k_solutions(shared_data):
    reader = Reader(shared_data("gsm8k_model_solutions.jsonl"), "comparison")
    comparisons = list(reader)
    assert (reader.rows, reader.rows - reader.rows_without_records) == (1319, 731)
    assert len({c.prompt[0]["content"] for c in comparisons}) == 731


def test_real_hh_file_names_what_is_wrong_with_it(shared_data):
    path = shared_data("hh_harmless_base_test.jsonl.gz")
    with pytest.raises(InputError) as error:
        read(path, "comparison")
    assert str(error.value) == f"{path}:87: chosen is blank"
    reader = Reader(path, "comparison", skip_invalid=13)
    assert len(list(reader)) == 2312 - 13
    reasons = Counter(message.split(": ", 1)[1] for message in reader.skipped)
    assert reasons["chosen is blank"] == 4
    assert reasons["chosen and rejected have different contexts"] == 5


def test_real_tinyshakespeare_is_one_document(shared_data):
    [document] = read(shared_data("tinyshakespeare.txt"), "document")
    assert len(document.text) == 1115394
