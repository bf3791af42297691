#!/usr/bin/env bash
# In which precision does peft draw the weights of an adapter on a bf16 model?
#
# Guessed before running: in fp32, since `autocast_adapter_dtype` (on by default) keeps adapters of a
# bf16 model in fp32, and says that this is for the sake of precision. Found: the weights are fp32
# tensors whose values are bf16: A is drawn, cast to the model's dtype and cast back. The same seed
# gives another adapter on a bf16 model than on the fp32 one, so that two runs which differ in
# precision alone do not begin alike.
#
# Installs peft 0.21.2, torch 2.13.0, transformers 5.24.0 and accelerate 1.15.0 in a folder that is
# removed afterwards; exits 1 if the values differ from what is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/draw.py" <<'PYTHON'
import sys

import peft
import torch


def drawn(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).to(dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0"]))
    return next(p for name, p in adapted.named_parameters() if "lora_A" in name).detach()


whole, rounded = drawn(torch.float32), drawn(torch.bfloat16)
on_bf16 = rounded.bfloat16().float()
print("peft", peft.__version__, "torch", torch.__version__)
print("A on an fp32 model:", whole.dtype, whole[0, :3].tolist())
print("A on a bf16 model: ", rounded.dtype, rounded[0, :3].tolist())
holds = (
    whole.dtype == rounded.dtype == torch.float32
    and torch.equal(rounded, on_bf16)
    and not torch.equal(whole, whole.bfloat16().float())
)
sys.exit(0 if holds else "it has changed")
PYTHON
"$folder/venv/bin/python" "$folder/draw.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
