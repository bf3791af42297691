"""What the stages that sample share for `--dry-run`: which models lie in memory together, what is
drawn, and how long answers are before there are any.

Answers count at their longest (`sampling.max_tokens`), since only sampling can say how long they
are; so do the batches that are made of them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama2rt.data.records import Prompt
from llama2rt.model import LlamaConfig
from llama2rt.planning import Batch, Count, Model, Phase, Sampling, Work
from llama2rt.rollout.sampling import SamplingOptions
from llama2rt.stages import mixing
from llama2rt.stages.inputs import RolloutInputs, RolloutRecipe
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama2rt.stages.ppo_recipe import PpoRecipe

Shape = Callable[[Path], LlamaConfig]
LONGEST = "at most: every answer as long as sampling.max_tokens lets it be"


def prompt_lengths(prompts: list[Prompt], tokenizer: Tokenizer) -> list[int]:
    """Tokens of each prompt."""
    return [len(chat.encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]


def sampling_of(
    policy: Model,
    options: SamplingOptions,
    lengths: list[int] | None,
    answers: float | None,
    readers: list[Model],
) -> Sampling:
    """Answers to prompts of those `lengths`; where no prompt was read, to prompts that leave the
    context just enough for one."""
    context = policy.config.context
    if lengths:
        mean, most = float(np.mean(lengths)), max(lengths)
    else:
        most = max(1, context - options.max_tokens)
        mean = float(most)
    return Sampling(
        policy,
        answers,
        options.max_sequences,
        mean,
        min(context, most + options.max_tokens),
        min(options.max_tokens, context),
        options.cache_bytes,
        served=options.server is not None,
    ).read_by(readers)


def answers_batch(sampling: Sampling, count: float) -> Batch:
    """Steps of `count` answers with their prompts."""
    sequence = min(sampling.longest, sampling.prompt + sampling.most)
    return Batch(count * sequence, sequence, sampling.longest, LONGEST)


def reward_models(recipe: Any, shape: Shape) -> list[Model]:
    """The models that rank, of a recipe with [rewards]."""
    folders = {
        "helpfulness": recipe.rewards.helpfulness,
        "safety": recipe.rewards.safety,
        "preference": recipe.rewards.preference,
    }
    return [
        Model(name, shape(folder), scalar=name != "preference", held=held(recipe))
        for name, folder in folders.items()
        if folder is not None
    ]


def comparing(recipe: RolloutRecipe, samples: int) -> list[str]:
    """What the estimate leaves out of comparing a prompt's answers with each other."""
    if recipe.rewards.preference is None:
        return []
    passes = samples * (samples - 1) if recipe.rewards.ranking == "win_rate" else 3 * samples
    return [
        f"time: preference counts as reading each answer once; it compares in about {passes} "
        "passes a prompt, each over two answers"
    ]


def reference(recipe: Any, shape: Shape) -> Model:
    """The reference policy, which may be the trained model without its adapter."""
    return Model(
        "reference",
        shape(recipe.reference or recipe.init),
        held=held(recipe),
        under_adapter=recipe.lora.rank is not None and recipe.reference in (None, recipe.init),
    )


def held(recipe: Any) -> Any:
    """Where frozen models are: resident where a recipe cannot say so."""
    return getattr(recipe, "frozen", "resident")


def of_ppo(recipe: "PpoRecipe", inputs: RolloutInputs | None, shape: Shape) -> Work:
    """PPO: policy, critic (where the algorithm has one), reference and reward models lie in memory
    at all times; an iteration samples with the policy as it is, then trains on what it drew."""
    policy = Model("policy", shape(recipe.init), lora=recipe.lora)
    trained = [policy]
    if recipe.has_critic:
        scoring = shape(recipe.rewards.scoring)
        trained.append(Model("critic", scoring, scalar=True, lora=recipe.lora))
    ranking = reward_models(recipe, shape)
    frozen = [*ranking, reference(recipe, shape)]
    lengths = None if inputs is None else prompt_lengths(inputs.prompts, inputs.tokenizer)
    answers = recipe.iterations * recipe.batch_size
    lent = replace(policy, lent=True)
    # Policy and reference read each answer again for its log-probabilities, the critic for values.
    readers = frozen if recipe.reads_while_training else [*frozen, *reversed(trained)]
    sampling = sampling_of(lent, recipe.sampling, lengths, answers, readers)
    updates = -(-recipe.batch_size // recipe.mini_batch_size) * recipe.epochs
    return Work(
        [
            Phase("rollout", trained, frozen, sampling),
            Phase("training", trained, frozen, training=True),
        ],
        recipe.train,
        recipe.parallel,
        answers_batch(sampling, min(recipe.mini_batch_size, recipe.batch_size)),
        Count(recipe.iterations * updates, "at most: held-out prompts may end it earlier"),
        notes=[
            f"{recipe.iterations} iterations of {updates} optimizer steps"
            + ("; one more samples" if recipe.has_critic else ""),
            *mixing.notes(recipe, inputs),
        ],
    )
