"""The backend of `llama2rt.kernels`: the ops in Triton, for CUDA tensors.

Importing this fails, with the reason, where Triton is missing. It imports no Triton, which takes
longer than all of the ops: a kernel's file does when the first call wants it, and kernels are
compiled when they are first launched. Under TRITON_INTERPRET=1 they are interpreted instead, slowly
and on CPU tensors, and this backend serves those too: that is how it is tested without a GPU.
"""

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is None:
    raise ImportError("Triton is not installed; CUDA builds of torch for Linux bring it")

# As Triton reads it (`kernels.INTERPRETED` is its own answer, and a test compares the two).
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

# Op -> the file of llama2rt.kernels that holds it.
_FILES = {
    "rms_norm": "rms_norm",
    "rms_norm_backward": "rms_norm",
    "add_rms_norm": "rms_norm",
    "add_rms_norm_backward": "rms_norm",
    "swiglu": "swiglu",
    "swiglu_backward": "swiglu",
    "rope": "rope",
    "rope_backward": "rope",
    "token_logprob": "token_logprob",
    "token_logprob_backward": "token_logprob_backward",
    "attention": "attention",
    "attention_backward": "attention_backward",
    "decode_attention": "decode_attention",
}


@functools.cache
def _kernel(op: str) -> Callable:
    return getattr(importlib.import_module(f"llama2rt.kernels.{_FILES[op]}"), op)


def _when_called(op: str) -> Callable:
    def run(*arguments: Any) -> Any:
        return _kernel(op)(*arguments)

    return run


NATIVE: dict[str, Callable] = {op: _when_called(op) for op in _FILES}


def __getattr__(name: str) -> Any:
    """The functions themselves, `triton.rms_norm` and its like."""
    if name in NATIVE:
        return _kernel(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
