"""Steps whose loss or gradient norm lies far above those before it are skipped, not taken.

A damaged batch, or a device that computes wrong but finite numbers, can throw a run back by days in
one step. The rule is that of OLMo-core's SkipStepOptimizer: the mean and six standard deviations of
the last 128 steps; but only accepted steps count here, so that one outlier does not excuse the
next. Neither Llama 2 nor the online RLHF paper skips a step, and a run that does takes another
course: hence nothing is skipped unless a recipe asks for it.
"""

import logging

import torch
from torch import Tensor

from llama2rt.parallel import is_main
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.train.outliers")

_NAMES = ("loss", "gradient norm")


class Outliers:
    """The losses and gradient norms of the last accepted steps of one optimizer.

    They are the same bits on every rank, and so is what follows from them. Nothing is kept where
    `outlier_sigmas` is 0.
    """

    def __init__(self, options: TrainOptions) -> None:
        self._sigmas, self._limit = options.outlier_sigmas, options.outlier_limit
        self._window = torch.full((options.outlier_window, 2), torch.nan, dtype=torch.float64)
        # Steps accepted, skipped, and skipped since the last accepted one.
        self._counts = torch.zeros(3, dtype=torch.int64)

    def accept(self, loss: float | None, norm: float) -> bool:
        """Whether a step with this loss (None where it says nothing) and gradient norm is to be
        taken; it is counted either way. A window that is not full yet accepts everything."""
        if not self._sigmas:
            return True
        values = torch.tensor([torch.nan if loss is None else loss, norm], dtype=torch.float64)
        accepted, skipped, in_a_row = self._counts.tolist()
        if accepted >= len(self._window) and self._far(values):
            self._counts.copy_(torch.tensor([accepted, skipped + 1, in_a_row + 1]))
            return False
        self._window[accepted % len(self._window)] = values
        self._counts.copy_(torch.tensor([accepted + 1, skipped, 0]))
        return True

    @property
    def too_many(self) -> str | None:
        """What is wrong where as many steps in a row as the limit allows have been skipped."""
        in_a_row = int(self._counts[2])
        if not self._sigmas or in_a_row < self._limit:
            return None
        return f"{in_a_row} steps in a row were outliers by train.outlier_sigmas"

    def metrics(self) -> dict[str, float]:
        """`skipped`: steps not taken since the run began; empty where none ever is."""
        return {"skipped": float(self._counts[1])} if self._sigmas else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The window and the counts, for a checkpoint to hold and to be copied into."""
        if not self._sigmas:
            return {}
        return {"outliers.window": self._window, "outliers.counts": self._counts}

    def _far(self, values: Tensor) -> bool:
        means, deviations = self._window.mean(0), self._window.std(0)
        far = values > means + self._sigmas * deviations  # False where there is no loss
        for name, value, mean, deviation, is_far in zip(
            _NAMES, values, means, deviations, far, strict=True
        ):
            if is_far and is_main():
                logger.warning(
                    "a step skipped: its %s of %.4g is %.1f standard deviations above the mean of "
                    "the last %d accepted ones, %.4g",
                    name,
                    value,
                    (value - mean) / deviation,
                    len(self._window),
                    mean,
                )
        return bool(far.any())
