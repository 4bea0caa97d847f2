"""From the data set in the run folder to an adapter: the front of the train act.

Read from top to bottom: load, plan, go on from the newest checkpoint or start, step, validate, save, publish.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier import config, machine, plots, progress, records, runs
from metier.config import Loaded, Stage
from metier.errors import DataError
from metier.models import load, lora, quant, recompute, tuned, whole
from metier.progress import note
from metier.runs import Run
from metier.text import batches
from metier.text.batches import Row
from metier.text.chat import Renderer
from metier.training import checkpoint, loop, track
from metier.training.plan import Load, Shape, measured, plan, shape

METRICS, REGISTERED = "metrics.jsonl", "registered.json"


def train(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    """Trains the specialist into `work`; goes on where an interrupted training left it."""
    spec, stage = loaded.spec, loaded.spec.train[0]
    machine.prepare(spec.machine.threads)
    machine.forget_peak()
    device = machine.device(spec.machine.device)
    dtype = machine.dtype(_begun_with(work) or spec.machine.dtype, device)
    base = load.resolve(spec.base, loaded.folder, spec.base_sha256)
    renderer = Renderer(base.folder)
    if not renderer.system_role:
        note("this base has no system role: instructions stand at the head of the first question, in every arm")
    data = run.require("build")
    rows, valid = (_rows(data / f"{split}.jsonl", renderer, stage) for split in ("train", "valid"))
    prefix = batches.shared_prefix([*rows, *valid])

    model = load.model(base, dtype=dtype, device=device, quantize=stage.quantize)
    _hold_context([*rows, *valid], load.context(model), data)
    flat = loop.Flat(set_free(model, stage, spec.seed))
    runs.need_space(work, 8 * flat.value_N.nbytes)
    chosen = _plan(loaded, work, base, model, rows, prefix, dtype, device)
    if chosen["checkpointing"] == "layer":
        recompute.layers(model)
    schedule = _schedule(stage, len(rows), spec.seed, chosen["micro_batch_tokens"])

    if not (work / REGISTERED).is_file():
        runs.write_json(work / REGISTERED, config.registration(loaded.spec, runs.read_json(data / "task.json")))
    log = _Log(work, schedule, stage)
    _go_on(work, flat, log)
    with track.following(spec, work, METRICS) as trackers:
        _steps(model, flat, rows, valid, prefix, schedule, stage, work, log, trackers)
        figures = _finish(loaded, work, model, flat, chosen, log, base)
        trackers.end(figures)
    return figures | ({"trackers_failed": trackers.failed} if spec.track else {})


def set_free(model: PreTrainedModel, stage: Stage, seed: int) -> list[nn.Parameter]:
    """Makes trainable what a stage trains: every weight, or a fresh adapter and the modules trained beside it."""
    if stage.tune == "full":
        return whole.everything(model)
    lora.attach(
        model,
        rank=stage.rank,
        alpha=stage.alpha,
        rslora=stage.rslora,
        dora=stage.dora,
        dropout=stage.dropout,
        targets=stage.targets,
        seed=seed,
    )
    whole.attach(model, stage.modules_to_save)
    return lora.parameters(model)


def _steps(
    model: PreTrainedModel,
    flat: loop.Flat,
    rows: Sequence[Row],
    valid: Sequence[Row],
    prefix: int,
    schedule: loop.Schedule,
    stage: Stage,
    work: Path,
    log: _Log,
    trackers: track.Following,
) -> None:
    total = sum(r.ids.size for r in rows) * schedule.steps * schedule.batch_size / len(rows)
    done = total * log.step / schedule.steps
    with runs.stoppable() as stop, progress.bar("train", total, "tokens", done) as advance:
        if log.stopped_early:
            return
        for result in loop.steps(model, flat, rows, prefix, schedule, start=log.step):
            log.trained(result)
            advance(result.tokens, f"loss {result.loss:.3f}  {result.tokens / result.seconds:,.0f} tokens/s")
            if result.step in log.validate_at:
                log.validated(loop.mean_loss(model, valid, prefix, schedule.tokens), flat)
                if log.stopped_early:
                    note(f"stopped early: no better validation loss in {stage.patience} passes")
            trackers.follow()
            if stop.signal or log.stopped_early or result.step % stage.checkpoint_every == 0:
                log.save(flat)
            if log.stopped_early:
                break
            stop.check()


class _Log:
    """What has happened so far: the metrics file, the best validation, and when to validate and stop."""

    def __init__(self, work: Path, schedule: loop.Schedule, stage: Stage) -> None:
        self.work, self.stage = work, stage
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.best: Tensor | None = None
        self.worse = 0
        count = stage.validations
        self.validate_at = {round(schedule.steps * (i + 1) / count) for i in range(count)}

    @property
    def stopped_early(self) -> bool:
        return 0 < self.stage.patience <= self.worse

    def trained(self, result: loop.StepResult) -> None:
        self.step, self.tokens, self.seconds = (
            result.step,
            self.tokens + result.tokens,
            self.seconds + result.seconds,
        )
        self._append(
            {
                "step": result.step,
                "stage": self.stage.method,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": result.tokens,
                "supervised_tokens": result.supervised_tokens,
                "seconds": round(result.seconds, 4),
            }
        )

    def validated(self, loss: float, flat: loop.Flat) -> None:
        self._append({"step": self.step, "stage": self.stage.method, "valid_loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.best, self.worse = loss, flat.value_N.clone(), 0
        else:
            self.worse += 1

    def save(self, flat: loop.Flat) -> None:
        tensors = flat.tensors() | ({} if self.best is None else {"best": self.best})
        facts = {
            "metrics_bytes": (self.work / METRICS).stat().st_size,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best_loss": None if self.best is None else self.best_loss,
            "worse": self.worse,
        }
        checkpoint.save(self.work / "checkpoints", self.step, tensors, facts)

    def restore(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds = step, facts["tokens"], facts["seconds"]
        self.worse = facts["worse"]
        if facts["best_loss"] is not None:
            self.best_loss, self.best = facts["best_loss"], tensors["best"]
        with runs.disk(self.work), (self.work / METRICS).open("r+b") as file:
            file.truncate(facts["metrics_bytes"])

    def _append(self, line: dict[str, Any]) -> None:
        with runs.disk(self.work), (self.work / METRICS).open("ab") as file:
            file.write(records.lines([line]))


def _go_on(work: Path, flat: loop.Flat, log: _Log) -> None:
    """Restores the newest whole checkpoint, or starts with a clean log."""
    found = checkpoint.newest(work / "checkpoints")
    if found is None:
        (work / METRICS).unlink(missing_ok=True)
        return
    step, tensors, facts = found
    flat.restore(tensors)
    log.restore(step, tensors, facts)
    note(f"going on from step {step}")


def _finish(
    loaded: Loaded,
    work: Path,
    model: PreTrainedModel,
    flat: loop.Flat,
    chosen: dict[str, Any],
    log: _Log,
    base: load.Base,
) -> dict[str, Any]:
    """Writes what was trained (as the best validation had it, where there was one), the plot and the measured plan."""
    if log.best is not None:
        flat.take(log.best)
    if loaded.spec.train[0].tune == "full":
        made = work / tuned.MODEL
        whole.save(model, made, base=base.folder)
    else:
        made = work / tuned.ADAPTER
        lora.save(model, made, base=base.name)
    copy_tokenizer(base.folder, made)
    done = measured(
        chosen,
        memory_gb=machine.peak_memory_gb(),
        tokens_per_second=log.tokens / log.seconds,
        seconds=log.seconds,
    )
    runs.write_json(work / "plan.json", done)
    metrics = [line for _, line in records.objects(work / METRICS)]
    runs.write(work / "loss.svg", plots.loss_plot(metrics))
    last = [m["loss"] for m in metrics if "loss" in m][-10:]
    return {
        "steps": log.step,
        "loss": sum(last) / len(last),
        "valid_loss": None if log.best is None else log.best_loss,
        "tokens_per_second": done["tokens_per_second"],
        "memory_gb": done["memory_gb"],
    }


def copy_tokenizer(source: Path, target: Path) -> None:
    """Puts the tokenizer and chat template that were used beside the trained weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).is_file():
            runs.write(target / name, (source / name).read_bytes())


def _begun_with(work: Path) -> str | None:
    """The number format that an interrupted training was begun with."""
    return str(_json(work / "plan.json")["dtype"]) if (work / "plan.json").is_file() else None


def _rows(path: Path, renderer: Renderer, stage: Stage) -> list[Row]:
    rows = [Row.of(e.id, renderer.render(e.messages)) for e in records.examples(path)]
    for row in rows:
        if not row.supervised.any():
            raise DataError(f"row {row.id} has no answer to learn", where=str(path), fix="run `metier build` again")
        if stage.max_length and row.ids.size > stage.max_length:
            raise DataError(
                f"row {row.id} has {row.ids.size} tokens, over max_length {stage.max_length}",
                where=str(path),
                fix="raise train.max_length, or run `metier build` again",
            )
    return rows


def _hold_context(rows: Sequence[Row], context: int, data: Path) -> None:
    longest = max(rows, key=lambda row: row.ids.size)
    if longest.ids.size > context:
        raise DataError(
            f"row {longest.id} has {longest.ids.size:,} tokens, over this model's context of {context:,}",
            where=str(data),
            fix="shorten the row, or use a base with a longer context",
        )


def _schedule(stage: Stage, rows: int, seed: int, tokens: int) -> loop.Schedule:
    return loop.Schedule(
        steps=max(1, math.ceil(stage.epochs * rows / stage.batch_size)),
        batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        warmup=stage.warmup,
        weight_decay=stage.weight_decay,
        clip=stage.clip,
        seed=seed,
        tokens=tokens,
    )


def _plan(
    loaded: Loaded,
    work: Path,
    base: load.Base,
    model: PreTrainedModel,
    rows: Sequence[Row],
    prefix: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """The plan made before the first step; an interrupted training keeps the one it began with."""
    path = work / "plan.json"
    if path.is_file():
        return _json(path)
    stage = loaded.spec.train[0]
    real = sum(r.ids.size for r in rows)
    steps = math.ceil(len(rows) / stage.batch_size)
    made = plan(
        _counted(shape(load.skeleton(base), rank=stage.rank, targets=stage.targets), model),
        Load(
            computed_tokens=real - prefix * (len(rows) - steps),
            real_tokens=real,
            supervised_tokens=sum(int(r.supervised.sum()) for r in rows),
            longest=max(r.ids.size for r in rows),
            epochs=stage.epochs,
            steps=steps,
        ),
        dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        gflops=machine.gflops()["bf16" if dtype == torch.bfloat16 else "fp32"],
        memory_gb=machine.memory_gb(device),
        device=device.type,
        tokens=loaded.spec.machine.tokens,
        quantize=stage.quantize,
        weights_per_second=_weights_per_second(stage.quantize, dtype, device),
    )
    made["why"].append(_why(stage))
    runs.write_json(path, made)
    note(
        f"plan: {made['dtype']} on {device.type}, about {progress.clock(made['seconds']['predicted'])}, "
        f"{made['memory_gb']['predicted']:.1f} GB"
    )
    return made


def _counted(sizes: Shape, model: PreTrainedModel) -> Shape:
    """The sizes with what is trained, counted in the model itself."""
    adapter = sum(p.numel() for layer in lora.adapted(model).values() for p in layer.parameters() if p.requires_grad)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return replace(
        sizes,
        adapter_weights=adapter,
        whole_weights=sum(p.numel() for p in model.parameters() if p.requires_grad) - adapter,
        whole_linear_weights=sum(m.weight.numel() for m in linears if m.weight.requires_grad),
        head_trained=bool(head.weight.requires_grad),
    )


def _why(stage: Stage) -> str:
    """What is trained, and at which rate, in words."""
    if stage.tune == "lora":
        return f"learning rate {stage.learning_rate:g}, for an adapter"
    default = ", a tenth of an adapter's default" if stage.learning_rate == config.FULL_RATE else ""
    return f"learning rate {stage.learning_rate:g}, as every weight is trained{default}"


def _weights_per_second(quantize: load.Quantize, dtype: torch.dtype, device: torch.device) -> float:
    if quantize == "none":
        return math.inf
    name = f"weights_per_second:{quantize}:{dtype}:{device.type}"
    return float(machine.remembered(name, lambda: quant.measured_speed(quantize, dtype, device)))


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))
