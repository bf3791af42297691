"""The backend of `llama2rt._cuda`: the functions of `cuda_kernels` on torch's current stream.

Importing this fails, with the reason, where the module was not built or cannot be used; a machine
with a driver and a CUDA build of torch is all it asks for.

Not yet run on a GPU.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

if find_spec("llama2rt._cuda") is None:
    raise ImportError("it was not built: no nvcc at installation, or LLAMA2RT_CUDA=OFF")

from llama2rt import _cuda
from llama2rt.ops import cuda_kernels

if torch.version.cuda is None:
    raise ImportError(f"torch {torch.__version__} is a build without CUDA")
if _cuda.driver_version() == 0:
    raise ImportError("there is no NVIDIA driver on this machine")

DEVICES = ("cuda",)


class _Gpu:
    native = _cuda

    def stream(self, x: Tensor) -> tuple[int, int]:
        return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream

    def multiprocessors(self, x: Tensor) -> int:
        return torch.cuda.get_device_properties(x.device).multi_processor_count

    def cache_bytes(self, x: Tensor) -> int:
        return torch.cuda.get_device_properties(x.device).L2_cache_size


NATIVE: dict[str, Callable] = cuda_kernels.on(_Gpu())
