"""What changed from one version to the next, whatever plan made them.

Every function takes responses or scores that a plan has at hand and gives plain numbers for
report.json, each estimate as {mean, low, high} with its 95 % interval; `report.versions` draws
them. Nothing here samples, loads a model or knows a task: where a judge exists, its worth of each
response comes in as a number.

A prompt is the unit of every interval over responses, since its samples are alike; a pair is that
of every interval over comparisons.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from llama2rt.data.records import Comparison, Prompt
from llama2rt.evaluate import best_of, length, preference, win_rates
from llama2rt.evaluate.calibration import calibration
from llama2rt.evaluate.intervals import Interval, bootstrap, bootstrap_columns, paired, wilson
from llama2rt.evaluate.over_optimisation import reward_against_judge

Estimate = dict[str, float | None]
"""mean, low, high; low and high are None where a number came without its values."""


class ScoredResponse(Protocol):
    """What is read of a response; `rollout`'s fits."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def finished(self) -> bool:
        """False where the length limit cut it."""

    @property
    def reward(self) -> float:
        """logit(Rc) (Llama 2, section 3.2.3)."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Each reward model's score in (0, 1), by model."""

    @property
    def temperature(self) -> float: ...


Responses = Sequence[Sequence[ScoredResponse]]
"""One version's responses, by prompt, then sample; as many samples of each prompt."""


def of_versions(
    responses: Mapping[str, Responses],
    *,
    worth: Mapping[str, Sequence[Sequence[float]]] | None = None,
    kl: Mapping[str, Mapping[str, float | Sequence[float]]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare versions that answered the same prompts at the same temperature.

    responses: by version, first to last. worth: the judge's, [prompts][samples] a version, higher
    for better; for all versions, or None without a judge. kl: KL(version || reference policy) in
    nats a response by estimator ("k1", "k3"), as one number or as one a prompt, for the versions
    that have one.

    Gives `versions` (a row each, see `_row`), `reward_win_rates` and, with a judge, `win_rates`
    (win rates of the row over the column on the prompts, ties half, with their intervals; None on
    the diagonal), with three samples of a prompt or more `length_correlation` (`length_bias`; two
    correlate perfectly or not at all) and, with a judge, `reward_against_judge` by kind of prompt
    and version (Rc comes from another model on each kind, and a judge may rate them on another
    scale).
    ValueError where versions differ in their prompts or temperature, a prompt lacks samples that
    others have, or a number is not finite.
    """
    _require_comparable(responses)
    for what, given in (("worth", worth), ("kl", kl)):
        if unknown := set(given or ()) - set(responses):
            raise ValueError(f"{what}: no version {min(unknown)!r} among {list(responses)}")
    judged: dict[str, np.ndarray] = {}
    if worth is not None:
        judged = {name: _worth(name, worth, groups) for name, groups in responses.items()}
    rewards = {name: _table(groups, _reward) for name, groups in responses.items()}
    numbers: dict[str, Any] = {
        "versions": _with_intervals(
            [
                _row(name, groups, judged.get(name), (kl or {}).get(name, {}))
                for name, groups in responses.items()
            ],
            seed,
        ),
        "reward_win_rates": _win_rates(rewards),
    }
    if next(iter(rewards.values())).shape[1] > 2:
        numbers["length_correlation"] = length_bias(responses, seed=seed)
    if judged:
        numbers["win_rates"] = _win_rates(judged)
        kinds = _kinds(next(iter(responses.values())))
        numbers["reward_against_judge"] = {
            str(kind): {
                name: reward_against_judge(
                    rewards[name][kinds == kind], judged[name][kinds == kind], seed=seed
                )
                for name in responses
            }
            for kind in np.unique(kinds)
        }
    return numbers


def sampling(responses: Mapping[str, Responses]) -> dict[str, dict[str, best_of.Curves]]:
    """Expected max and median reward among N samples, by version and temperature.

    Responses to one prompt may be at several temperatures; each gives a curve of its own, under
    the temperature as text (a key of JSON). ValueError where a temperature has not as many
    samples of every prompt.
    """
    curves: dict[str, dict[str, best_of.Curves]] = {}
    for name, groups in responses.items():
        temperatures = sorted({response.temperature for group in groups for response in group})
        curves[name] = {}
        for temperature in temperatures:
            at = [[r for r in group if r.temperature == temperature] for group in groups]
            _require_rectangular(f"{name} at temperature {temperature:g}", at)
            curves[name][str(temperature)] = best_of.curves(_table(at, _reward))
    return curves


def length_bias(responses: Mapping[str, Responses], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Correlation of reward with length in tokens, by version: of each prompt's samples
    (`per_prompt`, None where it is `undefined`), and their mean with its interval."""
    numbers = {}
    for name, groups in responses.items():
        lengths = _table(groups, lambda response: len(response.tokens))
        found = length.correlation(_table(groups, _reward), lengths, seed=seed)
        mean = found.mean._asdict() if found.mean else dict.fromkeys(Interval._fields)
        per_prompt = [float(r) if np.isfinite(r) else None for r in found.per_prompt]
        numbers[name] = {**mean, "undefined": found.undefined, "per_prompt": per_prompt}
    return numbers


def of_reward_model(
    chosen: ArrayLike, rejected: ArrayLike, comparisons: Sequence[Comparison], *, seed: int = 0
) -> dict[str, Any]:
    """A reward model on held-out comparisons, from its raw scores [n] of both sides.

    Gives `accuracy` by rating, `intervals` (the rows of `preference.accuracy_table`), `sources`
    (a row for each source, "none" for pairs that name none; where there are several) and
    `calibration`. ValueError as in `preference.accuracy_table`.
    """
    first, second = preference.paired_scores(chosen, rejected)
    table = preference.accuracy_table(first, second, [pair.rating for pair in comparisons])
    numbers: dict[str, Any] = {
        "accuracy": {row["rating"]: row["mean"] for row in table},
        "intervals": table,
        "calibration": calibration(first, second, seed=seed),
    }
    sources = np.array([pair.source or "none" for pair in comparisons])
    if len(names := np.unique(sources)) > 1:
        numbers["sources"] = {
            str(name): _accuracy((first[sources == name], second[sources == name]))
            for name in names
        }
    return numbers


def drift(
    scores: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """How a reward model ranks each batch's held-out pairs before and after its refresh on it.

    Each batch is of the newest policy's responses, which a model trained on earlier policies has
    not seen (Llama 2, section 3.2.1): accuracy before the refresh falls as the policy moves away,
    and the refresh should win it back. scores: batch -> "before", "after" -> raw scores [n] of
    (chosen, rejected); the first batch may lack "before". Gives, for each batch, a row {mean, low,
    high, pairs, ties} for each and, for both, `change`: after - before on the same pairs with its
    paired interval. ValueError for another key, no pairs, or unequal numbers of them.
    """
    numbers: dict[str, dict[str, Any]] = {}
    for batch, sides in scores.items():
        if not sides or not sides.keys() <= {"before", "after"}:
            raise ValueError(f"{batch}: expected scores before and after, got {list(sides)}")
        row: dict[str, Any] = {when: _accuracy(sides[when]) for when in sides}
        if len(sides) == 2:
            before, after = (_correct(sides[when]) for when in ("before", "after"))
            if len(before) != len(after):
                raise ValueError(
                    f"{batch}: expected the same pairs, got {len(before)} before and "
                    f"{len(after)} after"
                )
            row["change"] = paired(after, before, seed=seed)._asdict()
        numbers[batch] = row
    return numbers


def estimate(by_prompt: ArrayLike, *, share: bool = False, seed: int = 0) -> Estimate:
    """{mean, low, high} of values [prompts], each the mean of a prompt's samples.

    share: the values lie in [0, 1] and mean how many of the samples have a property; Wilson's
    interval then keeps its width where all or none do.
    """
    values = np.asarray(by_prompt, dtype=np.float64)
    found = wilson(float(values.sum()), len(values)) if share else bootstrap(values, seed=seed)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _row(
    name: str,
    groups: Responses,
    worth: np.ndarray | None,
    kl: Mapping[str, float | Sequence[float]],
) -> dict[str, Any]:
    """One version: `reward`; `scores` by model; `kinds`, for each kind of prompt the combined score
    Rc in (0, 1) and the worth; length in `tokens` and `words`; `cut_share`; `worth` and `kl` where
    there are any. A vector [prompts] stands for the estimate it will become."""

    def by_prompt(what: Callable[[ScoredResponse], float]) -> np.ndarray:
        return _table(groups, what).mean(axis=1)

    combined = (1 + np.tanh(_table(groups, _reward) / 2)) / 2  # the sigmoid, without overflow
    kinds = _kinds(groups)
    by_kind: dict[str, Any] = {}
    for kind in map(str, np.unique(kinds)):
        asked = kinds == kind
        by_kind[kind] = {"prompts": int(asked.sum()), "score": combined[asked].mean(axis=1)}
        if worth is not None:
            by_kind[kind]["worth"] = worth[asked].mean(axis=1)
    row: dict[str, Any] = {
        "name": name,
        "prompts": len(groups),
        "samples": len(groups[0]),
        "temperature": groups[0][0].temperature,
        "reward": by_prompt(_reward),
        "scores": {
            model: by_prompt(lambda response: response.scores[model])  # noqa: B023
            for model in groups[0][0].scores
        },
        "kinds": by_kind,
        "tokens": by_prompt(lambda response: len(response.tokens)),
        "words": by_prompt(lambda response: len(response.text.split())),
        "cut_share": estimate(by_prompt(lambda response: not response.finished), share=True),
    }
    if worth is not None:
        row["worth"] = worth.mean(axis=1)
    if kl:
        row["kl"] = {
            estimator: _kl(f"kl {estimator} of {name}", value, len(groups))
            for estimator, value in kl.items()
        }
    return row


def _kl(name: str, value: float | Sequence[float], prompts: int) -> np.ndarray | Estimate:
    values = np.asarray(value, dtype=np.float64)
    if values.shape not in ((), (prompts,)):
        raise ValueError(
            f"{name}: expected a number or one for each of {prompts} prompts, "
            f"got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: not finite")
    return values if values.shape else {"mean": float(values), "low": None, "high": None}


def _with_intervals(tree: Any, seed: int) -> Any:
    """`tree` with every vector in it replaced by its estimate; those of one length share draws."""
    by_length: dict[int, list[np.ndarray]] = {}

    def collect(node: Any) -> None:
        if isinstance(node, np.ndarray):
            by_length.setdefault(len(node), []).append(node)
        for child in _children(node):
            collect(child)

    def replace(node: Any) -> Any:
        if isinstance(node, np.ndarray):
            return next(found[len(node)])._asdict()
        if isinstance(node, dict):
            return {key: replace(child) for key, child in node.items()}
        return [replace(child) for child in node] if isinstance(node, list) else node

    collect(tree)
    found = {
        size: iter(bootstrap_columns(np.stack(vectors, axis=1), seed=seed))
        for size, vectors in by_length.items()
    }
    return replace(tree)


def _children(node: Any) -> Sequence[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _win_rates(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    names = list(scores)
    found: dict[tuple[str, str], Interval] = {}
    for early, late in combinations(names, 2):
        rate = win_rates.win_rate([*scores[late]], [*scores[early]]).rate
        found[late, early] = rate
        found[early, late] = Interval(1 - rate.mean, 1 - rate.high, 1 - rate.low)

    def table(end: str) -> list[list[float | None]]:
        return [[getattr(found.get((a, b)), end, None) for b in names] for a in names]

    return {
        "names": names,
        "row_over_column": table("mean"),
        "low": table("low"),
        "high": table("high"),
    }


def _accuracy(scores: tuple[ArrayLike, ArrayLike]) -> dict[str, Any]:
    row = preference.accuracy_table(*scores)[-1]
    return {key: row[key] for key in ("mean", "low", "high", "pairs", "ties")}


def _correct(scores: tuple[ArrayLike, ArrayLike]) -> np.ndarray:
    chosen, rejected = preference.paired_scores(*scores)
    return np.where(chosen == rejected, 0.5, chosen > rejected)


def _kinds(groups: Responses) -> np.ndarray:
    return np.array([group[0].prompt.kind for group in groups])


def _reward(response: ScoredResponse) -> float:
    return response.reward


def _table(groups: Responses, what: Callable[[ScoredResponse], float]) -> np.ndarray:
    """fp64 [prompts, samples]."""
    return np.array([[what(response) for response in group] for group in groups], dtype=np.float64)


def _require_comparable(responses: Mapping[str, Responses]) -> None:
    if not responses:
        raise ValueError("responses: no version to compare")
    first = next(iter(responses))
    asked: list[str] = []
    temperatures: dict[str, list[float]] = {}
    models = None
    for name, groups in responses.items():
        _require_rectangular(name, groups)
        prompts = [group[0].prompt.id for group in groups]
        asked = asked or prompts
        if prompts != asked:
            raise ValueError(f"{name} answers other prompts than {first}, or in another order")
        every = [response for group in groups for response in group]
        if not np.isfinite([response.reward for response in every]).all():
            raise ValueError(f"{name}: a reward is not finite")
        temperatures[name] = sorted({response.temperature for response in every})
        models = models or every[0].scores.keys()
        if any(response.scores.keys() != models for response in every):
            raise ValueError(f"{name}: expected the scores of {sorted(models)} on every response")
    if len({t for found in temperatures.values() for t in found}) > 1:
        raise ValueError(f"versions are compared at one temperature, got {temperatures}")


def _require_rectangular(name: str, groups: Responses) -> None:
    if not groups or not groups[0]:
        raise ValueError(f"{name}: no responses")
    for group in groups:
        if len(group) != len(groups[0]):
            raise ValueError(
                f"{name}: expected as many samples of every prompt, got {len(groups[0])} and "
                f"{len(group)}"
            )
        if len({response.prompt.id for response in group}) > 1:
            raise ValueError(f"{name}: a group of samples answers several prompts")


def _worth(
    name: str, worth: Mapping[str, Sequence[Sequence[float]]], groups: Responses
) -> np.ndarray:
    """The judge's, fp64 [prompts, samples]."""
    values = worth.get(name)
    prompts, samples = len(groups), len(groups[0])
    if values is None:
        raise ValueError(f"worth: missing for {name}")
    if len(values) != prompts or any(len(row) != samples for row in values):
        raise ValueError(f"worth of {name}: expected {prompts} prompts of {samples} samples each")
    table = np.array(values, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError(f"worth of {name}: not finite")
    return table
