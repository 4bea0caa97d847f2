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

import rensa

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
    parents = list(range(len(texts)))
    words = [_words(t) for t in texts]
    for keys in (together, ["".join(w) for w in words]):
        _join_equal(parents, keys)
    distinct = [i for i in range(len(texts)) if words[i]]
    _join_similar(parents, distinct, [_shingles(words[i]) for i in distinct], threshold, seed)
    names: dict[int, int] = {}
    return [names.setdefault(_root(parents, i), len(names)) for i in range(len(texts))]


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


def _join_equal(parents: list[int], keys: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key:
            _join(parents, first.setdefault(key, i), i)


def _join_similar(parents: list[int], rows: list[int], sets: list[frozenset[str]], threshold: float, seed: int) -> None:
    bands, size = _bands(threshold)
    hashes = rensa.RMinHash.from_token_sets([list(s) for s in sets], bands * size, seed)
    index = rensa.RMinHashLSH(threshold, bands * size, bands)
    index.insert_many(hashes)
    for i, candidates in enumerate(index.query_all(hashes)):
        mine, here = sets[i], rows[i]
        for j in candidates:
            if j < i and _root(parents, rows[j]) != _root(parents, here):
                shared = len(mine & sets[j])
                if shared + 1e-9 >= threshold * (len(mine) + len(sets[j]) - shared):
                    _join(parents, rows[j], here)


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band): the most selective ones that miss a pair at the threshold less often than MAX_MISS."""
    fits = [r for r in range(1, 17) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MAX_MISS]
    size = max(fits, default=1)
    return PERMUTATIONS // size, size


def _root(parents: list[int], i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


def _join(parents: list[int], one: int, other: int) -> None:
    a, b = _root(parents, one), _root(parents, other)
    parents[max(a, b)] = min(a, b)


def _answer(example: Example) -> str:
    """The answer as a comparable text: JSON values by value, whatever their spelling."""
    return json.dumps(example.expected, sort_keys=True, ensure_ascii=False)
