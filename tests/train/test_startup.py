"""What a run of one process does not import: torch's compiler, with sympy and Triton, takes 1.6 s
and 125 MiB, and comes with the first call of some innocent functions
(findings/meta_embedding_imports_the_compiler.sh)."""

import json

from processes import run_python

RUN = """
import json, sys
import torch
from llama2rt.checkpoint import hf, load
from llama2rt.generate import Engine
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.train import Optimizer, TrainOptions

found = {}


def look(step):
    found[step] = sorted({"torch._dynamo", "sympy", "triton"} & set(sys.modules))


look("imports")
config = LlamaConfig(
    dim=32, layers=1, heads=2, kv_heads=1, ffn_hidden=48, vocab_size=50, context=64, tied=False
)
for kind in (Llama, ScalarModel):
    hf.save(kind(config).initialize(0), None, sys.argv[1] + kind.__name__)
    look("building")
    model, _ = load(sys.argv[1] + kind.__name__, dtype=torch.float32)
    look("loading")
model, _ = load(sys.argv[1] + "Llama", dtype=torch.float32)
optimizer = Optimizer(model, TrainOptions())
tokens = torch.arange(3, 40)
ends = torch.tensor([0, 37], dtype=torch.int32)
model(tokens, torch.arange(37), ends, tokens).sum().backward()
optimizer.step(1e-3)
look("a step")
print(json.dumps(found))
"""


def test_nothing_imports_the_compiler(tmp_path):
    found = json.loads(run_python("-c", RUN, f"{tmp_path}/").stdout)
    assert found == {step: [] for step in ("imports", "building", "loading", "a step")}
