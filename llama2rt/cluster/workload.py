"""What a training step asks of a GPU: FLOPs, bytes and memory of a transformer under a layout.

Counts only; `step_time` says how long they take. FLOPs follow Narayanan et al.
2021 (Megatron-LM, appendix), activations Korthikanti et al. 2022 (section 4). Left out: experts,
dropout's random numbers, the optimizer's temporary buffers.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from llama2rt.cluster.hardware import Cluster
from llama2rt.errors import InputError
from llama2rt.model.config import LlamaConfig

Sharding = Literal["none", "zero1", "zero3", "hybrid"]
Recompute = Literal["none", "selective", "full"]
# What the software of a year could do. 2021: attention scores written to memory, nothing of the
# sharding's traffic organised by node. 2023: FlashAttention, prefetched hierarchical gathers. 2024:
# the same with FlashAttention-2 or cuDNN's attention.
Stack = Literal["2021", "2023", "2024"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
STACKS: tuple[Stack, ...] = get_args(Stack)

BF16_BYTES = 2
_RESERVED_SHARE = 0.06  # of a GPU's memory: CUDA context, NCCL buffers, fragments


@dataclass(frozen=True)
class Shape:
    """A decoder's shape: `LlamaConfig` and, for published runs, the GPT family too."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_hidden: int
    vocab_size: int
    gated: bool = True
    """three matrices in the feed-forward (SwiGLU) instead of two"""
    tied: bool = False
    """one matrix embeds and predicts"""

    @classmethod
    def of(cls, name: str, config: LlamaConfig) -> "Shape":
        """The shape of one of this library's models."""
        return cls(
            name,
            config.dim,
            config.layers,
            config.heads,
            config.kv_heads,
            config.ffn_hidden,
            config.vocab_size,
            tied=config.tied,
        )

    @property
    def kv_dim(self) -> int:
        return self.dim * self.kv_heads // self.heads

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_dim
        return attention + self.ffn_matrices * self.dim * self.ffn_hidden + 2 * self.dim

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def parameters(self) -> int:
        vocabulary = self.vocab_size * self.dim * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + vocabulary + self.dim

    def layer_flops(self, tokens: float, seq: int) -> float:
        """Forward FLOPs of one layer; attention scores count in full, as published rates do."""
        matrices = self.layer_parameters - 2 * self.dim
        return tokens * (2 * matrices + 4 * self.dim * seq)

    def head_flops(self, tokens: float) -> float:
        """Forward FLOPs of the output projection."""
        return 2 * tokens * self.dim * self.vocab_size

    def step_flops(self, tokens: float, seq: int, recompute: Recompute) -> float:
        """FLOPs of a training step as papers count them: what is recomputed is counted."""
        layers = self.layers * self.layer_flops(tokens, seq)
        again = layers if recompute == "full" else 0.0
        if recompute == "selective":
            again = self.layers * tokens * 4 * self.dim * seq
        return 3 * (layers + self.head_flops(tokens)) + again


@dataclass(frozen=True)
class Layout:
    """How a model is divided over a cluster."""

    seq: int
    """tokens in a sequence"""
    micro_batch: int
    """sequences that a data-parallel rank works on at once"""
    global_batch: int
    """sequences a step"""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    """ranks that share a sequence"""
    sharding: Sharding = "none"
    recompute: Recompute = "none"
    interleave: int = 1
    """model chunks that a pipeline stage holds (Narayanan et al. 2021, section 2.2)"""
    stack: Stack = "2023"

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def micro_batches(self) -> float:
        """Full micro-batches of the busiest rank; a last, smaller one counts as its share."""
        return ceil(self.global_batch / self.dp) / self.micro_batch

    @property
    def sequence_parallel(self) -> bool:
        """Norms and residuals split over the tensor-parallel ranks (Korthikanti et al. 2022).

        It came together with selective recomputation; runs that recompute everything predate it.
        """
        return self.tp > 1 and (self.stack != "2021" or self.recompute != "full")

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered for every micro-batch.

        In a pipeline they are not: they stay whole for the step (Llama 3 Herd of Models, section
        3.3.2; torchtitan), so that zero3 and hybrid act as zero1.
        """
        return self.sharding in ("zero3", "hybrid") and self.pp == 1

    @property
    def fsdp(self) -> bool:
        """Whether they are gathered by PyTorch's FSDP, and not by the ZeRO-3 of 2021."""
        return self.gathers and self.stack != "2021"

    def check(self, shape: Shape, cluster: Cluster) -> None:
        """InputError, naming the key, for a layout that the model or the cluster cannot have."""
        for name in ("seq", "micro_batch", "global_batch", "tp", "pp", "dp", "cp", "interleave"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.gpus != cluster.gpus:
            raise InputError(
                f"gpus: tp {self.tp} x pp {self.pp} x dp {self.dp} x cp {self.cp} = {self.gpus}, "
                f"expected {cluster.gpus}"
            )
        if shape.heads % self.tp:
            raise InputError(f"tp: expected a divisor of {shape.heads} heads, got {self.tp}")
        if self.pp * self.interleave > shape.layers:
            raise InputError(
                f"pp: {shape.layers} layers cannot fill {self.pp} stages of {self.interleave}"
            )
        if self.global_batch < self.dp:
            raise InputError(
                f"global_batch: {self.global_batch} sequences leave some of the {self.dp} "
                "data-parallel ranks without work"
            )


def shard_ranks(layout: Layout, gpus_per_node: int = 8) -> int:
    """Ranks that share each weight under ZeRO-3: all, or those of a node when hybrid."""
    ranks = layout.dp * layout.cp
    if layout.sharding == "hybrid" and layout.gathers:
        return min(ranks, max(1, gpus_per_node // layout.tp))
    return ranks


def memory_bytes(shape: Shape, layout: Layout, gpus_per_node: int = 8) -> float:
    """Peak memory of the fullest GPU (the first pipeline stage).

    bf16 weights and gradients, fp32 master weights and two moments: 16 bytes a parameter, each
    part divided where the sharding divides it.
    """
    stage_layers = ceil(shape.layers / layout.pp)
    embedding = shape.vocab_size * shape.dim * (1 if layout.pp > 1 or shape.tied else 2)
    parameters = (stage_layers * shape.layer_parameters + embedding) / layout.tp
    ranks = layout.dp * layout.cp
    if layout.sharding == "none":
        states = 16 * parameters
    elif not layout.gathers:
        states = 4 * parameters + 12 * parameters / ranks
    else:
        # Two layers' weights are whole at a time (one computed, one prefetched), and a gradient.
        states = 16 * parameters / shard_ranks(layout, gpus_per_node)
        states += 3 * BF16_BYTES * shape.layer_parameters / layout.tp
    return states + _activation_bytes(shape, layout, stage_layers)


def fits(shape: Shape, layout: Layout, cluster: Cluster) -> bool:
    """Whether `memory_bytes` leaves the reserve free."""
    usable = cluster.gpu.memory_bytes * (1 - _RESERVED_SHARE)
    return memory_bytes(shape, layout, cluster.gpus_per_node) <= usable


def _activation_bytes(shape: Shape, layout: Layout, stage_layers: int) -> float:
    tokens = layout.micro_batch * layout.seq / layout.cp
    whole = _layer_activation_bytes(shape, layout, tokens)
    in_flight: float = min(layout.micro_batches, layout.pp)
    if layout.interleave > 1:
        in_flight *= 1 + (layout.pp - 1) / (layout.pp * layout.interleave)
    if layout.recompute == "full":
        inputs = BF16_BYTES * tokens * shape.dim
        kept = in_flight * stage_layers * inputs + whole
    else:
        kept = in_flight * stage_layers * whole
    # Logits in fp32 and their gradient in bf16, on the last stage, which holds fewer batches.
    logits = 6 * tokens * shape.vocab_size / layout.tp if layout.pp == 1 else 0.0
    return kept + logits


def _layer_activation_bytes(shape: Shape, layout: Layout, tokens: float) -> float:
    """What a layer keeps for its backward, by Korthikanti et al. 2022, equation 2, generalised."""
    unsplit = 4.0 * shape.dim + 4.0 * shape.dim  # inputs of norms and of the two column products
    split: float = (
        BF16_BYTES * (2 * shape.dim + 2 * shape.kv_dim)  # q, k, v and the output's input
        + BF16_BYTES * shape.ffn_matrices * shape.ffn_hidden
    )
    if layout.stack == "2021":
        unsplit += 2 * shape.dim  # dropout masks
        if layout.recompute != "selective":
            split += 5 * shape.heads * layout.seq
    return tokens * (unsplit / (layout.tp if layout.sequence_parallel else 1) + split / layout.tp)
