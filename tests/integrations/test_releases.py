"""Releases of transformers: those we name were run, any other is met with a message.

transformers 5.24 renamed an argument that `**kwargs` then swallowed, and a patched model generated
other tokens without an error.
"""

import sys

import pytest
from processes import run_python

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.models.llama import modeling_llama  # noqa: E402

from llama2rt.integrations import transformers as ours  # noqa: E402
from llama2rt.integrations.transformers import TESTED, patch_transformers  # noqa: E402


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def assert_refused(model, pattern: str) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=pattern):
        patch_transformers(model)
    assert [type(module) for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("release", ["4.57.1", "5.21.1", "5.25.0", "6.0.0", "5.24.0.dev0"])
@pytest.mark.parametrize("loaded", [ours.transformers, sys.modules["transformers"]])
def test_a_release_that_was_not_tested_is_refused_by_name(release, loaded, model, monkeypatch):
    monkeypatch.setattr(loaded, "__version__", release)
    tested = ", ".join(TESTED)
    assert_refused(model, rf"^transformers {release}: patch_transformers is tested with {tested}; ")


def test_the_release_at_hand_is_known(model):
    if transformers.__version__.startswith("4."):
        assert_refused(model, f"^transformers {transformers.__version__}: ")
    else:
        patch_transformers(model)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="refused as a whole")
@pytest.mark.parametrize("name", ["LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaForCausalLM"])
def test_a_release_whose_arguments_differ_is_refused(name, model, monkeypatch):
    """A later one of the same minor number, say."""

    def forward(self, tokens, mask=None, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(getattr(modeling_llama, name), "forward", forward)
    assert_refused(model, rf"expected {name}\.forward with the arguments .*; got tokens mask \(")


def test_importing_on_another_release():
    """Our attention cannot be asked for by name; what cannot be imported is named, with the release
    at hand."""
    program = """
import sys, transformers
transformers.__version__ = "5.25.0"
import llama2rt.integrations.transformers
interfaces = (transformers.AttentionInterface(), transformers.AttentionMaskInterface())
assert not any("llama2rt" in interface for interface in interfaces)
del sys.modules["llama2rt.integrations.transformers"]
sys.modules["transformers.masking_utils"] = None
import llama2rt.integrations.transformers
"""
    said = run_python("-c", program, status=1).stderr
    assert f"ImportError: llama2rt.integrations.transformers needs transformers {TESTED[0]}" in said
    assert "5.24, this is " in said and "masking_utils" in said
