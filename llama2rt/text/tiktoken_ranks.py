"""Llama 3's tokenizer.model as Meta distributes it: lines of a base64 token and its rank.

The file has the merges only. How text is cut into words before merging, and the 256 special tokens
that follow the ranks, are in Meta's code (llama3 repository, llama/tokenizer.py), hence also here.
"""

import base64
import binascii
from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from llama2rt.errors import InputError
from llama2rt.text.merges import leftmost_first

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)


def read(definition: bytes) -> dict[bytes, int]:
    """Each token's rank; InputError naming the line, or the rank or byte that is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(definition.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"line {number}: expected a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"ranks: expected 0 to {len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"ranks: no token for the byte {missing[0]}")
    return ranks


def to_tokenizers(ranks: Mapping[bytes, int]) -> tokenizers.Tokenizer:
    """tiktoken merges, within a word, the adjacent pair whose joined bytes have the lowest rank;
    a word that is itself a token is that token (`ignore_merges`)."""
    shown = _byte_characters()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[left], names[right]) for left, right in leftmost_first(splits)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={names[token]: rank for token, rank in ranks.items()},
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in LLAMA3_SPECIAL])
    bos = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it can be
    printed, otherwise the next free one from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
