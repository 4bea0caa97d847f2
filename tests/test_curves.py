"""The points of a metrics file: one clock, whole lines only."""

from __future__ import annotations

from pathlib import Path

from metier import curves, records


def line(step: int, stage: str = "sft", **figures: float) -> dict[str, object]:
    return {"step": step, "stage": stage, **figures}


def test_a_point_holds_the_figures_of_its_line_and_the_seconds_so_far() -> None:
    lines = [
        line(1, loss=2.0, tokens=30, seconds=0.5),
        line(1, valid_loss=1.5),
        line(2, loss=1.0, tokens=30, seconds=1.5),
    ]
    first, validation, second = map(curves.Walk().point, lines)
    assert first.figures == {"loss": 2.0, "tokens": 30, "seconds": 0.5, "tokens_per_second": 60}
    assert (validation.step, validation.seconds, validation.figures) == (1, 0.5, {"valid_loss": 1.5})
    assert (second.step, second.seconds, second.figures["tokens_per_second"]) == (2, 2.0, 20)


def test_figures_that_are_not_finite_are_not_drawn() -> None:
    point = curves.Walk().point(line(1, loss=float("nan"), lr=float("inf"), tokens=3))
    assert point.figures == {"tokens": 3}


def test_a_line_in_the_middle_of_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(records.lines([line(1, loss=2.0), line(2, loss=1.0)]) + b'{"step": 3, "lo')
    assert [p.step for p in curves.read(path)] == [1, 2]
    path.write_bytes(b'{"st')
    assert curves.read(path) == []
