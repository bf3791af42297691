"""A tokenizer's files as transformers reads them, beside the ones that a folder came with."""

from pathlib import Path
from typing import Any

from llama2rt.checkpoint import files
from llama2rt.text import chat
from llama2rt.text.folder import CONFIG
from llama2rt.text.tokenizer import Tokenizer


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, context: int, *, pad: int | None = None
) -> None:
    """Write the tokenizer's own files into `folder`, and of tokenizer.json and
    tokenizer_config.json what they lack, so that AutoTokenizer gives equal ids and the chat format
    that we train with. InputError for a tokenizer.model of which there is no equal tokenizer.json.

    `pad`: the pad token, whatever the folder says (reward models' scores are read in front of it).
    """
    complete = tokenizer.as_json()  # before anything is written
    tokenizer.save(folder)
    config: dict[str, Any] = dict(tokenizer.config)
    if not (folder / "tokenizer.json").is_file():
        (folder / "tokenizer.json").write_bytes(complete)
        # transformers' own class for LLaMA would build a tokenizer from the pieces, with other
        # ids for leading spaces and runs of spaces.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    names = {
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": tokenizer.piece(tokenizer.eos),
    }
    if tokenizer.unk >= 0:
        names["unk_token"] = tokenizer.piece(tokenizer.unk)
    defaults: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "pad_token": tokenizer.piece(tokenizer.pad_candidate()),
        "padding_side": "left",  # generation continues a row's last column
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # transformers 4 otherwise returns token_type_ids as well, which generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    if not tokenizer.config:
        config = {**defaults, **config}
    elif config != tokenizer.config:
        config = {**defaults, **config, **names}
    if pad is not None:
        config["pad_token"] = tokenizer.piece(pad)
    if tokenizer.template is None:
        config["chat_template"] = chat.HUGGING_FACE_TEMPLATE
    elif not (
        tokenizer.template.unusable
        or "chat_template" in config
        or (folder / "chat_template.jinja").is_file()
    ):
        config["chat_template"] = tokenizer.template.source
    if config != tokenizer.config:
        files.write_json(folder / CONFIG, config)
