"""Checkpoints: whole or passed over, and the newest two are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.errors import RunError
from metier.training import checkpoint


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"value": torch.full((4,), float(step))}, {"tokens": step}, run="r")


def newest(folder: Path, run: str = "r", size: int = 4) -> tuple[int, dict[str, torch.Tensor], dict] | None:
    return checkpoint.newest(folder, run=run, like={"value": torch.zeros(size)})


def test_the_newest_is_read_back_and_old_ones_go(tmp_path: Path) -> None:
    write(tmp_path, 3, 6, 9)
    step, tensors, facts = newest(tmp_path) or pytest.fail("none found")
    assert step == 9 and tensors["value"].tolist() == [9.0] * 4 and facts == {"tokens": 9}
    assert len(list(tmp_path.glob("step-*"))) == checkpoint.KEEP


def test_none_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(["tensors", "facts"]))
def test_a_flipped_bit_makes_the_one_before_be_used(
    tmp_path_factory: pytest.TempPathFactory, at: float, bit: int, name: str
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    write(folder, 3, 6)
    file = folder / "step-00000006" / {"tensors": checkpoint.TENSORS, "facts": checkpoint.FACTS}[name]
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    before = json.loads(file.read_bytes()) if name == "facts" else None
    file.write_bytes(data)
    found = newest(folder)
    assert found is not None
    if found[0] == 6:  # a flip between kinds of white space
        assert json.loads(data) == before and found[1]["value"].tolist() == [6.0] * 4
    else:
        assert found[0] == 3


@pytest.mark.parametrize("damage", ["empty", "no-facts", "truncated", "debris"])
def test_half_written_ones_are_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 3)
    late = tmp_path / ("step-00000009" if damage != "debris" else ".tmp-00000009")
    late.mkdir()
    if damage in ("no-facts", "truncated"):
        source = tmp_path / "step-00000003" / checkpoint.TENSORS
        (late / checkpoint.TENSORS).write_bytes(source.read_bytes())
    if damage == "truncated":
        facts = (tmp_path / "step-00000003" / checkpoint.FACTS).read_text()
        (late / checkpoint.FACTS).write_text(facts[:20])
    found = newest(tmp_path)
    assert found is not None and found[0] == 3
    checkpoint.prepare(tmp_path)
    assert not (tmp_path / ".tmp-00000009").exists()


def test_one_of_another_training_or_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3)
    for strange, what in (
        (lambda: newest(tmp_path, run="s"), "another training"),
        (lambda: newest(tmp_path, size=5), "shapes"),
    ):
        with pytest.raises(RunError, match=what) as caught:
            strange()
        assert "step-00000003" in caught.value.where and "delete" in caught.value.fix


def test_a_file_where_checkpoints_belong_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(RunError, match="a file stands where checkpoints belong"):
        checkpoint.prepare(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_damaged_one_that_is_passed_over_takes_no_whole_ones_place(tmp_path: Path) -> None:
    write(tmp_path, 3, 6)
    (tmp_path / "step-00000020").mkdir()
    write(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000009"]
