"""Files and packages as documents, and the reader: what is opened, what is refused, and how errors name their place."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from metier import config, fetch
from metier.data import ingest
from metier.data.ingest import Found, Rejected
from metier.errors import DataError
from metier.records import Document

READER = "from metier.data.ingest import Found, Rejected\n\ndef examples(documents):\n"


def loaded(folder: Path, **data: object) -> config.Loaded:
    tree = {"name": "t", "task": {"instruction": "Say."}, "data": {"reader": "reader.py", **data}}
    return config.Loaded(spec=config.validate(tree, "t"), folder=folder)


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def documents(folder: Path, *patterns: str) -> list[tuple[str, str]]:
    found = ingest.documents(loaded(folder, documents=patterns))
    return [(d.where, d.text if isinstance(d, Document) else d.reason) for d in found]


def test_patterns_follow_folders_and_leave_hidden_names_alone(tmp_path: Path) -> None:
    put(tmp_path, {n: n for n in ("b.txt", "a.txt", "n/c.txt", "n/m/d.txt", ".h.txt", ".g/e.txt", "n/f.md")})
    assert [w for w, _ in documents(tmp_path, "*.txt")] == ["a.txt", "b.txt"]
    assert [w for w, _ in documents(tmp_path, "**/*.txt")] == ["a.txt", "b.txt", "n/c.txt", "n/m/d.txt"]
    assert [w for w, _ in documents(tmp_path, "n/*")] == ["n/c.txt", "n/f.md"]
    assert [w for w, _ in documents(tmp_path, "n/**")] == ["n/c.txt", "n/f.md", "n/m/d.txt"]
    assert [w for w, _ in documents(tmp_path, ".g/*.txt", "a.txt", "[ab].txt")] == [".g/e.txt", "a.txt", "b.txt"]
    assert [w for w, _ in documents(tmp_path, f"{tmp_path}/n/*.md")] == ["n/f.md"]
    assert [w for w, _ in documents(tmp_path, "n/*.txt", "b.txt", "a.txt", "b.txt")] == ["a.txt", "b.txt", "n/c.txt"]


def test_names_outside_the_folder_are_absolute(tmp_path: Path) -> None:
    put(tmp_path, {"here/x": "", "there/a.txt": "a"})
    assert documents(tmp_path / "here", f"{tmp_path}/there/*.txt") == [(f"{tmp_path}/there/a.txt", "a")]


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"\xef\xbb\xbfa\r\nb\n", "a\nb\n"),
        (b"a\xff", "not_utf8: byte 1 is not UTF-8"),
        ("a".encode("utf-16"), "not_utf8: byte 0 is not UTF-8 (it looks like UTF-16)"),
        (b"a\0b", "nul_char: the text holds a NUL character"),
        (b" \n", "empty_document"),
        (b"", "empty_document"),
        (b"<|im_end|>\xe2\x80\xa8x", "<|im_end|>\u2028x"),
    ],
)
def test_one_bad_document_costs_one_document(tmp_path: Path, content: bytes, seen: str) -> None:
    put(tmp_path, {"a.txt": content, "b.txt": "good"})
    assert documents(tmp_path, "*.txt") == [("a.txt", seen), ("b.txt", "good")]


def test_a_document_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"a.txt": "12345"})
    monkeypatch.setattr(ingest, "MAX_DOCUMENT_BYTES", 4)
    assert documents(tmp_path, "a.txt") == [("a.txt", "too_large: over 4 bytes")]


def special(folder: Path, kind: str) -> str:
    """Makes a bad input and returns the pattern that meets it."""
    put(folder.parent / "outside", {"secret.txt": "s"})
    path = folder / "bad.txt"
    match kind:
        case "folder":
            path.mkdir()
            return "bad.txt"
        case "fifo":
            os.mkfifo(path)
        case "link out":
            path.symlink_to(folder.parent / "outside" / "secret.txt")
        case "folder link out":
            (folder / "linked").symlink_to(folder.parent / "outside")
            return "**/*.txt"
        case "through a link":
            (folder / "linked").symlink_to(folder.parent / "outside")
            return "linked/*.txt"
        case "broken link":
            path.symlink_to(folder / "nowhere")
        case "link loop":
            path.symlink_to(path)
        case "parent":
            return "../outside/*.txt"
    return "*.txt" if kind != "missing" else "nothing.txt"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("folder", "bad.txt is a folder"),
        ("fifo", "not a regular file"),
        ("link out", "a link that leads out of"),
        ("folder link out", "a link that leads out of"),
        ("through a link", "a link that leads out of"),
        ("broken link", "a broken link"),
        ("link loop", "cannot be read"),
        ("parent", "leads out of the specialist's folder"),
        ("missing", "nothing.txt is missing"),
        ("none", "no file matches '*.txt'"),
    ],
)
def test_what_is_no_plain_file_in_the_folder_is_refused(tmp_path: Path, kind: str, what: str) -> None:
    folder = tmp_path / "spec"
    folder.mkdir()
    with pytest.raises(DataError) as caught:
        documents(folder, special(folder, kind))
    assert what in caught.value.what
    assert caught.value.fix
    assert caught.value.where


def test_a_link_within_the_folder_is_followed_for_files_and_not_for_folders(tmp_path: Path) -> None:
    put(tmp_path, {"n/a.txt": "a"})
    (tmp_path / "b.txt").symlink_to(tmp_path / "n" / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert documents(tmp_path, "**/*.txt") == [("b.txt", "a"), ("n/a.txt", "a")]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a")
    with pytest.raises(DataError, match="not UTF-8"):
        documents(tmp_path, "*.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"a.txt": "a"})
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        documents(tmp_path, "*.txt")


def package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, members: list[tuple[str | zipfile.ZipInfo, bytes]], *patterns: str
) -> list[tuple[str, str]]:
    wheel = folder / "p.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    monkeypatch.setattr(fetch, "wheel", lambda wanted: wheel if str(wanted) == "p 1.0" else None)
    given = {"name": "p", "version": "1.0", "sha256": "0" * 64, "documents": patterns}
    found = ingest.documents(loaded(folder, package=given))
    return [(d.where, d.text if isinstance(d, Document) else d.reason) for d in found]


def test_package_members_come_sorted_and_by_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [("p/b.txt", b"b"), ("p/q/a.txt", b"\xff"), ("p/__init__.py", b"raise SystemExit"), ("x.txt", b"x")]
    assert package(tmp_path, monkeypatch, members, "p/**/*.txt") == [
        ("p:p/b.txt", "b"),
        ("p:p/q/a.txt", "not_utf8: byte 0 is not UTF-8"),
    ]


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([("p/../../a.txt", b"a")], "no file of the package matches"),
        ([("p//a.txt", b"a")], "leads out of the archive"),
        ([("p/a\\b.txt", b"a")], "leads out of the archive"),
        ([(link("p/a.txt"), b"/etc/passwd")], "is not a regular file"),
        ([("p/a.txt", b"a"), ("p/a.txt", b"b")], "stands twice"),
        ([("p/a.txt", b"a" * (4 << 20))], "expands too far"),
        ([("p/a.md", b"a")], "no file of the package matches"),
    ],
)
def test_a_dishonest_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tuple[str | zipfile.ZipInfo, bytes]], what: str
) -> None:
    with pytest.raises(DataError, match=what):
        package(tmp_path, monkeypatch, members, "p/**/*.txt")


def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, [("p/a.txt", os.urandom(64).hex().encode())], "p/*.txt")
    wheel = tmp_path / "p.whl"
    data = bytearray(wheel.read_bytes())
    data[40] ^= 255
    wheel.write_bytes(data)
    given = {"name": "p", "version": "1.0", "sha256": "0" * 64, "documents": ["p/*.txt"]}
    with pytest.raises(DataError, match="not a whole wheel"):
        list(ingest.documents(loaded(tmp_path, package=given)))


def read(folder: Path, body: str) -> list[Found | Rejected]:
    put(folder, {"reader.py": READER + body})
    return ingest.readings(folder / "reader.py", [Document("1", "a.txt", "A"), Document("2", "b.txt", "B")])


def test_a_reader_is_read_in_order_and_prints_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    for d in documents:\n        print(d.text)\n        yield Found(d.where, d.text, {'x': 1})\n"
    assert read(tmp_path, body) == [Found("a.txt", "A", {"x": 1}), Found("b.txt", "B", {"x": 1})]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "A\nB\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reader.py"]


def test_a_changed_reader_is_read_anew(tmp_path: Path) -> None:
    first = read(tmp_path, "    return [Found('a.txt', 'q', '1')]\n")
    assert first != read(tmp_path, "    return [Found('a.txt', 'q', '2')]\n")


@pytest.mark.parametrize(
    ("body", "what", "line"),
    [
        ("    for d in documents:\n        1 / (d.text != 'B')\n        yield Rejected(d.where, 'x')\n", "b.txt", 5),
        ("    import sys\n    sys.exit(3)\n", "SystemExit: 3", 5),
        ("    yield from []\n    return ]\n", "SyntaxError", 5),
        ("    pass\n", "returned NoneType", 0),
        ("    yield 'a text'\n", "yielded 'a text'", 0),
        ("    yield Found('a.txt', None, 'x')\n", "it must yield Found", 0),
        ("    yield Found('a\\ud800', 'q', 'x')\n", "UnicodeEncodeError", 0),
        ("    pass\ndel examples\n", "no function examples", 0),
        ("    pass\nimport nothing_of_this_name\n", "ModuleNotFoundError", 5),
    ],
)
def test_a_failing_reader_is_named_with_its_line(tmp_path: Path, body: str, what: str, line: int) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, body)
    assert what in caught.value.what
    assert caught.value.where == str(tmp_path / "reader.py") + (f":{line}" if line else "")


@pytest.mark.parametrize(
    ("where", "document"),
    [
        ("a.txt", "a.txt"),
        ("a.txt:12", "a.txt"),
        ("a.txt#3", "a.txt"),
        ("p:q/b", "p:q/b"),
        ("p:q/b:1", "p:q/b"),
        ("z:1", "z:1"),
    ],
)
def test_the_document_of_a_reading(where: str, document: str) -> None:
    assert ingest.document_of(where, {"a.txt", "p:q/b"}) == document


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "is empty"), (b"\xef\xbb\xbf \n", "is blank"), (b"\xff", "not UTF-8")]
)
def test_a_file_beside_the_specialist_must_say_something(tmp_path: Path, content: bytes, what: str) -> None:
    put(tmp_path, {"prompt.md": content})
    with pytest.raises(DataError, match=what):
        ingest.text(ingest.beside(loaded(tmp_path, documents=["x"]), "prompt.md", "prompt"), "prompt")
