"""What a run would ask for, before it is begun: memory a rank, tokens, steps, GPU-hours.

A stage says what it does in a `Work` (`stages.NAME.plan`); everything here is arithmetic on it. No
weights are allocated and nothing is written. Left out: the host's memory on a GPU machine but for
what offloaded models take of it, disk space, and what NCCL and the CUDA context take
(`memory.RESERVE`).
"""

from llama2rt.planning.estimate import Options, Plan, dry_run
from llama2rt.planning.work import Batch, Count, Model, Phase, Sampling, Work

__all__ = [
    "Batch",
    "Count",
    "Model",
    "Options",
    "Phase",
    "Plan",
    "Sampling",
    "Work",
    "dry_run",
]
