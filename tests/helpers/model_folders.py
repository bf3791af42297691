"""A small model to write into folders, folders to damage, and what two models share."""

import json
from pathlib import Path

import pytest
import torch
from small_models import packed
from torch import Tensor

import llama2rt
from llama2rt import Llama, LlamaConfig
from llama2rt.checkpoint import files
from llama2rt.errors import InputError

TOKENS = torch.tensor([1, 250, 13, 77, 399, 5, 6, 300])
BATCH = packed(TOKENS)


def make(**changes) -> Llama:
    shape = {"dim": 64, "layers": 2, "heads": 8, "kv_heads": 4, "ffn_hidden": 96}
    shape |= {"vocab_size": 400, "context": 64, "norm_eps": 3e-5, "rope_theta": 700.0}
    model = Llama(LlamaConfig(**(shape | changes))).initialize(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                torch.rand(parameter.shape).add_(0.5) * (5 if parameter.dim() > 1 else 1)
            )
    return model


def logits(model: Llama) -> Tensor:
    with torch.no_grad():
        return model.logits(*BATCH)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = files.weights(one), files.weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- native -----------------------------------------------------------------------------------


def rewrite(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is None:
            del value[key]
        else:
            value[key] = new
    path.write_text(json.dumps(value))


def assert_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        llama2rt.load(folder)
