"""Offline direct preference learning: train once on comparisons that are there, without sampling,
the baseline of RLHF Workflow (arXiv 2405.07863, section 4: DPO on Nectar).

The losses, and what online learning reads of such files, are shared with it. What is measured is
how often the policy's implicit reward, beta times its log-ratio to the reference policy, ranks
held-out comparisons as annotated. Left out: ratings and safety labels, for which these losses have
no use.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from llama2rt import report
from llama2rt.algorithms import losses
from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.groups import Group
from llama2rt.data.mixture import Account
from llama2rt.data.records import Comparison
from llama2rt.data.shared import pack_shared
from llama2rt.data.sources import Source
from llama2rt.errors import InputError, naming
from llama2rt.evaluate import diagnostics
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.planning import Batch, Count, Model, Phase, Work
from llama2rt.rollout.logprobs import response_logprobs, segment_sums
from llama2rt.run import Run
from llama2rt.stages import adapters, direct, history, loading, mixing, plans, preference, spread
from llama2rt.stages.comparisons import check_held_out, encode, to_come
from llama2rt.stages.direct import DirectRecipe
from llama2rt.stages.inputs import PolicyInputs
from llama2rt.stages.loading import Future, Outline, outlines
from llama2rt.stages.pairs import REFERENCE_SUMS
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.loop import fit
from llama2rt.train.lora import LoraOptions

logger = logging.getLogger("llama2rt.stages.offline")


class OfflineRecipe(DirectRecipe):
    """Improve a policy by DPO on comparisons from files, without sampling."""

    init: Path
    """the model that is trained, such as SFT's"""
    reference: Path | None = None
    """the reference policy; None for init"""
    data: list[Source]
    """comparisons of any kind"""
    validation: list[Source] = Field(default=[])
    """held-out comparisons; without them, held_out of the data"""
    held_out: int = Field(default=1000, ge=0)
    """comparisons kept back from each source in data that does not give its own number, whole
    prompts at a time, as for a reward model"""
    filters: Filters = NO_FILTERS
    """what is left out of all these files"""
    tokenizer: Path | None = None
    """None for the one in init"""
    skip_invalid: int = Field(default=0, ge=0)
    """bad records to leave out before giving up"""
    epochs: int = Field(default=1, gt=0)
    """section 4: 1"""
    seed: int = Field(default=0, ge=0)
    """of the held-out draw and the order"""
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""
    lora: LoraOptions = LoraOptions()
    frozen: Literal["resident", "offloaded", "sharded"] = "resident"
    """where the reference policy is: whole on every process's GPU; there while it reads alone and
    offloaded to the CPU's memory else; or sharded over all processes, which then read together"""

    neutral: ClassVar[tuple[str, ...]] = (*DirectRecipe.neutral, "frozen")
    durations: ClassVar[tuple[str, ...]] = ("epochs",)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.filters.require_meaning("comparison")
        check_held_out(self.data, self.validation)
        return self


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of files as token pairs, and what became of all others."""

    pairs: list[Group]
    """(chosen, rejected)"""
    account: Account = field(default_factory=Account)

    def record(self, run: Run) -> None:
        """Say it, and keep it in the manifest, as `mixing.record` does of prompts."""
        for line in self.account.lines():
            logger.info("%s", line)
        if found := self.account.report():
            run.keep(offline=found)


class Wanted(NamedTuple):
    """What is read for a stage that holds nothing out (`comparisons.Reading`)."""

    data: list[Source]
    filters: Filters
    seed: int
    validation: tuple[Source, ...] = ()
    held_out: int = 0
    skip_invalid: int = 0


def read(
    reading: Wanted,
    tokenizer: Tokenizer,
    context: int,
    held_out: set[str],
    future: Future | None = None,
) -> Comparisons:
    """The comparisons to learn from beside what is sampled, without those of the `held_out` prompts
    (as `comparisons.prompt_key` gives them), or that are longer than the context. None yet where
    an earlier step of a plan is still to collect them."""
    if future is not None and to_come(reading.data, future):
        return Comparisons([])
    account = Account()
    with naming("offline"):
        found, _ = preference.split(reading, tokenizer, Counter(), account, held_out)
        pairs, kept = encode(found, tokenizer, context)
    use(found, kept, account)
    for ingredient in account.ingredients:
        ingredient.key = ingredient.key.replace("data", "offline")
    return Comparisons(list(pairs), account)


def use(found: Sequence[Comparison], kept: Sequence[Comparison], account: Account) -> None:
    """Tell `account` that of `found` those of `kept` go in, and the others are too long."""
    fitting = set(map(id, kept))
    account.leave_out("longer than the context", (c for c in found if id(c) not in fitting))
    account.use(kept)


@dataclass(frozen=True)
class OfflineInputs(PolicyInputs):
    """What a run reads besides weights, and what model it will leave."""

    recipe: OfflineRecipe
    tokenizer: Tokenizer
    training: list[Group]
    held_out_pairs: list[Group]
    held_out: list[Comparison]
    left_out: Counter[str]
    result: Outline
    account: Account = field(default_factory=Account)
    """what became of every comparison of the data"""


def run(recipe: OfflineRecipe, directory: Path, *, resume: bool = False) -> Path:
    """Train, measure held-out accuracy into report.json; returns the model folder."""
    run = Run.open(directory, recipe, inputs=loading.file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    mesh = inputs.mesh
    reference = run.manifest["inputs"]["reference" if recipe.reference else "init"]["sha256"]

    # What is learned from, with the reference's sums.
    context = inputs.result.config.context
    past = history.of_comparisons(inputs.training, recipe.unit, context)
    sums = run.directory / REFERENCE_SUMS
    past = direct.with_reference(recipe, past, inputs, reference, sums)

    # Train.
    model = inputs.to_train_on(recipe.init, mesh)
    loader = direct.loader(recipe, past, recipe.seed, mesh)
    steps = recipe.epochs * loader.steps_per_epoch
    loss = direct.loss(recipe, mesh)
    options = recipe.train
    fit(run, model, loader, loss, options, steps=steps, mesh=mesh, survey=loss.survey)
    adapters.save(model, inputs.tokenizer, run, recipe.init)

    # Measure.
    numbers: dict[str, Any] = {"trained_on": len(inputs.training), "left_out": inputs.left_out}
    if inputs.held_out:
        model.eval()  # an adapter may have dropout
        own = response_sums(model, inputs.held_out_pairs, recipe, mesh)
        if recipe.kind not in losses.REFERENCE_FREE:
            pairs = inputs.held_out_pairs
            own -= direct.reference_sums(inputs.reference, pairs, recipe).numpy()
        chosen, rejected = recipe.beta * own.reshape(-1, 2).T
        numbers |= diagnostics.of_reward_model(chosen, rejected, inputs.held_out)
    report.finish(run, numbers)
    return run.model_directory


def response_sums(
    model: nn.Module, groups: Sequence[Group], recipe: OfflineRecipe, mesh: Mesh
) -> np.ndarray:
    """`direct.reference_sums` of the model that is trained, which all ranks of `mesh` read."""
    documents = [document for group in groups for document in group]
    micro_tokens = recipe.train.micro_tokens
    logprob, _ = response_logprobs(model, documents, 1.0, micro_tokens, pack_shared, mesh)
    lengths = logprob.new_tensor([d.trainable[1:].sum() for d in documents]).long()
    values = segment_sums(logprob, lengths)
    if recipe.kind in losses.AVERAGED:
        values = values / lengths
    return values.cpu().numpy()


def open_inputs(recipe: OfflineRecipe, future: Future | None = None) -> OfflineInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError where
    something does not fit. Of comparisons that an earlier step of a plan is still to collect
    nothing can be read: only the models are checked then."""
    recipe.lora.check()
    models = {"init": recipe.init, "reference": recipe.reference}
    tokenizer, found = outlines(recipe.tokenizer, models, future)
    config = found["init"].config
    spread.check(recipe.parallel, config, recipe.train, recipe.lora)
    reference = found.get("reference", found["init"]).config
    if reference.context < config.context:
        raise InputError(
            f"reference: its context of {reference.context} tokens is shorter than the policy's, "
            f"{config.context}"
        )
    result = Outline(config, tokenizer)
    left_out: Counter[str] = Counter()
    if future is not None and to_come([*recipe.data, *recipe.validation], future):
        return OfflineInputs(recipe, tokenizer, [], [], [], left_out, result)
    account = Account()
    training, aside = preference.split(recipe, tokenizer, left_out, account)
    pairs, kept = encode(training, tokenizer, config.context)
    use(training, kept, account)
    held_out_pairs, held_out = encode(aside, tokenizer, config.context)
    return OfflineInputs(
        recipe,
        tokenizer,
        list(pairs),
        list(held_out_pairs),
        held_out,
        left_out,
        result,
        account,
    )


def plan(recipe: OfflineRecipe, inputs: OfflineInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`."""
    config = shape(recipe.init)
    sides = 1 if recipe.unit == "answers" else 2
    if inputs is None or not inputs.training:  # not read, or still to be collected
        steps, batch = None, Batch.at_most(config.context, sides * recipe.batch_size)
    else:
        lengths = [len(side.tokens) for pair in inputs.training for side in pair]
        units = len(lengths) // sides
        batch = Batch.of(lengths, sides * min(recipe.batch_size, units))
        steps = Count(recipe.epochs * -(-units // recipe.batch_size))
    trained = [Model("policy", config, lora=recipe.lora)]
    frozen = [plans.reference(recipe, shape)]
    phases = [Phase("training", trained, frozen, training=True)]
    notes = [] if inputs is None else inputs.account.lines()
    return Work(phases, recipe.train, recipe.parallel, batch, steps, recipe.epochs, notes=notes)
