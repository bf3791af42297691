"""A small judge that answers: the quickstart's chat model, taught by its annotators' comparisons to
say which of two answers is better, as any server's judge is asked (`SpeakingJudge`)."""

import json
import subprocess
import sys
from pathlib import Path

import tomli_w

from llama2rt import atomic
from llama2rt.evaluate.judges.judging import Question
from llama2rt.evaluate.judges.speaking import Template

# Next to nothing but what it compares: the toy's vocabulary spells other words letter by letter,
# and its context is 256 tokens.
ASKED = Template(name="taught", user="{conversation}\nA: {first}\nB: {second}")
EPOCHS, BATCH, RATE = 3, 32, 1e-3


def comparisons(run: Path, part: str) -> list[Question]:
    """All of a run's, the preferred answer first. `part`: "training" or "held_out"."""
    found = []
    for path in sorted(run.glob(f"annotate-*/*-{part}.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.append(Question(row["prompt"], row["chosen"], row["rejected"], row["kind"]))
    return found


def train(run: Path, out: Path) -> Path:
    """The judge's model folder, below `out`: `llama2rt sft` on every training comparison, in both
    orders, whose reply is the letter of the preferred answer."""
    dialogues = []
    for question in comparisons(run, "training"):
        for shown, letter in ((question, "A"), (question.swapped(), "B")):
            reply = {"role": "assistant", "content": letter}
            dialogues.append({"messages": [*ASKED.messages(shown), reply]})
    lines = "".join(json.dumps(dialogue) + "\n" for dialogue in dialogues)
    atomic.write(out / "dialogues.jsonl", lines)
    recipe = {
        "init": str(run / "sft" / "model"),
        "data": [str(out / "dialogues.jsonl")],
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "train": {"lr": RATE},
    }
    atomic.write(out / "judge.toml", tomli_w.dumps(recipe))
    command = [sys.executable, "-P", "-m", "llama2rt.cli", "sft", str(out / "judge.toml")]
    subprocess.run([*command, "--out", str(out / "judge")], check=True)
    return out / "judge" / "model"
