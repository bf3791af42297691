"""What ranks do in tests/parallel/test_model_folders_on_ranks.py, and what whole stages there are
watched for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import llama2rt
from llama2rt.checkpoint import hf, native
from llama2rt.checkpoint.load import load_sharded
from llama2rt.checkpoint.weight import Area, Weight
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.model.adapters import adapt
from llama2rt.parallel import Mesh, ParallelOptions, world
from llama2rt.parallel import parallelize as parallelizing
from llama2rt.parallel.initialize import initialize
from llama2rt.parallel.parallelize import parallelize
from llama2rt.parallel.saving import save_model
from llama2rt.stages import spread
from llama2rt.train import TrainOptions


def same_parts(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        like = theirs[name]
        assert type(parameter) is type(like), name
        if isinstance(like, DTensor):
            assert isinstance(parameter, DTensor) and parameter.placements == like.placements, name
            parameter, like = parameter.to_local(), like.to_local()
        assert torch.equal(parameter, like), name
    return True


def load_parts(folder: Path, options: ParallelOptions) -> float:
    """Spread on the meta device, then read; the part of the model's bytes that this rank read."""
    model, _ = llama2rt.load(folder, "meta")
    mesh = Mesh.build(options, model.config, pipelined=True)
    parallelize(model, mesh)
    assert all(parameter.is_meta for parameter in model.parameters())
    read: list[int] = []
    original = Weight.read

    def counted(self: Weight, area: Area | None = None) -> torch.Tensor:
        part = original(self, area)
        read.append(part.nbytes)
        return part

    Weight.read = counted  # type: ignore[method-assign]
    try:
        load_sharded(folder, model, "cpu")
    finally:
        Weight.read = original  # type: ignore[method-assign]
    whole, _ = llama2rt.load(folder)
    parallelize(whole, mesh)
    assert same_parts(model, whole)
    return sum(read) / (whole.config.parameters * 4)


def draw_parts(config: LlamaConfig, scalar: bool, options: ParallelOptions) -> bool:
    kind = ScalarModel if scalar else Llama
    with torch.device("meta"):
        model = kind(config)
    mesh = Mesh.build(options, config, pipelined=True)
    parallelize(model, mesh)
    initialize(model, 7, "cpu")
    whole = kind(config).initialize(7)
    parallelize(whole, mesh)
    return same_parts(model, whole)


def save_parts(folder: Path, out: Path, options: ParallelOptions, layout: str) -> None:
    model, _ = llama2rt.load(folder)
    parallelize(model, Mesh.build(options, model.config, pipelined=True))
    save_model(model, None, out, hf.save if layout == "hf" else native.save)


def save_in_the_way(folder: Path, out: Path) -> tuple[str, bool]:
    try:
        save_parts(folder, out, ParallelOptions(), "native")
    except InputError as error:
        return str(error), getattr(error, "everywhere", False)
    return "", False


@contextmanager
def nothing_whole(least: int = 1) -> Iterator[None]:
    """Inside, ranks must cut `least` models to train or more, and none of which they hold more at
    that time than what no folder has: an adapter, a new head."""
    original, found = parallelizing.shard, []

    def watched(model: Llama | ScalarModel, *arguments: Any) -> None:
        found.append([name for name, p in model.named_parameters() if not p.is_meta])
        original(model, *arguments)

    parallelizing.shard = watched
    try:
        yield
    finally:
        parallelizing.shard = original
    if world().size > 1:
        assert len(found) >= least
    for held in found:
        assert all(".lora_" in name or name == "head.weight" for name in held), held


def new_head(folder: Path, adapter: bool, device: str) -> ScalarModel:
    """A reward model to train, from the language model in `folder`."""
    llama, _ = llama2rt.load(folder, device, torch.float32)
    assert isinstance(llama, Llama)
    model = ScalarModel.from_llama(llama, 3)
    if adapter:
        adapt(model, rank=2, alpha=4.0, seed=5)
    return model


def start_parts(folder: Path, adapter: bool, options: ParallelOptions) -> bool:
    """Read into what has a head of its own, and perhaps an adapter, as the whole is cut."""
    whole = new_head(folder, adapter, "cpu")
    mesh = Mesh.build(options, whole.config)
    parallelize(whole, mesh)
    model = spread.from_folder(partial(new_head, folder, adapter), folder, mesh, TrainOptions())
    return same_parts(model, whole)
