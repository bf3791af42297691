"""The page that compares versions: from what judges, tasks and the stage evaluate have written."""

import json

import json_lines
import pytest

from llama2rt.errors import InputError
from llama2rt.evaluate.judges import comparing
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.commands import judged
from llama2rt.evaluate.judges.comparing import Answered
from llama2rt.evaluate.judges.judging import Verdict
from llama2rt.pipeline.comparison import page, read_tasks
from llama2rt.report import figures
from llama2rt.report import judged as drawn


class Longest:
    """A judge that takes length for quality."""

    name, kind, ordered, requests = "longest", "model", True, 0

    def check(self, questions):
        pass

    def verdicts(self, questions, cache):
        lengths = [(len(q.first), len(q.second)) for q in questions]
        return [Verdict(0.5 if a == b else float(a > b)) for a, b in lengths]


def versions():
    kinds = ["helpfulness", "safety", "helpfulness"]
    return {
        name: {
            f"p{i}": Answered([{"role": "user", "content": f"q{i}"}], "<b>" * (v + i % 2), kind)
            for i, kind in enumerate(kinds)
        }
        for v, name in enumerate(("sft", "v1", "v2"), start=1)
    }


def test_the_page_has_every_part_and_no_script(tmp_path):
    found = judged(versions(), [Longest()], Cache(), against="sft")
    (tmp_path / "judged.json").write_text(json.dumps(found))
    scores = {
        "sft": {"a": 0.5, "b": 0.25, "c": 1},
        "v1": {"a": {"mean": 0.6, "low": 0.5, "high": 0.7}},
    }
    (tmp_path / "tasks.json").write_text(json.dumps(scores))
    files = []
    for name, answers in versions().items():
        rows = [
            {"prompt_id": p, "messages": a.messages, "response": a.text, "kind": a.kind}
            for p, a in answers.items()
        ]
        json_lines.write(tmp_path / f"{name}.jsonl", rows)
        files.append(tmp_path / f"{name}.jsonl")
    text = page(
        tmp_path / "page.html",
        judged_file=tmp_path / "judged.json",
        tasks=tmp_path / "tasks.json",
        samples=files,
        prompts=2,
    ).read_text()
    for part in (
        "Win rates by each judge",
        "for the first position",
        "<h2>Tasks</h2>",
        "<h2>Answers</h2>",
    ):
        assert part in text
    assert "&lt;b&gt;" in text and "<script" not in text and "<b><b>" not in text
    assert text.count("<td><p class=user>") == 2  # one prompt of each kind

    (section,) = drawn.sections(found)
    sides = section.blocks[0]
    assert sides.rows == [
        ("longest", name, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) for name in ("v1", "v2")
    ]
    (whole,) = drawn.sections(judged(versions(), [Longest()], Cache()))
    assert whole.blocks[0].title == "Win rates between versions, by longest"
    for path, content, said in (
        ("tasks.json", {"v1": {"a": 1.5}}, r"v1.a: expected a number in \[0, 1\]"),
        ("tasks.json", {"v1": {"a": {"low": 0.5}}}, "v1.a"),
        ("tasks.json", {"v1": 3}, "v1: expected an object"),
        ("tasks.json", [], "expected a JSON object"),
    ):
        (tmp_path / path).write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            read_tasks(tmp_path / path)
    (tmp_path / "judged.json").write_text('{"judges": [{}]}')
    with pytest.raises(InputError, match=r"judged.json: not what llama2rt judge writes"):
        page(tmp_path / "none.html", judged_file=tmp_path / "judged.json")
    with pytest.raises(InputError, match="nothing to show"):
        page(tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_versions_without_safety_prompts_have_no_second_axis():
    only = {
        n: {p: a for p, a in v.items() if a.kind == "helpfulness"} for n, v in versions().items()
    }
    pairs = comparing.shown(only, "sft")
    rows = comparing.results(Longest(), pairs, comparing.outcomes(Longest(), pairs, Cache()))
    progress = comparing.progress(rows["pairs"], "sft")
    assert progress["v1"]["harmlessness"] is None
    plot = figures.two_sides({"longest": {"v1": ((0.5, 0.4, 0.6), None)}}, "sft")
    assert "no safety prompts" in plot.svg()
    assert "no data" in figures.radar([], {}).svg()
