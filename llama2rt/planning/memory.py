"""Bytes that a rank holds at its fullest of what it trains, by component: a pure function of shapes
and degrees. What it only reads or samples from is in `inference`.

Each formula counts what the code keeps alive, and says where. Activations are counted from the
tensors that autograd saves (tests/planning compares them with a real graph, to the byte). Left out:
what an allocator adds, a CUDA context, NCCL's buffers; `RESERVE` keeps a share of a GPU for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from llama2rt.model.config import LlamaConfig
from llama2rt.ops import logprob_tiles
from llama2rt.planning.work import Model, linear_layers

# Of a GPU's memory: CUDA context (0.5 GiB), NCCL's buffers, fragments. As in cluster/workload.
RESERVE = 0.06

FP32 = 4
# Forward's tile on a GPU (ops/cuda_kernels/token_logprob): an eighth of the vocabulary in backward.
_CUDA_VOCABULARY_PARTS = 8

Components = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """How a model is trained and spread."""

    degrees: Mapping[str, int]
    """`ParallelOptions.degrees`"""
    compute_bytes: int
    """of an element in the compute dtype"""
    micro_tokens: int
    """tokens of the largest micro-batch"""
    micro_batches: int
    """of the busiest rank in a step"""
    recompute: Literal["none", "selective", "full"] = "none"
    all_targets: bool = False
    cuda: bool = True
    moment_bytes: int = FP32
    optimizer_away: bool = False
    """whether masters, moments and gradient sums lie in the CPU's memory"""

    @property
    def tensor(self) -> int:
        return self.degrees["tensor"]

    @property
    def context(self) -> int:
        return self.degrees["context"]

    @property
    def pipeline(self) -> int:
        return self.degrees["pipeline"]

    @property
    def shards(self) -> int:
        """Ranks over which FSDP cuts a weight."""
        return self.degrees["shard"] * self.context

    @property
    def fsdp(self) -> bool:
        """Whether FSDP holds the model: among several processes always (parallel/parallelize)."""
        return prod(self.degrees.values()) > 1

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the gradient that a backward pass leaves: FSDP reduces in fp32."""
        return FP32 if self.fsdp else self.compute_bytes

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch, on one rank."""
        return ceil(self.micro_tokens / self.context)


@dataclass(frozen=True)
class Parts:
    """Elements of a model's parts on a rank of the fullest pipeline stage, cut by tensor
    parallelism alone."""

    block: float
    blocks: int
    embedding: float
    output: float
    """the output layer, 0 where it is the embedding's weight; a regression head"""
    norm: float

    @property
    def rest(self) -> float:
        """All but the blocks."""
        return self.embedding + self.output + self.norm

    @property
    def total(self) -> float:
        return self.blocks * self.block + self.rest


def parts(model: Model, tensor: int = 1, pipeline: int = 1) -> Parts:
    """Of `model`. Tensor parallelism cuts every matrix and leaves norms whole."""
    config = model.config
    kv = config.kv_heads * config.head_dim
    matrices = 2 * config.dim * config.dim + 2 * config.dim * kv
    matrices += 3 * config.dim * config.ffn_hidden
    vocabulary = config.vocab_size * config.dim / tensor
    output = 0.0 if config.tied else vocabulary
    if model.scalar:
        output = config.dim
    embedding = vocabulary
    if pipeline > 1:
        # The first stage embeds, the last predicts; the fullest has one of the two.
        embedding, output = max(embedding, output), 0.0
    return Parts(
        matrices / tensor + 2 * config.dim,
        ceil(config.layers / pipeline),
        embedding,
        output,
        config.dim,
    )


def states(model: Model, setting: Setting) -> Components:
    """Weights, fp32 masters and AdamW's moments of a model that is trained, each cut by FSDP."""
    trained = _trained(model, setting)
    still = 0.0
    if model.adapter:
        # What an adapter leaves alone has no master; a head is trained.
        here = parts(model, setting.tensor, setting.pipeline)
        still = (here.total - (here.output if model.scalar else 0)) / setting.shards
    # Where the model's weights are fp32 they are the masters (train/precision.py); FSDP's shards
    # of what is trained are fp32 whatever it computes in.
    narrow = setting.compute_bytes < FP32
    weights = 0 if narrow and setting.fsdp else setting.compute_bytes
    return {
        "weights": still * setting.compute_bytes + trained * weights,
        "masters": trained * FP32 if narrow and not setting.optimizer_away else 0.0,
        "moments": 0.0 if setting.optimizer_away else trained * 2 * setting.moment_bytes,
    }


def training(model: Model, setting: Setting) -> Components:
    """The fullest moment of a step, states included: either backward begins, when all activations
    are there, or it ends, when all gradients are."""
    begins, ends = _begin(model, setting), _end(model, setting)
    fullest = begins if sum(begins.values()) >= sum(ends.values()) else ends
    return {**states(model, setting), **fullest}


def _begin(model: Model, setting: Setting) -> Components:
    """All micro-batches' gradients but this one's, all activations, the head's own work."""
    here = parts(model, setting.tensor, setting.pipeline)
    earlier = _trained(model, setting) * _summed_bytes(model, setting, setting.micro_batches - 1)
    kept = activations(model, setting) * here.blocks * _in_flight(setting)
    again = _again(model, setting)
    first = 0.0 if model.adapter else here.output * setting.compute_bytes
    head, logits = _head(model, setting)
    return {
        # The output's gradient is the first to come; on a CPU forward has laid it out already.
        "gradients": earlier + first,
        "activations": kept + max(again + _block_backward(model.config, setting), head),
        "logits": logits,
        "gathered": _gathered(model, setting, at_end=False),
    }


def _end(model: Model, setting: Setting) -> Components:
    """All gradients of this micro-batch beside the sums of those before; the first block's own."""
    here = parts(model, setting.tensor, setting.pipeline)
    width = FP32 if model.adapter else setting.gradient_bytes
    gradients = _trained(model, setting) * (
        _summed_bytes(model, setting, setting.micro_batches - 1) + width
    )
    waiting = (_in_flight(setting) - 1) * here.blocks
    kept = activations(model, setting) * waiting
    last = block_activations(model, setting) + _block_backward(model.config, setting)
    return {
        "gradients": gradients,
        "activations": kept + last,
        "logits": 0.0,
        "gathered": _gathered(model, setting, at_end=True),
    }


def summed_gradients(model: Model, setting: Setting) -> float:
    """What a model's gradient sums take between its micro-batches."""
    return _trained(model, setting) * _summed_bytes(model, setting, setting.micro_batches)


def _trained(model: Model, setting: Setting) -> float:
    """Trainable elements of a rank. Adapters are cut as what they adapt (an eighth part that
    tensor parallelism leaves whole is too small to matter)."""
    if model.adapter:
        blocks = ceil(model.config.layers / setting.pipeline)
        head = model.config.dim if model.scalar else 0
        return (blocks * model.adapter / setting.tensor + head) / setting.shards
    return parts(model, setting.tensor, setting.pipeline).total / setting.shards


def _summed_bytes(model: Model, setting: Setting, micro_batches: int) -> int:
    """Bytes an element of the sums after so many micro-batches (Optimizer.accumulate): the first
    stays in the compute dtype, sums are fp32."""
    if micro_batches <= 0 or setting.optimizer_away:
        return 0
    return setting.gradient_bytes if micro_batches == 1 and not model.adapter else FP32


def _in_flight(setting: Setting) -> int:
    """Micro-batches whose activations the first stage of a 1F1B pipeline holds."""
    return min(setting.micro_batches, setting.pipeline)


def _gathered(model: Model, setting: Setting, at_end: bool) -> float:
    """What FSDP holds whole. Weights: those outside the blocks from the beginning of forward to the
    end of backward, and two blocks (one computed, one fetched ahead). Gradients of a block, or at
    the end of backward of what lies outside the blocks: beside their weights first; then, the
    weights cut again, in fp32 as input of the reduction, of which gloo makes a copy.
    """
    if not setting.fsdp:
        return 0.0
    here = parts(model, setting.tensor, setting.pipeline)
    width = setting.compute_bytes
    ahead = 0.0 if at_end else (here.rest + here.block) * width
    reduced = here.rest if at_end else here.block
    if model.adapter:
        return ahead + reduced * width  # an adapter's gradients are a hundredth of its block
    copies = 1 if setting.cuda else 2
    return ahead + reduced * max(2 * width, copies * FP32)


def activations(model: Model, setting: Setting) -> float:
    """Bytes that a block keeps from forward to backward."""
    if setting.recompute == "none":
        return block_activations(model, setting)
    # run_recomputed: the block's two inputs, x and the residual stream.
    config = model.config
    inputs = 2 * _stream(config, setting)
    if setting.recompute == "full":
        return inputs
    # run_selective: what query, key, value, attention, gate and up gave, and the attention's
    # output matrix; what down gave is the next block's x.
    kv = config.kv_heads * config.head_dim
    elements = 3 * config.dim + 2 * kv + 2 * config.ffn_hidden
    statistics = FP32 * config.heads
    kept = setting.tokens * (elements * setting.compute_bytes + statistics) / setting.tensor
    return inputs + kept


def _again(model: Model, setting: Setting) -> float:
    """Bytes of what a block computes again before its backward pass."""
    if setting.recompute == "none":
        return 0.0
    whole = block_activations(model, setting)
    return whole if setting.recompute == "full" else whole - activations(model, setting)


def block_activations(model: Model, setting: Setting) -> float:
    """Bytes that autograd saves in a block (model/transformer.py, in its order).

    attention_norm: the summed residual stream and 1/rms; its result, input of query, key, value.
    attention: rotated q and k, v, the result and the log-sum-exp (rope saves positions alone).
    ffn_norm: as the first; its result, input of gate and up. swiglu: gate, up; their product, which
    is down's input. With tensor parallelism all but the norms' results are cut: the residual stream
    by tokens (sequence parallelism), the rest by heads or columns.
    """
    config = model.config
    kv = config.kv_heads * config.head_dim
    cut = 2 * config.dim + 2 * kv * setting.context + 3 * config.ffn_hidden
    elements = 2 * config.dim + cut / setting.tensor
    statistics = FP32 * (2 + config.heads) / setting.tensor
    streams = 2 * _stream(config, setting)
    kept = setting.tokens * (elements * setting.compute_bytes + statistics) + streams
    return kept + _adapter_activations(model, setting)


def _adapter_activations(model: Model, setting: Setting) -> float:
    """What a block under LoRA keeps beside. Each adapter keeps what its first matrix made, in fp32
    (peft casts its input up), and in bf16 that input's copy; a frozen layer's input is kept no
    more on its own account."""
    if not model.adapter or model.lora is None or model.lora.rank is None:
        return 0.0
    config, width = model.config, setting.compute_bytes
    inputs = {name: size for name, (size, _) in linear_layers(config).items()}
    adapted = set(model.lora.targets)
    kept = len(adapted) * model.lora.rank * FP32
    if width < FP32:
        kept += sum(inputs[name] for name in adapted) * FP32
    # The two norms' results and the gated product, unless an fp32 adapter reads them as they are.
    shared = ({"query", "key", "value"}, {"gate", "up"}, {"down"})
    for readers in shared:
        if width < FP32 or not readers & adapted:
            kept -= inputs[min(readers)] * width
    return setting.tokens * kept / setting.tensor


def _stream(config: LlamaConfig, setting: Setting) -> float:
    """Bytes of one [T, dim], cut by sequence parallelism."""
    return setting.tokens * config.dim * setting.compute_bytes / setting.tensor


def _block_backward(config: LlamaConfig, setting: Setting) -> float:
    """Gradients inside a block at its widest: of gate and up, and two of the residual stream's."""
    wide = 2 * config.ffn_hidden / setting.tensor
    return setting.tokens * wide * setting.compute_bytes + 2 * _stream(config, setting)


def _head(model: Model, setting: Setting) -> tuple[float, float]:
    """(around the output layer: hidden states, their gradient in fp32, tiles of the weight's
    gradient; the tile of logits) of `ops.token_logprob`. The [T, V] logits never exist."""
    config, tokens = model.config, setting.tokens
    hidden = tokens * config.dim
    # The final norm keeps its sum and its result.
    kept = 2 * hidden * setting.compute_bytes
    if model.scalar:
        return kept + 2 * FP32 * hidden, 0.0
    vocabulary = ceil(config.vocab_size / setting.tensor)
    if setting.cuda:
        rows, columns = tokens, ceil(vocabulary / _CUDA_VOCABULARY_PARTS)
    else:
        rows = min(tokens, logprob_tiles.CPU.rows)
        columns = min(vocabulary, logprob_tiles.CPU.columns)
    if not setting.all_targets:
        kept += hidden * setting.compute_bytes  # rows with a target, copied
    gradient = hidden * (FP32 + (setting.compute_bytes if setting.compute_bytes < FP32 else 0))
    if rows < tokens:
        gradient += columns * config.dim * FP32  # the weight's, summed over tiles of rows
    return kept + gradient, rows * columns * setting.compute_bytes


def added(*components: Components) -> Components:
    """The sum, component by component."""
    total: Components = {}
    for one in components:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total
