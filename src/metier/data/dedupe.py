"""What is the same: equal rows, equal questions with other answers, and groups of near duplicates.

Near duplicates are found by MinHash and then held against their exact similarity, so a pair in a group because of its
text is truly similar. Comparison ignores case, white space and punctuation; contents are never changed by it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from metier.errors import needs_extra
from metier.records import Example

MAX_MISS = 1e-4
PERMUTATIONS = 256
# Scripts without spaces between words: each character counts as a word.
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+")


def exact(examples: Sequence[Example]) -> dict[int, tuple[str, str]]:
    """index -> (fate, reason) of the rows to leave out.

    Of rows with the same question and answer the first stays. Of several answers to one question the most frequent
    stays, the first among equals; rows with another answer are rejected as conflicts.
    """
    questions: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, example in enumerate(examples):
        questions.setdefault(tuple((m.role, m.content) for m in example.prompt), []).append(i)
    out: dict[int, tuple[str, str]] = {}
    for rows in questions.values():
        answers = {i: _answer(examples[i]) for i in rows} if len(rows) > 1 else {}
        votes = Counter(answers.values())
        kept = max(rows, key=lambda i: (votes[answers[i]], -i)) if answers else rows[0]
        for i in rows:
            if i != kept:
                same = answers[i] == answers[kept]
                out[i] = (
                    ("duplicate", f"duplicate of {examples[kept].id}")
                    if same
                    else ("rejected", f"conflict: another answer than {examples[kept].id} to the same question")
                )
    return out


def groups(texts: Sequence[str], threshold: float, seed: int, together: Sequence[str] = ()) -> list[int]:
    """The group of each text, numbered by first appearance.

    Texts whose `shingles` have a Jaccard similarity of at least `threshold` are in one group, with whatever is similar
    to either; so are texts that differ in case, white space or punctuation alone, and texts with the same non-empty
    name in `together`.
    """
    words = [_words(t) for t in texts]
    sets = _Sets(len(texts))
    sets.join_equal(together)
    sets.join_equal(["".join(w) for w in words])
    _join_similar(sets, [_shingles(w) for w in words], threshold, seed)
    names: dict[int, int] = {}
    return [names.setdefault(label, len(names)) for label in sets.labels]


def shingles(text: str) -> frozenset[str]:
    """What a text is compared by: its words, and its runs of three words.

    The words let very short texts be similar at all; in long ones the runs outnumber them and hold the order.
    """
    return _shingles(_words(text))


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    # A text of signs alone is compared as it stands.
    return _WORD.findall(folded) or folded.split()


def _shingles(words: list[str]) -> frozenset[str]:
    return frozenset((*words, *(" ".join(words[i : i + 3]) for i in range(len(words) - 2))))


class _Sets:
    """Disjoint sets of row numbers. Each row knows its label; joining relabels the smaller set."""

    def __init__(self, count: int) -> None:
        self.labels = list(range(count))
        self._members = [[i] for i in range(count)]

    def join(self, one: int, other: int) -> None:
        small, large = sorted((self.labels[one], self.labels[other]), key=lambda label: len(self._members[label]))
        if small != large:
            for i in self._members[small]:
                self.labels[i] = large
            self._members[large] += self._members[small]
            self._members[small] = []

    def join_equal(self, keys: Sequence[str]) -> None:
        """Joins the rows with the same key; an empty key joins nothing."""
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key:
                self.join(first.setdefault(key, i), i)


def _join_similar(sets: _Sets, rows: Sequence[frozenset[str]], threshold: float, seed: int) -> None:
    try:
        import rensa
    except ImportError as error:
        raise needs_extra("rensa", "data") from error
    bands, size = _bands(threshold)
    hashes = rensa.RMinHash.from_token_sets([list(row) for row in rows], bands * size, seed)
    index = rensa.RMinHashLSH(threshold, bands * size, bands)
    index.insert_many(hashes)
    labels = sets.labels
    counts = [len(row) for row in rows]
    for i, candidates in enumerate(index.query_all(hashes)):
        mine, count = rows[i], counts[i]
        least, most = threshold * count - 1e-9, count / threshold + 1e-9
        for j in candidates:
            if j < i and labels[j] != labels[i] and least <= counts[j] <= most:
                shared = len(mine & rows[j])
                if shared and shared + 1e-9 >= threshold * (count + counts[j] - shared):
                    sets.join(i, j)


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band): the most selective ones that miss a pair at the threshold less often than MAX_MISS."""
    fits = [r for r in range(1, 17) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MAX_MISS]
    size = max(fits, default=1)
    return PERMUTATIONS // size, size


def _answer(example: Example) -> str:
    """The answer as a comparable text: JSON values by value, whatever their spelling."""
    return json.dumps(example.expected, sort_keys=True, ensure_ascii=False)
