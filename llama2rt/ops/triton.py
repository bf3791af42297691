"""The backend of `llama2rt.kernels`: the ops in Triton, for CUDA tensors.

Importing this fails, with the reason, where Triton is missing. It asks for no GPU: kernels are
compiled when they are first launched. Under TRITON_INTERPRET=1 they are interpreted instead, slowly
and on CPU tensors, and this backend serves those too: that is how it is tested without a GPU.
"""

from collections.abc import Callable
from importlib.util import find_spec

if find_spec("triton") is None:
    raise ImportError("Triton is not installed; CUDA builds of torch for Linux bring it")

from llama2rt import kernels
from llama2rt.kernels.attention import attention, attention_backward
from llama2rt.kernels.decode_attention import decode_attention
from llama2rt.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from llama2rt.kernels.rope import rope, rope_backward
from llama2rt.kernels.swiglu import swiglu, swiglu_backward
from llama2rt.kernels.token_logprob import token_logprob, token_logprob_backward

DEVICES = ("cuda", "cpu") if kernels.INTERPRETED else ("cuda",)

NATIVE: dict[str, Callable] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "add_rms_norm": add_rms_norm,
    "add_rms_norm_backward": add_rms_norm_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "rope": rope,
    "rope_backward": rope_backward,
    "token_logprob": token_logprob,
    "token_logprob_backward": token_logprob_backward,
    "attention": attention,
    "attention_backward": attention_backward,
    "decode_attention": decode_attention,
}
