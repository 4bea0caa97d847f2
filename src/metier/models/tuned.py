"""What a training left, an adapter or a whole model, and the two models of a run: its base and the tuned one."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from metier.errors import RunError
from metier.models import load as bases

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER, MODEL = "adapter", "model"


def folder(trained: Path) -> Path:
    """The folder inside `train/` that holds what was trained: `adapter`, or `model` where every weight was."""
    found = next((trained / kind for kind in (ADAPTER, MODEL) if _files(trained / kind)), None)
    if found is None:
        raise RunError("this run is not trained yet", where=str(trained), fix="run `metier train` first")
    return found


def weights(trained: Path) -> list[str]:
    """The weight files of what was trained, by their names inside `train/`."""
    return [file.relative_to(trained).as_posix() for file in _files(folder(trained))]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load(base: bases.Base, folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The tuned model of a folder: an adapter on its base, or a whole model."""
    from metier.models import lora

    if folder.name == MODEL:
        return bases.model(dataclasses.replace(base, folder=folder), dtype=dtype, device=device)
    model = bases.model(base, dtype=dtype, device=device)
    lora.load(model, folder)
    return model


class Pair:
    """The base and the tuned model of a run; of two whole models one is in memory at a time."""

    def __init__(self, base: bases.Base, trained: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self._base, self._folder = base, folder(trained)
        self._dtype, self._device = dtype, device
        self._model: PreTrainedModel | None = None
        self._tuned = True

    @contextlib.contextmanager
    def model(self, *, tuned: bool) -> Iterator[PreTrainedModel]:
        """The one or the other, inside the block; let go of it before asking for the other."""
        from metier.models import lora

        if self._folder.name == ADAPTER:
            model = self._held(tuned=True)
            with contextlib.nullcontext() if tuned else lora.disabled(model):
                yield model
        else:
            yield self._held(tuned=tuned)

    def _held(self, *, tuned: bool) -> PreTrainedModel:
        if self._model is not None and self._tuned == tuned:
            return self._model
        self._model, self._tuned = None, tuned
        gc.collect()
        if tuned:
            self._model = load(self._base, self._folder, dtype=self._dtype, device=self._device)
        else:
            self._model = bases.model(self._base, dtype=self._dtype, device=self._device)
        return self._model
