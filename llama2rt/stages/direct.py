"""Direct preference learning, online or from files: which loss, what a step is made of, and the
reference policy's sums that it needs.

A loss is of pairs, of all scored answers to a prompt, or of answers by themselves (`history`). What
it takes from the whole batch, KTO's KL, is read before the losses of a step, so that neither
micro-batches nor the number of processes are part of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llama2rt.algorithms import losses
from llama2rt.data.groups import Group, GroupBatch
from llama2rt.data.loader import GroupLoader, PairLoader
from llama2rt.data.packing import Batch, Example, PairBatch
from llama2rt.data.shared import packing
from llama2rt.model import Llama
from llama2rt.parallel import Mesh
from llama2rt.rollout import balance
from llama2rt.rollout.logprobs import segment_sums
from llama2rt.run import Recipe
from llama2rt.stages.history import History, Unit
from llama2rt.stages.pairs import Sums, kept_sums
from llama2rt.train.loop import Survey
from llama2rt.train.options import TrainOptions

UNITS: dict[str, Unit] = {"infonca": "groups", "nca_group": "groups", "kto_unpaired": "answers"}
"""what the losses are of that are not of pairs"""


class DirectRecipe(Recipe):
    """What online and offline preference learning have in common: the loss."""

    kind: losses.AnyKind = "dpo"
    """the preference loss: of pairs (algorithms.losses.preference), of all scored answers to a
    prompt (infonca, nca_group), or of answers by themselves (kto_unpaired)"""
    beta: float = Field(default=0.1, gt=0)
    """the paper's eta"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """probability that a label is wrong, for the kinds that know one (dpo, exo, robust, simpo)"""
    gamma: float = Field(default=0.0, ge=0)
    """simpo's target margin"""
    alpha: float = Field(default=1.0, gt=0)
    """of infonca and nca_group: answers are to be as probable as softmax(reward / alpha); at 1 the
    best policy is that of the KL-regularised objective with beta"""
    desirable_weight: float = Field(default=1.0, gt=0)
    """of kto_unpaired's desirable answers; its authors want (desirable weight x number) to be 1 to
    4/3 of the same of the undesirable ones"""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """of kto_unpaired's undesirable answers"""
    batch_size: int = Field(default=128, gt=0)
    """pairs, prompts or answers in an optimizer step, as the loss is of them"""
    share_prompts: bool | None = None
    """whether the prompt of a pair is computed once, not once a side; None for wherever that leaves
    out a tenth of a micro-batch's tokens. Losses and gradients differ by rounding"""
    # The paper: lr 5e-7, cosine (to 0, as its Hugging Face schedule), warm-up 0.03.
    train: TrainOptions = TrainOptions(
        lr=5e-7, warmup_ratio=0.03, min_lr_ratio=0.0, micro_tokens=16384
    )

    @property
    def unit(self) -> Unit:
        """What the loss is of."""
        return UNITS.get(self.kind, "pairs")

    @model_validator(mode="after")
    def _kind_has_settings(self) -> Self:
        for name, unit in (
            ("alpha", "groups"),
            ("desirable_weight", "answers"),
            ("undesirable_weight", "answers"),
        ):
            if getattr(self, name) != 1.0 and self.unit != unit:
                raise ValueError(f"{name}: {self.kind} has none, got {getattr(self, name)}")
        if self.unit == "pairs":
            # The loss itself says which settings its kind does not have.
            zero = torch.zeros(1)
            losses.preference(
                zero,
                zero,
                zero,
                zero,
                kind=self.kind,  # type: ignore[arg-type]
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                gamma=self.gamma,
            )
        elif self.label_smoothing or self.gamma:
            raise ValueError(f"label_smoothing and gamma: {self.kind} has neither")
        return self


class Loss(Protocol):
    """An objective of `train.loop.fit`, with what it reads of a step before."""

    survey: Survey | None

    def __call__(self, model: Llama, micro: Any, /) -> tuple[Tensor, dict[str, Tensor]]: ...


def loss(recipe: DirectRecipe, mesh: Mesh | None = None) -> Loss:
    """That of the recipe's kind."""
    mesh = mesh or Mesh.single()
    if recipe.unit == "pairs":
        return PairLoss(recipe, mesh)
    return GroupLoss(recipe) if recipe.unit == "groups" else AnswerLoss(recipe, mesh)


class PairLoss:
    """The kinds of `losses.preference`, summed over pairs."""

    def __init__(self, recipe: DirectRecipe, mesh: Mesh) -> None:
        self._recipe, self._mesh = recipe, mesh
        self._kl: tuple[float, float] | None = None
        self.survey: Survey | None = self._batch_kl if recipe.kind == "kto" else None

    def __call__(self, model: Llama, pairs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, extras = self._recipe, pairs.extras
        chosen, rejected = self._sides(model, pairs)
        references = (extras.get("reference_chosen"), extras.get("reference_rejected"))
        total = losses.preference(
            chosen,
            rejected,
            *references,
            kind=recipe.kind,  # type: ignore[arg-type]
            beta=recipe.beta,
            label_smoothing=recipe.label_smoothing,
            gamma=recipe.gamma,
            kl=self._kl,
        ).sum()
        gap = (chosen - rejected).detach()
        if recipe.kind not in losses.REFERENCE_FREE:
            gap = gap - (extras["reference_chosen"] - extras["reference_rejected"])
        sums = {
            # Both are watched: in DPO the chosen log-probability often falls with the rejected.
            "chosen_logprob": chosen.detach().sum(),
            "rejected_logprob": rejected.detach().sum(),
            "margin": recipe.beta * gap.sum(),
            "accuracy": (gap > 0).sum(),
        }
        return total, sums

    def _sides(self, model: Llama, pairs: PairBatch) -> tuple[Tensor, Tensor]:
        values = document_logprobs(model, pairs.batch, self._recipe.kind in losses.AVERAGED)
        chosen, rejected = values.view(-1, 2).unbind(1)
        return chosen, rejected

    def _batch_kl(self, model: Llama, micros: list[PairBatch]) -> None:
        """KTO's KL: the mean log-ratio of each side over the whole batch."""
        chosen_sum = rejected_sum = 0.0
        for pairs in micros:
            chosen, rejected = self._sides(model, pairs)
            if pairs.weight:
                chosen_sum += float((chosen - pairs.extras["reference_chosen"]).sum())
                rejected_sum += float((rejected - pairs.extras["reference_rejected"]).sum())
        weight = sum(pairs.weight for pairs in micros)
        chosen_sum, rejected_sum, total = self._mesh.totals([chosen_sum, rejected_sum, weight])
        self._kl = (chosen_sum / total, rejected_sum / total)


class GroupLoss:
    """InfoNCA and NCA over all scored answers to a prompt, summed over prompts."""

    survey: Survey | None = None

    def __init__(self, recipe: DirectRecipe) -> None:
        self._recipe = recipe
        self._of = {"infonca": losses.infonca, "nca_group": losses.nca_group}[recipe.kind]

    def __call__(self, model: Llama, groups: GroupBatch) -> tuple[Tensor, dict[str, Tensor]]:
        extras, beta = groups.extras, self._recipe.beta
        values = document_logprobs(model, groups.batch)
        ratio = values - extras["reference"]
        total = self._of(ratio, extras["label"], groups.sizes, beta).sum()
        side, known = extras["side"], values.detach()
        gap = segment_sums(ratio.detach() * side, groups.sizes)
        sums = {
            "chosen_logprob": (known * (side > 0)).sum(),
            "rejected_logprob": (known * (side < 0)).sum(),
            "margin": beta * gap.sum(),
            "accuracy": (gap > 0).sum(),
        }
        return total, sums


class AnswerLoss:
    """KTO over answers by themselves, summed over answers."""

    def __init__(self, recipe: DirectRecipe, mesh: Mesh) -> None:
        self._recipe, self._mesh = recipe, mesh
        self._kl = 0.0
        self.survey: Survey | None = self._batch_kl

    def __call__(self, model: Llama, answers: GroupBatch) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, desirable = self._recipe, answers.extras["desirable"]
        ratio = document_logprobs(model, answers.batch) - answers.extras["reference"]
        total = losses.kto_unpaired(
            ratio,
            desirable,
            self._kl,
            beta=recipe.beta,
            weights=(recipe.desirable_weight, recipe.undesirable_weight),
        ).sum()
        known = ratio.detach()
        sums = {
            "kl": torch.full_like(known, self._kl).sum(),
            # Twice the mean over all is the difference of the means where half are desirable.
            "margin": recipe.beta * 2 * torch.where(desirable, known, -known).sum(),
            "accuracy": ((known > max(self._kl, 0.0)) == desirable).sum(),
        }
        return total, sums

    def _batch_kl(self, model: Llama, micros: list[GroupBatch]) -> None:
        """The mean log-ratio over the batch of other prompts' answers, which is 0 in expectation
        where the policy is the reference, as KL is, and floored by the loss."""
        total = 0.0
        for answers in micros:
            assert answers.mismatched is not None  # as `loader` makes them
            ratio = document_logprobs(model, answers.mismatched)
            if answers.weight:
                total += float((ratio - answers.extras["reference_mismatched"]).sum())
        weight = sum(answers.weight for answers in micros)
        total, count = self._mesh.totals([total, weight])
        self._kl = total / count


def document_logprobs(model: nn.Module, batch: Batch, averaged: bool = False) -> Tensor:
    """Log-probability of each document's targets, summed, or averaged over them: fp32 [B]."""
    packed = batch.tokens, batch.positions, batch.cu_seqlens, batch.targets
    logprob = model(*packed, keys=batch.keys, tails=batch.tails)
    lengths = batch.cu_seqlens.diff().long()
    values = segment_sums(logprob, lengths)
    if averaged:
        values = values / segment_sums((batch.targets >= 0).float(), lengths)
    return values


def loader(
    recipe: DirectRecipe, history: History, seed: int, mesh: Mesh
) -> PairLoader | GroupLoader:
    """Steps through a history whose reference sums are there, in shuffled epochs."""
    packed = packing(recipe.share_prompts)
    if recipe.unit != "pairs":
        return GroupLoader(
            history.groups,
            history.extras,
            recipe.batch_size,
            recipe.train.micro_tokens,
            seed,
            mismatched=history.mismatched if recipe.unit == "answers" else None,
            share=mesh.share,
            packed=packed,
        )
    extras = {}
    if "reference" in history.extras:
        chosen, rejected = history.extras["reference"].reshape(-1, 2).T
        extras = {"reference_chosen": chosen, "reference_rejected": rejected}
    pairs = [(chosen, rejected) for chosen, rejected in history.groups]
    return PairLoader(
        pairs,
        extras,
        recipe.batch_size,
        recipe.train.micro_tokens,
        seed,
        share=mesh.share,
        packed=packed,
    )


def reference_sums(
    reference: nn.Module, groups: Sequence[Group], recipe: DirectRecipe
) -> torch.Tensor:
    """The reference policy's log-probability of each document of `groups`, fp32 [B] on the CPU:
    summed, or averaged where the kind is defined on averages."""
    documents = [document for group in groups for document in group]
    logprob, _ = balance.logprobs(
        reference,
        documents,
        1.0,
        recipe.train.micro_tokens,
        together=[number for number, group in enumerate(groups) for _ in group],
        packed=packing(recipe.share_prompts),
    )
    counts = [int(document.trainable[1:].sum()) for document in documents]
    lengths = torch.tensor(counts, device=logprob.device)
    values = segment_sums(logprob, lengths)
    return (values / lengths if recipe.kind in losses.AVERAGED else values).cpu()


def with_reference(
    recipe: DirectRecipe, new: History, inputs: Any, reference: str, path: Path
) -> History:
    """`new` with the sums of the reference policy, `inputs.reference`, kept in the file at `path`
    so that a resumed run has them. `reference`: the hash of that model's folder."""
    if recipe.kind in losses.REFERENCE_FREE or not new.groups:
        return new
    # All but the kind change how the sums are rounded.
    settings = [recipe.kind, recipe.train.precision, recipe.train.micro_tokens]
    if recipe.share_prompts is not None:
        settings.append(recipe.share_prompts)
    documents = [document for group in new.groups for document in group]
    tokens = [
        [document.tokens.tolist(), int(document.trainable.argmax())]
        for document in [*documents, *new.mismatched]
    ]

    def compute() -> Sums:
        sums = {"reference": reference_sums(inputs.reference, new.groups, recipe).numpy()}
        if new.mismatched:
            alone: list[tuple[Example]] = [(document,) for document in new.mismatched]
            found = reference_sums(inputs.reference, alone, recipe)
            sums["reference_mismatched"] = found.numpy()
        return sums

    sums = kept_sums(path, [reference, tokens, settings], compute)
    return History(new.groups, new.extras | sums, new.mismatched)
