"""What the first run of a stage imports: once, in the process that ranks are forked from. It takes
longer than their work, and every module's ranks would import it anew."""

import importlib

from llama2rt.model import Llama, LlamaConfig
from llama2rt.stages import STAGES

for name in (
    "llama2rt.pipeline.dry_run",
    "matplotlib.pyplot",
    "torch.distributed.pipelining",
    "torch.utils.tensorboard",
):
    importlib.import_module(name)
for stage in STAGES.values():
    _ = stage.module
Llama(LlamaConfig(8, 1, 1, 1, 8, vocab_size=8), "meta")  # more of torch, for weights without values
