"""Online iterative direct preference learning (Algorithm 1 of RLHF Workflow, arXiv 2405.07863).

Each iteration: sample n responses a prompt from the policy so far, rank them by reward, add best
against worst to the history, and run DPO on the whole history, starting from the previous
iteration's model. The reference policy is the same in every iteration. An iteration is a run of its
own below the stage's directory, with its samples, pairs, metrics and model. Offline comparisons may
be part of the history, a second agent may answer beside the policy (`exploration`), and the loss
may be of all n answers or of answers by themselves (`direct`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from llama2rt import report
from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.model import Llama
from llama2rt.parallel import Mesh
from llama2rt.planning import Count, Model, Phase, Work
from llama2rt.rollout import metrics
from llama2rt.rollout.responses import Response
from llama2rt.rollout.sampling import SamplingOptions, derived_seed, draw
from llama2rt.run import Change, Run
from llama2rt.stages import adapters, direct, exploration, history, loading, mixing, offline, plans
from llama2rt.stages.comparisons import messages_key
from llama2rt.stages.direct import DirectRecipe
from llama2rt.stages.exploration import SecondAgent
from llama2rt.stages.history import History
from llama2rt.stages.inputs import RolloutInputs, RolloutRecipe, open_rollout
from llama2rt.stages.loading import Future
from llama2rt.stages.offline import Comparisons
from llama2rt.stages.pairs import OFFLINE_SUMS, PAIRS, REFERENCE_SUMS, write_pairs
from llama2rt.train.loop import fit


class DpoRecipe(DirectRecipe, RolloutRecipe):
    """Improve a policy by DPO on its own ranked samples, in iterations."""

    init: Path
    """the model the first iteration starts from, such as SFT's"""
    reference: Path | None = None
    """the reference policy of every iteration; None for init"""

    iterations: int = Field(default=3, gt=0)
    """T: how often to sample, rank and train"""
    prompts_per_iteration: int = Field(default=20_000, gt=0)
    """m, or all prompts where there are fewer"""
    samples: int = Field(default=8, gt=0)
    """n: best-of-n against worst-of-n"""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0, 0.7], min_length=1)
    """of equal shares of the samples; no top-k, no top-p"""
    second: SecondAgent = SecondAgent()
    """a second agent, whose answers are compared with the policy's"""
    sampling: SamplingOptions = SamplingOptions(max_tokens=2048)
    """length of responses, and what sampling may take; a response that is cut is compared as it
    stands, without an EOS"""
    length_penalty: float = Field(default=0.0, ge=0)
    """reward taken off per character when ranking"""
    epochs: int = Field(default=2, gt=0)
    """over the history, in each iteration"""
    offline: list[Source] = Field(default=[])
    """files of comparisons that are part of the history from the first iteration on"""
    offline_share: float | None = Field(default=None, gt=0, lt=1)
    """of the history in each iteration, drawn at random, or all comparisons where there are too
    few; None for all from the start"""
    offline_filters: Filters = NO_FILTERS
    """what is left out of offline"""

    @property
    def samples_trained(self) -> bool:
        return self.iterations > 1 or bool(self.validation)

    def change(self, key: str, begun: Mapping[str, Any]) -> Change:
        """Further iterations follow those there are, whatever the schedule: each has its own."""
        if key == "iterations" and self.iterations > begun[key]:
            return "longer"
        return super().change(key, begun)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.length_penalty and self.rewards.ranking == "tournament":
            raise ValueError(
                "length_penalty: a tournament's standings are no rewards: take ranking win_rate"
            )
        if self.samples + self.second.samples < 2:
            raise ValueError("samples: expected at least 2 answers to compare, of both agents")
        if self.second.samples and self.sampling.server is not None:
            raise ValueError("second: a server has the policy's weights alone: sample here")
        if len(set(self.temperatures)) < len(self.temperatures):
            # A sample's random numbers depend on its temperature: it would be drawn twice.
            raise ValueError(f"temperatures: expected different ones, got {self.temperatures}")
        if self.samples % len(self.temperatures):
            raise ValueError(
                f"samples: {self.samples} is no multiple of the {len(self.temperatures)} "
                "temperatures"
            )
        if not self.offline and (self.offline_share is not None or self.offline_filters.active):
            raise ValueError("offline: names no files, so a share or filters of them say nothing")
        self.offline_filters.require_meaning("comparison")
        for source in self.offline:
            if source.held_out is not None:
                raise ValueError(f"offline: {source}: held_out: nothing is measured on them here")
        return self


@dataclass(frozen=True)
class DpoInputs(RolloutInputs):
    """What this stage reads besides."""

    offline: Comparisons


def run(recipe: DpoRecipe, directory: Path, *, resume: bool = False) -> Path:
    """All iterations; returns the last one's model folder."""
    run = Run.open(directory, recipe, inputs=loading.file_inputs(recipe), resume=resume)
    if run.complete:
        return run.model_directory
    inputs = open_inputs(recipe)
    mixing.record(run, inputs.account)
    inputs.offline.record(run)
    mesh = Mesh.build(recipe.parallel, inputs.result.config)
    reference = run.manifest["inputs"]["reference" if recipe.reference else "init"]["sha256"]
    run.truncate_metrics(0)
    past = Past(recipe, inputs, reference)
    policies = [recipe.init]
    parents: list[Path] = []
    numbers: dict[str, Any] = {}
    for iteration in range(recipe.iterations):
        step = Run.open(
            directory / f"iteration-{iteration + 1}",
            # An iteration depends on those before it, not on how many are to follow.
            recipe.model_copy(update={"iterations": iteration + 1}),
            inputs={"policy": policies[-1]},
            parents=parents,
            resume=True,
        )

        # Sample, rank, and add to the history, with the reference's sums.
        count = min(recipe.prompts_per_iteration, len(inputs.prompts))
        prompts = draw(inputs.prompts, count, recipe.seed, iteration)
        sampled = exploration.answers(recipe, inputs, policies, prompts, iteration, step)
        pairs = history.best_against_worst(sampled, recipe.length_penalty)
        write_pairs(step.directory / PAIRS, pairs)
        past.add(sampled, step)

        # Learn from the history, going on from this iteration's policy.
        if not step.complete:
            model = learn(recipe, inputs, policies[-1], past.history, iteration, step, mesh)
            numbers = {
                "prompts": len(sampled),
                "new_pairs": len(pairs),
                **past.numbers(),
                **exploration.numbers(recipe, sampled, pairs),
                **metrics.summary([r for group in sampled for r in group[: recipe.samples]]),
            }
            if inputs.held_out:
                held_out = inputs.measure_held_out(model, step)
                numbers |= {f"held_out/{name}": value for name, value in held_out.items()}
            report.finish(step, numbers)
            del model
        numbers = step.manifest["summary"]
        run.log(iteration + 1, **numbers)
        policies.append(step.model_directory)
        parents = [step.directory]

    final = inputs.to_train_on(policies[-1], mesh)  # as saved: masters stay fp32
    adapters.save(final, inputs.tokenizer, run, recipe.init)
    report.finish(run, {"iterations": recipe.iterations, **numbers})
    return run.model_directory


def open_inputs(recipe: DpoRecipe, future: Future | None = None) -> DpoInputs:
    """All that the recipe names, read and checked before any weights are loaded. InputError as from
    `open_rollout`, `offline.read` and `SecondAgent.check`."""
    opened = open_rollout(recipe, future)
    recipe.second.check(recipe, future)
    found = Comparisons([])
    if recipe.offline:
        reading = offline.Wanted(recipe.offline, recipe.offline_filters, recipe.seed)
        held_out = {messages_key(prompt.messages) for prompt in opened.held_out}
        found = offline.read(
            reading, opened.tokenizer, opened.result.config.context, held_out, future
        )
    rest = (opened.prompts, opened.held_out, opened.result)
    return DpoInputs(recipe, opened.tokenizer, *rest, found, account=opened.account)


def plan(recipe: DpoRecipe, inputs: DpoInputs | None, shape: plans.Shape) -> Work:
    """For `--dry-run`: every prompt gives a pair (all its answers, where the loss is of those), and
    the history grows by one batch of them an iteration."""
    policy = Model("policy", shape(recipe.init), lora=recipe.lora)
    ranking = plans.reward_models(recipe, shape)
    frozen = [*ranking, plans.reference(recipe, shape)]
    lengths = None if inputs is None else plans.prompt_lengths(inputs.prompts, inputs.tokenizer)
    prompts = min(recipe.prompts_per_iteration, len(lengths or ()) or recipe.prompts_per_iteration)
    compared = recipe.samples + recipe.second.samples
    drawn = recipe.samples + recipe.second.samples * recipe.second.best_of
    # Of one pair a prompt the reference reads both sides; of the others nothing.
    answers = recipe.iterations * prompts * drawn
    sampling = plans.sampling_of(policy, recipe.sampling, lengths, answers, ranking)
    new = prompts * (compared if recipe.unit == "answers" else 1)
    known = len(inputs.offline.pairs) * (2 if recipe.unit == "answers" else 1) if inputs else 0
    steps = 0
    for iteration in range(recipe.iterations):
        online = new * (iteration + 1)
        total = online + offline_count(recipe, online, known)
        steps += recipe.epochs * -(-total // recipe.batch_size)
    documents = {"pairs": 2, "groups": compared, "answers": 1}[recipe.unit]
    offline_notes = inputs.offline.account.lines() if inputs else []
    return Work(
        [
            Phase("sampling", frozen=frozen, sampling=sampling),
            Phase("training", [policy], frozen, training=True),
        ],
        recipe.train,
        recipe.parallel,
        plans.answers_batch(sampling, documents * recipe.batch_size),
        Count(steps, "at most: every prompt gives a pair"),
        recipe.epochs,
        notes=[
            f"{recipe.iterations} iterations over {prompts:,} prompts each",
            *mixing.notes(recipe, inputs),
            *offline_notes,
            *(
                ["second.model is counted as one of the policy's size"]
                if recipe.second.model
                else []
            ),
            *plans.comparing(recipe, compared),
        ],
    )


def offline_count(recipe: DpoRecipe, online: int, known: int) -> int:
    """How many of the `known` offline units are in a history with so many `online` ones."""
    share = recipe.offline_share
    return known if share is None else min(known, round(online * share / (1 - share)))


class Past:
    """The history so far: what was sampled, and what of the offline comparisons goes with it."""

    def __init__(self, recipe: DpoRecipe, inputs: DpoInputs, reference: str) -> None:
        """`reference`: the hash of the reference policy's folder."""
        self._recipe, self._inputs, self._reference = recipe, inputs, reference
        self._context = inputs.result.config.context
        self.history = History()
        self._online = self._taken = 0
        pairs = inputs.offline.pairs
        self._offline = History()
        if pairs:
            order = torch.randperm(
                len(pairs),
                generator=torch.Generator().manual_seed(derived_seed(recipe.seed, "offline")),
            )
            drawn = [pairs[i] for i in order.tolist()]
            self._offline = history.of_comparisons(drawn, recipe.unit, self._context)

    def add(self, sampled: Sequence[Sequence[Response]], step: Run) -> None:
        """An iteration's scored answers, with the reference's sums, kept in its directory, and as
        many offline comparisons as the recipe wants beside all that was sampled so far. InputError
        where there is nothing to learn from."""
        recipe = self._recipe
        earlier = [*self.history.groups, *self._offline.groups]
        new = history.of_samples(
            sampled, recipe.unit, recipe.length_penalty, recipe.alpha, self._context, earlier
        )
        self._online += len(new.groups)
        wanted = offline_count(recipe, self._online, len(self._offline.groups))
        for part, name in (
            (new, REFERENCE_SUMS),
            (self._offline.part(self._taken, wanted), OFFLINE_SUMS),
        ):
            path = step.directory / name
            known = direct.with_reference(recipe, part, self._inputs, self._reference, path)
            self.history.add(known)
        self._taken = max(wanted, self._taken)
        if not self.history.groups:
            raise InputError(f"{step.directory}: no prompt gave two different answers to compare")

    def numbers(self) -> dict[str, int]:
        """How many units the history has, and how many of them are offline."""
        found: dict[str, int] = {self._recipe.unit: len(self.history.groups)}
        if self._recipe.offline:
            found["offline"] = self._taken
        if self._recipe.unit == "answers":
            found["desirable"] = int(self.history.extras["desirable"].sum())
        return found


def learn(
    recipe: DpoRecipe,
    inputs: RolloutInputs,
    policy_folder: Path,
    past: History,
    iteration: int,
    step: Run,
    mesh: Mesh,
) -> Llama:
    """The policy after `epochs` through the history, also saved as the iteration's model."""
    model = inputs.to_train_on(policy_folder, mesh)
    loader = direct.loader(recipe, past, derived_seed(recipe.seed, "order", iteration), mesh)
    steps = recipe.epochs * loader.steps_per_epoch
    loss = direct.loss(recipe, mesh)
    options = recipe.train
    fit(step, model, loader, loss, options, steps=steps, mesh=mesh, survey=loss.survey)
    adapters.save(model, inputs.tokenizer, step, recipe.init)
    return model
