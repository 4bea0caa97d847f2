"""From the data set in the run folder to an adapter: the front of the train act.

Read from top to bottom: load, plan, go on from the newest checkpoint or start; for every stage step, validate, save;
then publish. One adapter goes through all stages: each begins with the weights of the last, and with fresh moments.
In a world of several processes each of them runs this; what the first one writes is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier import config, machine, plots, progress, records, runs
from metier.config import Loaded, Stage
from metier.errors import ConfigError, ResourceError, RunError
from metier.models import load, lora, quant, recompute, tuned, whole
from metier.progress import note
from metier.runs import Run
from metier.text import chat
from metier.text.batches import Row
from metier.text.chat import Renderer
from metier.training import checkpoint, exactness, loop, replay, rollouts, teacher, track, world
from metier.training.feeds import Feed, feeds, hold_context
from metier.training.metrics import Metrics
from metier.training.plan import Load, Shape, joined, learning_rate, measured, plan, shape, spared_gb, spread
from metier.training.world import ALONE, World

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METRICS, PLAN, REGISTERED, CHECKPOINTS = "metrics.jsonl", "plan.json", "registered.json", "checkpoints"

Steps = Callable[[int], Iterator[loop.StepResult]]
Validation = Callable[[], Sequence[Row]]


def train(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    """Trains the specialist into `work`; goes on where an interrupted training left it."""
    device = machine.device(loaded.spec.machine.device)
    with world.joined(device, loaded.spec.machine.timeout_seconds) as here:
        return _train(loaded, run, work, device, here)


def _train(loaded: Loaded, run: Run, work: Path, device: torch.device, here: World) -> dict[str, Any]:
    spec, quantize = loaded.spec, loaded.spec.train[0].quantize
    machine.prepare(spec.machine.threads or max(1, machine.cores() // world.beside()))
    machine.forget_peak()
    dtype = _DTYPES[here.told(lambda: _dtype(work, spec.machine.dtype, device))]
    with here.in_turns():
        base = load.resolve(spec.base, loaded.folder, spec.base_sha256)
    data = run.require("build")
    _hold_alike(here, loaded, run, base)
    if here.size > 1 and any(stage.method == "self-distill" for stage in spec.train):
        raise ConfigError(
            "self-distill draws its rows while it trains, and does so in one process only",
            where="train.method",
            fix="start one process, with machine.on: local",
        )
    renderer = chat.of_run(base.folder, data)
    if not renderer.system_role:
        note("this base has no system role: instructions stand at the head of the first question, in every arm")

    # A base that may be spread over processes is not put on one device whole before the plan has decided.
    apart = here.size > 1 and spec.machine.shard != "never" and quantize == "none"
    model = load.model(base, dtype=dtype, device=torch.device("cpu") if apart else device, quantize=quantize)
    general = partial(replay.general, data=data, work=work, model=model, renderer=renderer, seed=spec.seed)
    stages = feeds(spec, data, renderer, load.context(model), general)
    _hold_same_rows(here, stages)
    free = set_free(model, spec.train[0], spec.seed)
    with here.in_turns():
        stages = [_with_columns(feed, loaded, model, base, run.folder / "logps") for feed in stages]
    chosen = here.told(lambda: _plan(loaded, work, base, model, stages, dtype, device, here))
    here = world.place(here, model, device, sharded=chosen["sharded"])
    flat = loop.Flat(free)
    # The checkpoints that are kept and one being written, each of four buffers, and the result.
    runs.need_space(work, (4 * (checkpoint.KEEP + 1) + 1) * flat.value_N.nbytes)
    if chosen["checkpointing"] == "layer":
        recompute.layers(model)

    if not (work / REGISTERED).is_file():
        runs.write_json(work / REGISTERED, config.registration(loaded.spec, runs.read_json(data / "task.json")))
    under = exactness.fingerprint(device, chosen["dtype"], chosen["micro_batch_tokens"], world_size=here.size)
    student, log = _Student(model, flat, renderer, data, work), _Log(work, under, here)
    _go_on(work, flat, log, stages)
    watched = spec if here.writes else spec.model_copy(update={"track": ()})
    with track.following(watched, work, METRICS) as trackers:
        for place, feed in enumerate(stages):
            if place >= log.place:
                schedule = _schedule(feed, spec.seed, chosen["stages"][place])
                _stage(student, place, feed, schedule, log, trackers)
        if not here.writes:
            return {}
        figures = _finish(work, model, flat, chosen, log, base, renderer)
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


@dataclass(frozen=True)
class _Student:
    """What all stages share: the model with its trained numbers, and where it reads and writes."""

    model: PreTrainedModel
    flat: loop.Flat
    renderer: Renderer
    data: Path
    work: Path


def _with_columns(feed: Feed, loaded: Loaded, model: PreTrainedModel, base: load.Base, kept: Path) -> Feed:
    """The feed with what another model says about its rows, where its method asks one; kept in `kept`."""
    splits = (feed.rows, feed.valid)
    if feed.stage.method == "distill":
        made = teacher.taught(splits, loaded, feed.stage, base, kept, dtype=model.dtype, device=model.device)
    elif feed.stage.method == "constrained-sft":
        made = teacher.referenced(splits, model, base, kept)
    else:
        return feed
    return replace(feed, rows=made[0], valid=made[1])


def _stage(
    student: _Student, place: int, feed: Feed, schedule: loop.Schedule, log: _Log, trackers: track.Following
) -> None:
    """One stage, from its beginning or from where the log stands in it; leaves the weights of its best validation."""
    if log.place < place:
        student.flat.forget()
        log.begin(place, feed)
        log.measured(_bits_per_byte(student.model, feed, schedule.tokens, log.world))
    _steps(student, feed, schedule, log, trackers)
    if log.best is not None:
        student.flat.take(log.best)
    log.measured(_bits_per_byte(student.model, feed, schedule.tokens, log.world))


def _steps(student: _Student, feed: Feed, schedule: loop.Schedule, log: _Log, trackers: track.Following) -> None:
    stage, begun = feed.stage, log.step - log.begun
    steps, validation = _walk(student, feed, schedule, log.begun, log.world)
    total = feed.tokens() * schedule.steps * schedule.batch_size / feed.draws
    validate_at = {round(schedule.steps * (i + 1) / stage.validations) for i in range(stage.validations)}
    done = total * begun / schedule.steps
    with runs.stoppable() as stop, progress.bar(f"train {feed.name}", total, "tokens", done) as advance:
        if log.stopped_early:
            return
        for result in steps(begun):
            log.trained(result)
            advance(result.tokens, f"loss {result.loss:.3f}  {result.tokens / result.seconds:,.0f} tokens/s")
            if result.step in validate_at:
                loss = loop.mean_loss(student.model, validation(), feed.prefix, schedule.tokens, stage, log.world)
                log.validated(loss, student.flat)
                if log.stopped_early:
                    note(f"stopped early: no better validation loss in {stage.patience} passes")
            trackers.follow()
            stop.signal = log.world.most(stop.signal)
            last = log.stopped_early or result.step == schedule.steps
            if stop.signal or last or result.step % stage.checkpoint_every == 0:
                log.save(student.flat, needed=bool(stop.signal))
            if log.stopped_early:
                break
            stop.check()


def _walk(student: _Student, feed: Feed, schedule: loop.Schedule, begun: int, here: World) -> tuple[Steps, Validation]:
    """The steps of a stage from a given one on, and the rows of a validation: given, or drawn by the student."""
    if feed.stage.method != "self-distill":
        given = (student.model, student.flat, feed.rows, feed.prefix, schedule)
        return partial(loop.steps, *given, stage=feed.stage, world=here), lambda: feed.valid
    train, held_out = (
        rollouts.demonstrations(records.examples(student.data / f"{split}.jsonl"), student.renderer)
        for split in ("train", "valid")
    )
    source = rollouts.Rollouts(
        model=student.model,
        stage=feed.stage,
        seed=schedule.seed,
        longest=max(row.ids.size - shown.plain_T.size for row, shown in zip(feed.rows, train, strict=True)),
        end=int(feed.rows[0].ids[feed.rows[0].supervised][-1]),
        kept=student.work / "checkpoints" / f"{rollouts.FOLDER}-{feed.name}",
        begun=begun,
    )
    hold_context(source.longest_seen([*train, *held_out]), load.context(student.model), student.data)
    return (
        partial(source.steps, train, student.flat, feed.rows, feed.prefix, schedule),
        partial(source.draw, held_out, "validation"),
    )


def _bits_per_byte(model: PreTrainedModel, feed: Feed, tokens: int, here: World = ALONE) -> float | None:
    """Bits that the model needs for a byte of the stage's held-out documents; None where it has none."""
    if feed.held_out is None:
        return None
    rows = feed.held_out.rows
    nats = loop.mean_loss(model, rows, 0, tokens, world=here) * sum(int(r.supervised.sum()) for r in rows)
    return nats / math.log(2) / feed.held_out.bytes


class _Log:
    """What has happened so far: the metrics file, which stage is at work since which step, and its best validation.

    `step` counts over all stages; `place` is -1 before the first.
    """

    def __init__(self, work: Path, under: dict[str, Any], world: World) -> None:
        self.work, self.under, self.world = work, under, world
        self.metrics = Metrics(work / METRICS)
        self.inexact: list[str] = []
        self.unsaved = False
        self.place, self.begun, self.step = -1, 0, 0
        self.tokens = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.best: Tensor | None = None
        self.worse = 0

    def begin(self, place: int, feed: Feed) -> None:
        """A stage begins: it has no best validation yet."""
        self.place, self.begun, self.feed = place, self.step, feed
        self.best_loss, self.best, self.worse = math.inf, None, 0

    @property
    def stopped_early(self) -> bool:
        return 0 < self.feed.stage.patience <= self.worse

    def trained(self, result: loop.StepResult) -> None:
        self.step, self.tokens, self.seconds = (
            self.begun + result.step,
            self.tokens + result.tokens,
            self.seconds + result.seconds,
        )
        self._append(
            {
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": result.tokens,
                "supervised_tokens": result.supervised_tokens,
                "seconds": round(result.seconds, 4),
            }
        )

    def measured(self, bits_per_byte: float | None) -> None:
        if bits_per_byte is not None:
            self._append({"bits_per_byte": bits_per_byte})

    def validated(self, loss: float, flat: loop.Flat) -> None:
        self._append({"valid_loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.best, self.worse = loss, flat.value_N.clone(), 0
        else:
            self.worse += 1

    def save(self, flat: loop.Flat, *, needed: bool) -> None:
        """Saves a checkpoint. One that is not `needed` may fail: the training goes on, and the next is tried again."""
        if not self.world.writes:
            return
        try:
            self._save(flat)
            self.unsaved = False
        except ResourceError as error:
            if needed:
                raise
            if not self.unsaved:
                note(f"no checkpoint after step {self.step}: {error.what} ({error.where}); training goes on")
            self.unsaved = True

    def _save(self, flat: loop.Flat) -> None:
        tensors = flat.tensors() | ({} if self.best is None else {"best": self.best})
        facts = {
            "stage": self.place,
            "begun": self.begun,
            "metrics": self.metrics.state(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best_loss": None if self.best is None else self.best_loss,
            "worse": self.worse,
            "under": self.under,
            "inexact": self.inexact,
        }
        checkpoint.save(self.work / CHECKPOINTS, self.step, tensors, facts, run=_mark(self.work))

    def restore(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], stages: Sequence[Feed]) -> None:
        self.place, self.begun, self.feed = facts["stage"], facts["begun"], stages[facts["stage"]]
        self.step, self.tokens, self.seconds = step, facts["tokens"], facts["seconds"]
        self.worse = facts["worse"]
        if facts["best_loss"] is not None:
            self.best_loss, self.best = facts["best_loss"], tensors["best"]
        if self.world.writes:
            self.metrics.restore(facts["metrics"])
        changed = exactness.changes(facts["under"], self.under, step)
        self.inexact = [*facts["inexact"], *changed]
        if changed:
            note(f"not bit for bit what it would have been without the interruption: {'; '.join(changed)}")

    def _append(self, line: dict[str, Any]) -> None:
        self.metrics.add({"step": self.step, "stage": self.feed.name, **line})


def _go_on(work: Path, flat: loop.Flat, log: _Log, stages: Sequence[Feed]) -> None:
    """Restores the newest whole checkpoint, or starts with a clean log."""
    checkpoint.prepare(work / CHECKPOINTS)
    step, tensors, facts = _newest(work, flat, log.world)
    if tensors is None:
        log.metrics.clear()
        return
    flat.restore(tensors)
    log.restore(step, tensors, facts, stages)
    note(f"going on from step {step}")


def _newest(work: Path, flat: loop.Flat, here: World) -> tuple[int, dict[str, Tensor] | None, dict[str, Any]]:
    """(step, tensors, facts) of the first process's newest checkpoint; no tensors where it has none."""
    found = checkpoint.newest(work / CHECKPOINTS, run=_mark(work), like=flat.tensors()) if here.writes else None
    step, tensors, facts = found or (0, None, {})
    step, facts = here.told(lambda: [step, facts])
    return step, here.copy(tensors), facts


def _finish(
    work: Path,
    model: PreTrainedModel,
    flat: loop.Flat,
    chosen: dict[str, Any],
    log: _Log,
    base: load.Base,
    renderer: Renderer,
) -> dict[str, Any]:
    """Writes what was trained, as the last stage left it, the plot and the measured plan."""
    if log.feed.stage.tune == "full":
        made = work / tuned.MODEL
        whole.save(model, made, base=base.folder)
    else:
        made = work / tuned.ADAPTER
        lora.save(model, made, base=base.name)
    copy_tokenizer(base.folder, made, renderer)
    log.metrics.state()
    metrics = [line for _, line in records.objects(work / METRICS)]
    done = measured(chosen, metrics, memory_gb=machine.peak_memory_gb())
    exact = {"exact": not log.inexact, "inexact": log.inexact}
    runs.write_json(work / PLAN, done | {"fingerprint": log.under} | exact)
    runs.write(work / "loss.svg", plots.loss_plot(metrics))
    last = [m["loss"] for m in metrics if "loss" in m][-10:]
    return {
        "steps": log.step,
        "loss": sum(last) / len(last),
        "valid_loss": None if log.best is None else log.best_loss,
        **{key: done[key] for key in ("tokens_per_second", "memory_gb", "bits_per_byte") if key in done},
        **exact,
    }


def copy_tokenizer(source: Path, target: Path, renderer: Renderer) -> None:
    """Puts the tokenizer and chat template that were used beside the trained weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            runs.write(target / name, (source / name).read_bytes())
    runs.write(target / chat.TEMPLATE_FILE, renderer.template)


def _dtype(work: Path, choice: str, device: torch.device) -> str:
    """The number format that an interrupted training was begun with, or what the setting means here."""
    begun = _begun(work)
    return str(begun["dtype"]) if begun else _name(machine.dtype(choice, device))


def _hold_alike(here: World, loaded: Loaded, run: Run, base: load.Base) -> None:
    """Every process must have been started with the same settings, data, base and torch."""
    manifest = run.manifest("build")
    assert manifest is not None, "the data set was required before"
    settings = config.tree(loaded.spec)
    here.hold_alike(
        {"settings": settings, "base": base.sha256, "data set": manifest["outputs"], "torch": torch.__version__}
    )


def _hold_same_rows(here: World, stages: Sequence[Feed]) -> None:
    """Every process must train on the same rows, those that the base wrote itself included."""
    if here.size > 1:
        here.hold_alike({"training rows": [[r.ids.tolist() for r in (*f.rows, *f.valid)] for f in stages]})


def _begun(work: Path) -> dict[str, Any] | None:
    """The plan that an interrupted training was begun with."""
    path, fix = work / PLAN, "delete this file and run again: the plan is then made anew"
    if not path.is_file():
        return None
    found = runs.read_json(path, fix=fix)
    if not isinstance(found, dict) or not {"dtype", "micro_batch_tokens", "checkpointing", "stages"} <= found.keys():
        raise RunError("not a plan", where=str(path), fix=fix)
    return found


def _mark(work: Path) -> str:
    """The fingerprint of the settings and data that the working folder is for."""
    with runs.disk(work):
        return (work / runs.MARK).read_text()


def _schedule(feed: Feed, seed: int, planned: dict[str, Any]) -> loop.Schedule:
    stage = feed.stage
    return loop.Schedule(
        steps=feed.steps,
        batch_size=stage.batch_size,
        learning_rate=planned["learning_rate"],
        warmup=stage.warmup,
        weight_decay=stage.weight_decay,
        clip=stage.clip,
        seed=seed,
        tokens=planned["micro_batch_tokens"],
        sources=feed.sources,
    )


def _plan(
    loaded: Loaded,
    work: Path,
    base: load.Base,
    model: PreTrainedModel,
    stages: Sequence[Feed],
    dtype: torch.dtype,
    device: torch.device,
    here: World,
) -> dict[str, Any]:
    """The plan made before the first step; an interrupted training keeps the one it began with, or, among another
    number of processes, its number format and its tokens at once."""
    before = _begun(work) or {}
    if before.get("world_size") == here.size:
        return before
    first = loaded.spec.train[0]
    sizes = _counted(shape(load.skeleton(base), rank=first.rank, targets=first.targets), model)
    tokens = [s["micro_batch_tokens"] for s in before.get("stages", ())] or [loaded.spec.machine.tokens] * len(stages)
    plans = [
        _planned(loaded, feed, sizes, dtype, device, most, here)
        | {
            "stage": feed.name,
            "rows": feed.draws,
            "tokens": round(feed.tokens() * feed.stage.epochs),
            "steps": feed.steps,
            "learning_rate": feed.stage.learning_rate
            or learning_rate(feed.stage.method, sizes.hidden, tune=feed.stage.tune),
        }
        for feed, most in zip(stages, tokens, strict=True)
    ]
    made = joined(plans) | {"sharded": any(p["sharded"] for p in plans)}
    runs.write_json(work / PLAN, made)
    note(
        f"plan: {made['dtype']} on {device.type}, about {progress.clock(made['seconds']['predicted'])}, "
        f"{made['memory_gb']['predicted']:.1f} GB"
    )
    return made


def _planned(
    loaded: Loaded, feed: Feed, sizes: Shape, dtype: torch.dtype, device: torch.device, tokens: int, here: World
) -> dict[str, Any]:
    """The plan of one stage, for the processes at hand."""
    first, shard, memory_gb = loaded.spec.train[0], loaded.spec.machine.shard, machine.memory_gb(device)
    planned = partial(
        plan,
        sizes,
        _load(feed),
        dtype=_name(dtype),
        gflops=machine.gflops()[_name(dtype)],
        device=device.type,
        tokens=tokens,
        quantize=first.quantize,
        weights_per_second=_weights_per_second(first.quantize, dtype, device),
    )
    try:
        made = planned(memory_gb=memory_gb)
    except ResourceError:
        if here.size == 1 or shard == "never" or (shard == "auto" and device.type != "cuda"):
            raise
        made = planned(memory_gb=memory_gb + spared_gb(sizes, _name(dtype), here.size))
    return spread(
        made,
        shape=sizes,
        steps=feed.steps,
        size=here.size,
        beside=world.beside(),
        shard=shard,
        memory_gb=memory_gb,
    )


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


def _load(feed: Feed) -> Load:
    real = feed.tokens()
    return Load(
        computed_tokens=real - feed.prefix * (feed.draws - math.ceil(feed.draws / feed.stage.batch_size)),
        real_tokens=real,
        supervised_tokens=feed.tokens(supervised=True),
        longest=max(r.ids.size for r in feed.rows),
        epochs=feed.stage.epochs,
        steps=feed.steps,
    )


def _weights_per_second(quantize: load.Quantize, dtype: torch.dtype, device: torch.device) -> float:
    if quantize == "none":
        return math.inf
    name = f"weights_per_second:{quantize}:{dtype}:{device.type}"
    return float(machine.remembered(name, lambda: quant.measured_speed(quantize, dtype, device)))


def _name(dtype: torch.dtype) -> str:
    return next(name for name, kind in _DTYPES.items() if kind == dtype)
