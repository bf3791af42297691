"""Does a judge of pairs favour a position? The same pairs, asked in both orders.

Who says P(A is better) of two responses may say more for whichever stands first (Llama 2, section
3.4.2; RLHF Workflow, arXiv 2405.07863, averages both orders for it). The average hides how much:
this shows it.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate.intervals import bootstrap, wilson


def position_bias(as_first: ArrayLike, as_second: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """The bias of a judge from its P(chosen is better) in [0, 1] of n pairs: with the chosen
    response shown first, and shown second.

    Gives, each as {mean, low, high} with its 95 % interval over pairs: `first`, its mean
    probability for the first position (0.5 without a bias); `accuracy_as_first` and
    `accuracy_as_second`, how often one order alone ranks as annotated, 0.5 half; `flipped`, the
    share of pairs of which the two orders say opposite things; and `pairs`, how many there are.
    ValueError for no pairs, unequal lengths, and what is no probability.
    """
    first = np.asarray(as_first, dtype=np.float64)
    second = np.asarray(as_second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"expected equally long non-empty vectors, got shapes {first.shape} and {second.shape}"
        )
    for values in (first, second):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("expected probabilities in [0, 1]")
    n = len(first)
    right = [np.where(values == 0.5, 0.5, values > 0.5) for values in (first, second)]
    flipped = (first - 0.5) * (second - 0.5) < 0
    return {
        "first": bootstrap((first + 1 - second) / 2, seed=seed)._asdict(),
        "accuracy_as_first": wilson(float(right[0].sum()), n)._asdict(),
        "accuracy_as_second": wilson(float(right[1].sum()), n)._asdict(),
        "flipped": wilson(float(flipped.sum()), n)._asdict(),
        "pairs": n,
    }
