"""Filters: on a file of planted faults each is found, counted and named, and nothing else goes."""

import io
import json

import json_lines
import pytest
from foreign_rows import HELPSTEER, PKU
from pydantic import ValidationError
from rich.console import Console

from llama2rt import cli
from llama2rt.data import check
from llama2rt.data.filters import NAMES, Filters, Located, keep
from llama2rt.data.readers import Reader
from llama2rt.data.records import Comparison, Dialogue, Document, Prompt
from llama2rt.data.removed import EXAMPLES, Removed
from llama2rt.errors import InputError


def message(role, content):
    return {"role": role, "content": content}


def words(name, count):
    """A text that shares no run of words with another name's."""
    return " ".join(f"{name}{i}" for i in range(count))


def pair(name, **changes):
    """A comparison of plain text."""
    row = {"prompt": words(f"{name}p", 20), "chosen": words(f"{name}c", 20)}
    return {**row, "rejected": words(f"{name}r", 20), **changes}


def own(name, **changes):
    """A comparison in our own form."""
    row = pair(name)
    return {**row, "prompt": [message("user", row["prompt"])], **changes}


def swapped(name, **changes):
    """`own`, the other answer chosen."""
    row = own(name)
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"], **changes}


def transcripts(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


GOOD = [
    pair("plain"),
    pair("scored", score_chosen=8.0, score_rejected=2.0),
    own("rated", rating="better"),
    own("unsafe", safety="both_unsafe", kind="safety"),
    transcripts("\n\nHuman: hh\n\nAssistant: yes", "\n\nHuman: hh\n\nAssistant: no"),
    # The same question twice, other answers; the same pair judged by safety, the other way.
    own("asked"),
    {**own("asked"), "chosen": words("other", 20)},
    swapped("asked", kind="safety"),
    # One long prompt, answers that differ: near-duplicates of the prompt alone.
    own("long", prompt=[message("user", words("long", 300))]),
    own("long2", prompt=[message("user", words("long", 300))]),
    # Half of the words in common.
    own("half"),
    own("half", chosen=words("halfc", 10) + " " + words("new", 10)),
]

CHANGED = words("platec", 40).replace("platec20 ", "another ")
FAULTS = {
    "empty_turns": [
        pair("e1", chosen=" "),
        own("e2", prompt=[message("user", "a"), message("assistant", ""), message("user", "b")]),
        transcripts("\n\nHuman: u\n\nAssistant:", "\n\nHuman: u\n\nAssistant: no"),
    ],
    "role_order": [
        own("o1", prompt=[message("user", "a"), message("user", "b")]),
        own("o2", prompt=[message("assistant", "a")]),
        own("o3", prompt=[message("narrator", "a")]),
        transcripts("\n\nAssistant: c", "\n\nAssistant: r"),
        transcripts("\n\nHuman: u\n\nHuman: c", "\n\nHuman: u\n\nHuman: r"),
    ],
    "different_contexts": [
        transcripts("\n\nHuman: u\n\nAssistant: c", "\n\nHuman: v\n\nAssistant: r"),
        {
            "chosen": [message("user", "u"), message("assistant", "c")],
            "rejected": [message("user", "v"), message("assistant", "r")],
        },
    ],
    "identical_responses": [pair("i", rejected=words("ic", 20) + " ")],
    "unsafe_chosen": [own("u", safety="rejected_safe", kind="safety")],
    "contradicting_labels": [
        pair("s", score_chosen=2.0, score_rejected=8.0),
        own("w"),
        swapped("w"),
    ],
    "small_margin": [pair("m", score_chosen=5.2, score_rejected=5.0)],
    "least_rating": [own("n", rating="negligibly_better")],
    "duplicates": [
        own("rated", rating="slightly_better"),
        pair("plain", rejected=f" {words('plainr', 20)}"),
    ],
    "near_duplicates": [own("plate", chosen=CHANGED)],
}
# What a near-duplicate is one of stands before it; longest is tested with a tokenizer.
ORIGINAL = own("plate", chosen=words("platec", 40))
FILTERS = Filters.usual("comparison").model_copy(
    update={"small_margin": 1.0, "least_rating": "slightly_better"}
)


@pytest.fixture
def planted(rows_file):
    """The file, and the lines of each filter's faults."""
    rows, lines = [*GOOD, ORIGINAL], {}
    for name, faults in FAULTS.items():
        lines[name] = range(len(rows) + 1, len(rows) + len(faults) + 1)
        rows += faults
    return rows_file(*rows), lines


def test_every_filter_is_planted():
    assert set(NAMES) - {"longest"} == set(FAULTS) == set(FILTERS.active)


def test_each_fault_is_found_counted_and_named_and_nothing_else_goes(planted):
    pytest.importorskip("datasketch", reason="datasketch is not installed (extra data)")
    path, lines = planted
    result = check.check(path, "comparison", filters=FILTERS)
    assert json.loads(json.dumps(result)) == result
    found = result["filters"]
    assert {name: what["removed"] for name, what in found.items()} == {
        name: len(faults) for name, faults in FAULTS.items()
    }
    for name, what in found.items():
        expected = [f"{path}:{line}: " for line in lines[name]][:EXAMPLES]
        for example, where in zip(what["examples"], expected, strict=True):
            assert example.startswith(where)
    assert result["records"] == len(GOOD) + 1
    assert result["rows"] == len(GOOD) + 1 + sum(map(len, FAULTS.values()))
    assert result["rows_without_records"] == 0 and not result["skipped"]
    assert found["near_duplicates"]["examples"][0].endswith(f"alike {path}:{len(GOOD) + 1}")
    assert found["duplicates"]["examples"][0].endswith(f"the same as {path}:3")
    printed = io.StringIO()
    check.print_check(result, Console(file=printed, width=400))
    assert "filters.role_order: 5 left out" in printed.getvalue()
    assert found["empty_turns"]["examples"][0] in printed.getvalue()


@pytest.mark.parametrize("name", [n for n in FAULTS if n != "near_duplicates"])
def test_a_filter_alone_takes_only_its_own(name, planted, rows_file):
    path, lines = planted
    only = Filters(**{name: getattr(FILTERS, name)})
    rows = path.read_text().splitlines()
    kept = rows[: len(GOOD) + 1] + [rows[i - 1] for i in lines[name]]
    path.write_text("\n".join(kept) + "\n")
    found = check.check(path, "comparison", filters=only)
    assert found["records"] == len(GOOD) + 1
    assert found["filters"][name]["removed"] == len(FAULTS[name])


ROW_FILTERS = (
    "empty_turns",
    "role_order",
    "different_contexts",
    "identical_responses",
    "unsafe_chosen",
)


@pytest.mark.parametrize("name", ROW_FILTERS)
def test_without_its_filter_a_fault_is_still_an_error(name, rows_file):
    others = FILTERS.model_copy(update={name: False, "near_duplicates": None})
    for row in FAULTS[name]:
        with pytest.raises(InputError, match=r"rows\.jsonl:2: "):
            check.check(rows_file(GOOD[0], row), "comparison", filters=others)


def test_off_by_default(planted):
    assert Filters().active == ()
    path, _ = planted
    plain = check.check(path, "comparison", skip_invalid=100)
    assert "filters" not in plain
    assert plain["records"] == len(GOOD) + 1 + sum(
        len(faults) for name, faults in FAULTS.items() if name not in ROW_FILTERS
    )


def test_rows_of_several_pairs_lose_only_the_bad_one(rows_file):
    """PKU's row gives a comparison by helpfulness too, HelpSteer's answers one for each pair."""
    safe = {"is_response_0_safe": True, "is_response_1_safe": True}
    unsafe = {f"is_response_{PKU['safer_response_id']}_safe": False}
    path = rows_file({**PKU, **safe, **unsafe})
    found = check.check(path, "comparison", filters=Filters(unsafe_chosen=True))
    assert (found["kinds"], found["left_out"]) == ({"helpfulness": 1}, {})
    assert found["filters"]["unsafe_chosen"]["removed"] == 1
    scores = {"a": 0, "b": 3, "c": 4, "b ": 1}
    answers = [{**HELPSTEER[0], "response": r, "helpfulness": h} for r, h in scores.items()]
    filters = Filters(small_margin=2.0, identical_responses=True)
    found = check.check(rows_file(*answers, name="h.jsonl"), "comparison", filters=filters)
    assert found["records"] == 3  # 3-0, 4-0, 4-1
    assert {n: f["removed"] for n, f in found["filters"].items()} == {
        "identical_responses": 1,
        "small_margin": 2,
    }


def test_other_kinds_of_records():
    u, v = message("user", "u"), message("user", "v")
    groups = {
        "prompt": [Prompt(i, [m]) for i, m in zip("123", (u, v, u), strict=True)],
        "dialogue": [Dialogue([u, message("assistant", a)]) for a in "aba"],
        "document": [Document(text) for text in ("a", "b", "a ")],
    }
    groups["prompt"].append(Prompt("4", [u], "safety"))
    for records in groups.values():
        removed = Removed()
        found = [Located(record, "f", n) for n, record in enumerate(records)]
        kept = keep(Filters(duplicates=True), found, removed)
        assert 2 not in kept and len(kept) == len(records) - 1
        assert removed.examples["duplicates"] == ["f:2: the same as f:0"]
    for kind in ("prompt", "document"):
        with pytest.raises(
            InputError, match=rf"filters.role_order|filters.small_margin: .*{kind}s"
        ):
            Reader("f", kind, filters=Filters(small_margin=1, role_order=kind == "document"))
        assert Filters.usual(kind).require_meaning(kind) is None


def test_a_file_of_faults_alone_is_an_error(rows_file):
    path = rows_file(*FAULTS["empty_turns"])
    with pytest.raises(InputError, match=r"none of its rows gives one \(filters\.empty_turns: 3"):
        check.check(path, "comparison", filters=Filters(empty_turns=True))


def test_longest_counts_tokens_of_the_longer_side(rows_file, small_tokenizer):
    path = rows_file(*({"prompt": "ba", "chosen": "ba", "rejected": "do " * n} for n in (1, 9, 99)))
    with pytest.raises(InputError, match=r"filters\.longest: counts tokens, and no tokenizer"):
        check.check(path, "comparison", filters=Filters(longest=64))
    found = check.check(path, "comparison", filters=Filters(longest=80), tokenizer=small_tokenizer)
    assert found["records"] == 2
    [example] = found["filters"]["longest"]["examples"]
    assert example.startswith(f"{path}:3: ") and example.endswith(" tokens")


def test_the_command_takes_a_recipes_keys(planted, capsys):
    path, _ = planted
    arguments = ["check", str(path), "--as", "comparison", "--skip-invalid", "99", "--json"]
    cli.main([*arguments, "--filters.duplicates", "--filters.small-margin", "1"])
    filters = json.loads(capsys.readouterr().out)["filters"]
    assert {name: what["removed"] for name, what in filters.items()} == {
        "duplicates": 2,
        "small_margin": 1,
    }


def test_a_filter_that_is_none():
    with pytest.raises(ValidationError, match="near_dupes"):
        Filters(near_dupes=0.8)
    with pytest.raises(ValidationError, match="less than 1"):
        Filters(near_duplicates=1.5)


def test_counts_of_many_files(tmp_path):
    for name in ("a", "b"):
        json_lines.write(tmp_path / name, [GOOD[0], *FAULTS["role_order"]])
    filters = Filters(role_order=True)
    reader = Reader([tmp_path / "a", tmp_path / "b"], "comparison", filters=filters)
    assert sum(map(len, reader.located_by_file())) == 2
    assert reader.removed.counts == {"role_order": 10}
    assert len(reader.removed.examples["role_order"]) == EXAMPLES
    assert isinstance(next(iter(reader)), Comparison)
