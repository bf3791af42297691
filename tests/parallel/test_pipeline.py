"""Which stage has what, and what a pipeline does not do. Its training: test_fit_on_ranks.py."""

import pytest
from parallel_models import pipeline_refusals

from llama2rt.errors import InputError
from llama2rt.model import LlamaConfig
from llama2rt.parallel.mesh import check
from llama2rt.parallel.pipeline import stage_of

DEGREES = {"pipeline": 2, "data": 1, "shard": 2, "context": 1, "tensor": 1}
SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_hidden": 64, "vocab_size": 64}


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (4, 2, [0, 0, 1, 1]),
        (5, 2, [0, 0, 0, 1, 1]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_layers_are_shared_out_evenly(layers, stages, expected):
    names = [f"transformer.blocks.{layer}.query.weight" for layer in range(layers)]
    assert [stage_of(name, layers, stages) for name in names] == expected
    assert stage_of("transformer.embedding.weight", layers, stages) == 0
    for name in ("transformer.norm.weight", "output.weight"):
        assert stage_of(name, layers, stages) == stages - 1


@pytest.mark.parametrize(
    ("degrees", "shape", "message"),
    [
        (
            {"tensor": 2},
            {},
            "parallel.pipeline: does not stack with parallel.tensor: expected 1 of",
        ),
        ({"context": 2}, {}, "parallel.pipeline: does not stack with parallel.context: expected 1"),
        ({}, {"tied": True}, "parallel.pipeline: expected a model whose output matrix is not its"),
    ],
    ids=str,
)
def test_what_it_does_not_stack_with(degrees, shape, message):
    with pytest.raises(InputError, match=message):
        check(DEGREES | degrees, LlamaConfig(**SHAPE, **shape))


def test_what_cannot_be_done_is_refused_by_name(on_ranks):
    for said in on_ranks(2, pipeline_refusals):
        assert said == {
            "stage of training": "parallel.pipeline: expected 1, but in pretraining and SFT",
            "scalar": "parallel.pipeline: expected a language model without adapters: pretraining "
            "and SFT of all weights alone",
            "hidden": "hidden states of a pipeline",
            "gradients": "a pipeline's gradients are those of train.fit's steps",
            "entropy": "a pipeline takes whole documents and targets, got {'entropy': True}",
        }
