"""Rejection sampling fine-tuning (section 3.2.3): the best of K answers becomes the next target.

Phases, each resumable: tune the temperature where asked, sample K answers a prompt from the most
recent policy, score them, keep the best one of each prompt, pooled with the best of earlier
versions where asked, fine-tune on it as it was sampled, measure on held-out prompts. Left out:
smaller models on the same samples, which is the stage `distill`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from llama2rt import report
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.mixture import Account
from llama2rt.data.packing import Example
from llama2rt.data.readers import read
from llama2rt.errors import InputError
from llama2rt.parallel import Mesh, on_main
from llama2rt.planning import Count, Model, Phase, Work
from llama2rt.rollout import sampling
from llama2rt.rollout.responses import Response, response_example, write_responses
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.run import Run
from llama2rt.stages import adapters, loading, mixing, plans, selection, sft, spread, tuning
from llama2rt.stages.inputs import (
    RolloutInputs,
    RolloutRecipe,
    held_out_prompts,
    outlines,
    require_pairwise,
    training_prompts,
    warn_of_shared,
)
from llama2rt.stages.loading import Future, Outline
from llama2rt.stages.pretrain import next_token
from llama2rt.stages.selection import BEST
from llama2rt.stages.tuning import TuneOptions
from llama2rt.train.loop import fit
from llama2rt.train.options import TrainOptions


class RejectionRecipe(RolloutRecipe):
    """Fine-tune on the best of K samples of each prompt."""

    policy: Path
    """the most recent model: it samples"""
    init: Path
    """the model that is fine-tuned: the base model for every version, as in the paper, or the last
    version, which keeps what no prompt asks for any more"""
    dialogues: list[Path] = Field(default=[])
    """dialogues to train on besides, such as the SFT set"""
    earlier: list[Path] = Field(default=[])
    """run directories of earlier versions whose best samples are pooled (the paper: from V4 on,
    which recovered skills such as rhyming)"""

    samples: int = Field(default=10, gt=0)
    """K; the paper plots 1-100 and names none"""
    temperature: float = Field(default=1.0, gt=0)
    """of the K samples; 1.2-1.3 was best for RLHF models at 10-100 samples"""
    tune: TuneOptions = TuneOptions()
    """to measure the temperature instead"""
    sampling: SamplingOptions = SamplingOptions()
    """length of responses, and what sampling may take; a response that is cut never becomes a
    target"""
    batch_size: int = Field(default=64, gt=0)
    """dialogues an optimizer step (section 3.1)"""
    epochs: int = Field(default=2, gt=0)
    """through the best samples (section 3.1)"""
    # As in SFT, section 3.1: cosine, lr 2e-5, weight decay 0.1.
    train: TrainOptions = TrainOptions(lr=2e-5)

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _tunable(self) -> Self:
        tuning.check(self.tune, self.samples, self.temperature, self.rewards)
        return self

    @property
    def samples_trained(self) -> bool:
        return bool(self.validation)


@dataclass(frozen=True)
class RejectionInputs(RolloutInputs):
    """What this stage reads besides."""

    earlier: list[Response]
    dialogues: list[Example]

    @property
    def files(self) -> tuple[str, ...]:
        return (f"samples/{BEST}",)


def run(recipe: RejectionRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Sample, select, fine-tune, measure; returns the model folder."""
    files = loading.file_inputs(recipe)
    for index, folder in enumerate(recipe.earlier):
        files[f"earlier.{index}"] = folder / "samples" / BEST
    run = Run.open(directory, recipe, inputs=files, parents=recipe.earlier, resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    mesh = Mesh.build(recipe.parallel, inputs.result.config)

    # Sample, score and select.
    sampled, tuned = sample(recipe, inputs, run.samples_directory)
    best = own = selection.select(sampled, inputs.tokenizer)
    if inputs.earlier:
        best = selection.pooled(inputs.reward_models, own, inputs.earlier)
    if not best:
        cut = sum(not response.finished for responses in sampled for response in responses)
        raise InputError(
            f"no response to train on: {cut} of {sum(map(len, sampled))} were cut (raise "
            "sampling.max_tokens), the others are empty or hold a tag of the chat format"
        )
    on_main(lambda: write_responses(run.samples_directory / BEST, best))

    # Fine-tune: the selected response is the only target, the answers before it are context.
    model = spread.from_folder(inputs.to_fine_tune, recipe.init, mesh, recipe.train)
    examples = [response_example(response) for response in best] + inputs.dialogues
    loader = ExampleLoader(
        examples, recipe.batch_size, recipe.train.micro_tokens, recipe.seed, share=mesh.share
    )
    steps = recipe.epochs * loader.steps_per_epoch
    fit(run, model, loader, next_token, recipe.train, steps=steps, mesh=mesh)
    adapters.save(model, inputs.tokenizer, run, recipe.init)

    # Measure.
    numbers: dict[str, Any] = {"prompts": len(sampled), "targets": len(best)}
    numbers |= selection.describe(sampled, own, best if inputs.earlier else None)
    if tuned is not None:
        numbers["tuning"] = tuned
    if inputs.held_out:
        numbers |= inputs.measure_held_out(model, run)
    report.finish(run, numbers)
    return run.model_directory


def open_inputs(recipe: RejectionRecipe, future: Future | None = None) -> RejectionInputs:
    """All that the recipe names, read and checked before any weights are loaded. The fine-tuned
    model, which answers the held-out prompts, is as `init` is. InputError as from `loading`, and
    for an earlier version that is not there or has other tokens."""
    recipe.check_server()
    tokenizer, models = outlines(recipe, future, policy=recipe.policy)
    policy, init = models.pop("policy"), models.pop("init")
    spread.check(recipe.parallel, init.config, recipe.train, recipe.lora)
    reference = models.pop("reference", init)
    readers = {"init": init, **models}
    account = Account()
    prompts = training_prompts(recipe, tokenizer, policy, readers, account)
    measuring = {"reference": reference, **models}
    held_out = held_out_prompts(recipe, tokenizer, init, measuring)
    warn_of_shared(prompts, held_out, future)
    require_pairwise(recipe, prompts, future)
    earlier: list[Response] = []
    for folder in recipe.earlier:
        if future is not None and (left := future.models.get(folder / "model")):
            selection.require_room(
                f"earlier: {folder.name} may leave samples whose", left.longest_sample, readers
            )
        else:
            earlier += selection.read_earlier(folder, tokenizer, readers)
    dialogues = []
    if known := loading.readable(recipe.dialogues, future):
        records = read(known, "dialogue")
        dialogues = sft.encode(records, tokenizer, init.config.context)
    longest = loading.longest_sample(prompts, tokenizer, policy, recipe.sampling.max_tokens)
    result = Outline(init.config, tokenizer, longest_sample=longest)
    return RejectionInputs(
        recipe, tokenizer, prompts, held_out, result, earlier, dialogues, account=account
    )


def plan(recipe: RejectionRecipe, inputs: RejectionInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`: one answer a prompt is kept, as if every prompt had a usable one."""
    policy = Model("policy", shape(recipe.policy))
    init = Model("model", shape(recipe.init), lora=recipe.lora)
    ranking = plans.reward_models(recipe, shape)
    lengths = None if inputs is None else plans.prompt_lengths(inputs.prompts, inputs.tokenizer)
    answers = None if lengths is None else recipe.samples * len(lengths)
    sampling = plans.sampling_of(policy, recipe.sampling, lengths, answers, ranking)
    steps, count = None, recipe.batch_size
    if inputs is not None:
        examples = len(inputs.prompts) + len(inputs.earlier) + len(inputs.dialogues)
        count = min(count, examples)
        steps = Count(
            recipe.epochs * -(-examples // recipe.batch_size), "at most: one target a prompt"
        )
    phases = [
        *tuning.phases(recipe.tune, recipe.samples, ranking, sampling, lengths),
        Phase("sampling", frozen=ranking, sampling=sampling),
        # The reward models stay for the held-out prompts.
        Phase("training", [init], ranking, training=True),
    ]
    if recipe.validation:
        # AdamW's moments count here too, though they are gone by then.
        held_out = (
            None if inputs is None else plans.prompt_lengths(inputs.held_out, inputs.tokenizer)
        )
        readers = [*ranking, plans.reference(recipe, shape)]
        answers = None if held_out is None else len(held_out)
        lent = replace(init, lent=True)
        measuring = plans.sampling_of(lent, recipe.sampling, held_out, answers, [*readers, lent])
        phases.append(Phase("measuring", [init], readers, measuring))
    return Work(
        phases,
        recipe.train,
        recipe.parallel,
        plans.answers_batch(sampling, count),
        steps,
        recipe.epochs,
        notes=[*mixing.notes(recipe, inputs), *plans.comparing(recipe, recipe.samples)],
    )


def sample(
    recipe: RejectionRecipe, inputs: RejectionInputs, folder: Path
) -> tuple[list[list[Response]], dict[str, Any] | None]:
    """K scored responses of each prompt, at the tuned temperature where the recipe has one tuned,
    and how that came out. The policy and its cache are gone when this returns."""
    policy = inputs.policy(recipe.policy)
    tuned, temperature = None, recipe.temperature
    if recipe.tune.temperatures:
        tuned = tuning.tune(
            recipe.tune, folder / "tuning", policy, inputs.prompts, recipe.samples, recipe.seed
        )
        temperature = tuned["temperature"]
    sampled = sampling.sample(
        folder,
        policy,
        inputs.prompts,
        n=recipe.samples,
        temperatures=[temperature],
        seed=recipe.seed,
    )
    return sampled, tuned
