"""tokenizer.json from a SentencePiece BPE model: the same ids for every text, or an InputError.

The order of merges is in `merges`. Here are the treatment of spaces, and user-defined symbols,
which SentencePiece never merges with anything.
"""

import re
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from llama2rt.errors import InputError
from llama2rt.text import sentencepiece_model as spm
from llama2rt.text.merges import EqualScoresError, ordered

SPACE = "\u2581"  # SentencePiece's visible space


def from_sentencepiece(definition: bytes, bos: int, eos: int, unk: int) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library; InputError names the setting, or the pieces
    of equal score, that this library cannot follow. `bos`, `eos`, `unk`: ids of the three."""
    model = spm.read(definition)
    _require_expressible(model)
    pieces = [piece.text for piece in model.pieces]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise _refusal("two pieces have one text")
    scores = {p.text: p.score for p in model.pieces if p.type == spm.NORMAL}
    try:
        merges = ordered(scores, vocabulary)
    except EqualScoresError as error:
        raise _refusal(str(error)) from None
    symbols = [pieces[number] for number in model.of_type(spm.USER_DEFINED)]

    def bpe(ignore_merges: bool) -> models.BPE:
        return models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=pieces[unk],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=ignore_merges,
        )

    converted = tokenizers.Tokenizer(bpe(ignore_merges=bool(symbols)))
    converted.normalizer = _normalizer(model)
    if symbols:
        converted.pre_tokenizer = _isolate(symbols, pieces, bpe(ignore_merges=False))
    converted.decoder = _decoder(model)
    converted.post_processor = processors.TemplateProcessing(
        single=f"{pieces[bos]} $A",
        pair=f"{pieces[bos]} $A {pieces[bos]}:1 $B:1",
        special_tokens=[(pieces[bos], bos)],
    )
    control = [pieces[number] for number in model.of_type(spm.CONTROL)]
    named = [pieces[unk], pieces[bos], pieces[eos]]
    converted.add_special_tokens(named + [text for text in control if text not in named])
    return converted


def _refusal(reason: str) -> InputError:
    return InputError(
        f"tokenizer.model: cannot be written as a tokenizer.json of equal ids: {reason}"
    )


def _require_expressible(model: spm.Model) -> None:
    for present, reason in (
        (
            model.type != "bpe",
            f"only SentencePiece BPE can be written as tokenizer.json, got {model.type}",
        ),
        (
            # Its Precompiled normalizer replaces whole grapheme clusters: it drops the combining
            # marks after a character that the table maps (tokenizers 0.23).
            model.has_normalization_table,
            f"the normalization rule {model.normalization!r} maps some texts otherwise there; "
            "only 'identity' is supported",
        ),
        (model.has_denormalization_table, "it has a denormalization rule"),
        (model.whitespace_as_suffix, "treat_whitespace_as_suffix is set"),
        (not model.escape_whitespaces, "escape_whitespaces is off"),
        (bool(model.of_type(spm.UNUSED)), "it has unused pieces, which are split again"),
    ):
        if present:
            raise _refusal(reason)
    for number in model.of_type(spm.USER_DEFINED):
        if " " in model.pieces[number].text or SPACE in model.pieces[number].text:
            raise _refusal(f"the user-defined symbol {model.pieces[number].text!r} holds a space")


# --- text around the merges -------------------------------------------------------------------


def _normalizer(model: spm.Model) -> normalizers.Sequence:
    steps: list[normalizers.Normalizer] = []
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(r" {2,}"), " "),
        ]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        # After the replacement, as there: a visible space in the text itself goes too.
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(model: spm.Model) -> decoders.Sequence:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 2**31 - 1, 0))
    elif model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _isolate(
    symbols: Iterable[str], pieces: Iterable[str], merging: models.BPE
) -> pre_tokenizers.PreTokenizer:
    """Cuts the text so that each user-defined symbol is a word of its own.

    `ignore_merges` then makes it one id, whole. It must not do that to other words that happen to
    spell a piece which merges do not reach (`<0x0A>`, `<s>`): those are cut once more, where their
    own merging leaves a boundary anyway.
    """
    ordered = sorted(symbols, key=len, reverse=True)  # the longest match wins, as there
    guards = []
    for text in set(pieces) - set(ordered):
        ends = {token.offsets[1] for token in merging.tokenize(text)}  # in bytes
        cuts_within = [n for n in range(1, len(text)) if len(text[:n].encode()) in ends]
        if cuts_within:
            head, tail = text[: cuts_within[0]], text[cuts_within[0] :]
            guards.append(rf"\A{re.escape(head)}(?={re.escape(tail)}\z)")
    cuts = [pre_tokenizers.Split(Regex("|".join(map(re.escape, ordered))), "isolated")]
    if guards:
        cuts.append(pre_tokenizers.Split(Regex("|".join(sorted(guards))), "isolated"))
    return pre_tokenizers.Sequence(cuts)
