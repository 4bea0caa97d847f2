"""Columns of another model: every row gets its own, once, whatever was interrupted or damaged in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metier.objectives import logps
from metier.records import Batch
from metier.text import batches
from metier.text.batches import Row


def rows(count: int) -> list[Row]:
    random = np.random.default_rng(0)
    made = []
    for n in range(count):
        ids = np.concatenate([[1, 2, 3], random.integers(4, 300, random.integers(2, 9))])
        made.append(Row(f"r{n}", ids, np.arange(ids.size) >= ids.size - 1 - n % 3))
    return made


class Counting:
    """A score that depends on the tokens alone, and knows how many rows it was asked about."""

    def __init__(self, fail_after: int = 1 << 30) -> None:
        self.rows, self.fail_after = 0, fail_after

    def reference(self, batch: Batch) -> np.ndarray:
        if self.rows >= self.fail_after:
            raise KeyboardInterrupt
        self.rows += len(batch.ids)
        return -batch.target_K / 100

    def teacher(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        logprob_K = self.reference(batch)
        return np.stack([batch.target_K, batch.target_K + 1], 1), np.stack([logprob_K, logprob_K, logprob_K], 1)


def test_every_supervised_token_gets_its_own_columns(tmp_path: Path) -> None:
    data = rows(10)
    taught = logps.with_teacher(data, Counting().teacher, tmp_path, "t")
    both = logps.with_reference(taught, Counting().reference, tmp_path, "b")
    for before, after in zip(data, both, strict=True):
        own = before.ids[before.supervised]
        assert after.id == before.id and after.columns[logps.TEACHER_IDS].tolist() == [[i, i + 1] for i in own]
        assert after.columns[logps.TEACHER_LOGPS].shape == (own.size, 3)
        np.testing.assert_allclose(after.columns[logps.REFERENCE_LOGPS], -own / 100, rtol=1e-6)
    batch = batches.layout(both[3:6], 2)
    np.testing.assert_allclose(batch.columns[logps.REFERENCE_LOGPS], -batch.target_K / 100, rtol=1e-6)
    assert (batch.columns[logps.TEACHER_IDS][:, 0] == batch.target_K).all()


def test_what_was_scored_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "PART", 4)
    data, first, second = rows(10), Counting(fail_after=8), Counting()
    with pytest.raises(KeyboardInterrupt):
        logps.with_reference(data, first.reference, tmp_path, "b")
    made = logps.with_reference(data, second.reference, tmp_path, "b")
    assert (first.rows, second.rows) == (8, 2)
    fresh = logps.with_reference(data, Counting().reference, tmp_path / "other", "b")
    for one, other in zip(made, fresh, strict=True):
        assert np.array_equal(one.columns[logps.REFERENCE_LOGPS], other.columns[logps.REFERENCE_LOGPS])


@pytest.mark.parametrize("change", ["key", "ids", "supervised", "kind"])
def test_other_tokens_or_another_model_are_scored_anew(tmp_path: Path, change: str) -> None:
    data, score = rows(3), Counting()
    logps.with_reference(data, score.reference, tmp_path, "b")
    if change == "ids":
        data[1] = replace(data[1], ids=data[1].ids + 1)
    if change == "supervised":
        data[1] = replace(data[1], supervised=np.arange(data[1].ids.size) >= 3)
    if change == "kind":
        logps.with_teacher(data, score.teacher, tmp_path, "b")
    else:
        logps.with_reference(data, score.reference, tmp_path, "c" if change == "key" else "b")
    assert score.rows == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "not a file of this kind"])
def test_a_damaged_part_is_said_and_scored_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    data, score = rows(3), Counting()
    expected = logps.with_reference(data, score.reference, tmp_path, "b")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "changed": whole[:-1] + b"\x01"}.get(damage, b"{}"))
    again = logps.with_reference(data, score.reference, tmp_path, "b")
    assert score.rows == 6 and path.read_bytes() == whole and "damaged" in capsys.readouterr().err
    for one, other in zip(again, expected, strict=True):
        assert np.array_equal(one.columns[logps.REFERENCE_LOGPS], other.columns[logps.REFERENCE_LOGPS])


def test_places_are_counted_in_each_answer() -> None:
    marked = np.array([False, True, True, True, False, False, True, False, True, True])
    (row,) = logps.with_places([Row("r", np.arange(10), marked)])
    assert row.columns[logps.PLACES].tolist() == [0, 1, 2, 0, 0, 1]


def test_sums_per_row_by_hand() -> None:
    data = rows(5)
    batch = batches.layout(data, 2)
    counts = [int(r.supervised.sum()) for r in data]
    logprob_K = torch.arange(1.0, sum(counts) + 1)
    pieces = logprob_K.split(counts)
    assert logps.per_row(logprob_K, batch).tolist() == [float(p.sum()) for p in pieces]
