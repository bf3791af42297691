"""A packed micro-batch that several ranks work on, split on its way into a model and whole again on
its way out.

Ranks of one tensor x context group are all given the same micro-batch and must all return the same
`[T]`, so that objectives know nothing of them. Here a model's inputs are cut to what this rank's
context neighbours leave it, after a document of less than `step` tokens has made T a multiple of
what it is divided by: documents never see each other, and no target is in it.

How far causal attention sees grows along a document, so each context rank takes two chunks of
tokens, one as far from the beginning as the other from the end ("zigzag"): with one long document,
as context parallelism is for, all do the same work. With contiguous parts the last of n ranks would
do nearly twice the mean.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from llama2rt import ops
from llama2rt.model import Llama, ScalarModel
from llama2rt.model.shared_prefix import SharedKeys, SharedPrefixAttention, documents
from llama2rt.model.transformer import Attention, PackedAttention
from llama2rt.ops.embedding import embedding
from llama2rt.parallel.collectives import gather, gather_alike
from llama2rt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Part:
    """What this rank does of a micro-batch. It travels in the place of `cu_seqlens`."""

    tokens: int
    """T of the micro-batch"""
    padded: int
    """with the document that makes it divisible"""
    cu_seqlens: Tensor
    """[B+1], or [B+2] where there is such a document"""
    keys: SharedKeys | None
    """with that document's, where documents share tokens"""
    devices: DeviceMesh | None
    """those that share the tokens"""

    @property
    def context(self) -> ProcessGroup | None:
        return None if self.devices is None else self.devices.get_group()

    @classmethod
    def of(cls, tokens: int, cu_seqlens: Tensor, keys: SharedKeys | None, mesh: Mesh) -> Self:
        context = mesh.degrees["context"]
        step = mesh.degrees["tensor"] * (1 if context == 1 else 2 * context)
        padded = -(-tokens // step) * step
        if padded > tokens:
            cu_seqlens = torch.cat((cu_seqlens, cu_seqlens.new_full((1,), padded)))
            if keys is not None:
                added = torch.arange(tokens, padded, device=keys.rows.device)
                rows = torch.cat((keys.rows, added))
                end = keys.cu_seqlens.new_full((1,), len(rows))
                keys = SharedKeys(rows, torch.cat((keys.cu_seqlens, end)))
        return cls(tokens, padded, cu_seqlens, keys, mesh.along("context"))

    @property
    def chunks(self) -> list[slice]:
        """Of the padded tokens, this rank's."""
        if self.context is None:
            return [slice(0, self.padded)]
        size, last = self.padded // (2 * self.context.size()), 2 * self.context.size() - 1
        rank = self.context.rank()
        return [slice(i * size, (i + 1) * size) for i in (rank, last - rank)]

    def take(self, x: Tensor, filler: int) -> Tensor:
        """x [T] -> this rank's, `filler` in the added document."""
        if self.padded > self.tokens:
            x = torch.cat((x, x.new_full((self.padded - self.tokens,), filler)))
        return x if self.context is None else torch.cat([x[chunk] for chunk in self.chunks])

    def in_order(self, gathered: Tensor) -> Tensor:
        """[padded, ...] by rank -> by token."""
        assert self.context is not None
        first, second = gathered.unflatten(0, (self.context.size(), 2, -1)).unbind(1)
        return torch.cat((first.flatten(0, 1), second.flip(0).flatten(0, 1)))

    def whole(self, x: Tensor) -> Tensor:
        """What every rank has for its tokens -> [T, ...] on all, who all go on alike with it."""
        if self.context is not None:
            x = self.in_order(gather_alike(x, self.context))
        # A copy: of a view, an operation in place would take FSDP's hook before backward away.
        return x if self.padded == self.tokens else x[: self.tokens].clone()

    def attention(self) -> Attention:
        """What this rank's tokens attend to."""
        if self.context is None:
            return documents(self.cu_seqlens, self.keys)[0]
        return ContextAttention.of(self)


@dataclass(frozen=True)
class ContextAttention:
    """This rank's queries see what their documents have before them, wherever it was computed."""

    part: Part
    offsets: list[tuple[Tensor, Tensor]]
    """cu_seqlens and cu_seqlens_k of each chunk's queries among all keys"""

    @classmethod
    def of(cls, part: Part) -> Self:
        return cls(part, [_offsets(part, chunk) for chunk in part.chunks])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._gather(k), self._gather(v)
        results = [
            ops.attention(queries, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k)
            for queries, (cu_seqlens, cu_seqlens_k) in zip(q.chunk(2), self.offsets, strict=True)
        ]
        return torch.cat(results)

    def _gather(self, x: Tensor) -> Tensor:
        """x [T / ranks, Hkv, D] -> [K, Hkv, D], the keys of all documents."""
        part = self.part
        assert part.context is not None
        every = part.in_order(gather(x, part.context))
        if part.keys is None:
            return every
        return embedding(part.keys.rows, every.flatten(1)).view(-1, *x.shape[1:])


def _offsets(part: Part, chunk: slice) -> tuple[Tensor, Tensor]:
    """cu_seqlens and cu_seqlens_k of `chunk`'s queries among all keys, without a look at data.

    A document's queries are those inside the chunk, perhaps none, and its keys end where the last
    of them stands: that is how the op aligns them. What keys are left belong to one more document,
    which asks nothing.
    """
    own = part.cu_seqlens
    ends, keys = own, part.padded
    if part.keys is not None:
        ends, keys = part.keys.cu_seqlens, len(part.keys.rows)
    last = torch.searchsorted(own[1:], chunk.stop) + 1  # the document of the last query
    end = ends[last] - (own[last] - chunk.stop)
    queries = own.clamp(chunk.start, chunk.stop) - chunk.start
    return (
        torch.cat((queries, queries[-1:])),
        torch.cat((torch.minimum(ends, end), ends.new_full((1,), keys))),
    )


@dataclass(frozen=True)
class _Unpadded:
    """The attention of `tokens`, such as a cache of keys, which the added document is none of."""

    tokens: int
    attention: Attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.tokens
        result = self.attention.attend(layer, q[:n], k[:n], v[:n])
        if n == len(q):
            return result
        return nn.functional.pad(result, (0, 0, 0, 0, 0, len(q) - n))


@dataclass(frozen=True)
class _Joined:
    """The attention of a transformer that is called by itself, whose output is made whole."""

    part: Part
    attention: Attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention.attend(layer, q, k, v)


def split_micro_batches(model: Llama | ScalarModel, mesh: Mesh) -> None:
    """Let `model`, and its `hidden`, take and return whole micro-batches in a group that shares
    them."""

    def split(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        tokens, positions, cu_seqlens, *rest = args
        keys = kwargs.get("keys")
        if rest and not isinstance(rest[0], Tensor):  # a scalar model has no targets
            keys = rest.pop(0)
        part = Part.of(len(tokens), cu_seqlens, keys, mesh)
        kwargs = {**kwargs, "keys": None, "tails": None}  # a rank has others' tails
        if "targets" in kwargs:
            kwargs["targets"] = part.take(kwargs["targets"], -1)
        inputs = part.take(tokens, 0), part.take(positions, 0), part
        return (*inputs, *(part.take(targets, -1) for targets in rest)), kwargs

    def join(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        part = args[2]
        if isinstance(output, Tensor):
            return part.whole(output)
        return tuple(part.whole(x) for x in output)

    def attend_to_part(_: nn.Module, args: tuple) -> tuple:
        tokens, positions, attention = args[:3]  # `split` has left out tails
        if isinstance(attention, PackedAttention | SharedPrefixAttention):
            part: Any = attention.cu_seqlens
            if isinstance(part, Part):
                return tokens, positions, part.attention()
            part = Part.of(len(tokens), part, getattr(attention, "keys", None), mesh)
            inner = part.attention()
        elif mesh.degrees["context"] == 1:
            part = Part.of(len(tokens), positions.new_zeros(1), None, mesh)
            inner = _Unpadded(len(tokens), attention)
        else:
            raise NotImplementedError(
                f"a model cut over context ranks: expected packed documents, got "
                f"{type(attention).__name__}; generate with `parallel.tensor_group`"
            )
        return part.take(tokens, 0), part.take(positions, 0), _Joined(part, inner)

    def join_hidden(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return args[2].part.whole(output) if isinstance(args[2], _Joined) else output

    model.register_forward_pre_hook(split, with_kwargs=True)
    model.register_forward_hook(join)
    model.transformer.register_forward_pre_hook(attend_to_part)
    model.transformer.register_forward_hook(join_hidden)
