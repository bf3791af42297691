"""Stages that sample, on several ranks: what they draw, pick, train and log is one process's."""

import json

import numpy as np
import pocket as problem
import pytest
import torch
from parallel_rollouts import ppo_parts, run_stage
from safetensors.torch import load_file

from llama2rt.parallel import ParallelOptions
from llama2rt.rollout.responses import read_responses
from llama2rt.stages import ppo, rejection


def rollout_recipe(kind, pocket, **settings):
    given = {
        "init": pocket.sft,
        "rewards.helpfulness": pocket.helpfulness,
        "rewards.safety": pocket.safety,
        "data": [pocket.prompts],
        "sampling.max_tokens": 8,
    }
    return kind(**problem.tables(given | settings))


def ppo_recipe(pocket, **settings):
    given = {
        "iterations": 2,
        # Not the ranks' multiple, nor the mini-batches'.
        "batch_size": 15,
        "mini_batch_size": 6,
        "beta": 0.05,
        "missing_eos_penalty": 1.0,
        "critic_lr": 3e-3,
        "train": {"lr": 1e-3, "micro_tokens": 40, "validate_every": 1, "checkpoint_every": 1},
    }
    return rollout_recipe(ppo.PpoRecipe, pocket, **(given | settings))


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, ParallelOptions()), (4, ParallelOptions(data=2))]
)
def test_an_iteration_of_ppo_is_one_processs(on_ranks, pocket, ranks, parallel):
    alone = ppo_parts(ppo_recipe(pocket))
    results = on_ranks(ranks, ppo_parts, ppo_recipe(pocket, parallel=parallel))
    for result in results:
        # The gathered policy samples what the trained one says, and is still the reference.
        assert result["measured"]["kl_k1"] == result["measured"]["kl_k3"] == 0.0
        assert result["measured"]["sampler_gap"] < 1e-4
        assert result["tokens"] == alone["tokens"]
        for part in ("measured", "improved"):
            assert result[part] == pytest.approx(alone[part], rel=1e-5, abs=1e-5), part
        assert result["explained"] == pytest.approx(alone["explained"], rel=1e-5)
        for part in ("advantages", "values"):
            torch.testing.assert_close(result[part], alone[part], rtol=1e-5, atol=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-5)
