"""Rounds of answers that the student draws itself, for self-distillation (SDFT, arXiv 2601.19897).

The student answers from the plain prompt. The teacher is the same model without its adapter, and sees the demonstration
before the prompt; what it says about the student's own tokens is what the student learns. A round of answers serves
some steps, in which the student moves on from the one that drew them; the loss weighs for that. A round lies on disk
beside the checkpoints, because a training that goes on in its midst no longer has the weights that drew it.

Shape legend: T tokens, K drawn tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from metier import runs
from metier.config import Stage
from metier.models import lora
from metier.models.generate import Decoding, generate
from metier.objectives import logps
from metier.progress import note
from metier.records import Batch, Example, Message
from metier.text import batches
from metier.text.batches import Row
from metier.text.chat import Renderer
from metier.training import loop, teacher

FOLDER = "rounds"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt as the student sees it, and as the teacher does, behind its answer: ids (T,) each."""

    id: str
    plain_T: np.ndarray
    shown_T: np.ndarray


def demonstrations(examples: Sequence[Example], renderer: Renderer) -> list[Demonstration]:
    return [Demonstration(e.id, renderer.prompt(e.prompt), renderer.prompt(shown(e))) for e in examples]


def shown(example: Example) -> tuple[Message, ...]:
    """The demonstration as it was, and its question once more."""
    return (*example.messages, example.messages[-2])


@dataclass(frozen=True)
class Rollouts:
    """What rounds are drawn with. `longest` is the most tokens of an answer, `end` the token that ends one; the stage
    began after `begun` steps of the training, which checkpoints count and rounds do not."""

    model: PreTrainedModel
    stage: Stage
    seed: int
    longest: int
    end: int
    kept: Path
    begun: int = 0

    def steps(
        self,
        demonstrations: Sequence[Demonstration],
        flat: loop.Flat,
        rows: Sequence[Row],
        prefix: int,
        schedule: loop.Schedule,
        start: int = 0,
    ) -> Iterator[loop.StepResult]:
        """As `loop.steps` on `rows`, those of the demonstrations, each with a drawn answer in place of its own.

        The seconds of a round's first step hold the time it took to draw the round.
        """
        every = self.stage.draw_every
        for first in range(start - start % every, schedule.steps, every):
            began = time.perf_counter()
            last = min(first + every, schedule.steps)
            chosen = [
                batches.rows_of_step(len(rows), schedule.batch_size, schedule.seed, s, schedule.sources)
                for s in range(first, last)
            ]
            places = np.unique(np.concatenate(chosen)).tolist()
            drawn = self._round(first, start, [demonstrations[p] for p in places])
            of_round = list(rows)
            for place, row in zip(places, drawn, strict=True):
                of_round[place] = row
            seconds = time.perf_counter() - began
            at = max(first, start)
            results = loop.steps(self.model, flat, of_round, prefix, schedule, at, self.stage)
            for result in itertools.islice(results, last - at):
                yield replace(result, seconds=result.seconds + seconds)
                seconds = 0.0

    def draw(self, demonstrations: Sequence[Demonstration], name: str) -> list[Row]:
        """An answer of the student to each plain prompt, with the columns its loss needs. The answers are a function of
        the weights, the seed, `name` and the prompts."""
        decoding = Decoding(self.longest, temperature=1.0, seed=_number(f"{self.seed}:{name}"))
        answers: dict[int, list[int]] = {}
        for group in generate(self.model, [d.plain_T for d in demonstrations], frozenset({self.end}), decoding):
            answers |= {i: [*a.ids, self.end] if a.finish == "stop" else a.ids for i, a in group}
        drawn = [np.array(answers[i], dtype=np.int64) for i in range(len(demonstrations))]
        rows = [_row(d.id, d.plain_T, answer) for d, answer in zip(demonstrations, drawn, strict=True)]
        seen = [_row(d.id, d.shown_T, answer) for d, answer in zip(demonstrations, drawn, strict=True)]
        with lora.disabled(self.model):
            taught = logps.scored(seen, self._teacher)
        return [
            replace(row, columns={**row.columns, **of_teacher.columns})
            for row, of_teacher in zip(logps.scored(rows, self._student), taught, strict=True)
        ]

    def longest_seen(self, demonstrations: Sequence[Demonstration]) -> list[Row]:
        """For each demonstration a row as long as the teacher may have to read."""
        longest = np.zeros(self.longest, dtype=np.int64)
        return [_row(d.id, d.shown_T, longest) for d in demonstrations]

    def _round(self, first: int, start: int, demonstrations: Sequence[Demonstration]) -> list[Row]:
        """The round that begins with step number `first`: from disk, or drawn now and kept."""
        path = self.kept / f"round-{first:08d}.safetensors"
        held = logps.read(path)
        if held is not None:
            return _rows(demonstrations, held)
        if first < start:
            note(f"the answers drawn at step {first} are gone; others are drawn at step {start}")
        rows = self.draw(demonstrations, f"round:{first}")
        with runs.disk(path):
            self.kept.mkdir(parents=True, exist_ok=True)
        logps.write(path, _arrays(rows))
        self._forget()
        return rows

    def _forget(self) -> None:
        """Deletes rounds that end before the oldest checkpoint: no training can go on in them."""
        oldest = min((_step(p) for p in self.kept.parent.glob("step-*")), default=0)
        for path in self.kept.glob("round-*"):
            if self.begun + _step(path) + self.stage.draw_every <= oldest:
                path.unlink()

    def _teacher(self, batch: Batch) -> dict[str, np.ndarray]:
        return logps.teacher_columns(*teacher.likeliest(self.model, batch, self.stage))

    @torch.inference_mode()
    def _student(self, batch: Batch) -> dict[str, np.ndarray]:
        return {logps.DRAWN_LOGPS: loop.logprobs(self.model, batch).cpu().numpy()}


def _row(name: str, prompt_T: np.ndarray, answer_T: np.ndarray) -> Row:
    ids_T = np.concatenate([prompt_T, answer_T])
    return Row(name, ids_T, np.arange(ids_T.size) >= prompt_T.size)


def _arrays(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Answers and columns of all rows end to end."""
    columns = {name: np.concatenate([r.columns[name] for r in rows]) for name in rows[0].columns}
    lengths_B = np.array([int(r.supervised.sum()) for r in rows])
    return {"answers": np.concatenate([r.ids[r.supervised] for r in rows]), "lengths": lengths_B, **columns}


def _rows(demonstrations: Sequence[Demonstration], held: dict[str, np.ndarray]) -> list[Row]:
    """The inverse of `_arrays`."""
    answers = np.split(held["answers"], np.cumsum(held["lengths"])[:-1])
    rows = [_row(d.id, d.plain_T, answer) for d, answer in zip(demonstrations, answers, strict=True)]
    return logps.dealt(rows, {n: column for n, column in held.items() if n not in ("answers", "lengths")})


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"draw:{text}".encode()).digest()[:7], "big")
