"""Which tensors and models ranks share, asked without torch's distributed engine: that takes
seconds to import, one process needs none of it, and where nobody has imported it nothing is shared.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether ranks share `tensor`."""
    engine = sys.modules.get("torch.distributed.tensor")
    return engine is not None and isinstance(tensor, engine.DTensor)


def is_fsdp(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether FSDP2 gathers and cuts the parameters of `module`."""
    engine = sys.modules.get("torch.distributed.fsdp")
    return engine is not None and isinstance(module, engine.FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of `tensor`, sharing its storage; all of one that ranks do not share."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """`tensor` in one piece. All ranks that share it call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def cut(model: nn.Module) -> None:
    """Let no parameter of `model` stay gathered: `parameters()` are the shards from here on."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()
