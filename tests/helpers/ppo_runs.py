"""What the tests of PPO and of its relatives share, on the pocket problem."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pocket as problem
import torch
from torch import nn

from llama2rt.rollout.responses import read_responses
from llama2rt.stages import ppo
from llama2rt.stages.inputs import RolloutInputs

COUNT = 12


def opened(settings: ppo.PpoRecipe, count: int = COUNT) -> RolloutInputs:
    """What PPO with these settings reads, with its first `count` prompts only."""
    inputs = ppo.open_inputs(settings)
    return dataclasses.replace(inputs, prompts=inputs.prompts[:count])


def correct_share(path: Path) -> float:
    responses = read_responses(path)
    return float(np.mean([problem.correct(r.prompt.kind, r.text) for r in responses]))


def perturb(model: nn.Module, size: float = 0.05, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def logged(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
