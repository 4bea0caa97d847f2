"""Rows of JSON Lines files in the forms people have: messages, prompt and completion, instruction and output.

The form is found row by row. A bad row costs that row, with its line and a reason; a file that is no JSON Lines file,
or has no good row, is an error.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from metier import records
from metier.data import ingest
from metier.data.ingest import Rejected
from metier.errors import DataError
from metier.records import Document, Message

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
}
OPTIONAL = ("input", "system", "group")
ROLES = ("system", "user", "assistant")
_KNOWN = {*OPTIONAL, *(key for keys in FORMS.values() for key in keys)}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "ZIP",
    b"PAR1": "Parquet",
}
_CODES = {
    r"is over the limit of": "row_too_large",
    r"is not UTF-8$": "bad_utf8",
    r"^nested deeper": "too_deep",
    r"stands twice$": "duplicate_key",
    r"(is not a JSON number|is too large for a number)$": "non_finite",
    r"NUL character$": "nul_char",
    r"lone surrogate$": "lone_surrogate",
    r"limit .* for integer string conversion": "number_too_long",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A good row. `unused` are keys that no form knows; they are reported, never trained on."""

    where: str
    messages: tuple[Message, ...]
    group: str = ""
    unused: tuple[str, ...] = ()


def examples(path: Path, name: str = "") -> Iterator[Row | Rejected]:
    """The rows of a file, in order; `name` stands for the path in `where` (`name:line`)."""
    name = name or str(path)
    good = 0
    reasons: list[Rejected] = []
    with path.open("rb") as file:
        _hold_text_file(file, path)
        for where, data in _lines(file, name):
            row = _row(where, data) if isinstance(data, bytes) else data
            good += isinstance(row, Row)
            if isinstance(row, Rejected):
                reasons.append(row)
            yield row
    if not good:
        raise _nothing_good(path, reasons)


def texts(path: Path, name: str, unused: Counter[str]) -> Iterator[Document | Rejected]:
    """The documents of a file with a `text` a line, in order; other keys are counted in `unused`."""
    with path.open("rb") as file:
        _hold_text_file(file, path)
        for where, data in _lines(file, name):
            yield _text_row(where, data, unused) if isinstance(data, bytes) else data


def _text_row(where: str, data: bytes, unused: Counter[str]) -> Document | Rejected:
    try:
        value = records.loads(data, where)
    except DataError as error:
        return Rejected(where, refusal(error))
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        shown = f"its keys are {_shown(value)}" if isinstance(value, dict) else f"it is a {type(value).__name__}"
        return Rejected(where, f"schema: no object with a `text`; {shown}")
    unused.update(k for k in value if k != "text")
    return ingest.document(where, value["text"])


def code(reason: str) -> str:
    """The part of a reason that rows are counted by."""
    return reason.split(":", 1)[0]


def summary(rejected: list[Rejected]) -> str:
    """Reasons with their counts and the first row of each, the most frequent first."""
    counts = Counter(code(r.reason) for r in rejected)
    first = {code(r.reason): r for r in reversed(rejected)}
    return "; ".join(f"{n:,} x {c} (first {first[c].where}: {first[c].reason})" for c, n in counts.most_common(8))


def hold_share(rejected: list[Rejected], total: int, most: float, *, left: bool) -> None:
    """Refuses a source of which more than the share `most` was rejected, or of which nothing is `left`."""
    if left and len(rejected) <= most * total:
        return
    share = f"{len(rejected):,} of {total:,} rows were rejected"
    limit = f", more than data.max_rejected={most:g} accepts" if left else ""
    raise DataError(f"{share}{limit}: {summary(rejected)}", where="data", fix="mend the rows named here")


def refusal(error: DataError) -> str:
    """The reason (`code: details`) for which a row that `records.loads` refused is rejected."""
    cause = error.__cause__
    if isinstance(cause, json.JSONDecodeError):
        return _not_json(cause)
    known = next((c for pattern, c in _CODES.items() if re.search(pattern, error.what)), "not_json")
    return f"{known}: {error.what}"


def _not_json(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        hint = "; its lines end in CR alone" if "\r" in error.doc else ""
        return f"extra_data: more than one JSON value on the line, from column {error.colno}{hint}"
    if error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip()):
        return f"truncated: the row ends inside a value, after {len(error.doc.encode())} bytes"
    return f"not_json: {error.msg} at column {error.colno}"


def _hold_text_file(file: BinaryIO, path: Path) -> None:
    """Refuses what is no JSON Lines file as a whole, by its first bytes."""
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise DataError("the file is empty", where=str(path), fix="write one JSON object a line")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"a {kind} file where JSON Lines belong", where=str(path), fix="unpack or convert it to .jsonl first"
            )
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[:4].count(0) > 1:
        raise DataError("UTF-16 or UTF-32, not UTF-8", where=str(path), fix="save the file as UTF-8")


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes | Rejected]]:
    """(where, line) split on the byte LF alone; of an over-long line only its rejection, and little memory."""
    number = 0
    while line := file.readline(records.MAX_ROW_BYTES + 2):
        number += 1
        where = f"{name}:{number}"
        if len(line.rstrip(b"\r\n")) > records.MAX_ROW_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(1 << 16)):
                pass
            yield where, Rejected(where, f"row_too_large: over {records.MAX_ROW_BYTES:,} bytes")
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield where, line.rstrip(b"\r\n")


def _row(where: str, data: bytes) -> Row | Rejected:
    try:
        value = records.loads(data, where)
    except DataError as error:
        return Rejected(where, refusal(error))
    try:
        return _demonstration(where, value)
    except _RefusedError as refused:
        return Rejected(where, str(refused))


class _RefusedError(Exception):
    """A row that is JSON and no demonstration; its text is the reason."""


def _demonstration(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise _RefusedError(f"schema: a {type(row).__name__} where an object belongs")
    _hold_keys(row)
    forms = [name for name, keys in FORMS.items() if any(k in row for k in keys)]
    if len(forms) != 1:
        found = f"mixes {' with '.join(forms)}" if forms else f"has no known form; its keys are {_shown(row)}"
        raise _RefusedError(f"schema: the row {found}")
    messages = {"messages": _chat, "prompt and completion": _completion, "instruction and output": _alpaca}[forms[0]](
        row
    )
    group = row.get("group", "")
    if not isinstance(group, str):
        raise _RefusedError("schema: /group is not a text")
    return Row(where, messages, group, tuple(sorted(k for k in row if k not in _used(forms[0]))))


def _used(form: str) -> set[str]:
    optional = {"messages": ("group",), "prompt and completion": ("system", "group")}.get(form, OPTIONAL)
    return {*FORMS[form], *optional}


def _hold_keys(row: dict[str, Any]) -> None:
    for key in row:
        plain = "".join(
            c for c in unicodedata.normalize("NFKC", key).casefold() if unicodedata.category(c)[0] not in "CZ"
        )
        if key not in _KNOWN and plain in _KNOWN:
            raise _RefusedError(f"unknown_key: {key!a} is not {plain}")


def _chat(row: dict[str, Any]) -> tuple[Message, ...]:
    return _conversation(row["messages"], "/messages")


def _completion(row: dict[str, Any]) -> tuple[Message, ...]:
    prompt, completion = _need(row, "prompt"), _need(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], "/prompt+completion")
    turns = [("user", _text(prompt, "/prompt")), ("assistant", _text(completion, "/completion"))]
    return _told(row, turns)


def _alpaca(row: dict[str, Any]) -> tuple[Message, ...]:
    asked = _text(_need(row, "instruction"), "/instruction")
    given = _text(row.get("input", ""), "/input")
    answer = _text(_need(row, "output"), "/output")
    return _told(row, [("user", f"{asked}\n\n{given}" if given.strip() else asked), ("assistant", answer)])


def _told(row: dict[str, Any], turns: list[tuple[str, str]]) -> tuple[Message, ...]:
    """The turns after the row's own system text, where it brings one."""
    if system := _text(row.get("system", ""), "/system"):
        turns.insert(0, ("system", system))
    return _held(tuple(Message(role, content) for role, content in turns))


def _conversation(value: Any, at: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _RefusedError(f"schema: {at} is not a list of messages")
    return _held(tuple(_message(item, f"{at}/{i}") for i, item in enumerate(value)))


def _message(item: Any, at: str) -> Message:
    if not isinstance(item, dict):
        raise _RefusedError(f"schema: {at} is not an object")
    if item.get("role") not in ROLES:
        raise _RefusedError(f"schema: {at}/role is {str(item.get('role'))[:40]!a}, not system, user or assistant")
    more = sorted(k for k in item if k not in ("role", "content"))
    if more and not (more == ["weight"] and item["weight"] == 1):
        raise _RefusedError(f"schema: {at} holds {_shown(more)}; only role and content are used")
    return Message(item["role"], _text(item.get("content"), f"{at}/content"))


def _held(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, if they are an optional system text and then questions and answers in turn."""
    turns = messages[1:] if messages[0].role == "system" else messages
    wanted = ["user", "assistant"] * (len(turns) // 2)
    if [m.role for m in turns] != wanted or not turns:
        raise _RefusedError(
            "schema: the roles are not user and assistant in turn, ending with assistant: " + _roles(messages)
        )
    if not all(m.content.strip() for m in turns if m.role == "user"):
        raise _RefusedError("empty_input: a question without text")
    if not all(m.content.strip() for m in turns if m.role == "assistant"):
        raise _RefusedError("empty_target: an answer without text")
    return messages


def _roles(messages: tuple[Message, ...]) -> str:
    roles = [m.role for m in messages]
    return " ".join(roles[:6]) + (" ..." if len(roles) > 6 else "")


def _need(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise _RefusedError(f"schema: /{key} is missing")
    return row[key]


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise _RefusedError(
            f"schema: {at} is {'missing' if value is None else 'a ' + type(value).__name__}, not a text"
        )
    return value


def _shown(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(f"{k[:40]!a}" for k in names[:6]) + (" ..." if len(names) > 6 else "") or "none"


def _nothing_good(path: Path, rejected: list[Rejected]) -> DataError:
    if not rejected:
        return DataError("the file holds no row", where=str(path), fix="write one JSON object a line")
    with path.open("rb") as file:
        array = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    fix = (
        "it looks like one JSON array: write one object a line"
        if array
        else "mend the rows; known forms: " + "; ".join(FORMS)
    )
    return DataError(f"none of the {len(rejected):,} rows can be used: {summary(rejected)}", where=str(path), fix=fix)
