"""What other models say about the rows: a teacher, asked once and gone before the student is loaded, and the untouched
base, which is the student with its adapter off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from metier import machine, runs
from metier.config import Loaded, Stage
from metier.errors import DataError, ModelError
from metier.models import head, load, lora
from metier.objectives import logps
from metier.progress import note
from metier.records import Batch
from metier.text.batches import Row
from metier.training import loop


def taught(
    splits: Iterable[Sequence[Row]],
    loaded: Loaded,
    stage: Stage,
    student: load.Base,
    kept: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[Row]]:
    """Each split's rows with the stage's teacher's log-probabilities at their supervised tokens, kept in `kept`."""
    assert stage.teacher is not None
    base = load.resolve(stage.teacher, loaded.folder)
    _hold_tokenizer(base, student)
    splits = [list(split) for split in splits]
    vocabulary = min(_vocabulary(base), _vocabulary(student))
    key = runs.digest([base.sha256, str(dtype), stage.top_k, stage.temperature, vocabulary])
    models: list[PreTrainedModel] = []

    def score(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        if not models:
            note(f"asking the teacher {base.name}")
            models.append(load.model(base, dtype=dtype, device=device))
            _hold_context([row for split in splits for row in split], load.context(models[0]))
        return likeliest(models[0], batch, stage, vocabulary)

    rows = [logps.with_teacher(split, score, kept, key) for split in splits]
    models.clear()
    machine.give_back()
    return rows


def referenced(splits: Iterable[Sequence[Row]], model: PreTrainedModel, base: load.Base, kept: Path) -> list[list[Row]]:
    """Each split's rows with the places of their tokens and the base's log-probabilities of them, kept in `kept`."""

    @torch.inference_mode()
    def score(batch: Batch) -> np.ndarray:
        found: np.ndarray = loop.logprobs(model, batch).cpu().numpy()
        return found

    key = runs.digest([base.sha256, str(model.dtype)])
    with lora.disabled(model):
        return [logps.with_reference(logps.with_places(split), score, kept, key) for split in splits]


@torch.inference_mode()
def likeliest(
    model: PreTrainedModel, batch: Batch, stage: Stage, vocabulary: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The supervised tokens of a batch and the model's likeliest others, `top_k` in all: ids (K, C), the token itself
    first, and log-probabilities (K, C + 1), the last that of all others, over `vocabulary` entries of its head."""
    target_K = torch.from_numpy(batch.target_K).to(model.device)
    weight_VD = model.get_output_embeddings().weight[:vocabulary]
    found = head.likeliest(
        loop.states(model, batch),
        weight_VD,
        target_K,
        stage.top_k,
        softcap=head.softcap(model),
        temperature=stage.temperature,
    )
    ids_KC, logprob_KC = (t.cpu().numpy() for t in found)
    return ids_KC, logprob_KC


def _hold_context(rows: Sequence[Row], context: int) -> None:
    longest = max(rows, key=lambda row: row.ids.size)
    if longest.ids.size > context:
        raise DataError(
            f"row {longest.id} has {longest.ids.size:,} tokens, over the teacher's context of {context:,}",
            where="train.teacher",
            fix="shorten the row, or use a teacher with a longer context",
        )


def _hold_tokenizer(teacher: load.Base, student: load.Base) -> None:
    """Refuses a teacher whose probabilities would be of other tokens than the student's."""
    if _tokenizer(teacher) != _tokenizer(student):
        raise ModelError(
            f"the teacher {teacher.name} has another tokenizer than the base {student.name}: their tokens are not the "
            "same, so neither are their probabilities",
            where="train.teacher",
            fix="use a teacher of the base's own family, with the same tokenizer.json",
        )


def _tokenizer(base: load.Base) -> str:
    path = base.folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError("tokenizer.json is missing", where=str(path), fix="use a complete model folder")
    return runs.sha256(path)


def _vocabulary(base: load.Base) -> int:
    """Rows of the head; models of one family may pad the same vocabulary differently."""
    return int(json.loads((base.folder / "config.json").read_bytes())["vocab_size"])
