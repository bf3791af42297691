"""`llama2rt convert SRC DST --to hf|meta|native`: a model folder or GGUF file in another format."""

import logging
from pathlib import Path
from typing import Literal

import torch

from llama2rt.checkpoint import files, hf, meta, native
from llama2rt.checkpoint.load import read
from llama2rt.errors import InputError
from llama2rt.model import ScalarModel

logger = logging.getLogger("llama2rt.checkpoint.convert")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(
    source: str | Path,
    destination: str | Path,
    to: Literal["hf", "meta", "native"],
    *,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shards: int = 1,
) -> None:
    """Write the model folder or GGUF file `source` as the folder `destination`, tokenizer included.

    One tensor is in memory at a time or, where a Meta folder is written, one of its files. dtype
    None keeps the stored one. shards: model-parallel ranks of a Meta folder. InputError when the
    source cannot be read, the destination already holds something, or the target format cannot
    express the model; then nothing has been written.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination}: already exists and is not empty")
    if shards != 1 and to != "meta":
        raise InputError("shards: only a Meta folder is split into ranks")
    model, tokenizer, weights = read(source, DTYPES[dtype] if dtype else None)
    files.fill(model, weights, "meta")  # for their dtype, which a description of the model names
    if tokenizer is None:
        logger.warning(
            "%s: no tokenizer, with which the ids of BOS, EOS and padding and the generation "
            "defaults travel: %s has none",
            source,
            destination,
        )
    if to == "meta":
        if isinstance(model, ScalarModel):
            raise InputError(f"{source}: a model with a scalar head has no Meta format; use hf")
        try:
            meta.check_shards(model.config, shards)
        except ValueError as error:
            raise InputError(str(error)) from None
        meta.save(model, tokenizer, destination, weights=weights, shards=shards)
    else:
        (hf if to == "hf" else native).save(model, tokenizer, destination, weights=weights)
