"""What a stage does, in the numbers that memory and time depend on.

A stage's `plan` fills a `Work` from its recipe and its opened inputs. What only the data could say
is None where the data was not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from llama2rt.model.config import LlamaConfig
from llama2rt.parallel.options import ParallelOptions
from llama2rt.train.lora import LoraOptions
from llama2rt.train.options import TrainOptions


@dataclass(frozen=True)
class Model:
    """A model that a stage holds."""

    name: str
    """what it is to the stage: policy, critic, reference, ..."""
    config: LlamaConfig
    scalar: bool = False
    """whether a regression head of one column stands in place of the output (reward models)"""
    lora: LoraOptions | None = None
    """the adapter that is trained instead of the weights"""
    lent: bool = False
    """whether the weights are another model's: a policy that samples as it is being trained"""
    held: Literal["resident", "offloaded", "sharded"] = "resident"
    """where it is if it is frozen: whole on every rank, in the CPU's memory between calls, or cut
    over all ranks as what is trained is (`rollout.frozen`)"""
    under_adapter: bool = False
    """whether one process alone reads it in the trained model, the adapter off, and holds no second
    one"""

    @property
    def parameters(self) -> int:
        """All of its weights."""
        if not self.scalar:
            return self.config.parameters
        tied_or_not = 1 if self.config.tied else 2
        config = self.config
        vocabulary = config.vocab_size * config.dim
        return config.parameters - tied_or_not * vocabulary + vocabulary + config.dim

    @property
    def trainable(self) -> int:
        """Those that training moves, where it trains this model."""
        if self.lora is None or self.lora.rank is None:
            return self.parameters
        return self.config.layers * self.adapter + (self.config.dim if self.scalar else 0)

    @property
    def adapter(self) -> int:
        """Weights of one block's adapters, 0 without."""
        if self.lora is None or self.lora.rank is None:
            return 0
        widths = linear_layers(self.config)
        return sum(self.lora.rank * sum(widths[target]) for target in self.lora.targets)


def linear_layers(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a block, by name."""
    kv = config.kv_heads * config.head_dim
    return {
        "query": (config.dim, config.dim),
        "key": (config.dim, kv),
        "value": (config.dim, kv),
        "attention_output": (config.dim, config.dim),
        "gate": (config.dim, config.ffn_hidden),
        "up": (config.dim, config.ffn_hidden),
        "down": (config.ffn_hidden, config.dim),
    }


@dataclass(frozen=True)
class Count:
    """A number and how it was found."""

    value: float
    how: str = "exact"
    """exact, or what the estimate rests on"""


@dataclass(frozen=True)
class Batch:
    """What one optimizer step trains on."""

    tokens: float
    """a step, over all ranks: prompts and answers, chosen and rejected"""
    sequence: float
    """mean tokens of a document, dialogue or answer with its prompt"""
    longest: int
    """tokens of the longest of them"""
    how: str = "exact"
    """how the three were found"""
    all_targets: bool = False
    """whether every token is a target, so that no row is taken out before the output layer"""

    @classmethod
    def of(cls, lengths: Sequence[int], count: int) -> "Batch":
        """Steps of `count` sequences of those `lengths` (dialogues, or both sides of pairs)."""
        mean = sum(lengths) / len(lengths)
        return cls(count * mean, mean, max(lengths))

    @classmethod
    def at_most(cls, length: int, count: int) -> "Batch":
        """Steps of `count` sequences of which nothing is known but the context."""
        return cls(count * length, length, length, "at most: every sequence fills the context")


@dataclass(frozen=True)
class Sampling:
    """Answers that a policy draws."""

    policy: Model
    answers: float | None
    """in the whole run"""
    at_once: int
    """most sequences that a rank, or a group of tensor ranks, decodes together"""
    prompt: float
    """mean tokens of a prompt"""
    longest: int
    """tokens of the longest prompt with its answer"""
    most: int
    """tokens of an answer at most"""
    cache_bytes: int | None = None
    """a recipe's bound on what sampling takes"""
    readers: Sequence[Model] = ()
    """models that read each answer once: reward models, the reference policy, the critic"""
    served: bool = False
    """whether a server draws them, with memory and time of its own"""

    def read_by(self, readers: Sequence[Model]) -> "Sampling":
        """The same with `readers`."""
        return replace(self, readers=readers)


@dataclass(frozen=True)
class Phase:
    """What lies in memory at one time."""

    name: str
    trained: Sequence[Model] = ()
    frozen: Sequence[Model] = ()
    """in the compute dtype; whole on every rank but for those in shards"""
    sampling: Sampling | None = None
    training: bool = False
    """whether gradients are taken in it; optimizer state lies there in any case"""
    pipelined: bool = False
    """whether what is trained may be cut into a pipeline of layers"""


@dataclass(frozen=True)
class Work:
    """All that a stage will do."""

    phases: Sequence[Phase]
    train: TrainOptions | None = None
    """of a stage that trains"""
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    batch: Batch | None = None
    steps: Count | None = None
    epochs: float | None = None
    noun: Literal["step", "iteration"] = "step"
    notes: Sequence[str] = ()
    """what a reader of the numbers should know"""

    def among(self, ranks: int) -> "Work":
        """The same as so many processes do it: one alone has no model that is `under_adapter`."""
        if ranks > 1:
            return self
        phases = [
            replace(phase, frozen=[model for model in phase.frozen if not model.under_adapter])
            for phase in self.phases
        ]
        return replace(self, phases=phases)

    @property
    def trained(self) -> list[Model]:
        """Every model that the stage trains, once."""
        return list({m.name: m for phase in self.phases for m in phase.trained}.values())

    @property
    def cut(self) -> list[Model]:
        """Every model that ranks share: those that are trained or sampled from, and frozen ones in
        shards."""
        drawn = [phase.sampling.policy for phase in self.phases if phase.sampling]
        return [*self.trained, *drawn, *(model for model in self.models if model.held == "sharded")]

    @property
    def models(self) -> list[Model]:
        """Every model of every phase, once."""
        found = [m for phase in self.phases for m in (*phase.trained, *phase.frozen)]
        found += [phase.sampling.policy for phase in self.phases if phase.sampling]
        return list({m.name: m for m in found if not m.lent}.values())
