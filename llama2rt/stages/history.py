"""What direct preference learning learns from, online and offline alike: pairs, scored groups of
answers, or answers by themselves, as the loss wants them.

All are groups of documents with numbers for each document: a pair is two (chosen, rejected), a
scored group the answers to a prompt, an answer by itself one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama2rt.algorithms import losses, rewards
from llama2rt.data.groups import Group
from llama2rt.data.packing import Example
from llama2rt.errors import InputError
from llama2rt.rollout.responses import Response, response_example
from llama2rt.stages.pairs import Pair

logger = logging.getLogger("llama2rt.stages.history")

Unit = Literal["pairs", "groups", "answers"]


@dataclass
class History:
    """Groups of documents, numbers of each document by name, and for answers by themselves their
    mismatched documents."""

    groups: list[Group] = field(default_factory=list)
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """one number a document: labels, which answer is best (`side`), what is desirable, sums of the
    reference policy"""
    mismatched: list[Example] = field(default_factory=list)
    """of each answer by itself: another prompt's answer to its prompt"""

    def add(self, new: "History") -> None:
        self.groups += new.groups
        self.mismatched += new.mismatched
        for name, values in new.extras.items():
            self.extras[name] = np.concatenate([self.extras.get(name, values[:0]), values])

    def part(self, begin: int, end: int) -> "History":
        """Groups `begin` to `end`."""
        first, last = (sum(map(len, self.groups[:count])) for count in (begin, end))
        extras = {name: values[first:last] for name, values in self.extras.items()}
        return History(self.groups[begin:end], extras, self.mismatched[begin:end])


class Compared(NamedTuple):
    """The answers to a prompt that are compared, and the reward of each."""

    responses: list[Response]
    rewards: Tensor
    """less the length penalty"""


def compared(responses: Sequence[Response], length_penalty: float) -> Compared | None:
    """Those of a prompt's answers that can be learned from; None where they cannot be told apart.

    A response that is only EOS is never compared: it says nothing, and a policy taught that it is
    better, or worse, than an answer learns about stopping only. Prompts whose best and worst are
    the same text, or earn the same, give nothing.
    """
    candidates = [response for response in responses if response.text]
    if len(candidates) < 2:
        return None
    reward = penalised(candidates, length_penalty)
    best, worst = candidates[int(reward.argmax())], candidates[int(reward.argmin())]
    if best.text == worst.text or float(reward.max()) <= float(reward.min()):
        return None
    return Compared(candidates, reward)


def penalised(responses: Sequence[Response], length_penalty: float) -> Tensor:
    """Rewards less the penalty on characters, [n]."""
    return rewards.length_penalty(
        torch.tensor([response.reward for response in responses]),
        torch.tensor([len(response.text) for response in responses]),
        length_penalty,
    )


def best_against_worst(sampled: Sequence[Sequence[Response]], length_penalty: float) -> list[Pair]:
    """(best, worst) of each prompt by reward less the length penalty, of what `compared` leaves."""
    pairs = []
    for responses in sampled:
        if (found := compared(responses, length_penalty)) is not None:
            best, worst = int(found.rewards.argmax()), int(found.rewards.argmin())
            pairs.append((found.responses[best], found.responses[worst]))
    return pairs


def of_samples(
    sampled: Sequence[Sequence[Response]],
    unit: Unit,
    length_penalty: float,
    alpha: float,
    context: int,
    earlier: Sequence[Group] = (),
) -> History:
    """An iteration's scored answers. As pairs: best against worst. As groups: all answers to a
    prompt with soft labels (`losses.soft_labels`). As answers: each by itself, desirable where it
    earns more than the mean of its prompt's. `earlier`: groups of the history, for `of_answers`."""
    if unit == "pairs":
        pairs = best_against_worst(sampled, length_penalty)
        return History([tuple(map(response_example, pair)) for pair in pairs])
    found = [one for group in sampled if (one := compared(group, length_penalty)) is not None]
    documents: list[Group] = [tuple(map(response_example, one.responses)) for one in found]
    if unit == "groups":
        labels = [losses.soft_labels(one.rewards, alpha).numpy() for one in found]
        return History(documents, {"label": _flat(labels), "side": _flat(map(_sides, found))})
    desirable = [(one.rewards > one.rewards.mean()).numpy() for one in found]
    return of_answers(documents, _flat(desirable).astype(bool), context, earlier)


def of_comparisons(pairs: Sequence[Group], unit: Unit, context: int) -> History:
    """Annotators' (chosen, rejected) pairs. As groups: of two, with the hard labels 1 and 0, which
    is DPO's loss in InfoNCA. As answers: the chosen are desirable, the rejected are not."""
    if unit == "pairs":
        return History(list(pairs))
    chosen = np.tile([True, False], len(pairs))
    if unit == "groups":
        side = np.where(chosen, 1.0, -1.0)
        return History(list(pairs), {"label": chosen.astype(float), "side": side})
    return of_answers(pairs, chosen, context)


def of_answers(
    by_prompt: Sequence[Group],
    desirable: np.ndarray,
    context: int,
    earlier: Sequence[Group] = (),
) -> History:
    """Each answer by itself, with the next prompt's answer to its own prompt, from which the
    policy's KL is estimated (Ethayarajh et al. 2024): each is taken about once. Where there is but
    one prompt, an answer of the groups in `earlier`; InputError where these too have no other."""
    answers = [(example, number) for number, group in enumerate(by_prompt) for example in group]
    mismatched = []
    cut = 0
    for index, (example, number) in enumerate(answers):
        begin = index + len(by_prompt[number])
        behind = (answers[(begin + i) % len(answers)][0] for i in range(len(answers)))
        known = chain(behind, (one for group in earlier for one in group))
        other = next((one for one in known if _prompt(one) != _prompt(example)), None)
        if other is None:
            raise InputError(
                "kind: kto_unpaired estimates the policy's KL from answers to other prompts, and "
                "all answers are to one"
            )
        document, whole = _answer_to(example, other, context)
        mismatched.append(document)
        cut += not whole
    if cut:
        logger.warning("%d mismatched answers cut to the context of %d tokens", cut, context)
    return History([(example,) for example, _ in answers], {"desirable": desirable}, mismatched)


def _sides(found: Compared) -> np.ndarray:
    """1 for the best answer, -1 for the worst, 0 for the others."""
    side = np.zeros(len(found.responses))
    side[int(found.rewards.argmax())], side[int(found.rewards.argmin())] = 1, -1
    return side


def _flat(parts: "Sequence[np.ndarray] | map[np.ndarray]") -> np.ndarray:
    return np.concatenate([np.empty(0), *parts])


def _answer(example: Example) -> int:
    """Where the answer begins: the tokens before are the prompt."""
    return int(example.trainable.argmax())


def _prompt(example: Example) -> bytes:
    return example.tokens[: _answer(example)].tobytes()


def _answer_to(example: Example, other: Example, context: int) -> tuple[Example, bool]:
    """The answer of `other` to the prompt of `example`, and whether it fits into the context."""
    begin = _answer(example)
    tokens = np.concatenate([example.tokens[:begin], other.tokens[_answer(other) :]])
    document = Example.of(tokens[:context], np.arange(min(len(tokens), context)) >= begin)
    return document, len(tokens) <= context
