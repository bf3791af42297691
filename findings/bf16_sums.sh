#!/usr/bin/env bash
# Which of torch's CPU operations add many bf16 values in bf16, and so stop at 256?
#
# The same sum, 4096 ones into one place, by every route from a row's use to its gradient. Guessed
# before running: `scatter_add_` 256, `segment_reduce` 256, `cumsum` 4096; that the integer type of
# the ids could matter was not thought of. Found: neither "by index" nor "a reduction" tells.
# `index_select`'s gradient is right with int64 ids and wrong with int32, `scatter_add_` right and
# `index_add_` of one dimension wrong, `gather` right and `w[i]` wrong, `rms_norm`'s weight right and
# `layer_norm`'s bias wrong (256 a thread); `embedding_bag` is right forward and wrong backward. No
# call warns. An `nn.Embedding` trained in bf16 on a CPU loses its frequent rows.
#
# Installs torch 2.13.0 in a folder that is removed afterwards; exits 1 if any output differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/sums.py" <<'PYTHON'
import sys
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
N, D, bf16 = 4096, 64, torch.bfloat16
z = torch.zeros(N, dtype=torch.long)
ones, rows = torch.ones(N, dtype=bf16), torch.ones(N, D, dtype=bf16)


def grad(use, *shape):
    weight = torch.ones(*(shape or (8, D)), dtype=bf16, requires_grad=True)
    y = use(weight)
    y.backward(torch.ones_like(y))
    return weight.grad


def into(*shape):
    return torch.zeros(*shape, dtype=bf16)


CASES = {
    "F.embedding, gradient": (lambda: grad(lambda w: F.embedding(z, w)), 256),
    "w[i], gradient": (lambda: grad(lambda w: w[z]), 256),
    "index_select of rows, int64, gradient": (lambda: grad(lambda w: w.index_select(0, z)), 4096),
    "index_select of rows, int32, gradient": (
        lambda: grad(lambda w: w.index_select(0, z.int())),
        256,
    ),
    "index_select of one dimension, gradient": (
        lambda: grad(lambda w: w.index_select(0, z), 8),
        256,
    ),
    "gather, gradient": (lambda: grad(lambda w: w.gather(0, z), 8), 4096),
    "take, gradient": (lambda: grad(lambda w: w.take(z), 8), 256),
    "index_put_(accumulate=True)": (
        lambda: into(8).index_put_((z,), ones, accumulate=True),
        256,
    ),
    "index_add_ of one dimension": (lambda: into(8).index_add_(0, z, ones), 256),
    "index_add_ of rows": (lambda: into(8, D).index_add_(0, z, rows), 4096),
    "scatter_add_": (lambda: into(8).scatter_add_(0, z, ones), 4096),
    "segment_reduce": (
        lambda: torch.segment_reduce(ones, "sum", lengths=torch.tensor([N]), initial=0),
        256,
    ),
    "embedding_bag, sum": (lambda: F.embedding_bag(z[None], rows[:8], mode="sum"), 4096),
    "embedding_bag, gradient": (
        lambda: grad(lambda w: F.embedding_bag(z[:, None], w, mode="sum")),
        256,
    ),
    "layer_norm, gradient of bias": (
        lambda: grad(lambda b: F.layer_norm(rows, (D,), rows[0], b), D),
        256,
    ),
    "rms_norm, gradient of weight": (lambda: grad(lambda w: F.rms_norm(rows, (D,), w), D), 4096),
    "linear, gradient of bias": (lambda: grad(lambda b: F.linear(rows, rows[:D], b), D), 4096),
    "sum": (lambda: ones.sum(), 4096),
    "cumsum": (lambda: ones.cumsum(0), 4096),
}
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
changed = False
for name, (run, expected) in CASES.items():
    found = int(run().float().max())
    changed |= found != expected
    print(f"{name:42}{found:6}" + ("" if found == expected else f"  expected {expected}"))
sys.exit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/sums.py"
