"""The points of a metrics file: one count of steps, one clock, whole lines only."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier import curves, records


def line(step: int, stage: str = "sft", **figures: float) -> dict[str, object]:
    return {"step": step, "stage": stage, **figures}


def test_a_point_holds_the_figures_of_its_line_and_the_seconds_so_far() -> None:
    lines = [
        line(1, loss=2.0, tokens=30, seconds=0.5),
        line(1, valid_loss=1.5),
        line(2, loss=1.0, tokens=30, seconds=1.5),
    ]
    first, validation, second = curves.points(lines)
    assert first.figures == {"loss": 2.0, "tokens": 30, "seconds": 0.5, "tokens_per_second": 60}
    assert (validation.step, validation.seconds, validation.figures) == (1, 0.5, {"valid_loss": 1.5})
    assert (second.step, second.seconds, second.figures["tokens_per_second"]) == (2, 2.0, 20)


@pytest.mark.parametrize("second", ["sft", "cpt"])
def test_a_second_stage_goes_on_where_the_first_ended(second: str) -> None:
    lines = [line(s, stage, loss=1.0) for stage in ("cpt", second) for s in (1, 2, 3)]
    assert [p.step for p in curves.points(lines)] == [1, 2, 3, 4, 5, 6]


def test_a_stage_of_one_step_and_a_stage_that_counts_on() -> None:
    first = [line(1, "cpt", loss=1.0), line(1, "cpt", valid_loss=1.0)]
    lines = [*first, line(1, "sft", loss=1.0), line(2, "sft", loss=1.0)]
    assert [p.step for p in curves.points(lines)] == [1, 1, 2, 3]
    lines = [line(1, "cpt", loss=1.0), line(2, "cpt", loss=1.0), line(3, "sft", loss=1.0)]
    assert [p.step for p in curves.points(lines)] == [1, 2, 3]


def test_a_curve_is_over_steps_or_seconds() -> None:
    lines = [line(1, loss=2.0, seconds=0.5), line(1, valid_loss=3.0), line(2, loss=1.0, seconds=0.5)]
    walked = list(curves.points(lines))
    assert curves.curve(walked, "loss") == [(1, 2.0), (2, 1.0)]
    assert curves.curve(walked, "loss", "seconds") == [(0.5, 2.0), (1.0, 1.0)]
    assert curves.curve(walked, "valid_loss", "seconds") == [(0.5, 3.0)]


def test_figures_that_are_not_finite_are_not_drawn() -> None:
    [point] = curves.points([line(1, loss=float("nan"), lr=float("inf"), tokens=3)])
    assert point.figures == {"tokens": 3}


def test_a_line_in_the_middle_of_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(records.lines([line(1, loss=2.0), line(2, loss=1.0)]) + b'{"step": 3, "lo')
    assert [p.step for p in curves.read(path)] == [1, 2]
    path.write_bytes(b'{"st')
    assert curves.read(path) == []


def test_smoothing_keeps_ends_and_lines() -> None:
    values = [float(i) for i in range(100)]
    assert curves.smooth(values) == pytest.approx(values)
