"""Where PPO's critic starts: the reward model's layers, under a head that speaks in returns.

The reward model's own head would start PPO with values in raw logits against a return of unit
variance, and with one score of a finished answer for each of its tokens. Advantages are then noise
with a bias along the answer, which shortens or lengthens answers whatever they are worth (the
"value initialisation bias" of Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?", who
pretrain the critic on returns of the fixed first policy). Here that pretraining is solved for the
head in closed form, and the layers below follow during PPO.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama2rt.algorithms import advantages
from llama2rt.algorithms.value_head import RidgeRegression
from llama2rt.data.packing import Example
from llama2rt.model import ScalarModel
from llama2rt.parallel.whole import assign, in_shards
from llama2rt.rollout.logprobs import inference_batches
from llama2rt.stages.inputs import RolloutRecipe
from llama2rt.stages.loading import load_scalar
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.optimizer import Optimizer


def initial_model(
    recipe: RolloutRecipe, tokenizer: Tokenizer, device: torch.device | str
) -> ScalarModel:
    """The helpfulness model, on `device`, to be trained as the critic of a policy with
    `tokenizer`."""
    dtype = recipe.lora.load_dtype(recipe.train)
    model = load_scalar(recipe.rewards.scoring, dtype, tokenizer, device)
    recipe.lora.adapt(model.requires_grad_(True), recipe.seed)
    return model


@torch.no_grad()
def warm_up(
    critic: ScalarModel,
    examples: Sequence[Example],
    rewards: Tensor,
    cu_responses: Tensor,
    gamma: float,
    micro_tokens: int,
) -> tuple[Tensor, float]:
    """(head's weight fp32 [1, dim], share of the returns' squares explained on responses left out).

    `rewards` fp32 [R] over response tokens, end to end as `cu_responses` says. The target of a
    token is its whole discounted return (GAE with lambda 1 and values of 0): no bootstrapping from
    values that are still to be found.
    """
    returns, _ = advantages.gae(rewards, torch.zeros_like(rewards), cu_responses, gamma, 1.0)
    responses = torch.arange(len(examples), device=rewards.device)
    groups = torch.repeat_interleave(responses, cu_responses.diff())
    weight = critic.head.weight
    regression = RidgeRegression(critic.config.dim, weight.device)
    begin = 0
    for batch in inference_batches(examples, micro_tokens, weight.device):
        hidden = critic.hidden(batch.tokens, batch.positions, batch.cu_seqlens)
        hidden = hidden[batch.targets >= 0]
        rows = slice(begin, begin := begin + len(hidden))
        regression.add(hidden, returns[rows], groups[rows])
    solved, explained = regression.solve()
    return solved[None], explained


def set_head(critic: ScalarModel, optimizer: Optimizer, weight: Tensor) -> None:
    """Give a critic, also one in shards, and its optimizer's master this head, fp32 [1, dim]."""
    assign(critic.head.weight, weight)
    if not in_shards(critic):  # which are the masters themselves
        assign(optimizer.master["head.weight"], weight)
