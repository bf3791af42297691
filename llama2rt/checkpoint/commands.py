"""`llama2rt convert`: a model folder or GGUF file into another format."""

from pathlib import Path
from typing import Literal

import tyro

from llama2rt.checkpoint.convert import convert as convert_folder


def convert(
    source: tyro.conf.Positional[Path],
    destination: tyro.conf.Positional[Path],
    *,
    to: Literal["hf", "meta", "native"],
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shards: int = 1,
) -> None:
    """Write a model folder in another format, tokenizer included.

    Args:
        source: Folder of this project, Hugging Face or Meta; or a GGUF file.
        destination: A new folder.
        to: Its format.
        dtype: Dtype of the weights; None keeps what is there.
        shards: Model-parallel ranks of a Meta folder.
    """
    convert_folder(source, destination, to, dtype=dtype, shards=shards)
