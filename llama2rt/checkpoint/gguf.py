"""GGUF files of LLaMA models, as llama.cpp's converter writes them.

Two conventions differ from ours (and Hugging Face's): rotary pairs are neighbours instead of
halves, so query and key rows are permuted on the way, as in Meta's folders; and vectors are always
F32. Matrices are read as F32, F16, BF16 or Q8_0; other quantized types have no use here, where
weights are trained and converted. Nothing is written in this format.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2rt.checkpoint import files, gguf_file
from llama2rt.checkpoint.gguf_file import StoredTensor
from llama2rt.checkpoint.meta import to_halves
from llama2rt.checkpoint.native import parse_config
from llama2rt.checkpoint.weight import Area, Stored, Weight
from llama2rt.errors import InputError, naming
from llama2rt.model import Llama, LlamaConfig
from llama2rt.text import gguf_tokenizer
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.checkpoint.gguf")

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_OUTSIDE_BLOCKS = {
    files.EMBEDDING: _EMBEDDING,
    "transformer.norm.weight": "output_norm.weight",
    files.OUTPUT: _OUTPUT,
}
_BLOCK = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
# Key below `llama.` -> the values with which it changes nothing. Some the converter writes always.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
_USED = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}


def read(
    path: Path, dtype: torch.dtype | None
) -> tuple[Llama, Tokenizer | None, dict[str, Weight]]:
    """(model on the meta device, tokenizer, weights to read) of a GGUF file, or of a model's
    several ones. InputError names file and key or tensor: another architecture, a setting or a
    tensor type that is not read here, a file that is cut off.

    dtype None: the matrices' own, fp32 for Q8_0, which no 16-bit type holds exactly.
    """
    contents = gguf_file.read(path)
    path = contents.path
    config = _config(path, contents)
    for tensor in contents.tensors.values():
        tensor.require_readable()
    _require_unscaled_rope(contents.tensors)
    with naming(f"{path}"):
        tokenizer = gguf_tokenizer.of_metadata(contents.metadata)
    _tell(path, config, tokenizer, contents.metadata)
    with torch.device("meta"):
        model = Llama(config)
    stored = list(_stored(contents.tensors, config))
    if dtype is None:
        dtype = _matrix_dtype(path, contents.tensors, stored)
    return model, tokenizer, files.match(model, stored, dtype, gguf_name)


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our parameters."""
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    _, _, layer, module, leaf = name.split(".")
    return f"blk.{layer}.{_BLOCK[module]}.{leaf}"


# --- configuration ----------------------------------------------------------------------------


def _config(path: Path, contents: gguf_file.Contents) -> LlamaConfig:
    metadata, tensors = contents.metadata, contents.tensors
    for key, only in (("general.architecture", ARCHITECTURE), ("general.type", "model")):
        if (key == "general.architecture" or key in metadata) and metadata.get(key) != only:
            raise InputError(
                f"{path}: {key}: only {only!r} is supported, got {metadata.get(key)!r}"
            )
    own = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    for key, neutral in _NEUTRAL.items():
        if key in own and own[key] not in neutral:
            raise InputError(
                f"{path}: llama.{key}: only {neutral[-1]!r} is supported, got {own[key]!r}"
            )
    if unknown := sorted(own.keys() - _USED - _NEUTRAL.keys()):
        logger.warning("%s: not read: llama.%s", path, ", llama.".join(unknown))

    def value(key: str, default: Any = None) -> Any:
        """One that a list, such as of each layer's, has throughout."""
        found = own.get(key, default)
        if found is None:
            raise InputError(f"{path}: llama.{key}: missing")
        if isinstance(found, list):
            if len(set(found)) != 1:
                raise InputError(f"{path}: llama.{key}: only one for all layers is supported")
            found = found[0]
        if not isinstance(found, int | float):
            raise InputError(f"{path}: llama.{key}: expected a number, got {found!r}")
        return _decimal(found)

    if _EMBEDDING not in tensors:
        raise InputError(f"{path}: {_EMBEDDING}: missing")
    config = parse_config(
        path,
        {
            "dim": value("embedding_length"),
            "layers": value("block_count"),
            "heads": value("attention.head_count"),
            "kv_heads": value("attention.head_count_kv", own.get("attention.head_count")),
            "ffn_hidden": value("feed_forward_length"),
            "vocab_size": tensors[_EMBEDDING].shape[0],
            "context": value("context_length"),
            "norm_eps": value("attention.layer_norm_rms_epsilon"),
            "rope_theta": value("rope.freq_base", 10000.0),
            "tied": _OUTPUT not in tensors,
        },
    )
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if value(key, config.head_dim) != config.head_dim:
            raise InputError(
                f"{path}: llama.{key}: expected embedding_length / attention.head_count = "
                f"{config.head_dim}, got {own[key]}"
            )
    if 0 < value("attention.sliding_window", 0) < config.context:
        raise InputError(
            f"{path}: llama.attention.sliding_window: only the whole context of {config.context} "
            f"is supported, got {own['attention.sliding_window']}"
        )
    return config


def _decimal(value: Any) -> Any:
    """A number as it was before it was stored as a float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _require_unscaled_rope(tensors: Mapping[str, StoredTensor]) -> None:
    """InputError where rotary frequencies are divided by factors. The converter writes Llama 3.1's
    scaling as this tensor, and no key says so."""
    factors = tensors.get(ROPE_FACTORS)
    if factors is not None and bool((_whole(factors).float() != 1).any()):
        raise InputError(
            f"{factors.path}: {ROPE_FACTORS}: only unscaled rope is supported, this file scales it "
            "(Llama 3.1 and later)"
        )


def _tell(
    path: Path, config: LlamaConfig, tokenizer: Tokenizer | None, metadata: Mapping[str, Any]
) -> None:
    """What a reader would not see: a missing chat template, ids that the model cannot read."""
    if tokenizer is None:
        return
    if tokenizer.template is None:
        logger.info("%s: no chat template: dialogues are in Llama-2-Chat's format", path)
    if tokenizer.vocab_size > config.vocab_size:
        logger.warning(
            "%s: the tokenizer has %d ids, the model only %d embeddings: it cannot read the others",
            path,
            tokenizer.vocab_size,
            config.vocab_size,
        )


# --- weights ----------------------------------------------------------------------------------


def _stored(tensors: Mapping[str, StoredTensor], config: LlamaConfig) -> Iterator[Stored]:
    """The file's tensors, with query and key rows in our order."""
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        fetch = tensor.read
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            heads = config.heads if name.endswith(".attn_q.weight") else config.kv_heads
            if tensor.shape == (heads * config.head_dim, config.dim):  # others are refused later
                fetch = functools.partial(_halves, tensor, config.head_dim)
        yield tensor.path, name, Weight(tensor.shape, tensor.dtype, fetch)


def _halves(tensor: StoredTensor, head_dim: int, area: Area) -> Tensor:
    """Part of a query or key weight, of which whole heads are read."""
    rows, columns = area
    first, last = rows.start // head_dim, -(-rows.stop // head_dim)
    heads = tensor.rows(first * head_dim, last * head_dim)
    begin = rows.start - first * head_dim
    return to_halves(heads, last - first)[begin : begin + rows.stop - rows.start, columns]


def _whole(tensor: StoredTensor) -> Tensor:
    return tensor.read(tuple(slice(0, n) for n in tensor.shape))


def _matrix_dtype(
    path: Path, tensors: Mapping[str, StoredTensor], stored: list[Stored]
) -> torch.dtype | None:
    """The dtype of all matrices, where it holds the F32 vectors beside them exactly, as it does
    those of a model that was trained in it; None: what `files.match` makes of several dtypes."""
    matrices = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    if any(tensor.quantized for tensor in tensors.values()):
        logger.info("%s: Q8_0 is read as fp32; --dtype bf16 takes half the memory", path)
    if len(matrices) != 1:
        return None
    (dtype,) = matrices
    vectors = (weight.read() for _, _, weight in stored if len(weight.shape) == 1)
    exact = all(torch.equal(vector.to(dtype).to(vector.dtype), vector) for vector in vectors)
    return dtype if exact else None
