"""Guesses of the next tokens, looked up in a sequence's own prompt and answer.

Speculative decoding (Leviathan et al. 2023) with the text itself as the draft model (Saxena 2023,
prompt look-up decoding): where its last tokens have come before, what followed them then is
guessed to follow now. Guesses are checked in one forward pass, and one is accepted only if it is
what the sample's own uniform number chooses there; so samples are the same as without.
"""

import numpy as np

LONGEST, SHORTEST = 3, 2  # tokens at the end that must have come before


def look_up(tokens: np.ndarray, lengths: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Number of guesses int32 [B] for sequences `tokens` [B, L] of `lengths` [B]; writes the
    guesses behind each sequence. `most` [B]: how many are wanted; L leaves room for them."""
    found = np.zeros(len(tokens), np.int64)  # where what follows the match begins; 0: no match
    longest = int(lengths.max(initial=0))
    rows = np.arange(len(tokens))
    for n in range(LONGEST, SHORTEST - 1, -1):
        if longest <= n:
            continue
        width = longest - n
        matches = np.arange(width) < (lengths - n)[:, None]  # not the end itself
        for j in range(n):
            last = tokens[rows, np.maximum(lengths - n + j, 0)]
            matches &= tokens[:, j : j + width] == last[:, None]
        newest = width - 1 - matches[:, ::-1].argmax(1)
        found = np.where((found == 0) & matches.any(1), newest + n, found)
    count = np.where(found > 0, np.minimum(most, lengths - found), 0).clip(min=0)
    for j in range(int(count.max(initial=0))):
        some = rows[count > j]
        tokens[some, lengths[some] + j] = tokens[some, found[some] + j]
    return count.astype(np.int32)
