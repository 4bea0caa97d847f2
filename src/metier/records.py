"""The nouns that cross borders, and their one JSON Lines form.

Data passes from one folder of the house to another only as one of these frozen records. On disk each is one JSON
object a line (see `docs/contract.md`); reading is strict, because a row that was half understood is worse than one
that was refused: duplicate keys, NaN, lone surrogates, NUL characters and over-deep nesting are errors with a line
number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.errors import DataError

if TYPE_CHECKING:
    import numpy as np

MAX_ROW_BYTES = 1 << 20
MAX_DOCUMENT_ROW_BYTES = 1 << 27
MAX_DEPTH = 32
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """A text as it came in. `where` names it for people: a path, or `package:member`."""

    id: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A demonstration: a conversation that ends in the assistant's answer.

    `group` names rows that must stay on one side of every split; `expected` is the answer as a value, for graders.
    """

    id: str
    messages: tuple[Message, ...]
    source: dict[str, Any]
    group: str
    expected: Any = None
    checks: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]


@dataclass(frozen=True, slots=True)
class Case:
    """A question with its checks: what an arm is asked, and what its answer is held against."""

    id: str
    messages: tuple[Message, ...]
    group: str
    expected: Any
    checks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What one arm answered to one case. `finish` is `stop` (the model ended) or `length` (it was cut)."""

    case: str
    arm: str
    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """One grader's number for one completion; `value` is None where the grader could not judge."""

    case: str
    arm: str
    grader: str
    value: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations or documents laid end to end without padding, after the `prefix` they all share.

    P prefix tokens, B rows (a document packed with others is a row here), T = sum of row lengths, K supervised
    positions. Every row attends to the prefix and to itself, never to another row. `predict_K` indexes the T row
    positions whose next token is `target_K`; the last prefix position is index -1 and predicts nothing, because no
    row's answer starts right after the shared prefix.
    """

    prefix_P: np.ndarray
    tokens_T: np.ndarray
    lengths_B: np.ndarray
    predict_K: np.ndarray
    target_K: np.ndarray
    ids: tuple[str, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def real_tokens(self) -> int:
        """Tokens of the rows as a user counts them: the prefix once per row."""
        return int(self.tokens_T.size + self.prefix_P.size * self.lengths_B.size)


def to_json(record: Any) -> dict[str, Any]:
    """A record as a JSON object, fields in declared order, empty optional fields left out."""
    out: dict[str, Any] = {}
    for name in (f.name for f in fields(record)):
        value = getattr(record, name)
        if name == "messages":
            value = [{"role": m.role, "content": m.content} for m in value]
        if name in ("expected", "checks") and (value is None or value == ()):
            continue
        out[name] = list(value) if isinstance(value, tuple) else value
    return out


def dumps(value: Any) -> str:
    """One line of JSON: UTF-8, finite numbers, keys in the order given."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def lines(rows: Iterable[Any]) -> bytes:
    """Records or objects as JSON Lines bytes."""
    return "".join(dumps(r if isinstance(r, dict) else to_json(r)) + "\n" for r in rows).encode("utf-8")


def loads(data: bytes, where: str, limit: int = MAX_ROW_BYTES) -> Any:
    """Strict JSON from bytes; `where` (file:line) goes into the error."""
    if len(data) > limit:
        raise DataError(
            f"a row of {len(data):,} bytes is over the limit of {limit:,}", where=where, fix="split the row"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8", where=where, fix="save the file as UTF-8") from error
    if _nesting(text) > MAX_DEPTH:
        raise DataError(f"nested deeper than {MAX_DEPTH} levels", where=where, fix="flatten the row")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=where, fix="one JSON object a line, double quotes") from error
    _hold_text(value, where)
    return value


def objects(path: Path, limit: int = MAX_ROW_BYTES) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) for each line of a JSON Lines file; blank lines are passed over."""
    for where, data in raw_lines(path, limit):
        value = loads(data, where, limit)
        if not isinstance(value, dict):
            raise DataError(f"a {type(value).__name__} where an object belongs", where=where, fix="one object a line")
        yield where, value


def raw_lines(path: Path, limit: int = MAX_ROW_BYTES) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, bytes) of each line that is not blank, split on the byte LF only."""
    try:
        yield from _raw_lines(path, limit)
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=str(path), fix="check the file and its permissions"
        ) from error


def _raw_lines(path: Path, limit: int) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit + 2):
            number += 1
            where = f"{path}:{number}"
            if len(line) > limit:
                raise DataError(
                    f"a row is over the limit of {limit:,} bytes", where=where, fix="split the row, or the file"
                )
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield where, line.rstrip(b"\r\n")


def examples(path: Path) -> list[Example]:
    """The examples of a data set file that Metier wrote."""
    return [
        Example(
            id=row["id"],
            messages=tuple(Message(m["role"], m["content"]) for m in row["messages"]),
            source=row["source"],
            group=row["group"],
            expected=row.get("expected"),
            checks=tuple(row.get("checks", ())),
        )
        for _, row in objects(path)
    ]


def documents(path: Path) -> list[Document]:
    """The documents of a data set file that Metier wrote."""
    return [Document(**row) for _, row in objects(path, MAX_DOCUMENT_ROW_BYTES)]


def completions(path: Path) -> list[Completion]:
    return [Completion(**row) for _, row in objects(path)]


def case(example: Example) -> Case:
    """The question inside a demonstration."""
    return Case(example.id, example.prompt, example.group, example.expected, example.checks)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in names if names.count(k) > 1)!r} stands twice")
    return out


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _nesting(text: str) -> int:
    """An upper bound of the nesting depth, found before any recursive parser sees the text."""
    depth = deepest = 0
    in_string = escaped = False
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _hold_text(value: Any, where: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise DataError("a text holds a NUL character", where=where, fix="remove \\u0000 from the row")
        if _SURROGATE.search(value):
            raise DataError(
                "a text holds a lone surrogate", where=where, fix="remove the broken \\ud800-\\udfff escape"
            )
    elif isinstance(value, dict):
        for key, inner in value.items():
            _hold_text(key, where)
            _hold_text(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _hold_text(inner, where)
