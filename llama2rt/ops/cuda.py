"""The backend of `llama2rt._cuda`: torch tensors to device addresses, on torch's current stream.

Importing this fails, with the reason, where the module was not built or cannot be used; a machine
with a driver and a CUDA build of torch is all it asks for. Nothing here synchronises with the
device. Results are allocated by torch's caching allocator, so that its stream ordering keeps every
temporary alive until the kernel has run.

Not yet run on a GPU.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

if find_spec("llama2rt._cuda") is None:
    raise ImportError("it was not built: no nvcc at installation, or LLAMA2RT_CUDA=OFF")

from llama2rt import _cuda

if torch.version.cuda is None:
    raise ImportError(f"torch {torch.__version__} is a build without CUDA")
if _cuda.driver_version() == 0:
    raise ImportError("there is no NVIDIA driver on this machine")

DEVICES = ("cuda",)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy of which that is true."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _stream(x: Tensor) -> tuple[int, int]:
    """(device index, handle of its current stream)."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], weight [N] -> (y, rstd [T] fp32)."""
    x, weight = _rows(x), weight.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    _cuda.rms_norm(
        _DTYPES[x.dtype],
        *x.shape,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        rstd.data_ptr(),
        *_stream(x),
    )
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight); bitwise repeatable on one model of GPU."""
    dy, x, weight, rstd = _rows(dy), _rows(x), weight.contiguous(), rstd.contiguous()
    # Two thread blocks on each multiprocessor: one computes while the other waits for memory.
    blocks = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = max(1, min(blocks, x.shape[0]))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight)
    partial = x.new_empty(blocks, x.shape[1], dtype=torch.float32)
    _cuda.rms_norm_backward(
        _DTYPES[x.dtype],
        *x.shape,
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr(),
        partial.data_ptr(),
        blocks,
        *_stream(x),
    )
    return dx, dweight


NATIVE: dict[str, Callable] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
}
