"""What `metrics.jsonl` says, with one clock over all its steps.

Whoever compares or passes on a training's metrics reads them here, so that all show the same points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier import records


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the file: its step and stage, the seconds of all steps so far, and its figures."""

    step: int
    stage: str
    seconds: float
    figures: dict[str, float]


class Walk:
    """Takes the lines of a file in their order, each as soon as it is there."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def point(self, line: Mapping[str, Any]) -> Point:
        """The line as a point; its figures are its finite numbers, and `tokens_per_second` where it tells of a step."""
        figures = {name: float(value) for name, value in line.items() if name != "step" and finite(value)}
        took = figures.get("seconds", 0.0)
        self._seconds += took
        if took > 0 and "tokens" in figures:
            figures["tokens_per_second"] = figures["tokens"] / took
        return Point(int(line["step"]), str(line["stage"]), self._seconds, figures)


def read(path: Path) -> list[Point]:
    """The points of a `metrics.jsonl`; none of a file that is not there yet."""
    return [*map(Walk().point, lines(path)[0])]


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


def finite(value: object) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
