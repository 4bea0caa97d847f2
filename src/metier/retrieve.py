"""The nearest texts to a query.

Okapi BM25 over words (Robertson & Zaragoza 2009), as the `bm25s` library computes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from metier.errors import needs_extra

_WORD = re.compile(r"\w+(?:[.+-]\w+)*\+?")


class Index:
    """Texts that can be searched; the order of equal scores is the order in which they were given."""

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise needs_extra("bm25s", "rag") from error
        self._count = len(texts)
        self._bm25 = bm25s.BM25()
        self._bm25.index([_words(t) for t in texts], show_progress=False)

    def search(self, query: str, k: int) -> list[int]:
        """Places of the `k` nearest texts, the nearest first."""
        scores = self._bm25.get_scores(_words(query))
        return [int(i) for i in np.argsort(-scores, kind="stable")[: min(k, self._count)]]


def _words(text: str) -> list[str]:
    """Lower-case words; version numbers such as `2.0` and `v2+` stay whole. A text without words counts as one."""
    return _WORD.findall(text.lower()) or [text.strip().lower() or "\N{EMPTY SET}"]
