"""PPO and its relatives without a critic on the same budget of samples, by the toy world's judge.

From a quickstart folder's SFT model, whose judge no model has seen: each setting below with several
seeds, the same number of sampled responses each, and then one answer to each of the evaluation
prompts, which nobody trained on. Told are the judge's verdict and the KL to the SFT model on those
prompts. Intervals are over prompts, a prompt's value the mean over seeds; gains are paired with the
SFT model's answers to the same prompts.

    python -P benchmarks/rlhf/policy_gradient.py runs/quickstart --out policy-gradient.json
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama2rt.data import readers
from llama2rt.data.records import Prompt
from llama2rt.evaluate import intervals
from llama2rt.quickstart.data import keys_path, read_keys
from llama2rt.quickstart.judge import Key, judge
from llama2rt.rollout import metrics
from llama2rt.rollout.responses import read_responses
from llama2rt.rollout.sampling import derived_seed
from llama2rt.stages import ppo
from llama2rt.stages.inputs import RolloutInputs

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import records

GROUP = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo, beta 0.01": {"critic_lr": 3e-4},
    "ppo, beta 0.1": {"critic_lr": 3e-4, "beta": 0.1},
    "ppo, beta 1": {"critic_lr": 3e-4, "beta": 1.0},
    "grpo": {"algorithm": "grpo", "group_size": GROUP},
    "rloo": {"algorithm": "rloo", "group_size": GROUP},
    "reinforce++": {"algorithm": "reinforce++"},
}


def recipe(folder: Path, iterations: int, **settings: Any) -> ppo.PpoRecipe:
    batches = len(list(folder.glob("reward-safety-*")))
    given: dict[str, Any] = {
        "init": folder / "sft" / "model",
        "rewards": {
            kind: folder / f"reward-{kind}-{batches}" / "model"
            for kind in ("helpfulness", "safety")
        },
        "data": [folder / "data" / "training.jsonl"],
        "iterations": iterations,
        "batch_size": 256,
        "mini_batch_size": 64,
        "sampling": {"max_tokens": 56},
        "train": {"lr": 1e-4, "eps": 1e-8, "checkpoint_every": 0, "log_every": 1},
    }
    return ppo.PpoRecipe(**{**given, **settings})


def answered(
    inputs: RolloutInputs, model: Path, prompts: Sequence[Prompt], keys: Mapping[str, Key]
) -> dict[str, Any]:
    """One answer to each prompt: KL, length, and the judge's verdict by prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "answers.jsonl"
        seed = derived_seed(0, "policy-gradient")
        numbers = metrics.measure(path, inputs.policy(model), inputs.reference, prompts, seed=seed)
        verdicts = [judge(keys[r.prompt.id], r.text) for r in read_responses(path)]
    ordinary = [p.kind == "helpfulness" for p in prompts]
    return {
        "kl": numbers["kl_k1"],
        "score": numbers["score"],
        "tokens": numbers["response_tokens"],
        # Helpful answers to ordinary prompts, safe ones to the others.
        "worth": [
            v.helpfulness if helpful else v.safety
            for v, helpful in zip(verdicts, ordinary, strict=True)
        ],
    }


def row(name: str, runs: list[dict[str, Any]], before: np.ndarray) -> dict[str, Any]:
    """Means over seeds; intervals over prompts."""
    worth = np.mean([run["worth"] for run in runs], axis=0)
    return {
        "setting": name,
        "worth": intervals.bootstrap(worth)._asdict(),
        "gain": intervals.bootstrap(worth - before)._asdict(),
        "gain_by_seed": [float(np.mean(run["worth"]) - before.mean()) for run in runs],
        **{key: [run[key] for run in runs] for key in ("kl", "score", "tokens")},
    }


def text(found: Mapping[str, Any]) -> str:
    def estimate(key: str) -> str:
        value = found[key]
        return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"

    kl = " ".join(f"{value:6.2f}" for value in found["kl"])
    return (
        f"{found['setting']:<16} judge {estimate('worth')}  gain {estimate('gain')}  KL {kl}  "
        f"{np.mean(found['tokens']):.1f} tokens"
    )


def write(given: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """The record of the settings that are done."""
    said = {name: getattr(given, name) for name in ("iterations", "seeds", "prompts")}
    record = records.header("cpu") | {"what": __doc__.splitlines()[0], **said}
    record |= {"settings": {name: SETTINGS[name] for name in given.settings}, "rows": rows}
    given.out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a finished quickstart")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8, help="of 256 responses")
    parser.add_argument("--prompts", type=int, default=600, help="of the evaluation file")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    inputs = ppo.open_inputs(recipe(given.folder, given.iterations))
    prompts = readers.read(given.folder / "data" / "evaluation.jsonl", "prompt")[: given.prompts]
    keys = read_keys(keys_path(given.folder))
    start = answered(inputs, given.folder / "sft" / "model", prompts, keys)
    before = np.array(start["worth"])
    rows = [row("sft", [start], before)]
    print(text(rows[0]), flush=True)
    for name in given.settings:
        runs = []
        for seed in range(given.seeds):
            settings = recipe(given.folder, given.iterations, seed=seed, **SETTINGS[name])
            with tempfile.TemporaryDirectory() as scratch:
                model = ppo.run(settings, Path(scratch) / "run")
                runs.append(answered(inputs, model, prompts, keys))
        rows.append(row(name, runs, before))
        print(text(rows[-1]), flush=True)
        if given.out:
            write(given, rows)


if __name__ == "__main__":
    main()
