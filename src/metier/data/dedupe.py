"""What is the same: equal rows, equal questions with other answers, and groups of near duplicates.

Near duplicates are found exactly: no pair over the threshold is missed, so that none can stand in two splits.
Comparison ignores case, white space and punctuation; contents are never changed by it.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from metier.records import Example

BITS = 1024
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
                    ("duplicate", f"duplicate: of {examples[kept].id}")
                    if same
                    else ("rejected", f"conflict: another answer than {examples[kept].id} to the same question")
                )
    return out


def groups(texts: Sequence[str], threshold: float, together: Sequence[str] = ()) -> list[int]:
    """The group of each text, numbered by first appearance.

    Texts whose `shingles` have a Jaccard similarity of at least `threshold` are in one group, with whatever is similar
    to either; so are texts that differ in case, white space or punctuation alone, and texts with the same non-empty
    name in `together`.
    """
    words = [_words(t) for t in texts]
    sets = _Sets(len(texts))
    sets.join_equal(together)
    sets.join_equal(["".join(w) for w in words])
    _join_similar(sets, [_shingles(w) for w in words], threshold)
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


def _join_similar(sets: _Sets, rows: Sequence[frozenset[str]], threshold: float) -> None:
    """Joins each pair of rows whose Jaccard similarity reaches the threshold.

    Two filters, neither of which loses a pair, leave few pairs to compare. Similar rows share one of their rarest
    shingles (prefix filter: of n shingles at least threshold * n are shared, so of the rarest n - threshold * n + 1 at
    least one is). And where two rows' bit maps differ in many places, the rows differ in at least as many shingles.
    """
    numbered, first = _by_rarity(rows)
    sets.join_equal([" ".join(map(str, row)) for row in numbered])
    labels = sets.labels
    index: defaultdict[int, list[int]] = defaultdict(list)
    bits = {i: sum({1 << (s % BITS) for s in numbered[i]}) for i in first}
    full = {i: frozenset(numbered[i]) for i in first}
    for i in sorted(first, key=lambda i: len(full[i])):
        mine, count, map_ = full[i], len(full[i]), bits[i]
        rarest = numbered[i][: count - math.ceil(threshold * count - 1e-9) + 1]
        for j in set().union(*(index[s] for s in rarest)):
            both = count + len(full[j])
            if (
                labels[j] != labels[i]
                and (map_ ^ bits[j]).bit_count() * (1 + threshold) <= both * (1 - threshold) + 1e-9
            ):
                shared = len(mine & full[j])
                if shared + 1e-9 >= threshold * (both - shared):
                    sets.join(i, j)
        for s in rarest:
            index[s].append(i)


def _by_rarity(rows: Sequence[frozenset[str]]) -> tuple[list[list[int]], list[int]]:
    """Each row as numbers of its shingles, the rarest first, and the first row of each different non-empty set."""
    counts = Counter(s for row in rows for s in row)
    numbers = {s: n for n, s in enumerate(sorted(counts, key=lambda s: (counts[s], s)))}
    numbered = [sorted(numbers[s] for s in row) for row in rows]
    first: dict[frozenset[str], int] = {}
    for i, row in enumerate(rows):
        if row:
            first.setdefault(row, i)
    return numbered, list(first.values())


def _answer(example: Example) -> str:
    """The answer as a comparable text: JSON values by value, whatever their spelling."""
    return json.dumps(example.expected, sort_keys=True, ensure_ascii=False)
