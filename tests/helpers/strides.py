"""The same values behind other strides: what a kernel must read as if they lay dense.

`STRIDES[name](x)` is a view of x's shape and dtype. Those that repeat hold other values than x.
"""

from collections.abc import Callable

from torch import Tensor, cat


def rows_apart(x: Tensor) -> Tensor:
    """As a half of a fused projection."""
    return cat((x, x), -1)[..., : x.shape[-1]]


def off_alignment(x: Tensor) -> Tensor:
    """From the second element of memory on."""
    return cat((x[..., :1], x), -1)[..., 1:]


def columns_first(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def heads_first(x: Tensor) -> Tensor:
    """Of [T, H, D] or [pages, page, H, D]: the two dimensions before D are swapped in memory."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def one_row(x: Tensor) -> Tensor:
    """The first row in each place, as the gradient of a mean over rows."""
    return x[:1].expand_as(x)


def one_value(x: Tensor) -> Tensor:
    """The first value in each place, as the gradient of a sum."""
    return x[(slice(1),) * x.dim()].expand_as(x)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": rows_apart,
    "off alignment": off_alignment,
    "columns first": columns_first,
    "every second": every_second,
    "one row": one_row,
    "one value": one_value,
}
