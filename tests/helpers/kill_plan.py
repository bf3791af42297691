"""`llama2rt iterate` killed at random moments: are its models and numbers those of a whole run?

    python tests/helpers/kill_plan.py --kills 200 --seed 0

(with OMP_NUM_THREADS=1) makes a small world (`pocket`) and carries out V1 to V5 with every stage
that a plan can hold (`every_stage`; with `--course paper` the paper's own steps, with a refresh of
both reward models before each version), once whole; then again, killed (SIGKILL) at moments drawn
uniformly from the whole run's CPU time and resumed after each, in as many runs as the kills need.
Exit status 1 where a model, a file of records or a number of a report is another one.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pocket  # beside this file
import tomli_w
import torch

from llama2rt import atomic, cli
from llama2rt.annotate import AnswerPair, Judgement
from llama2rt.checkpoint import native
from llama2rt.data.readers import write
from llama2rt.data.records import Dialogue, Document
from llama2rt.model import Llama
from llama2rt.report.plot import Plot
from llama2rt.stages import STAGES, loading

TRAIN = {"log_every": 2, "checkpoint_every": 2, "validate_every": 0}
# Rates so low that the policy stays undecided: it must give annotators two answers to the end.
DEFAULTS: dict[str, Any] = {
    "annotate": {"annotator": {"python": "kill_plan:annotator"}, "temperatures": [1.0, 0.9]},
    "reward": {"batch_size": 16, "epochs": 2, "train": {**TRAIN, "lr": 3e-3}},
    "rejection": {"samples": 2, "epochs": 1, "batch_size": 8, "train": {**TRAIN, "lr": 1e-4}},
    "ppo": {
        "iterations": 2,
        "batch_size": 16,
        "mini_batch_size": 8,
        "train": {**TRAIN, "lr": 1e-4, "log_every": 1, "checkpoint_every": 1},
    },
}


LOW = {**TRAIN, "lr": 1e-5}
SHORT = {"epochs": 1, "batch_size": 8, "train": LOW}
FIRST = "@comparisons-1/helpfulness-training.jsonl"
CONTEXT = 192
"""of the models where all stages run: two answers are to fit in, and dialogues of some turns"""
ATTRIBUTES = """\
[[attributes]]
name = "word"
full = "do {value}"
terse = "{value}"
values = ["yes", "no"]
check = { contains = ["{value}"] }
"""


class Knowing:
    """An annotator who knows the right answers of `pocket` and tosses a coin between equals."""

    def __call__(self, pairs: Sequence[AnswerPair], seed: str) -> list[Judgement | None]:
        random_numbers = random.Random(seed)
        return [self._judgement(pair, random_numbers) for pair in pairs]

    def _judgement(self, pair: AnswerPair, random_numbers: random.Random) -> Judgement:
        kind = pair.prompt.kind
        first, second = (pocket.correct(kind, text) for text in (pair.first, pair.second))
        coin = random_numbers.random() < 0.5
        safe = (first, second) if kind == "safety" else (None, None)
        return Judgement(
            "first" if first > second or (first == second and coin) else "second",
            "significantly_better" if first != second else "negligibly_better",
            *safe,
        )


def annotator() -> Knowing:
    """As the plan names it."""
    return Knowing()


def world(folder: Path, versions: int, course: str) -> Path:
    """A policy that tosses coins, prompts, and the plan of so many versions; returns its file."""
    torch.set_num_threads(1)
    pocket.begin(folder)
    write(folder / "prompts.jsonl", pocket.prompts(pocket.TRAINING[:16]))
    write(folder / "held_out.jsonl", pocket.prompts(pocket.HELD_OUT[:12]))
    plan = {
        "sft": str(folder / "sft"),
        "data": [str(folder / "prompts.jsonl")],
        "validation": [str(folder / "held_out.jsonl")],
        "versions": versions,
        "pool_from": min(4, versions),
        "sampling": {"max_tokens": 6},
        "defaults": DEFAULTS,
    }
    if course == "all":
        widen(folder / "sft", folder / "init")
        write_text(folder)
        plan |= {"sft": "@chat", "base": "@pretrained", "steps": every_stage(folder, versions)}
    path = folder / "plan.toml"
    path.write_text(tomli_w.dumps(plan))
    return path


def widen(source: Path, folder: Path) -> None:
    """The model in `source` with `CONTEXT`: rotary embeddings have no weights."""
    model, tokenizer = loading.load_llama(source)
    wide = Llama(dataclasses.replace(model.config, context=CONTEXT))
    wide.load_state_dict(model.state_dict())
    native.save(wide, tokenizer, folder)


def write_text(folder: Path) -> None:
    """Text and dialogues of `pocket`, of one turn and of three, and what instructions are made
    of."""
    write(folder / "documents.jsonl", [Document(text) for text in pocket.texts()[:80]])
    asked = [(kind, name) for name in pocket.TRAINING[:24] for kind in pocket.QUESTIONS]

    def said(kind: str, name: str) -> list[dict[str, str]]:
        answer = pocket.ANSWERS[kind][len(name + kind) % 2]
        return [*pocket.messages(kind, name), {"role": "assistant", "content": answer}]

    write(folder / "dialogues.jsonl", [Dialogue(said(*one)) for one in asked])
    threes = zip(asked[::3], asked[1::3], asked[2::3], strict=True)
    turns = [Dialogue([message for one in three for message in said(*one)]) for three in threes]
    write(folder / "turns.jsonl", turns)
    (folder / "attributes.toml").write_text(ATTRIBUTES)


def every_stage(folder: Path, versions: int) -> list[dict[str, Any]]:
    """The steps of V1 to the last version, with each stage in its place: pretraining and SFT; both
    reward models anew before each version; context distillation before the first; students of
    the first; a preference model, which judges the second batch; Ghost Attention after the third,
    whose dialogues go into what follows; PPO on top of the last; both kinds of DPO beside it."""
    pretrain = {
        "init": str(folder / "init"), "data": [str(folder / "documents.jsonl")], "steps": 4,
        "context": 64, "batch_tokens": 256, "held_out": 0.1, "train": {**LOW, "warmup_steps": 1},
    }  # fmt: skip
    chat = {
        "init": "@base", "data": [str(folder / "dialogues.jsonl")], "held_out": 0.1,
        "batch_size": 12, "epochs": 1, "train": LOW,
    }  # fmt: skip
    dpo = {"init": "@sft", "samples": 4, "iterations": 2, **SHORT}
    offline = {"init": "@sft", "data": [FIRST], "held_out": 2, **SHORT}
    curves = {"versions": ["SFT"], "prompts": 4, "samples": 3, "temperatures": [1.0]}
    return [
        step("pretrained", "pretrain", **pretrain),
        step("chat", "sft", **chat),
        *(one for version in range(1, versions + 1) for one in of_version(folder, version)),
        step(f"RLHF-V{versions}-PPO", "ppo"),
        step("online DPO", "dpo", **dpo),
        step("offline DPO", "offline", **offline),
        step("versions", "evaluate", curves=curves),
    ]


def of_version(folder: Path, version: int) -> list[dict[str, Any]]:
    """A version's comparisons, reward models and rejection sampling, and what goes with it."""
    dialogues = [str(folder / "dialogues.jsonl")]
    name = f"RLHF-V{version}"
    annotator = {"annotator": {"preference": "@preference"}} if version == 2 else {}
    tuned = {"tune": {"temperatures": [0.9, 1.1], "prompts": 6}} if version == 1 else {}
    mixed = {"dialogues": ["@RLHF-V3-GAtt/dialogues.jsonl"]} if version > 3 else {}
    preference = {"init": "@sft", "data": [FIRST], "held_out": 2, "block_tokens": CONTEXT}
    distilled = {
        "data": [{"path": str(folder / "prompts.jsonl"), "kind": "safety"}], "samples": 3,
        "mixed_in": dialogues, "mixed_in_share": 0.5,
        "preprompts": {"templates": ["{adjective}"], "adjectives": ["no", "so"]},
    }  # fmt: skip
    ghost = {
        "data": [str(folder / "turns.jsonl")], "held_out": 0.2, "dialogues": dialogues,
        "attributes": str(folder / "attributes.toml"), "recall": {"turns": [1, 3], "limit": 3},
    }  # fmt: skip
    before, after = [], []
    if version == 1:
        before = [
            step("preference", "preference", **preference, **{**SHORT, "batch_size": 2}),
            step("SFT-distilled", "context-distillation", **distilled, **SHORT),
        ]
        after = [step("students", "distill", students={"small": {"init": "@base"}}, **SHORT)]
    if version == 3:
        after = [step("RLHF-V3-GAtt", "ghost-attention", **ghost, **SHORT)]
    kinds = ("helpfulness", "safety")
    return [
        step(f"comparisons-{version}", "annotate", **annotator),
        *(step(f"{kind}-{version}", "reward", kind=kind) for kind in kinds),
        *before,
        step(name, "rejection", **tuned, **mixed),
        *after,
    ]


def step(name: str, stage: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "stage": stage, **keys}


def prepare(folder: Path) -> None:
    """Import what the command will: it is started 40 times, and importing takes longer than its
    work. So does drawing, which is left out of the pages."""
    Plot.svg = lambda plot, salt="": "<svg></svg>"  # type: ignore[method-assign]
    for stage in STAGES.values():
        _ = stage.module
    importlib.import_module("matplotlib.pyplot")
    loading.outline(folder / "sft")  # torch imports more for its first model without weights


def start(plan: Path, out: Path) -> int:
    """The command in a process of its own, forked from this one; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        said = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        cli.main(["iterate", str(plan), "--out", str(out), "--resume"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    else:
        status = 0
    finally:
        os._exit(status)


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far, which other work on the machine does not change; 0 where it
    has ended."""
    try:
        said = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(said[11]) + int(said[12])) / os.sysconf("SC_CLK_TCK")


def wait(process: int, seconds: float = float("inf")) -> bool:
    """Whether the command ends within so many seconds of its CPU time. RuntimeError where it
    fails."""
    while cpu_seconds(process) < seconds:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            if status:
                raise RuntimeError(f"the command ended with {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.005)
    return False


def whole_run(plan: Path, out: Path) -> tuple[float, float]:
    """Carry the plan out undisturbed; returns (CPU seconds that the command takes when there is
    nothing left to do, those of the whole run)."""
    seconds = []
    for _ in range(2):
        process, spent = start(plan, out), 0.0
        while not wait(process, spent + 0.01):
            spent = max(spent, cpu_seconds(process))
        seconds.append(spent)
    return seconds[1], seconds[0]


def killed_run(plan: Path, out: Path, moments: Sequence[float], ready: float) -> list[str]:
    """Carry the plan out, killed at each of `moments` (CPU seconds of the whole run, ascending)
    and resumed; returns the step that each kill which met a running process was in.

    `ready`: what a resumed command takes to check what is done, which is no progress.
    """
    kills, reached = [], 0.0
    for moment in moments:
        process = start(plan, out)
        if not wait(process, moment - reached + (ready if reached else 0.0)):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills.append(at_work(out))
        reached = moment
    wait(start(plan, out))
    return kills


def at_work(out: Path) -> str:
    """The stage of the step that is begun and not complete; "between steps" where none is."""
    for path in out.glob("*/manifest.json"):
        if not json.loads(path.read_text())["complete"]:
            steps = tomllib.loads((out / "recipe.toml").read_text()).get("steps", [])
            stages = {step["name"]: step["stage"] for step in steps}
            return stages.get(path.parent.name, path.parent.name)
    return "between steps"


def results(out: Path) -> dict[str, Any]:
    """What must be the same: hashes of models and records, numbers of reports. What is left half-
    written is in only one of the two."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == atomic.PARTIAL:
            found[name] = "half-written"
        elif path.name == "model.safetensors" or path.suffix == ".jsonl":
            # Pairs name the policy that answered, an earlier iteration's folder.
            content = path.read_bytes().replace(str(out).encode(), b"OUT")
            if path.name != "metrics.jsonl":  # which holds times
                found[name] = hashlib.sha256(content).hexdigest()
        elif path.name == "report.json":
            found[name] = without_times(json.loads(path.read_text()), str(out))
    return found


def without_times(value: Any, out: str) -> Any:
    """`value` without what a clock or an energy meter decides, and without where it was run."""
    if isinstance(value, dict):
        measured = ("second", "joule", "energy", "memory", "mfu")
        return {
            key.replace(out, ""): without_times(item, out)
            for key, item in value.items()
            if not any(word in key for word in measured)
        }
    if isinstance(value, list):
        return [without_times(item, out) for item in value]
    return value.replace(out, "OUT") if isinstance(value, str) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )


def main() -> int:
    """Print a line for each run, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--kills-a-run", type=int, default=10)
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--course", choices=["all", "paper"], default="all")
    parser.add_argument("--out", type=Path, help="where the record goes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    moments = random.Random(given.seed)
    met: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = world(folder, given.versions, given.course)
        prepare(folder)
        ready, seconds = whole_run(plan, folder / "whole")
        expected = results(folder / "whole")
        print(f"whole: {seconds:.0f} s of CPU, {ready:.1f} s when done; {len(expected)} results")
        kills, wrong, runs = 0, 0, 0
        while kills < given.kills:
            count = min(given.kills_a_run, given.kills - kills)
            drawn = sorted(moments.uniform(0, seconds) for _ in range(count))
            runs += 1
            out = folder / f"killed-{runs}"
            met.update(killed_run(plan, out, drawn, ready))
            kills = met.total()
            different = differences(expected, results(out))
            wrong += len(different)
            shutil.rmtree(out)
            at = ", ".join(f"{moment:.1f}" for moment in drawn)
            print(f"{kills} kills (at {at} s): {len(different)} differ {different}", flush=True)
            if given.out:
                record = {"seed": given.seed, "kills": kills, "runs": runs, "wrong": wrong}
                record |= {"results": len(expected), "whole_run_cpu_s": round(seconds, 1)}
                record["kills_by_stage"] = dict(met.most_common())
                given.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{kills} kills: {wrong} of {len(expected)} results differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
