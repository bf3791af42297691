"""Pipeline parallelism: each rank has some of the layers, and micro-batches pass through them in
torch's 1F1B schedule (Narayanan et al. 2021), for pretraining and SFT.

The schedule cuts a step's tensors along their first dimension and sends activations of one shape.
So every packed micro-batch of a step gets as many tokens as the longest by a document without
targets, and as many documents as the most by empty ones; documents never see each other. A stage
hands on the sum of its output and the residual stream, half of what the two are.

A rank keeps a `Llama` under whose names only its own modules have weights: checkpoints and model
folders know nothing of stages. The stage's loss is the caller's objective over the last stage's
log-probabilities. Stacks with data and shard; what it does not stack with `mesh.check` refuses.
Left out: schedules with several stages a rank, and the entropy, which no such objective asks for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from llama2rt import ops
from llama2rt.checkpoint.files import weights
from llama2rt.data.packing import Batch, filler
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.transformer import PackedAttention, Rotary
from llama2rt.parallel.mesh import Mesh
from llama2rt.parallel.shards import whole_tensor

if TYPE_CHECKING:
    from torch.distributed.pipelining import Schedule1F1B

Objective = Callable[[Any, Any], tuple[Tensor, dict[str, Any]]]


class Elsewhere(nn.Module):
    """Stands in the place of a module that another stage has."""


@dataclass(frozen=True)
class Place:
    """Which part of a model this rank has."""

    devices: DeviceMesh
    """that together have the model, by stage"""
    layers: int
    dtype: torch.dtype
    """of activations"""
    main: bool
    """whether rank 0 is one of them"""

    @property
    def group(self) -> dist.ProcessGroup:
        return self.devices.get_group()

    @property
    def stage(self) -> int:
        return self.group.rank()

    @property
    def stages(self) -> int:
        return self.group.size()

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def stage_of(self, name: str) -> int:
        return stage_of(name, self.layers, self.stages)


def stage_of(name: str, layers: int, stages: int) -> int:
    """Which stage has the weight `name`. Blocks are shared out evenly, those that are over to the
    first stages: the last has the output matrix."""
    if name.startswith("transformer.embedding."):
        return 0
    if not name.startswith("transformer.blocks."):
        return stages - 1
    block = int(name.split(".")[2])
    each, over = divmod(layers, stages)
    long = over * (each + 1)
    return block // (each + 1) if block < long else over + (block - long) // each


class PipelinedLlama(Llama):
    """A stage of a model. Called without gradients as the model is, by all ranks of its pipeline,
    it returns what the model returns; gradients are those of `accumulate`."""

    place: Place
    shape: Llama
    """the whole model, without memory"""

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `Llama`. From the schedule all have a first dimension of 1, and `tokens` are what the
        stage before returned, [1, T, dim], where there is one."""
        if positions.dim() == 2:
            chunk = (x[0] for x in (tokens, positions, cu_seqlens, targets))
            return self._run(*chunk)
        plain = {"keys": None, "temperature": 1.0, "entropy": False}
        options.pop("tails", None)  # all tokens are computed
        asked = {name: value for name, value in options.items() if value != plain[name]}
        if asked:
            raise NotImplementedError(f"a pipeline takes whole documents and targets, got {asked}")
        if torch.is_grad_enabled():
            raise NotImplementedError("a pipeline's gradients are those of train.fit's steps")
        return self._in_turn(tokens, positions, cu_seqlens, targets)

    def hidden(self, *_: Any) -> Tensor:
        raise NotImplementedError("hidden states of a pipeline")

    def accumulate(
        self, micros: list[Batch], objective: Objective, weight: int
    ) -> dict[str, float]:
        """Add the gradients of a step's micro-batches to this stage's weights: of the sum of their
        losses over `weight`. Returns the losses' sum and other sums of `objective`, on all stages.
        """
        place, count = self.place, len(micros)
        # The schedule fills the pipeline at least once.
        micros = micros + [filler().to(micros[0].tokens.device)] * (place.stages - count)
        sums: dict[str, Tensor | float] = {}

        def loss_of(output: Tensor, number: Tensor) -> Tensor:
            micro = micros[int(number)]
            logprob = output[0, : len(micro.tokens)]
            loss, metrics = objective(lambda *_, tails=None: logprob, micro)
            if micro.weight == 0:  # fills up a share
                return loss * 0
            for name, value in {"loss": loss, **metrics}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                sums[name] = sums.get(name, 0.0) + value
            return loss / weight

        tokens, others = _of_one_shape(micros)
        schedule = self._schedule(len(micros), tokens.shape[1], loss_of)
        inputs = (tokens,) if place.first else ()
        numbers = torch.arange(len(micros)) if place.last else None
        schedule.step(*inputs, target=numbers, return_outputs=False, **others)
        result = [{name: float(value) for name, value in sums.items()}]
        dist.broadcast_object_list(result, group=place.group, group_src=place.stages - 1)
        return result[0]

    def _schedule(
        self, micros: int, tokens: int, loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> "Schedule1F1B":
        """The schedule of a step: so many micro-batches with so many tokens each. Shapes are given,
        so that nothing runs to find them out."""
        # Here, because it takes a second to import, and whoever trains imports this module.
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        place, device = self.place, next(self.parameters()).device
        hidden = torch.empty(
            1, tokens, self.config.dim, dtype=place.dtype, device="meta", requires_grad=True
        )
        ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
        logprob = torch.empty(1, tokens, device="meta", requires_grad=True)
        stage = PipelineStage(
            self,
            place.stage,
            place.stages,
            device,
            input_args=ids if place.first else hidden,
            output_args=logprob if place.last else hidden,
            group=place.group,
        )
        return Schedule1F1B(stage, micros, loss_fn=loss_of, scale_grads=False)

    def _run(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, targets: Tensor) -> Tensor:
        """This stage's layers: tokens [T] or the stream [T, dim] -> the stream, or logprob [T],
        with a first dimension of 1, and no views, as FSDP wants outputs."""
        transformer = self.transformer
        rotary = Rotary(*transformer.rotary(x.device), positions)
        attention = PackedAttention(cu_seqlens)
        residual: Tensor | None = None
        if self.place.first:
            x = transformer.embedding(x)
        for block in transformer.blocks:
            if not isinstance(block, Elsewhere):
                x, residual = transformer.run_block(block, x, residual, rotary, attention)
        if not self.place.last:
            assert residual is not None  # a stage has a block
            return x[None] + residual[None]
        hidden = transformer.norm(x, residual)[0]
        logprob = ops.token_logprob(hidden, self.output.weight, targets)
        assert isinstance(logprob, Tensor)
        return torch.stack((logprob,))

    def _in_turn(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, targets: Tensor
    ) -> Tensor:
        """One micro-batch through all stages, one after the other -> logprob [T] on all."""
        place, x = self.place, tokens
        if not place.first:
            x = torch.empty(len(tokens), self.config.dim, dtype=place.dtype, device=tokens.device)
            dist.recv(x, group=place.group, group_src=place.stage - 1)
        x = self._run(x, positions, cu_seqlens, targets)[0]
        if not place.last:
            dist.send(x.contiguous(), group=place.group, group_dst=place.stage + 1)
            x = torch.empty(len(tokens), device=tokens.device)
        dist.broadcast(x, group=place.group, group_src=place.stages - 1)
        return x

    def whole_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole weight) of all stages in turn, on rank 0; None where it is elsewhere. All
        ranks must go through all of them."""
        place, own = self.place, weights(self)
        device = next(iter(own.values())).device
        for name, shape in weights(self.shape).items():
            weight, stage = None, place.stage_of(name)
            if stage == place.stage:
                weight = whole_tensor(own[name].detach())
            if stage > 0 and place.main:
                if weight is not None:
                    dist.send(weight.contiguous(), group=place.group, group_dst=0)
                elif place.first:
                    weight = torch.empty(shape.shape, device=device)
                    dist.recv(weight, group=place.group, group_src=stage)
            yield name, weight


def cut_layers(model: Llama | ScalarModel, mesh: Mesh, dtype: torch.dtype) -> None:
    """Leave of a model that every rank holds whole what this rank's stage has, in place. `dtype`:
    of activations. InputError for another model than a plain `Llama`."""
    devices = mesh.along("pipeline")
    assert devices is not None
    with torch.device("meta"):
        shape = Llama(model.config)
    names = set(weights(shape))
    if type(model) is not Llama or set(weights(model)) != names:
        raise InputError(
            "parallel.pipeline: expected a language model without adapters: pretraining and SFT of "
            "all weights alone"
        )
    main = 0 in devices.mesh.tolist()
    place = Place(devices, model.config.layers, dtype, main)
    for name in sorted(names, reverse=True):
        if place.stage_of(name) != place.stage:
            parts = name.split(".")
            # A block as a whole; its number stays taken, so that the others keep theirs.
            module = ".".join(parts[:3] if parts[1] == "blocks" else parts[:-1])
            model.set_submodule(module, Elsewhere())
    model.__class__ = PipelinedLlama
    model.place = place  # type: ignore[assignment]
    # Not as a module: its weights are nobody's.
    model.__dict__["shape"] = shape


def _of_one_shape(micros: list[Batch]) -> tuple[Tensor, dict[str, Any]]:
    """(tokens [n, T], {positions and targets [n, T], cu_seqlens [n, B+1]})."""
    if any(micro.keys is not None for micro in micros):
        raise NotImplementedError("a pipeline takes whole documents, got ones that share tokens")
    tokens = max(len(micro.tokens) for micro in micros)
    documents = max(micro.documents for micro in micros) + 1
    padded = [_padded(micro, tokens, documents) for micro in micros]
    return torch.stack([micro.tokens for micro in padded]), {
        name: torch.stack([getattr(micro, name) for micro in padded])
        for name in ("positions", "cu_seqlens", "targets")
    }


def _padded(micro: Batch, tokens: int, documents: int) -> Batch:
    more = tokens - len(micro.tokens)
    ends = (0, documents - micro.documents)
    return replace(
        micro,
        tokens=F.pad(micro.tokens, (0, more)),
        positions=F.pad(micro.positions, (0, more)),
        targets=F.pad(micro.targets, (0, more), value=-1),
        # The first of these documents has all added tokens.
        cu_seqlens=F.pad(micro.cu_seqlens, ends, value=tokens),
    )
