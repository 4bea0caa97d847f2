"""Metier gives an open model a métier: it tunes a specialist, proves that it is better, and ships what was proved.

The verbs of the command line are functions here; each takes the path of a specialist (a YAML file or its folder).

    import metier
    metier.run("recipes/licence-clerk")
    metier.ask("runs/licence-clerk", "Released under the MIT license.")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metier.acts import Outcome
    from metier.config import Loaded
    from metier.runs import Run

__version__ = "0.1.0"
__all__ = ["ask", "build", "cluster", "compare", "doctor", "lr", "new", "prove", "run", "ship", "train"]


def build(spec: str | Path, *, runs: str | Path = "runs", settings: Sequence[str] = (), dry: bool = False) -> Outcome:
    """Documents and examples to a data set folder: deduplicated, split by group, sealed."""
    return _act("build", spec, runs, settings, dry)


def train(spec: str | Path, *, runs: str | Path = "runs", settings: Sequence[str] = (), dry: bool = False) -> Outcome:
    """The data set to an adapter, or a whole model; goes on where it was interrupted."""
    return _act("train", spec, runs, settings, dry)


def prove(spec: str | Path, *, runs: str | Path = "runs", settings: Sequence[str] = (), dry: bool = False) -> Outcome:
    """Every arm on the sealed test set, the verdict and its report."""
    return _act("prove", spec, runs, settings, dry)


def ship(spec: str | Path, *, runs: str | Path = "runs", settings: Sequence[str] = (), dry: bool = False) -> Outcome:
    """The release: adapter or model, model card and certificate."""
    return _act("ship", spec, runs, settings, dry)


def run(
    spec: str | Path, *, runs: str | Path = "runs", settings: Sequence[str] = (), dry: bool = False
) -> list[Outcome]:
    """Every act that is out of date, in order. Stops before `ship` where the verdict is not `ship`."""
    from metier import acts

    if not dry and (followed := _followed(spec, runs, settings)):
        return [followed]
    with _opened(spec, runs, settings, dry) as (loaded, opened):
        return acts.plan(loaded, opened) if dry else acts.perform_all(loaded, opened)


def ask(run: str | Path, text: str) -> dict[str, Any]:
    """The answers of base and specialist to one text, side by side."""
    from metier.talk import ask as front

    return front(Path(run), text)


def lr(spec: str | Path, *, runs: str | Path = "runs", settings: Sequence[str] = ()) -> dict[str, Any]:
    """A suggested learning rate, from trial steps whose adapter is thrown away."""
    from metier import acts

    with _opened(spec, runs, settings, dry=False) as (loaded, opened):
        return acts.find_rate(loaded, opened)


def compare(*runs: str | Path) -> dict[str, Any]:
    """Settings, data, curves, results and cost of runs, side by side; the others are held against the first."""
    from metier.comparison.run import compare as front

    return front([Path(run) for run in runs])


def new(recipe: str, folder: str | Path) -> Path:
    """Copies a recipe into a new folder, to be changed there."""
    from metier.recipes import copy

    return copy(recipe, Path(folder))


def cluster(
    spec: str | Path,
    *,
    on: str,
    machines: int = 2,
    cpus: int = 8,
    memory_gb: int = 32,
    accelerators: str = "",
    image: str = f"metier:{__version__}",
    claim: str = "metier",
    settings: Sequence[str] = (),
) -> str:
    """The YAML that trains a specialist on `kubernetes` or `skypilot`; nothing is started."""
    from metier import config
    from metier.errors import ConfigError, nearest
    from metier.manifests import Machines, kubernetes, skypilot

    loaded, each = config.load(spec, settings), Machines(machines, cpus, memory_gb, accelerators)
    if on == "kubernetes":
        return kubernetes(loaded, each, settings, image=image, claim=claim)
    if on == "skypilot":
        return skypilot(loaded, each, settings, version=__version__)
    raise ConfigError(f"no files are written for {on!r}", where="on", fix=nearest(on, ("kubernetes", "skypilot")))


def doctor() -> dict[str, Any]:
    """What this machine can do."""
    from metier.health import examine

    return examine(__version__)


def _act(act: str, spec: str | Path, runs: str | Path, settings: Sequence[str], dry: bool) -> Outcome:
    from metier import acts

    if not dry and (followed := _followed(spec, runs, settings)):
        return followed
    with _opened(spec, runs, settings, dry) as (loaded, opened):
        return acts.perform(act, loaded, opened, dry=dry)


def _followed(spec: str | Path, runs: str | Path, settings: Sequence[str]) -> Outcome | None:
    """What a process does that another one of its world leads; None for the leader, and for a process alone."""
    from metier import acts, config
    from metier.training import world

    if not world.follows():
        return None
    loaded = config.load(spec, settings)
    return acts.follow(loaded, Path(runs) / loaded.spec.name)


@contextmanager
def _opened(spec: str | Path, runs: str | Path, settings: Sequence[str], dry: bool) -> Iterator[tuple[Loaded, Run]]:
    from metier import config
    from metier.errors import ConfigError
    from metier.runs import open_run
    from metier.training import world

    with world.leading():
        loaded = config.load(spec, settings)
        if (Path(runs) / loaded.spec.name).resolve() == loaded.folder:
            raise ConfigError(
                "the run would land in the specialist's own folder",
                where=str(loaded.folder),
                fix="give another --runs folder",
            )
        with open_run(Path(runs), loaded.spec.name, create=not dry) as run:
            yield loaded, run
