"""Meta's folders: round trips, published layouts, an independent model, damage by name."""

import os

import pytest
import torch
from model_folders import TOKENS, assert_refused, logits, make, rewrite
from torch import Tensor

import llama2rt
from llama2rt import LlamaConfig
from llama2rt.checkpoint import meta
from llama2rt.errors import InputError


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_meta_round_trip(tmp_path, small_tokenizer, shards, tied):
    model = make(tied=tied)
    meta.save(model, small_tokenizer, tmp_path / "m", shards=shards)
    assert len(list((tmp_path / "m").glob("consolidated.*.pth"))) == shards
    loaded, tokenizer = llama2rt.load(tmp_path / "m")
    assert tokenizer.digest == small_tokenizer.digest
    assert loaded.config.norm_eps == 3e-5 and loaded.config.ffn_hidden == 96
    assert torch.equal(logits(loaded), logits(model))


def test_meta_shards_are_split_along_the_published_dimensions(tmp_path):
    meta.save(make(), None, tmp_path / "m", shards=2)
    shard = torch.load(tmp_path / "m" / "consolidated.01.pth", weights_only=True)
    shapes = {name: list(tensor.shape) for name, tensor in shard.items()}
    block = "layers.1."
    assert {name[len(block) :]: s for name, s in shapes.items() if name.startswith(block)} == {
        "attention.wq.weight": [32, 64],
        "attention.wk.weight": [16, 64],
        "attention.wv.weight": [16, 64],
        "attention.wo.weight": [64, 32],
        "feed_forward.w1.weight": [48, 64],
        "feed_forward.w2.weight": [64, 48],
        "feed_forward.w3.weight": [48, 64],
        "attention_norm.weight": [64],
        "ffn_norm.weight": [64],
    }
    assert shapes["tok_embeddings.weight"] == [400, 32]
    assert shapes["output.weight"] == [200, 64] and shapes["norm.weight"] == [64]


def interleaved_forward(weights: dict[str, Tensor], config: LlamaConfig, tokens: Tensor) -> Tensor:
    """Meta's model, written from its paper and weights alone: neighbouring rotary pairs as complex
    numbers, one document, no shared code with ours."""
    length, heads, kv_heads = len(tokens), config.heads, config.kv_heads
    size = config.dim // heads
    frequency = config.rope_theta ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.outer(torch.arange(length).double(), frequency)
    rotation = torch.polar(torch.ones_like(angle), angle)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    def rotate(x: Tensor) -> Tensor:
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation
        ).flatten(-2)

    x = weights["tok_embeddings.weight"][tokens]
    for i in range(config.layers):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
        y = norm(x, f"layers.{i}.attention_norm.weight")
        q = rotate((y @ w["attention.wq.weight"].T).view(length, heads, size))
        k = rotate((y @ w["attention.wk.weight"].T).view(length, kv_heads, size))
        v = (y @ w["attention.wv.weight"].T).view(length, kv_heads, size)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores += torch.full((length, length), -torch.inf).triu(1)
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + y @ w["attention.wo.weight"].T
        y = norm(x, f"layers.{i}.ffn_norm.weight")
        gate = y @ w["feed_forward.w1.weight"].T
        y = gate * gate.sigmoid() * (y @ w["feed_forward.w3.weight"].T)
        x = x + y @ w["feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_rotary_pairs_against_an_independent_interleaved_model(tmp_path, kv_heads):
    model = make(kv_heads=kv_heads)
    meta.save(model, None, tmp_path / "m")
    stored = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    expected = interleaved_forward({k: v.double() for k, v in stored.items()}, model.config, TOKENS)
    loaded, _ = llama2rt.load(tmp_path / "m")
    for ours in (model, loaded):
        assert (logits(ours) - expected).abs().max() < 1e-4


def test_params_json_and_its_gaps(tmp_path, small_tokenizer):
    model = make()
    meta.save(model, small_tokenizer, tmp_path / "m")
    path = tmp_path / "m" / "params.json"
    rewrite(path, vocab_size=-1, norm_eps=1e-6, rope_theta=None)
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert loaded.config.vocab_size == small_tokenizer.vocab_size == 400
    assert loaded.config.norm_eps == 1e-6 and loaded.config.rope_theta == 10000.0
    # As Meta distributes it: the tokenizer one level above; and a leftover of old checkpoints.
    os.rename(tmp_path / "m" / "tokenizer.model", tmp_path / "tokenizer.model")
    stored = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    stored["rope.freqs"] = torch.ones(4)
    torch.save(stored, tmp_path / "m" / "consolidated.00.pth")
    loaded, tokenizer = llama2rt.load(tmp_path / "m")
    assert tokenizer.vocab_size == 400
    rewrite(path, n_kv_heads=None)
    with pytest.raises(InputError, match=r"layers\.0\.attention\.wk\.weight: expected shape"):
        llama2rt.load(tmp_path / "m")


def test_llama3_style_embedding_shards(tmp_path):
    model = make()
    meta.save(model, None, tmp_path / "m", shards=2)
    for number, rows in enumerate(model.transformer.embedding.weight.detach().chunk(2)):
        path = tmp_path / "m" / f"consolidated.{number:02}.pth"
        stored = torch.load(path, weights_only=True)
        stored["tok_embeddings.weight"] = rows.clone()
        torch.save(stored, path)
    loaded, _ = llama2rt.load(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))


def test_meta_damage_is_named(tmp_path):
    folder = tmp_path / "m"
    meta.save(make(), None, folder, shards=2)
    second = folder / "consolidated.01.pth"
    whole = second.read_bytes()

    second.write_bytes(whole[: len(whole) // 2])
    assert_refused(folder, r"consolidated\.01\.pth: damaged")
    stored = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save({k: v for k, v in stored.items() if k != "norm.weight"}, second)
    assert_refused(folder, r"consolidated\.01\.pth: norm\.weight: missing")
    torch.save(stored | {"lora.weight": torch.ones(1)}, second)
    assert_refused(folder, r"consolidated\.01\.pth: lora\.weight: not part")
    os.rename(second, folder / "consolidated.02.pth")
    assert_refused(folder, r"m: consolidated\.01\.pth is missing")
    for path in folder.glob("*.pth"):
        path.unlink()
    assert_refused(folder, r"m: no consolidated\.NN\.pth")


def test_ffn_width_formula_of_the_published_models():
    published = {
        "llama2-7b": (256, None),
        "llama2-13b": (256, None),
        "llama2-34b": (256, None),
        "llama2-70b": (4096, 1.3),
        "llama3-8b": (1024, 1.3),
    }
    for name, (multiple, multiplier) in published.items():
        config = LlamaConfig.preset(name)
        assert meta.ffn_hidden(config.dim, multiple, multiplier) == config.ffn_hidden
        params = meta.params(config)
        assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == (multiple, multiplier)
    for width in (1, 7, 96, 100, 171, 1000, 2048, 5461, 5462, 65536):
        config = LlamaConfig(768, 1, 12, 12, width)
        params = meta.params(config)
        got = meta.ffn_hidden(768, params["multiple_of"], params.get("ffn_dim_multiplier"))
        assert got == width


@pytest.mark.parametrize(
    ("path", "preset", "dtype", "context"),
    [
        ("llama-2-7b", "llama1-7b", torch.float16, 4096),
        ("llama-2-13b-chat", "llama1-13b", torch.float32, 4096),
        ("Llama2/13B", "llama1-13b", torch.float32, 4096),
        ("7B", "llama1-7b", torch.bfloat16, 4096),
        ("7B", "llama1-7b", torch.float16, 2048),
        ("7B", "llama1-7b", torch.float32, 2048),
        ("llama2rt/7B", "llama1-7b", torch.float16, 2048),
        ("llama-1-7b", "llama1-7b", torch.bfloat16, 2048),
        ("llama/30B", "llama1-33b", torch.bfloat16, 2048),  # no Llama 2 has this shape
        ("65B", "llama1-65b", torch.bfloat16, 2048),
        ("7B", "llama2-7b", torch.float16, 4096),  # norm_eps 1e-5 is Llama 2's alone
        ("Meta-Llama-3-8B", "llama3-8b", torch.bfloat16, 8192),
    ],
)
def test_early_llama2_folders_are_not_llama1(tmp_path, path, preset, dtype, context, caplog):
    """The first Llama 2 folders hold LLaMA 1's params.json, norm_eps 1e-6 included."""
    got = meta._context(tmp_path / "models" / path, LlamaConfig.preset(preset), dtype)
    assert got == context
    unclear = (path, preset, dtype) == ("7B", "llama1-7b", torch.float32)
    assert ("LLaMA 1 or an early Llama 2" in caplog.text) == unclear


def test_contexts_of_sizes_without_a_preset(tmp_path):
    larger = LlamaConfig(8192, 80, 64, 8, 28672, vocab_size=128256, rope_theta=5e5)
    assert meta._context(tmp_path, larger, torch.bfloat16) == 8192
    code = LlamaConfig(4096, 32, 32, 32, 11008, vocab_size=32016, rope_theta=1e6)
    assert meta._context(tmp_path, code, torch.bfloat16) == 16384


# --- convert ----------------------------------------------------------------------------------
