"""A round of PPO or GRPO (sample, score, train) against TRL's trainers on the same weights.

Each side works in a process of its own with one thread; rounds alternate between them. A figure is
the ratio of medians, in wall time and in CPU time, which counts where the machine is not quiet.
What a round is: `group_sides.py`. TRL's PPOTrainer is of 1.12, the last release that has it:

    pip install --target trl-1.12 --no-deps trl==1.12.0
    python -P benchmarks/training/group_step.py --ppo-trl trl-1.12 --out benchmarks/results/MACHINE

`--precision bf16`: products in bf16 on both sides, which is TRL's default.

Shapes: that of the quickstart, whose time is mostly overhead, and 24M (`step.SHAPES`). Prompts of
--prompt-tokens are made of several of the toy's; 0: the toy's own, a line each.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Run as a script with -P, its own folder is missing.
sys.path.extend(str(Path(__file__).parents[n] / folder) for n, folder in ((0, ""), (1, "helpers")))

import group_sides
import records
import step
import torch
from reward_step import QUICKSTART, config, take_step

from llama2rt.checkpoint import hf
from llama2rt.data import readers
from llama2rt.data.records import Prompt
from llama2rt.model import Llama, ScalarModel
from llama2rt.quickstart import data
from llama2rt.quickstart.recipe import smoke
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

ROUNDS, WARM_UP = (1, 1) if step.SMOKE else (5, 1)
SHAPES = ("smoke",) if step.SMOKE else (QUICKSTART, "24M")


def inputs(shape: str, prompts: int, tokens: int, folder: Path) -> None:
    """Prompts of at least `tokens`, a tokenizer, and both models with fixed random weights."""
    small = smoke() if step.SMOKE else smoke().model_copy(update={"vocab_size": 1024})
    lines = prompts * (1 + tokens // 8)
    paths = data.write(small.model_copy(update={"training_prompts": max(24, lines)}), folder)
    data.initialise(small, paths["documents"], paths["dialogues"], folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    of_shape = dataclasses.replace(config(shape, tokenizer.vocab_size), context=1024)
    hf.save(Llama(of_shape, dtype=torch.float32).initialize(0), tokenizer, folder / "policy")
    hf.save(ScalarModel(of_shape, dtype=torch.float32).initialize(1), tokenizer, folder / "reward")
    drawn = long_prompts(readers.read(paths["training"], "prompt"), tokens, tokenizer)[:prompts]
    readers.write(folder / "prompts.jsonl", drawn)
    ids = [chat.encode_prompt(tokenizer, prompt.messages) for prompt in drawn]
    told = {"vocabulary": tokenizer.vocab_size, "eos": tokenizer.eos, "prompts": ids}
    (folder / "ids.json").write_text(json.dumps(told))


def long_prompts(lines: list[Prompt], tokens: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Prompts of the texts of several, each of as many as make at least `tokens`."""
    found: list[Prompt] = []
    text = ""
    for line in lines:
        text = f"{text} {line.messages[-1]['content']}".strip()
        messages = [{"role": "user", "content": text}]
        if len(chat.encode_prompt(tokenizer, messages)) >= tokens:
            found.append(dataclasses.replace(line, messages=messages))
            text = ""
    return found


def compare(setting: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians, TRL's over ours, peaks and all that was measured."""
    script = str(Path(group_sides.__file__))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": "1", "BENCH_PRECISION": options.precision}
    older = environment | {
        "PYTHONPATH": os.pathsep.join([str(options.ppo_trl), environment.get("PYTHONPATH", "")])
    }
    workers = {
        side: subprocess.Popen(
            [sys.executable, "-P", script, side, setting, folder, *counts(setting, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=older if (side, setting) == ("trl", "ppo") else environment,
        )
        for side in group_sides.SIDES
    }
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    try:
        for _ in range(WARM_UP + options.rounds):
            for side, worker in workers.items():
                taken[side].append(take_step(side, worker))
                print(setting, side, json.dumps(taken[side][-1]), file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return summary(taken)


def counts(setting: str, options: argparse.Namespace) -> tuple[str, str]:
    """As many responses in both settings."""
    prompts = options.prompts * (group_sides.GROUP if setting == "ppo" else 1)
    return str(prompts), str(options.tokens)


def summary(taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    measured: dict[str, Any] = {"rounds": taken}
    for key in ("seconds", "cpu_seconds", "tokens"):
        measured[key] = {
            side: statistics.median(result[key] for result in results[WARM_UP:])
            for side, results in taken.items()
        }
    for key in ("seconds", "cpu_seconds"):
        measured[f"trl_over_{key}"] = measured[key]["trl"] / measured[key]["ours"]
    measured["peak_bytes"] = {side: results[-1]["peak"] for side, results in taken.items()}
    # The same lengths, but for the luck of the draw.
    lengths = measured["tokens"]
    if not 0.8 < lengths["trl"] / lengths["ours"] < 1.25:
        raise AssertionError(f"not the same work: responses of {lengths} tokens on average")
    return measured


def row(shape: str, setting: str, result: dict[str, Any]) -> str:
    text = f"{shape:<12}{setting:<6}"
    for side, seconds in result["seconds"].items():
        text += f"{side} {seconds:.2f} s ({result['cpu_seconds'][side]:.2f} of CPU), "
        text += f"{result['tokens'][side]:.1f} tokens  "
    return text + (
        f"| {result['trl_over_seconds']:.2f}x ({result['trl_over_cpu_seconds']:.2f}x in CPU time)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for group-step.json, or group-step-bf16")
    parser.add_argument("--shape", choices=SHAPES, help="one shape alone")
    parser.add_argument("--ppo-trl", type=Path, help="folder with TRL 1.12; without it, no PPO")
    parser.add_argument("--prompts", type=int, default=4, help="of GRPO, 8 responses each")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of a prompt at least")
    parser.add_argument("--tokens", type=int, default=64, help="of a response at most")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="counted")
    options = parser.parse_args()
    measured: dict[str, Any] = records.header("cpu") | {
        "threads": 1,
        "what": f"a round of GRPO ({options.prompts} prompts, {group_sides.GROUP} responses each) "
        f"and of PPO (as many responses) of at most {options.tokens} tokens, prompts of at least "
        f"{options.prompt_tokens}, {options.precision}",
        "versions": records.versions(("torch", "transformers", "trl"))
        | {"trl of PPO": "1.12.0" if options.ppo_trl else "not measured"},
    }
    for shape in [options.shape] if options.shape else SHAPES:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            responses = options.prompts * group_sides.GROUP
            prompts = responses if options.ppo_trl else options.prompts
            inputs(shape, prompts, options.prompt_tokens, folder)
            for setting in group_sides.SETTINGS if options.ppo_trl else ("grpo",):
                result = compare(setting, folder, options)
                measured.setdefault(shape, {})[setting] = result
                print(row(shape, setting, result), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        ending = "" if options.precision == "fp32" else f"-{options.precision}"
        path = options.out / f"group-step{ending}.json"
        path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
