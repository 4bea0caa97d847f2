"""What `metrics.jsonl` says, on one count of steps and one clock.

Whoever draws, compares or passes on a training's metrics reads them here, so that all show the same points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metier import records

Axis = Literal["step", "seconds"]
Curve = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the file: the step counted over all stages, the seconds of all steps so far, and its figures."""

    step: int
    seconds: float
    figures: dict[str, float]


class Walk:
    """Takes the lines of a file in their order, each as soon as it is there."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = self._last = 0
        self._stage: object = None

    def point(self, line: Mapping[str, Any]) -> Point:
        """The line as a point; a stage whose steps begin again goes on where the last one ended.

        `figures` are the finite numbers of the line, and `tokens_per_second` where it tells of a step.
        """
        step = self._start + int(line["step"])
        if step < self._last or (step == self._last and line.get("stage") != self._stage):
            step, self._start = step - self._start + self._last, self._last
        self._last, self._stage = step, line.get("stage")
        figures = {name: float(value) for name, value in line.items() if name != "step" and finite(value)}
        took = figures.get("seconds", 0.0)
        self.seconds += took
        if took > 0 and "tokens" in figures:
            figures["tokens_per_second"] = figures["tokens"] / took
        return Point(step, self.seconds, figures)


def points(rows: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    """The lines of a whole file as points."""
    return map(Walk().point, rows)


def curve(walked: Sequence[Point], name: str, axis: Axis = "step") -> Curve:
    """(step or seconds, value) of every point that has the figure `name`."""
    return [(float(getattr(p, axis)), p.figures[name]) for p in walked if name in p.figures]


def read(path: Path) -> list[Point]:
    """The points of a `metrics.jsonl`."""
    return list(points(lines(path)[0]))


def lines(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The lines from byte `start` on, and the byte after them; none of a file that is not there yet.

    Whole lines only: the last one may be in the middle of being written.
    """
    if not path.is_file():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        whole = file.read().rpartition(b"\n")[0]
    found = [records.loads(line, str(path)) for line in whole.split(b"\n") if line]
    return found, start + len(whole) + bool(whole)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the values around each one, about a tenth of them all, evenly to both sides so that it never lags."""
    reach, last = len(values) // 20, len(values) - 1
    out = []
    for place in range(len(values)):
        near = min(reach, place, last - place)
        window = values[place - near : place + near + 1]
        out.append(math.fsum(window) / len(window))
    return out


def finite(value: object) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
