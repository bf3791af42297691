"""What each op is to reach, as ratios within one run. Data, so that a table can print the verdict.

A target names a contender of the same run ("eager"), the case's ceiling ("ceiling", percent), its
rate ("rate") or its memory ("memory", as a share of `Case.limit_bytes`), and applies where its
conditions hold. A contender that is not there (a peer not installed) has no verdict.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    what: str
    bound: float
    text: str
    most: bool = False
    """Whether `bound` may not be exceeded, rather than must be reached."""


def _times(peer: str, least: float) -> Target:
    return Target(peer, least, f">= {least:g}x {peer}")


def _percent(least: float, of: str) -> Target:
    return Target("ceiling", least, f">= {least:g} % of {of}")


def _within(most: float, of: str) -> Target:
    return Target("ceiling", 100 / most, f">= {100 / most:.0f} % of {of}, {most:g} times its time")


def _teraflops(least: float) -> Target:
    return Target("rate", 1e12 * least, f">= {least:g} TFLOP/s")


_NORM = (_times("eager", 3), _times("inductor", 1.1), _percent(80, "clone"))
_ELEMENTWISE = (_times("eager", 2), _times("inductor", 1.1))
_LOGITS = Target("memory", 1 / 8, "<= 1/8 of the logits' memory", most=True)

CPU: dict[tuple[str, str], tuple[Target, ...]] = {
    ("rms_norm", "forward"): _NORM,
    ("rms_norm", "backward"): (_times("eager", 3),),
    ("add_rms_norm", "forward"): _NORM,
    ("add_rms_norm", "backward"): (_times("eager", 3),),
    **{(op, way): _ELEMENTWISE for op in ("swiglu", "rope") for way in ("forward", "backward")},
    ("attention", "forward"): (_times("flash", 1.1),),
    ("attention", "backward"): (_times("flash", 2),),
    ("decode_attention", "forward"): (_percent(80, "clone"),),
    ("token_logprob", "forward"): (_within(1.1, "its product"), _LOGITS),
    ("token_logprob", "forward + backward"): (_within(1.25, "three products"), _LOGITS),
}


def _gpu(
    norm: float, norm_backward: float, elementwise: float, decode: float, logprob: float
) -> dict[tuple[str, str], tuple[Target, ...]]:
    return {
        **{(op, "forward"): (_percent(norm, "clone"),) for op in ("rms_norm", "add_rms_norm")},
        **{
            (op, "backward"): (_percent(norm_backward, "clone"),)
            for op in ("rms_norm", "add_rms_norm")
        },
        **{
            (op, way): (_percent(elementwise, "clone"),)
            for op in ("swiglu", "rope")
            for way in ("forward", "backward")
        },
        ("decode_attention", "forward"): (_percent(decode, "clone"),),
        ("token_logprob", "forward + backward"): (_teraflops(logprob),),
    }


# By a word of the GPU's name. Attention there depends on the backend too: see `_attention`.
GPUS = {
    "H200": _gpu(94, 88, 93, 90, 500),
    "A100": _gpu(94, 85, 93, 90, 165),
}
H200_NORM_BACKWARD = (_times("liger", 2),)
ATTENTION = {
    ("H200", "cuda"): {
        "forward": (_times("cudnn", 1), _teraflops(600)),
        "forward + backward": (_teraflops(480),),
    },
    ("H200", "triton"): {
        "forward": (_teraflops(450),),
        "forward + backward": (_teraflops(360),),
    },
    ("A100", "cuda"): {
        "forward": (_teraflops(200),),
        "forward + backward": (_teraflops(185),),
    },
}


def targets_for(op: str, direction: str, backend: str, gpu: str | None) -> tuple[Target, ...]:
    """The targets of `op` on `backend`; `gpu` is the GPU's name, None for a CPU."""
    if gpu is None:
        return CPU.get((op, direction), ())
    model = next((name for name in GPUS if name in gpu), None)
    if model is None:
        return ()
    if op == "attention":
        return ATTENTION.get((model, backend), {}).get(direction, ())
    found = GPUS[model].get((op, direction), ())
    if model == "H200" and direction == "backward" and op in ("rms_norm", "add_rms_norm"):
        found += H200_NORM_BACKWARD
    return found


def judge(case: Any, backend: str, rows: dict[str, dict]) -> list[dict[str, Any]]:
    """The verdict on each target that applies to a measured case, the largest of its curve."""
    gpu = torch.cuda.get_device_name(0) if case.device == "cuda" else None
    mine, verdicts = rows[backend], []
    if not case.judged:
        return verdicts
    for target in targets_for(case.op, case.direction, backend, gpu):
        if target.what == "ceiling":
            got = mine["percent_of_ceiling"]
        elif target.what == "rate":
            got = mine["rate"]
        elif target.what == "memory":
            got = mine["extra_bytes"] / case.limit_bytes
        elif target.what in rows:
            got = mine["ratio"][target.what]
        else:
            continue
        met = got <= target.bound if target.most else got >= target.bound
        verdicts.append({"target": target.text, "got": got, "met": met})
    return verdicts
