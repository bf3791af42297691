"""Windows of token files in a deterministic order, as `data.loader` has it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama2rt.data.loader import WHOLE, Share, _Loader
from llama2rt.data.packing import Batch, filler
from llama2rt.data.tokens import TokenFile, pack_groups, shares
from llama2rt.errors import InputError


class TokenLoader(_Loader[Batch]):
    """Windows of `context` tokens over one or more token files, about `batch_tokens` tokens a
    step (a whole number of windows) in micro-batches of at most `micro_tokens`.

    A file is read as a ring and cut into windows, from a random offset that differs each time
    through it; the windows come in random order. One pass over a file predicts every token once.
    Documents inside a window begin at BOS and do not see each other; a window that begins inside a
    document starts at position 0 there, and nothing predicts a BOS.

    `weights` (one a file, any scale; section 2.1 up-samples the most factual sources) sets the
    files' shares of an epoch's windows. Without them an epoch is one pass over every file. With
    them it has as many windows as the files hold, and each file continues where the epoch before
    left it, so that an up-sampled file is passed over more often, without replacement.
    """

    def __init__(
        self,
        files: TokenFile | Sequence[TokenFile],
        context: int,
        batch_tokens: int,
        micro_tokens: int,
        seed: int,
        epochs: int | None = None,
        weights: Sequence[float] | None = None,
        *,
        share: Share = WHOLE,
    ) -> None:
        if context < 1 or batch_tokens < context or micro_tokens < context:
            raise InputError(
                f"batch_tokens {batch_tokens} and micro_tokens {micro_tokens} must both hold at "
                f"least one window of context {context}"
            )
        self._files = [files] if isinstance(files, TokenFile) else list(files)
        self._context, self._micro_windows = context, micro_tokens // context
        self._windows = [-(-(len(file) - 1) // context) for file in self._files]
        self._draws = shares(self._windows, weights)
        super().__init__(sum(self._draws), batch_tokens // context, seed, epochs, share)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {
            "context": self._context,
            "draws": self._draws,
            "files": [file.digest for file in self._files],
        }

    def _start_epoch(self) -> np.ndarray:
        """The epoch's windows in order, as rows (file, first token, length)."""
        rows = []
        for index, (file, windows, draws) in enumerate(
            zip(self._files, self._windows, self._draws, strict=True)
        ):
            ring = len(file) - 1
            drawn = np.arange(self._epoch * draws, (self._epoch + 1) * draws)
            for turn in np.unique(drawn // windows):
                generator = np.random.default_rng([self._seed, index, turn])
                start = generator.integers(ring)
                order = generator.permutation(windows)
                begin = order[drawn[drawn // windows == turn] % windows] * self._context
                length = np.minimum(self._context, ring - begin)
                rows.append(
                    np.stack([np.full_like(begin, index), (start + begin) % ring, length], axis=1)
                )
        table = np.concatenate(rows)
        return table[np.random.default_rng([self._seed, self._epoch]).permutation(len(table))]

    def _assemble(self, indices: np.ndarray) -> list[Batch]:
        rank, ranks = self._share
        own = [(self._files[file], begin, n) for file, begin, n in indices[rank::ranks].tolist()]
        each = range(0, len(own), self._micro_windows)
        result = pack_groups([own[at : at + self._micro_windows] for at in each])
        # Rank 0 has as many windows as any.
        most = -(-len(indices[::ranks]) // self._micro_windows)
        return result + [filler()] * (most - len(result))
