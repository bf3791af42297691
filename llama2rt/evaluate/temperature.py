"""Which temperature to sample at (Llama 2, section 3.2.3, Figure 8).

The best of N samples gains from temperature until answers fall apart, the later the larger N is;
RLHF moves the optimum (the paper: 1.2 to 1.3 for 10 to 100 samples of an RLHF model), so that it is
measured again for each version.

Intervals resample prompts. Resampling a prompt's samples with replacement too would bias what it is
for: a sample of the samples holds some twice and the largest not at all a third of the time, and so
has a smaller maximum (Efron and Tibshirani, 7.4, on the bootstrap of a maximum). A prompt's own
value, exact over all subsets of its samples, carries their noise into the interval.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.evaluate import best_of
from llama2rt.evaluate.intervals import bootstrap_columns, paired


def choose(rewards: Mapping[float, ArrayLike], n: int, *, seed: int = 0) -> dict[str, Any]:
    """The temperature with the largest expected best reward among `n` samples; of equal ones the
    lowest.

    rewards: by temperature, [prompts, S] over the same prompts, S >= n. Gives `temperature`, `n`,
    `prompts`, `samples` and `temperatures`, a row for each in rising order: `temperature`; `curve`
    (`best_of.curves` with `low` and `high`, the 95 % ends of `max`); `best`, its value at n as
    {mean, low, high}; `behind`, by how much the chosen one is better on the same prompts, likewise
    (None of itself): where its low is not above 0 the two are not told apart.
    ValueError for no temperature, other prompts or too few samples.
    """
    if not rewards:
        raise ValueError("rewards: expected at least one temperature")
    tables = {t: np.asarray(rewards[t], dtype=np.float64) for t in sorted(rewards)}
    shapes = {table.shape for table in tables.values()}
    if len(shapes) > 1:
        raise ValueError(f"rewards: expected the same prompts and samples, got {sorted(shapes)}")
    by_size = {t: best_of.largest(table) for t, table in tables.items()}
    prompts, samples = next(iter(by_size.values())).shape
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected 1 to {samples}, the samples of a prompt, got {n}")
    at_n = {t: found[:, n - 1] for t, found in by_size.items()}
    means = {t: float(found.mean()) for t, found in at_n.items()}
    chosen = max(means, key=lambda t: (means[t], -t))
    columns = bootstrap_columns(np.concatenate([*by_size.values()], axis=1), seed=seed)
    rows = []
    for i, (t, table) in enumerate(tables.items()):
        ends = columns[i * samples : (i + 1) * samples]
        behind = None if t == chosen else paired(at_n[chosen], at_n[t], seed=seed)._asdict()
        curve = {
            **best_of.curves(table),
            "low": [end.low for end in ends],
            "high": [end.high for end in ends],
        }
        best = ends[n - 1]._asdict()
        rows.append({"temperature": t, "curve": curve, "best": best, "behind": behind})
    return {
        "temperature": chosen,
        "n": n,
        "prompts": prompts,
        "samples": samples,
        "temperatures": rows,
    }
