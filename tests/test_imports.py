"""Imports point down the house, imports inside functions and for types included; what is heavy is imported late."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import metier

ROOT = Path(metier.__file__).parent

# From the roof down, as docs/design.md draws it. A name is a module or folder of the package; "metier" is its front
# door, `__init__`. Each may import what stands in a lower line; files of one folder may import each other.
HOUSE = (
    ("__main__",),
    ("cli",),
    ("metier",),
    ("comparison",),
    ("talk", "health", "summary", "manifests"),
    ("acts", "recipes"),
    ("release",),
    ("training",),
    ("evaluate",),
    ("retrieve",),
    ("models", "objectives"),
    ("data", "text", "cost", "plots", "machine"),
    ("fetch",),
    ("runs",),
    ("progress", "stats", "config", "curves"),
    ("records",),
    ("errors",),
)
FLOOR = {name: floor for floor, names in enumerate(HOUSE) for name in names}
# Imports that point up although they should not. An entry that is no longer needed fails a test.
TOLERATED: dict[tuple[str, str], str] = {}

MODEL_LIBRARIES = ("torch", "transformers")
LATE = (*MODEL_LIBRARIES, "matplotlib", "scipy", "pydantic")


@dataclass(frozen=True)
class Import:
    """An import statement: `unit` and `module` hold it, `target` is what it names, `late` where no import of the
    module runs it."""

    unit: str
    module: str
    line: int
    target: str
    late: bool


def files() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if not any(part.startswith(("_recipes", ".")) for part in p.parts)]


def imports(path: Path) -> Iterator[Import]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    unit = "metier" if parts == ("__init__",) else parts[0]
    module = ".".join(("metier", *parts)).removesuffix(".__init__")
    tree = ast.parse(path.read_text("utf-8"))
    at_once = {id(node) for node in _at_once(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(unit, module, node.lineno, _module(target), id(node) not in at_once)


def _at_once(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def _module(target: str) -> str:
    """`metier.runs.Run` as `metier.runs`; names outside the package as they are."""
    parts = target.split(".")
    if parts[0] != "metier":
        return target
    while len(parts) > 1:
        at = ROOT.joinpath(*parts[1:])
        if at.with_suffix(".py").is_file() or (at / "__init__.py").is_file():
            break
        parts.pop()
    return ".".join(parts)


def _unit(module: str) -> str:
    return module.split(".")[1] if "." in module else "metier"


ALL = [found for path in files() for found in imports(path)]
OWN = [i for i in ALL if i.target.split(".")[0] == "metier"]


def test_every_module_has_its_floor() -> None:
    units = {"metier" if p.stem == "__init__" and p.parent == ROOT else p.relative_to(ROOT).parts[0] for p in files()}
    assert {u.removesuffix(".py") for u in units} == set(FLOOR)


def test_imports_point_down() -> None:
    up = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in OWN
        if i.unit != _unit(i.target)
        and FLOOR[_unit(i.target)] <= FLOOR[i.unit]
        and (i.unit, _unit(i.target)) not in TOLERATED
    ]
    assert up == []


def test_what_is_tolerated_is_still_there() -> None:
    assert set(TOLERATED) <= {(i.unit, _unit(i.target)) for i in OWN}


def test_files_of_a_folder_import_each_other_in_one_direction() -> None:
    edges: dict[str, set[str]] = {}
    for i in OWN:
        if i.unit == _unit(i.target) and i.module != i.target:
            edges.setdefault(i.module, set()).add(i.target)
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " > ".join((*above, module))
        if module not in done:
            for below in sorted(edges.get(module, ())):
                walk(below, (*above, module))
            done.add(module)

    for module in sorted(edges):
        walk(module, ())


def test_nothing_is_imported_by_a_text() -> None:
    """A name put together at run time would pass by the tests of this file."""
    hidden = [
        f"{path.name}:{node.lineno}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("__import__", "importlib.import_module", "import_module")
    ]
    assert hidden == []


def test_the_lower_floors_know_no_model_library() -> None:
    """`machine` alone may, inside functions that measure or choose devices."""
    lowest = FLOOR["data"]
    known = [i for i in ALL if FLOOR[i.unit] >= lowest and i.target.split(".")[0] in MODEL_LIBRARIES]
    assert [f"{i.module}:{i.line}" for i in known if i.unit != "machine" or not i.late] == []


@pytest.mark.parametrize("unit", ["__main__", "cli", "metier", "talk", "health", "summary", "acts", "recipes"])
def test_the_upper_floors_import_model_libraries_late(unit: str) -> None:
    heavy = [i for i in ALL if i.unit == unit and i.target.split(".")[0] in MODEL_LIBRARIES and not i.late]
    assert [f"{i.module}:{i.line}" for i in heavy] == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import metier.cli", LATE),
        ("import metier.data.build, metier.text.chat, metier.text.batches", LATE[:-1]),
        ("import metier.acts, metier.talk, metier.health, metier.summary, metier.models.load", LATE[:-1]),
        ("import metier.release.gate, metier.release.report", LATE[:-1]),
    ],
)
def test_importing_brings_nothing_heavy(code: str, absent: tuple[str, ...]) -> None:
    assert python(f"{code}\nimport sys\nprint([m for m in {absent!r} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_brings_nothing_heavy(words: list[str]) -> None:
    code = f"""
import contextlib, io, sys
from metier.cli import main
sys.argv = ["metier", *{words!r}]
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main()
assert "Usage:" in shown.getvalue()
print([m for m in {LATE!r} if m in sys.modules])
"""
    assert python(code) == "[]"


def python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
