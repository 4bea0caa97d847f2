"""General text against forgetting: what the specialist gives, or what the base writes by itself.

A model's own samples stand in for the text it was trained on, which is rarely to be had: they are drawn at temperature
1, so they come from the very distribution that training should keep.
"""

from __future__ import annotations

import math
from pathlib import Path

from transformers import PreTrainedModel

from metier import progress, records, runs
from metier.errors import ModelError
from metier.models.generate import Decoding, generate
from metier.records import Document
from metier.text.chat import Renderer

ROWS = 64
LONGEST = 256


def general(
    tokens: int, data: Path, work: Path, model: PreTrainedModel, renderer: Renderer, seed: int
) -> list[Document]:
    """Documents of the data set's replay text, all of them, or `tokens` tokens of the base's own samples.

    `model` is the base without an adapter. Samples are kept in `work`, and a training that goes on reads them there.
    """
    given, kept = data / "replay.jsonl", work / "replay.jsonl"
    if given.is_file():
        return records.documents(given)
    if not kept.is_file():
        runs.write(kept, records.lines(_samples(tokens, model, renderer, seed)))
    return records.documents(kept)


def _samples(tokens: int, model: PreTrainedModel, renderer: Renderer, seed: int) -> list[Document]:
    marks = renderer.document("")
    stops = renderer.stop_ids | set(marks.tolist())
    made: list[Document] = []
    with progress.bar("replay", tokens, "tokens", 0) as advance:
        while tokens > 0:
            decoding = Decoding(LONGEST, temperature=1.0, seed=seed + len(made))
            prompts = [marks[:1]] * min(ROWS, math.ceil(2 * tokens / LONGEST))
            answers = sorted(a for batch in generate(model, prompts, stops, decoding) for a in batch)
            texts = [(len(g.ids), renderer.parse(g.ids)) for _, g in answers]
            written = [(count, text) for count, text in texts if text.strip()]
            if not written:
                raise ModelError(
                    "the base writes nothing by itself, so it has no text to replay",
                    where="train.replay",
                    fix="give general text in data.replay, or set replay to 0",
                )
            for count, text in written:
                made.append(Document(f"sample-{len(made):06d}", "the base's own sample", text))
                tokens -= count
                advance(count, "")
                if tokens <= 0:
                    break
    return made
