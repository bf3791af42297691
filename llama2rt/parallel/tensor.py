"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022).

Matrices are cut so that a block talks four times a pass: tokens are gathered behind each norm, and
what the attention's and the feed-forward's last matrix give is summed as it is scattered over
tokens. Between, norms and the residual stream stand on each rank's tokens alone. Query, key, value,
gate and up are cut by outputs, the two matrices back by inputs, embedding and output by vocabulary.

Weights are DTensors, for FSDP2, optimizers and checkpoints; modules compute on their local parts
with plain activations. That is less than a DTensor at each operation costs a host, and `view`,
backends and compilation see what they see in one process. A model that only reads (`local_weights`)
has plain local parts from the beginning: it makes a pass a token.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import llama2rt.parallel.sharding  # noqa: F401  (the rule of token_logprob on a cut weight)
from llama2rt.errors import InputError
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.heads import Head, value
from llama2rt.model.transformer import Embedding, Linear, Norm, norm
from llama2rt.ops.embedding import embedding
from llama2rt.ops.linear import linear
from llama2rt.parallel.collectives import gather, gather_alike, scatter_sum, sum_gradient
from llama2rt.parallel.mesh import Mesh, check
from llama2rt.parallel.shards import is_dtensor, local_part

COLUMNWISE = ("query", "key", "value", "gate", "up")
ROWWISE = ("attention_output", "down")


class _Cut(nn.Module):
    """A module whose `weight` is a DTensor, or this rank's part of one."""

    devices: DeviceMesh

    @property
    def group(self) -> ProcessGroup:
        return self.devices.get_group()

    @property
    def local(self) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return local_part(self.weight)


class ColumnwiseLinear(_Cut, Linear):
    """[T, K] -> this rank's outputs of [T, N]. Its gradient of the input is a part of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.local)


class VocabularyOutput(_Cut, Linear):
    """[T, dim], the same on all ranks -> logits [T, V] on all, the same bits. Its weight is for
    `ops.token_logprob` too, which takes it cut."""

    def forward(self, x: Tensor) -> Tensor:
        own = linear(sum_gradient(x, self.group), self.local)
        share = -(-self.out_features // self.group.size())  # the last rank may have less
        own = nn.functional.pad(own, (0, share - own.shape[1]))
        every = gather_alike(own[None], self.group)
        return every.transpose(0, 1).flatten(1)[:, : self.out_features]


class RowwiseLinear(_Cut, Linear):
    """This rank's inputs of [T, K] -> its tokens of [T, N]."""

    def forward(self, x: Tensor) -> Tensor:
        return scatter_sum(linear(x, self.local), self.group)


class VocabularyEmbedding(_Cut, Embedding):
    """tokens [T] -> this rank's rows of [T, dim], whose sum each rank knows where it has the
    token's row and takes for 0 elsewhere."""

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.local
        row = tokens - self.group.rank() * -(-self.num_embeddings // self.group.size())
        elsewhere = (row < 0) | (row >= weight.shape[0])
        rows = embedding(row.masked_fill(elsewhere, 0), weight)
        return scatter_sum(rows.masked_fill(elsewhere[:, None], 0.0), self.group)


class SequenceNorm(_Cut, Norm):
    """Rows of x and of the residual stream -> (the norm's of all tokens, this rank's of the
    stream), to matrices that each rank has a part of."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, residual = self._norm(x, residual)
        return gather(y, self.group), residual

    def _norm(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = sum_gradient(self.local, self.group)
        return norm(x, residual, weight, self.eps)


class FinalNorm(SequenceNorm):
    """The same to what all ranks compute alike, or bring to one gradient themselves."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, residual = self._norm(x, residual)
        return gather_alike(y, self.group), residual


class WholeHead(_Cut, Head):
    """All ranks compute all values from all hidden states."""

    def forward(self, hidden: Tensor) -> Tensor:
        return value(hidden, self.local)


def tensor_parallel(model: Llama | ScalarModel, mesh: Mesh) -> None:
    """Cut a model whose weights every rank holds whole over `mesh`'s tensor dimension, in place.

    Parameters become DTensors on that dimension under the names they had. `split_micro_batches`
    must follow: inside, T is a multiple of the degree. InputError as of `mesh.check`, since the
    mesh may have been built for another of the models that share it.
    """
    devices = mesh.along("tensor")
    assert devices is not None
    check(mesh.degrees, model.config)
    transformer = model.transformer
    for block in transformer.blocks:
        for name in COLUMNWISE:
            _cut(getattr(block, name), ColumnwiseLinear, devices, Shard(0))
        for name in ROWWISE:
            _cut(getattr(block, name), RowwiseLinear, devices, Shard(1))
        for name in ("attention_norm", "ffn_norm"):
            _cut(getattr(block, name), SequenceNorm, devices, Replicate())
    _cut(transformer.norm, FinalNorm, devices, Replicate())
    _cut(transformer.embedding, VocabularyEmbedding, devices, Shard(0))
    if isinstance(model, ScalarModel):
        _cut(model.head, WholeHead, devices, Replicate())
    else:
        _cut(model.output, VocabularyOutput, devices, Shard(0))
        if model.config.tied:
            model.output.weight = transformer.embedding.weight


@torch.no_grad()
def local_weights(model: Llama | ScalarModel) -> None:
    """Let a model that `tensor_parallel` has cut, and nothing else, hold its parts as plain frozen
    tensors, in place: they have the shapes that this rank computes with, and asking a DTensor for
    its part at each product costs a host some 10 us. The output's stays one, for
    `ops.token_logprob`."""
    kept = {id(model.output.weight)} if isinstance(model, Llama) else set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_dtensor(parameter) and id(parameter) not in kept:
                setattr(module, name, nn.Parameter(local_part(parameter), requires_grad=False))


def _cut(module: nn.Module, kind: type, devices: DeviceMesh, placement: Placement) -> None:
    """Turn `module` into one of `kind`, which is its own kind with a cut weight."""
    plain = kind.__mro__[kind.__mro__.index(_Cut) + 1]
    if type(module) is not plain:
        raise InputError(
            f"parallel.tensor: expected a {plain.__module__}.{plain.__name__} to cut, got "
            f"{type(module).__module__}.{type(module).__name__}"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.__class__ = kind
    module.devices = devices  # type: ignore[assignment]
    # Every rank cuts its own copy: nothing is sent.
    cut = distribute_tensor(weight.detach(), devices, [placement], src_data_rank=None)
    module.weight = nn.Parameter(cut, requires_grad=weight.requires_grad)
