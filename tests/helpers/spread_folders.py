"""What ranks do in tests/parallel/test_model_folders_on_ranks.py."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import llama2rt
from llama2rt.checkpoint import hf, native
from llama2rt.checkpoint.load import load_sharded
from llama2rt.checkpoint.weight import Area, Weight
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.parallel import Mesh, ParallelOptions
from llama2rt.parallel.initialize import initialize
from llama2rt.parallel.parallelize import parallelize
from llama2rt.parallel.saving import save_model


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
