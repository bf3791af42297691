"""Tasks of lm-eval's format from real data, as files: what the benchmarks of evaluation ask.

The data are ../shared/data's (GSM8K, TinyShakespeare, HH harmless); nothing of them is kept here.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_FOR_SHOTS = 50
Of = tuple[list[dict[str, Any]], dict[str, Any]]
"""documents, and what a task asks of them"""
Rows = Callable[[Path], Of]


def gsm8k(data: Path) -> Of:
    rows = [json.loads(line) for line in (data / "gsm8k_train.jsonl").open()]
    return rows, {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:", "\n\n", "</s>"], "max_gen_toks": 48},
        "num_fewshot": 2,
        "metric_list": [{"metric": "exact_match"}],
    }


def solutions(data: Path) -> Of:
    rows = []
    for line in (data / "gsm8k_model_solutions.jsonl").open():
        row = json.loads(line)
        right = [row[name]["solution"] for name in SOLVERS if row[name]["is_correct"]]
        wrong = [row[name]["solution"] for name in SOLVERS if not row[name]["is_correct"]]
        if len(right) == 1:
            rows.append({"question": row["question"], **_options(right[0], wrong, len(rows))})
    return rows, {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def shakespeare(data: Path) -> Of:
    text = (data / "tinyshakespeare.txt").read_text()
    rows = [{"text": text[i : i + 1800]} for i in range(0, len(text), 1800)]
    return rows, {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }


def harmless(data: Path) -> Of:
    rows = []
    with gzip.open(data / "hh_harmless_base_test.jsonl.gz", "rt") as file:
        for line in file:
            pair = json.loads(line)
            turn = "\n\nAssistant:"
            asked, chosen = pair["chosen"].rsplit(turn, 1)
            other, rejected = pair["rejected"].rsplit(turn, 1)
            if asked == other and chosen.strip() and rejected.strip():
                rows.append({"asked": asked + turn, "choices": [chosen.strip(), rejected.strip()]})
    return rows, {
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }


def cloze(data: Path) -> Of:
    rows = []
    for line in (data / "tinyshakespeare.txt").read_text().split("\n"):
        before, _, word = line.rpartition(" ")
        if len(before) > 20 and word.strip(".,:;!?"):
            rows.append({"before": before, "word": word.strip(".,:;!?")})
    return rows, {
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}}",
        "doc_to_target": "{{' ' + word}}",
        "num_fewshot": 3,
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }


def numbers(data: Path) -> Of:
    """GSM8K's result among those of three other questions."""
    found = [json.loads(line) for line in (data / "gsm8k_train.jsonl").open()]
    results = [row["answer"].rsplit("####", 1)[1].strip() for row in found]
    others = list(dict.fromkeys(results))
    rows = []
    for i, (row, right) in enumerate(zip(found, results, strict=True)):
        at = others.index(right)
        wrong = [others[(at + step) % len(others)] for step in (7, 31, 113)]
        rows.append({"question": row["question"], **_options(right, wrong, i)})
    return rows, _choice("Question: {{question}}\nThe result is")


def next_line(data: Path) -> Of:
    """The line of TinyShakespeare that comes next, among lines from elsewhere."""
    lines = [
        line
        for line in (data / "tinyshakespeare.txt").read_text().split("\n")
        if len(line) > 25 and not line.endswith(":")
    ]
    rows = []
    for i in range(0, len(lines) - 2, 2):
        wrong = [lines[(i + step) % len(lines)] for step in (1009, 5003, 9001)]
        rows.append({"line": lines[i], **_options(lines[i + 1], wrong, i // 2)})
    return rows, _choice("{{line}}\n")


def last_word(data: Path) -> Of:
    """The last word of a line of TinyShakespeare, among those of other lines."""
    cut = [(row["before"], row["word"]) for row in cloze(data)[0]]
    words = list(dict.fromkeys(word for _, word in cut))
    rows = []
    for i, (before, right) in enumerate(cut):
        at = words.index(right)
        wrong = [words[(at + step) % len(words)] for step in (11, 101, 1009)]
        rows.append({"before": before, **_options(right, wrong, i)})
    return rows, _choice("{{before}}")


def _options(right: str, wrong: list[str], number: int) -> dict[str, Any]:
    """Four options, the right one where the question's number says."""
    gold = number % 4
    return {"choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}


def _choice(asked: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": asked,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }


# Of each kind that lm-eval has.
AGAINST_HF: dict[str, Rows] = {
    "gsm8k_answers": gsm8k,
    "gsm8k_solutions": solutions,
    "shakespeare_rolling": shakespeare,
    "hh_harmless": harmless,
    "shakespeare_cloze": cloze,
}


WITH_OPTIONS: dict[str, Rows] = {
    "gsm8k_solutions": solutions,
    "gsm8k_numbers": numbers,
    "hh_harmless": harmless,
    "shakespeare_next_line": next_line,
    "shakespeare_last_word": last_word,
}
"""five questions with options, which have an accuracy and a calibration error"""


def write_tasks(tasks: Mapping[str, Rows], data: Path, folder: Path, documents: int) -> list[str]:
    """Task files with their data: `documents` to be asked, or as many as leave 50 more to draw
    shots from."""
    paths = []
    for name, rows_of in tasks.items():
        rows, task = rows_of(data)
        asked = min(documents, len(rows) - _FOR_SHOTS)
        files = {"test": rows[:asked], "train": rows[asked : asked + _FOR_SHOTS]}
        for split, part in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}-{split}.jsonl").write_text(lines)
        task |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{name}-{split}.jsonl") for split in files}
            },
            "test_split": "test",
            "training_split": "train",
            "fewshot_split": "train",
        }
        for metric in task["metric_list"]:
            metric |= {"aggregation": "mean", "higher_is_better": True}
            if "perplexity" in metric["metric"]:
                metric["aggregation"] = (
                    "perplexity" if metric["metric"] == "perplexity" else "weighted_perplexity"
                )
        paths.append(str(folder / f"{name}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(task))
    return paths
