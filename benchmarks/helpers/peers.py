"""Libraries that are timed beside our kernels where they are installed, and why others are not.

Imported, never re-implemented. Each function here has the arguments of plain torch's version of the
op (see benchmarks/ops), so that a case needs no knowledge of any library. All need a GPU.
"""

import functools
import importlib
from collections.abc import Callable

from torch import Tensor

EPS = 1e-5
# peer -> what must import for it to be the project that is meant. PyPI's `apex` is another one,
# which has no such submodule.
MODULES = {
    "liger": "liger_kernel.transformers.functional",
    "cce": "cut_cross_entropy",
    "flash_attn": "flash_attn.flash_attn_interface",
    "apex": "apex.normalization.fused_layer_norm",
}


@functools.cache
def _why_not(peer: str) -> str:
    """Why `peer` cannot be imported, "" if it can."""
    try:
        importlib.import_module(MODULES[peer])
    except Exception as error:  # extensions built for another torch fail in many ways
        return f"{type(error).__name__}: {error}"
    return ""


def missing() -> dict[str, str]:
    """Peer -> why it is not in the tables."""
    return {peer: reason for peer in MODULES if (reason := _why_not(peer))}


def _rms_norm() -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    if not _why_not("liger"):
        liger = importlib.import_module(MODULES["liger"])
        # Not in place: neither is ours. (Liger's SwiGLU gradient always is.)
        found["liger"] = lambda x, w: liger.liger_rms_norm(x, w, EPS, 0.0, "llama", False)
    if not _why_not("apex"):
        apex = importlib.import_module(MODULES["apex"])
        found["apex"] = lambda x, w: apex.fused_rms_norm_affine(x, w, w.shape, EPS)
    return found


def _add_rms_norm() -> dict[str, Callable]:
    if _why_not("liger"):
        return {}
    liger = importlib.import_module(MODULES["liger"])
    if not hasattr(liger, "liger_fused_add_rms_norm"):
        return {}
    return {
        "liger": lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, EPS, 0.0, "llama", False)
    }


def _swiglu() -> dict[str, Callable]:
    if _why_not("liger"):
        return {}
    return {"liger": importlib.import_module(MODULES["liger"]).liger_swiglu}


def _rope() -> dict[str, Callable]:
    """Of q and k [1, h, T, D] and tables [1, T, D], in place on copies of its inputs."""
    if _why_not("liger"):
        return {}
    return {"liger": importlib.import_module(MODULES["liger"]).liger_rope}


def _token_logprob() -> dict[str, Callable]:
    """Mean losses: what both fuse with the product."""
    found: dict[str, Callable] = {}
    if not _why_not("liger"):
        liger = importlib.import_module(MODULES["liger"])
        found["liger"] = lambda h, w, targets: liger.liger_fused_linear_cross_entropy(h, w, targets)
    if not _why_not("cce"):
        cce = importlib.import_module(MODULES["cce"])
        found["cce"] = lambda h, w, targets: cce.linear_cross_entropy(h, w, targets)
    return found


def _attention() -> dict[str, Callable]:
    """Of packed q, k, v, offsets and the longest document; deterministic, as ours always is."""
    if _why_not("flash_attn"):
        return {}
    flash = importlib.import_module(MODULES["flash_attn"]).flash_attn_varlen_func

    def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        return flash(q, k, v, cu, cu, longest, longest, causal=True, deterministic=True)

    return {"flash_attn": packed}


def _decode_attention() -> dict[str, Callable]:
    """Over paged caches whose pages are a multiple of 256 tokens."""
    if _why_not("flash_attn"):
        return {}
    flash = importlib.import_module(MODULES["flash_attn"]).flash_attn_with_kvcache

    def paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return flash(q[:, None], k, v, cache_seqlens=lengths, block_table=table, causal=True)[:, 0]

    return {"flash_attn": paged}


_FIND = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "token_logprob": _token_logprob,
    "attention": _attention,
    "decode_attention": _decode_attention,
}


def functions(op: str, device: str) -> dict[str, Callable]:
    """The installed peers of `op` on `device`, by name."""
    return _FIND[op]() if device == "cuda" else {}
