"""A patched Llama's token embedding: its gradient is summed in fp32, and pads learn nothing."""

import torch
from patched_llama import VOCABULARY, both
from torch import nn


def gradients(tokens: torch.Tensor, dtype: torch.dtype, **settings) -> list[torch.Tensor]:
    """Of the embedding, of the sum of its rows: patched, and as transformers made it."""
    found = []
    for model in both(**settings):
        part = model.to(dtype).get_input_embeddings()
        part(tokens).backward(torch.ones(*tokens.shape, part.weight.shape[1], dtype=dtype))
        found.append(part.weight.grad)
    return found


def test_more_than_256_of_one_token_all_count_in_bf16():
    tokens = torch.full((4, 1024), 7)
    tokens[:, 0] = torch.arange(1, 5)
    ours, theirs = gradients(tokens, torch.bfloat16, pad_token_id=None)
    assert ours[7].tolist() == [4096.0] * 64  # 4092 ones, to the nearest of bf16
    assert ours[1:5].eq(1).all() and ours.sum(1).count_nonzero() == 5
    assert theirs[7, 0] < 4096  # where torch's has become right, this class is no longer needed


def test_padding_learns_nothing():
    tokens = torch.randint(0, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    tokens[:, :10] = 0
    ours, theirs = gradients(tokens, torch.float32, pad_token_id=0)
    assert torch.equal(ours, theirs) and not ours[0].any() and ours.any()


def test_an_embedding_of_another_kind_is_left_alone():
    class Other(nn.Embedding):
        pass

    from patched_llama import a_model

    from llama2rt.integrations.transformers import patch_transformers

    model = a_model()
    model.set_input_embeddings(Other(VOCABULARY, 64))
    assert type(patch_transformers(model).get_input_embeddings()) is Other
