"""The two sides of the training benches: Metier's own loop, and TRL + PEFT, on the same token ids and masks.

Both take 16 rows a step in the same order. Tokens are real tokens of the rows: padding never counts, a shared beginning
counts in every row. `defaults` is TRL as its quick start leaves it (a model id, so a float32 base under bf16 autocast,
batch 8, gradient checkpointing); `tuned` has a bf16 base, no checkpointing and a batch size found by trying.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metier import machine, records
from metier.models import load, lora
from metier.text import batches
from metier.text.batches import Row
from metier.text.chat import Renderer
from metier.training import loop

ROWS_A_STEP = 16
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Work:
    """A base and its rows, rendered."""

    base: load.Base
    rows: list[Row]

    def of_step(self, step: int, rows: int = ROWS_A_STEP) -> list[Row]:
        return [self.rows[i] for i in batches.rows_of_step(len(self.rows), rows, 0, step)]


def work(data: Path, name: str = "smollm2-135m") -> Work:
    """The rows of a data set file, rendered for a base."""
    base = load.resolve(name, data.parent)
    renderer = Renderer(base.folder)
    return Work(base, [Row.of(e.id, renderer.render(e.messages)) for e in records.examples(data)])


@dataclass(frozen=True, slots=True)
class Constant(loop.Schedule):
    """One learning rate throughout, so that two programs' schedules cannot differ."""

    def rate(self, step: int) -> float:
        return self.learning_rate


def our_steps(
    todo: Work,
    steps: int,
    schedule: type[loop.Schedule],
    *,
    dtype: torch.dtype = torch.bfloat16,
    learning_rate: float = 1e-3,
) -> tuple[Any, Iterator[loop.StepResult]]:
    """The model, and Metier's own steps on it as they are asked for."""
    machine.prepare()
    model = load.model(todo.base, dtype=dtype, device=torch.device("cpu"))
    lora.attach(model, rank=RANK, alpha=ALPHA, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    walk = schedule(steps, ROWS_A_STEP, learning_rate, 0.03, 0.0, 1.0, 0, 4096)
    return model, loop.steps(model, flat, todo.rows, batches.shared_prefix(todo.rows), walk)


@dataclass(frozen=True)
class Theirs:
    """What TRL did: wall time and loss of each step, and the model."""

    seconds: list[float]
    losses: list[float]
    model: Any


def trl(
    todo: Work,
    steps: int,
    folder: str,
    *,
    batch: int,
    rows_a_step: int = ROWS_A_STEP,
    defaults: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    learning_rate: float | None = 1e-3,
    adapter: Path | None = None,
) -> Theirs:
    """TRL's trainer over the same rows; it starts from `adapter`; without `learning_rate` it keeps its own schedule."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(machine.cores())
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            losses.append(0.0)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class Watched(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, *words: Any, **more: Any) -> Any:
            """The losses of a step's micro-batches add up to the step's; the logged one is rounded."""
            found = super().compute_loss(*words, **more)
            losses[-1] += float((found[0] if isinstance(found, tuple) else found).detach())
            return found

    model: Any = str(todo.base.folder)
    if not defaults:
        model = AutoModelForCausalLM.from_pretrained(todo.base.folder, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    fresh = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    choices: dict[str, Any] = {} if defaults else {"gradient_checkpointing": False, "bf16": dtype == torch.bfloat16}
    if learning_rate is not None:
        choices |= {"learning_rate": learning_rate, "lr_scheduler_type": "constant"}
    trainer = Watched(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(todo.base.folder),
        train_dataset=Dataset.from_list([_row(r) for step in range(steps) for r in todo.of_step(step, rows_a_step)]),
        peft_config=None if adapter is not None else fresh,
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=rows_a_step // batch,
            max_length=None,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            dataset_num_proc=1,
            disable_tqdm=True,
            **choices,
        ),
    )
    trainer.train()
    ends = [*times[1:steps], times[-1]]
    return Theirs([b - a for a, b in zip(times[:steps], ends, strict=True)], losses, trainer.model)


def _row(row: Row) -> dict[str, list[int]]:
    labels = [i if learnt else -100 for i, learnt in zip(row.ids.tolist(), row.supervised.tolist(), strict=True)]
    return {"input_ids": row.ids.tolist(), "labels": labels}


def useful_flops(todo: Work, model: Any, rows: Sequence[Row]) -> float:
    """Operations that LoRA cannot do without for these rows: frozen layers forward and for the gradient of their
    input, the head where a token is supervised, attention within a row, the adapter; a shared beginning counts once.
    """
    settings = model.config
    prefix = batches.shared_prefix(todo.rows)
    tokens = sum(r.ids.size - prefix for r in rows) + prefix
    layers = lora.adapted(model).values()
    frozen = sum(layer.weight.numel() for layer in layers)
    sides = sum(sum(layer.weight.shape) for layer in layers)
    head = settings.vocab_size * settings.hidden_size * sum(int(r.supervised.sum()) for r in rows)
    width = settings.num_attention_heads * (settings.hidden_size // settings.num_attention_heads)
    seen = prefix**2 / 2 + sum((r.ids.size - prefix) * (prefix + (r.ids.size - prefix) / 2) for r in rows)
    attention = 12 * settings.num_hidden_layers * width * seen
    return tokens * (4 * frozen + 6 * RANK * sides) + 4 * head + attention


def peak_gflops() -> float:
    """The best rate of a large bf16 matrix product on this machine, just now."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2048, 2048, generator=generator).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def machine_name() -> str:
    """The processor, its cores and the versions that matter, for a bench's `machine`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{model}, {machine.cores()} cores, torch {torch.__version__}"
