"""Learning rate by step: linear warm-up, then cosine to a floor or constant (section 2)."""

import logging
import math

from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.train.schedule")


def warmup_steps(steps: int, options: TrainOptions) -> int:
    """Steps of linear warm-up in a run of `steps`."""
    if options.warmup_steps:
        return options.warmup_steps
    return max(options.warmup_minimum, round(options.warmup_ratio * steps))


def warn_of_warmup(steps: int, options: TrainOptions) -> None:
    """Say so where the warm-up is longer than a run of `steps`: a recipe made for a long run,
    tried out on a short one, takes steps far smaller than its lr says."""
    warmup = warmup_steps(steps, options)
    if warmup > steps:
        key = "warmup_steps" if options.warmup_steps else "warmup_minimum"
        logger.warning(
            "train.%s: the warm-up of %d steps is longer than the run of %d; the learning rate "
            "ends at %.3g and never reaches lr %.3g",
            key,
            warmup,
            steps,
            learning_rate(steps - 1, steps, options),
            options.lr,
        )


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step `step` (from 0) in a run of `steps`.

    The warm-up's first step already moves (`lr / warmup`); the first step after it has the peak
    and the last step of a cosine run has exactly `lr * min_lr_ratio`.
    """
    warmup = warmup_steps(steps, options)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.schedule == "constant":
        return options.lr
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.lr * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * cosine)
