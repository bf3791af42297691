"""Names in files stay what they were, whatever the modules are called that own the weights."""

import pytest
import torch
from safetensors.torch import save_file

import llama2rt
from llama2rt import Llama, LlamaConfig
from llama2rt.checkpoint import hf, native
from llama2rt.model import ScalarModel
from llama2rt.train import Optimizer, TrainOptions

BLOCK = ["attention_norm", "query", "key", "value", "attention_output", "ffn_norm", "gate", "up",
         "down"]  # fmt: skip
TRANSFORMER = ["embedding", *(f"blocks.{i}.{layer}" for i in range(2) for layer in BLOCK), "norm"]
HF_BLOCK = ["input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"),
            "post_attention_layernorm",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
HF = ["model.embed_tokens", *(f"model.layers.{i}.{x}" for i in range(2) for x in HF_BLOCK),
      "model.norm"]  # fmt: skip


def make(kind: str):
    config = LlamaConfig(32, 2, 4, 2, 48, vocab_size=40, context=64, tied=kind == "tied")
    model = (ScalarModel if kind == "scalar" else Llama)(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            numbers = torch.arange(parameter.numel()) * (number + 3) % 251
            parameter.copy_(numbers.view(parameter.shape) / 125 - 1)
    return model


def stored(kind: str, model, layout: str) -> dict[str, torch.Tensor]:
    """Weights under the names that folders had before modules had theirs."""
    names = [f"{name}.weight" for name in (TRANSFORMER if layout == "native" else HF)]
    if kind == "scalar" and layout == "native":
        names = [f"backbone.{name}" for name in names]
    tensors = dict(zip(names, model.transformer.parameters(), strict=True))
    if kind == "scalar":
        tensors["head.weight" if layout == "native" else "score.weight"] = model.head.weight
    if kind == "llama":
        tensors["output" if layout == "native" else "lm_head.weight"] = model.output.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["native", "hf"])
@pytest.mark.parametrize("kind", ["llama", "tied", "scalar"])
def test_folders_are_the_same_bytes(kind, layout, tmp_path):
    model = make(kind)
    (native if layout == "native" else hf).save(model, None, tmp_path / "m")
    save_file(stored(kind, model, layout), tmp_path / "expected", metadata={"format": "pt"})
    file = tmp_path / "m" / "model.safetensors"
    assert file.read_bytes() == (tmp_path / "expected").read_bytes()
    loaded, _ = llama2rt.load(tmp_path / "m")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert type(loaded) is type(model) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["transformer.norm.weight", "output.weight", "norm"])
def test_names_of_modules_are_not_those_of_files(name, tmp_path):
    model = make("llama")
    native.save(model, None, tmp_path / "m")
    tensors = {**stored("llama", model, "native"), name: torch.ones(32)}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(llama2rt.errors.InputError, match=f"safetensors: {name}: not part of"):
        llama2rt.load(tmp_path / "m")


@pytest.mark.parametrize("kind", ["llama", "tied", "scalar"])
def test_run_checkpoints_keep_their_names(kind):
    """So that a run goes on from a checkpoint that was written before. A tied weight is there as
    the output."""
    names = stored(kind, make(kind), "native").keys()
    if kind == "tied":
        names = {"output", *names} - {"embedding.weight"}
    state = Optimizer(make(kind), TrainOptions()).state_dict()
    parts = ("master", "exp_avg", "exp_avg_sq", "step")
    assert state.keys() == {f"{part}.{name}" for part in parts for name in names}
