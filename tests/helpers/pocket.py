"""A problem small enough to learn in seconds, whose right answers are known.

Visits are to be answered with "yes" (helpful), secrets with "sorry" (safe); the fine-tuned policy
tosses a coin on both. The prompts of files `prompts` and `validation` share no name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
import pytest
import torch

from llama2rt.checkpoint import native
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.packing import Example
from llama2rt.data.readers import write
from llama2rt.data.records import Comparison, Prompt
from llama2rt.model import Llama, LlamaConfig
from llama2rt.rollout.responses import Response
from llama2rt.stages import reward
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.optimizer import Optimizer
from llama2rt.train.options import TrainOptions

SYLLABLES = ["ba", "do", "ki", "lu", "me", "no", "ra", "su", "ti", "ve"]
NAMES = [a + b for a in SYLLABLES for b in SYLLABLES]
TRAINING, HELD_OUT = NAMES[::2], NAMES[1::2]
QUESTIONS = {"helpfulness": "may {} visit", "safety": "what does {} hide"}
ANSWERS = {"helpfulness": ("yes", "no"), "safety": ("sorry", "gold")}


def messages(kind: str, name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTIONS[kind].format(name)}]


def correct(kind: str, text: str) -> bool:
    return text == ANSWERS[kind][0]


@dataclass(frozen=True)
class Pocket:
    """Files and model folders of the problem."""

    tokenizer: Path
    sft: Path
    helpfulness: Path
    safety: Path
    helpfulness_comparisons: Path
    safety_comparisons: Path
    prompts: Path
    validation: Path


def prompts(names: list[str]) -> list[Prompt]:
    return [Prompt(f"{k}-{n}", messages(k, n), k) for n in names for k in QUESTIONS]


def comparisons(kind: str, names: list[str], seed: int) -> list[Comparison]:
    """Helpfulness prefers "yes", and "gold" to "sorry"; safety prefers "sorry". One in ten is an
    unsure annotator's coin toss, rated so."""
    random = np.random.default_rng(seed)
    records = []
    for name in names:
        for asked, (good, bad) in ANSWERS.items():
            if asked != kind and kind == "helpfulness":
                good, bad = bad, good
            unsure = random.random() < 0.1
            if unsure and random.random() < 0.5:
                good, bad = bad, good
            safety = None
            if kind == "safety":
                if asked == "safety" and good == "gold":
                    continue  # chosen unsafe, other safe: excluded (section 3.2.1)
                safety = "chosen_safe" if asked == "safety" else "both_safe"
            rating = "negligibly_better" if unsure else "significantly_better"
            records.append(Comparison(messages(asked, name), good, bad, rating, safety, kind))
    return records


def fine_tune(folder: Path, tokenizer: Tokenizer) -> None:
    """A policy that knows the format and tosses a coin between the two answers."""
    config = LlamaConfig(
        dim=32, layers=2, heads=2, kv_heads=2, ffn_hidden=64, context=64,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    model = Llama(config, dtype=torch.float32).initialize(0)
    examples = [
        Example.of(*chat.encode_response(tokenizer, messages(kind, name), answer))
        for name in NAMES
        for kind, answers in ANSWERS.items()
        for answer in answers
    ]
    options = TrainOptions(lr=4e-3)
    optimizer = Optimizer(model, options)
    loader = ExampleLoader(examples, 64, 8192, seed=0)
    for _ in range(60):
        for batch in loader.next():
            logprob = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.targets)
            (-logprob.sum() / batch.weight).backward()
        optimizer.step(options.lr)
    native.save(model, tokenizer, folder)


def response(
    text: str, reward: float = 0.0, *, name: str = "baba", tokens: tuple[int, ...] = (7, 8, 2)
) -> Response:
    """To a helpfulness prompt; finished where `tokens` end with 2, EOS."""
    return Response(
        prompt=Prompt(name, messages("helpfulness", name)),
        text=text,
        prompt_tokens=[1, 5, 6],
        tokens=list(tokens),
        finished=tokens[-1] == 2,
        reward=reward,
        scores={"helpfulness": 0.5},
        policy="p",
        temperature=1.0,
        seed=0,
    )


def sampled(tokenizer: Tokenizer, prompt: Prompt, text: str) -> Response:
    """`text` as a policy with the tokenizer would have sampled it."""
    asked = chat.encode_prompt(tokenizer, prompt.messages)
    tokens, _ = chat.encode_response(tokenizer, prompt.messages, text)
    return Response(
        prompt, text, asked, tokens[len(asked) :], True, 1.0, {"helpfulness": 0.7}, "p", 1.0, 0
    )


def tables(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys, as the command line takes them, as a recipe's tables."""
    nested: dict[str, Any] = {}
    for key, value in given.items():
        table, _, name = key.rpartition(".")
        (nested.setdefault(table, {}) if table else nested)[name] = value
    return nested


def reward_recipe(pocket: Pocket, kind: str, **settings) -> reward.RewardRecipe:
    given = {
        "init": pocket.sft,
        "data": [getattr(pocket, f"{kind}_comparisons")],
        "kind": kind,
        "held_out": 20,
        "batch_size": 16,
        "epochs": 4,
        "train": {"lr": 3e-3, "log_every": 5, "checkpoint_every": 0},
    }
    return reward.RewardRecipe(**(given | settings))


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def killed_and_resumed(monkeypatch, owner, name: str, calls: int, run, recipe, directory) -> Path:
    """`run` stopped dead when function `owner.name` is called for the `calls`-th time, and then
    again with --resume."""
    original = getattr(owner, name)
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Killed):
            run(recipe, directory)
    return run(recipe, directory, resume=True)


def metrics(directory: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock and the energy meter decide."""
    lines = json_lines.read(directory / "metrics.jsonl")
    measured = {"tokens_per_second", "mfu", "energy", "joules_per_token", "joules_per_step"}
    measured |= {"slowest_rank", "straggler_ratio"}
    return [{key: line[key] for key in line if key not in measured} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def texts() -> list[str]:
    """All questions with each of their answers."""
    return [
        f"[INST] {QUESTIONS[kind].format(name)} [/INST] {answer} "
        for name in NAMES
        for kind, answers in ANSWERS.items()
        for answer in answers
    ]


def begin(root: Path) -> Tokenizer:
    """The tokenizer and the policy that tosses coins, in `root`/tokenizer and `root`/sft."""
    tokenizer = Tokenizer.train(texts(), 320, root / "tokenizer")
    fine_tune(root / "sft", tokenizer)
    return tokenizer


def build(root: Path) -> Pocket:
    """The problem on disk, reward models trained by their own stage."""
    problem = Pocket(
        tokenizer=root / "tokenizer",
        sft=root / "sft",
        helpfulness=root / "helpfulness" / "model",
        safety=root / "safety" / "model",
        helpfulness_comparisons=root / "helpfulness.jsonl",
        safety_comparisons=root / "safety.jsonl",
        prompts=root / "prompts.jsonl",
        validation=root / "validation.jsonl",
    )
    begin(root)
    write(problem.helpfulness_comparisons, comparisons("helpfulness", TRAINING, 0))
    write(problem.safety_comparisons, comparisons("safety", TRAINING, 1))
    write(problem.prompts, prompts(TRAINING))
    write(problem.validation, prompts(HELD_OUT))
    for kind in ("helpfulness", "safety"):
        reward.run(reward_recipe(problem, kind), root / kind)
    return problem
