"""An answer's text as its tokens come: only characters that no later token can change or take back.

Tokens are decoded in a window that begins at a token with text before the new ones, so that the
work for each does not grow with the answer and a word keeps the space in front of it. Held back
are the bytes of an incomplete character, the beginning of what may become a stop text and, where
the answer is stripped, white space at its end.
"""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens of a prompt that its continuation is decoded behind: enough to hold one with text.
_TAIL = 32


class TextStream:
    """Text of the answer to `prompt` (token ids). `strip`: of a message, without white space at
    either end; otherwise what continues the prompt's own text. `stop`: texts that end it."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], *, strip: bool, stop: tuple[str, ...] = ()
    ) -> None:
        self._tokenizer, self._strip, self._stop = tokenizer, strip, stop
        self._ids: list[int] = [] if strip else self._known(prompt)[-_TAIL:]
        self._read = len(self._ids)  # tokens whose text has been taken
        self._before = self._decode(self._ids)
        self._held = ""  # decoded, not yet shown
        self._begun = not strip  # text was shown, or white space in front of it counts
        self.stopped = False
        """whether a stop text came"""

    def add(self, tokens: Sequence[int]) -> int:
        """Takes the next tokens, up to the one that completes a stop text; returns how many."""
        if not self._stop:
            self._append(tokens)
            return len(tokens)
        for i, token in enumerate(tokens):
            self._append([token])
            self._find_stop()
            if self.stopped:
                return i + 1
        return len(tokens)

    def show(self, *, final: bool = False) -> str:
        """The text since the last call that is certain; all of the rest at the end."""
        if final and not self.stopped:
            self._held += self._decode(self._ids)[len(self._before) :]
            self._before, self._ids, self._read = "", [], 0
            self._find_stop()
        if not self._begun:
            self._held = self._held.lstrip()
        sure = len(self._held) if final or self.stopped else self._certain()
        if self._strip:
            sure = len(self._held[:sure].rstrip())
        text, self._held = self._held[:sure], self._held[sure:]
        self._begun = self._begun or bool(text)
        return text

    def _known(self, tokens: Sequence[int]) -> list[int]:
        # A vocabulary padded for speed has rows without text; an answer must not fail on one.
        return [token for token in tokens if token < self._tokenizer.vocab_size]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids) if ids else ""

    def _append(self, tokens: Sequence[int]) -> None:
        self._ids += self._known(tokens)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT):
            return
        self._held += text[len(self._before) :]
        after = self._ids[self._read :]
        behind = self._decode(after)
        if behind:  # otherwise the next word would be the window's first and lose its space
            self._ids, self._before = after, behind
        else:
            self._before = text
        self._read = len(self._ids)

    def _find_stop(self) -> None:
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True

    def _certain(self) -> int:
        """Length of `_held` without the longest end that begins a stop text."""
        held = self._held
        longest = min(max(map(len, self._stop), default=1) - 1, len(held))
        for n in range(longest, 0, -1):
            if any(stop.startswith(held[-n:]) for stop in self._stop):
                return len(held) - n
        return len(held)
