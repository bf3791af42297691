"""`llama2rt corpus` on made text: memory, time by step and resumption; what its rules find.

    python benchmarks/data/corpus.py --megabytes 50 500 --out results.json

Text is made of words of a Zipf law; of the documents one in twenty repeats an earlier one, one in
twenty does with some words changed, and one in fifty holds personal data or a question of an
evaluation set. `recall` and `precision` of near-duplicates are against exact similarities of the
planted pairs. `resident_mib` is the most that any of the processes held at once (VmHWM), at each
size; the command is killed once while it cleans and once while it writes, and goes on. False
positives are counted on the real texts in --data (TinyShakespeare, GSM8K), which hold no personal
data. Needs datasketch.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import numpy as np

from llama2rt.corpus import duplicates, personal
from llama2rt.corpus.contamination import EvaluationSets, texts_of
from llama2rt.corpus.words import words_of

VOCABULARY, MEAN_WORDS = 50_000, 350
QUESTION = "how many pears does ann have left once bob has taken {} of them away from her"


def texts(megabytes: float, seed: int):
    """(kind, text): "new", "equal", "alike", "personal" or "question"; about so much text."""
    draw = np.random.default_rng(seed)
    begin = [f"{'bcdfghklmnprst'[i % 14]}{'aeiou'[i % 5]}" for i in range(70)]
    names = np.array([f"{begin[i % 70]}{i:x}" for i in range(VOCABULARY)])
    weights = 1 / np.arange(10, VOCABULARY + 10)
    cumulative = np.cumsum(weights / weights.sum())
    recent: list[np.ndarray] = []
    left = megabytes * 1e6
    while left > 0:
        kind = draw.choice(["new", "equal", "alike", "personal", "question"], p=KINDS)
        if kind in ("equal", "alike") and recent:
            words = recent[draw.integers(len(recent))].copy()
            if kind == "alike":
                changed = draw.integers(len(words), size=max(1, len(words) // 40))
                words[changed] = "changed"
        else:
            count = int(draw.poisson(MEAN_WORDS)) + 20
            words = names[np.searchsorted(cumulative, draw.random(count)).clip(max=VOCABULARY - 1)]
            recent = [*recent[-999:], words]
        text = " ".join(words)
        if kind == "personal":
            number = draw.integers(1000, 9999)
            text += f" write to u{number}@example.org or call 415-555-{number}"
        if kind == "question":
            text += " " + QUESTION.format(draw.integers(1000))
        left -= len(text) + 20
        yield str(kind), text


KINDS = [0.88, 0.05, 0.05, 0.01, 0.01]


def write(folder: Path, megabytes: int) -> Counter[str]:
    """text.jsonl, questions.jsonl and recipe.toml; how many of each kind there are."""
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    with open(folder / "text.jsonl", "w") as file:
        for kind, text in texts(megabytes, 0):
            counts[kind] += 1
            file.write(json.dumps({"text": text}) + "\n")
    with open(folder / "questions.jsonl", "w") as file:
        for i in range(1000):
            file.write(json.dumps({"question": QUESTION.format(i)}) + "\n")
    return counts


def command(folder: Path, tokenizer: Path, workers: int, out: str) -> list[str]:
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"evaluation = ['{folder}/questions.jsonl']\nnear_duplicates = 0.8\n"
        f"tokenizer = '{tokenizer}'\nchunk_bytes = {8 << 20}\nworkers = {workers}\n"
        f"[[sources]]\npath = '{folder}/text.jsonl'\n"
    )
    return [sys.executable, "-m", "llama2rt.cli", "corpus", str(recipe), "--out", str(folder / out)]


def family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for one in found:
        try:
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except OSError:
            continue
        found += map(int, children)
    return found


def status(process: int) -> tuple[float, float]:
    """(most MiB resident so far, CPU seconds so far)."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    resident = text.partition("VmHWM:")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return (int(resident[0]) / 1024 if resident else 0.0), seconds


def step_of(out: Path) -> str:
    if any((out / name).is_dir() for name in ("text", "tokens")):
        return "written"
    return "compared" if (out / "work" / "comparison").is_dir() else "cleaned"


def run(arguments: list[str], out: Path, kill_in: str | None = None) -> dict[str, Any]:
    """Run the command; the most memory of a process, and CPU and wall time, by step."""
    begin = time.monotonic()
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    memory: Counter[str] = Counter()
    seconds: dict[int, float] = {}
    ends: dict[str, list[float]] = {}
    in_step = 0
    while process.poll() is None:
        step = step_of(out)
        for one in family(process.pid):
            resident, cpu = status(one)
            memory[step] = max(memory[step], int(resident))
            seconds[one] = max(cpu, seconds.get(one, 0.0))
        ends[step] = [time.monotonic() - begin, sum(seconds.values())]
        in_step += step == kill_in and len(list((out / "work").glob("*.json"))) > 1
        if kill_in and in_step > 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return {}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{arguments}: status {process.returncode}")
    return {"resident_mib": dict(memory), "until_wall_and_cpu_seconds": ends}


def shards(out: Path) -> str:
    digest = hashlib.sha256()
    for top in ("text", "tokens"):
        for path in sorted((out / top).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(out)}".encode() + path.read_bytes())
    return digest.hexdigest()


def near_duplicates(count: int) -> dict[str, Any]:
    """Planted pairs of known similarity, found by keys of bands and confirmed exactly."""
    draw = random.Random(0)
    kept: dict[str, Counter[str]] = {}
    for least in (0.7, 0.8, 0.9):
        found: Counter[str] = Counter()
        made = [words_of(text) for _, text in texts(count * 0.0021, 1)][:count]
        for original in made:
            copy = list(original)
            for _ in range(draw.randint(0, len(copy) // 12)):
                copy[draw.randrange(len(copy))] = "planted"
            mine, theirs = duplicates.runs(original), duplicates.runs(copy)
            alike = duplicates.jaccard(mine, theirs, 0.0) >= least
            keys = duplicates.band_keys([original, copy], least)
            proposed = bool((keys[0] == keys[1]).any())
            confirmed = proposed and duplicates.jaccard(mine, theirs, least) >= least
            found.update(
                alike=alike, proposed=proposed, confirmed=confirmed, right=alike and confirmed
            )
        kept[str(least)] = found
    return {
        least: {
            "planted_alike": n["alike"],
            "recall": n["right"] / n["alike"],
            "precision": n["right"] / n["confirmed"],
            "signatures_alone_precision": n["alike"] / max(n["proposed"], 1),
        }
        for least, n in kept.items()
    }


def false_positives(data: Path) -> dict[str, Any]:
    """On real text: items taken for personal data, and texts taken for GSM8K's own questions."""
    shakespeare = (data / "tinyshakespeare.txt").read_text()
    speeches = [part for part in shakespeare.split("\n\n") if part.strip()]
    problems = [text for _, text in texts_of(data / "gsm8k_train.jsonl")]
    found: dict[str, Any] = {}
    for name, given in (("tinyshakespeare", speeches), ("gsm8k_train", problems)):
        items: list[str] = []
        for text in given:
            items += personal.replace(text)[2]
        found[name] = {"texts": len(given), "items": len(items), "examples": items[:5]}
    sets = EvaluationSets([data / "gsm8k_model_solutions.jsonl"], 13)
    hits = [speech for speech in speeches if sets.find(words_of(speech))]
    found["tinyshakespeare"]["taken_for_gsm8k"] = len(hits)
    own = EvaluationSets([data / "gsm8k_train.jsonl"], 13)
    long = [text for text in problems if len(words_of(text)) >= 8]
    planted = [f"{speeches[i % len(speeches)]} {text}" for i, text in enumerate(long)]
    found["gsm8k_train"]["planted_in_shakespeare"] = len(planted)
    found["gsm8k_train"]["planted_found"] = sum(
        own.find(words_of(text)) is not None for text in planted
    )
    return found


def main() -> int:
    import records

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--folder", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "what": "llama2rt corpus on made text, and its rules on planted and real text",
        "command": "python benchmarks/data/corpus.py " + " ".join(sys.argv[1:]),
        "near_duplicates": near_duplicates(given.pairs),
        "real_text": false_positives(given.data),
        "sizes": {},
    }
    for megabytes in given.megabytes:
        folder = given.folder / str(megabytes)
        planted = write(folder, megabytes)
        tokenizer = given.data.resolve() / "llama_tokenizer.model"
        whole = run(command(folder, tokenizer, given.workers, "whole"), folder / "whole")
        report = json.loads((folder / "whole" / "report.json").read_text())["sources"]["text"]
        whole["planted"] = dict(planted)
        whole["removed"] = {step: n["removed"] for step, n in report["removed"].items()}
        whole["personal_data"] = report["personal_data"]
        whole["tokens"] = report["tokens"]
        if megabytes == min(given.megabytes):
            arguments = command(folder, tokenizer, given.workers, "killed")
            run(arguments, folder / "killed", "cleaned")
            run([*arguments, "--resume"], folder / "killed", "written")
            run([*arguments, "--resume"], folder / "killed")
            whole["same_bytes_after_two_kills"] = shards(folder / "killed") == shards(
                folder / "whole"
            )
        result["sizes"][f"{megabytes} MB"] = whole
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(records.header("cpu") | result, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
