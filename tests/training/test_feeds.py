"""What a stage trains on: packed equals unpacked, shares hold, and rows that cannot be trained on are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metier import config, records, runs
from metier.errors import DataError
from metier.models import load
from metier.records import Document, Example, Message
from metier.text import batches, pack
from metier.text.chat import Renderer
from metier.training import loop
from metier.training.feeds import feeds
from metier.training.run import _bits_per_byte

TEXTS = [
    f"lot {n}: " + " ".join(f"the {('red', 'green')[k % 2]} thing {k * n % 17}" for k in range(n)) for n in range(9)
]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=torch.device("cpu"))


def put(data: Path, documents: list[Document], examples: list[Example]) -> None:
    data.mkdir()
    for place, name in enumerate(("train", "valid", "test")):
        runs.write(data / f"text-{name}.jsonl", records.lines(documents[place::3]))
        runs.write(data / f"{name}.jsonl", records.lines(examples if name == "train" else examples[:2]))
    runs.write_json(data / "dataset.json", {"hashes": {"text-test.jsonl": runs.sha256(data / "text-test.jsonl")}})


def spec(train: list[dict[str, Any]], **data: Any) -> config.Spec:
    sources = {"examples": ["a.jsonl", "b.jsonl"]} | ({"text": ["t.md"]} if "cpt" in str(train) else {}) | data
    return config.validate({"name": "t", "task": {"instruction": "x"}, "data": sources, "train": train}, "t")


def asked(count: int, of: str) -> list[Example]:
    return [
        Example(f"{of}{n}", (Message("user", f"{of} {n}"), Message("assistant", "yes")), {"mix": of}, f"{of}{n}")
        for n in range(count)
    ]


def no_replay(tokens: int) -> list[Document]:
    raise AssertionError("no replay was asked for")


DOCUMENTS = [Document(f"d{n}", f"d{n}", text) for n, text in enumerate(TEXTS)]


def test_packed_equals_unpacked_document_by_document(model: Any, renderer: Renderer) -> None:
    rows = [p for d in DOCUMENTS for p in pack.pieces(d.id, renderer.document(d.text), 64)]
    packed = pack.pack(rows, 64)
    assert max(len(r.lengths) for r in packed) > 1 and any("+" in r.id for r in rows)
    alone = {r.id: loop.logprobs(model, batches.layout([r], 0)).detach() for r in rows}
    for order in (packed, packed[::-1]):
        together = loop.logprobs(model, batches.layout(order, 0)).detach()
        apart = torch.cat([alone[name] for row in order for name in row.id.split()])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_a_continuation_costs_no_token_its_context(model: Any, renderer: Renderer) -> None:
    """The first piece of a split document has the loss it has in the whole one."""
    ids = renderer.document(TEXTS[-1])
    whole = loop.logprobs(model, batches.layout(pack.pieces("d", ids, 512), 0)).detach()
    first = loop.logprobs(model, batches.layout(pack.pieces("d", ids, 40)[:1], 0)).detach()
    torch.testing.assert_close(first, whole[:39], rtol=0, atol=1e-5)


def test_bits_per_byte_by_hand(model: Any, renderer: Renderer, tmp_path: Path) -> None:
    put(tmp_path / "data", DOCUMENTS, asked(3, "a"))
    [feed] = feeds(spec([{"method": "cpt", "max_length": 512}]), tmp_path / "data", renderer, 512, no_replay)
    nats, size = 0.0, 0
    for document in DOCUMENTS[2::3]:
        ids = renderer.document(document.text)
        row = batches.Row("x", ids, np.array([False] + [True] * (ids.size - 2) + [False]))
        nats -= float(loop.logprobs(model, batches.layout([row], 0)).sum())
        size += len(document.text.encode())
    assert _bits_per_byte(model, feed, 1000) == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_stages_are_told_apart_by_name(renderer: Renderer, tmp_path: Path) -> None:
    put(tmp_path / "data", DOCUMENTS, asked(3, "a"))
    made = feeds(spec([{"method": "cpt"}, {}, {}]), tmp_path / "data", renderer, 512, no_replay)
    assert [f.name for f in made] == ["cpt", "sft", "sft-2"]


def test_replay_has_its_share_of_the_tokens(renderer: Renderer, tmp_path: Path) -> None:
    put(tmp_path / "data", DOCUMENTS * 4, asked(3, "a"))
    wanted = []

    def general(tokens: int) -> list[Document]:
        wanted.append(tokens)
        return [Document(f"g{n}", "g", "general words " * 9) for n in range(5)]

    stage = {"method": "cpt", "max_length": 48, "replay": 0.25}
    [feed] = feeds(spec([stage]), tmp_path / "data", renderer, 512, general)
    own, replayed = feed.sources
    sizes = np.array([r.ids.size for r in feed.rows])
    share = replayed.draws * sizes[replayed.rows].mean() / feed.tokens()
    assert wanted == [math.ceil(sizes[own.rows].sum() / 3)]
    assert share == pytest.approx(0.25, abs=0.02) and own.draws == own.rows.size


def test_a_mixture_draws_by_weight(renderer: Renderer, tmp_path: Path) -> None:
    put(tmp_path / "data", DOCUMENTS, asked(9, "a.jsonl") + asked(3, "b.jsonl"))
    weighed = spec([{"epochs": 3}], mix={"a.jsonl": 1, "b.jsonl": 3})
    [feed] = feeds(weighed, tmp_path / "data", renderer, 512, no_replay)
    assert [(s.rows.size, s.draws) for s in feed.sources] == [(9, 3), (3, 9)] and feed.steps == 3
    with pytest.raises(DataError, match=r"a.jsonl has so small a weight"):
        feeds(spec([{}], mix={"a.jsonl": 1, "b.jsonl": 999}), tmp_path / "data", renderer, 512, no_replay)


def test_rows_over_the_limit_are_named(renderer: Renderer, tmp_path: Path) -> None:
    put(tmp_path / "data", DOCUMENTS, asked(3, "a"))
    with pytest.raises(DataError, match=r"3 rows have more than 8 tokens: a0 .*a1 .*a2") as caught:
        feeds(spec([{"max_length": 8}]), tmp_path / "data", renderer, 512, no_replay)
    assert "train.max_length" in caught.value.fix


def test_sealed_text_that_was_altered_is_refused(renderer: Renderer, tmp_path: Path) -> None:
    put(tmp_path / "data", DOCUMENTS, asked(3, "a"))
    sealed = tmp_path / "data" / "text-test.jsonl"
    sealed.write_text(json.dumps({"id": "x", "where": "x", "text": "easy"}) + "\n")
    with pytest.raises(DataError, match="sealed text was altered"):
        feeds(spec([{"method": "cpt"}]), tmp_path / "data", renderer, 512, no_replay)
