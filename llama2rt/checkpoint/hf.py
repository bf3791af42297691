"""Hugging Face folders: LlamaForCausalLM, and LlamaForSequenceClassification with one label.

Reads safetensors with config.json in transformers 4's and 5's spellings, writes what both load.
What this model cannot express (biases, scaled rotary embeddings, other activations) is refused by
key rather than ignored, because ignoring it gives fluent nonsense.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama2rt.checkpoint import files
from llama2rt.checkpoint.native import find_tokenizer, parse_config, parse_id, parse_normalization
from llama2rt.checkpoint.tokenizer_json import write_tokenizer
from llama2rt.checkpoint.weight import Weight, of_tensor
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig, ScalarModel
from llama2rt.model.heads import Normalization
from llama2rt.text.folder import GENERATION, eos_ids
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.checkpoint.hf")

CAUSAL = "LlamaForCausalLM"
SCALAR = "LlamaForSequenceClassification"
NORMALIZATION, UNREAD = "score_normalization", "score_unread"

_OUTSIDE_BLOCKS = {
    "transformer.embedding.weight": "model.embed_tokens.weight",
    "transformer.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "head.weight": "score.weight",
}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """transformers' name of one of our parameters."""
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    _, _, layer, module, leaf = name.split(".")
    return f"model.layers.{layer}.{_BLOCK[module]}.{leaf}"


def read_config(path: Path) -> LlamaConfig:
    """LlamaConfig from a config.json; InputError naming the key that this model cannot honour."""
    raw = files.read_json(path)
    if raw.get("model_type") != "llama":
        raise InputError(f"{path}: model_type: expected 'llama', got {raw.get('model_type')!r}")
    for key, only in (
        ("is_causal", True),  # False: an encoder made of a Llama
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("num_labels", 1),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        if raw.get(key, only) != only:
            raise InputError(f"{path}: {key}: only {only!r} is supported, got {raw[key]!r}")
    # transformers 4: rope_theta and rope_scaling; transformers 5: both inside rope_parameters.
    rope = raw.get("rope_parameters") or {}
    for key, value in (("rope_parameters", rope), ("rope_scaling", raw.get("rope_scaling") or {})):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {key}: expected an object or null, got {value!r}")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise InputError(f"{path}: {key}: only unscaled rope is supported, got {kind!r}")
    # As in transformers 5, for which the older key holds, were there both.
    theta = (raw.get("rope_scaling") or rope).get("rope_theta", raw.get("rope_theta", 10000.0))
    required = {}
    for ours, theirs in (
        ("dim", "hidden_size"),
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("ffn_hidden", "intermediate_size"),
        ("vocab_size", "vocab_size"),
    ):
        if theirs not in raw:
            raise InputError(f"{path}: {theirs}: missing")
        required[ours] = raw[theirs]
    config = parse_config(
        path,
        {
            **required,
            "kv_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
            "context": raw.get("max_position_embeddings", 2048),
            "norm_eps": raw.get("rms_norm_eps", 1e-6),
            "rope_theta": float(theta) if isinstance(theta, int) else theta,
            "tied": raw.get("tie_word_embeddings", False),
        },
    )
    if (raw.get("head_dim") or config.head_dim) != config.head_dim:
        raise InputError(
            f"{path}: head_dim: expected hidden_size / num_attention_heads = {config.head_dim}, "
            f"got {raw['head_dim']}"
        )
    return config


def write_config(model: Llama | ScalarModel, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json for a model, in the spellings of transformers 4 and 5 at once."""
    config, scalar = model.config, isinstance(model, ScalarModel)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    described: dict[str, Any] = {
        "architectures": [SCALAR if scalar else CAUSAL],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if isinstance(model, ScalarModel):
        described["id2label"], described["label2id"] = {"0": "score"}, {"score": 0}
        if model.normalization != Normalization():
            # transformers keeps keys that it does not know, and gives scores as they are.
            described[NORMALIZATION] = dataclasses.asdict(model.normalization)
        described[UNREAD] = model.unread
        # transformers reads a score at the last token that is not this one.
        described["pad_token_id"] = _pad_of(model, tokenizer)
    if tokenizer is None:
        # Where they are left out, transformers takes those of LLaMA.
        described["bos_token_id"] = described["eos_token_id"] = None
    else:
        described["bos_token_id"] = tokenizer.bos
        # A list where the folder itself said one: most programs expect a number here.
        several = eos_ids(tokenizer.generation, GENERATION)
        listed = len(several) > 1 and tokenizer.eos in several
        described["eos_token_id"] = list(tokenizer.stop_ids) if listed else tokenizer.eos
    return described


def _pad_of(model: ScalarModel, tokenizer: Tokenizer | None) -> int | None:
    if model.unread is not None or tokenizer is None:
        return model.unread
    found = tokenizer.pad_candidate()
    if found in tokenizer.stop_ids:
        logger.warning(
            "no token to pad with: pad_token_id becomes %d, which also ends answers, and "
            "transformers will read scores at the token before it",
            found,
        )
    return found


def _unread(
    path: Path, described: Mapping[str, Any], config: LlamaConfig, tokenizer: Tokenizer | None
) -> int | None:
    """The `ScalarModel.unread` of a folder: what an export of ours says, elsewhere the pad token
    where texts end with it, or may."""
    if UNREAD in described:
        return parse_id(path, described, UNREAD, config)
    pad = parse_id(path, described, "pad_token_id", config)
    if pad is None or tokenizer is None:
        return pad
    if pad not in tokenizer.stop_ids or not _ends_dialogues(pad, tokenizer):
        return None
    logger.info(
        "%s: pad_token_id %d also ends answers: scores are read at the token before it", path, pad
    )
    return pad


def _ends_dialogues(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a template, where there is one that works, has nothing behind it."""
    if tokenizer.template is None or tokenizer.template.unusable:
        return True
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return tokenizer.template.render(turns).endswith(tokenizer.piece(token))
    except InputError:
        return True


def save(
    model: Llama | ScalarModel,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    weights: Mapping[str, Weight] | None = None,
    shard_bytes: int = files.SHARD_BYTES,
) -> None:
    """Write a folder that AutoModelForCausalLM (a ScalarModel: AutoModelForSequenceClassification)
    and AutoTokenizer load; atomic, a model folder already there is replaced.

    `weights`: those to write in place of the model's own, by parameter name; each is read once, in
    that order.
    """
    if weights is None:
        weights = {name: of_tensor(parameter) for name, parameter in files.weights(model).items()}

    def write_others(fresh: Path) -> None:
        described = write_config(model, tokenizer)
        files.write_json(fresh / "config.json", described)
        if tokenizer is not None:
            pad = described.get("pad_token_id")
            write_tokenizer(tokenizer, fresh, model.config.context, pad=pad)
            if isinstance(model, Llama):
                first, *others = tokenizer.stop_ids
                eos = [first, *others] if others else first
                ids = {"bos_token_id": tokenizer.bos, "eos_token_id": eos}
                files.write_json(fresh / GENERATION, {**tokenizer.generation, **ids})

    stored = {hf_name(name): weight for name, weight in weights.items()}
    files.write_model(folder, stored, write_others, shard_bytes)


def read(
    folder: Path, dtype: torch.dtype | None
) -> tuple[Llama | ScalarModel, Tokenizer | None, dict[str, Weight]]:
    """(model on the meta device, tokenizer, weights to read) of a Hugging Face folder; a sequence
    classifier with one label becomes a ScalarModel. InputError names file and key."""
    path = folder / "config.json"
    config = read_config(path)
    described = files.read_json(path)
    architectures = described.get("architectures") or [CAUSAL]
    if architectures[0] not in (CAUSAL, SCALAR):
        raise InputError(
            f"{path}: architectures: expected {CAUSAL} or {SCALAR}, got {architectures[0]!r}"
        )
    model: Llama | ScalarModel
    with torch.device("meta"):
        if architectures[0] == SCALAR:
            model = ScalarModel(config)
            model.normalization = parse_normalization(path, described, NORMALIZATION)
        else:
            model = Llama(config)

    # Old folders also hold a table of rotary frequencies, which is no weight.
    stored = (x for x in files.stored_weights(folder) if not x[1].endswith("rotary_emb.inv_freq"))
    weights = files.match(model, stored, dtype, hf_name)
    tokenizer = find_tokenizer(folder)
    if isinstance(model, ScalarModel):
        model.unread = _unread(path, described, config, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        logger.warning(
            "%s: the tokenizer has %d ids, the model only %d embeddings: it cannot read the others",
            folder,
            tokenizer.vocab_size,
            config.vocab_size,
        )
    return model, tokenizer, weights
