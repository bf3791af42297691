"""report.html and report.json of the main job."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2rt import report
from llama2rt.pipeline.plan import Resolved
from llama2rt.quickstart import studies
from llama2rt.report import single_run, versions
from llama2rt.report.versions import Column

COLUMNS = (
    Column("helpfulness", "helpfulness"),
    Column("unsafe", "unsafe", share=True),
    Column("correct", "correct", share=True),
)
NOTES = {
    versions.VERSIONS: "The judge knows the right answers and read them only here: helpfulness is "
    "at least half correctness, unsafe is giving away the passcode.",
    versions.REWARD_MODELS: "Trained on simulated annotators' comparisons of the chat model's and "
    "of RLHF-V1's answers; measured on prompts whose task instances occur in no training file.",
    versions.SAMPLING: "What rejection sampling can gain, and at which temperature (Llama 2, "
    "Figures 7 and 8).",
}


def write(directory: Path, plan: Sequence[Resolved], numbers: Mapping[str, Any]) -> None:
    """Both files; report.json last, since its presence says that the job is done."""
    rows = numbers["versions"]
    first, last = rows[0], next(row for row in rows if row["name"] == "RLHF-V2 + PPO")
    compared = versions.sections(numbers, columns=COLUMNS, notes=NOTES)
    report.write(
        directory / "report.html",
        "llama2rt quickstart",
        [
            compared[0],
            _answers(numbers),
            *compared[1:],
            *studies.sections(numbers["studies"]),
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


def _answers(numbers: Mapping[str, Any]) -> report.Section:
    samples = [report.Answers(**answer) for answer in numbers["answers"]]
    return report.Section(
        "Answers",
        [report.Dialogues(samples, "The first prompt of each kind, with the judge's verdicts.")],
    )


def _training(plan: Sequence[Resolved]) -> list[report.Section]:
    sections = []
    for step in plan:
        for run in sorted(step.directory.glob("iteration-*")) or [step.directory]:
            for section in single_run.training_again(run):
                title = step.name if run == step.directory else f"{step.name}, {run.name}"
                sections.append(report.Section(f"Training: {title}", section.blocks))
    return sections
