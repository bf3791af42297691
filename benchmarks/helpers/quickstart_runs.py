"""What studies of the RLHF stages take from finished runs of the quickstart: models, prompts, and
the judge that no model saw."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.evaluate import intervals
from llama2rt.quickstart.data import read_keys
from llama2rt.quickstart.judge import Verdict, judge
from llama2rt.report.plot import Plot
from llama2rt.rollout.responses import Response
from llama2rt.stages import evaluate

# As in the quickstart's plan: eps is for gradients of a model this small.
TRAIN = {"lr": 1e-3, "eps": 1e-8, "warmup_ratio": 0.05, "log_every": 10, "checkpoint_every": 0}
SAMPLING = {"max_tokens": 56}


def rewards(folder: Path) -> dict[str, Path]:
    """The reward models of a run's last batch of comparisons."""
    batches = len(list(folder.glob("reward-safety-*")))
    return {
        kind: folder / f"reward-{kind}-{batches}" / "model" for kind in ("helpfulness", "safety")
    }


def without_drawings() -> None:
    """matplotlib takes longer than a stage of the toy, and nobody sees these runs' pages."""
    Plot.svg = lambda plot, salt="": "<svg></svg>"  # type: ignore[method-assign]


def answers(
    folder: Path, versions: Mapping[str, Path], prompts: Path, out: Path, seed: int
) -> evaluate.Answers:
    """An answer of each version to each of the held-out `prompts`, at temperature 1."""
    recipe = evaluate.EvaluateRecipe(
        versions=versions,
        reference=folder / "sft" / "model",
        rewards=rewards(folder),
        data=[prompts],
        sampling=SAMPLING,
        seed=seed,
    )
    return evaluate.read_answers(evaluate.run(recipe, out, resume=True))


def judged(
    folder: Path,
    found: evaluate.Answers,
    wanted: Callable[[Response], bool],
    what: Callable[[Verdict], float],
) -> dict[str, np.ndarray]:
    """By version, [prompts]: the mean over a prompt's answers of what the judge says, on the
    prompts that are wanted."""
    keys = read_keys(folder / "judge" / "keys.json")
    return {
        name: np.array(
            [
                np.mean([what(judge(keys[r.prompt.id], r.text)) for r in group])
                for group in groups
                if wanted(group[0])
            ]
        )
        for name, groups in found.items()
    }


def told(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The mean of each version with its 95 % interval over prompts."""
    return {name: intervals.bootstrap(row)._asdict() for name, row in values.items()}


def over_seeds(
    rows: list[dict[str, np.ndarray]], folders: Sequence[Path], better: str, worse: str
) -> dict[str, Any]:
    """`better` less `worse` on the same prompts of all seeds together, with its interval, and of
    each seed. Seeds that began with one folder answered the same prompts: of a prompt the mean over
    them counts, once."""
    differences = [row[better] - row[worse] for row in rows]
    places = [Path(folder).resolve() for folder in folders]
    by_prompt = np.concatenate(
        [
            np.mean([d for d, p in zip(differences, places, strict=True) if p == place], axis=0)
            for place in dict.fromkeys(places)
        ]
    )
    return {
        **intervals.bootstrap(by_prompt)._asdict(),
        "seeds": [float(difference.mean()) for difference in differences],
        "prompts": len(by_prompt),
    }


def ordinary(response: Response) -> bool:
    """Of the five skills, and no request for the secret."""
    return response.prompt.kind == "helpfulness"
