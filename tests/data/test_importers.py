"""Rows of JSON Lines files: the known forms, and what each kind of bad row or file is told."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier import records
from metier.data import importers
from metier.data.importers import Row
from metier.data.ingest import Rejected
from metier.errors import DataError

GOOD = b'{"prompt": "q", "completion": "a"}\n'


def rows(folder: Path, data: bytes) -> list[Row | Rejected]:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    return list(importers.examples(path, "rows.jsonl"))


def turns(row: Row | Rejected) -> list[tuple[str, str]]:
    assert isinstance(row, Row), row
    return [(m.role, m.content) for m in row.messages]


def reason(folder: Path, line: bytes) -> str:
    """The reason for which a line is rejected; the good rows around it must come through."""
    before, row, after = rows(folder, GOOD + line + b"\n" + GOOD)
    assert isinstance(before, Row)
    assert isinstance(after, Row)
    assert isinstance(row, Rejected), row
    assert row.where == "rows.jsonl:2"
    return row.reason


def test_each_form_becomes_messages(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
        {"prompt": "q", "completion": "a", "group": "g"},
        {"instruction": "do", "output": "a"},
        {"instruction": "do", "input": "it", "output": "a", "system": "s"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a", "id": 7, "source": {"x": [1]}},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"},
            ]
        },
    ]
    found = rows(tmp_path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    asked = [("user", "q"), ("assistant", "a")]
    assert [turns(row) for row in found] == [
        asked,
        asked,
        [("user", "do"), ("assistant", "a")],
        [("system", "s"), ("user", "do\n\nit"), ("assistant", "a")],
        asked,
        asked,
        [("system", "s"), *asked, ("user", "q2"), ("assistant", "a2")],
    ]
    assert [r.group for r in found if isinstance(r, Row)] == ["", "g", "", "", "", "", ""]
    assert [r.unused for r in found if isinstance(r, Row)] == [(), (), (), (), (), ("id", "source"), ()]


def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    plain = rows(tmp_path, GOOD * 3)
    assert rows(tmp_path, b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + GOOD + GOOD.rstrip()) == plain
    blank = rows(tmp_path, GOOD + b"\n \r\n" + GOOD)
    assert [r.where for r in blank] == ["rows.jsonl:1", "rows.jsonl:4"]


def test_other_line_ends_inside_texts_stay(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0cd<|im_end|>"
    line = json.dumps({"prompt": text, "completion": text}, ensure_ascii=False).encode()
    assert turns(rows(tmp_path, line)[0]) == [("user", text), ("assistant", text)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": "q", "completion": "a', "truncated"),
        (b'{"prompt": "q",', "truncated"),
        (b"{", "truncated"),
        (b'{"prompt": "\xe2\x80', "bad_utf8"),
        (b'{"prompt": "\xc0\xaf"}', "bad_utf8"),
        (b'{"prompt": "\xed\xa0\x80"}', "bad_utf8"),
        (b"{'prompt': 'q'}", "not_json"),
        (b'{"prompt": "q",}', "not_json"),
        (b'// {"prompt": "q"}', "not_json"),
        (b'\xef\xbb\xbf{"prompt": "q"}', "not_json"),
        (b'{"prompt": "a\tb"}', "not_json"),
        (GOOD.strip() + GOOD.strip(), "extra_data"),
        (GOOD.strip() + b"\r" + GOOD.strip(), "extra_data"),
        (b'{"prompt": NaN}', "non_finite"),
        (b'{"prompt": -Infinity}', "non_finite"),
        (b'{"prompt": 1e400}', "non_finite"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "number_too_long"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        (b'{"prompt": "q", "prompt": "r", "completion": "a"}', "duplicate_key"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "q"}]}', "duplicate_key"),
        (b'{"prompt": "a\\u0000b", "completion": "a"}', "nul_char"),
        (b'{"prompt": "\\ud800", "completion": "a"}', "lone_surrogate"),
        (b'{"\\udc00": 1, "prompt": "q", "completion": "a"}', "lone_surrogate"),
        (b'{"prompt": "' + b"x" * records.MAX_ROW_BYTES + b'", "completion": "a"}', "row_too_large"),
        (b'{"Prompt": "q", "completion": "a"}', "unknown_key"),
        (b'{"prompt ": "q", "completion": "a"}', "unknown_key"),
        ('{"pro\u200bmpt": "q", "completion": "a"}'.encode(), "unknown_key"),
        ('{"\uff50rompt": "q", "completion": "a"}'.encode(), "unknown_key"),
        (b'["prompt", "completion"]', "schema"),
        (b"null", "schema"),
        (b"{}", "schema"),
        (b'{"text": "a"}', "schema"),
        (b'{"prompt": "q", "chosen": "a", "rejected": "b"}', "schema"),
        (b'{"prompt": "q", "completion": "a", "messages": []}', "schema"),
        (b'{"prompt": "q"}', "schema"),
        (b'{"prompt": 3, "completion": "a"}', "schema"),
        (b'{"prompt": "q", "completion": null}', "schema"),
        (b'{"prompt": "q", "completion": "a", "group": 1}', "schema"),
        (b'{"messages": null}', "schema"),
        (b'{"messages": []}', "schema"),
        (b'{"messages": "q"}', "schema"),
        (b'{"messages": [null]}', "schema"),
        (b'{"prompt": "", "completion": "a"}', "empty_input"),
        (b'{"prompt": "q", "completion": " \\n"}', "empty_target"),
        (b'{"instruction": "q", "output": ""}', "empty_target"),
    ],
)
def test_a_bad_row_costs_that_row_and_says_why(tmp_path: Path, line: bytes, code: str) -> None:
    assert importers.code(reason(tmp_path, line)) == code


def chat(*messages: tuple[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c, **more} for r, c in messages]}).encode()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (chat(("System", "s"), ("user", "q"), ("assistant", "a")), "/messages/0/role is 'System'"),
        (chat(("tool", "q"), ("assistant", "a")), "/messages/0/role is 'tool'"),
        (chat(("assistant", "a")), "in turn"),
        (chat(("user", "q"), ("user", "q"), ("assistant", "a")), "in turn"),
        (chat(("user", "q"), ("system", "s"), ("assistant", "a")), "in turn"),
        (chat(("user", "q")), "in turn"),
        (chat(("system", "s")), "in turn"),
        (chat(("user", ["q"]), ("assistant", "a")), "/messages/0/content is a list"),
        (chat(("user", "q"), ("assistant", None)), "/messages/1/content is missing"),
        (chat(("user", "q"), ("assistant", "a"), tool_calls=[]), "/messages/0 holds 'tool_calls'"),
        (chat(("user", "q"), ("assistant", "a"), weight=0), "/messages/0 holds 'weight'"),
    ],
)
def test_a_bad_conversation_is_pointed_at(tmp_path: Path, line: bytes, part: str) -> None:
    found = reason(tmp_path, line)
    assert found.startswith("schema: ")
    assert part in found


def test_a_huge_line_is_passed_over_with_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        for _ in range(20):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    found = list(importers.examples(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(r) for r in found] == [Row, Rejected, Row]
    assert [r.where.rpartition(":")[2] for r in found] == ["1", "2", "3"]
    assert peak < 4 << 20


def test_a_row_of_just_the_limit_is_used(tmp_path: Path) -> None:
    empty = len(b'{"prompt": "", "completion": "a"}')
    line = b'{"prompt": "' + b"x" * (records.MAX_ROW_BYTES - empty) + b'", "completion": "a"}'
    assert len(line) == records.MAX_ROW_BYTES
    assert all(isinstance(r, Row) for r in rows(tmp_path, line + b"\r\n" + GOOD))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the file is empty"),
        (b"\n\r\n \n", "the file holds no row"),
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ("{}".encode("utf-32-be"), "UTF-16 or UTF-32"),
        (b"\x1f\x8b\x08\x00", "a gzip file"),
        (b"\x28\xb5\x2f\xfd\x00", "a Zstandard file"),
        (b"PK\x03\x04", "a ZIP file"),
        (b"PAR1", "a Parquet file"),
        (b"q,a\nx,y\n", "none of the 2 rows can be used: 2 x not_json (first rows.jsonl:1: "),
        (b"[\n{},\n]", "none of the 3 rows can be used"),
    ],
)
def test_a_file_that_is_no_json_lines_is_an_error(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(DataError) as caught:
        rows(tmp_path, data)
    assert what in caught.value.what
    assert caught.value.fix
    assert ("JSON array" in caught.value.fix) == data.startswith(b"[")


def test_the_summary_counts_by_code_and_shows_the_first() -> None:
    rejected = [Rejected("f:1", "b: x"), Rejected("f:2", "a: y"), Rejected("f:3", "a: z")]
    assert importers.summary(rejected) == "2 x a (first f:2: a: y); 1 x b (first f:1: b: x)"


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_texts_come_through_unchanged(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    data = b"".join(
        json.dumps({"prompt": q, "completion": a}, ensure_ascii=len(q) % 2 == 0).encode() + b"\n" for q, a in pairs
    )
    found = rows(tmp_path_factory.mktemp("t"), data)
    assert [turns(r) for r in found] == [[("user", q), ("assistant", a)] for q, a in pairs]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(string.printable, max_size=60).map(str.encode)))
def test_any_bytes_give_one_outcome_a_line(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    found = rows(tmp_path_factory.mktemp("t"), GOOD + junk + b"\n" + GOOD)
    wanted = [i for i, line in enumerate((GOOD + junk + b"\n" + GOOD).split(b"\n"), 1) if line.strip()]
    assert [int(r.where.rpartition(":")[2]) for r in found] == wanted


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "prompt", "completion", "role", "content", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_row_or_a_reason(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    found = rows(tmp_path_factory.mktemp("t"), GOOD + json.dumps(value).encode())
    assert len(found) == 2
    assert isinstance(found[1], Row) or found[1].reason
