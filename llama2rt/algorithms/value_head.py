"""A critic's linear head by ridge regression: the exact end of a warm-up in closed form.

PPO's critic starts from the reward model, whose head speaks in the reward model's units and about
finished answers. Its hidden states are worth keeping, its head is not: what the head should say is
the whitened return from each token on. On one rollout of the first policy that is a linear
regression, and its solution needs no learning rate.

Left out: training the layers below the head, which is PPO's own work.
"""

import torch
from torch import Tensor

FOLDS = 5
# In units of the mean eigenvalue of the inputs' second moment; infinity is the head of zeros.
PENALTIES = (*(10.0**i for i in range(-5, 2)), float("inf"))


class RidgeRegression:
    """Least squares without intercept, its penalty chosen by cross-validation over groups.

    Rows come in batches; kept are their moments, fp64 [dim, dim] a fold. All rows of a group fall
    into one fold: tokens of a response share one reward, so a penalty that were chosen by single
    tokens would be as good as none.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        options = {"dtype": torch.float64, "device": device}
        self._second = torch.zeros(FOLDS, dim, dim, **options)  # type: ignore[call-overload]
        self._cross = torch.zeros(FOLDS, dim, **options)  # type: ignore[call-overload]
        self._squares = torch.zeros(FOLDS, **options)  # type: ignore[call-overload]

    @torch.no_grad()
    def add(self, inputs: Tensor, targets: Tensor, groups: Tensor) -> None:
        """Rows [n, dim] with their targets [n] and the number of the group each belongs to."""
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
        # Of equal errors (all rows in one group: nothing is left to fit) the largest penalty's.
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
