"""The table of a study of policies (`pipeline.policies`), of RLHF Workflow's Table 6's shape."""

from collections.abc import Mapping
from typing import Any

from llama2rt.report.html import Section, Table

Numbers = Mapping[str, Any]


def section(numbers: Numbers) -> Section:
    """Of the page of such a study."""
    study, rows = numbers["study"], numbers["policies"]
    first, judged = study["first"], study["judged"]
    main = "worth" if judged else "score"
    header = ["policy", "score", "characters", "cut", "KL"]
    header += ["judge's worth"] if judged else []
    header += [f"win rate against {first}", f"{main} - that of {first}", f"{main} of each seed"]
    lines = []
    for row in rows:
        line: list[object] = [row["name"], _estimate(row["score"]), _estimate(row["characters"])]
        line += [row["cut"]["mean"], row["kl"]]
        line += [_estimate(row["worth"])] if judged else []
        itself = row["name"] == first
        line += [None if itself else _estimate(row["win_rate"])]
        line += [None if itself else _estimate(row[main]["difference"])]
        line += [", ".join(f"{value:.3f}" for value in row[main]["by_seed"])]
        lines.append(tuple(line))
    caption = (
        "Means over seeds and answers with 95 % intervals over prompts; differences are paired by "
        "prompt, and one whose interval leaves 0 out is more than the draw of the prompts. Whether "
        "it is more than the draw of the training seed, the seeds show. Score: the reward models' "
        "that all are compared by, in (0, 1); KL: to the reference policy, nats an answer (k1)."
    )
    whose = "the judge's" if judged else "those of the score, as there is no judge"
    seeds = len(study["seeds"])
    text = f"{seeds} training seed{'s' if seeds > 1 else ''}; win rates are {whose}, a tie half."
    return Section("Policies", [Table(tuple(header), lines, caption)], text)


def _estimate(value: Numbers) -> object:
    return value["mean"], value["low"], value["high"]
