"""Which code runs an op: one process-wide choice, and the table from (op, backend) to a function.

The choice is a plain module value rather than a context variable because `torch.compile` can guard
on the first and breaks the graph on the second. Public wrappers read it once per call (`resolve`)
and hand it on as an op argument, so that backward runs on the backend its forward ran on.

There is no choice per op or per thread: `ops.use` around a region mixes backends.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, TracebackType

import torch

from llama2rt.ops import composed, reference

OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "rope",
    "attention",
    "decode_attention",
    "token_logprob",
)
NAMES = ("reference", "cpu", "triton", "cuda", "flash_attn")
# What a device prefers, best first. The reference runs anywhere and closes each list. Both GPU
# backends have every op and neither has been timed on a GPU yet; Triton's kernels compile for any
# GPU, `_cuda`'s for those it was built for, so Triton comes first until a recorded run decides.
# Others' kernels (flash_attn) are used by those who ask for them.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of other types of tensor (DTensor and its like) a kernel would read an address that is not theirs.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = frozenset((*PLAIN_TENSORS, type(None), str, float, int, bool))


@dataclass(frozen=True)
class _Backend:
    native: dict[str, Callable] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    """Device types whose tensors its kernels take."""
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES
    partial: bool = False
    """Whether ops it has no kernel for go to a fallback's, rather than to torch calls."""
    unusable: str = ""
    """Why it cannot be used on this machine; "" if it can."""


def _load(name: str) -> _Backend:
    try:
        module: ModuleType = importlib.import_module(f"llama2rt.ops.{name}")
    except ImportError as error:
        return _Backend(unusable=str(error))
    except Exception as error:  # a backend that fails otherwise must not take the others with it
        return _Backend(unusable=f"{type(error).__name__}: {error}")
    return _Backend(
        module.NATIVE,
        module.DEVICES,
        getattr(module, "DTYPES", NATIVE_DTYPES),
        getattr(module, "PARTIAL", False),
    )


_backends = {"reference": _Backend()} | {name: _load(name) for name in NAMES[1:]}
_choice: str | None = os.environ.get("LLAMA2RT_BACKEND") or None


def register(name: str, native: dict[str, Callable], devices: tuple[str, ...]) -> None:
    """Makes `use(name)` run the ops of `native` on tensors of `devices`.

    For tests that bring a way to run kernels of their own (the CUDA sources on a CPU). It is never
    chosen unless asked for by name, and not listed.
    """
    _backends[name] = _Backend(native, devices)


def _why_not(name: str, device: str) -> str:
    """Why backend `name` cannot run tensors of device type `device`; "" if it can."""
    if name not in _backends:
        return f"unknown backend {name!r}, expected one of {', '.join(NAMES)}"
    found = _backends[name]
    if found.unusable or name == "reference" or device in found.devices:
        return found.unusable
    kinds = " and ".join(kind.upper() for kind in found.devices)
    return f"its kernels run on {kinds} tensors, got a tensor on {device!r}"


def _resolve_all() -> dict[str, str]:
    """device type -> backend, for the devices that the choice in force can serve."""
    if _choice is not None:
        return {device: _choice for device in PREFERENCE if not _why_not(_choice, device)}
    return {
        device: next(name for name in names if not _why_not(name, device))
        for device, names in PREFERENCE.items()
    }


_resolved = _resolve_all()


def resolve(tensor: torch.Tensor) -> str:
    """Backend for an op on `tensor`: the one asked for, else the best one its device can use."""
    device = tensor.device.type
    name = _resolved.get(device)
    if name is not None:
        return name
    if _choice is None or _choice == "reference":  # a device no backend was made for
        return "reference"
    reason = _why_not(_choice, device)
    raise ValueError(f"backend {_choice!r} was asked for but cannot be used: {reason}")


def _choose(name: str | None) -> None:
    global _choice, _resolved
    _choice = name
    _resolved = _resolve_all()


def _has_own(op: str, name: str, dtype: torch.dtype) -> bool:
    found = _backends[name]
    return op in found.native and dtype in found.dtypes


def has_native(op: str, name: str, dtype: torch.dtype) -> bool:
    """Whether backend `name`, or its fallback, has a function of its own for `op` in this dtype."""
    if _backends[name].partial and not _has_own(op, name, dtype):
        name = fallback(name)
    return _has_own(op, name, dtype)


def implementation(op: str, name: str, dtype: torch.dtype) -> Callable:
    """The function that runs `op` (or `op` + "_backward") on backend `name`."""
    if name == "reference":
        return getattr(reference, op)
    if _has_own(op, name, dtype):
        return _backends[name].native[op]
    if _backends[name].partial:
        return implementation(op, fallback(name), dtype)
    return getattr(composed, op)


def needs_dispatcher(*arguments: object) -> bool:
    """Whether torch's dispatcher has work at a call, beside autograd's: tracing, a mode, a
    transform of torch.func or an argument that is a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, arguments))
    )


def fallback(partial: str) -> str:
    """The backend that runs what `partial` has no kernel for: the one chosen without it."""
    device = _backends[partial].devices[0]
    return next(name for name in PREFERENCE[device] if not _why_not(name, device))


class use:
    """`with ops.use("reference"): ...` runs every op inside on that backend, whole process.

    `use(None)` returns to the automatic choice. Raises ValueError, saying why, for a backend that
    is unknown or was not built; a backend that does not fit a tensor's device raises at the op.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            reason = _backends[name].unusable if name in _backends else _why_not(name, "")
            if reason:
                raise ValueError(f"backend {name!r} cannot be used: {reason}")
        self.name = name

    def __enter__(self) -> "use":
        self.previous = _choice
        _choose(self.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choose(self.previous)


def checkpoint_context() -> tuple[use, use]:
    """`context_fn` of torch.utils.checkpoint: the recomputation runs on the forward's backend.

    Called by checkpoint at forward time; without it a recomputation after the end of a
    `with ops.use(...)` block would run, and round, differently from the forward it repeats.
    """
    return use(_choice), use(_choice)


def backends(device: str | torch.device = "cpu") -> dict[str, dict]:
    """Per op: what is built, what an op on `device` would run on, and why not the others.

    Returns `{op: {"chosen": backend, "native": [backends with own kernels for the op],
    "composed": [usable backends that compose torch calls, or hand the op on (flash_attn)],
    "unusable": {backend: reason}}}`.
    """
    kind = torch.device(device).type
    reasons = {name: _why_not(name, kind) for name in NAMES}
    chosen = _choice or _resolved.get(kind, "reference")
    usable = [name for name in NAMES if not reasons[name]]
    return {
        op: {
            "chosen": chosen,
            "native": [name for name in usable if op in _backends[name].native],
            "composed": [name for name in usable if op not in _backends[name].native],
            "unusable": {name: reason for name, reason in reasons.items() if reason},
        }
        for op in OPS
    }
