"""Made judgements and answers of Arena-Hard, of a judge that likes long answers with markdown, for
the test of style control and its comparison with Arena-Hard's own code."""

import json
import random
from pathlib import Path
from typing import Any

BASELINE, MODELS = "base", ("plain", "rich")
_STRENGTH = {"base": 0.0, "plain": 0.3, "rich": -0.1}
_RICHNESS = {"base": 1.0, "plain": 0.5, "rich": 2.0}
_KEYS = {"v0.1": ("question_id", "model_id", "conv_metadata"), "v2.0": ("uid", "model", "metadata")}


def write(
    folder: Path, version: str, questions: int = 60, seed: int = 0
) -> tuple[Path, list[Path]]:
    """(judgements, answers by model) below `folder`, where Arena-Hard's own tools look for them."""
    draw = random.Random(seed)
    root = folder / "data" / f"arena-hard-{version}"
    styles = {
        model: [_style(draw, _RICHNESS[model]) for _ in range(questions)]
        for model in (BASELINE, *MODELS)
    }
    identifier, name, key = _KEYS[version]
    answers = []
    for model, found in styles.items():
        rows = [
            {identifier: f"q{i}", name: model, "choices": [], "messages": [], key: style}
            for i, style in enumerate(found)
        ]
        answers.append(_lines(root / "model_answer" / f"{model}.jsonl", rows))
    judgments = []
    for model in MODELS:
        for i in range(questions):
            ours, theirs = (styles[m][i]["token_len"] for m in (model, BASELINE))
            better = _STRENGTH[model] + 2 * (ours - theirs) / (ours + theirs)
            games = [{"score": _label(draw, sign * better)} for sign in (1, -1)]
            about = {identifier: f"q{i}", "model": model, "judge": "judge", "games": games}
            judgments.append(about | ({"category": "hard_prompt"} if version == "v2.0" else {}))
    return _lines(root / "model_judgment" / "judge" / "all.jsonl", judgments), answers


def _style(draw: random.Random, rich: float) -> dict[str, Any]:
    tokens = int(200 * rich * (0.5 + draw.random()))
    return {
        "token_len": tokens,
        "header_count": {f"h{n}": int(draw.random() * rich * 2) for n in range(1, 7)},
        "list_count": {"ordered": int(draw.random() * rich * 6), "unordered": int(tokens / 90)},
        "bold_count": {"**": int(draw.random() * rich * 8), "__": int(draw.random() * 1.5)},
    }


def _label(draw: random.Random, second: float) -> str | None:
    """Of a game whose second answer is better by so much."""
    value = second + 1.2 * (draw.random() + draw.random() - 1)
    if draw.random() < 0.04:
        return None
    if abs(value) < 0.15:
        return "A=B"
    sign = ">>" if abs(value) > 0.9 else ">"
    return f"B{sign}A" if value > 0 else f"A{sign}B"


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
