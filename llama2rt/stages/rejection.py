"""Rejection sampling fine-tuning (section 3.2.3): the best of K answers becomes the next target.

Phases, each resumable: sample K answers a prompt from the most recent policy, score them, keep the
best one of each prompt, pooled with the best of earlier versions where asked, fine-tune as in SFT,
measure on held-out prompts. Left out: sampling by a larger model than the one that is tuned, which
is this stage with another `policy`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from llama2rt.checkpoint import native
from llama2rt.data.loader import ExampleLoader
from llama2rt.data.readers import read
from llama2rt.data.records import Dialogue
from llama2rt.errors import InputError
from llama2rt.generate import Engine
from llama2rt.stages import loading, phases, sft
from llama2rt.stages.phases import Response, RewardModels
from llama2rt.stages.pretrain import next_token
from llama2rt.text import chat
from llama2rt.train.loop import fit
from llama2rt.train.options import Recipe, TrainOptions
from llama2rt.train.run import Run

BEST = "best.jsonl"


class RejectionRecipe(Recipe):
    """Fine-tune on the best of K samples of each prompt."""

    policy: Path
    """the most recent model: it samples"""
    init: Path
    """the model that is fine-tuned ("each version starts from the base model")"""
    helpfulness: Path
    """the best helpfulness reward model available"""
    safety: Path | None = None
    """the safety reward model; None to go by helpfulness alone"""
    data: list[Path]
    """prompts"""
    dialogues: list[Path] = Field(default=[])
    """dialogues to train on besides, such as the SFT set"""
    earlier: list[Path] = Field(default=[])
    """run directories of earlier versions whose best samples are pooled (the paper: from V4 on,
    which recovered skills such as rhyming)"""
    validation: list[Path] = Field(default=[])
    """held-out prompts for the report"""
    tokenizer: Path | None = None
    """None for the one in policy"""

    samples: int = Field(default=10, gt=0)
    """K; the paper plots 1-100 and names none"""
    temperature: float = Field(default=1.0, gt=0)
    """to be tuned again for each version: 1.2-1.3 was best for RLHF models at 10-100 samples"""
    max_tokens: int = Field(default=256, gt=0)
    """response length; a response that is cut there never becomes a target"""
    max_sequences: int = Field(default=256, gt=0)
    """sampled at once"""
    cache_bytes: int | None = Field(default=None, gt=0)
    """most memory for keys and values while sampling; None for half of what is free"""
    threshold: float = Field(default=0.15, ge=0, le=1)
    """safety score below which the safety reward rules on any prompt"""
    batch_size: int = Field(default=64, gt=0)
    """dialogues an optimizer step (section 3.1)"""
    epochs: int = Field(default=2, gt=0)
    """through the best samples (section 3.1)"""
    seed: int = Field(default=0, ge=0)
    """of sampling and of the dialogues' order"""
    # As in SFT, section 3.1: cosine, lr 2e-5, weight decay 0.1.
    train: TrainOptions = TrainOptions(lr=2e-5)


def run(recipe: RejectionRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Sample, select, fine-tune, measure; returns the model folder."""
    inputs = loading.file_inputs(
        policy=recipe.policy,
        init=recipe.init,
        helpfulness=recipe.helpfulness,
        safety=recipe.safety,
        data=recipe.data,
        dialogues=recipe.dialogues,
        earlier=[folder / "samples" / BEST for folder in recipe.earlier],
        validation=recipe.validation,
        tokenizer=recipe.tokenizer,
    )
    run = Run.open(directory, recipe, inputs=inputs, parents=recipe.earlier, resume=resume)
    if run.complete:
        return run.model_directory
    options = recipe.train
    policy, tokenizer = loading.load_llama(recipe.policy, recipe.tokenizer, options.dtype)
    loading.require_tokenizer(recipe.init, tokenizer)  # its weights are loaded after the sampling
    reward_models = RewardModels.load(
        recipe.helpfulness, recipe.safety, recipe.threshold, options.dtype, tokenizer
    )

    # Sample and score.
    sampled = phases.sample(
        run.samples_directory,
        Engine(
            policy, tokenizer, max_sequences=recipe.max_sequences, cache_bytes=recipe.cache_bytes
        ),
        reward_models,
        loading.read_prompts(
            recipe.data, tokenizer, policy, recipe.max_tokens, reward_models.by_key
        ),
        n=recipe.samples,
        temperatures=[recipe.temperature],
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        policy=str(recipe.policy),
        micro_tokens=options.micro_tokens,
    )
    del policy

    # Select.
    best = select(sampled)
    for folder in recipe.earlier:
        earlier = phases.read_responses(folder / "samples" / BEST)
        best = pool(best, phases.rescore(earlier, reward_models, options.micro_tokens))
    if not best:
        raise InputError("no prompt has a finished answer to train on; raise max_tokens")
    phases.write_responses(run.samples_directory / BEST, best)

    # Fine-tune.
    model = loading.load_companion(recipe.init, tokenizer)
    dialogues = [
        Dialogue([*r.prompt.messages, {"role": "assistant", "content": r.text}]) for r in best
    ]
    if recipe.dialogues:
        dialogues += read(recipe.dialogues, "dialogue")
    examples = sft.encode(dialogues, tokenizer, model.config.context)
    # One that alone exceeds micro_tokens passes alone: refusing it would come after the sampling.
    longest = max(len(example.tokens) for example in examples)
    loader = ExampleLoader(
        examples,
        recipe.batch_size,
        max(options.micro_tokens, longest),
        recipe.seed,
    )
    fit(run, model, loader, next_token, options, steps=recipe.epochs * loader.steps_per_epoch)
    native.save(model, tokenizer, run.model_directory)

    # Measure.
    report = {"prompts": len(sampled), "targets": len(best), **gain(sampled)}
    if recipe.validation:
        reference = loading.load_companion(recipe.init, tokenizer)
        report |= phases.measure(
            run.samples_directory / "held_out.jsonl",
            Engine(
                model, tokenizer, max_sequences=recipe.max_sequences, cache_bytes=recipe.cache_bytes
            ),
            reference,
            reward_models,
            loading.read_prompts(recipe.validation, tokenizer, model),
            temperature=1.0,
            max_tokens=recipe.max_tokens,
            seed=phases.derived_seed(recipe.seed, "held-out"),
            policy=str(directory),
            micro_tokens=options.micro_tokens,
        )
    phases.write_report(run, report)
    return run.model_directory


def usable(response: Response) -> bool:
    """Can it be a target? Not if it was cut (it would gain an EOS that was never produced), is
    empty, or holds a tag of the chat format."""
    answer = {"role": "assistant", "content": response.text}
    try:
        chat.check_messages([*response.prompt.messages, answer], last="assistant")
    except InputError:
        return False
    return response.finished


def select(sampled: Sequence[Sequence[Response]]) -> list[Response]:
    """The usable response with the highest reward of each prompt, the first of equals; prompts
    without one are left out."""
    candidates = ([r for r in responses if usable(r)] for responses in sampled)
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


def gain(sampled: Sequence[Sequence[Response]]) -> dict[str, float]:
    """Mean over prompts of the mean, median and maximum reward of the K samples (Figure 7)."""
    rewards = np.array([[response.reward for response in group] for group in sampled])
    return {
        "sampled/mean_reward": float(rewards.mean()),
        "sampled/median_reward": float(np.median(rewards, axis=1).mean()),
        "sampled/max_reward": float(rewards.max(axis=1).mean()),
    }
