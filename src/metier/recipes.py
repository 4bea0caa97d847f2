"""The recipes that come with Metier, and copying one as a start."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from metier import runs
from metier.config import NAME
from metier.errors import ConfigError, nearest

_PLACES = (Path(__file__).parent / "_recipes", Path(__file__).parents[2] / "recipes")


def folder() -> Path:
    """Where the recipes lie: inside the installed package, or in the repository."""
    return next((p for p in _PLACES if p.is_dir()), _PLACES[0])


def names() -> list[str]:
    return sorted(p.parent.name for p in folder().glob("*/specialist.yaml"))


def copy(recipe: str, target: Path) -> Path:
    """Copies a recipe to `target`, which must not exist or be empty, and gives it the folder's name."""
    if recipe not in names():
        raise ConfigError(f"there is no recipe {recipe!r}", where=str(folder()), fix=nearest(recipe, names()))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already", where=str(target), fix="give a new folder")
    with runs.disk(target):
        shutil.copytree(folder() / recipe, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        _rename(target)
    return target


def _rename(target: Path) -> None:
    """Names the copy after its folder, where that is a name a run may have."""
    name = target.resolve().name
    if re.fullmatch(NAME, name):
        file = target / "specialist.yaml"
        runs.write(file, re.sub(r"(?m)^name: .*$", f"name: {name}", file.read_text("utf-8"), count=1))
