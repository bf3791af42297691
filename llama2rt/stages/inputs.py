"""What a stage that samples starts from, opened in one call: everything its recipe names is read
and checked, models against each other, before any weights are loaded.

Weights come later, when a phase asks for them; frozen models that several phases use are loaded
once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from llama2rt.checkpoint import adapter
from llama2rt.data import mixture
from llama2rt.data.filters import NO_FILTERS, Filters
from llama2rt.data.mixture import Account
from llama2rt.data.records import Prompt
from llama2rt.data.sources import MixSource, Source
from llama2rt.errors import naming
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.adapters import WithoutAdapter
from llama2rt.parallel import Mesh, ParallelOptions, tensor_group, world
from llama2rt.rollout import metrics
from llama2rt.rollout.frozen import offload
from llama2rt.rollout.pairwise import PairwiseModel
from llama2rt.rollout.reward import RewardModels, RewardOptions
from llama2rt.rollout.sampling import Sampler, SamplingOptions, derived_seed
from llama2rt.run import Recipe, Run
from llama2rt.stages import loading, mixing, spread
from llama2rt.stages.loading import Future, Opened, Outline
from llama2rt.stages.spread import Model
from llama2rt.text.tokenizer import Tokenizer
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions


class RolloutRecipe(Recipe):
    """What the recipes of rejection sampling, PPO and online DPO have in common."""

    init: Path
    """the model that is trained"""
    reference: Path | None = None
    """the reference policy of the KL; None for init"""
    rewards: RewardOptions
    """the models that rank responses"""
    data: list[Source] = Field(default=[])
    """prompts: paths, or tables such as {path = "a.jsonl", kind = "safety"}"""
    sources: list[MixSource] = Field(default=[])
    """a mix of prompts in place of data, a [[sources]] table each: {path, format, kind, share}.
    Without a share all prompts go in; with one, so many are drawn as make up that share of all.
    One that holds too few is an error"""
    filters: Filters = NO_FILTERS
    """what is left out of data or sources, and of validation"""
    validation: list[Source] = Field(default=[])
    """held-out prompts for the report"""
    tokenizer: Path | None = None
    """None for the one of the model that samples"""
    sampling: SamplingOptions = SamplingOptions()
    """length of responses, and what sampling may take"""
    seed: int = Field(default=0, ge=0)
    """of the order of prompts and batches, and of sampling"""
    train: TrainOptions = TrainOptions()
    parallel: ParallelOptions = ParallelOptions()
    """how many processes share what"""
    lora: LoraOptions = LoraOptions()
    frozen: Literal["resident", "offloaded", "sharded"] = "resident"
    """where the reference policy and the models that rank are: whole on every process's GPU; there
    in the phases that use them alone and offloaded to the CPU's memory between (without a GPU it
    makes no difference); or sharded over all processes as what is trained is, which then read every
    answer together (one process has them whole)"""

    neutral: ClassVar[tuple[str, ...]] = (*Recipe.neutral, "frozen")

    @model_validator(mode="after")
    def _mixed(self) -> Self:
        mixing.check_sources(self.data, self.sources, self.filters, "prompt")
        return self

    @property
    def samples_trained(self) -> bool:
        """Whether weights that the run has trained answer prompts in it."""
        return True

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.validation and self.rewards.helpfulness is None:
            raise ValueError(
                "validation: held-out answers have nothing to be compared with: name "
                "rewards.helpfulness beside preference"
            )
        return self

    def check_server(self) -> None:
        """InputError where `sampling.server` cannot do what the run needs."""
        changes = "the model that is trained answers prompts" if self.samples_trained else None
        self.sampling.check_server(changes, adapter=self.lora.rank is not None)


class PolicyInputs(Opened):
    """The policy that is trained and the reference policy, of a recipe that names them as init and
    reference, with train, parallel, lora, frozen and seed."""

    recipe: Any
    tokenizer: Tokenizer
    result: Outline

    @functools.cached_property
    def reference(self) -> nn.Module:
        """The reference policy, in the compute dtype, frozen, as the recipe's `frozen` says. Where
        one process trains an adapter of init and the reference is init, it is that model without
        its adapter, and no second one; ranks train it in shards, which cannot be read alone."""
        folder = self.recipe.reference or self.recipe.init
        same = self.recipe.lora.rank is not None and folder.samefile(self.recipe.init)
        if same and world().size == 1:
            return WithoutAdapter(self.adapted)
        dtype = self.recipe.train.dtype
        build = functools.partial(loading.load_companion, folder, self.tokenizer, dtype)
        return self._frozen(build, folder)

    def _frozen(self, build: Callable[[loading.Device], Model], folder: Path) -> Model:
        if self.recipe.frozen == "sharded":
            return spread.to_read(build, folder, self.mesh, self.recipe.train.dtype)
        model = build(None).requires_grad_(False)
        return offload(model) if self.recipe.frozen == "offloaded" else model

    @property
    def mesh(self) -> Mesh:
        """The processes that share this run's models; all of them ask for it at once."""
        return Mesh.build(self.recipe.parallel, self.result.config)

    @functools.cached_property
    def adapted(self) -> Llama:
        """`under_adapter`, once: the one model of a LoRA run in one process."""
        return self.under_adapter()

    def under_adapter(self, device: loading.Device = None) -> Llama:
        """`init` under an adapter, which is drawn from the seed."""
        recipe = self.recipe
        model = loading.load_companion(recipe.init, self.tokenizer, recipe.train.dtype, device)
        recipe.lora.adapt(model, recipe.seed)
        return model

    def to_train(self, folder: Path, device: loading.Device = None) -> Llama:
        """The model in `folder` in fp32, for an optimizer, on `device`; where an adapter is
        trained, init under the adapter beside `folder`, or, asked for init before any other, under
        a fresh one."""
        if self.recipe.lora.rank is None:
            return loading.load_llama(folder, self.recipe.tokenizer, device=device)[0]
        # What an earlier iteration of several ranks has trained lies in shards.
        model = self.adapted if world().size == 1 else self.under_adapter(device)
        if folder != self.recipe.init:
            adapter.load(model, folder.with_name("adapter"))
        return model

    def to_fine_tune(self, device: loading.Device = None) -> Llama:
        """init in fp32, for a fresh start on other models' answers; its tokenizer is the policy's:
        init may hold none."""
        if self.recipe.lora.rank is None:
            return loading.load_companion(self.recipe.init, self.tokenizer, device=device)
        return self.to_train(self.recipe.init, device)

    def to_train_on(self, folder: Path, mesh: Mesh) -> Llama:
        """`to_train`, spread over `mesh`."""
        recipe = self.recipe
        stored = folder if recipe.lora.rank is None else recipe.init
        build = functools.partial(self.to_train, folder)
        return spread.from_folder(build, stored, mesh, recipe.train)


@dataclass(frozen=True)
class RolloutInputs(PolicyInputs):
    """All that such a recipe names, checked."""

    recipe: RolloutRecipe
    tokenizer: Tokenizer
    prompts: list[Prompt]
    held_out: list[Prompt]
    result: Outline
    """the model that the run will leave"""
    account: Account = field(default_factory=Account, kw_only=True)
    """what became of every prompt to train on"""

    @functools.cached_property
    def reward_models(self) -> RewardModels:
        """The models that rank, in the compute dtype, frozen."""
        train = self.recipe.train

        def load(folder: Path) -> ScalarModel:
            build = functools.partial(loading.load_scalar, folder, train.dtype, self.tokenizer)
            return self._frozen(build, folder)

        def load_pairwise(folder: Path) -> PairwiseModel:
            def build(device: loading.Device) -> Llama:
                return loading.load_llama(folder, dtype=train.dtype, device=device)[0]

            _, tokenizer = loading.load_llama(folder, device="meta")
            return PairwiseModel(self._frozen(build, folder), tokenizer, train.micro_tokens)

        return loading.load_reward_models(
            self.recipe.rewards, train.micro_tokens, load, load_pairwise
        )

    def policy(self, folder: Path) -> Sampler:
        """The model in `folder`, in the compute dtype, to sample from."""

        def build(device: torch.device | str) -> Llama:
            dtype = self.recipe.train.dtype
            return loading.load_llama(folder, self.recipe.tokenizer, dtype, device)[0]

        return self.sampler(spread.to_sample(build, folder, self.mesh), str(folder))

    def sampler(self, model: Llama, policy: str) -> Sampler:
        """What samples from `model` as it is at each call, and scores its answers."""
        sampling = self.recipe.sampling
        engine = sampling.engine(model, self.tokenizer)
        return Sampler(engine, self.reward_models, sampling.max_tokens, policy)

    def measure_held_out(self, model: Llama, run: Run) -> dict[str, float]:
        """`rollout.metrics.measure` on the held-out prompts of a model that `run` has trained: at
        temperature 1, with the same random numbers every time."""
        model.eval()  # an adapter may have dropout
        with tensor_group.gathered(model, self.mesh, self.recipe.train.dtype) as policy:
            return metrics.measure(
                run.samples_directory / "held_out.jsonl",
                self.sampler(policy, str(run.directory)),
                self.reference,
                self.held_out,
                seed=derived_seed(self.recipe.seed, "held-out"),
            )


def open_rollout(
    recipe: RolloutRecipe, future: Future | None = None, trained: Sequence[str] = ("init",)
) -> RolloutInputs:
    """Prompts and held-out prompts of a recipe whose `init` samples (ppo, dpo), read and checked
    with all its models, of which those under the keys `trained` are trained. InputError as
    `spread.check`, `loading.outlines`, `loading.read_prompts` and `SamplingOptions.check_server`.
    """
    recipe.check_server()
    tokenizer, models = outlines(recipe, future)
    for key in trained:
        spread.check(recipe.parallel, models[key].config, recipe.train, recipe.lora)
    policy = models.pop("init")
    account = Account()
    prompts = training_prompts(recipe, tokenizer, policy, models, account)
    held_out = held_out_prompts(recipe, tokenizer, policy, models)
    warn_of_shared(prompts, held_out, future)
    require_pairwise(recipe, prompts, future)
    result = Outline(policy.config, tokenizer)
    return RolloutInputs(recipe, tokenizer, prompts, held_out, result, account=account)


def outlines(
    recipe: RolloutRecipe, future: Future | None, **before: Path
) -> tuple[Tokenizer, dict[str, Outline]]:
    """The tokenizer of the model that samples, and what each model of the recipe is by its key (see
    `loading.outlines`). `before`: models by key that come before init, the first of them samples
    then. InputError too where a model that is only sampled from, or read, cannot be cut as the
    recipe says."""
    recipe.lora.check()
    models = {
        **before,
        "init": recipe.init,
        "reference": recipe.reference,
        "rewards.helpfulness": recipe.rewards.helpfulness,
        "rewards.safety": recipe.rewards.safety,
    }
    tokenizer, found = loading.outlines(recipe.tokenizer, models, future)
    sampling = next(iter(found))
    for key, model in found.items():
        if key != "init" and (key == sampling or recipe.frozen == "sharded"):
            with naming(key):
                spread.check(recipe.parallel, model.config, recipe.train)
    return tokenizer, found


def training_prompts(
    recipe: RolloutRecipe,
    tokenizer: Tokenizer,
    policy: Outline,
    readers: Mapping[str, Outline],
    account: Account,
) -> list[Prompt]:
    """The prompts of data, or the mix of those of sources, that the filters leave and that fit (as
    `loading.read_prompts`, within what the recipe lets sampling take); `account` is told what
    becomes of each."""
    table = "sources" if recipe.sources else "data"
    by_source = _read_prompts(recipe, table, tokenizer, policy, readers, account)
    if recipe.sources:
        prompts = mixture.mix(recipe.sources, by_source, recipe.seed, account)
    else:
        prompts = [prompt for source in by_source for prompt in source]
    account.use(prompts)
    return prompts


def held_out_prompts(
    recipe: RolloutRecipe, tokenizer: Tokenizer, policy: Outline, readers: Mapping[str, Outline]
) -> list[Prompt]:
    """The prompts of validation in the same way; none where there is none."""
    if not recipe.validation:
        return []
    by_source = _read_prompts(recipe, "validation", tokenizer, policy, readers, Account())
    return [prompt for source in by_source for prompt in source]


def _read_prompts(
    recipe: RolloutRecipe,
    table: str,
    tokenizer: Tokenizer,
    policy: Outline,
    readers: Mapping[str, Outline],
    account: Account,
) -> list[list[Prompt]]:
    sources: Sequence[Source] = getattr(recipe, table)
    cache = loading.CacheLimit(
        recipe.sampling.cache_bytes, recipe.train.dtype, recipe.parallel.tensor
    )

    def fit(prompts: list[Prompt]) -> list[Prompt]:
        names = ", ".join(map(str, sources))
        longest = recipe.sampling.max_tokens
        return loading.fitting_prompts(prompts, names, tokenizer, policy, longest, readers, cache)

    read = mixing.read(sources, recipe.filters, tokenizer, account, table)
    return mixing.fitting(read, fit, account)


def require_pairwise(recipe: RolloutRecipe, prompts: list[Prompt], future: Future | None) -> None:
    """InputError where the recipe names a preference model that could not compare two answers to
    each of `prompts`."""
    if recipe.rewards.preference is not None:
        folder, longest = recipe.rewards.preference, recipe.sampling.max_tokens
        loading.require_pairwise(folder, prompts, longest, future)


def warn_of_shared(prompts: list[Prompt], held_out: list[Prompt], future: Future | None) -> None:
    """`loading.warn_of_shared`, unless a plan is being checked: the step's own run says it then."""
    if future is None:
        loading.warn_of_shared((p.messages for p in prompts), (p.messages for p in held_out))
