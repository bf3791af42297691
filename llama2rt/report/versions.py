"""The sections of a report that compare versions and reward models, from their numbers.

The numbers are those of `evaluate.diagnostics`, as the functions there give them or as a
report.json holds them. What is absent is not drawn, and nothing is known of the task: a plan's own
estimates come in as `Column`s, its own words as notes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2rt.report import figures
from llama2rt.report.html import Block, Section, Table

VERSIONS = "Versions"
REWARD_MODELS = "Reward models"
JUDGE = "Reward against the judge"
SAMPLING = "More samples"


@dataclass(frozen=True)
class Column:
    """An estimate {mean, low, high} that a plan has put into the rows of its versions."""

    key: str
    label: str
    share: bool = False
    """In per cent; the values lie in [0, 1]."""


def sections(
    numbers: Mapping[str, Any],
    *,
    columns: Sequence[Column] = (),
    notes: Mapping[str, str] | None = None,
) -> list[Section]:
    """The sections that `numbers` call for.

    numbers: any of `versions`, `win_rates`, `reward_win_rates`, `length_correlation`,
    `reward_against_judge` (`diagnostics.of_versions`), `best_of` (`diagnostics.sampling`),
    `judged_best_of` (version -> temperature -> `best_of.judged`), `reward_models` (name ->
    `diagnostics.of_reward_model`) and `drift` (name -> `diagnostics.drift`); other keys are left
    alone. columns: drawn and listed first, in place of
    the judge's worth, which they spell out. notes: a sentence or two under the heading of a
    section, by its title.
    """
    found = {
        VERSIONS: _versions(numbers, columns),
        JUDGE: _judge(numbers.get("reward_against_judge") or {}),
        REWARD_MODELS: _reward_models(numbers),
        SAMPLING: [
            *_sampling(numbers.get("best_of") or {}),
            *_judged(numbers.get("judged_best_of") or {}),
        ],
    }
    return [
        Section(title, blocks, (notes or {}).get(title, ""))
        for title, blocks in found.items()
        if blocks
    ]


def newest_batch(drift: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's `diagnostics.drift` by batch, the last: what came before was no news to the
    model that was replaced."""
    return dict(list(drift.items())[-1:])


def _versions(numbers: Mapping[str, Any], columns: Sequence[Column]) -> list[Block]:
    rows: Sequence[Mapping[str, Any]] = numbers.get("versions") or ()
    blocks: list[Block] = []
    if rows:
        names = [row["name"] for row in rows]
        panels = [
            *(
                _panel(column.label, [row.get(column.key) for row in rows], column.share)
                for column in columns
            ),
            *(() if columns else _worth(rows)),
            _panel("reward", [row["reward"] for row in rows]),
            _panel("response length (tokens)", [row["tokens"] for row in rows]),
        ]
        blocks += [
            figures.by_version(names, panels),
            Table(
                ("version", *(panel.label for panel in panels)),
                [(name, *(panel.estimates[i] for panel in panels)) for i, name in enumerate(names)],
                "Means over held-out prompts with 95 % intervals. Reward is logit(Rc).",
            ),
            _details(rows),
        ]
    for key, title in _WIN_RATES:
        if wins := numbers.get(key):
            blocks.append(figures.win_matrix(wins["names"], wins["row_over_column"], title=title))
    moved = [row for row in rows if "k1" in row.get("kl", {})]
    if moved:
        blocks.append(
            figures.reward_by_kl(
                [row["name"] for row in moved],
                [_triple(row["kl"]["k1"]) for row in moved],
                [_triple(row["reward"]) for row in moved],
            )
        )
    return blocks


_WIN_RATES = (
    ("win_rates", "Win rates between versions, by the judge"),
    ("reward_win_rates", "Win rates between versions, by reward"),
)


def _worth(rows: Sequence[Mapping[str, Any]]) -> list[figures.Panel]:
    """The judge's, by kind of prompt: a judge may rate another kind on another scale."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    panels = []
    for kind in kinds:
        worth = [row["kinds"].get(kind, {}).get("worth") for row in rows]
        label = f"worth by the judge, {kind} prompts" if len(kinds) > 1 else "worth by the judge"
        if any(worth):
            panels.append(_panel(label, worth))
    return panels


def _panel(
    label: str, estimates: Sequence[Mapping[str, Any] | None], share: bool = False
) -> figures.Panel:
    return figures.Panel(label, [_estimate(value) for value in estimates], share)


def _details(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Scores by kind of prompt and by model, length and KL: of interest to whoever asks why."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    models = list(dict.fromkeys(model for row in rows for model in row["scores"]))
    estimators = list(dict.fromkeys(name for row in rows for name in row.get("kl", {})))
    header = (
        "version",
        *(f"Rc on {kind} prompts" for kind in kinds),
        *(f"{model} score" for model in models),
        "words",
        "cut short",
        *(f"KL, {estimator}" for estimator in estimators),
    )
    return Table(
        header,
        [
            (
                row["name"],
                *(_cell(row["kinds"].get(kind, {}).get("score")) for kind in kinds),
                *(_cell(row["scores"].get(model)) for model in models),
                _cell(row["words"]),
                _cell(row["cut_share"]),
                *(_cell(row.get("kl", {}).get(estimator)) for estimator in estimators),
            )
            for row in rows
        ],
        "Rc is the combined score of Llama 2, section 3.2.3, in (0, 1) as each model's score is; "
        "cut short is the share of responses that the length limit ended"
        + ("; KL is to the reference policy, in nats a response." if estimators else "."),
    )


def _judge(kinds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Block]:
    if not kinds:
        return []
    return [
        figures.reward_against_judge(
            {
                kind: {name: found["bins"] for name, found in versions.items()}
                for kind, versions in kinds.items()
            }
        ),
        Table(
            ("prompts", "version", "all responses", "within a prompt", "prompts without"),
            [
                (
                    kind,
                    name,
                    _cell(found["pooled"]),
                    _cell(found["per_prompt"]),
                    found["per_prompt"]["undefined"],
                )
                for kind, versions in kinds.items()
                for name, found in versions.items()
            ],
            "Spearman's rank correlation of reward and worth, 1 for the same order. Best-of-N "
            "depends on the one within a prompt, which exists where rewards and worths differ.",
        ),
    ]


def _reward_models(numbers: Mapping[str, Any]) -> list[Block]:
    models: Mapping[str, Mapping[str, Any]] = numbers.get("reward_models") or {}

    def having(key: str) -> dict[str, Any]:
        return {name: found[key] for name, found in models.items() if found.get(key)}

    blocks: list[Block] = []
    if tables := having("intervals"):
        blocks.append(figures.accuracy_by_rating(tables))
    if sources := having("sources"):
        blocks.append(figures.accuracy_by_source(sources))
    if calibrations := having("calibration"):
        blocks.append(figures.calibration(calibrations))
    if drift := numbers.get("drift"):
        blocks.append(figures.drift(drift))
    correlations = {
        name: [float("nan") if r is None else r for r in found["per_prompt"]]
        for name, found in (numbers.get("length_correlation") or {}).items()
        if found["mean"] is not None
    }
    if correlations:
        blocks.append(figures.length_correlation(correlations))
    return blocks


def _sampling(best_of: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    curves = {
        name: {
            float(temperature): curve for temperature, curve in by.items() if len(curve["n"]) > 1
        }
        for name, by in best_of.items()
    }
    curves = {name: by for name, by in curves.items() if by}
    if not curves:
        return []
    nearest = {name: min(by, key=lambda t: abs(t - 1)) for name, by in curves.items()}
    alike = len(set(nearest.values())) == 1
    blocks: list[Block] = [
        figures.best_of_n(
            {
                name if alike else f"{name} (T = {nearest[name]:g})": by[nearest[name]]
                for name, by in curves.items()
            }
        )
    ]
    if any(len(by) > 1 for by in curves.values()):
        blocks.append(figures.temperatures(curves))
    return blocks


def _judged(best_of: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[Block]:
    """What the judge says of the best of N by reward."""
    rows = [
        (name, temperature, row["n"], _triple(row["chosen"]), _triple(row["best"]))
        for name, by in best_of.items()
        for temperature, found in by.items()
        for row in found
    ]
    if not rows:
        return []
    heading = ("version", "temperature", "N", "worth of the best by reward", "worth of the best")
    said = "By the judge: the answer that the reward models choose of N, and the best there is."
    return [Table(heading, rows, said)]


def _estimate(value: Mapping[str, Any] | None) -> figures.Estimate | None:
    return None if value is None or value["mean"] is None else _triple(value)


def _triple(value: Mapping[str, Any]) -> figures.Estimate:
    """An estimate without an interval is drawn as one of no width."""
    mean = value["mean"]
    return mean, *(mean if value[end] is None else value[end] for end in ("low", "high"))


def _cell(value: Mapping[str, Any] | None) -> object:
    if value is None or value["mean"] is None or value["low"] is None:
        return None if value is None else value["mean"]
    return value["mean"], value["low"], value["high"]
