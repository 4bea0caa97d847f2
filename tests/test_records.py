"""JSON Lines, strictly: what is half understood is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier import records
from metier.errors import DataError
from metier.records import Example, Message

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_value_survives(value: object) -> None:
    assert records.loads(records.dumps(value).encode(), "x") == value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": "\\u0000"}', "NUL"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b"[" * 100_000, "nested"),
        (b'{"a": ' * 50 + b"1" + b"}" * 50, "nested"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8|JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'"' + b"x" * (1 << 20) + b'"', "over the limit"),
    ],
)
def test_what_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        records.loads(data, "f.jsonl:3")
    assert caught.value.where == "f.jsonl:3" and caught.value.fix


def test_brackets_inside_strings_are_no_nesting() -> None:
    assert records.loads(b'{"a": "' + b"[{" * 100 + b'"}', "x") == {"a": "[{" * 100}


def test_lines_end_at_the_byte_lf_only(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes('\ufeff{"a": "x\u2028y\u0085z"}\r\n\n{"a": "2"}'.encode())
    assert [(w.rsplit(":", 1)[1], o["a"]) for w, o in records.objects(file)] == [("1", "x\u2028y\u0085z"), ("3", "2")]


def test_examples_survive_the_disk(tmp_path: Path) -> None:
    made = Example(
        "i", (Message("user", "ü\n木"), Message("assistant", "a")), {"row": 1}, "g", {"k": [1, None]}, ("json",)
    )
    bare = Example("j", (Message("user", "q"), Message("assistant", "a")), {"document": "d"}, "h")
    (tmp_path / "f.jsonl").write_bytes(records.lines([made, bare]))
    assert records.examples(tmp_path / "f.jsonl") == [made, bare]
    assert records.case(made).messages == made.messages[:1]


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory") as caught:
        list(records.objects(tmp_path))
    assert caught.value.where == str(tmp_path) and caught.value.fix
