"""A Bradley-Terry reward model beside a pairwise preference model, on GSM8K solutions and on
Anthropic's harmlessness pairs.

One model is trained here on GSM8K's text and fine-tuned on its worked answers; both start from it.
Each set is divided by prompts into folds; both are trained on all but one of them and asked about
that one, in turn, so that every pair is asked of models that have not seen its prompt. Pairs that
are too long for either are left out of both. Accuracy above chance is in standard errors over
prompts, since pairs of one question are alike.

    python -P benchmarks/preferences/bradley_terry_and_pairwise.py --data ../shared/data \\
        --work runs/preferences --record build/preferences.json [--tiny] [--seeds 0 1 2] \\
        [--sets gsm8k]

is sized for 20 minutes a seed on two cores (about 13 million tokens through 0.7 million weights);
`--sets gsm8k` is a third of it, `--tiny` shows that it runs. A run in `--work` that is complete is
read, and one that was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from records import header

from llama2rt.checkpoint import load as load_model
from llama2rt.data.readers import Reader, read, write
from llama2rt.data.records import Comparison
from llama2rt.evaluate.intervals import wilson
from llama2rt.evaluate.position import position_bias
from llama2rt.model import Llama, ScalarModel
from llama2rt.rollout import pairwise
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.scoring import score
from llama2rt.stages.comparisons import prompt_key

CONTEXT = 1024
SETS = {"gsm8k": "gsm8k_model_solutions.jsonl", "hh-harmless": "hh_harmless_base_test.jsonl.gz"}
FULL = {
    "shape": {"dim": 128, "layers": 3, "heads": 4, "context": CONTEXT},
    "vocabulary": 1024,
    "dialogues": None,
    "pretrain": 2,
    "sft": 1,
    "reward": 2,
    "preference": 2,
    "lr": 5e-4,
    "pairs": None,
    "folds": 2,
}
TINY = FULL | {
    "shape": {"dim": 32, "layers": 2, "heads": 2, "context": CONTEXT},
    "pretrain": 1,
    "sft": 1,
    "reward": 1,
    "preference": 1,
    "vocabulary": 512,
    "dialogues": 200,
    "pairs": 30,
    "folds": 2,
}


def command(work: Path, name: str, verb: str, *arguments: object, **keys: object) -> Path:
    """Run a stage by the command line into `work`/`name`; returns its directory."""
    out = work / name
    words = ["-P", "-m", "llama2rt.cli", verb, *map(str, arguments), "--out", str(out), "--resume"]
    for key, value in keys.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key.replace('__', '.').replace('_', '-')}", *map(str, values)]
    print("llama2rt", *words[3:], file=sys.stderr)
    subprocess.run([sys.executable, *words], check=True, env=dict(os.environ))
    return out


def start(data: Path, work: Path, sizes: dict[str, Any], seed: int) -> Path:
    """The fine-tuned model that both kinds start from."""
    rows = read([data / "gsm8k_train.jsonl"], "dialogue")[: sizes["dialogues"]]
    text = work / "text.jsonl"
    lines = [{"text": "\n".join(m["content"] for m in row.messages)} for row in rows]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = {f"model__{key}": value for key, value in sizes["shape"].items()}
    base = command(
        work,
        "base",
        "pretrain",
        _recipe(work, "pretrain", f'data = ["{text}"]'),
        vocab_size=sizes["vocabulary"],
        context=256,
        batch_tokens=4096,
        epochs=sizes["pretrain"],
        held_out=0.02,
        seed=seed,
        train__lr=3e-3,
        train__warmup_steps=20,
        train__micro_tokens=4096,
        **shape,
    )
    given = f'init = "{base / "model"}"\ndata = ["{data / "gsm8k_train.jsonl"}"]'
    return command(
        work,
        "sft",
        "sft",
        _recipe(work, "sft", given),
        epochs=sizes["sft"],
        batch_size=32,
        seed=seed,
        train__lr=1e-3,
        train__warmup_ratio=0.03,
        train__micro_tokens=4096,
        **({"limit": sizes["dialogues"]} if sizes["dialogues"] else {}),
    )


def _recipe(work: Path, name: str, text: str) -> Path:
    path = work / f"{name}.toml"
    path.write_text(text + "\n")
    return path


def readable(path: Path, model: Path) -> tuple[list[Comparison], int]:
    """The comparisons of a file that both models can read, and how many are too long."""
    found = list(Reader([path], "comparison", skip_invalid=100))
    _, tokenizer = load_model(model, "meta")
    assert tokenizer is not None
    letters = pairwise.Letters.of(tokenizer)

    def fits(comparison: Comparison) -> bool:
        pair = (comparison.prompt, comparison.chosen, comparison.rejected)
        orders = (pair, pairwise.swapped(pair))
        longest = max(len(pairwise.encode(tokenizer, letters, order)) for order in orders)
        return longest < CONTEXT

    fitting = [comparison for comparison in found if fits(comparison)]
    return fitting, len(found) - len(fitting)


def folds(comparisons: list[Comparison], count: int, seed: int) -> list[list[Comparison]]:
    """The comparisons divided by prompts."""
    prompts = list(dict.fromkeys(map(prompt_key, comparisons)))
    order = np.random.default_rng(seed).permutation(len(prompts))
    fold = {prompts[prompt]: place % count for place, prompt in enumerate(order)}
    return [[c for c in comparisons if fold[prompt_key(c)] == i] for i in range(count)]


def above_chance(right: np.ndarray, comparisons: list[Comparison]) -> dict[str, float]:
    """Accuracy with Wilson's interval over pairs, and how far it is above 0.5 in standard errors
    over prompts (the variance of a ratio of sums over clusters)."""
    prompts: dict[str, list[float]] = {}
    for value, comparison in zip(right.tolist(), comparisons, strict=True):
        prompts.setdefault(prompt_key(comparison), []).append(value - float(np.mean(right)))
    sums = np.array([sum(values) for values in prompts.values()])
    error = float(np.sqrt((sums**2).sum() * len(sums) / max(1, len(sums) - 1)) / len(right))
    interval = wilson(float(right.sum()), len(right))
    return {
        **interval._asdict(),
        "pairs": len(right),
        "prompts": len(prompts),
        "standard_errors_above_chance": (interval.mean - 0.5) / error if error else 0.0,
    }


def train(
    work: Path, name: str, sft: Path, parts: dict[str, list[Comparison]], settings: dict[str, Any]
) -> tuple[Path, Path, dict[str, float]]:
    """Both models of one fold, and the seconds that each took."""
    files = {part: work / f"{name}-{part}.jsonl" for part in parts}
    for part, path in files.items():
        write(path, parts[part])
    given = (
        f'init = "{sft / "model"}"\ndata = ["{files["training"]}"]\n'
        f'validation = ["{files["held_out"]}"]'
    )
    sizes, seed = settings["sizes"], settings["seed"]
    common = {"seed": seed, "train__micro_tokens": 8192, "train__warmup_ratio": 0.05}
    stages = {
        "reward": {"batch_size": 32, "epochs": sizes["reward"]},
        "preference": {
            "block_tokens": CONTEXT,
            "batch_size": 4,
            "epochs": sizes["preference"],
        },
    }
    folders, seconds = [], {}
    for stage, own in stages.items():
        began = time.monotonic()
        recipe = _recipe(work, f"{name}-{stage}", given)
        keys = {**own, **common, "train__lr": sizes["lr"], "train__checkpoint_every": 50}
        folders.append(command(work, f"{name}-{stage}", stage, recipe, **keys) / "model")
        seconds[stage] = time.monotonic() - began
    return folders[0], folders[1], seconds


def compare(name: str, data: Path, work: Path, sft: Path, settings: dict[str, Any]) -> Any:
    """Both models on one set."""
    fitting, too_long = readable(data / SETS[name], sft / "model")
    limit = settings["sizes"]["pairs"]
    divided = folds(fitting[:limit], settings["sizes"]["folds"], settings["seed"])
    asked: list[Comparison] = []
    gaps, orders = [], []
    spent = {"reward": 0.0, "preference": 0.0}
    for i, held_out in enumerate(divided):
        rest = [c for j, fold in enumerate(divided) if j != i for c in fold]
        parts = {"training": rest, "held_out": held_out}
        reward, preference, seconds = train(work, f"{name}-{i}", sft, parts, settings)
        spent = {stage: spent[stage] + seconds[stage] for stage in spent}
        model, tokenizer = load_model(reward)
        assert isinstance(model, ScalarModel) and tokenizer is not None
        items = [(c.prompt, text) for c in held_out for text in (c.chosen, c.rejected)]
        scores = score(model, tokenizer, items)
        gaps.append(scores[::2] - scores[1::2])
        model, tokenizer = load_model(preference)
        assert isinstance(model, Llama) and tokenizer is not None
        pairs = [(c.prompt, c.chosen, c.rejected) for c in held_out]
        orders.append(PairwiseModel(model, tokenizer).probabilities(pairs))
        asked += held_out
    both = np.concatenate(orders)
    gap, mean = np.concatenate(gaps), both.mean(axis=1) - 0.5
    longer = np.array([len(c.chosen) - len(c.rejected) for c in asked])
    return {
        "folds": len(divided),
        "too_long": too_long,
        "bradley_terry": above_chance(_right(gap), asked),
        "pairwise": above_chance(_right(mean), asked),
        "the_longer_answer": above_chance(_right(longer), asked),
        "agree": float((np.sign(gap) == np.sign(mean)).mean()),
        "position_bias": position_bias(both[:, 0], both[:, 1]),
        "seconds": spent,
    }


def _right(ahead: np.ndarray) -> np.ndarray:
    return np.where(ahead == 0, 0.5, ahead > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--record", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="show that it runs")
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    found: dict[str, Any] = {**header("cpu"), "tiny": arguments.tiny, "seeds": {}}
    for seed in arguments.seeds:
        work = (arguments.work / f"seed-{seed}").resolve()
        work.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        sft = start(arguments.data.resolve(), work, sizes, seed)
        of_seed: dict[str, Any] = {"start_seconds": time.monotonic() - began}
        for name in arguments.sets:
            settings = {"sizes": sizes, "seed": seed}
            of_seed[name] = compare(name, arguments.data.resolve(), work, sft, settings)
            for kind in ("bradley_terry", "pairwise", "the_longer_answer"):
                row = of_seed[name][kind]
                print(
                    f"seed {seed} {name:<12}{kind:<18}{100 * row['mean']:5.1f} % "
                    f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}] of {row['pairs']} pairs, "
                    f"{row['standard_errors_above_chance']:+.1f} standard errors over prompts"
                )
        of_seed["seconds"] = time.monotonic() - began
        found["seeds"][str(seed)] = of_seed
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
