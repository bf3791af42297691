"""Every launch names what a default of Triton's would leave to the release, fusion above all.

No kernel runs: launches are recorded where the interpreter would start them.
"""

from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.interpreter import GridExecutor

from llama2rt.kernels import (
    attention,
    attention_backward,
    decode_attention,
    launch_options,
    rms_norm,
    rope,
    swiglu,
    token_logprob,
    token_logprob_backward,
)

pytestmark = pytest.mark.usefixtures("interpreted")

MODULES = (
    attention,
    attention_backward,
    decode_attention,
    rms_norm,
    rope,
    swiglu,
    token_logprob,
    token_logprob_backward,
)


@pytest.fixture
def launches(monkeypatch):
    """(name of the kernel, options and constants) of each launch."""
    found = []
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *args, **kw: found.append((self.fn.__name__, kw))
    )
    return found


def kernels_of(module: ModuleType) -> set[str]:
    return {name for name in vars(module) if name.endswith("_kernel")}


def launch_everything() -> None:
    x, wide, weight = torch.ones(3, 64), torch.ones(3, 40_000), torch.ones(64)
    y, rstd = rms_norm.rms_norm(x, weight, 1e-5)
    rms_norm.rms_norm_backward(y, x, weight, rstd)
    rms_norm.rms_norm_backward(wide, wide, torch.ones(40_000), rstd)
    swiglu.swiglu_backward(x, x, swiglu.swiglu(x, x))
    heads, tables = torch.ones(3, 2, 16), torch.ones(3, 8)
    rope.rope(heads, heads, tables, tables, torch.arange(3))
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    rest = (offsets, offsets, 3, True, 0.25)
    out, lse = attention.attention(heads, heads, heads, *rest)
    attention_backward.attention_backward(out, heads, heads, heads, out, lse, *rest)
    pages, table = torch.ones(64, 16, 2, 16), torch.zeros(1, 64, dtype=torch.int32)
    decode_attention.decode_attention(heads[:1], pages, pages, table, table[:, 0], 0.25)
    targets = torch.zeros(3, dtype=torch.int64)
    logprob, _, lse = token_logprob.token_logprob(x, x, targets, 1.0, False)
    token_logprob_backward.token_logprob_backward(logprob, None, x, x, targets, lse, None, 1.0)


def test_every_launch_has_every_option(launches):
    launch_everything()
    assert {name for name, _ in launches} == set().union(*map(kernels_of, MODULES))
    for name, options in launches:
        assert launch_options(1).keys() <= options.keys(), name
        assert options["enable_fp_fusion"] is True, name
