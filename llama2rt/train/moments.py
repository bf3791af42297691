"""AdamW's two moments in bf16 between steps: half of their memory, the arithmetic as in fp32.

A step takes a chunk's moments to fp32, updates them and rounds them back. The rounding is
stochastic: up or down with the probability that makes it right on average. To the nearest, a change
of less than half a unit of bf16's eight bits is lost however often it comes: with beta2 0.999 a
second moment that should fall by a thousandth a step never falls (`tests/train/test_moments.py`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

NAMES = ("exp_avg", "exp_avg_sq")


def moment_dtype(kind: Literal["fp32", "bf16"]) -> torch.dtype:
    """In what moments are kept."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]


@contextlib.contextmanager
def in_fp32(states: Mapping[int, dict[str, Any]]) -> Iterator[None]:
    """Inside, AdamW's states of some weights, by the index of each, hold their moments in fp32;
    behind it, in the dtype that they came in.

    What rounds them is drawn from the index and the state's step count alone, so a run that resumes
    rounds as one that does not.
    """
    kept = {
        index: {name: state[name] for name in NAMES}
        for index, state in states.items()
        if state["exp_avg"].dtype == torch.bfloat16
    }
    for index, moments in kept.items():
        for name, moment in moments.items():
            states[index][name] = moment.float()
    yield
    for index, moments in kept.items():
        state = states[index]
        noise = _noise(state["exp_avg"], (int(state["step"]), index))
        for name, moment, bits in zip(NAMES, moments.values(), noise, strict=True):
            moment.copy_(round_stochastically(state[name], bits))
            state[name] = moment


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """bf16 of finite fp32 `values`: one of the two neighbours of each, the nearer one more often in
    proportion, as the lower 16 bits of int32 `bits` say, which are uniform."""
    # bf16 is the upper half of fp32: a uniform number below one unit of it, added, carries into it
    # with the probability of rounding away from zero.
    carried = values.view(torch.int32) + (bits & 0xFFFF)
    return (carried & ~0xFFFF).view(torch.float32).bfloat16()


def _noise(like: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two independent uniform 16-bit numbers for each element of `like`."""
    generator = torch.Generator(like.device)
    step, index = seed
    generator.manual_seed(step << 20 | index)
    bits = torch.empty_like(like, dtype=torch.int32)
    bits.random_(-(2**31), 2**31, generator=generator)
    return bits, bits >> 16
