"""A model whose matrices, or whose tokens, are cut over ranks is the model of one process."""

import pytest
from parallel_models import gradients, refusals

from llama2rt.model import Llama, ScalarModel
from llama2rt.parallel import ParallelOptions

LENGTHS = [9, 0, 1, 15, 4]
WAYS = [
    ParallelOptions(tensor=2),
    ParallelOptions(context=2),
    ParallelOptions(context=2, tensor=2),
    ParallelOptions(context=4),
]


@pytest.mark.parametrize("kind", [Llama, ScalarModel])
@pytest.mark.parametrize("options", WAYS, ids=lambda o: f"context{o.context}-tensor{o.tensor}")
def test_outputs_and_gradients(on_ranks, options, kind):
    for distances in on_ranks(options.least_ranks, gradients, options, LENGTHS, kind):
        assert max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("lengths", [[1], [7, 9], [64], None], ids=str)
def test_any_number_of_tokens_and_shared_ones(on_ranks, lengths):
    options = ParallelOptions(context=2, tensor=2)
    for distances in on_ranks(4, gradients, options, lengths):
        assert max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("shape", [{"tied": True}, {"kv_heads": 4}], ids=str)
def test_other_shapes(on_ranks, shape):
    for distances in on_ranks(2, gradients, ParallelOptions(tensor=2), LENGTHS, Llama, shape):
        assert max(distances.values()) < 1e-5, distances


def test_what_cannot_be_done_is_refused_by_name(on_ranks):
    for said in on_ranks(4, refusals):
        assert said == {
            "vocabulary": "parallel.tensor: 2 processes cannot share vocab_size 1: expected at "
            "least one token for the last",
            "kind": "parallel.tensor: expected a llama2rt.model.transformer.Linear to cut, got "
            "torch.nn.modules.linear.Linear",
            "generate": "a model cut over context ranks: expected packed documents, got Paged; "
            "generate with `parallel.tensor_group`",
        }
