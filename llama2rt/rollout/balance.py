"""A rollout's work shared by all ranks: each takes some of the prompts or responses, and all of
them have all results, in order.

Models are whole on every rank here (`parallel.whole`), or on every group of tensor ranks
(`parallel.tensor_group`), so that ranks, or groups of them, work alone until results are gathered
and none waits for another's tokens. What is shared is whole prompts with all their samples: those
read their prompt once. In one process everything is this process's, in one call. Frozen models in
shards (`rollout.frozen.share`) are the exception: all ranks read them together, micro-batch by
micro-batch.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from llama2rt.data.loader import balanced
from llama2rt.data.packing import Batch, Example, pack
from llama2rt.errors import InputError
from llama2rt.model import ScalarModel
from llama2rt.parallel import faults, tensor_group
from llama2rt.parallel.world import gather, portable, world
from llama2rt.rollout.frozen import device_of, shared_over
from llama2rt.rollout.logprobs import response_kl, response_logprobs, response_values
from llama2rt.rollout.responses import Response
from llama2rt.rollout.reward import RewardModels

Result = TypeVar("Result")


def spread(
    costs: Callable[[], Sequence[float]],
    work: Callable[[list[int]], Sequence[Result]],
    count: int,
    together: Sequence[Hashable] | None = None,
    group_size: int = 1,
) -> list[Result]:
    """The results of `count` items, in order, on every rank: each calls `work`, once, with the
    indices that are its own (not at all where it has none).

    `costs()` says what each item takes, in any unit; it is called among several ranks only.
    Neighbours with equal values in `together` stay on one rank. Groups of
    `group_size` neighbouring ranks have the same indices, and work on them together. What one rank
    raises, all raise.
    """
    if world().size == 1:
        return list(work(list(range(count)))) if count else []
    cost = costs()
    keys = range(count) if together is None else together
    units = [list(unit) for _, unit in itertools.groupby(range(count), keys.__getitem__)]
    taken = balanced([sum(cost[i] for i in unit) for unit in units], world().size // group_size)
    indices = [[i for unit in mine for i in units[unit]] for mine in taken]
    outcome: tuple[Sequence[Result], Exception | None] = [], None
    group, number = divmod(world().rank, group_size)
    try:
        if indices[group]:
            with faults.apart():
                found = list(work(indices[group]))
            outcome = [] if number else found, None
    except Exception as error:
        if group_size > 1 and not isinstance(error, InputError | FloatingPointError):
            raise  # what the others of its group do not meet too: they wait for this rank
        outcome = [], portable(error)
    outcomes = gather(outcome)
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    results: dict[int, Result] = {}
    for own, (answers, _) in zip(indices, outcomes[::group_size], strict=True):
        results.update(zip(own, answers, strict=True))
    return [results[i] for i in range(count)]


def scores(
    models: RewardModels,
    sequences: Sequence[list[int]],
    is_safety: np.ndarray,
    together: Sequence[Hashable] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`RewardModels.score`, each rank for some of the sequences."""
    if world().size == 1 or models.shared:
        return models.score(sequences, is_safety)

    def work(indices: list[int]) -> list[tuple[float, ...]]:
        reward, by_name = models.score([sequences[i] for i in indices], is_safety[indices])
        return list(zip(reward.tolist(), *(by_name[n].tolist() for n in names), strict=True))

    names = list(models.by_name)
    costs = [float(len(sequence)) for sequence in sequences]
    rows = np.array(spread(lambda: costs, work, len(sequences), together))
    reward, *by_name = rows.reshape(-1, 1 + len(names)).T
    return reward, dict(zip(names, by_name, strict=True))


def rescored(models: RewardModels, responses: Sequence[Response]) -> list[Response]:
    """`RewardModels.rescore`, each rank for some of the responses."""
    if models.shared:
        return models.rescore(responses)

    def work(indices: list[int]) -> list[Response]:
        return models.rescore([responses[i] for i in indices])

    costs = [float(len(r.prompt_tokens) + len(r.tokens)) for r in responses]
    return spread(lambda: costs, work, len(responses))


def ranked(models: RewardModels, groups: Sequence[Sequence[Response]]) -> list[list[Response]]:
    """`RewardModels.ranked`, each rank for some of the prompts."""
    if models.preference is None or models.shared:
        return models.ranked(groups)

    def work(indices: list[int]) -> list[list[Response]]:
        return models.ranked([groups[i] for i in indices])

    # Each answer is read beside each of the others.
    costs = [
        float(len(group) * sum(len(r.prompt_tokens) + len(r.tokens) for r in group))
        for group in groups
    ]
    return spread(lambda: costs, work, len(groups))


def logprobs(
    model: nn.Module,
    examples: Sequence[Example],
    temperature: float,
    micro_tokens: int,
    together: Sequence[Hashable] | None = None,
    packed: Callable[[Sequence[Example]], Batch] = pack,
) -> tuple[Tensor, Tensor]:
    """`response_logprobs`, each rank for some of the examples."""
    if (mesh := shared_over(model)) is not None:
        return response_logprobs(model, examples, temperature, micro_tokens, packed, mesh)

    def work(part: Sequence[Example]) -> Tensor:
        return torch.stack(response_logprobs(model, part, temperature, micro_tokens, packed))

    logprob, entropy = _by_token(work, examples, together, model)
    return logprob, entropy


def exact_kl(
    reference: nn.Module,
    policy: nn.Module,
    examples: Sequence[Example],
    temperature: float,
    micro_tokens: int,
) -> Tensor:
    """`response_kl`, each rank for some of the examples; both models whole on every rank."""

    def work(part: Sequence[Example]) -> Tensor:
        return response_kl(reference, policy, part, temperature, micro_tokens)

    return _by_token(work, examples, None, policy)


def values(critic: ScalarModel, examples: Sequence[Example], micro_tokens: int) -> Tensor:
    """`response_values`, each rank for some of the examples."""

    def work(part: Sequence[Example]) -> Tensor:
        return response_values(critic, part, micro_tokens)

    return _by_token(work, examples, None, critic)


def _by_token(
    work: Callable[[Sequence[Example]], Tensor],
    examples: Sequence[Example],
    together: Sequence[Hashable] | None,
    model: nn.Module,
) -> Tensor:
    """What `work` gives of `model`, fp32 [..., R] over the examples' response tokens, of all
    examples."""
    if world().size == 1:
        return work(examples)

    def part(indices: list[int]) -> list[np.ndarray]:
        found = work([examples[i] for i in indices]).cpu().numpy()
        ends = np.cumsum([int(examples[i].trainable[1:].sum()) for i in indices])
        return np.split(found, ends[:-1], axis=-1)

    costs = [float(len(example.tokens)) for example in examples]
    pieces = spread(lambda: costs, part, len(examples), together, tensor_group.size(model))
    return torch.from_numpy(np.concatenate(pieces, axis=-1)).to(device_of(model))
