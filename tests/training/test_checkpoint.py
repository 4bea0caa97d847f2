"""Checkpoints: whole or passed over, and the newest two are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.training import checkpoint


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"value": torch.full((4,), float(step))}, {"tokens": step})


def test_the_newest_is_read_back_and_old_ones_go(tmp_path: Path) -> None:
    write(tmp_path, 3, 6, 9)
    step, tensors, facts = checkpoint.newest(tmp_path) or pytest.fail("none found")
    assert step == 9 and tensors["value"].tolist() == [9.0] * 4 and facts == {"tokens": 9}
    assert len(list(tmp_path.glob("step-*"))) == checkpoint.KEEP


def test_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


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
    before = file.read_bytes()
    file.write_bytes(data)
    found = checkpoint.newest(folder)
    assert found is not None
    if found[0] == 6:  # a flip in white space or in a fact's spelling that still verifies is no damage to tensors
        assert name == "facts" and bytes(data) != before and found[1]["value"].tolist() == [6.0] * 4
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
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[0] == 3
    assert not (tmp_path / ".tmp-00000009").exists()
