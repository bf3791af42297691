"""The backend of Dao-AILab's flash-attn, where a user has installed it: attention by its kernels.

It serves attention, forward and backward (always its deterministic one), in bf16 and fp16 for
positive scales and head dimensions to 256, and decode_attention over pages of a multiple of 256
tokens. Everything else, the other ops among it, runs on the backend that would run it otherwise.
Never chosen by itself: `ops.use("flash_attn")` or LLAMA2RT_BACKEND asks for it.

Importing this imports no flash_attn: whether it is there is read from its files, and the first call
loads it. What is looked for is the module that is called, by name: flash-attn-4 is another
distribution, which puts `flash_attn.cute` into a folder of the same name. Its low-level functions
are used, which exist in this form since 2.7, because ours is the autograd formula. Not yet run on a
GPU: tested against a stand-in that checks each argument.
"""

import functools
import importlib
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2rt.ops.tensors import empty_like, zeros_like

INTERFACE = "flash_attn_interface.py"
CALLED = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_with_kvcache")


def _why_not_installed() -> str:
    """Why the package has not the functions that are called here; "" if its source has them."""
    found = find_spec("flash_attn")
    if found is None:
        return "flash-attn is not installed (see llama2rt doctor)"
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    sources = [folder / INTERFACE for folder in folders if (folder / INTERFACE).is_file()]
    if not sources:
        where = ", ".join(map(str, folders)) or found.name
        return (
            f"flash-attn is not installed: the package flash_attn in {where} has no {INTERFACE} "
            "(flash-attn-4 has another interface)"
        )
    text = sources[0].read_text(encoding="utf-8", errors="replace")
    lacking = [name for name in CALLED if not re.search(rf"^def {name}\(", text, re.MULTILINE)]
    return f"{sources[0]} has no {', '.join(lacking)}" if lacking else ""


if _reason := _why_not_installed():
    raise ImportError(_reason)
try:
    _VERSION = version("flash-attn")
except PackageNotFoundError:  # built in place
    _VERSION = ""
if _VERSION and tuple(int(part) for part in _VERSION.split(".")[:2]) < (2, 7):
    raise ImportError(f"flash-attn 2.7 or newer is needed, this is {_VERSION}")
if torch.version.cuda is None:
    raise ImportError(f"torch {torch.__version__} is a build without CUDA")

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
PARTIAL = True
HEAD_DIM = 256  # the widest it has kernels for
PAGE = 256  # its pages are multiples of this


@functools.cache
def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _otherwise(op: str, x: Tensor) -> Callable:
    """What runs `op` where flash-attn does not take the arguments."""
    from llama2rt.ops import backend  # which imports this module

    return backend.implementation(op, backend.fallback("flash_attn"), x.dtype)


def _readable(x: Tensor) -> bool:
    """Whether its 16-byte accesses can read x as it lies."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
    )


def _padded(x: Tensor) -> Tensor:
    """x with its head dimension filled up with zeros to a multiple of 8, and readable."""
    if x.shape[-1] % 8:
        return F.pad(x, (0, -x.shape[-1] % 8))
    return x if _readable(x) else x.clone(memory_format=torch.contiguous_format)


def _offsets(cu_q: Tensor, cu_k: Tensor, max_seqlen: int) -> dict[str, Tensor | int]:
    """Offsets and bounds on lengths; where the caller gives none, the device is waited for."""
    same = cu_q.data_ptr() == cu_k.data_ptr()
    longest_q = max_seqlen or int(cu_q.diff().max())
    longest_k = longest_q if same else int(cu_k.diff().max())
    return {
        "cu_seqlens_q": cu_q.int().contiguous(),
        "cu_seqlens_k": cu_k.int().contiguous(),
        # 1 would say that every document has one query, and some may have none: it then reshapes
        # [B, heads] out of q.
        "max_seqlen_q": max(2, longest_q),
        "max_seqlen_k": longest_k,
    }


def _settings(causal: bool, scale: float) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _takes(q: Tensor, scale: float) -> bool:
    return q.shape[2] <= HEAD_DIM and scale > 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> (out, lse [Hq, Tq] fp32)."""
    if not _takes(q, scale):
        return _otherwise("attention", q)(q, k, v, cu_q, cu_k, max_seqlen, causal, scale)
    if q.numel() == 0 or k.numel() == 0:
        out = zeros_like(q)
        return out, q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    out, lse, *_ = _interface()._flash_attn_varlen_forward(
        _padded(q),
        _padded(k),
        _padded(v),
        **_offsets(cu_q, cu_k, max_seqlen),
        **_settings(causal, scale),
        return_softmax=False,
    )
    # A query that sees no key has an infinite sum there, and a sum of nothing here.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return out[..., : q.shape[2]].contiguous(), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients of q, k and v), the same bits each time."""
    if not _takes(q, scale):
        return _otherwise("attention_backward", q)(
            dout, q, k, v, out, lse, cu_q, cu_k, max_seqlen, causal, scale
        )
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (zeros_like(x) for x in (q, k, v))
        return dq, dk, dv
    dim = q.shape[2]
    dout, q, k, v, out = (_padded(x) for x in (dout, q, k, v, out))
    gradients = [empty_like(x) for x in (q, k, v)]
    _interface()._flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.masked_fill(lse == -torch.inf, torch.inf).contiguous(),
        *gradients,
        **_offsets(cu_q, cu_k, max_seqlen),
        **_settings(causal, scale),
        deterministic=True,
    )
    dq, dk, dv = (x[..., :dim].contiguous() for x in gradients)
    return dq, dk, dv


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    cu_q: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], caches [pages, page, Hkv, D] -> [T, Hq, D]."""
    if (
        not _takes(q, scale)
        or q.shape[2] % 8
        or k_cache.shape[1] % PAGE
        or not (_readable(k_cache) and _readable(v_cache))  # a cache is not copied at each step
    ):
        return _otherwise("decode_attention", q)(
            q, k_cache, v_cache, block_table, lengths, scale, cu_q
        )
    if q.numel() == 0 or block_table.numel() == 0:
        return zeros_like(q)
    if cu_q is not None:
        offsets = {
            "cu_seqlens_q": cu_q.int().contiguous(),
            "cu_seqlens_k": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            # Bounds for which the device is not waited for; not 1, as in `_offsets`.
            "max_seqlen_q": max(2, q.shape[0]),
            "max_seqlen_k": block_table.shape[1] * k_cache.shape[1],
        }
        out, *_ = _interface()._flash_attn_varlen_forward(
            *(_padded(q), k_cache, v_cache),
            **offsets,
            **_settings(True, scale),
            return_softmax=False,
            block_table=block_table.int().contiguous(),
        )
        return out
    out = _interface().flash_attn_with_kvcache(
        _padded(q)[:, None],
        k_cache,
        v_cache,
        cache_seqlens=lengths.int().contiguous(),
        block_table=block_table.int().contiguous(),
        softmax_scale=scale,
    )
    return out[:, 0].contiguous()


NATIVE: dict[str, Callable] = {
    "attention": attention,
    "attention_backward": attention_backward,
    "decode_attention": decode_attention,
}
