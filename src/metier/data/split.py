"""Which rows train, validate and test: whole groups, in an order that only the seed and the groups decide."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from metier.config import Sizes
from metier.errors import ConfigError, DataError
from metier.records import Example

NAMES = ("train", "valid", "test")


def split(
    examples: Sequence[Example], sizes: Sizes, seed: int, balance: str | None = None
) -> tuple[dict[str, list[Example]], dict[str, str]]:
    """The rows of each split, and for each row left over (by id) the reason.

    Groups are taken in the order of a keyed hash, first for test, then valid, then train. Test and valid take one row
    of a group, so that their rows are independent; train takes a second row of a group only when every group has given
    one. A group in one split is in no other. Train may come out smaller than asked, test and valid never do.
    """
    groups = _groups(examples, seed)
    names = sorted(groups, key=lambda g: key(seed, g))
    _hold_enough(len(names), sizes)
    test, valid = names[: sizes.test], names[sizes.test : sizes.test + sizes.valid]
    rest = names[sizes.test + sizes.valid :]
    places = sorted((k, n) for n, g in enumerate(rest) for k in range(len(groups[g])))
    train = [groups[rest[n]][k] for k, n in places]
    if balance is not None:
        train = _balanced(train, balance)
    splits = {
        "train": train[: sizes.train],
        "valid": [groups[g][0] for g in valid],
        "test": [groups[g][0] for g in test],
    }
    left = _left([e for g in test for e in groups[g][1:]], "not sampled: its group is in test, with one row")
    left |= _left([e for g in valid for e in groups[g][1:]], "not sampled: its group is in valid, with one row")
    left |= _left(train[sizes.train :], f"not sampled: train has its {sizes.train:,} rows")
    return splits, left


def _balanced(rows: Sequence[Example], field: str) -> list[Example]:
    """The rows in an order whose beginnings hold each value of the field by the square root of its number.

    The i-th row of a value that n rows have stands at i / √n: after any such place, √n rows a unit have come.
    """
    values = [_value(row, field) for row in rows]
    counts, seen = Counter(values), Counter[str]()
    at = []
    for place, value in enumerate(values):
        at.append((seen[value] / math.sqrt(counts[value]), place))
        seen[value] += 1
    return [rows[place] for _, place in sorted(at)]


def _value(row: Example, field: str) -> str:
    if not isinstance(row.expected, dict) or field not in row.expected:
        raise ConfigError(
            f"data.balance: the answer of row {row.id} has no field {field!r}",
            where=str(row.source.get("document", "")),
            fix="name a field that every answer has, or drop data.balance",
        )
    return json.dumps(row.expected[field], sort_keys=True)


def _groups(examples: Sequence[Example], seed: int) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda e: key(seed, e.id)):
        groups.setdefault(example.group, []).append(example)
    return groups


def key(seed: int, name: str) -> tuple[bytes, str]:
    """What names are ordered by: a hash that the seed keys."""
    return hashlib.sha256(f"split:{seed}:{name}".encode()).digest(), name


def _hold_enough(groups: int, sizes: Sizes) -> None:
    if groups > sizes.test + sizes.valid:
        return
    if groups < len(NAMES):
        fix = f"give examples of at least {len(NAMES)} groups; rows of one document count as one group"
    else:
        whole = sizes.train + sizes.valid + sizes.test
        valid, test = (max(1, groups * n // whole) for n in (sizes.valid, sizes.test))
        fix = f"give more data, or set data.sizes.valid={valid} and data.sizes.test={test}"
    raise DataError(
        f"{groups:,} groups of different examples are too few for {sizes.valid:,} validation rows and"
        f" {sizes.test:,} test rows, each of another group",
        where="data.sizes",
        fix=fix,
    )


def _left(examples: Iterable[Example], reason: str) -> dict[str, str]:
    return {e.id: reason for e in examples}
