"""GSM8K as the plan `v1-v5-gsm8k` reads it: openai/grade-school-math's two files, divided.

    data/documents.jsonl        training problems with their solutions, as text
    data/dialogues.jsonl        the same as dialogues
    data/prompts.jsonl          some of the training problems, for rejection sampling
    data/comparisons.jsonl      a right model solution against a wrong one, of test problems
    data/comparisons-held-out.jsonl
                                the same of other test problems
    data/evaluation.jsonl       these test problems, which nothing is trained on
    data/validation.jsonl       the first of them
    judge/answers.json          their final answers, which no model may see
    tokenizer/, init/           before any training

Model solutions exist of test problems alone: the reward model learns from some of those and is
tested on the others, on which the versions are compared too. Left out of all texts are the
calculator's marks (<<48/2=24>>), which double the tokens of an answer and which nothing here
computes; and model solutions end as the training set's do, with "#### 24" for "A: 24", since the
reward model reads answers of a policy that has learned the former.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from llama2rt import atomic
from llama2rt.checkpoint import native
from llama2rt.data import readers
from llama2rt.data.json_values import without_nulls
from llama2rt.data.records import Comparison, Dialogue, Document, Prompt
from llama2rt.errors import InputError
from llama2rt.model import LlamaConfig
from llama2rt.quickstart import data
from llama2rt.run import hash_path
from llama2rt.text.tokenizer import Tokenizer

TRAINING, SOLUTIONS = "gsm8k_train.jsonl", "gsm8k_model_solutions.jsonl"
ANSWER = "####"
_FINAL = re.compile(r"####\s*\$?\s*(-?[\d.,]+)")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_ENDED = re.compile(r"\nA: ")


@dataclass(frozen=True)
class Sizes:
    """How much of the two files goes where, and the shape of the model."""

    seed: int
    prompts: int = 240
    held_out: int = 400
    """test problems"""
    validation: int = 24
    limit: int | None = None
    """training problems; None for all"""
    vocab_size: int = 2048
    dim: int = 128
    layers: int = 4
    heads: int = 4
    ffn_hidden: int = 352
    context: int = 512
    std: float = 0.08
    """of the random weights: 0.02 is for widths of a thousand"""

    @property
    def shape(self) -> LlamaConfig:
        return LlamaConfig(
            dim=self.dim, layers=self.layers, heads=self.heads, kv_heads=self.heads,
            ffn_hidden=self.ffn_hidden, vocab_size=self.vocab_size, context=self.context,
        )  # fmt: skip


SMOKE: dict[str, int] = {
    "prompts": 8, "held_out": 30, "validation": 4, "limit": 120, "vocab_size": 380, "dim": 32,
    "layers": 2, "heads": 2, "ffn_hidden": 64,
}  # fmt: skip
"""next to nothing, to see whether all is in place"""


def smoke(seed: int) -> Sizes:
    """Of `SMOKE`."""
    return Sizes(seed, **SMOKE)


def write(directory: Path, source: Path, wanted: Sizes) -> None:
    """All of it, or what is not there yet, from the two files in the folder `source`; one seed, one
    division. InputError where a file is not there or is another one."""
    answers = directory / "judge" / "answers.json"
    training = [_plain(d) for d in readers.read(source / TRAINING, "dialogue")[: wanted.limit]]
    rng = random.Random(f"{wanted.seed}:gsm8k")
    comparisons = [_alike(c) for c in readers.read(source / SOLUTIONS, "comparison")]
    finals = final_answers(source / SOLUTIONS)
    aside = set(rng.sample(sorted(finals), min(wanted.held_out, len(finals) // 2)))
    evaluation = [
        Prompt(f"test-{i:04d}", _asked(question)) for i, question in enumerate(sorted(aside))
    ]
    rng.shuffle(evaluation)
    some = rng.sample(training, min(wanted.prompts, len(training)))
    folder = directory / "data"
    for name, records in (
        ("documents", [Document("\n".join(_contents(d)), "gsm8k") for d in training]),
        ("dialogues", training),
        ("prompts", [Prompt(f"train-{i:04d}", d.messages[:1]) for i, d in enumerate(some)]),
        ("comparisons", [c for c in comparisons if c.prompt[0]["content"] not in aside]),
        ("comparisons-held-out", [c for c in comparisons if c.prompt[0]["content"] in aside]),
        ("evaluation", evaluation),
        ("validation", evaluation[: wanted.validation]),
    ):
        readers.write(folder / f"{name}.jsonl", records)
    if not (directory / "init" / "config.json").exists():
        texts = ["\n".join(_contents(d)) for d in training]
        texts += [f"[INST] {d.messages[0]['content']} [/INST]" for d in training]
        tokenizer = Tokenizer.train(texts, wanted.vocab_size, directory / "tokenizer")
        model = data.random(wanted.shape, wanted.std, wanted.seed)
        native.save(model, tokenizer, directory / "init")
    known = {prompt.id: finals[prompt.messages[0]["content"]] for prompt in evaluation}
    atomic.write(answers, json.dumps(known, indent=1))


def source_hashes(source: Path) -> list[str]:
    """SHA-256 of both of GSM8K's files in a folder; InputError naming one that is not there."""
    for name in (TRAINING, SOLUTIONS):
        if not (source / name).is_file():
            raise InputError(f"{source / name}: no such file")
    return [hash_path(source / name) for name in (TRAINING, SOLUTIONS)]


def final_answers(path: Path) -> dict[str, str]:
    """By question of the file of model solutions, the final answer of its ground truth. InputError
    naming the line of one without."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = without_nulls(json.loads(line))
        except ValueError:
            raise InputError(f"{path}:{number}: not JSON") from None
        final = final_answer(_ENDED.sub(f"\n{ANSWER} ", str(row.get("ground_truth", ""))))
        if "question" not in row or final is None:
            raise InputError(f"{path}:{number}: expected question, and ground_truth with an answer")
        found[row["question"].strip()] = str(final)
    return found


def final_answer(text: str) -> Decimal | None:
    """The number after the last "####"; None where there is none."""
    said = _FINAL.findall(text)
    try:
        return Decimal(said[-1].replace(",", "").rstrip(".")).normalize() if said else None
    except InvalidOperation:
        return None


def exact(answers: Path) -> Callable[[Prompt, str], float]:
    """What an answer is worth: 1 where its final number is the right one, else 0. As the evaluate
    step's recipe names it, with the path of judge/answers.json."""
    known = {name: Decimal(final) for name, final in json.loads(answers.read_text()).items()}

    def worth(prompt: Prompt, text: str) -> float:
        if prompt.id not in known:
            raise InputError(f"{answers}: has no answer to the prompt {prompt.id!r}")
        return float(final_answer(text) == known[prompt.id])

    return worth


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _contents(dialogue: Dialogue) -> Sequence[str]:
    return [message["content"] for message in dialogue.messages]


def _plain(dialogue: Dialogue) -> Dialogue:
    *asked, last = dialogue.messages
    said = {**last, "content": _CALCULATOR.sub("", last["content"])}
    return replace(dialogue, messages=[*asked, said])


def _alike(comparison: Comparison) -> Comparison:
    """Both solutions in the training set's form."""
    chosen, rejected = (
        _ENDED.sub(f"\n{ANSWER} ", _CALCULATOR.sub("", text))
        for text in (comparison.chosen, comparison.rejected)
    )
    return replace(comparison, chosen=chosen, rejected=rejected)
