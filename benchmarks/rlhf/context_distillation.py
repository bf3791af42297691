"""Context distillation on the quickstart's world: violations and false refusals before and after.

For each quickstart folder its chat model is fine-tuned further on demonstrations in which
pre-prompts occur (`quickstart.careful_world`). All arms begin with that; the reward models are the
quickstart's. Arms, on the same held-out prompts and random numbers, by the judge that no model saw:

- baseline: that chat model
- with a pre-prompt: the same, with a pre-prompt that asks for care before every prompt
- own answers: fine-tuned on as many of its own answers without a pre-prompt, to prompts at random,
  and on as many other dialogues
- distilled: `llama2rt context-distillation`
- distilled, all: fine-tuned on all its finished answers with a pre-prompt, without the safety
  reward model's say

    python -P benchmarks/rlhf/context_distillation.py runs/seed-0 runs/seed-1 --out record.json
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt.annotate.safety import Verdict
from llama2rt.data import readers
from llama2rt.data.records import Dialogue, Prompt, Sample
from llama2rt.evaluate import intervals, safety
from llama2rt.generate import Engine
from llama2rt.quickstart import careful_world as world
from llama2rt.quickstart import corpus
from llama2rt.quickstart.judge import Key, declines, judge
from llama2rt.rollout import attacks
from llama2rt.rollout.preprompts import put_before
from llama2rt.stages import context_distillation, loading, sft
from llama2rt.train.options import TrainOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

MAX_TOKENS = 56
RATES = ("violation", "false_refusal")
COUNTS = {"safety": 300, "borderline": 200, "ordinary": 300}


class Study:
    """One quickstart folder's."""

    def __init__(self, folder: Path, work: Path, given: argparse.Namespace) -> None:
        self.folder, self.work, self.given = folder, work, given
        self.seed: int = json.loads((folder / "manifest.json").read_text())["seed"]
        self.before = folder / "sft" / "model"
        self.keys: dict[str, Key] = {}
        work.mkdir(parents=True, exist_ok=True)

    def say(self, what: str) -> None:
        print(f"{self.folder.name:12} {what}, {time.process_time():.0f} s of CPU", flush=True)

    def train_options(self, lr: float) -> TrainOptions:
        return TrainOptions(lr=lr, eps=1e-8, warmup_ratio=0.05, log_every=50, checkpoint_every=0)

    def chat_model(self) -> Path:
        """The chat model that all arms begin with."""
        dialogues = world.dialogues(self.given.dialogues, self.seed, self.given.safety_share)
        readers.write(self.work / "dialogues.jsonl", dialogues)
        readers.write(
            self.work / "helpful.jsonl",
            world.helpful(self.given.mixed_in, self.seed, self.given.borderline_share),
        )
        recipe = sft.SftRecipe(
            init=self.before,
            data=[self.work / "dialogues.jsonl"],
            batch_size=32,
            epochs=1,
            seed=self.seed,
            train=self.train_options(1e-3),
        )
        return sft.run(recipe, self.work / "sft", resume=True)

    def distil(self, chat: Path) -> Path:
        """The stage, on requests of the training split; pre-prompts no demonstration had."""
        prompts, _ = world.prompts("distil", "train", self.seed, {"safety": self.given.prompts})
        readers.write(self.work / "adversarial.jsonl", prompts)
        recipe = context_distillation.ContextDistillationRecipe.model_validate(
            {
                "init": chat,
                "rewards": {"safety": newest_safety(self.folder)},
                "data": [self.work / "adversarial.jsonl"],
                # Each a pre-prompt by itself: the template is the adjective's place alone.
                "preprompts": {
                    "templates": ["{adjective}"],
                    "adjectives": world.combinations(held_out=True),
                    "answers": world.ANSWERS,
                    "tailored": 0.5,
                },
                "mixed_in": [self.work / "helpful.jsonl"],
                "mixed_in_share": self.given.mixed_in_share,
                "sampling": {"max_tokens": MAX_TOKENS},
                "batch_size": 32,
                "epochs": 2,
                "seed": self.seed,
                "train": self.train_options(self.given.lr),
            }
        )
        return context_distillation.run(recipe, self.work / "distilled", resume=True)

    def compared(self, chat: Path) -> dict[str, Path]:
        """The two arms that are fine-tuned on the same pairs in another way."""
        lines = (self.work / "distilled" / "samples" / "pairs.jsonl").read_text().splitlines()
        pairs = [json.loads(line) for line in lines]
        kept = sum(pair["kept"] for pair in pairs)
        own = [pair for pair in pairs if pair.get("original", "").strip()]
        helpful = readers.read(self.work / "helpful.jsonl", "dialogue")
        rng = random.Random(f"{self.seed}:mixed in")
        share = self.given.mixed_in_share
        found = {}
        for name, key, rows in (
            ("own answers", "original", rng.sample(own, min(len(own), kept))),
            ("distilled, all", "answer", [pair for pair in pairs if "answer" in pair]),
        ):
            data = [
                Dialogue([*row["messages"], {"role": "assistant", "content": row[key]}])
                for row in rows
            ]
            count = min(len(helpful), round(len(data) * share / (1 - share)))
            path = self.work / f"{name}.jsonl"
            readers.write(path, data + rng.sample(helpful, count))
            recipe = sft.SftRecipe(
                init=chat,
                data=[path],
                held_out=0.0,
                batch_size=32,
                epochs=2,
                seed=self.seed,
                train=self.train_options(self.given.lr),
            )
            found[name] = sft.run(recipe, self.work / name, resume=True)
        return found

    def verdict(self, sample: Sample) -> Verdict:
        said = judge(self.keys[sample.prompt_id], sample.response)
        return Verdict(said.unsafe, declines(sample.response))

    def answers(self, folder: Path, prompts: Sequence[Prompt]) -> list[Sample]:
        model, tokenizer = loading.load_llama(folder)
        engine = Engine(model, tokenizer, max_sequences=128)
        options = {"max_tokens": MAX_TOKENS, "seed": self.seed}
        found = engine.generate([prompt.messages for prompt in prompts], **options)
        return [Sample.of(p, c.text) for p, c in zip(prompts, found, strict=True)]

    def insist(self, folder: Path, conversations: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Violations by turn of a user who asks four times."""
        model, tokenizer = loading.load_llama(folder)
        engine = Engine(model, tokenizer, max_sequences=128)
        options = {"max_tokens": MAX_TOKENS, "seed": self.seed}
        samples = attacks.converse(engine, conversations, policy="", **options)
        turns: list[dict[str, Any]] = safety.measure(samples, [self.verdict(s) for s in samples])[
            "turns"
        ]
        return turns

    def run(self) -> dict[str, Any]:
        """All arms, measured."""
        began = time.process_time()
        chat = self.chat_model()
        distilled = self.distil(chat)
        arms = {"baseline": chat, **self.compared(chat), "distilled": distilled}
        prompts, self.keys = world.prompts("careful-evaluation", "evaluation", self.seed, COUNTS)
        self.say("trained")
        conversations, keys = insisting(self.seed, 100)
        self.keys |= keys
        samples = {name: self.answers(folder, prompts) for name, folder in arms.items()}
        rng = random.Random(f"{self.seed}:pre-prompts")
        asked = [
            put_before(prompt, rng.choice(world.combinations(held_out=True)), "system")
            for prompt in prompts
        ]
        samples["with a pre-prompt"] = self.answers(chat, asked)
        verdicts = {name: [self.verdict(s) for s in own] for name, own in samples.items()}
        summary = json.loads((self.work / "distilled" / "report.json").read_text())
        rows = []
        for name, own in samples.items():
            row = {"arm": name, **safety.measure(own, verdicts[name])}
            row["helpfulness"] = self.helpfulness(own)
            for key in RATES:
                for other in ("baseline", "own answers"):
                    pair, said = [samples[other], own], [verdicts[other], verdicts[name]]
                    row[f"{key}_than_{other}"] = safety.paired(key, pair, said)
            if name in ("baseline", "distilled"):
                row["turns"] = self.insist(arms[name], conversations)
            rows.append(row)
        return {
            "seed": self.seed,
            "arms": rows,
            "distilled": summary["distilled"],
            "targets": summary["targets"],
            "mixed_in": summary["mixed_in"],
            "cpu_s": round(time.process_time() - began, 1),
        }

    def helpfulness(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Mean of the judge's on prompts that may be answered."""
        found = [
            judge(self.keys[s.prompt_id], s.response).helpfulness
            for s in samples
            if s.kind == "helpfulness"
        ]
        return intervals.bootstrap(found)._asdict()


def insisting(seed: int, count: int) -> tuple[list[Prompt], dict[str, Key]]:
    """Conversations in which a user asks for the secret four times, each time in other words."""
    prompts, keys = world.prompts("insisting", "evaluation", seed, {"safety": count})
    rng = random.Random(f"{seed}:insisting")
    found, known = [], {}
    for prompt in prompts:
        told = [m for m in prompt.messages if m["role"] == "system"]
        if not told:  # told in a turn of its own: its answer would be the policy's
            continue
        others = list(corpus.draw("secret", rng).questions)
        rng.shuffle(others)
        messages = told
        for number, text in enumerate(others[:4]):
            messages = [*messages, {"role": "user", "content": text}]
            if number < 3:
                messages.append({"role": "assistant", "content": "(the policy's own)"})
        found.append(Prompt(prompt.id, messages, "safety", "operator"))
        known[prompt.id] = keys[prompt.id]
    return found, known


def newest_safety(folder: Path) -> Path:
    """The safety reward model of a quickstart's last batch of comparisons that is complete."""
    models = sorted(folder.glob("reward-safety-*/model/config.json"))
    return models[-1].parent


def pooled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the folders, and each folder's differences to the baseline and to the control."""
    found = []
    for name in [arm["arm"] for arm in rows[0]["arms"]]:
        own = [next(arm for arm in row["arms"] if arm["arm"] == name) for row in rows]
        row: dict[str, Any] = {"arm": name}
        for key in (*RATES, "helpfulness"):
            row[key] = float(np.mean([arm[key]["mean"] for arm in own]))
        for key in (
            f"{rate}_than_{other}" for rate in RATES for other in ("baseline", "own answers")
        ):
            row[key] = [arm[key]["mean"] for arm in own]
        found.append(row)
    return found


def write(given: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """The record of the folders that are done."""
    names = ("dialogues", "safety_share", "prompts", "lr", "mixed_in", "mixed_in_share")
    names += ("borderline_share",)
    settings = {name: getattr(given, name) for name in names}
    record = records.header("cpu") | {"what": __doc__.splitlines()[0], "settings": settings}
    record |= {"means": pooled(rows), "rows": rows}
    given.out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="quickstart run directories")
    parser.add_argument("--work", type=Path, required=True, help="where the arms' runs go")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dialogues", type=int, default=3_000, help="demonstrations")
    parser.add_argument("--safety-share", type=float, default=0.7, help="of them about the secret")
    parser.add_argument("--prompts", type=int, default=600, help="adversarial prompts")
    parser.add_argument("--lr", type=float, default=5e-4, help="of all fine-tuning after it")
    parser.add_argument("--mixed-in", type=int, default=2_000, help="other dialogues there are")
    parser.add_argument(
        "--borderline-share", type=float, default=0.5, help="of them, with a secret in sight"
    )
    parser.add_argument("--mixed-in-share", type=float, default=0.5, help="of the training set")
    given = parser.parse_args()
    rows = []
    for folder in given.folders:
        rows.append(Study(folder, given.work / folder.name, given).run())
        for arm in rows[-1]["arms"]:
            said = ", ".join(
                f"{key} {arm[key]['mean']:.3f} [{arm[key]['low']:.3f}, {arm[key]['high']:.3f}]"
                for key in ("violation", "false_refusal", "helpfulness")
            )
            print(f"{folder.name:12} {arm['arm']:18} {said}", flush=True)
        if given.out:
            write(given, rows)


if __name__ == "__main__":
    main()
