"""Downloads: real pip against a folder of wheels made on the spot, never a network."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metier import fetch
from metier.errors import ConfigError, DataError, MetierError, PolicyError, ResourceError

CONTENT = b"four score and seven\n" * 40


def make_wheel(folder: Path, name: str = "tiny_corpus", version: str = "1.2", content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, the same bytes every time."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/data/text.txt": content,
        f"{name}/__init__.py": b"raise SystemExit('a package is never imported')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{n},,\n" for n in [*files, f"{info}/RECORD"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(zipfile.ZipInfo(member), data, zipfile.ZIP_DEFLATED)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip finds wheels in, with one wheel; the cache lies beside it."""
    folder = tmp_path / "index"
    make_wheel(folder)
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("METIER_OFFLINE", raising=False)
    return folder


@pytest.fixture
def package(index: Path) -> fetch.Package:
    (path,) = index.glob("*.whl")
    return fetch.Package("tiny-corpus", "1.2", fetch.sha256(path))


def no_pip(*_: object) -> tuple[int, str]:
    raise AssertionError("pip was started")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "wheels").iterdir() if path.name.startswith(".tmp")]


def test_fetched_once_and_then_served_from_the_cache(
    package: fetch.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch.wheel(package)
    assert path.parent == tmp_path / "cache" / "wheels" / "tiny-corpus-1.2"
    assert fetch.sha256(path) == package.sha256
    assert leftovers(tmp_path / "cache") == []
    monkeypatch.setattr(fetch, "_run", no_pip)
    assert fetch.wheel(package) == fetch.wheel(package, offline=True) == path


def test_a_damaged_entry_is_named_and_fetched_again(package: fetch.Package, caplog: pytest.LogCaptureFixture) -> None:
    path = fetch.wheel(package)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    actual = fetch.sha256(path)
    with pytest.raises(ResourceError) as caught:
        fetch.wheel(package, offline=True)
    for part in (path.name, package.sha256, actual):
        assert part in caught.value.what
    with caplog.at_level(logging.WARNING):
        assert fetch.sha256(fetch.wheel(package)) == package.sha256
    assert actual in caplog.text and "fetching it again" in caplog.text


def test_bytes_that_are_not_the_pinned_ones_are_refused_and_deleted(
    package: fetch.Package, index: Path, tmp_path: Path
) -> None:
    make_wheel(index, content=b"something else")
    with pytest.raises(PolicyError) as caught:
        fetch.wheel(package)
    (other,) = index.glob("*.whl")
    assert package.sha256 in caught.value.what and fetch.sha256(other) in caught.value.what
    assert list((tmp_path / "cache").rglob("*.whl")) == []


@pytest.mark.parametrize("key", ["HF_HUB_OFFLINE", "METIER_OFFLINE"])
def test_offline_means_no_pip_and_says_how_to_get_it(
    package: fetch.Package, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(key, "1")
    monkeypatch.setattr(fetch, "_run", no_pip)
    with pytest.raises(ResourceError) as caught:
        fetch.wheel(package)
    assert "pip download --no-deps" in caught.value.fix and "tiny-corpus==1.2" in caught.value.fix


def test_a_wheel_put_there_by_hand_is_used(package: fetch.Package, index: Path, tmp_path: Path) -> None:
    path = make_wheel(tmp_path / "cache" / "wheels" / "tiny-corpus-1.2")
    assert fetch.wheel(package, offline=True) == path


def test_pip_failing_is_told_in_its_own_words(package: fetch.Package, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        fetch.wheel(fetch.Package("tiny-corpus", "9.9", package.sha256))
    assert "tiny-corpus==9.9" in caught.value.what and "\n" not in caught.value.what
    assert leftovers(tmp_path / "cache") == []


def test_pip_absent_names_the_fix(package: fetch.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(ResourceError, match="pip is not installed") as caught:
        fetch.wheel(package)
    assert "ensurepip" in caught.value.fix


def test_a_python_that_does_not_start_is_a_resource_error(
    package: fetch.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ResourceError, match="does not start"):
        fetch.wheel(package)


def test_a_full_disk_names_needed_and_free_bytes(package: fetch.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Downloading tiny_corpus-1.2-py3-none-any.whl (92.9 MB)\nERROR: [Errno 28] No space left on device\n"
    monkeypatch.setattr(fetch, "_run", lambda argv, work: (1, said))
    with pytest.raises(ResourceError, match=r"185,800,000 bytes needed, .* bytes free"):
        fetch.wheel(package)


def test_a_known_size_is_checked_before_pip_starts(package: fetch.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_run", no_pip)
    with pytest.raises(ResourceError, match="bytes needed"):
        fetch.wheel(fetch.Package(package.name, package.version, package.sha256, size=1 << 60))


def test_pip_gets_a_fixed_command_line_and_a_bare_environment(
    package: fetch.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def run(argv: list[str], **settings: object) -> subprocess.CompletedProcess[bytes]:
        seen.update(settings, argv=argv)
        return subprocess.CompletedProcess(argv, 1, b"ERROR: no")

    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ResourceError):
        fetch.wheel(package)
    argv, environment = seen["argv"], seen["env"]
    assert isinstance(argv, list) and isinstance(environment, dict)
    assert argv[:5] == [sys.executable, "-P", "-m", "pip", "download"] and argv[-1] == "tiny-corpus==1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(argv) and "shell" not in seen
    assert not {"PYTHONPATH", "SECRET_TOKEN"} & environment.keys() and "PIP_FIND_LINKS" in environment


def test_passwords_and_colours_do_not_reach_the_message() -> None:
    line = fetch._condensed("noise\n\x1b[31mERROR: cannot reach https://me:hunter2@index.example/simple\x1b[0m\n")
    assert line == "ERROR: cannot reach https://***@index.example/simple"


def test_fetches_at_the_same_time_start_pip_once(package: fetch.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    run = fetch._run

    def counted(argv: list[str], work: Path) -> tuple[int, str]:
        started.append(argv)
        return run(argv, work)

    monkeypatch.setattr(fetch, "_run", counted)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: fetch.wheel(package), range(4)))
    assert len(paths) == 1 and len(started) == 1


def test_debris_of_a_killed_fetch_is_cleared(package: fetch.Package, tmp_path: Path) -> None:
    debris = tmp_path / "cache" / "wheels" / ".tmp-tiny-corpus-1.2-dead" / "out"
    debris.mkdir(parents=True)
    (debris / "half.whl").write_bytes(b"half")
    fetch.wheel(package)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("name", "version", "digest"),
    [
        ("-r/etc/passwd", "1", "0" * 64),
        ("../up", "1", "0" * 64),
        ("Upper", "1", "0" * 64),
        ("fine", "1;x", "0" * 64),
        ("fine", "../1", "0" * 64),
        ("fine", "1", "0" * 63),
    ],
)
def test_a_package_that_is_not_one_is_refused(name: str, version: str, digest: str) -> None:
    with pytest.raises(ConfigError):
        fetch.Package(name, version, digest)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "here"))
    assert fetch.cache_dir() == tmp_path / "here" and not fetch.cache_dir().exists()
    monkeypatch.setenv("METIER_CACHE", "")
    assert fetch.cache_dir().name == "metier"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(CONTENT * 5000)
    assert fetch.sha256(path) == hashlib.sha256(CONTENT * 5000).hexdigest()


# --- archives --------------------------------------------------------------------------------------------------------


def test_member_and_extract(tmp_path: Path) -> None:
    path = make_wheel(tmp_path)
    name = fetch.member(path, ".txt")
    assert name == "tiny_corpus/data/text.txt"
    target = fetch.extract(path, name, tmp_path / "deep" / "text.txt")
    assert target.read_bytes() == CONTENT
    assert [p.name for p in target.parent.iterdir()] == ["text.txt"]


def test_member_wants_exactly_one(tmp_path: Path) -> None:
    path = make_wheel(tmp_path)
    with pytest.raises(DataError, match="found 0: none"):
        fetch.member(path, ".gguf")
    with pytest.raises(DataError, match="METADATA"):
        fetch.member(path, "")


def archive_of(path: Path, name: str, data: bytes = b"x", mode: int = 0, twice: bool = False) -> Path:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(info, data, zipfile.ZIP_DEFLATED)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr(info, data)
    return path


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("../../escape.txt", {}),
        ("/etc/passwd", {}),
        ("c:evil.txt", {}),
        ("a\\b.txt", {}),
        ("link.txt", {"mode": stat.S_IFLNK | 0o777, "data": b"/etc/passwd"}),
        ("fifo.txt", {"mode": stat.S_IFIFO | 0o777}),
        ("bomb.txt", {"data": bytes(1 << 22)}),
        ("twin.txt", {"twice": True}),
        ("folder.txt/", {}),
    ],
)
def test_unsafe_members_are_refused(tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    path = archive_of(tmp_path / "x.whl", name, **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        fetch.extract(path, name, tmp_path / "out" / "file")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_size_that_is_not_the_declared_one_is_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.whl", "a.txt", os.urandom(3000))
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02") + 24
    for size in (10, 2999, 3001, 1 << 20):
        raw[at : at + 4] = size.to_bytes(4, "little")
        path.write_bytes(raw)
        with pytest.raises(DataError):
            fetch.extract(path, "a.txt", tmp_path / "out" / "file")
        assert list((tmp_path / "out").iterdir()) == []


def test_every_damage_to_an_archive_is_a_data_error_or_harmless(tmp_path: Path) -> None:
    path = make_wheel(tmp_path)
    sound = path.read_bytes()
    target = tmp_path / "out" / "text.txt"
    for at in range(0, len(sound), 7):
        for bad in (sound[:at], sound[:at] + bytes([sound[at] ^ 0x41]) + sound[at + 1 :]):
            path.write_bytes(bad)
            try:
                fetch.extract(path, "tiny_corpus/data/text.txt", target)
            except MetierError:
                continue
            assert target.read_bytes() == CONTENT


def test_extract_on_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_wheel(tmp_path)
    target = tmp_path / "out" / "text.txt"
    target.parent.mkdir()
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=f"{len(CONTENT):,} bytes needed, .* bytes free"):
        fetch.extract(path, "tiny_corpus/data/text.txt", target)
    assert target.read_bytes() == b"old" and len(list(target.parent.iterdir())) == 1
