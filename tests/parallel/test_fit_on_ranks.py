"""Steps of each objective on meshes of processes equal those of one process.

The batches have documents of 2 to 40 tokens, so that ranks have unequal shares and fillers, several
micro-batches a step, and a gradient norm above the clip.
"""

import functools

import pytest
import torch
from parallel_training import train

from llama2rt.parallel import ParallelOptions

MESHES = {
    "shard-2": (2, ParallelOptions()),
    "shard-4": (4, ParallelOptions()),
    "hybrid-2x2": (4, ParallelOptions(data=2)),
    "tensor-2": (2, ParallelOptions(tensor=2)),
    "context-2": (2, ParallelOptions(context=2)),
    "shard-2-tensor-2": (4, ParallelOptions(tensor=2)),
    "context-2-tensor-2": (4, ParallelOptions(context=2, tensor=2)),
}


PIPELINES = {
    "pipeline-2": (2, ParallelOptions(pipeline=2)),
    "pipeline-2-shard-2": (4, ParallelOptions(pipeline=2)),
}


@functools.cache
def alone(kind: str, tied: bool = False) -> dict:
    torch.set_num_threads(1)
    return train(kind, ParallelOptions(), tied=tied)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_twenty_steps(kind, mesh, on_ranks):
    ranks, parallel = MESHES[mesh]
    agree(on_ranks(ranks, train, kind, parallel), alone(kind))


def test_a_tied_embedding(on_ranks):
    parallel = ParallelOptions()
    results = on_ranks(2, train, "sft", parallel, True)
    agree(results, alone("sft", tied=True))


@pytest.mark.parametrize("mesh", PIPELINES)
def test_a_pipeline(mesh, on_ranks):
    """Each stage has gradients and weights of its own; together they are the model's."""
    ranks, parallel = PIPELINES[mesh]
    results, expected = on_ranks(ranks, train, "sft", parallel), alone("sft")
    for part in ("gradients", "weights"):
        first, last = results[0][part], results[-1][part]
        assert not first.keys() & last.keys()
        for result in results:
            result[part] = first | last
    agree(results, expected)


def agree(results: list[dict], expected: dict) -> None:
    metrics, gradients = expected["metrics"], expected["gradients"]
    assert metrics["gradient_norm"][0] > 0.5  # the clip
    for result in results:
        assert result["metrics"].keys() == metrics.keys()
        for name, values in metrics.items():
            assert result["metrics"][name] == pytest.approx(
                values, rel=1e-5 if name == "loss" else 1e-4, abs=1e-5
            ), name
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (result["gradients"][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name
