"""How much a set of texts repeats itself: what choosing the best, version after version, can lose.

Words are what white space divides. Both measures depend on how many texts there are and how long
they are: compare sets of as many answers to the same prompts.
"""

import math
from collections import Counter
from collections.abc import Sequence

_ORDERS = 4
_SMOOTHING = 0.1


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Share of different ones among all n-grams of all `texts` (distinct-n, Li et al., 2016, arXiv
    1510.03055); None where no text has n words."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each text with all others as its references (Zhu et al., 2018, arXiv
    1802.01886): 1 where each is some other's copy. None for fewer than two texts with a word.

    As sentences here are short, orders that a text has no n-grams of are left out of its geometric
    mean (sacreBLEU's `effective_order`), and a precision of 0 counts as 0.1 of an n-gram (Chen and
    Cherry, 2014, method 1). The brevity penalty is by the reference nearest in length.
    """
    words = [text.split() for text in texts if text.split()]
    if len(words) < 2:
        return None
    counts = [[Counter(_grams(text, n)) for text in words] for n in range(1, _ORDERS + 1)]
    most = [_two_largest(of_order) for of_order in counts]
    lengths = Counter(map(len, words))
    scores = []
    for i, text in enumerate(words):
        logs = []
        for of_order, largest in zip(counts, most, strict=True):
            if total := sum(of_order[i].values()):
                clipped = sum(
                    min(count, _in_others(largest[gram], i)) for gram, count in of_order[i].items()
                )
                logs.append(math.log(max(clipped, _SMOOTHING) / total))
        nearest = _nearest(lengths, len(text))
        penalty = min(0.0, 1 - nearest / len(text))
        scores.append(math.exp(penalty + sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _two_largest(
    counts: Sequence[Counter[tuple[str, ...]]],
) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """n-gram -> (its largest count in a text, which text, the largest count in any other)."""
    found: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for i, of_text in enumerate(counts):
        for gram, count in of_text.items():
            first, owner, second = found.get(gram, (0, -1, 0))
            found[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
    return found


def _in_others(largest: tuple[int, int, int], text: int) -> int:
    first, owner, second = largest
    return second if owner == text else first


def _nearest(lengths: Counter[int], length: int) -> int:
    """The length of another text that is nearest to `length`, the shorter of two as near."""
    others = [n for n, texts in lengths.items() if n != length or texts > 1]
    return min(others, key=lambda n: (abs(n - length), n))
