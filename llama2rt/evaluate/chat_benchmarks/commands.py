"""`llama2rt benchmark answer|judge|score`: AlpacaEval 2, MT-Bench and Arena-Hard, a verb a step."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from llama2rt import atomic
from llama2rt.errors import InputError
from llama2rt.evaluate.chat_benchmarks import (
    alpaca_eval,
    arena_hard,
    length_control,
    mt_bench,
    mt_bench_pairs,
    style_control,
)
from llama2rt.evaluate.chat_benchmarks.answering import answer
from llama2rt.evaluate.chat_benchmarks.arena_hard import LAYOUTS
from llama2rt.evaluate.chat_benchmarks.records import Answers, Question
from llama2rt.evaluate.judges.cache import Cache
from llama2rt.evaluate.judges.judging import Judge as PairJudge
from llama2rt.evaluate.judges.scorers import LetterJudge, RewardJudge
from llama2rt.evaluate.judges.speakers import (
    AT_ONCE,
    Local,
    Options,
    Server,
    Speaker,
    model_name,
)
from llama2rt.evaluate.judges.speaking import Asking, SpeakingJudge

Benchmark = Literal["alpaca-eval", "mt-bench", "arena-hard-v0.1", "arena-hard-v2.0"]


def _layout(benchmark: str) -> arena_hard.Layout:
    return LAYOUTS[benchmark.removeprefix("arena-hard-")]


def read_questions(benchmark: Benchmark, path: Path) -> list[Question]:
    """A benchmark's questions from its file."""
    if benchmark == "alpaca-eval":
        return alpaca_eval.read_questions(path)
    if benchmark == "mt-bench":
        return mt_bench.read_questions(path)
    return arena_hard.read_questions(path, _layout(benchmark))


def read_answers(benchmark: Benchmark, path: Path) -> Answers:
    """A model's answers from a benchmark's file."""
    if benchmark == "alpaca-eval":
        return alpaca_eval.read_answers(path)
    if benchmark == "mt-bench":
        return mt_bench.read_answers(path)
    return arena_hard.read_answers(path, _layout(benchmark))


@dataclass(frozen=True, kw_only=True)
class Speaking:
    """Who answers: a model's folder or a server."""

    model: Path | None = None
    """A model's folder, or a GGUF file."""
    server: str | None = None
    """URL of a server of OpenAI's API; its key in LLAMA2RT_API_KEY."""
    server_model: str | None = None
    """The model's name at the server; none for the only one that it lists."""
    at_once: int = AT_ONCE
    """Requests to the server at a time."""

    def speaker(self, name: str | None = None) -> Speaker:
        """InputError unless one is given."""
        if (self.model is None) == (self.server is None):
            raise InputError("give either --model FOLDER or --server URL")
        if self.at_once < 1:
            raise InputError(f"at_once: expected at least 1, got {self.at_once}")
        if self.model is not None:
            return Local(self.model, name)
        assert self.server is not None
        return Server(self.server, self.server_model, at_once=self.at_once)


def _cache(out: Path) -> Cache:
    """Beside `out`, so that a run that was stopped goes on."""
    return Cache(out.with_name(f"{out.name}.said.jsonl"))


def _lines(records: Sequence[Any]) -> str:
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Have a model answer a benchmark's questions."""

    benchmark: tyro.conf.Positional[Benchmark]
    """Whose files they are."""
    questions: tyro.conf.Positional[Path]
    """question.jsonl; of AlpacaEval its evaluation set, or any model's outputs."""
    out: Path
    """The answers, in the benchmark's form. What was said stays beside it, to go on from."""
    speaking: Annotated[Speaking, tyro.conf.arg(name="")] = Speaking()
    name: str | None = None
    """The model's name in the files; by default its folder's, or the server's."""
    temperature: float | None = None
    """By default 0, and of MT-Bench what FastChat takes for each category."""
    max_tokens: int = 1024
    """Longest answer."""
    seed: int = 0
    """Of sampling."""
    system: str | None = None
    """A system message before every conversation."""

    def run(self) -> None:
        """Read, ask, write."""
        questions = read_questions(self.benchmark, self.questions)
        if self.max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if self.temperature is not None and not self.temperature >= 0:
            raise InputError(f"temperature: expected at least 0, got {self.temperature}")
        speaker = self.speaking.speaker()
        by_category = self.benchmark == "mt-bench" and self.temperature is None
        options = Options(self.temperature or 0.0, self.max_tokens, self.seed)
        with _cache(self.out) as cache:
            answered = answer(
                speaker,
                questions,
                options,
                cache,
                temperature=mt_bench.temperature if by_category else None,
                system=self.system,
            )
        name = self.name or speaker.name
        if self.benchmark == "alpaca-eval":
            alpaca_eval.write_answers(self.out, name, answered)
        elif self.benchmark == "mt-bench":
            mt_bench.write_answers(self.out, name, answered)
        else:
            arena_hard.write_answers(self.out, name, answered, _layout(self.benchmark))
        print(f"{self.out}: {len(answered)} answers of {name}")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Have a judge read a model's answers."""

    benchmark: tyro.conf.Positional[Benchmark]
    """Whose files they are."""
    questions: tyro.conf.Positional[Path]
    """As of `answer`."""
    answers: Path
    """The model's answers."""
    out: Path
    """annotations.json, JUDGE_single.jsonl or JUDGE_pair.jsonl, or
    model_judgment/JUDGE/MODEL.jsonl."""
    speaking: Annotated[Speaking, tyro.conf.arg(name="")] = Speaking()
    baseline: Path | None = None
    """The answers that they are compared with; of MT-Bench, to judge pairs in place of grading."""
    reward: Path | None = None
    """Of AlpacaEval, a reward model that judges."""
    graded: bool = False
    """Of AlpacaEval, take the judge's probability of A against B in place of its letter."""
    judge_prompts: Path | None = None
    """Of MT-Bench, FastChat's judge_prompts.jsonl; none for this project's prompts."""
    references: Path | None = None
    """Of MT-Bench, reference_answer/JUDGE.jsonl, where the questions hold no right answers."""

    def run(self) -> None:
        """Read, ask, write."""
        questions = read_questions(self.benchmark, self.questions)
        answers = read_answers(self.benchmark, self.answers)
        if self.baseline is None and self.benchmark != "mt-bench":
            raise InputError(f"baseline: {self.benchmark} compares with one")
        baseline = None if self.baseline is None else read_answers(self.benchmark, self.baseline)
        with _cache(self.out) as cache:
            if self.benchmark == "mt-bench":
                records = self._mt_bench(questions, baseline, answers, cache)
            else:
                assert baseline is not None
                records = self._battles(questions, baseline, answers, cache)
        whole = self.benchmark == "alpaca-eval"
        text = (
            json.dumps(records, indent=2, ensure_ascii=False) + "\n" if whole else _lines(records)
        )
        atomic.write(self.out, text)
        print(f"{self.out}: {len(records)} judgements of {answers.model}")

    def _mt_bench(
        self,
        questions: Sequence[Question],
        baseline: Answers | None,
        answers: Answers,
        cache: Cache,
    ) -> list[dict[str, Any]]:
        file, by = self.judge_prompts, self.speaking.speaker()
        references = mt_bench.read_answers(self.references) if self.references else None
        if baseline is None:
            prompts = mt_bench.read_prompts(file) if file else mt_bench.OWN
            return mt_bench.judge(
                by, questions, answers, cache, prompts=prompts, references=references
            )
        prompts = mt_bench_pairs.OWN
        if file is not None:
            prompts = mt_bench.read_prompts(file, mt_bench_pairs.NAMES, mt_bench_pairs.FORMAT)
        return mt_bench_pairs.judge(
            by, questions, answers, baseline, cache, prompts=prompts, references=references
        )

    def _battles(
        self, questions: Sequence[Question], baseline: Answers, answers: Answers, cache: Cache
    ) -> list[dict[str, Any]]:
        if self.benchmark == "alpaca-eval":
            return alpaca_eval.judge(self._pairs(), questions, baseline, answers, cache)
        by, layout = self.speaking.speaker(), _layout(self.benchmark)
        return arena_hard.judge(by, questions, baseline, answers, cache, layout)

    def _pairs(self) -> PairJudge:
        """Who compares two outputs; a local model by its probability of the letters."""
        if self.reward is not None:
            return RewardJudge(model_name(self.reward), {"helpfulness": self.reward})
        if self.speaking.model is not None:
            folder = self.speaking.model
            return LetterJudge(model_name(folder), folder, preference=False)
        return SpeakingJudge(self.speaking.speaker(), None, Asking(graded=self.graded))


@dataclass(frozen=True, kw_only=True)
class Score:
    """What judgements come to, as the benchmark itself counts them."""

    benchmark: tyro.conf.Positional[Benchmark]
    """Whose files they are."""
    judgments: tyro.conf.Positional[tuple[Path, ...]]
    """Files of judgements, of one judge."""
    gamed: Path | None = None
    """Of AlpacaEval, its df_gamed.csv: difficulties and gamed baselines for the length-controlled
    win rate; without it that of its form without them (length_controlled_minimal)."""
    questions: Path | None = None
    """Of AlpacaEval, its evaluation set, where not all of it was judged."""
    plain: bool = False
    """Of AlpacaEval, the win rate alone, which needs no scikit-learn."""
    control: tuple[style_control.Control, ...] = ()
    """Of Arena-Hard, score for answers of equal style: as long, with as much markdown, or both."""
    answers: tuple[Path, ...] = ()
    """For --control, model_answer/MODEL.jsonl of all models, the baseline among them."""
    baseline: str | None = None
    """Name of the model that others are held against: for --control, where judgements do not have
    it; of MT-Bench's pairs, to count what is judged against it alone."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        """Print a line a model."""
        rows = self.rows()
        if self.json:
            print(_json(rows))
            return
        for row in rows:
            print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))

    def rows(self) -> list[dict[str, Any]]:
        """A row a model."""
        if not self.judgments:
            raise InputError("judgments: expected files")
        if self.control and not self.benchmark.startswith("arena-hard"):
            raise InputError(f"control: of arena-hard, got {self.benchmark}")
        if bool(self.answers) != bool(self.control):
            raise InputError("control and answers: expected both or neither")
        if self.baseline is not None and not (self.control or self.benchmark == "mt-bench"):
            raise InputError("baseline: expected with --control, or with mt-bench's pairs")
        if self.benchmark == "alpaca-eval":
            return [self._alpaca_eval(path) for path in self.judgments]
        if self.benchmark == "mt-bench":
            return self._mt_bench()
        layout = _layout(self.benchmark)
        seen: dict[Any, str] = {}
        found = [j for p in self.judgments for j in arena_hard.read_judgments(p, layout, seen)]
        if not self.control:
            return arena_hard.scores(found, layout)
        by_model: dict[str, style_control.Styles] = {}
        for path in self.answers:
            style = style_control.read_styles(path, layout)
            if style.model in by_model:
                raise InputError(
                    f"answers: {path}: another file has answers of {style.model!r} too; a model's "
                    "name is its file's"
                )
            by_model[style.model] = style
        return style_control.scores(found, layout, by_model, self.control, self.baseline)

    def _mt_bench(self) -> list[dict[str, Any]]:
        seen: dict[Any, str] = {}
        if mt_bench_pairs.holds_pairs(self.judgments[0]):
            pairs = [j for p in self.judgments for j in mt_bench_pairs.read_judgments(p, seen)]
            return mt_bench_pairs.scores(pairs, self.baseline)
        if self.baseline is not None:
            raise InputError(
                f"baseline: these judgements are of single answers ({self.judgments[0]}), which "
                "nothing is held against"
            )
        read = mt_bench.read_judgments
        return mt_bench.scores([j for p in self.judgments for j in read(p, seen)])

    def _alpaca_eval(self, path: Path) -> dict[str, Any]:
        annotations = alpaca_eval.read_annotations(path)
        row = {
            "model": annotations[0]["generator_2"],
            "against": annotations[0]["generator_1"],
            **alpaca_eval.win_rate(annotations),
        }
        if self.plain:
            return row
        gamed = length_control.read_gamed(self.gamed) if self.gamed else None
        places = None
        if self.questions is not None:
            known = {q.id: i for i, q in enumerate(alpaca_eval.read_questions(self.questions))}
            try:
                places = [known[annotation["instruction"]] for annotation in annotations]
            except KeyError as error:
                raise InputError(f"{self.questions}: lacks the instruction {error}") from None
        return row | length_control.length_controlled(annotations, gamed, places)


def _json(rows: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"models": rows}, ensure_ascii=False, allow_nan=False)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    if isinstance(value, list):
        return f"[{value[0]:.1f}, {value[1]:.1f}]"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def command(action: Annotated[Answer | Judge | Score, tyro.conf.arg(name="")]) -> None:
    """AlpacaEval 2, MT-Bench and Arena-Hard: make answers, have them judged, score."""
    action.run()
