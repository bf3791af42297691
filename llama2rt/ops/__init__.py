"""The seven ops of a LLaMA model, differentiable, with interchangeable backends.

`reference` is the oracle in plain torch; `cpu` and `cuda` are all seven in the native modules,
`triton` all seven in Triton; `flash_attn` is that library's attention where a user has it. In fp64
torch calls stand in for kernels. Beside the seven, `divergence` from a teacher is composed of torch
calls on all of them. Gradients are of first order. See `contract` for each op's definition.
"""

from llama2rt.ops import flops
from llama2rt.ops.backend import backends, checkpoint_context, use
from llama2rt.ops.contract.attention import attention, decode_attention
from llama2rt.ops.contract.divergence import divergence
from llama2rt.ops.contract.elementwise import add_rms_norm, rms_norm, rope, swiglu
from llama2rt.ops.contract.token_logprob import token_logprob

flops.register()

__all__ = [
    "add_rms_norm",
    "attention",
    "backends",
    "checkpoint_context",
    "decode_attention",
    "divergence",
    "rms_norm",
    "rope",
    "swiglu",
    "token_logprob",
    "use",
]
