"""The one place that decides in which precision weights are held.

A bf16 weight holds 8 bits: at PPO and DPO learning rates almost every update would round to
nothing. Hence the rule:

- What is trained is held in fp32: each trainable parameter has an fp32 master, from which its copy
  in the compute dtype is made anew after every step. Training in fp32, the two are one tensor.
- Masters have one owner. Here it is `MasterWeights`, for an optimizer whose parameters are whole.
  FSDP2 is the other possible one: its shards are fp32 parameters already, and its mixed-precision
  policy makes the bf16 copies as it gathers them; such parameters come to the optimizer with fp32
  as compute dtype and get no second master. Never both.
- A model folder holds the masters (`checkpoint.native.unrounded`), and what trains on loads it as
  stored: a stage starts from what the one before it held, also where that moved a weight by less
  than its bf16 rounding. Frozen uses (sampling, reference, scoring) load in the dtype they compute
  in; exports (`convert --dtype`) may be rounded.
- No autocast: activations have the weights' dtype.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from llama2rt.checkpoint.native import unrounded
from llama2rt.errors import InputError
from llama2rt.parallel.shards import is_dtensor, is_fsdp

MASTER = torch.float32


def compute_dtype(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """dtype of activations and of the weights as the model sees them."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


class MasterWeights:
    """fp32 masters of a model's trainable parameters; the model is put into `dtype`.

    Parameters that come in fp32 keep those values as their masters; those that come with masters of
    an optimizer before this one keep these. A parameter of another dtype carries its master as the
    attribute `master` (Megatron's `main_param`), where `checkpoint.native` finds it. ValueError
    where nothing is trainable. Of a model under FSDP2 the masters are this rank's shards, which its
    parameters are already. Masters on another `device` than the model's are copies in any dtype.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: expected at least one parameter that requires a gradient")
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        if is_fsdp(model):
            self.tensors: list[Tensor] = [_shard(parameter) for parameter in self.parameters]
            if any(device not in (None, shard.device.type) for shard in self.tensors):
                raise InputError("train.optimizer_device: of a model that is sharded, leave it out")
            return  # its policy makes the copies in `dtype`
        self.tensors = [unrounded(p).to(device or p.device, MASTER) for p in self.parameters]
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for parameter, master in zip(self.parameters, self.tensors, strict=True):
            if dtype != MASTER:
                parameter.master = master  # type: ignore[attr-defined]
            elif master.device == parameter.device:
                parameter.data = master

    @torch.no_grad()
    def publish(self, i: int) -> None:
        """Round master `i` into its parameter."""
        parameter, master = self.parameters[i], self.tensors[i]
        if parameter.dtype != MASTER or parameter.device != master.device:
            parameter.copy_(master)


def _shard(parameter: nn.Parameter) -> Tensor:
    """The fp32 part of a parameter under FSDP2 that this rank holds, sharing its storage."""
    if not is_dtensor(parameter) or parameter.dtype != MASTER:
        raise ValueError(f"expected an fp32 shard of FSDP2, got {type(parameter).__name__}")
    local: Tensor = parameter.to_local().detach()
    return local
