"""Sums over responses."""

import torch

from llama2rt.rollout.logprobs import segment_sums


def test_segment_sums_have_no_end():
    lengths = torch.tensor([4096, 0, 1])
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.ones(4097, dtype=dtype, requires_grad=True)
        sums = segment_sums(values, lengths)
        assert sums.tolist() == [4096, 0, 1]
        sums.backward(torch.tensor([2.0, 1.0, 3.0]))
        assert values.grad.tolist() == [2.0] * 4096 + [3.0]
