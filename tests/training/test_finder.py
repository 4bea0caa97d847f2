"""The range test: rates, smoothing and suggestion by hand; the same twice; training rows alone, and nothing kept."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

import metier
from metier import plots, records, runs
from metier.errors import NumericError, RunError
from metier.training import finder, loop


def result(step: int, loss: float, rate: float) -> loop.StepResult:
    return loop.StepResult(step, loss, rate, 1.0, 10, 5, 0.1)


def test_the_rate_grows_by_the_same_factor_from_the_lowest_to_the_highest() -> None:
    sweep = finder.Sweep(60, 4, 1.0, 0, 0, 1.0, 0, 100)
    rates = [sweep.rate(step) for step in range(60)]
    assert (rates[0], rates[-1]) == (pytest.approx(1e-6), pytest.approx(1.0))
    assert {round(b / a, 9) for a, b in itertools.pairwise(rates)} == {round(10 ** (6 / 59), 9)}


def test_smoothing_by_hand() -> None:
    points = finder.swept([result(1, 4.0, 0.1), result(2, 1.0, 0.2), result(3, 3.0, 0.3)])
    # means 0.8, 0.84, 1.272 over the weights 0.2, 0.36, 0.488
    assert [p["smoothed"] for p in points] == pytest.approx([4.0, 0.84 / 0.36, 1.272 / 0.488])


def test_the_sweep_ends_where_the_loss_blows_up_or_is_no_number() -> None:
    assert len(finder.swept(result(n, loss, n) for n, loss in enumerate([1.0, 1.0, 9.0, 9.0], 1))) == 3

    def breaks() -> Iterator[loop.StepResult]:
        yield result(1, 1.0, 0.1)
        raise NumericError("the loss (nan) is not finite", fix="")

    assert len(finder.swept(breaks())) == 1


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_least_loss() -> None:
    points = [{"lr": rate, "loss": 0.0, "smoothed": abs(math.log10(rate / 0.0234))} for rate in (1e-3, 0.0234, 0.5)]
    assert finder.suggestion(points) == 0.0023


def test_the_same_twice_without_the_test_rows_and_the_run_is_as_it_was(
    specialist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    with pytest.raises(RunError, match="build has not been done"):
        metier.lr(specialist, runs=folder)
    metier.build(specialist, runs=folder)
    run = folder / "colours"
    read: list[str] = []
    monkeypatch.setattr(records, "examples", lambda path, of=records.examples: read.append(path.name) or of(path))
    before = runs.sha256(run / "data" / "dataset.json")
    first = metier.lr(specialist, runs=folder)
    written = {name: (run / "lr" / name).read_bytes() for name in ("lr.json", "lr.svg")}
    assert metier.lr(specialist, runs=folder) == first == json.loads(written["lr.json"])
    assert written == {name: (run / "lr" / name).read_bytes() for name in written}
    assert 1e-7 < first["suggestion"] < 1 and first["points"][0]["lr"] == pytest.approx(1e-6)
    assert runs.sha256(run / "data" / "dataset.json") == before and not (run / "train").exists()
    assert not list(run.glob(".work-train")) and "test.jsonl" not in read


def test_the_plot_names_the_rates_in_plain_figures_and_the_suggestion() -> None:
    points = [{"lr": 10.0**power, "loss": 2.0 - power / 10, "smoothed": 2.0} for power in range(-6, 0)]
    drawn = plots.rate_plot(points, 0.00092)
    assert ">0.001<" in drawn and ">1e-05<" in drawn and "suggested 0.00092" in drawn and "$" not in drawn
