"""The main job, top to bottom: data, a base model, a chat model, reward models, RLHF, a report.

Each stage is the library's own, run into its folder below the job's directory, so every one of them
can be inspected, resumed or repeated by its verb. What is here is what no stage does: write the
data, let the simulated annotators compare answers, and let the judge read the versions at the end.

    data/                 records by split: what models may see
    judge/keys.json       right answers by prompt id: what they may not
    tokenizer/, init/     before any training
    pretrain/ sft/        the base model and the chat model
    comparisons/          what the annotators said, training and held out
    reward-helpfulness/ reward-safety/
    rlhf-v1/ rlhf-v2/ ppo/            rejection sampling twice, PPO on top
    dpo/                  the other branch: online DPO from the SFT model
    evaluation/           every version's answers to the held-out prompts
    report.html report.json
"""

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from llama2rt import atomic
from llama2rt.checkpoint import native
from llama2rt.data import readers
from llama2rt.data.records import Comparison, Prompt
from llama2rt.generate import Engine
from llama2rt.model import Llama
from llama2rt.quickstart import console, corpus, evaluation, page
from llama2rt.quickstart import recipe as recipes
from llama2rt.quickstart.annotator import compare
from llama2rt.quickstart.judge import Key
from llama2rt.quickstart.recipe import QuickstartRecipe
from llama2rt.run import Run, hash_path
from llama2rt.stages import dpo, loading, phases, ppo, pretrain, rejection, reward, sft
from llama2rt.text.tokenizer import Tokenizer

KINDS: tuple[Literal["helpfulness"], Literal["safety"]] = ("helpfulness", "safety")
# Name, the split its task instances are of, and the share that asks for the secret.
PROMPT_FILES = (
    ("preference", "train", 1 / 4),
    ("reward_test", "reward", 1 / 3),
    ("training", "train", 1 / 4),
    ("validation", "reward", 1 / 4),
    ("evaluation", "evaluation", 1 / 4),
)
# Two ways of answering that annotators see side by side (section 3.2.1: "different model variants
# and varying the temperature").
COMPARED_TEMPERATURES = (0.8, 1.1)


def run(recipe: QuickstartRecipe, directory: Path, *, resume: bool = False) -> dict[str, Any]:
    """Do the whole job, or what is left of it; returns the numbers of report.json."""
    # Stages compare the paths in their recipes when they resume: let them not depend on where the
    # command was given.
    directory = directory.resolve()
    job = Run.open(directory, recipe, resume=resume)
    if job.complete:
        return read_report(directory)
    clock = Clock(directory / "phases.json")

    with clock.phase("data", "corpus, dialogues, prompts, answer keys"):
        data = write_data(recipe, directory)
        initialise(recipe, data["documents"], data["dialogues"], directory)
    with clock.phase("pretrain", "a base model from plain text"):
        base = pretrain.run(
            recipes.pretrain(recipe, directory / "init", data["documents"]),
            directory / "pretrain",
            resume=True,
        )
    with clock.phase("sft", "a chat model from demonstrations of mixed quality"):
        chat_model = sft.run(
            recipes.sft(recipe, base, data["dialogues"]), directory / "sft", resume=True
        )
    with clock.phase("annotate", "annotators compare two answers of the chat model"):
        compared = annotate(recipe, chat_model, data, directory)

    reward_models: dict[str, Path] = {}
    for kind in KINDS:
        with clock.phase(f"reward-{kind}", f"the {kind} reward model"):
            training: dict[str, Path] = {k: compared[k, "training"] for k in KINDS}
            reward_models[kind] = reward.run(
                recipes.reward(recipe, kind, chat_model, training, compared[kind, "held_out"]),
                directory / f"reward-{kind}",
                resume=True,
            )

    versions = {"SFT": chat_model}
    for number in (1, 2):
        with clock.phase(f"rlhf-v{number}", f"best of {recipe.samples} answers, fine-tune on them"):
            versions[f"RLHF-V{number}"] = rejection.run(
                recipes.rejection(
                    recipe,
                    number,
                    [*versions.values()][-1],
                    base,
                    reward_models,
                    data["training"],
                ),
                directory / f"rlhf-v{number}",
                resume=True,
            )
    with clock.phase("ppo", "PPO on top of RLHF-V2"):
        versions["RLHF-V2 + PPO"] = ppo.run(
            recipes.ppo(
                recipe,
                versions["RLHF-V2"],
                chat_model,
                reward_models,
                data["training"],
                data["validation"],
            ),
            directory / "ppo",
            resume=True,
        )
    with clock.phase("dpo", "the other branch: online DPO from the chat model"):
        versions["Online DPO"] = dpo.run(
            recipes.dpo(recipe, chat_model, reward_models, data["training"]),
            directory / "dpo",
            resume=True,
        )
    with clock.phase("evaluate", "the judge reads every version's answers"):
        measured = evaluation.measure(
            recipe,
            versions,
            reward_models,
            readers.read(data["evaluation"], "prompt"),
            read_keys(directory / "judge" / "keys.json"),
            directory / "evaluation",
        )
    with clock.phase("report", "figures and tables"):
        numbers = {
            "seconds": clock.total(),
            "peak_memory_bytes": clock.peak_memory_bytes(),
            "seed": recipe.seed,
            "phases": dict(clock.seconds),
            "reward_models": {kind: read_report(directory / f"reward-{kind}") for kind in KINDS},
            **measured.numbers,
        }
        page.write(directory, recipe, numbers, measured)
    job.finish(
        seconds=numbers["seconds"],
        data={
            str(path.relative_to(directory)): hash_path(path)
            for folder in ("data", "comparisons", "judge")
            for path in sorted((directory / folder).iterdir())
        },
    )
    return read_report(directory)


def read_report(directory: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return numbers


def write_data(recipe: QuickstartRecipe, directory: Path) -> dict[str, Path]:
    """All generated records, by what they are for; the keys of all prompts in one file."""
    names = ("documents", "dialogues", *(name for name, *_ in PROMPT_FILES))
    paths = {name: directory / "data" / f"{name}.jsonl" for name in names}
    keys_path = directory / "judge" / "keys.json"
    if keys_path.exists():  # written last
        return paths
    seed = recipe.seed
    readers.write(paths["documents"], corpus.documents(recipe.documents, seed))
    readers.write(paths["dialogues"], corpus.dialogues(recipe.dialogues, seed))
    keys: dict[str, Key] = {}
    for name, split, safety_share in PROMPT_FILES:
        count = getattr(recipe, f"{name}_prompts")
        prompts, their_keys = corpus.prompts(name, count, split, seed, safety_share)
        readers.write(paths[name], prompts)
        keys |= their_keys
    atomic.write(keys_path, json.dumps({i: key.to_json() for i, key in keys.items()}))
    return paths


def read_keys(path: Path) -> dict[str, Key]:
    return {identifier: Key(**key) for identifier, key in json.loads(path.read_text()).items()}


def initialise(recipe: QuickstartRecipe, documents: Path, dialogues: Path, directory: Path) -> None:
    """The tokenizer, and a model with random weights of a scale that suits its width."""
    if (directory / "init" / "config.json").exists():
        return
    texts = [d.text for d in readers.read(documents, "document")[:20_000]]
    # The chat format's tags are ordinary text and should not cost a token a letter.
    for dialogue in readers.read(dialogues, "dialogue")[:2_000]:
        texts += [f"[INST] {m['content']} [/INST]" for m in dialogue.messages]
    tokenizer = Tokenizer.train(texts, recipe.vocab_size, directory / "tokenizer")
    model = Llama(recipe.shape, dtype=torch.float32).initialize(recipe.seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(recipe.initial_std / 0.02)
    native.save(model, tokenizer, directory / "init")


def annotate(
    recipe: QuickstartRecipe, chat_model: Path, data: dict[str, Path], directory: Path
) -> dict[tuple[str, str], Path]:
    """Comparisons by kind ("helpfulness", "safety") and part ("training", "held_out").

    Every prompt is answered once at each temperature; held-out comparisons are of prompts whose
    task instances no training file holds.
    """
    folder = directory / "comparisons"
    paths: dict[tuple[str, str], Path] = {
        (kind, part): folder / f"{kind}-{part}.jsonl"
        for kind in KINDS
        for part in ("training", "held_out")
    }
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(exist_ok=True)
    keys = read_keys(directory / "judge" / "keys.json")
    model, tokenizer = loading.load_llama(chat_model)
    engine = Engine(model, tokenizer)
    for source, part in (("preference", "training"), ("reward_test", "held_out")):
        prompts: list[Prompt] = readers.read(data[source], "prompt")
        answers = [
            engine.generate(
                [prompt.messages for prompt in prompts],
                temperature=temperature,
                max_tokens=recipe.max_tokens,
                seed=phases.derived_seed(recipe.seed, source, str(temperature)),
            )
            for temperature in COMPARED_TEMPERATURES
        ]
        rng = random.Random(f"{recipe.seed}:{source}")
        said: dict[str, list[Comparison]] = {kind: [] for kind in KINDS}
        for prompt, first, second in zip(prompts, *answers, strict=True):
            if first.finish_reason == second.finish_reason == "stop":
                comparison = compare(
                    prompt.messages,
                    keys[prompt.id],
                    first.text,
                    second.text,
                    prompt.kind,
                    rng,
                )
                if comparison is not None:
                    said[prompt.kind].append(comparison)
        for kind in KINDS:
            readers.write(paths[kind, part], said[kind])
    return paths


class Clock:
    """Seconds and peak memory by phase, kept in a file so that a resumed job adds up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.peak: int = kept.get("peak_memory_bytes", 0)
        self._running: tuple[str, float] | None = None

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Announce a phase and add the time it takes, also where it is interrupted."""
        console.begin(name, what)
        begin = time.monotonic()
        self._running = name, begin
        try:
            yield
        finally:
            self._running = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin
            self.peak = self.peak_memory_bytes()
            kept = {"seconds": self.seconds, "peak_memory_bytes": self.peak}
            atomic.write(self.path, json.dumps(kept, indent=2))
        console.end(name, self.seconds[name])

    def total(self) -> float:
        """Seconds of all phases so far, the running one included."""
        running = time.monotonic() - self._running[1] if self._running else 0.0
        return sum(self.seconds.values()) + running

    def peak_memory_bytes(self) -> int:
        """Largest resident size of this process, or of one that it resumes."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self.peak, now if sys.platform == "darwin" else now * 1024)
