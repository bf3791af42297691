"""Shapes: the published table, and errors for shapes that cannot exist."""

import dataclasses

import pytest

from llama2rt import LlamaConfig

# LLaMA and Llama 2 papers, model cards: dim, layers, heads, kv heads, ffn, context, eps, count.
PUBLISHED = {
    "llama1-7b": (4096, 32, 32, 32, 11008, 2048, 1e-6, 6_738_415_616),
    "llama1-13b": (5120, 40, 40, 40, 13824, 2048, 1e-6, 13_015_864_320),
    "llama1-33b": (6656, 60, 52, 52, 17920, 2048, 1e-6, 32_528_943_616),
    "llama1-65b": (8192, 80, 64, 64, 22016, 2048, 1e-5, 65_285_660_672),
    "llama2-7b": (4096, 32, 32, 32, 11008, 4096, 1e-5, 6_738_415_616),
    "llama2-13b": (5120, 40, 40, 40, 13824, 4096, 1e-5, 13_015_864_320),
    "llama2-34b": (8192, 48, 64, 8, 22016, 4096, 1e-5, 33_743_970_304),
    "llama2-70b": (8192, 80, 64, 8, 28672, 4096, 1e-5, 68_976_648_192),
    "llama3-8b": (4096, 32, 32, 8, 14336, 8192, 1e-5, 8_030_261_248),
}


def test_presets_match_the_published_table():
    assert LlamaConfig.presets() == list(PUBLISHED)
    for name, numbers in PUBLISHED.items():
        c = LlamaConfig.preset(name)
        shape = (c.dim, c.layers, c.heads, c.kv_heads, c.ffn_hidden, c.context, c.norm_eps)
        assert (*shape, c.parameters) == numbers, name
        assert c.rope_theta == (5e5 if name == "llama3-8b" else 1e4)
        assert c.vocab_size == (128256 if name == "llama3-8b" else 32000)


def test_a_preset_takes_changes():
    config = LlamaConfig.preset("llama2-7b", layers=2, tied=True)
    assert (config.layers, config.dim, config.tied) == (2, 4096, True)
    with pytest.raises(ValueError, match=r"preset: expected one of .*got 'llama9'"):
        LlamaConfig.preset("llama9")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", 5, "heads: expected a divisor of dim 64, got 5"),
        ("heads", 64, "heads: rotary pairs need an even head dimension, got 1"),
        ("kv_heads", 3, "kv_heads: expected a divisor of heads 4, got 3"),
        ("layers", 0, "layers: expected a positive integer, got 0"),
        ("vocab_size", 10.5, "vocab_size: expected a positive integer, got 10.5"),
        ("norm_eps", 0.0, "norm_eps: expected a positive number, got 0.0"),
        ("rope_theta", float("nan"), "rope_theta: expected a positive number"),
    ],
)
def test_impossible_shapes(field, value, message):
    shape = {"dim": 64, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_hidden": 96, field: value}
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**shape)
