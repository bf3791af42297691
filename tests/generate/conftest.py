"""Small random models, ours and transformers' with the same weights, and a small tokenizer."""

import pytest
import torch

from llama2rt.model import Llama, LlamaConfig
from llama2rt.text.tokenizer import Tokenizer

_HF = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def build(kv_heads=4, vocab_size=400, dtype=torch.float32, seed=0):
    """Weights large enough that the distribution is far from flat."""
    config = LlamaConfig(
        dim=64,
        layers=2,
        heads=4,
        kv_heads=kv_heads,
        ffn_hidden=128,
        vocab_size=vocab_size,
        context=96,
    )
    model = Llama(config).initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
        model.output.mul_(3)
    return model.to(dtype)


def build_transformers(model):
    """transformers' Llama with the same weights."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    c = model.config
    theirs = LlamaForCausalLM(
        TheirConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.ffn_hidden,
            vocab_size=c.vocab_size,
            max_position_embeddings=c.context,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
        )
    ).to(model.output.dtype)
    state = {}
    for name, value in model.state_dict().items():
        match name.split("."):
            case ["output"]:
                state["lm_head.weight"] = value
            case ["blocks", i, module, "weight"]:
                state[f"model.layers.{i}.{_HF[module]}.weight"] = value
            case [module, "weight"]:
                state[f"{_HF[module]}.weight"] = value
    theirs.load_state_dict(state)
    return theirs.eval()


class Ids:
    """A tokenizer for tests on token ids: words are numbers, EOS is any id (-1: never)."""

    bos, vocab_size = 1, 400

    def __init__(self, eos=2):
        self.eos = eos

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="session")
def models():
    """`models.build`, `models.build_transformers`, `models.Ids`: importlib mode has no imports
    between test files."""
    import types

    return types.SimpleNamespace(build=build, build_transformers=build_transformers, Ids=Ids)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    words = ["a", "small", "assistant", "answers", "questions", "about", "dates", "and", "units"]
    texts = [f"{a} {b} {i * 37 % 101}" for i, a in enumerate(words * 12) for b in words]
    return Tokenizer.train(texts, 330, tmp_path_factory.mktemp("tokenizer"))
