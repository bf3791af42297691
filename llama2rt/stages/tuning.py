"""The temperature of rejection sampling, measured for each version (section 3.2.3, Figure 8).

Some of the prompts are answered at several temperatures; the one whose best of K answers is
expected to earn most is then sampled at (`evaluate.temperature`). An answer that cannot become a
target, such as one that the length limit cut, counts as the worst of its prompt: at a high
temperature the best by reward is more and more often one of those.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama2rt.data.records import Prompt
from llama2rt.evaluate import temperature
from llama2rt.planning import Model, Phase, Sampling
from llama2rt.rollout import sampling
from llama2rt.rollout.responses import Response
from llama2rt.rollout.reward import RewardOptions
from llama2rt.rollout.sampling import Sampler, derived_seed, shuffled
from llama2rt.run import check_integers
from llama2rt.stages.selection import usable
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.stages.tuning")


class TuneOptions(BaseModel):
    """Measure the best temperature before sampling at it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default=[])
    """to choose among; none to sample at temperature. The paper's figure has 0.6 to 1.5"""
    prompts: int = Field(default=100, gt=0)
    """of data, drawn from the seed: that many are answered at each temperature, or all where there
    are fewer"""
    samples: int | None = Field(default=None, gt=0)
    """answers to each of them at each temperature, at least the recipe's samples; None for as many.
    More make the curves longer (the paper's end at 100) and the choice surer"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_integers(self)
        if len(self.temperatures) == 1 or len(set(self.temperatures)) < len(self.temperatures):
            # A sample's random numbers depend on its temperature: it would be drawn twice.
            raise ValueError(
                f"temperatures: expected two or more different ones, got {self.temperatures}"
            )
        if self.samples is not None and not self.temperatures:
            raise ValueError("samples: only with temperatures")
        return self

    def each(self, samples: int) -> int:
        """Answers to a prompt at a temperature, of a recipe that samples so many."""
        return self.samples or samples


def check(options: TuneOptions, samples: int, temperature: float, rewards: RewardOptions) -> None:
    """ValueError where a recipe's other keys do not go with `options`."""
    if not options.temperatures:
        return
    if temperature != 1.0:
        raise ValueError("temperature: is chosen among tune.temperatures; leave one of them out")
    if options.each(samples) < samples:
        raise ValueError(
            f"tune.samples: expected at least samples, {samples}, whose best is what is tuned, "
            f"got {options.samples}"
        )
    if rewards.preference is not None and rewards.ranking == "tournament":
        raise ValueError(
            "tune: a tournament says who is best and worst, and nothing of the others: take "
            "rewards.ranking win_rate"
        )


def tune(
    options: TuneOptions,
    folder: Path,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """`temperature.choose` for the best of `samples`, and in each row `cut`, the share of answers
    that were cut. What is drawn is kept in `folder` (`sampling.sample`). All ranks take part."""
    tuning_seed = derived_seed(seed, "tune")
    some = shuffled(prompts, min(options.prompts, len(prompts)), tuning_seed, after=0)
    each = options.each(samples)
    groups = sampling.sample(
        folder,
        sampler,
        some,
        n=each * len(options.temperatures),
        temperatures=options.temperatures,
        seed=tuning_seed,
    )
    tokenizer = sampler.engine.tokenizer
    worth = np.array([_worth(group, tokenizer) for group in groups])
    cut = np.array([[not response.finished for response in group] for group in groups])
    part = {t: slice(i * each, (i + 1) * each) for i, t in enumerate(options.temperatures)}
    found = temperature.choose({t: worth[:, at] for t, at in part.items()}, samples, seed=seed)
    for row in found["temperatures"]:
        row["cut"] = float(cut[:, part[row["temperature"]]].mean())
    best = next(r for r in found["temperatures"] if r["behind"] is None)["best"]
    logger.info(
        "temperature %g: the best of %d answers earns %.3f (95 %% interval %.3f to %.3f)",
        *(found["temperature"], samples, best["mean"], best["low"], best["high"]),
    )
    return found


def _worth(group: Sequence[Response], tokenizer: Tokenizer) -> list[float]:
    lowest = min(response.reward for response in group)
    return [response.reward if usable(response, tokenizer) else lowest for response in group]


def phases(
    options: TuneOptions,
    samples: int,
    ranking: Sequence[Model],
    sampling: Sampling,
    lengths: Sequence[int] | None,
) -> list[Phase]:
    """What `--dry-run` says of it: as the `sampling` of the K answers, of fewer prompts."""
    if not options.temperatures:
        return []
    answers = None
    if lengths is not None:
        drawn = options.each(samples) * len(options.temperatures)
        answers = float(drawn * min(options.prompts, len(lengths)))
    return [Phase("tuning", frozen=ranking, sampling=replace(sampling, answers=answers))]
