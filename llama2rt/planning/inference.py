"""Bytes that a rank holds of models that it only reads or samples from, by component; as `memory`
counts what is trained."""

import torch

from llama2rt.generate import budget
from llama2rt.model.config import LlamaConfig
from llama2rt.planning.memory import FP32, Components, Setting, parts
from llama2rt.planning.work import Model, Sampling


def frozen(model: Model, setting: Setting) -> float:
    """A model that only reads, in the compute dtype: whole on every rank, or cut as the trained
    ones are (stages/inputs.py)."""
    if model.held == "sharded":
        return parts(model, setting.tensor).total / setting.shards * setting.compute_bytes
    return parts(model).total * setting.compute_bytes


def reading(model: Model, setting: Setting) -> Components:
    """What a frozen model takes on the device for one forward pass over a micro-batch: itself where
    it waits elsewhere, or what FSDP holds whole of its shards, as `memory.training` counts it."""
    forward = budget.forward_bytes(
        model.config, _dtype(setting.compute_bytes), setting.micro_tokens, 0, restricted=False
    )
    if model.held == "offloaded":
        return {"frozen": frozen(model, setting), "activations": forward}
    here = parts(model, setting.tensor)
    gathered = (here.rest + 2 * here.block) * setting.compute_bytes if setting.fsdp else 0.0
    return {"gathered": gathered, "activations": forward}


def rollout(sampling: Sampling, setting: Setting, free: float | None) -> Components:
    """What sampling takes: the policy, keys and values of the sequences that run at once, one
    forward pass. Ranks of a tensor group share the heads of the same sequences.

    free: bytes that are left on the device before it, of which the engine takes half of what the
    policy leaves where the recipe sets no bound (generate/engine.py); None where the device is not
    known.
    """
    model, width = sampling.policy, setting.compute_bytes
    policy = answering(sampling, setting)
    if sampling.served:
        return policy
    free = None if free is None else free - sum(policy.values())
    sequence = kv_cache_bytes(model.config, width, sampling.longest) / setting.tensor
    forward = budget.forward_bytes(
        model.config, _dtype(width), budget.PREFILL_TOKENS, sampling.at_once, restricted=False
    )
    wanted = sampling.at_once * sequence
    allowed = sampling.cache_bytes
    if allowed is None and free is not None:
        allowed = int(max(free, 0) / 2)
    if allowed is not None:
        # The engine works on fewer sequences at a time where memory is short, down to one.
        forward = min(forward, allowed // 4)
        wanted = min(wanted, max(sequence, allowed - forward))
    return {**policy, "kv_cache": wanted, "activations": forward}


def answering(sampling: Sampling, setting: Setting) -> Components:
    """What the policy that samples takes beside its states: all of it, or this rank's part of every
    matrix (parallel/tensor_group.py)."""
    here = parts(sampling.policy, setting.tensor).total * setting.compute_bytes
    if not sampling.policy.lent:
        return {"weights": here}  # loaded for it
    return {"gathered": here if setting.fsdp else 0.0}  # a copy of the shards


def kv_cache_bytes(config: LlamaConfig, width: int, tokens: int) -> int:
    """Keys and values of one sequence of `tokens`, in whole pages (generate/kv_cache.py)."""
    return budget.sequence_bytes(config, _dtype(width), tokens)


def _dtype(width: int) -> torch.dtype:
    return torch.float32 if width == FP32 else torch.bfloat16
