"""The backend of `llama2rt._cpu`: the functions of `cpu_kernels`, for CPU tensors.

Importing this fails where the module was not built.
"""

from collections.abc import Callable

from llama2rt.ops.cpu_kernels.attention import attention, attention_backward, decode_attention
from llama2rt.ops.cpu_kernels.elementwise import (
    add_rms_norm,
    add_rms_norm_backward,
    rms_norm,
    rms_norm_backward,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
)
from llama2rt.ops.cpu_kernels.linear import (
    add_weight_gradient,
    blocked_linear,
    linear,
    weight_gradient,
)
from llama2rt.ops.cpu_kernels.token_logprob import (
    token_logprob,
    token_logprob_backward,
    token_logprob_stashed,
    token_logprob_stashed_backward,
)

__all__ = [
    "DEVICES",
    "NATIVE",
    "add_weight_gradient",
    "blocked_linear",
    "linear",
    "weight_gradient",
]

DEVICES = ("cpu",)

NATIVE: dict[str, Callable] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "add_rms_norm": add_rms_norm,
    "add_rms_norm_backward": add_rms_norm_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "rope": rope,
    "rope_backward": rope_backward,
    "attention": attention,
    "attention_backward": attention_backward,
    "decode_attention": decode_attention,
    "token_logprob": token_logprob,
    "token_logprob_backward": token_logprob_backward,
    "token_logprob_stashed": token_logprob_stashed,
    "token_logprob_stashed_backward": token_logprob_stashed_backward,
}
