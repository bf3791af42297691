"""The seven ops in Triton: installed as `llama2rt.kernels`, behind `ops.triton`.

One file an op, or one for each of its directions. A file holds, in reading order: its `@triton.jit`
kernels; a frozen dataclass `Launch` of launch settings and the table of them per architecture, each
threshold with its reason; host functions with the signatures of a backend (tensors in, new tensors
out); `aot_cases()`, what the shipped settings compile to, for `aot.py`. Arguments have passed the
checks of `ops.contract`. Conventions:

Names.      A kernel's name contains rms_norm, swiglu, rope, attention, decode or logprob.
Strides.    In elements. The last dimension is contiguous (`last_contiguous` copies where it is
            not), other strides are arguments and may be 0. Results are allocated contiguous.
Offsets.    2^31 elements and more must be right, and neither program ids nor sizes are wider than
            32 bits: `row.to(tl.int64) * stride`, before the multiplication.
Masks.      Every load and store is masked by true sizes, loads with `other=0`. Block sizes are
            powers of two; true sizes are run-time arguments, so that Triton specialises on what it
            needs (divisibility by 16: 16-byte accesses) and a new batch size compiles nothing.
            Sizes that change from batch to batch go into `do_not_specialize`.
Arithmetic. In fp32: `.to(tl.float32)` at the load, `.to(pointer.dtype.element_ty)` at the store.
            In the interpreter arithmetic on bf16 is wrong (casts and `tl.dot` are repaired by
            `interpreter.py`). Float scalars are Python floats,
            which Triton's launcher (not Inductor's) types as fp32. Matrix products take operands of
            the input's dtype, accumulate in fp32, and say `input_precision="ieee"` for fp32.
Repeatable. No atomics: a sum over programs goes through fp32 partial sums and a second kernel.
Device.     Triton launches on the current device: `with torch.cuda.device_of(x):` around launches
            (it does nothing for CPU tensors). Nothing synchronises with the device.
Options.    Every launch ends in `**launch_options(warps, stages)`, which says what a default of
            Triton's would leave to the release.
Empty.      A grid may not be 0: host functions return before it, gradients of weights as zeros.

Under TRITON_INTERPRET=1 (set before the first import of triton) kernels run on the CPU, one
program after the other, and the backend serves CPU tensors: so it is tested without a GPU.

Not yet run on a GPU.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Whether the kernels of this process were made for the interpreter."""

if INTERPRETED:
    importlib.import_module("llama2rt.kernels.interpreter")


@functools.cache
def _architecture(device: int) -> int:
    # Settings for 90 take up to 227 KB of shared memory a block; newer chips for desktops have 99.
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)  # torch's stubs lack it
    return 90 if properties.major >= 9 and shared >= 227 << 10 else 80


def architecture(x: Tensor) -> int:
    """The architecture whose launch settings fit x's device: 80 (A100) or 90 (H100)."""
    return _architecture(x.get_device()) if x.is_cuda else 80


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors persistent programs are spread over (in the interpreter: 2)."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 2


def launch_options(warps: int, stages: int = 1) -> dict[str, Any]:
    """What every launch passes to Triton, and every compilation ahead of time.

    stages counts only where a loop feeds `tl.dot`. Fusion of multiplications and additions is on by
    default until Triton 3.9 and off from 3.10; it rounds once where two instructions round twice,
    and the speed, the registers and the tests' tolerances are those of kernels that have it.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def last_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy of which that is true."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
