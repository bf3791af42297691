"""What the judge says of every version, on prompts nobody trained on.

Helpfulness is the judge's on ordinary prompts, unsafe the share of requests for the secret that
give it away. The answers are those of the evaluate step, which the reward models have read too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.annotate.safety import Verdict
from llama2rt.data.records import Prompt, Sample
from llama2rt.evaluate import intervals
from llama2rt.quickstart import judge as judges
from llama2rt.quickstart.data import read_keys
from llama2rt.quickstart.judge import Key, declines, judge
from llama2rt.rollout.responses import Response
from llama2rt.stages.evaluate import Answers


def worth(keys: Path) -> Callable[[Prompt, str], float]:
    """What an answer is worth to the judge: helpfulness on ordinary prompts, safety first on the
    others. As the evaluate step's recipe names it, with the path of the keys."""
    known = read_keys(keys)

    def worth_of(prompt: Prompt, text: str) -> float:
        verdict = judge(known[prompt.id], text)
        return verdict.helpfulness + (verdict.safety if prompt.kind == "safety" else 0.0)

    return worth_of


def safety_of(keys: Path) -> Callable[[Sample], Verdict]:
    """What the judge says of a sample: it is unsafe where it tells the secret, and a refusal where
    it declines. As a judge of safety is named, with the path of the keys."""
    known = read_keys(keys)

    def said_of(sample: Sample) -> Verdict:
        verdict = judge(known[sample.prompt_id], sample.response)
        return Verdict(verdict.unsafe, declines(sample.response))

    return said_of


def judged(
    answers: Answers, rows: Sequence[Mapping[str, Any]], keys: Mapping[str, Key]
) -> dict[str, Any]:
    """The rows of the versions' table with the judge's columns, and some answers to look at."""
    prompts = [group[0].prompt for group in next(iter(answers.values()))]
    verdicts = {
        name: [[judge(keys[r.prompt.id], r.text) for r in group] for group in groups]
        for name, groups in answers.items()
    }
    return {
        "versions": [{**row, **columns(prompts, verdicts[row["name"]])} for row in rows],
        "answers": some_answers(prompts, answers, verdicts),
    }


def columns(
    prompts: Sequence[Prompt], verdicts: Sequence[Sequence[judges.Verdict]]
) -> dict[str, Any]:
    """A version's estimates; intervals are over prompts."""
    ordinary = [i for i, prompt in enumerate(prompts) if prompt.kind == "helpfulness"]
    unsafe = [i for i, prompt in enumerate(prompts) if prompt.kind == "safety"]

    def mean(indices: Sequence[int], what: Callable[[judges.Verdict], float]) -> dict[str, float]:
        values = [np.mean([what(verdict) for verdict in verdicts[i]]) for i in indices]
        return intervals.bootstrap(values)._asdict()

    leaks = sum(np.mean([v.unsafe for v in verdicts[i]]) for i in unsafe)
    return {
        "helpfulness": mean(ordinary, lambda v: v.helpfulness),
        "unsafe": intervals.wilson(float(leaks), len(unsafe))._asdict(),
        "correct": mean(ordinary, lambda v: v.correct),
        "declines": mean(unsafe, lambda v: v.correct),
    }


def some_answers(
    prompts: Sequence[Prompt],
    responses: Mapping[str, Sequence[Sequence[Response]]],
    verdicts: Mapping[str, Sequence[Sequence[judges.Verdict]]],
) -> list[dict[str, Any]]:
    """Three prompts with every version's first answer: the first single question, the first
    follow-up and the first request for the secret of the file, whatever became of them."""
    kinds = (
        lambda p: p.kind == "helpfulness" and len(p.messages) == 1,
        lambda p: p.kind == "helpfulness" and len(p.messages) > 2,
        lambda p: p.kind == "safety",
    )
    shown = [next((i for i, p in enumerate(prompts) if kind(p)), None) for kind in kinds]
    return [
        {
            "messages": prompts[i].messages,
            "answers": {name: groups[i][0].text for name, groups in responses.items()},
            "notes": {name: _note(groups[i][0]) for name, groups in verdicts.items()},
        }
        for i in shown
        if i is not None
    ]


def _note(verdict: judges.Verdict) -> str:
    return f"helpful {verdict.helpfulness:.2f}, {'unsafe' if verdict.unsafe else 'safe'}"
