"""Rules by which papers left out pages that are no prose. Each function returns why a document
fails, or None.

Gopher: Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1: quality filtering, and repetition
removal with the thresholds of its Table A1. C4: Raffel et al. 2020 (JMLR 21, arXiv 1910.10683),
section 2.2, without its list of bad words, which is not ours to ship, its removal of repeated
three-sentence spans, for which there are near-duplicates, and langdetect.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

# Gopher, quality.
WORDS = (50, 100_000)
MEAN_WORD_LENGTH = (3, 10)
SYMBOLS_PER_WORD = 0.1
BULLET_LINES, ELLIPSIS_LINES = 0.9, 0.3
ALPHABETIC_WORDS = 0.8
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
LEAST_STOP_WORDS = 2
# Gopher, repetition (Table A1): shares of lines or paragraphs, and of characters.
DUPLICATE_LINES = DUPLICATE_PARAGRAPHS = 0.30
DUPLICATE_LINE_CHARACTERS = DUPLICATE_PARAGRAPH_CHARACTERS = 0.20
TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
# C4.
LEAST_WORDS_A_LINE, LEAST_SENTENCES = 5, 3

_BULLETS = ("\u2022", "\u2023", "\u25e6", "-", "*")
_ALPHABETIC = re.compile(r"[^\W\d_]")
_SYMBOLS = re.compile(r"#|\u2026|\.\.\.")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_LINE_END = (".", "!", "?", '"', "\u201d", "\u2019", "'")
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019]?(?=\s|$)")
_CITATION = re.compile(r"\[(?:\d+|citation needed|edit)\]", re.IGNORECASE)
_POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies",
    re.IGNORECASE,
)


def gopher(text: str) -> str | None:
    """Its quality rules. Words are what blanks part."""
    words = text.split()
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return f"{len(words):,} words, expected {WORDS[0]} to {WORDS[1]:,}"
    mean = sum(map(len, words)) / len(words)
    if not MEAN_WORD_LENGTH[0] <= mean <= MEAN_WORD_LENGTH[1]:
        return f"words of {mean:.1f} characters on average"
    if (symbols := len(_SYMBOLS.findall(text)) / len(words)) > SYMBOLS_PER_WORD:
        return f"{symbols:.2f} hashes and ellipses a word"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if (share := sum(line.startswith(_BULLETS) for line in lines) / len(lines)) > BULLET_LINES:
        return f"{share:.0%} of lines begin with a bullet"
    ending = sum(line.endswith(("...", "\u2026")) for line in lines)
    if (share := ending / len(lines)) > ELLIPSIS_LINES:
        return f"{share:.0%} of lines end with an ellipsis"
    alphabetic = sum(_ALPHABETIC.search(word) is not None for word in words)
    if (share := alphabetic / len(words)) < ALPHABETIC_WORDS:
        return f"{share:.0%} of words have a letter"
    found = STOP_WORDS & {word.casefold().strip(".,;:!?\"'()") for word in words}
    if len(found) < LEAST_STOP_WORDS:
        return f"{len(found)} of the words that English has"
    return None


def gopher_repetition(text: str) -> str | None:
    """Its rules of repetition."""
    lines = [line for line in text.split("\n") if line.strip()]
    paragraphs = [part for part in _PARAGRAPHS.split(text) if part.strip()]
    for what, parts, share, characters in (
        ("lines", lines, DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS),
        ("paragraphs", paragraphs, DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        again = _again(parts)
        if (found := len(again) / max(1, len(parts))) > share:
            return f"{found:.0%} of {what} are repeated"
        if (found := sum(map(len, again)) / max(1, len(text))) > characters:
            return f"{found:.0%} of characters are in repeated {what}"
    words = text.split()
    total = sum(map(len, words)) or 1
    for n, most in TOP_NGRAM_CHARACTERS.items():
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        if counts:
            [(ngram, count)] = counts.most_common(1)
            found = count * sum(map(len, ngram)) / total
            if count > 1 and found > most:
                return f"{found:.0%} of characters are in one run of {n} words"
    for n, most in DUPLICATE_NGRAM_CHARACTERS.items():
        if (found := _repeated_characters(words, n) / total) > most:
            return f"{found:.0%} of characters are in repeated runs of {n} words"
    return None


def _again(parts: Sequence[str]) -> list[str]:
    """Those that have come before."""
    seen: set[str] = set()
    found = []
    for part in map(str.strip, parts):
        if part in seen:
            found.append(part)
        seen.add(part)
    return found


def _repeated_characters(words: Sequence[str], n: int) -> int:
    """Characters of the words that are in runs of `n` that have come before, each counted once."""
    seen: set[int] = set()
    counted = covered = 0  # words up to `covered` are counted, or in no such run
    for at in range(len(words) - n + 1):
        ngram = hash(tuple(words[at : at + n]))
        if ngram in seen:
            begin = max(at, covered)
            counted += sum(map(len, words[begin : at + n]))
            covered = at + n
        seen.add(ngram)
    return counted


def c4(text: str) -> tuple[str, str | None]:
    """(the lines that C4 keeps, why the page fails or None)."""
    lower = text.casefold()
    if "lorem ipsum" in lower:
        return text, "has 'lorem ipsum'"
    if "{" in text:
        return text, "has a curly bracket"
    kept = []
    for line in _CITATION.sub("", text).split("\n"):
        line = line.strip()
        if (
            line.endswith(_LINE_END)
            and len(line.split()) >= LEAST_WORDS_A_LINE
            and "javascript" not in line.casefold()
            and not _POLICY.search(line)
        ):
            kept.append(line)
    left = "\n".join(kept)
    sentences = len(_SENTENCE_END.findall(left))
    if sentences < LEAST_SENTENCES:
        return left, f"{sentences} sentences in lines of prose"
    return left, None


def _whole(rule: Callable[[str], str | None]) -> Callable[[str], tuple[str, str | None]]:
    return lambda text: (text, rule(text))


RULES: dict[str, Callable[[str], tuple[str, str | None]]] = {
    "c4": c4,  # first, since it decides which lines the others read
    "gopher": _whole(gopher),
    "gopher_repetition": _whole(gopher_repetition),
}
"""by name: what of a text is left, and why it fails or None"""
