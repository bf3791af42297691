"""Safety context distillation (section 4.2.4): a model learns to answer adversarial prompts as it
does with a safety pre-prompt before them.

Phases, each resumable: the policy answers each prompt with a pre-prompt before it, and without; the
safety reward model scores both as answers to the prompt without it, and where the first is no safer
nothing is learned (the paper's rejection of errors); what is kept trains the model to give it
without the pre-prompt, mixed with other dialogues so that it stays helpful. Adversarial prompts
alone: on others the paper saw false refusals. Left out: prompts of one's own making, which are the
red team's work.
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from llama2rt import atomic, report
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.mixture import Account, draw
from llama2rt.data.packing import Example
from llama2rt.data.readers import read
from llama2rt.data.records import Prompt
from llama2rt.errors import InputError
from llama2rt.evaluate import distillation
from llama2rt.evaluate.distillation import Outcome
from llama2rt.parallel import Mesh, on_main
from llama2rt.planning import Count, Model, Phase, Work
from llama2rt.rollout import preprompts, sampling
from llama2rt.rollout.preprompts import Preprompt, PrepromptOptions
from llama2rt.rollout.responses import Response, response_example
from llama2rt.rollout.reward import SafetyOptions
from llama2rt.rollout.sampling import Sampler, SamplingOptions, derived_seed
from llama2rt.run import Run
from llama2rt.stages import adapters, loading, mixing, plans, sft, spread
from llama2rt.stages.inputs import (
    RolloutInputs,
    RolloutRecipe,
    held_out_prompts,
    outlines,
    training_prompts,
    warn_of_shared,
)
from llama2rt.stages.loading import Future, Outline
from llama2rt.stages.pretrain import next_token
from llama2rt.stages.selection import usable
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import fit
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.context_distillation")

PAIRS = "pairs.jsonl"


class ContextDistillationRecipe(RolloutRecipe):
    """Fine-tune on the answers that a safety pre-prompt makes safer, without the pre-prompt."""

    policy: Path | None = None
    """the model that answers; None for init"""
    rewards: SafetyOptions
    """the safety reward model, which decides what is kept; with helpfulness, its scores of the same
    answers are kept too"""
    preprompts: PrepromptOptions = PrepromptOptions()
    """what is put before the prompts, by templates"""
    mixed_in: list[Path] = Field(default=[])
    """dialogues to train on besides, such as helpful ones of the SFT set"""
    mixed_in_share: float | None = Field(default=None, gt=0, lt=1)
    """so many of them are drawn as make up this share of the training set, as far as they go; None
    for all. The paper gives none"""

    samples: int = Field(default=1, gt=0)
    """answers with a pre-prompt a prompt, each with one of its own; the safest is compared (the
    paper: 1)"""
    temperature: float = Field(default=1.0, gt=0)
    sampling: SamplingOptions = SamplingOptions()
    """length of answers, and what sampling may take; one that is cut is never learned"""
    batch_size: int = Field(default=64, gt=0)
    """dialogues an optimizer step (section 3.1)"""
    epochs: int = Field(default=2, gt=0)
    """through what was kept (section 3.1)"""
    # As in SFT, section 3.1: cosine, lr 2e-5, weight decay 0.1.
    train: TrainOptions = TrainOptions(lr=2e-5)

    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.mixed_in_share is not None and not self.mixed_in:
            raise ValueError("mixed_in_share: only with mixed_in")
        return self

    @property
    def samples_trained(self) -> bool:
        return bool(self.validation)

    @property
    def answering(self) -> Path:
        """The folder of the model that answers."""
        return self.policy or self.init


@dataclass(frozen=True)
class DistillationInputs(RolloutInputs):
    """What this stage reads besides."""

    preprompts: list[list[Preprompt]]
    """of each prompt, as many as it gets answers"""
    dialogues: list[Example]


@dataclass(frozen=True)
class PrepromptedSampler(Sampler):
    """Answers given with a pre-prompt, scored and kept as answers to the prompt without it."""

    preprompts: Mapping[str, Sequence[Preprompt]]
    """by prompt id, one for each of its answers"""
    position: str

    def responses(
        self, prompts: Sequence[Prompt], *, n: int = 1, temperature: float, seed: int
    ) -> list[Response]:
        asked = [
            preprompts.put_before(prompt, self.preprompts[prompt.id][k].text, self.position)
            for prompt in prompts
            for k in range(n)
        ]
        completions = [
            replace(
                completion,
                prompt_index=(index := completion.prompt_index // n),
                prompt_tokens=chat.encode_prompt(self.engine.tokenizer, prompts[index].messages),
            )
            for completion in self.complete(asked, temperature=temperature, seed=seed)
        ]
        return self.score(completions, prompts, temperature=temperature, seed=seed)


def run(recipe: ContextDistillationRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Answer twice, keep what is safer, fine-tune, measure; returns the model folder."""
    run = Run.open(directory, recipe, inputs=loading.file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    mesh = Mesh.build(recipe.parallel, inputs.result.config)

    # Answer, compare.
    outcomes = compare(inputs, *answers(recipe, inputs, run.samples_directory))
    on_main(lambda: write_pairs(run.samples_directory / PAIRS, outcomes))
    kept = [outcome.answer for outcome in outcomes if outcome.kept and outcome.answer is not None]
    if not kept:
        raise InputError(
            f"no answer to train on: with a pre-prompt none of {len(outcomes)} answers is finished "
            "and scored as safer than without (samples/pairs.jsonl has both)"
        )

    # Fine-tune, on the prompt as users write it.
    examples = [response_example(response) for response in kept]
    besides = mixed_in(recipe, inputs.dialogues, len(examples))
    model = spread.from_folder(inputs.to_fine_tune, recipe.init, mesh, recipe.train)
    loader = ExampleLoader(
        examples + besides,
        recipe.batch_size,
        recipe.train.micro_tokens,
        recipe.seed,
        share=mesh.share,
    )
    steps = recipe.epochs * loader.steps_per_epoch
    fit(run, model, loader, next_token, recipe.train, steps=steps, mesh=mesh)
    adapters.save(model, inputs.tokenizer, run, recipe.init)

    # Measure.
    numbers = {"targets": len(kept), "mixed_in": len(besides), **distillation.summary(outcomes)}
    if inputs.held_out:
        numbers |= inputs.measure_held_out(model, run)
    report.finish(run, numbers)
    return run.model_directory


def open_inputs(
    recipe: ContextDistillationRecipe, future: Future | None = None
) -> DistillationInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError as from
    `loading`, for a prompt that is not adversarial, and for templates that are none."""
    recipe.check_server()
    options = recipe.preprompts.read()
    tokenizer, models = outlines(recipe, future, policy=recipe.answering)
    policy, init = models.pop("policy"), models.pop("init")
    spread.check(recipe.parallel, init.config, recipe.train, recipe.lora)
    reference = models.pop("reference", init)
    readers = {"init": init, **models}
    account = Account()
    with_room = leaving(policy, longest_preprompt(options, tokenizer))
    prompts = training_prompts(recipe, tokenizer, with_room, readers, account)
    for prompt in prompts:
        if prompt.kind != "safety":
            raise InputError(
                f"data: prompt {prompt.id!r} is of kind {prompt.kind}, where a pre-prompt leads "
                'to false refusals (section 4.2.4): give adversarial prompts, {path = "...", kind '
                '= "safety"} where the file does not say so'
            )
    warn_of_categories(options, prompts)
    held_out = held_out_prompts(recipe, tokenizer, init, {"reference": reference, **models})
    warn_of_shared(prompts, held_out, future)
    dialogues = []
    if known := loading.readable(recipe.mixed_in, future):
        dialogues = sft.encode(read(known, "dialogue"), tokenizer, init.config.context)
    drawn = preprompts.draw(options, prompts, recipe.samples, recipe.seed)
    return DistillationInputs(
        recipe,
        tokenizer,
        prompts,
        held_out,
        Outline(init.config, tokenizer),
        drawn,
        dialogues,
        account=account,
    )


def plan(
    recipe: ContextDistillationRecipe, inputs: DistillationInputs | None, shape: plans.Shape
) -> Work:
    """For `--dry-run`: as if every answer with a pre-prompt were the safer one."""
    policy = Model("policy", shape(recipe.answering))
    init = Model("model", shape(recipe.init), lora=recipe.lora)
    ranking = plans.reward_models(recipe, shape)
    lengths = None if inputs is None else plans.prompt_lengths(inputs.prompts, inputs.tokenizer)
    answers = None if lengths is None else (1 + recipe.samples) * len(lengths)
    sampling = plans.sampling_of(policy, recipe.sampling, lengths, answers, ranking)
    steps, count = None, recipe.batch_size
    if inputs is not None:
        targets = len(inputs.prompts)
        examples = targets + wanted(recipe, len(inputs.dialogues), targets)
        count = min(count, examples)
        steps = Count(
            recipe.epochs * -(-examples // recipe.batch_size), "at most: one target a prompt"
        )
    phases = [
        Phase("sampling", frozen=ranking, sampling=sampling),
        # The reward models stay for the held-out prompts.
        Phase("training", [init], ranking, training=True),
    ]
    return Work(
        phases,
        recipe.train,
        recipe.parallel,
        plans.answers_batch(sampling, count),
        steps,
        recipe.epochs,
        notes=[*mixing.notes(recipe, inputs)],
    )


def longest_preprompt(options: PrepromptOptions, tokenizer: Tokenizer) -> int:
    """Tokens that a pre-prompt adds to a prompt, at most."""
    plain = Prompt("", [{"role": "user", "content": "?"}])
    texts = [
        f"{template.format(adjective=adjective)} {answer}"
        for template, adjective, answer in itertools.product(
            options.templates, options.adjectives, ["", *options.answers.values()]
        )
    ]
    asked = (preprompts.put_before(plain, text, options.position) for text in texts)
    longest = max(len(chat.encode_prompt(tokenizer, prompt.messages)) for prompt in asked)
    # Where it meets other words than these, they may be cut into a token or two more.
    return longest - len(chat.encode_prompt(tokenizer, plain.messages)) + 2


def leaving(policy: Outline, tokens: int) -> Outline:
    """The policy with so much less context. InputError where that leaves none."""
    context = policy.config.context - tokens
    if context < 2:
        raise InputError(
            f"preprompts: the longest has {tokens} tokens, which leaves nothing of the policy's "
            f"context of {policy.config.context}"
        )
    return replace(policy, config=replace(policy.config, context=context))


def warn_of_categories(options: PrepromptOptions, prompts: Sequence[Prompt]) -> None:
    """Say which risk categories have no answer template, and which template no prompt."""
    if not options.answers:
        return
    found = {prompt.risk_category for prompt in prompts}
    if without := sorted(found - options.answers.keys()):
        names = ", ".join(name or "none" for name in without)
        logger.warning("preprompts.answers: no template for the risk categories %s", names)
    if unused := sorted(options.answers.keys() - found):
        logger.warning("preprompts.answers: no prompt of %s", ", ".join(unused))


def answers(
    recipe: ContextDistillationRecipe, inputs: DistillationInputs, folder: Path
) -> tuple[list[list[Response]], list[list[Response]]]:
    """(answers without a pre-prompt, answers with one) to each prompt, both scored as answers to
    the prompt without it. The policy and its cache are gone when this returns."""
    sampler = inputs.policy(recipe.answering)
    preprompted = PrepromptedSampler(
        **{name: getattr(sampler, name) for name in Sampler.__dataclass_fields__},
        preprompts={
            prompt.id: own for prompt, own in zip(inputs.prompts, inputs.preprompts, strict=True)
        },
        position=recipe.preprompts.position,
    )
    ways = ("without", sampler, 1), ("with", preprompted, recipe.samples)
    original, distilled = (
        sampling.sample(
            folder / name,
            answering,
            inputs.prompts,
            n=n,
            temperatures=[recipe.temperature],
            seed=derived_seed(recipe.seed, name),
        )
        for name, answering, n in ways
    )
    return original, distilled


def compare(
    inputs: DistillationInputs,
    original: Sequence[Sequence[Response]],
    distilled: Sequence[Sequence[Response]],
) -> list[Outcome]:
    """Of each prompt the safest finished answer with a pre-prompt, beside the one without; kept
    where the safety reward model scores it higher."""
    outcomes = []
    grouped = zip(original, distilled, inputs.preprompts, strict=True)
    for (without,), group, own in grouped:
        able = [k for k, response in enumerate(group) if usable(response, inputs.tokenizer)]
        # Of equals the first. All prompts are of kind safety: their reward is the safety model's.
        best = max(able, key=lambda k: group[k].reward, default=None)
        answer = None if best is None else group[best]
        outcomes.append(Outcome(without, answer, own[best or 0].text, own[best or 0].tailored))
    return outcomes


def write_pairs(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Both answers to every prompt and what became of them, a JSON object a line."""
    lines = (json.dumps(outcome.to_json(), ensure_ascii=False) for outcome in outcomes)
    atomic.write(path, "".join(f"{line}\n" for line in lines))


def wanted(recipe: ContextDistillationRecipe, held: int, targets: int) -> int:
    """How many of the dialogues that are `held` go in beside so many targets."""
    share = recipe.mixed_in_share
    return held if share is None else min(held, round(targets * share / (1 - share)))


def mixed_in(
    recipe: ContextDistillationRecipe, dialogues: Sequence[Example], targets: int
) -> list[Example]:
    """The dialogues to train on beside so many targets, drawn from the seed."""
    count = wanted(recipe, len(dialogues), targets)
    share = count / (count + targets)
    if recipe.mixed_in_share is not None and share < recipe.mixed_in_share - 0.01:
        logger.warning(
            "mixed_in: holds %d dialogues, which make up %.1f %% of the training set in place of "
            "%.1f %%",
            count,
            100 * share,
            100 * recipe.mixed_in_share,
        )
    return [dialogues[i] for i in draw(len(dialogues), count, recipe.seed, 0)]
