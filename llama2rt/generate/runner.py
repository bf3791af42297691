"""One forward pass of the engine: on packed weights in one native call where it can be, else by the
model's own modules.

Native are plain Llamas on a CPU, whose weights are copied once into the layout that decoding reads
fastest (ops.packed), and again when they have changed. All else goes through `model.transformer`
as in training: GPUs, other backends, sharded models, adapters, hooks. `Runner.path` says which.
"""

import threading
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from llama2rt.errors import InputError
from llama2rt.generate.kv_cache import KVCache
from llama2rt.model.llama import Llama
from llama2rt.model.transformer import Block, Embedding, Linear, Norm, Transformer, run_plainly
from llama2rt.ops import linear, packed

Weights = Literal["same", "int8"]

_PLAIN_MODULES = (Llama, Transformer, Embedding, nn.ModuleList, Block, Linear, Norm)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def why_not_native(model: nn.Module) -> str:
    """Why the model's forward passes take its own modules; "" where they need not."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "all modules have forward hooks"
    for name, module in model.named_modules():
        if type(module) not in _PLAIN_MODULES:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if _is_hooked(module):
            return f"{name or 'the model'} has forward hooks"
    transformer = cast(Llama, model).transformer
    if transformer.run_block is not run_plainly:
        return "its blocks are run in another way (transformer.run_block)"
    first = transformer.embedding.weight
    for name, weight in model.named_parameters():
        if reason := packed.why_not(weight):
            return reason
        if weight.dtype != first.dtype:
            return f"{name} is of {weight.dtype}, the embedding of {first.dtype}"
        if not weight.is_contiguous():
            return f"{name} is not contiguous"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return ""


@dataclass(frozen=True)
class _Weight:
    """Linear layers that read one input, and their weights in panels."""

    layers: tuple[Linear, ...]
    packed: packed.PackedWeight

    def tensors(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.layers]


def _packed(storage: str, groups: list[tuple[Linear, ...]]) -> list[_Weight]:
    """All in one piece of memory."""
    shapes = [
        (sum(layer.weight.shape[0] for layer in layers), layers[0].weight.shape[1])
        for layers in groups
    ]
    sizes = [packed.packed_bytes(storage, *shape) for shape in shapes]
    pieces = packed.memory(sum(sizes)).split(sizes)
    return [
        _Weight(layers, packed.PackedWeight(storage, *shape, piece))
        for layers, shape, piece in zip(groups, shapes, pieces, strict=True)
    ]


class _Native:
    """A model's weights in panels, and the native model that reads them."""

    def __init__(self, model: Llama, storage: str) -> None:
        self.storage = storage
        blocks = cast(list[Block], model.transformer.blocks)
        groups: list[tuple[Linear, ...]] = []
        for block in blocks:
            groups += [(block.query, block.key, block.value), (block.attention_output,)]
            groups += [(block.gate, block.up), (block.down,)]
        self._all = _packed(storage, [*groups, (model.output,)])
        self._output = self._all[-1]
        self._blocks = [self._all[4 * i : 4 * i + 4] for i in range(len(blocks))]
        self._vocabulary = model.config.vocab_size
        self._fingerprint: int | None = None
        self._llama: Any = None
        self._addressed: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(weight.packed.nbytes for weight in self._all)

    def refresh(self, model: Llama) -> None:
        """Packs again what was packed before the weights changed, and takes all addresses anew."""
        found = packed.fingerprint([t for weight in self._all for t in weight.tensors()])
        if found != self._fingerprint:
            for weight in self._all:
                weight.packed.fill(weight.tensors())
            self._fingerprint = found
        transformer, config = model.transformer, model.config
        embedding, norm = transformer.embedding.weight.detach(), transformer.norm.weight.detach()
        tables = transformer.rotary(embedding.device)
        heads = config.heads, config.kv_heads
        llama = packed.native().PackedLlama(
            embedding, norm, self._output.packed.native, *tables, heads, config.norm_eps
        )
        addressed = [embedding, norm, *tables]
        for block, weights in zip(cast(list[Block], transformer.blocks), self._blocks, strict=True):
            norms = block.attention_norm.weight.detach(), block.ffn_norm.weight.detach()
            llama.add_block(*norms, *(weight.packed.native for weight in weights))
            addressed += norms
        self._addressed, self._llama = addressed, llama
        self._kv_shape = config.kv_heads, config.head_dim

    def forward(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: Tensor) -> Tensor:
        """As `Runner.forward`; rows int64 [S]."""
        keys, values = cache.allocate(self._kv_shape, self._addressed[0])
        at = cache.addresses
        assert at is not None, "addresses are set before each forward pass"
        logits = cache.logits(len(rows), self._vocabulary)
        queries = None if at.cu_seqlens_q is None else at.cu_seqlens_q.long()
        prompts = at.slots, at.prompt_cu_seqlens.long()
        where = *prompts, queries, at.block_table, at.lengths
        threads = torch.get_num_threads()
        self._llama.forward(*(tokens, positions, *where), *(keys, values, rows, logits), threads)
        return logits


class Runner:
    """Forward passes of `model` for an engine.

    weights: "same" as the model's, or "int8" (ops.packed), for which InputError says why a model
    cannot be had. as_trained: 16-bit models take their own modules where these round as training
    does, so that what is sampled is from the distribution that training sees. Threads may share a
    runner, each with a cache of its own, as long as the model's weights stay what they are.
    """

    def __init__(
        self, model: Llama, weights: Weights = "same", *, as_trained: bool = False
    ) -> None:
        if weights not in ("same", "int8"):
            raise InputError(f"weights: expected same or int8, got {weights!r}")
        self.model, self.weights, self.as_trained = model, weights, as_trained
        self._native: _Native | None = None
        self._packing = threading.Lock()
        self.path = "not run yet"
        """what forward passes run on, e.g. "packed bf16", or "modules: " and why"""
        if weights == "int8":
            self._require_native(self._why_not_native())

    def _require_native(self, reason: str) -> None:
        if reason and self.weights == "int8":
            raise InputError(f"weights: int8 is for a plain model on a CPU, and {reason}")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy of the weights."""
        return 0 if self._native is None else self._native.nbytes

    def refresh(self) -> None:
        """To be called before the first of some forward passes: takes the model as it is now."""
        with self._packing:
            self._refresh()

    def _why_not_native(self) -> str:
        dtype = self.model.output.weight.dtype
        # Where a row's bits hang on its company, modules are as far from training as packed passes.
        if self.as_trained and dtype != torch.float32 and linear.rounds_alike(dtype):
            return f"{dtype} is to be rounded as in training"
        return why_not_native(self.model)

    def _refresh(self) -> None:
        reason = self._why_not_native()
        self._require_native(reason)
        if reason:
            self._native = None
            self.path = f"modules: {reason}"
            return
        dtype = packed.STORAGES[self.model.output.weight.dtype]
        storage = "int8" if self.weights == "int8" else dtype
        self.path = f"packed {storage}"
        if self._native is None or self._native.storage != storage:
            self._native = _Native(self.model, storage)
        self._native.refresh(self.model)

    def release(self) -> None:
        """Frees the packed copy; the next `refresh` makes it again."""
        self._native = None

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: Tensor | slice
    ) -> Tensor:
        """tokens int64 [T] and positions [T], whose pages `cache.addresses` says -> fp32 logits
        [S, V] of `rows`: a slice, or int64 [S] and rising. Valid until the next call."""
        native = self._native
        if native is None:
            hidden = self.model.transformer(tokens, positions, cache)
            return self.model.output(hidden[rows]).float()
        if isinstance(rows, slice):
            rows = torch.arange(len(tokens))[rows]
        return native.forward(tokens, positions, cache, rows)
