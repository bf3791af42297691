"""What the main job starts from: records, answer keys, a tokenizer and random weights.

data/                 records by split: what models may see
judge/keys.json       right answers by prompt id: what they may not
tokenizer/, init/     before any training
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from llama2rt import atomic
from llama2rt.checkpoint import native
from llama2rt.data import readers
from llama2rt.model import Llama, LlamaConfig
from llama2rt.quickstart import corpus
from llama2rt.quickstart.judge import Key
from llama2rt.quickstart.recipe import CONTEXT, QuickstartRecipe
from llama2rt.text.tokenizer import Tokenizer

# Name, the split its task instances are of, the share that asks for the secret, and whether each
# batch of comparisons gets a part of its own.
PROMPT_FILES = (
    ("preference", "train", 1 / 4, True),
    ("reward_test", "reward", 1 / 3, True),
    ("training", "train", 1 / 4, False),
    ("validation", "reward", 1 / 4, False),
    ("evaluation", "evaluation", 1 / 4, False),
)


def write(recipe: QuickstartRecipe, directory: Path) -> dict[str, Path]:
    """All generated records, by what they are for; the keys of all prompts in one file."""
    files = prompt_files(recipe)
    names = ("documents", "dialogues", *(part for parts in files.values() for part in parts))
    paths = {name: directory / "data" / f"{name}.jsonl" for name in names}
    keys = keys_path(directory)
    if keys.exists():  # written last
        return paths
    seed = recipe.seed
    readers.write(paths["documents"], corpus.documents(recipe.documents, seed))
    readers.write(paths["dialogues"], corpus.dialogues(recipe.dialogues, seed))
    found: dict[str, Key] = {}
    for name, split, safety_share, _ in PROMPT_FILES:
        count = getattr(recipe, f"{name}_prompts")
        prompts, their_keys = corpus.prompts(name, count, split, seed, safety_share)
        parts = files[name]
        ends = [round(len(prompts) * i / len(parts)) for i in range(len(parts) + 1)]
        for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
            readers.write(paths[part], prompts[begin:end])
        found |= their_keys
    atomic.write(keys, json.dumps({i: key.to_json() for i, key in found.items()}))
    return paths


def prompt_files(recipe: QuickstartRecipe) -> dict[str, list[str]]:
    """Names of the files of prompts, by what their prompts are drawn for."""
    batches = range(1, recipe.batches + 1)
    return {
        name: [f"{name}-{batch}" for batch in batches] if divided else [name]
        for name, _, _, divided in PROMPT_FILES
    }


def keys_path(directory: Path) -> Path:
    """Where the judge's keys are."""
    return directory / "judge" / "keys.json"


def read_keys(path: Path) -> dict[str, Key]:
    """The judge's keys by prompt id."""
    return {identifier: Key(**key) for identifier, key in json.loads(path.read_text()).items()}


def initialise(
    recipe: QuickstartRecipe,
    documents: Path,
    dialogues: Path,
    directory: Path,
    context: int = CONTEXT,
) -> None:
    """The tokenizer, and a model with random weights of a scale that suits its width."""
    if (directory / "init" / "config.json").exists():
        return
    texts = [d.text for d in readers.read(documents, "document")[:20_000]]
    # The chat format's tags are ordinary text and should not cost a token a letter.
    for dialogue in readers.read(dialogues, "dialogue")[:2_000]:
        texts += [f"[INST] {m['content']} [/INST]" for m in dialogue.messages]
    tokenizer = Tokenizer.train(texts, recipe.vocab_size, directory / "tokenizer")
    shape = replace(recipe.shape, context=context)
    native.save(random(shape, recipe.initial_std, recipe.seed), tokenizer, directory / "init")


def random(shape: LlamaConfig, std: float, seed: int) -> Llama:
    """A model with random weights of this standard deviation, fp32."""
    model = Llama(shape, dtype=torch.float32).initialize(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(std / 0.02)
    return model
