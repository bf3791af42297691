"""What becomes of each document once all are cleaned: which origins go whole, which documents are
the same as an earlier one or alike it; what of it a report shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama2rt import atomic
from llama2rt.corpus import cleaning, duplicates
from llama2rt.corpus.chunks import Chunk
from llama2rt.corpus.duplicates import ALIKE, EQUAL, RICH, Comparison, Texts
from llama2rt.corpus.recipe import CorpusRecipe
from llama2rt.corpus.tally import Tally
from llama2rt.data.removed import EXAMPLES

FATES = "fates.npy"
"""in the work folder: uint8 [documents], of all chunks in order"""
_STEP_OF = {EQUAL: "duplicates", ALIKE: "near_duplicates", RICH: "personal_data"}


class Compared:
    """All documents of a corpus, compared. `work`: the folder of what `cleaning` left."""

    def __init__(self, recipe: CorpusRecipe, parts: Sequence[Chunk], work: Path) -> None:
        self._recipe, self._parts, self._work = recipe, parts, work
        self.sizes = [len(self._columns(chunk).offset) for chunk in range(len(parts))]
        self._comparison = Comparison(self.sizes, work / "comparison")
        self._fate = self._comparison.fate

    def run(self, results: Sequence[dict[str, Any]], rich: dict[str, float]) -> None:
        """Decide and write `FATES`. `results`: of `cleaning.clean`; `rich`: origins to remove."""
        recipe = self._recipe
        if rich:
            self._remove_origins(results, rich)
        if recipe.duplicates:
            self._comparison.equal(self._columns(i).digest for i in range(len(self._parts)))
        if (least := recipe.near_duplicates) is not None:
            names = [str(self._work / cleaning.name_of(chunk)) for chunk in self._parts]
            texts = Texts([f"{name}.jsonl" for name in names], [f"{name}.npz" for name in names])
            bands = [self._band(band) for band in range(duplicates.bands_of(least))]
            self._comparison.alike(bands, texts, least)
        with atomic.replacing(self._work / FATES) as file:
            np.save(file, self._fate)

    def _remove_origins(self, results: Sequence[dict[str, Any]], rich: dict[str, float]) -> None:
        """Before all else: what is left of a text must not be the copy that goes."""
        for chunk, result in enumerate(results):
            removed = np.array([origin[0] in rich for origin in result["origins"]], np.bool_)
            own = self._columns(chunk).origin
            gone = np.flatnonzero(removed[own]) if len(own) else own
            self._fate[self._comparison.first(chunk) + gone] = RICH

    def _band(self, band: int) -> Any:
        return (self._columns(chunk).bands[:, band] for chunk in range(len(self._parts)))

    def count(self, tallies: Sequence[Tally]) -> None:
        """Add to the tally of each chunk what was removed of it, with the first few examples of
        all."""
        for chunk, (tally, size) in enumerate(zip(tallies, self.sizes, strict=True)):
            first = self._comparison.first(chunk)
            for kind, step in _STEP_OF.items():
                if count := int((self._fate[first : first + size] == kind).sum()):
                    tally.removed.counts[step] += count
                    tally.removed.examples.setdefault(step, [])
        for kind, step in _STEP_OF.items():
            for document, reason in self._examples(kind):
                chunk, row = self._comparison.place(document)
                shown = f"{self._where(chunk, row)}: {reason}"
                tallies[chunk].removed.examples[step].append(shown)

    def _examples(self, kind: int) -> list[tuple[int, str]]:
        """(document, why) of the first few that are removed as `kind`."""
        if kind == RICH:
            first = np.flatnonzero(self._fate == RICH)[:EXAMPLES].tolist()
            return [(document, "its origin is rich in personal data") for document in first]
        found = []
        for document, earlier, similarity in sorted(self._comparison.examples[kind])[:EXAMPLES]:
            what = "the same as" if kind == EQUAL else f"{similarity:.2f} alike"
            found.append((document, f"{what} {self._where(*self._comparison.place(earlier))}"))
        return found

    def spans(self) -> list[tuple[Chunk, int, int]]:
        """(chunk, its first document, the one behind its last)."""
        firsts = map(self._comparison.first, range(len(self._parts)))
        return [
            (c, n, n + size) for c, n, size in zip(self._parts, firsts, self.sizes, strict=True)
        ]

    def _columns(self, chunk: int) -> cleaning.Columns:
        return cleaning.columns(self._work, self._parts[chunk])

    def _where(self, chunk: int, row: int) -> str:
        """FILE:LINE of a document."""
        found = self._columns(chunk)
        piece = self._parts[chunk].pieces[int(found.piece[row])]
        return f"{piece.path}:{int(found.line[row])}"
