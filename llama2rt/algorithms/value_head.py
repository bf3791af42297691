"""A critic's linear head by ridge regression, in place of a warm-up by gradient steps.

PPO's critic starts from the reward model. The reward model's hidden states are worth keeping; its
head is not, since it predicts the reward of a finished answer, and the critic's must predict the
whitened return from each token on. On one rollout of the first policy that is a linear regression,
whose solution needs no learning rate. The layers below the head are trained by PPO itself.
"""

import torch
from torch import Tensor

FOLDS = 5
# In units of the mean eigenvalue of the inputs' second moment; infinity is the head of zeros.
PENALTIES = (*(10.0**i for i in range(-5, 2)), float("inf"))


class RidgeRegression:
    """Least squares without intercept, with a penalty set by cross-validation over groups.

    Rows come in batches, of which only moments are kept, fp64 [dim, dim] a fold. All rows of a
    group fall into one fold: the tokens of a response share one reward, so folds of single tokens
    would find no penalty worth having.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        options = {"dtype": torch.float64, "device": device}
        self._second = torch.zeros(FOLDS, dim, dim, **options)  # type: ignore[call-overload]
        self._cross = torch.zeros(FOLDS, dim, **options)  # type: ignore[call-overload]
        self._squares = torch.zeros(FOLDS, **options)  # type: ignore[call-overload]

    @torch.no_grad()
    def add(self, inputs: Tensor, targets: Tensor, groups: Tensor) -> None:
        """inputs: [n, dim]. targets: [n]. groups: int64 [n], the group that each row belongs to."""
        for fold in range(FOLDS):
            rows = groups % FOLDS == fold
            x, y = inputs[rows].double(), targets[rows].double()
            self._second[fold] += x.T @ x
            self._cross[fold] += x.T @ y
            self._squares[fold] += y @ y

    @torch.no_grad()
    def solve(self) -> tuple[Tensor, float]:
        """(weight fp32 [dim], share of the targets' squares explained in folds left out).

        The share is at least 0, because a weight of zeros is among the candidates.
        """
        second, cross = self._second.sum(0), self._cross.sum(0)
        unit = float(second.diagonal().mean())
        total = float(self._squares.sum())
        if unit == 0.0 or total == 0.0:
            return torch.zeros_like(cross, dtype=torch.float32), 0.0
        errors = [self._error_left_out(second, cross, unit * penalty) for penalty in PENALTIES]
        # Equal errors (all rows in one group, so nothing is left to fit): the largest penalty.
        best = min(reversed(range(len(PENALTIES))), key=errors.__getitem__)
        weight = _ridge(second, cross, unit * PENALTIES[best])
        return weight.float(), 1.0 - errors[best] / total

    def _error_left_out(self, second: Tensor, cross: Tensor, penalty: float) -> float:
        error = 0.0
        for fold in range(FOLDS):
            weight = _ridge(second - self._second[fold], cross - self._cross[fold], penalty)
            explained = 2 * weight @ self._cross[fold] - weight @ self._second[fold] @ weight
            error += float(self._squares[fold] - explained)
        return error


def _ridge(second: Tensor, cross: Tensor, penalty: float) -> Tensor:
    if penalty == float("inf"):
        return torch.zeros_like(cross)
    damped = second + penalty * torch.eye(len(cross), dtype=second.dtype, device=second.device)
    return torch.cholesky_solve(cross[:, None], torch.linalg.cholesky(damped))[:, 0]
