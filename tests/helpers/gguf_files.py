"""GGUF files of a small model, by gguf's own writer and in llama.cpp's conventions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from llama2rt.checkpoint.files import weights
from llama2rt.checkpoint.gguf import gguf_name
from llama2rt.model import Llama
from llama2rt.text import Tokenizer
from llama2rt.text import sentencepiece_model as spm

KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16, "Q8_0": Kind.Q8_0}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as `LlamaModel.permute` of llama.cpp's converter orders them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model: Llama) -> dict[str, np.ndarray]:
    """fp32 values under llama.cpp's names."""
    found = {}
    for name, parameter in weights(model).items():
        values = parameter.detach().float().numpy()
        if name.endswith(".query.weight"):
            values = permuted(values, model.config.heads)
        elif name.endswith(".key.weight"):
            values = permuted(values, model.config.kv_heads)
        found[gguf_name(name)] = values
    return found


def settings_of(model: Llama) -> dict[str, Any]:
    c = model.config
    return {
        "llama.context_length": c.context,
        "llama.embedding_length": c.dim,
        "llama.block_count": c.layers,
        "llama.feed_forward_length": c.ffn_hidden,
        "llama.attention.head_count": c.heads,
        "llama.attention.head_count_kv": c.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "llama.rope.dimension_count": c.head_dim,
        "llama.vocab_size": c.vocab_size,
    }


def sentencepiece_settings(tokenizer: Tokenizer, pad_to: int = 0) -> dict[str, Any]:
    """What the converter takes of a tokenizer.model."""
    model = spm.read(tokenizer._definition)
    pieces = [(p.text, p.score, p.type) for p in model.pieces]
    pieces += [(f"[PAD{i}]", -10000.0, spm.UNUSED) for i in range(len(pieces), pad_to)]
    texts, scores, types = map(list, zip(*pieces, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk,
        "tokenizer.ggml.add_bos_token": True,
    }


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    kind: str = "F32",
    *,
    architecture: str = "llama",
    kinds: Mapping[str, str] | None = None,
    tensors_per_file: int = 0,
) -> Path:
    """Write a file; vectors are F32 whatever `kind` says, and `kinds` says otherwise by name.
    A setting of None is left out. Returns the path, of several files the first one's."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_file)
    for key, value in settings.items():
        add(writer, key, value)
    for name, values in tensors.items():
        wanted = KINDS.get((kinds or {}).get(name, kind if values.ndim > 1 else "F32"))
        stored = gguf.quantize(values, wanted)
        writer.add_tensor(name, stored, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), path)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)


def rounded(model: Llama, kind: str) -> Llama:
    """A copy whose matrices hold what a file of this kind can hold."""
    copy = Llama(model.config)
    with torch.no_grad():
        for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            values = theirs.detach().float()
            if values.ndim > 1:
                whole = gguf.quantize(values.numpy(), KINDS[kind])
                values = torch.from_numpy(gguf.dequantize(whole, KINDS[kind]).copy())
            ours.copy_(values)
    return copy
