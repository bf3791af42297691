"""What ranks do in tests/parallel/test_rollouts.py and test_whole.py."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pocket import Killed
from spread_folders import nothing_whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llama2rt.checkpoint.files import weights
from llama2rt.data.records import Prompt
from llama2rt.data.shared import pack_shared
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.parallel import Mesh, ParallelOptions, world
from llama2rt.parallel import whole as gathered
from llama2rt.parallel.shards import local_part
from llama2rt.parallel.tensor_group import gathered as gathered_in_groups
from llama2rt.pipeline import iterate
from llama2rt.planning import Model as Planned
from llama2rt.planning import inference
from llama2rt.planning.memory import Setting
from llama2rt.report.plot import Plot
from llama2rt.rollout import balance, sampling
from llama2rt.rollout.logprobs import response_logprobs
from llama2rt.rollout.responses import response_example
from llama2rt.rollout.reward import RewardModels
from llama2rt.rollout.sampling import Sampler, SamplingOptions
from llama2rt.stages import STAGES, loading, ppo, spread
from llama2rt.train import TrainOptions

CONFIG = LlamaConfig(
    dim=32, layers=2, heads=4, kv_heads=2, ffn_hidden=48, vocab_size=65, context=32
)


def spread_items(costs: list[float], together: list[int] | None = None) -> dict[str, Any]:
    """What a rank was given, and what all of them have."""
    mine: list[int] = []

    def work(indices: list[int]) -> list[str]:
        mine.extend(indices)
        return [f"{index} by {world().rank}" for index in indices]

    found = balance.spread(lambda: costs, work, len(costs), together)
    return {"mine": mine, "found": found}


def spread_failing(costs: list[float]) -> tuple[str, bool]:
    def work(indices: list[int]) -> list[int]:
        if world().rank == 1:
            raise InputError("rank 1's prompt")
        return indices

    try:
        balance.spread(lambda: costs, work, len(costs))
    except InputError as error:
        return str(error), getattr(error, "everywhere", False)
    raise AssertionError("nothing was raised")


def rolled_out(
    pocket: Any, prompts: list[Prompt], n: int, options: ParallelOptions | None = None
) -> dict[str, Any]:
    """Responses to the prompts, and everything that is measured of them: by models that are whole
    on every rank, or spread over them as `options` say."""
    model, tokenizer = loading.load_llama(pocket.sft)
    reference = model
    if options is not None:
        mesh = Mesh.build(options, model.config)
        language = functools.partial(loading.load_companion, pocket.sft, tokenizer, torch.float32)
        model = spread.to_sample(language, pocket.sft, mesh)
        reference = spread.to_read(language, pocket.sft, mesh, torch.float32)

    def scalar(folder: Path) -> ScalarModel:
        build = functools.partial(loading.load_scalar, folder, torch.float32, tokenizer)
        return build() if options is None else spread.to_read(build, folder, mesh, torch.float32)

    models = RewardModels(scalar(pocket.helpfulness), scalar(pocket.safety), micro_tokens=64)
    if options is not None:
        setting = Setting(mesh.degrees, 4, 64, 1)
        for shared in (reference, *models.by_name.values()):
            scalar_model = isinstance(shared, ScalarModel)
            planned = Planned("frozen", shared.config, scalar_model, held="sharded")
            said = inference.frozen(planned, setting)
            assert abs(held_bytes(shared) / said - 1) < 0.1
    engine = SamplingOptions(max_tokens=8).engine(model, tokenizer)
    sampler = Sampler(engine, models, 8, "policy")
    completions = sampler.complete(prompts, n=n, temperature=1.0, seed=5)
    responses = sampler.score(completions, prompts, temperature=1.0, seed=5)
    examples = [response_example(response) for response in responses]
    logprob, entropy = balance.logprobs(model, examples, 1.0, 64)
    paired = [i // 2 for i in range(len(examples))]
    of_reference, _ = balance.logprobs(reference, examples, 1.0, 64, paired, pack_shared)
    if options is None:
        values = balance.values(models.helpfulness, examples, 64)
    else:
        build = functools.partial(loading.load_scalar, pocket.helpfulness, torch.float32, tokenizer)
        critic = spread.from_folder(build, pocket.helpfulness, mesh, TrainOptions())
        with gathered_in_groups(critic, mesh, torch.float32) as whole_critic:
            values = balance.values(whole_critic, examples, 64)
    return {
        "tokens": [response.tokens for response in responses],
        "prompts": [response.prompt.id for response in responses],
        "rewards": [[r.reward, *r.scores.values()] for r in responses],
        "rescored": [r.reward for r in balance.rescored(models, responses)],
        "sampled": [p for completion in completions for p in completion.logprobs],
        "logprob": logprob.tolist(),
        "entropy": entropy.tolist(),
        "reference": of_reference.tolist(),
        "values": values.tolist(),
    }


def held_bytes(model: torch.nn.Module) -> int:
    """Of a model's weights, what this rank has."""
    return sum(local_part(parameter.detach()).nbytes for parameter in model.parameters())


def model_of(kind: str, tied: bool = False) -> Llama | ScalarModel:
    if kind == "scalar":
        return ScalarModel(CONFIG, dtype=torch.float32).initialize(3)
    config = LlamaConfig(**{**vars(CONFIG), "tied": tied})
    return Llama(config, dtype=torch.float32).initialize(3)


def cut_into_shards(model: torch.nn.Module, layout: str) -> None:
    """FSDP over all ranks, hybrid, or FSDP above matrices that lie in two pieces already."""
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world().size,))
    else:
        names = ("replicate", "shard") if layout == "hybrid" else ("shard", "tensor")
        mesh = init_device_mesh("cpu", (2, world().size // 2), mesh_dim_names=names)
    if layout == "tensor":
        for name, parameter in list(model.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            # Rows of some, columns of others; norms stay whole.
            if parameter.ndim == 2 and parameter.shape[0] % 2 == 0:
                where = Shard(1 if attribute == "weight" and ".down" in name else 0)
                cut = distribute_tensor(parameter.detach(), mesh["tensor"], [where])
                setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(cut))
        mesh = mesh["shard"]
    for module in (*model.transformer.blocks, model):
        fully_shard(module, mesh=mesh)


def gathered_again(kind: str, layout: str, tied: bool = False) -> dict[str, Any]:
    """A model cut and made whole: what the copy computes, and what it leaves."""
    model, expected = model_of(kind, tied), model_of(kind, tied)
    cut_into_shards(model, layout)
    tokens = torch.arange(12) % 7
    batch = tokens, torch.arange(12), torch.tensor([0, 12], dtype=torch.int32)
    targets = (tokens.roll(-1),) if kind == "llama" else ()
    with gathered.whole(model) as plain, torch.no_grad():
        parts = {
            "equal": torch.equal(plain(*batch, *targets), expected(*batch, *targets)),
            "plain": not any(isinstance(p, DTensor) for p in plain.parameters()),
            "frozen": not any(p.requires_grad for p in plain.parameters()),
            "names": [n for n, _ in plain.named_parameters()]
            == [n for n, _ in expected.named_parameters()],
        }
    with gathered.whole(model, torch.bfloat16) as half:
        parts["rounded"] = all(
            torch.equal(p, q.to(torch.bfloat16))
            for p, q in zip(half.parameters(), expected.parameters(), strict=True)
        )
    parts["freed"] = all(p.numel() == 0 for m in (plain, half) for p in m.parameters())
    name, parameter = list(weights(model).items())[-1]
    value = torch.full(parameter.shape, 0.5)
    gathered.assign(parameter, value)
    parts["assigned"] = torch.equal(dict(gathered.whole_tensors(model))[name], value)
    return parts


def refused() -> str:
    """What is said where rank 1 has too little memory for the whole model."""
    model = model_of("llama")
    cut_into_shards(model, "fsdp")
    free = gathered.free_bytes
    gathered.free_bytes = lambda device: 1000 if world().rank == 1 else 10**12
    try:
        with gathered.whole(model):
            raise AssertionError("it was gathered all the same")
    except InputError as error:
        return str(error)
    finally:
        gathered.free_bytes = free


def counting_judge(named: Path) -> Callable[[Prompt, str], float]:
    """Prefers long answers; adds a line to the file whose path `named` holds for each it reads."""
    log = Path(named.read_text())

    def judge(prompt: Prompt, text: str) -> float:
        with log.open("a") as lines:
            lines.write(f"{prompt.id}\n")
        return float(len(text))

    return judge


def run_stage(stage: str, recipe: Any, directory: Path) -> str:
    """A whole run of a stage by all ranks, or what is left of it; files hold 4 prompts."""
    with small_files(), plain_pages(), nothing_whole():
        return str(STAGES[stage].run(recipe, directory, resume=True))


def run_plan(settings: dict[str, Any], directory: Path) -> str:
    """`llama2rt iterate` by all ranks."""
    recipe = iterate.IterateRecipe.model_validate(settings)
    with plain_pages(), nothing_whole():
        return str(iterate.run(recipe, directory, resume=True))


def refused_plan(settings: dict[str, Any], directory: Path) -> str:
    """What a rank says of a plan that cannot be."""
    try:
        run_plan(settings, directory)
    except InputError as error:
        return str(error)
    raise AssertionError("it was carried out")


def ppo_parts(recipe: ppo.PpoRecipe) -> dict[str, Any]:
    """The first iteration of PPO, in parts: its rollout, and one round of mini-batches."""
    inputs = ppo.open_inputs(recipe)
    with nothing_whole(2):
        actors = ppo.load_actors(recipe, inputs)
    explained = ppo.start_critic(recipe, inputs, actors)
    rollout, measured = ppo.collect(recipe, inputs, actors, 0)
    # The path that training takes, through shards, on what was measured on gathered weights.
    again, _ = response_logprobs(actors.policy, rollout.examples, recipe.temperature, 40)
    improved = ppo.improve(recipe, actors, rollout, 0)
    with gathered.whole(actors.policy) as policy, gathered.whole(actors.critic) as critic:
        weights = {
            f"{name}.{key}": tensor.detach().clone()
            for name, model in (("policy", policy), ("critic", critic))
            for key, tensor in model.named_parameters()
        }
    return {
        "explained": explained,
        "ratio": (again - rollout.logprob).exp(),
        "measured": measured,
        "improved": improved,
        "tokens": [example.tokens.tolist() for example in rollout.examples],
        "advantages": rollout.advantages,
        "values": rollout.values,
        "weights": weights,
    }


def stop_sampling(stage: str, recipe: Any, directory: Path, calls: int) -> None:
    """A run that every rank leaves, as if killed, when it would sample for the `calls`-th time;
    files hold 4 prompts."""
    original, count = Sampler.responses, 0

    def counted(self: Sampler, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return original(self, *args, **kwargs)

    with small_files():
        Sampler.responses = counted  # type: ignore[method-assign]
        try:
            STAGES[stage].run(recipe, directory)
        except Killed:
            return
        finally:
            Sampler.responses = original  # type: ignore[method-assign]
    raise AssertionError(f"sampled {count} times")


@contextmanager
def plain_pages() -> Iterator[None]:
    """Inside, pages have no drawings, which take longer than runs this short."""
    before, Plot.svg = Plot.svg, lambda plot, salt="": "<svg></svg>"  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plot.svg = before  # type: ignore[method-assign]


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, files of samples hold 4 prompts."""
    before, sampling.PROMPTS_PER_FILE = sampling.PROMPTS_PER_FILE, 4
    try:
        yield
    finally:
        sampling.PROMPTS_PER_FILE = before
