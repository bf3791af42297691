"""Meta's original folders: params.json and consolidated.NN.pth, one file per model-parallel rank.

Two conventions differ from ours (and Hugging Face's): tensors are split over ranks, and rotary
pairs are neighbours instead of halves, so query and key rows are permuted on the way. Getting the
latter wrong gives fluent gibberish.
"""

import dataclasses
import functools
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama2rt.checkpoint import files
from llama2rt.checkpoint.native import find_tokenizer, parse_config
from llama2rt.checkpoint.weight import Area, Stored, Weight, of_tensor
from llama2rt.errors import InputError
from llama2rt.model import Llama, LlamaConfig
from llama2rt.text.tokenizer import Tokenizer

logger = logging.getLogger("llama2rt.checkpoint.meta")

# our name -> (Meta's name, dimension that is split over ranks; None: replicated)
_OUTSIDE_BLOCKS: dict[str, tuple[str, int | None]] = {
    "transformer.embedding.weight": ("tok_embeddings.weight", 1),
    "transformer.norm.weight": ("norm.weight", None),
    "output.weight": ("output.weight", 0),
}
_BLOCK: dict[str, tuple[str, int | None]] = {
    "attention_norm": ("attention_norm", None),
    "query": ("attention.wq", 0),
    "key": ("attention.wk", 0),
    "value": ("attention.wv", 0),
    "attention_output": ("attention.wo", 1),
    "ffn_norm": ("ffn_norm", None),
    "gate": ("feed_forward.w1", 0),
    "down": ("feed_forward.w2", 1),
    "up": ("feed_forward.w3", 0),
}


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Query or key rows from neighbouring rotary pairs (Meta) to half-split ones (ours)."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    rows, dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2).reshape(rows, dim)


def ffn_hidden(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer as Meta's code derives it."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _theirs(name: str) -> tuple[str, int | None]:
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    _, _, layer, module, leaf = name.split(".")
    theirs, split = _BLOCK[module]
    return f"layers.{layer}.{theirs}.{leaf}", split


def _heads(name: str, config: LlamaConfig) -> int | None:
    """Number of heads whose rows are permuted in a parameter, None if it is stored as it is."""
    if name.endswith(".query.weight"):
        return config.heads
    return config.kv_heads if name.endswith(".key.weight") else None


class Part(NamedTuple):
    """A tensor in one of the files."""

    path: Path
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """where in the file, counted in elements"""


Shard = tuple[Path, dict[str, Part]]
"""a file of a folder and what is in it"""


def _shards(folder: Path) -> list[Shard]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise InputError(f"{folder}: no consolidated.NN.pth in this folder")
    for number, path in enumerate(paths):
        if path.name != f"consolidated.{number:02}.pth":
            raise InputError(f"{folder}: consolidated.{number:02}.pth is missing")
    shards = []
    for path in paths:
        try:
            # No values, but where they lie in the file: see `_read`.
            shard = torch.load(path, map_location="meta", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise InputError(f"{path}: damaged or not a checkpoint: {reason}") from None
        if not isinstance(shard, dict):
            raise InputError(f"{path}: expected tensors by name, got {type(shard).__name__}")
        shards.append((path, {name: _part_of(path, name, shard[name]) for name in shard}))
    return shards


def _part_of(path: Path, name: str, tensor: Any) -> Part:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{path}: {name}: expected a tensor, got {type(tensor).__name__}")
    # From torch's notes on serialization: where a storage that was loaded without values lies.
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None
    begin = offset // tensor.itemsize + int(tensor.storage_offset())
    return Part(path, tensor.shape, tensor.stride(), tensor.dtype, begin)


def _read(part: Part, area: Area) -> Tensor:
    """Some of a tensor, in a mapping of the file that lasts as long as what is returned: mapped
    pages count as this process's memory, and `torch.load` keeps them all."""
    last = sum((n - 1) * step for n, step in zip(part.shape, part.stride, strict=True))
    size = part.path.stat().st_size // part.dtype.itemsize
    if part.shape.numel() and part.begin + last >= size:
        raise InputError(f"{part.path}: damaged or not a checkpoint: it is too short")
    whole = torch.from_file(str(part.path), shared=False, size=size, dtype=part.dtype)
    return whole.as_strided(part.shape, part.stride, part.begin)[area]


def _config(path: Path, shards: list[Shard], tokenizer: Tokenizer | None) -> LlamaConfig:
    raw = files.read_json(path)
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in raw:
            raise InputError(f"{path}: {key}: missing")
    if raw.get("use_scaled_rope"):
        raise InputError(f"{path}: use_scaled_rope: only unscaled rope is supported")
    theta = raw.get("rope_theta", 10000.0)
    first, weights = shards[0]
    for key in ("layers.0.feed_forward.w1.weight", "output.weight"):
        if key not in weights:
            raise InputError(f"{first}: {key}: missing")
    vocabulary = raw.get("vocab_size", -1)
    if vocabulary == -1:  # Llama 2's own params.json leaves it to the tokenizer
        rows = weights["output.weight"].shape[0] * len(shards)
        vocabulary = tokenizer.vocab_size if tokenizer else rows
    config = parse_config(
        path,
        {
            "dim": raw["dim"],
            "layers": raw["n_layers"],
            "heads": raw["n_heads"],
            "kv_heads": raw.get("n_kv_heads") or raw["n_heads"],
            # The weights say it exactly; params.json only by a formula that changed over time.
            "ffn_hidden": weights["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
            "vocab_size": vocabulary,
            "norm_eps": raw["norm_eps"],
            "rope_theta": float(theta) if isinstance(theta, int) else theta,
        },
    )
    stored = weights["output.weight"].dtype
    return parse_config(path, {**vars(config), "context": _context(path.parent, config, stored)})


def _context(folder: Path, config: LlamaConfig, stored: torch.dtype) -> int:
    """params.json holds no context length: that of the published model with these numbers.

    The first Llama 2 folders say norm_eps 1e-6, so that params.json of 7B and 13B is LLaMA 1's to
    the letter. Those are told apart by the folder's name (Meta's are `llama-2-7b`, and `7B` in
    LLaMA 1) and, where it says nothing, by the weights' dtype: LLaMA 1 is distributed in fp16,
    Llama 2 in bf16. Where that says nothing either, it is LLaMA 1's shorter context, because beyond
    its own a model writes nonsense.
    """
    for name in LlamaConfig.presets():
        preset = LlamaConfig.preset(name)
        if vars(preset) != {**vars(config), "context": preset.context}:
            continue
        twin = f"llama2-{name.removeprefix('llama1-')}"
        if not name.startswith("llama1-") or twin not in LlamaConfig.presets():
            return preset.context
        later = LlamaConfig.preset(twin)
        if dataclasses.replace(later, norm_eps=config.norm_eps, context=preset.context) != config:
            return preset.context  # LLaMA 1's own shape
        generation = _generation(folder, stored)
        if generation is None:
            logger.warning(
                "%s: LLaMA 1 or an early Llama 2 (neither the folder's name nor the dtype %s says "
                "which): read with LLaMA 1's context of %d",
                folder,
                stored,
                preset.context,
            )
        return later.context if generation == 2 else preset.context
    # Other sizes of published families: Llama 3's 70B, and Code Llama (Meta's model cards).
    return {500000.0: 8192, 1000000.0: 16384}.get(config.rope_theta, config.context)


def _generation(folder: Path, stored: torch.dtype) -> int | None:
    """1 for LLaMA 1, 2 for Llama 2, None where neither name nor dtype tells."""
    resolved = folder.resolve()
    for name in (resolved.name, resolved.parent.name):
        if match := re.search(r"llama[-_ ]?v?([12])(?![0-9a-z])", name, re.IGNORECASE):
            return int(match[1])
    return {torch.float16: 1, torch.bfloat16: 2}.get(stored)


def read(
    folder: Path, dtype: torch.dtype | None
) -> tuple[Llama, Tokenizer | None, dict[str, Weight]]:
    """(model on the meta device, tokenizer, weights to read) of a Meta folder; what params.json
    says wins over any preset. InputError names file and key.

    The tokenizer is tokenizer.model in the folder or, as Meta distributes it, one level above.
    """
    shards = _shards(folder)
    tokenizer = find_tokenizer(folder)
    if tokenizer is None and (folder.parent / "tokenizer.model").is_file():
        tokenizer = Tokenizer.load(folder.parent / "tokenizer.model")
    config = _config(folder / "params.json", shards, tokenizer)
    with torch.device("meta"):
        model = Llama(config)

    def stored() -> Iterator[Stored]:
        known = set()
        for name, _ in model.named_parameters():
            theirs, _ = _theirs(name)
            known.add(theirs)
            yield shards[0][0], theirs, _merged(shards, name, config)
        for path, shard in shards:
            # LLaMA 1's have tables of rotary frequencies, one or one a layer.
            if extra := sorted(name for name in shard.keys() - known if "rope.freqs" not in name):
                raise InputError(f"{path}: {extra[0]}: not part of a model of this configuration")

    return model, tokenizer, files.match(model, stored(), dtype, lambda name: _theirs(name)[0])


def _merged(shards: list[Shard], name: str, config: LlamaConfig) -> Weight:
    """One of our parameters, put together from the ranks' parts."""
    theirs, split = _theirs(name)
    for path, shard in shards:
        if theirs not in shard:
            raise InputError(f"{path}: {theirs}: missing")
    parts = [shard[theirs] for _, shard in shards]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    if name == files.EMBEDDING and parts[0].shape[1] == config.dim:
        split = 0  # Llama 3 splits its embedding over the vocabulary
    if split is None:
        return Weight(parts[0].shape, parts[0].dtype, functools.partial(_read, parts[0]))
    whole = [*parts[0].shape]
    whole[split] = sum(part.shape[split] for part in parts)

    def fetch(area: Area) -> Tensor:
        inside, begin = [], 0
        for part in parts:
            first = max(area[split].start - begin, 0)
            last = min(area[split].stop - begin, part.shape[split])
            if first < last:
                there = (*area[:split], slice(first, last), *area[split + 1 :])
                inside.append(_read(part, there))
            begin += part.shape[split]
        return torch.cat(inside, split)

    heads = _heads(name, config)
    if heads is None or whole[0] != heads * config.head_dim:
        return Weight(torch.Size(whole), dtype, fetch)

    def halves(area: Area) -> Tensor:
        # A head's rows trade places among themselves: whole heads are read.
        size = config.head_dim
        first, last = area[0].start // size, -(-area[0].stop // size)
        rows = fetch((slice(first * size, last * size), *area[1:]))
        halved = to_halves(rows, last - first)
        return halved[area[0].start - first * size : area[0].stop - first * size]

    return Weight(torch.Size(whole), dtype, halves)


def params(config: LlamaConfig) -> dict[str, Any]:
    """params.json; finds multiple_of and ffn_dim_multiplier that give the config's own width."""
    width, plain = config.ffn_hidden, int(2 * 4 * config.dim / 3)
    # Llama 2 7B/13B/34B, 70B, Llama 3 8B; then anything that divides the width.
    tried = [(256, None), (4096, 1.3), (1024, 1.3)]
    exact = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if width % m == 0)
    tried += [(exact, None), (exact, (width - (exact - 1) / 2 + 0.25) / plain)]
    multiple, multiplier = next(pair for pair in tried if ffn_hidden(config.dim, *pair) == width)
    params = {
        "dim": config.dim,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "multiple_of": multiple,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    return params


def check_shards(config: LlamaConfig, shards: int) -> None:
    """ValueError where a model cannot be split over so many model-parallel ranks."""
    for name in ("dim", "kv_heads", "ffn_hidden", "vocab_size"):
        if shards < 1 or getattr(config, name) % shards:
            raise ValueError(
                f"shards: expected a divisor of {name} {getattr(config, name)}, got {shards}"
            )


def save(
    model: Llama,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    weights: Mapping[str, Weight] | None = None,
    shards: int = 1,
) -> None:
    """Write a Meta folder of `shards` model-parallel ranks; atomic. ValueError if the shape cannot
    be split that way. A tied output is written out in full, because Meta's code has no tying.

    `weights`: those to write in place of the model's own, by parameter name. One file's are held at
    a time.
    """
    config = model.config
    check_shards(config, shards)
    if weights is None:
        weights = {name: of_tensor(parameter) for name, parameter in files.weights(model).items()}
    # As `load` will read it: params.json holds no context.
    unknown = dataclasses.replace(config, context=4096, tied=False)
    context = _context(Path(folder), unknown, next(iter(weights.values())).dtype)
    if context != config.context:
        logger.warning(
            "%s: Meta's params.json holds no context: it will be read as %d, not this model's %d",
            folder,
            context,
            config.context,
        )
    with files.new_folder(Path(folder)) as fresh:
        files.write_json(fresh / "params.json", params(config))
        for number in range(shards):
            part = {
                _theirs(name)[0]: _part(
                    name,
                    weights[name if name in weights else files.EMBEDDING],
                    config,
                    number,
                    shards,
                )
                for name, _ in model.named_parameters(remove_duplicate=False)
            }
            try:
                torch.save(part, fresh / f"consolidated.{number:02}.pth")
            except RuntimeError as error:  # which is what torch makes of a full disk
                reason = str(error).splitlines()[0]
                raise OSError(f"{folder}: this model could not be written ({reason})") from error
            del part  # before the next one is read
        if tokenizer is not None:
            tokenizer.save(fresh)


def _part(name: str, weight: Weight, config: LlamaConfig, number: int, shards: int) -> Tensor:
    """What rank `number` has of one of our parameters, in memory of its own."""
    _, split = _theirs(name)
    area = [slice(0, size) for size in weight.shape]
    if split is not None:
        size = weight.shape[split] // shards
        area[split] = slice(number * size, (number + 1) * size)
    part = weight.read(tuple(area))
    heads = _heads(name, config)
    if heads is not None:
        part = to_pairs(part, heads // shards)
    # A clone: torch.save would store the whole tensor behind a slice.
    return part.clone(memory_format=torch.contiguous_format)
