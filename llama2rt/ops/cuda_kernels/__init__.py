"""Calls of the CUDA kernels, for whatever runs them: `_cuda` on a GPU, or the tests' emulator.

A function takes the `Device` it runs on and then the arguments of the op, which have passed the
checks of `contract`. What is left to do is to copy where a kernel needs the last dimension
contiguous, and to allocate results and scratch memory with torch's allocator, whose stream ordering
keeps every temporary alive until the kernel has run. Nothing here synchronises with the device.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from llama2rt.ops.cuda_kernels import (
    attention,
    attention_sm90,
    decode_attention,
    elementwise,
    token_logprob,
)
from llama2rt.ops.cuda_kernels.device import Device

FUNCTIONS: dict[str, Callable] = {
    "rms_norm": elementwise.rms_norm,
    "rms_norm_backward": elementwise.rms_norm_backward,
    "add_rms_norm": elementwise.add_rms_norm,
    "add_rms_norm_backward": elementwise.add_rms_norm_backward,
    "swiglu": elementwise.swiglu,
    "swiglu_backward": elementwise.swiglu_backward,
    "rope": elementwise.rope,
    "rope_backward": elementwise.rope_backward,
    "attention": attention.attention,
    "attention_backward": attention.attention_backward,
    "decode_attention": decode_attention.decode_attention,
    "token_logprob": token_logprob.token_logprob,
    "token_logprob_backward": token_logprob.token_logprob_backward,
    # Not ops of their own: for tests, and for those who set attention_sm90.VARIABLE.
    "attention_sm90": attention_sm90.attention,
    "attention_sm90_backward": attention_sm90.attention_backward,
}
if attention_sm90.CHOSEN:
    FUNCTIONS["attention"] = attention_sm90.attention
    FUNCTIONS["attention_backward"] = attention_sm90.attention_backward


def on(device: Device) -> dict[str, Callable]:
    """FUNCTIONS for `device`. An error of a kernel is a RuntimeError that names op and shapes.

    Errors of its subclasses, torch's OutOfMemoryError above all, come through as they are: callers
    tell them apart by type.
    """

    def bind(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: object) -> object:
            try:
                return function(device, *arguments)
            except RuntimeError as error:
                if type(error) is not RuntimeError:
                    raise
                tensors = [x for x in arguments if isinstance(x, Tensor)]
                shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in tensors)
                raise RuntimeError(f"{name} of {shapes}: {error}") from error

        return call

    return {name: bind(name, function) for name, function in FUNCTIONS.items()}
