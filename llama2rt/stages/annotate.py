"""Collecting preferences (section 3.2.1): a policy answers prompts twice, an annotator compares.

The two answers differ in temperature, or come from two policies ("two different model variants, and
varying the temperature hyper-parameter"). What comes out are comparisons of each kind, helpfulness
and safety, for training, and apart from them, on other prompts, for testing reward models.

    pairs.jsonl                        what the annotator saw
    helpfulness-training.jsonl ...     what was said, by kind and part
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from llama2rt import atomic, report
from llama2rt.annotate import AnnotatorOptions, AnswerPair, Judgement
from llama2rt.data import readers
from llama2rt.data.records import KINDS, Comparison, Prompt
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.generate import Completion, Engine
from llama2rt.generate.remote import Remote
from llama2rt.parallel import by_main, on_main
from llama2rt.planning import Model, Phase, Work
from llama2rt.rollout.sampling import SamplingOptions, complete, derived_seed, shuffled
from llama2rt.run import Recipe, Run
from llama2rt.stages import loading, plans
from llama2rt.stages.loading import Future, Opened
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.stages.annotate")

Part = Literal["training", "held_out"]
PARTS: tuple[Part, ...] = ("training", "held_out")
PAIRS = "pairs.jsonl"


class AnnotateRecipe(Recipe):
    """Let an annotator compare two answers of a policy to each prompt."""

    policy: Path
    """the newest policy, which answers"""
    other: Path | None = None
    """gives the second answer; None for policy too"""
    data: list[Source]
    """prompts whose comparisons reward models are trained on"""
    held_out: list[Source] = Field(default=[])
    """prompts whose comparisons test reward models; none of them should be in data"""
    prompts: int | None = Field(default=None, gt=0)
    """how many of data; None for all"""
    asked: int = Field(default=0, ge=0)
    """how many earlier batches have asked; these come after them, in shuffled epochs"""
    annotator: AnnotatorOptions
    """who compares"""
    temperatures: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 0.7)
    """of the first and the second answer"""
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take; a pair with an answer that is cut is not
    shown"""
    tokenizer: Path | None = None
    """None for the one in policy"""
    seed: int = Field(default=0, ge=0)
    """of sampling, and of an annotator that draws"""


@dataclass(frozen=True)
class AnnotateInputs(Opened):
    """What a run reads besides weights; it leaves no model."""

    tokenizer: Tokenizer
    prompts: dict[Part, list[Prompt]]
    result: None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Comparisons of the kinds that there are prompts of."""
        return tuple(file_name(kind, part) for kind, part in batches(self.prompts))


def batches(prompts: Mapping[Part, Sequence[Prompt]]) -> list[tuple[str, Part]]:
    """(kind, part) of all that is asked."""
    kinds = {part: {prompt.kind for prompt in found} for part, found in prompts.items()}
    return [(kind, part) for kind in KINDS for part in PARTS if kind in kinds[part]]


def file_name(kind: str, part: Part) -> str:
    """Of the comparisons of one kind and part, in the run's directory."""
    return f"{kind}-{part}.jsonl"


def run(recipe: AnnotateRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Sample, ask, write; returns the directory, which holds the comparisons."""
    named = loading.file_inputs(recipe)
    if recipe.annotator.python is None:
        for index in range(len(recipe.annotator.files)):
            del named[f"annotator.files.{index}"]  # which people may still be writing
    run = Run.open(directory, recipe, inputs=named, resume=resume)
    if run.complete:
        return run.directory
    inputs = open_inputs(recipe)
    pairs = shown_pairs(recipe, inputs, run.directory / PAIRS)
    numbers = compare(recipe, batches(inputs.prompts), pairs, run.directory)
    report.finish(run, numbers)
    return run.directory


@by_main
def compare(
    recipe: AnnotateRecipe,
    asked: Sequence[tuple[str, Part]],
    pairs: Sequence[tuple[Part, AnswerPair]],
    directory: Path,
) -> dict[str, Any]:
    """Ask the annotator, and write what is said in the files of the batches `asked`; how much of it
    there is. By rank 0 alone: annotators are asked once."""
    device = loading.default_device()
    annotator = recipe.annotator.annotator(directory / PAIRS, device)
    said: dict[tuple[str, Part], list[Comparison]] = {batch: [] for batch in asked}
    left_out: Counter[str] = Counter()
    for part in PARTS:
        shown = [pair for its_part, pair in pairs if its_part == part]
        judgements = annotator(shown, f"{recipe.seed}:{part}") if shown else []
        if len(judgements) != len(shown):
            raise InputError(f"annotator: gave {len(judgements)} judgements of {len(shown)} pairs")
        for pair, judgement in zip(shown, judgements, strict=True):
            if not isinstance(judgement, Judgement | None):
                raise InputError(f"annotator: expected a Judgement or None, got {judgement!r}")
            if judgement is None:
                left_out["undecided"] += 1
            elif (comparison := judgement.comparison(pair, directory.name)) is None:
                left_out["chosen unsafe, the other safe"] += 1
            else:
                said[pair.prompt.kind, part].append(comparison)
    if empty := [batch for batch, comparisons in said.items() if not comparisons]:
        kind, part = empty[0]
        raise InputError(
            f"{directory / PAIRS}: no comparison of {kind} came of the prompts for {part}: of "
            f"{len(pairs)} pairs in all {sum(left_out.values())} were left out"
        )
    numbers: dict[str, Any] = {"pairs": len(pairs), "left_out": left_out}
    for (kind, part), comparisons in said.items():
        readers.write(directory / file_name(kind, part), comparisons)
        numbers[f"{kind}/{part}"] = len(comparisons)
    return numbers


def open_inputs(recipe: AnnotateRecipe, future: Future | None = None) -> AnnotateInputs:
    """All that the recipe names, read and checked before any weights are loaded."""
    recipe.sampling.check_server("other answers after policy" if recipe.other else None)
    tokenizer, models = loading.outlines(
        recipe.tokenizer, {"policy": recipe.policy, "other": recipe.other}, future
    )
    cache = loading.CacheLimit(recipe.sampling.cache_bytes, torch.float32)
    policy = models.pop("policy")
    sources: dict[Part, list[Source]] = {"training": recipe.data, "held_out": recipe.held_out}
    prompts = {
        part: loading.read_prompts(
            paths, tokenizer, policy, recipe.sampling.max_tokens, models, cache
        )
        if paths
        else []
        for part, paths in sources.items()
    }
    longest = max(
        loading.longest_sample(found, tokenizer, policy, recipe.sampling.max_tokens)
        for found in prompts.values()
    )
    known = future or Future()
    recipe.annotator.check(known.models, known.files, longest)
    if recipe.prompts is not None:
        count = min(recipe.prompts, len(prompts["training"]))
        # Not by the recipe's seed, which differs between the batches of a plan.
        drawn = shuffled(prompts["training"], count, 0, after=recipe.asked)
        # One that ends an epoch and begins the next is shown once.
        prompts["training"] = list({prompt.id: prompt for prompt in drawn}.values())
    return AnnotateInputs(tokenizer, prompts)


def plan(recipe: AnnotateRecipe, inputs: AnnotateInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`: the policies answer one after the other, in fp32; what the annotator holds
    is not counted."""
    names = ("policy", "other") if recipe.other else ("policy",)
    lengths = None
    if inputs is not None:
        found = [prompt for part in PARTS for prompt in inputs.prompts[part]]
        lengths = plans.prompt_lengths(found, inputs.tokenizer)
    phases = []
    for name in names:
        folder = recipe.policy if name == "policy" else recipe.other
        assert folder is not None
        answers = None if lengths is None else len(lengths) * 2 / len(names)
        model = Model(name, shape(folder))
        sampling = plans.sampling_of(model, recipe.sampling, lengths, answers, [])
        phases.append(Phase(f"sampling {name}", sampling=sampling))
    return Work(phases)


def shown_pairs(
    recipe: AnnotateRecipe, inputs: AnnotateInputs, path: Path
) -> list[tuple[Part, AnswerPair]]:
    """The pairs to compare, out of the file at `path` where it is there, else sampled by all ranks
    and written to it."""
    if not on_main(path.exists):
        sampled = sample(recipe, inputs)
        rows = [
            {"part": part, **pair.to_json()} for part, found in sampled.items() for pair in found
        ]
        if not rows:
            raise InputError(
                f"{path.parent}: no prompt has two different finished answers to compare; raise "
                "sampling.max_tokens"
            )
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        on_main(lambda: atomic.write(path, "".join(f"{line}\n" for line in lines)))
    found = []
    # Not splitlines(): an answer may hold any of Unicode's other line ends.
    for line in on_main(lambda: path.read_text(encoding="utf-8")).split("\n")[:-1]:
        row = json.loads(line)
        prompt = Prompt(row["prompt_id"], row["messages"], row["kind"])
        found.append((row["part"], AnswerPair(row["id"], prompt, row["first"], row["second"])))
    return found


def sample(recipe: AnnotateRecipe, inputs: AnnotateInputs) -> dict[Part, list[AnswerPair]]:
    """Two different finished answers to each prompt that gets them. A policy and its cache are gone
    before the next one is loaded."""
    answers: dict[Part, list[list[Completion]]] = {part: [] for part in inputs.prompts}
    policies = (recipe.policy, recipe.other or recipe.policy)
    engine: Engine | Remote | None = None
    for index, (temperature, folder) in enumerate(zip(recipe.temperatures, policies, strict=True)):
        if engine is None or folder != policies[index - 1]:
            del engine
            model, _ = loading.load_llama(folder, recipe.tokenizer)
            engine = recipe.sampling.engine(model, inputs.tokenizer)
            del model
        for part, prompts in inputs.prompts.items():
            completions = complete(
                engine,
                prompts,
                temperature=temperature,
                max_tokens=recipe.sampling.max_tokens,
                seed=derived_seed(recipe.seed, part, index),
            )
            answers[part].append(completions)
    return {part: pairs(part, inputs.prompts[part], *answers[part]) for part in answers}


def pairs(
    part: Part,
    prompts: Sequence[Prompt],
    first: Sequence[Completion],
    second: Sequence[Completion],
) -> list[AnswerPair]:
    """The first and the second answer to each of `prompts`, where both are finished and different
    and a record can hold them."""
    found = []
    for prompt, *sides in zip(prompts, first, second, strict=True):
        texts = [side.text.strip() for side in sides]
        finished = all(side.finish_reason == "stop" for side in sides)
        # A record holds no null character, which a model of byte pieces may sample.
        if finished and all(texts) and texts[0] != texts[1] and "\0" not in "".join(texts):
            digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
            found.append(AnswerPair(f"{part}:{prompt.id}:{digest}", prompt, *texts))
    if len(found) < len(prompts):
        logger.info(
            "%s: %d of %d prompts have no two different finished answers",
            part,
            len(prompts) - len(found),
            len(prompts),
        )
    return found
