#!/usr/bin/env bash
# What becomes of scaled rotary embeddings when transformers reads a GGUF file?
#
# Llama 3.1 and later scale them. llama.cpp's converter writes that as a tensor of factors,
# rope_freqs.weight, and no key of the metadata says so; linear scaling and YaRN are keys,
# llama.rope.scaling.type and .factor. One would guess: a reader that takes `gguf_file=` applies them,
# or says that it cannot.
# Found in transformers 5.24.0 with gguf 0.19.0: both are dropped without a word. The configuration
# says "default", and the logits are those of the file without any scaling, which is fluent text from
# another model than the one in the file. llama2rt refuses both by name.
#
# Installs them in a folder that is removed afterwards; exits 1 if any output differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 gguf==0.19.0 transformers==5.24.0
cat > "$folder/rope.py" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

dim, hidden, vocabulary = 32, 64, 50
random = np.random.default_rng(0)
shapes = {"token_embd": (vocabulary, dim), "output": (vocabulary, dim), "output_norm": (dim,)}
block = {"attn_norm": (dim,), "ffn_norm": (dim,), "ffn_down": (dim, hidden)}
block |= {f"attn_{name}": (dim, dim) for name in ("q", "k", "v", "output")}
block |= {f"ffn_{name}": (hidden, dim) for name in ("gate", "up")}
shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
weights = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def read(name, tensors, scaling):
    writer = gguf.GGUFWriter(Path(sys.argv[1]) / f"{name}.gguf", "llama")
    writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    for tensor, values in (weights | tensors).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=f"{name}.gguf")
    logits = model(torch.arange(20)[None]).logits[0, -1]
    print(f"{name:14}", model.config.rope_parameters["rope_type"], logits[:3].tolist())
    return logits


print("transformers", transformers.__version__)
plain = read("unscaled", {}, False)
factors = read("rope_freqs", {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}, False)
keys = read("linear, by 8", {}, True)
sys.exit(not (torch.equal(plain, factors) and torch.equal(plain, keys)))
PYTHON
"$folder/venv/bin/python" "$folder/rope.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
