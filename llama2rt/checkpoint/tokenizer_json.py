"""tokenizer.json from a SentencePiece BPE model, so that AutoTokenizer loads without sentencepiece.

SentencePiece stores pieces with scores, `tokenizers` a vocabulary with an ordered list of merges. A
piece's merges are its splits into two other pieces, ranked by the piece's score.
"""

from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from llama2rt.checkpoint import files
from llama2rt.errors import InputError
from llama2rt.text import chat
from llama2rt.text.tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's visible space


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the tokenizer's own file, tokenizer.json and tokenizer_config.json into `folder`."""
    path = tokenizer.save(folder)
    if path.name == "tokenizer.json":
        return
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    from_sentencepiece(processor).save(str(folder / "tokenizer.json"))
    names = {
        key: processor.id_to_piece(number)
        for key, number in (
            ("bos_token", processor.bos_id()),
            ("eos_token", processor.eos_id()),
            ("unk_token", processor.unk_id()),
        )
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": chat.HUGGING_FACE_TEMPLATE,
    }
    files.write_json(folder / "tokenizer_config.json", config)


def from_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library; InputError if it is not BPE."""
    size = processor.vocab_size()
    pieces = [processor.id_to_piece(number) for number in range(size)]
    ordinary = [
        number
        for number in range(size)
        if not (
            processor.is_control(number)
            or processor.is_unknown(number)
            or processor.is_byte(number)
            or processor.is_unused(number)
        )
    ]
    scores = {pieces[number]: processor.get_score(number) for number in ordinary}
    # A BPE trainer scores pieces 0, -1, -2, ... in order; a unigram trainer by log-probability.
    if any(score != int(score) for score in scores.values()):
        raise InputError("tokenizer.model: only SentencePiece BPE can be written as tokenizer.json")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece, score in scores.items():
        splits = [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
        splits.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-score, pair) for pair in splits]
    merges.sort(key=lambda merge: merge[0])

    unknown = pieces[processor.unk_id()]
    converted = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for _, pair in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    converted.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    converted.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = pieces[processor.bos_id()]
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, processor.bos_id())],
    )
    converted.add_special_tokens([unknown, bos, pieces[processor.eos_id()]])
    return converted
