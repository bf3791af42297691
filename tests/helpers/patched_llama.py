"""A small Llama of transformers, patched and as transformers made it, and batches of every kind."""

import copy

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

if int(transformers.__version__.split(".")[0]) < 5:  # a newer one than was tested must fail here
    pytest.skip(
        f"transformers {transformers.__version__}: exports are for 4 and 5, patches for 5 alone",
        allow_module_level=True,
    )

from llama2rt.integrations.transformers import CACHE, patch_transformers  # noqa: E402

__all__ = ["CACHE", "patch_transformers"]  # imported here after the check above

VOCABULARY, LAYERS, ROWS, LENGTH = 150, 2, 3, 20


def a_config(**settings):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return transformers.LlamaConfig(**shape | settings)


def a_model(**settings):
    """Random weights so large that every layer matters and logits have about unit scale."""
    model = transformers.LlamaForCausalLM(a_config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(
                1 + 0.2 * noise if parameter.dim() == 1 else noise / parameter.shape[1] ** 0.5
            )
    return model.eval()


def both(**settings):
    """(the model patched, the same as it was)"""
    theirs = a_model(**settings)
    return patch_transformers(copy.deepcopy(theirs)), theirs


def batch(kind: str) -> tuple[dict[str, Tensor | bool], Tensor]:
    """Arguments of a model, and which tokens [ROWS, LENGTH] are not padding."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    if kind == "left":
        mask[0, :7], mask[2, :19] = 0, 0
    elif kind == "right":
        mask[1, 13:], mask[2, 1:] = 0, 0
    elif kind == "holes":
        mask[0, 3:9], mask[1, :2], mask[1, 11] = 0, 0, 0
    elif kind == "all":
        mask[0] = 0
    inputs: dict = {"input_ids": torch.randint(0, VOCABULARY, (ROWS, LENGTH))}
    if kind == "packed":
        rows = ([7, 12, 1], [20], [1, 1, 18])
        positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
        inputs |= {"position_ids": torch.stack(positions), "use_cache": False}
    elif kind != "plain":
        inputs["attention_mask"] = mask
    return inputs, mask.bool()


def answers(inputs, counted: Tensor) -> Tensor:
    """Labels of the tokens that are not padding and that none predicts, and not of a few more."""
    labels = inputs["input_ids"].masked_fill(~counted, -100)
    labels[:, 1:][~counted[:, :-1]] = -100
    labels[1, 5:9] = -100
    return labels


KINDS = ["plain", "left", "right", "holes", "all", "packed"]


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to 1e-5 of the largest value, in fp32."""
    assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def gradients(model, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
