#!/usr/bin/env bash
# Which of the calls that build a model and an optimizer import torch's compiler?
#
# Each in a process of its own, after `import torch`. Guessed before running: none; whoever does not
# compile does not pay for it, and a module on the meta device is the cheapest there is, which is why
# models are built there before their weights are read. Found: an `nn.Embedding` on the meta device
# imports torch._dynamo, and with it sympy (and Triton where it is installed), because its random
# numbers are drawn by a Python decomposition whose guard imports it; an `nn.Linear` there does not.
# `skip_init`, made to spare the work of initialising, imports sympy; the constructor of every
# optimizer imports both, while the function that it calls for each step imports nothing. It costs
# more than a second and 70 MiB (125 with Triton) of a process that only samples.
#
# Installs torch 2.13.0 in a folder that is removed afterwards; exits 1 if any output differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/imports.py" <<'PYTHON'
import subprocess
import sys

NOTHING, COMPILER, SYMPY = ("False", "False"), ("True", "True"), ("False", "True")
CASES = {
    "nn.Linear(4, 4, device='meta')": NOTHING,
    "nn.RMSNorm(4, device='meta')": NOTHING,
    "nn.Embedding(4, 4)": NOTHING,
    "nn.Embedding(4, 4, device='meta')": COMPILER,
    "nn.Embedding(4, 4, device='meta', _weight=torch.empty(4, 4, device='meta'))": NOTHING,
    "nn.utils.skip_init(nn.Linear, 4, 4)": SYMPY,
    "nn.Linear(4, 4, device='meta').to_empty(device='cpu')": SYMPY,
    "torch.optim.AdamW([torch.zeros(4)])": COMPILER,
    "torch.optim.SGD([torch.zeros(4)])": COMPILER,
    "adamw([p()], [p()], [p()], [p()], [], [p(())], fused=True, amsgrad=False, beta1=0.9,"
    " beta2=0.9, lr=0.1, weight_decay=0, eps=1e-8, maximize=False)": NOTHING,
}
RUN = """
import sys, time, torch
from torch import nn
from torch.optim.adamw import adamw
p = lambda shape=(4,): torch.zeros(shape)
def held():
    status = open("/proc/self/status").read()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
before, start = held(), time.perf_counter()
{}
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
print(f"{{time.perf_counter() - start:.2f}} s, {{held() - before:.0f}} MiB", file=sys.stderr)
"""
changed = False
for call, expected in CASES.items():
    run = subprocess.run([sys.executable, "-c", RUN.format(call)], capture_output=True, text=True)
    run.check_returncode()
    found = tuple(run.stdout.split())
    changed |= found != expected
    tells = {NOTHING: "nothing", COMPILER: "the compiler", SYMPY: "sympy"}.get(found, str(found))
    print(f"{call[:76]:78}{tells}, {run.stderr.strip()}" + ("" if found == expected else " CHANGED"))
sys.exit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/imports.py"
