"""Tests of this folder need an NVIDIA GPU and skip, with the reason, without one."""

import importlib
from types import SimpleNamespace

import pytest
import torch


def why_not(backend: str) -> str:
    """Why `backend` cannot run here, "" if it can."""
    if not torch.cuda.is_available():
        return f"no usable NVIDIA GPU (torch {torch.__version__})"
    try:
        importlib.import_module(f"llama2rt.ops.{backend}")
    except ImportError as error:
        return f"llama2rt.ops.{backend}: {error}"
    return ""


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so an unwritten element is seen. Unlike on a CPU, what torch itself
    cannot repeat to the bit is let through: the oracle uses some of it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cuda():
    """The functions of llama2rt.ops.cuda."""
    if reason := why_not("cuda"):
        pytest.skip(reason)
    return SimpleNamespace(**importlib.import_module("llama2rt.ops.cuda").NATIVE)


@pytest.fixture
def triton():
    """llama2rt.ops.triton, whose functions are those of the kernels."""
    if reason := why_not("triton"):
        pytest.skip(reason)
    return importlib.import_module("llama2rt.ops.triton")


@pytest.fixture
def flash_attn():
    """llama2rt.ops.flash_attn."""
    if reason := why_not("flash_attn"):
        pytest.skip(reason)
    return importlib.import_module("llama2rt.ops.flash_attn")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a GPU backend, each in turn."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    return request.param
