"""`llama2rt check` and `llama2rt tokenizer`: files of records from the command line."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llama2rt.data import check as checks
from llama2rt.data.readers import iterate
from llama2rt.data.sources import Source
from llama2rt.errors import InputError
from llama2rt.text.tokenizer import Tokenizer


def check(
    files: tyro.conf.Positional[tuple[Source, ...]],
    *,
    kind: Annotated[
        Literal["document", "dialogue", "prompt", "comparison", "sample"],
        tyro.conf.arg(name="as"),
    ],
    format: str | None = None,
    skip_invalid: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Validate files of records and describe what is in them; the first bad record is named by
    FILE:LINE.

    Args:
        files: JSON lines (also .gz), a JSON array, .txt, Parquet, or a folder of a Hugging Face
            dataset; or a table of a recipe, such as '{path="a.jsonl", kind="safety"}'.
        kind: What the files should hold.
        format: Of the rows, where two could be meant; docs/formats.md lists the names.
        skip_invalid: Bad records to tolerate; each is listed.
        as_json: Print one JSON object.
    """
    if not files:
        raise InputError("name at least one file")
    result = checks.check(files, kind, skip_invalid, format)
    if as_json:
        print(json.dumps(result))
    else:
        checks.print_check(result)


def tokenizer(
    files: tyro.conf.Positional[tuple[Path, ...]],
    *,
    vocab_size: int,
    out: Path,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Train a SentencePiece BPE tokenizer in LLaMA's settings.

    Args:
        files: Text files or JSON lines of documents.
        vocab_size: Pieces, the 3 specials and 256 bytes included.
        out: Folder that receives tokenizer.model.
        as_json: Print one JSON object.
    """
    if not files:
        raise InputError("name at least one file")
    texts = (document.text for document in iterate(files, "document"))
    trained = Tokenizer.train(texts, vocab_size, out)
    result = {"out": str(out), "vocab_size": trained.vocab_size, "sha256": trained.digest}
    print(json.dumps(result) if as_json else f"{out}: {trained.vocab_size} pieces")
