"""What the first run of a stage imports: once in the process that ranks are forked from, which takes
longer than their work, and not in every rank of every module."""

import matplotlib.pyplot  # noqa: F401
import torch.distributed.pipelining
import torch.utils.tensorboard  # noqa: F401

import llama2rt.pipeline.dry_run
from llama2rt.model import Llama, LlamaConfig
from llama2rt.stages import STAGES

for stage in STAGES.values():
    _ = stage.module
Llama(LlamaConfig(8, 1, 1, 1, 8, vocab_size=8), "meta")  # more of torch, for weights without values
