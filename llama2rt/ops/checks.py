"""Checks on the arguments of ops that need no look at the data: dtypes, shapes, devices.

ValueError names the argument, what was expected and what was got.
"""

import torch
from torch import Tensor


def mismatch(argument: str, expected: str, got: object) -> ValueError:
    shown = list(got) if isinstance(got, torch.Size) else got
    return ValueError(f"{argument}: expected {expected}, got {shown}")


def check_floating(argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise mismatch(argument, "a floating-point dtype", tensor.dtype)


def check_rows(argument: str, tensor: Tensor) -> None:
    check_floating(argument, tensor)
    if tensor.dim() == 0:
        raise mismatch(argument, "at least one dimension", "a scalar")


def check_like(argument: str, tensor: Tensor, other: Tensor, name: str, shape: tuple) -> None:
    """`tensor` has `shape` and shares dtype and device with `other`, which is called `name`."""
    if tensor.shape != shape:
        raise mismatch(argument, f"shape {list(shape)}", tensor.shape)
    if tensor.dtype != other.dtype:
        raise mismatch(argument, f"dtype {other.dtype} (that of {name})", tensor.dtype)
    if tensor.device != other.device:
        raise mismatch(argument, f"device {other.device} (that of {name})", tensor.device)


def check_index(argument: str, tensor: Tensor, other: Tensor, name: str, shape: tuple) -> None:
    """`tensor` holds integers, has `shape` and is on the device of `other`, called `name`."""
    if tensor.dtype != torch.int32 and tensor.dtype != torch.int64:
        raise mismatch(argument, "dtype int32 or int64", tensor.dtype)
    if tensor.shape != shape:
        raise mismatch(argument, f"shape {list(shape)}", tensor.shape)
    if tensor.device != other.device:
        raise mismatch(argument, f"device {other.device} (that of {name})", tensor.device)
