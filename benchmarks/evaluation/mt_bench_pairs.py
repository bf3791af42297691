"""MT-Bench's pairwise mode beside FastChat's own code: records and win rates.

    pip install --target build/peers --no-deps fschat==0.2.36
    python -P benchmarks/evaluation/mt_bench_pairs.py build/peers --out RECORD.json

A stand-in judge, which answers by a hash of what it is told (A, B, a tie, or no verdict), judges
three models' made answers to questions of one and two turns, some with right answers, through
`llama2rt.evaluate.chat_benchmarks.mt_bench_pairs` and through FastChat's `play_a_match_pair`, by
the same prompts, in the baseline mode. The records must be the same but for their time; FastChat's
`load_pairwise_model_judgments` must read ours, and its `display_result_pairwise` counts ours to the
win rates that ours gives. Stand-ins are imported for libraries that it loads and does not use here.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import records

from llama2rt import atomic
from llama2rt.evaluate.chat_benchmarks import mt_bench, mt_bench_pairs
from llama2rt.evaluate.chat_benchmarks.records import Answered, Question
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.speakers import Options, Reply, Told

JUDGE, BASELINE, MODELS = "gpt-4", "base", ("m1", "m2")
SAYS = ("It is [[A]].", "It is [[B]].", "No difference: [[C]]", "I cannot say.")


def said(system: str, user: str) -> str:
    """What the judge says: a verdict for three replies in ten each, none for one."""
    number = hashlib.sha256(f"{system}\n{user}".encode()).digest()[0] % 10
    return SAYS[min(number // 3, 3)]


class StandIn:
    """The judge as a `Speaker`."""

    name, requests = JUDGE, 0

    def identity(self) -> Any:
        return self.name

    def answer(self, prompts: Sequence[Any], options: Options, tell: Told) -> None:
        for i, messages in enumerate(prompts):
            tell(i, Reply(said(*(message["content"] for message in messages))))


def write(folder: Path) -> list[Question]:
    """Questions, answers, right answers and prompts, where FastChat looks for them."""
    categories = ("writing", "math", "stem")
    questions = [
        Question(i, ("first?", f"second {i}?")[: 1 + (i % 5 > 0)], categories[i % 3])
        for i in range(60)
    ]
    rows = [
        {"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in questions
    ]
    _lines(folder / "question.jsonl", rows)
    for model in (*MODELS, BASELINE, JUDGE):
        answered = [
            Answered(q, tuple(Reply(f"{model} says {q.id}.{turn}") for turn in range(2)))
            for q in questions
        ]
        where = "reference_answer" if model == JUDGE else "model_answer"
        mt_bench.write_answers(folder / where / f"{model}.jsonl", model, answered)
    _lines(
        folder / "judge_prompts.jsonl",
        [
            {
                "name": name,
                "type": "pairwise",
                "system_prompt": mt_bench_pairs.OWN[key].system,
                "prompt_template": mt_bench_pairs.OWN[key].user,
                "output_format": mt_bench_pairs.FORMAT,
            }
            for key, name in mt_bench_pairs.NAMES.items()
        ],
    )
    return questions


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(folder: Path) -> list[dict[str, Any]]:
    questions = mt_bench.read_questions(folder / "question.jsonl")
    answers = {
        model: mt_bench.read_answers(folder / "model_answer" / f"{model}.jsonl")
        for model in (*MODELS, BASELINE)
    }
    prompts = mt_bench.read_prompts(
        folder / "judge_prompts.jsonl", mt_bench_pairs.NAMES, mt_bench_pairs.FORMAT
    )
    references = mt_bench.read_answers(folder / "reference_answer" / f"{JUDGE}.jsonl")
    found = []
    with Cache() as cache:
        for model in MODELS:
            found += mt_bench_pairs.judge(
                StandIn(), questions, answers[model], answers[BASELINE], cache,
                prompts=prompts, references=references,
            )  # fmt: skip
    return found


def theirs(folder: Path, common: Any, gen: Any) -> list[dict[str, Any]]:
    """FastChat's records, by its own `play_a_match_pair` over its own matches."""
    system: list[str] = []
    user: list[str] = []

    class Conversation:
        roles = ("user", "assistant")

        def set_system_message(self, text: str) -> None:
            system.append(text)

        def append_message(self, role: str, text: str | None) -> None:
            if text is not None:
                user.append(text)

    common.get_conversation_template = lambda model: Conversation()
    common.OPENAI_MODEL_LIST = [JUDGE]
    common.chat_completion_openai = lambda *_, **__: said(system[-1], user[-1])
    questions = common.load_questions(str(folder / "question.jsonl"), None, None)
    answers = common.load_model_answers(str(folder / "model_answer"))
    references = common.load_model_answers(str(folder / "reference_answer"))
    judges = gen.make_judge_pairwise(
        JUDGE, common.load_judge_prompts(str(folder / "judge_prompts.jsonl"))
    )
    common.check_data(questions, answers, references, list(MODELS), judges)
    found = []
    for kind, judge in judges.items():
        mine = [
            q for q in questions
            if (q["category"] in common.NEED_REF_CATS) == kind.startswith("math")
        ]  # fmt: skip
        matches = gen.make_match(
            mine, list(MODELS), answers, judge, BASELINE,
            references if judge.ref_based else None, judge.multi_turn,
        )  # fmt: skip
        found += [common.play_a_match_pair(match, None) for match in matches]
    return found


def keyed(found: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {
        (r["question_id"], r["model_1"], r["turn"]): {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in r.items()
            if key != "tstamp"
        }
        for r in found
    }


def printed(show: Any, path: Path, baseline: str | None) -> dict[str, dict[str, float]]:
    """The table of `display_result_pairwise`, by model and column."""
    said_there = io.StringIO()
    arguments = argparse.Namespace(
        input_file=str(path), bench_name="mt_bench", judge_model=JUDGE,
        baseline_model=baseline, model_list=None,
    )  # fmt: skip
    with contextlib.redirect_stdout(said_there):
        show.display_result_pairwise(arguments)
    _, header, _, *lines = said_there.getvalue().splitlines()
    columns = header.split()
    return {
        line.split()[0]: dict(zip(columns, map(float, line.split()[1:]), strict=True))
        for line in lines
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(given.peers))
    for name in ("openai", "anthropic", "fastchat.model.model_adapter", "fastchat.model"):
        sys.modules[name] = MagicMock()
    common, gen, show = (
        importlib.import_module(f"fastchat.llm_judge.{name}")
        for name in ("common", "gen_judgment", "show_result")
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        mine = ours(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            other = theirs(folder, common, gen)
        assert keyed(mine) == keyed(other) and len(mine) == len(other)
        path = folder / f"{JUDGE}_pair.jsonl"
        _lines(path, mine)
        read = common.load_pairwise_model_judgments(str(path))
        assert sum(map(len, read.values())) == len(mine)
        judged = mt_bench_pairs.read_judgments(path)
        worst = 0.0
        tables: dict[str, Any] = {}
        for against in (BASELINE, None):
            rows = mt_bench_pairs.scores(judged, against)
            table = printed(show, path, against)
            assert table.keys() == {row["model"] for row in rows}
            for row in rows:
                for column, value in table[row["model"]].items():
                    figure = row[column]
                    figure = figure["mean"] if isinstance(figure, dict) else figure
                    worst = max(worst, abs(value - figure))
            tables[f"against {against}" if against else "all pairs"] = table
    record = {
        **records.header("cpu"),
        "fschat": "0.2.36",
        "records": len(mine),
        "winners": {
            winner: sum(r[game] == winner for r in mine for game in ("g1_winner", "g2_winner"))
            for winner in ("model_1", "model_2", "tie", "error")
        },
        "records_that_differ": 0,
        "largest_difference_of_a_printed_figure": worst,
        "printed": tables,
    }
    atomic.write(given.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
