"""report.html and report.json of the main job."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2rt import report
from llama2rt.pipeline.plan import Resolved
from llama2rt.quickstart.evaluation import Measured
from llama2rt.report import figures, single_run


def write(
    directory: Path, plan: Sequence[Resolved], numbers: Mapping[str, Any], measured: Measured
) -> None:
    """Both files; report.json last, since its presence says that the job is done."""
    versions = numbers["versions"]
    first, last = versions[0], next(v for v in versions if v["name"] == "RLHF-V2 + PPO")
    report.write(
        directory / "report.html",
        "llama2rt quickstart",
        [
            _versions(numbers),
            _answers(numbers),
            _reward_models(numbers, measured),
            _sampling(numbers),
            *_training(plan),
            report.Section(
                "This run",
                [
                    report.Facts({f"{k} (s)": round(v, 1) for k, v in numbers["phases"].items()}),
                    *single_run.facts(directory),
                ],
            ),
        ],
        subtitle=(
            "A pocket assistant, from random weights to RLHF: "
            f"{numbers['parameters'] / 1e6:.1f} million parameters, seed {numbers['seed']}."
        ),
        headlines=[
            report.Headline(
                "Helpfulness",
                f"{first['helpfulness']['mean']:.2f} \N{RIGHTWARDS ARROW} "
                f"{last['helpfulness']['mean']:.2f}",
                "SFT to RLHF-V2 + PPO, held-out prompts, by the judge",
            ),
            report.Headline(
                "Unsafe answers",
                f"{first['unsafe']['mean']:.0%} \N{RIGHTWARDS ARROW} {last['unsafe']['mean']:.0%}",
                "of requests for the secret",
            ),
            *(
                report.Headline(
                    f"{kind.capitalize()} reward model",
                    f"{model['accuracy']['average']:.0%}",
                    "of held-out comparisons as the annotators",
                )
                for kind, model in numbers["reward_models"].items()
            ),
            report.Headline(
                "Time and memory",
                f"{numbers['seconds'] / 60:.1f} min",
                f"{numbers['peak_memory_bytes'] / 2**30:.2f} GiB at most",
            ),
        ],
    )
    report.write_json(directory / "report.json", numbers)


def _versions(numbers: Mapping[str, Any]) -> report.Section:
    rows = numbers["versions"]
    helpful, unsafe, correct = (
        [(row[key]["mean"], row[key]["low"], row[key]["high"]) for row in rows]
        for key in ("helpfulness", "unsafe", "correct")
    )
    names = [row["name"] for row in rows]
    wins = numbers["win_rates"]
    return report.Section(
        "Versions",
        [
            figures.versions(names, helpful, unsafe),
            report.Table(
                ("version", "helpfulness", "correct", "unsafe", "reward", "words", "cut"),
                [
                    (
                        row["name"],
                        helpful[i],
                        correct[i],
                        unsafe[i],
                        row["reward"],
                        row["words"],
                        row["cut_share"],
                    )
                    for i, row in enumerate(rows)
                ],
                "Mean and 95 % interval over held-out prompts; temperature 1. Reward is the reward "
                "models' logit; words and the share of answers cut short are means.",
            ),
            figures.win_matrix(wins["names"], wins["row_over_column"]),
        ],
        "The judge knows the right answers and read them only here: helpfulness is at least half "
        "correctness, unsafe is giving away the passcode.",
    )


def _answers(numbers: Mapping[str, Any]) -> report.Section:
    samples = [report.Answers(**answer) for answer in numbers["answers"]]
    return report.Section(
        "Answers",
        [report.Dialogues(samples, "The first prompt of each kind, with the judge's verdicts.")],
    )


def _reward_models(numbers: Mapping[str, Any], measured: Measured) -> report.Section:
    tables = {kind: model["intervals"] for kind, model in numbers["reward_models"].items()}
    rewards = {
        name: [response.reward for group in groups for response in group]
        for name, groups in measured.responses.items()
    }
    return report.Section(
        "Reward models",
        [
            figures.accuracy_by_rating(tables),
            figures.reward_distribution(rewards),
            figures.length_correlation(measured.correlations),
        ],
        "Trained on simulated annotators' comparisons of the chat model's answers; measured on "
        "prompts whose task instances occur in no training file.",
    )


def _sampling(numbers: Mapping[str, Any]) -> report.Section:
    curves = numbers["best_of"]
    return report.Section(
        "More samples",
        [
            figures.best_of_n({name: by[1.0] for name, by in curves.items()}),
            figures.temperatures(curves),
        ],
        "What rejection sampling can gain, and at which temperature (Llama 2, Figures 7 and 8).",
    )


def _training(plan: Sequence[Resolved]) -> list[report.Section]:
    sections = []
    for step in plan:
        for run in sorted(step.directory.glob("iteration-*")) or [step.directory]:
            metrics = single_run.read_metrics(run / "metrics.jsonl")
            for section in single_run.training_sections(metrics) if metrics else []:
                title = step.name if run == step.directory else f"{step.name}, {run.name}"
                sections.append(report.Section(f"Training: {title}", section.blocks))
    return sections
