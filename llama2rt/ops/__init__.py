"""The seven ops of a LLaMA model, differentiable, with interchangeable backends.

`reference` is the oracle in plain torch; `cpu` and `cuda` use the native modules where they have a
kernel and compose torch calls where they have none; `triton` is all seven in Triton; `flash_attn`
is that library's attention where a user has it. See `contract` for each op's definition.
"""

from llama2rt.ops.backend import backends, checkpoint_context, use
from llama2rt.ops.contract import (
    add_rms_norm,
    attention,
    decode_attention,
    rms_norm,
    rope,
    swiglu,
    token_logprob,
)

__all__ = [
    "add_rms_norm",
    "attention",
    "backends",
    "checkpoint_context",
    "decode_attention",
    "rms_norm",
    "rope",
    "swiglu",
    "token_logprob",
    "use",
]
