#!/usr/bin/env bash
# Is a small beta of TRL's GKD loss nearly the forward KL that beta 0 is?
#
# Guessed before running: yes. The documentation calls beta an interpolation coefficient between the
# KL at 0 and the inverse KL at 1, and a loss that is interpolated is continuous at its ends. Found:
# the loss at beta 0.01 is a hundredth of that at 0, and its gradient too (at 0.99, of that at 1): 0
# and 1 are special cases with the whole KL, and between them stands the equation of the GKD paper,
# whose limit is beta * KL. A sweep over beta 0, 0.1, 0.5, 0.9, 1 at one learning rate is a sweep over
# step sizes too: AdamW hides it, gradient clipping and loss curves do not.
#
# Installs trl 1.16.0, torch 2.13.0 and transformers 5.24.0 in a folder that is removed afterwards;
# exits 1 if the ratio differs from what is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0
cat > "$folder/jump.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer

torch.manual_seed(0)
student = torch.randn(1, 64, 100, requires_grad=True)
teacher = torch.randn(1, 64, 100)


def loss_and_gradient(beta):
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, student)
    return float(loss.detach()), float(gradient.norm())


print("trl", version("trl"))
found = {beta: loss_and_gradient(beta) for beta in (0, 0.01, 0.1, 0.5, 0.9, 0.99, 1)}
for beta, (loss, norm) in found.items():
    print(f"beta {beta:<4}  loss {loss:8.3f}  gradient {norm:8.4f}")
ratios = [found[near][i] / found[end][i] for near, end in ((0.01, 0), (0.99, 1)) for i in (0, 1)]
print("near an end, of what is at the end:", [round(ratio, 4) for ratio in ratios])
sys.exit(0 if all(0.005 < ratio < 0.015 for ratio in ratios) else "it has changed")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/jump.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
