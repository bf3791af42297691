"""Rejection sampling fine-tuning (section 3.2.3): the best of K answers becomes the next target.

Phases, each resumable: sample K answers a prompt from the most recent policy, score them, keep the
best one of each prompt, pooled with the best of earlier versions where asked, fine-tune on it as it
was sampled, measure on held-out prompts. Left out: sampling by a larger model than the one that is
tuned, which is this stage with another `policy`.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from llama2rt import report
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.mixture import Account
from llama2rt.data.packing import Example
from llama2rt.data.readers import read
from llama2rt.errors import InputError, naming
from llama2rt.model import Llama
from llama2rt.parallel import Mesh, on_main
from llama2rt.planning import Count, Model, Phase, Work
from llama2rt.rollout import balance, sampling
from llama2rt.rollout.responses import (
    Response,
    read_responses,
    response_example,
    write_responses,
)
from llama2rt.rollout.reward import RewardModels
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.run import Run
from llama2rt.stages import adapters, loading, mixing, plans, sft, spread
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
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import fit
from llama2rt.train.options import TrainOptions

logger = logging.getLogger("llama2rt.stages.rejection")

BEST = "best.jsonl"


class RejectionRecipe(RolloutRecipe):
    """Fine-tune on the best of K samples of each prompt."""

    policy: Path
    """the most recent model: it samples"""
    init: Path
    """the model that is fine-tuned ("each version starts from the base model")"""
    dialogues: list[Path] = Field(default=[])
    """dialogues to train on besides, such as the SFT set"""
    earlier: list[Path] = Field(default=[])
    """run directories of earlier versions whose best samples are pooled (the paper: from V4 on,
    which recovered skills such as rhyming)"""

    samples: int = Field(default=10, gt=0)
    """K; the paper plots 1-100 and names none"""
    temperature: float = Field(default=1.0, gt=0)
    """to be tuned again for each version: 1.2-1.3 was best for RLHF models at 10-100 samples"""
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

    @property
    def samples_trained(self) -> bool:
        return bool(self.validation)


@dataclass(frozen=True)
class RejectionInputs(RolloutInputs):
    """What this stage reads besides."""

    earlier: list[Response]
    dialogues: list[Example]


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
    sampled = sample(recipe, inputs, run.samples_directory)
    best = select(sampled, inputs.tokenizer)
    if inputs.earlier:
        best = pooled(inputs.reward_models, best, inputs.earlier)
    if not best:
        cut = sum(not response.finished for responses in sampled for response in responses)
        raise InputError(
            f"no response to train on: {cut} of {sum(map(len, sampled))} were cut (raise "
            "sampling.max_tokens), the others are empty or hold a tag of the chat format"
        )
    on_main(lambda: write_responses(run.samples_directory / BEST, best))

    # Fine-tune: the selected response is the only target, the answers before it are context.
    model = spread.from_folder(
        functools.partial(initial_model, recipe, inputs), recipe.init, mesh, recipe.train
    )
    examples = [response_example(response) for response in best] + inputs.dialogues
    loader = ExampleLoader(
        examples, recipe.batch_size, recipe.train.micro_tokens, recipe.seed, share=mesh.share
    )
    steps = recipe.epochs * loader.steps_per_epoch
    fit(run, model, loader, next_token, recipe.train, steps=steps, mesh=mesh)
    adapters.save(model, inputs.tokenizer, run, recipe.init)

    # Measure.
    numbers = {"prompts": len(sampled), "targets": len(best), **gain(sampled)}
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
            require_room(
                f"earlier: {folder.name} may leave samples whose", left.longest_sample, readers
            )
        else:
            earlier += read_earlier(folder, tokenizer, readers)
    dialogues = []
    if recipe.dialogues:
        records = read(recipe.dialogues, "dialogue")
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


def initial_model(
    recipe: RejectionRecipe, inputs: RejectionInputs, device: torch.device | str
) -> Llama:
    """The model to fine-tune, on `device`. Its tokenizer is the policy's: init may hold none."""
    if recipe.lora.rank is None:
        return loading.load_companion(recipe.init, inputs.tokenizer, device=device)
    return inputs.to_train(recipe.init, device)


def read_earlier(
    folder: Path, tokenizer: Tokenizer, readers: Mapping[str, Outline]
) -> list[Response]:
    """The best samples of the earlier version in run directory `folder`. InputError naming the line
    that does not fit: its prompt's tokens must be those of `tokenizer`, and all `readers` must have
    room for it."""
    if not (folder / "manifest.json").is_file():
        raise InputError(f"earlier: {folder}: no run directory (it holds no manifest.json)")
    path = folder / "samples" / BEST
    embeddings = min(model.config.vocab_size for model in readers.values())
    responses = read_responses(path)
    for number, response in enumerate(responses, start=1):
        with naming(f"{path}:{number}: messages"):
            expected = chat.encode_prompt(tokenizer, response.prompt.messages)
        # Not the tokenizer's pieces: a model may have sampled an id that pads its vocabulary.
        if response.prompt_tokens != expected or max(response.tokens) >= embeddings:
            raise InputError(
                f"{path}:{number}: sampled with another tokenizer or chat format than the policy's"
            )
        length = len(response.prompt_tokens) + len(response.tokens)
        require_room(f"{path}:{number}:", length, readers)
    kept = [response for response in responses if usable(response, tokenizer)]
    if len(kept) < len(responses):
        logger.warning("%s: %d unusable samples left out", path, len(responses) - len(kept))
    return kept


def require_room(what: str, tokens: int, readers: Mapping[str, Outline]) -> None:
    """InputError beginning with `what` where one of the readers has no room for so many tokens."""
    for name, model in readers.items():
        if tokens > model.config.context:
            raise InputError(
                f"{what} {tokens} tokens exceed the context of {name}, {model.config.context}"
            )


def sample(recipe: RejectionRecipe, inputs: RejectionInputs, folder: Path) -> list[list[Response]]:
    """K scored responses of each prompt. The policy and its cache are gone when this returns."""
    return sampling.sample(
        folder,
        inputs.policy(recipe.policy),
        inputs.prompts,
        n=recipe.samples,
        temperatures=[recipe.temperature],
        seed=recipe.seed,
    )


def usable(response: Response, tokenizer: Tokenizer) -> bool:
    """Can it be a target? Not if it was cut (it would gain an EOS that was never produced), is
    empty, or holds a tag of the chat format: as text, or as a special token, which its text does
    not show. An added token that is text ("</think>") may stand in it."""
    if tokenizer.hidden_ids.intersection(response.tokens[:-1]):
        return False
    answer = {"role": "assistant", "content": response.text}
    try:
        chat.check_messages([*response.prompt.messages, answer], last="assistant")
    except InputError:
        return False
    return response.finished


def select(sampled: Sequence[Sequence[Response]], tokenizer: Tokenizer) -> list[Response]:
    """The usable response with the highest reward of each prompt, the first of equals; prompts
    without one are left out."""
    candidates = ([r for r in responses if usable(r, tokenizer)] for responses in sampled)
    return [max(group, key=lambda response: response.reward) for group in candidates if group]


def pool(best: Sequence[Response], earlier: Sequence[Response]) -> list[Response]:
    """One response a prompt: the better by today's reward models, or the only one. Prompts are the
    same where their messages are."""
    kept = {repr(response.prompt.messages): response for response in best}
    for response in earlier:
        key = repr(response.prompt.messages)
        if key not in kept or response.reward > kept[key].reward:
            kept[key] = response
    return list(kept.values())


def pooled(
    models: RewardModels, best: Sequence[Response], earlier: Sequence[Response]
) -> list[Response]:
    """`pool` by what `models` say today of the earlier responses; a preference model compares all
    responses to one prompt."""
    if models.preference is None:
        return pool(best, balance.rescored(models, earlier))
    groups: dict[str, list[Response]] = {}
    for response in [*best, *earlier]:
        groups.setdefault(repr(response.prompt.messages), []).append(response)
    ranked = balance.ranked(models, list(groups.values()))
    return [max(group, key=lambda response: response.reward) for group in ranked]


def gain(sampled: Sequence[Sequence[Response]]) -> dict[str, float]:
    """Mean over prompts of the mean, median and maximum reward of the K samples (Figure 7)."""
    rewards = np.array([[response.reward for response in group] for group in sampled])
    return {
        "sampled/mean_reward": float(rewards.mean()),
        "sampled/median_reward": float(np.median(rewards, axis=1).mean()),
        "sampled/max_reward": float(rewards.max(axis=1).mean()),
    }
