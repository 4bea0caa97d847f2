"""The loop: a generator of optimizer steps. Logging, validating and saving are ordinary code of whoever iterates it.

A step is a function of (weights, moments, step number) and (seed, settings, data). Losses come as a sum and a weight;
the division happens once, here, over all micro-batches of the step on all ranks.

Shape legend: N trained numbers, laid out in one flat buffer; K supervised positions, C columns of a teacher.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier.config import Stage
from metier.errors import NumericError
from metier.models import head, lora
from metier.models.attention import Rows, hidden_states
from metier.objectives import logps, supervised
from metier.records import Batch
from metier.text import batches
from metier.text.batches import Row, Source
from metier.training.world import ALONE, World

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
PIECE = 1 << 24
SFT = Stage()  # type: ignore[call-arg]
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a stage walks: rows per step, steps in all, and the learning rate as a function of the step.

    Without `sources` an epoch draws each row once.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float
    weight_decay: float
    clip: float
    seed: int
    tokens: int
    sources: tuple[Source, ...] = ()

    def rate(self, step: int) -> float:
        """Linear warm-up over the first `warmup` share of steps, then a cosine to zero; `step` counts from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did; `tokens` are real tokens (every row with its prefix), `seconds` its wall time."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float


class Flat:
    """The trainable parameters as one float32 buffer with its AdamW moments (Loshchilov & Hutter 2019, alg. 2).

    Float32 parameters become views of the buffer, and so do their gradients. A parameter in bf16 works on: it is
    rounded from the buffer after each update, and its gradient is added to the buffer's after each micro-batch.
    Matrices come first, because weight decay is theirs alone.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = sorted(parameters, key=lambda p: p.dim() < 2)
        self.matrices = sum(p.numel() for p in self.parameters if p.dim() >= 2)
        self.value_N = torch.cat([p.detach().reshape(-1).float() for p in self.parameters])
        self.grad_N = torch.zeros_like(self.value_N)
        self.mean_N = torch.zeros_like(self.value_N)
        self.square_N = torch.zeros_like(self.value_N)
        self.working: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        at = 0
        for parameter in self.parameters:
            end = at + parameter.numel()
            value, grad = (whole_N[at:end].view(parameter.shape) for whole_N in (self.value_N, self.grad_N))
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = value, grad
            else:
                self.working.append((parameter, value, grad))
            at = end

    def gather(self) -> None:
        """Adds the gradients of working parameters to the buffer, where micro-batches sum up in float32."""
        for parameter, _, grad in self.working:
            if parameter.grad is not None and parameter.grad.is_sparse:
                rows = parameter.grad
                grad.index_add_(0, rows._indices()[0], rows._values().float())
            elif parameter.grad is not None:
                grad.add_(parameter.grad)
            parameter.grad = None

    def update(self, count: int, rate: float, weight_decay: float) -> None:
        """One AdamW update from the gradient buffer; `count` is the number of this update, from 1."""
        if weight_decay:
            self.value_N[: self.matrices].mul_(1 - rate * weight_decay)
        buffers = (self.value_N, self.grad_N, self.mean_N, self.square_N)
        for value, grad, mean, square in zip(*(b.split(PIECE) for b in buffers), strict=True):
            mean.lerp_(grad, 1 - BETA1)
            square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            denominator = (square / (1 - BETA2**count)).sqrt_().add_(EPSILON)
            value.addcdiv_(mean, denominator, value=-rate / (1 - BETA1**count))
        self._round()

    def _round(self) -> None:
        for parameter, value, _ in self.working:
            parameter.data.copy_(value)

    def take(self, value_N: Tensor) -> None:
        """Puts other numbers in place of the parameters."""
        self.value_N.copy_(value_N)
        self._round()

    def forget(self) -> None:
        """Fresh moments; the values stay."""
        self.mean_N.zero_()
        self.square_N.zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value_N, "mean": self.mean_N, "square": self.square_N}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, buffer in self.tensors().items():
            buffer.copy_(tensors[name])
        self._round()


def steps(
    model: PreTrainedModel,
    flat: Flat,
    rows: Sequence[Row],
    prefix: int,
    schedule: Schedule,
    start: int = 0,
    stage: Stage = SFT,
    world: World = ALONE,
) -> Iterator[StepResult]:
    """Trains on `rows` by the stage's method and yields after every update, from step number `start`; on all ranks
    alike."""
    for step in range(start, schedule.steps):
        began = time.perf_counter()
        chosen = [
            rows[i] for i in batches.rows_of_step(len(rows), schedule.batch_size, schedule.seed, step, schedule.sources)
        ]
        micro = _own(chosen, prefix, schedule.tokens, world)
        (weight,) = world.total(sum(int(b.target_K.size) for b in micro))
        flat.grad_N.zero_()
        total = 0.0
        for number, batch in enumerate(micro):
            with lora.dropping(model, schedule.seed, step, number * world.size + world.rank):
                loss_sum, _ = LOSSES[stage.method](model, batch, stage)
                (loss_sum / weight).backward()
            flat.gather()
            total += float(loss_sum.detach())
        (total,) = world.total(total)
        world.add(flat.grad_N)
        norm = float(flat.grad_N.norm())
        loss = total / weight
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(loss, norm, step, _poisoned(model, chosen, prefix, stage))
        flat.grad_N.mul_(min(1.0, schedule.clip / (norm + 1e-6)))
        rate = schedule.rate(step)
        flat.update(step + 1, rate, schedule.weight_decay)
        yield StepResult(
            step=step + 1,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            tokens=sum(int(r.ids.size) for r in chosen),
            supervised_tokens=int(weight),
            seconds=time.perf_counter() - began,
        )


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    rows: Sequence[Row],
    prefix: int,
    tokens: int,
    stage: Stage = SFT,
    world: World = ALONE,
) -> float:
    """The loss of the stage's method per supervised token over all rows, in nats."""
    total, weight = 0.0, 0.0
    for batch in _own(rows, prefix, tokens, world):
        loss_sum, count = LOSSES[stage.method](model, batch, stage)
        total, weight = total + float(loss_sum), weight + count
    total, weight = world.total(total, weight)
    return total / weight


def _own(rows: Sequence[Row], prefix: int, tokens: int, world: World) -> list[Batch]:
    """This rank's share of `rows` in micro-batches.

    A sharded world gathers every layer's weights together, so there each rank has as many batches as any other; those
    it is short of are filled by one that nothing is learnt from.
    """
    shares = [batches.micro_batches(share, prefix, tokens) for share in batches.deal(rows, world.size)]
    own = shares[world.rank]
    missing = max(map(len, shares)) - len(own) if world.sharded else 0
    return own + [batches.silent(rows[0], prefix)] * missing


def logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(K,) float32 log-probabilities of a batch's supervised tokens; the head sees those positions only."""
    weight_VD = model.get_output_embeddings().weight
    target_K = torch.from_numpy(batch.target_K).to(model.device)
    return head.logprobs(states(model, batch), weight_VD, target_K, softcap=head.softcap(model))


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(K, D) last hidden states of the positions that predict a batch's supervised tokens."""
    device = model.device
    prefix = int(batch.prefix_P.size)
    rows = Rows(batch.lengths_B.tolist(), prefix=prefix, device=device)
    hidden_TD = hidden_states(model, np.concatenate([batch.prefix_P, batch.tokens_T]), rows)
    return hidden_TD[torch.from_numpy(batch.predict_K).to(device) + prefix]


def _cross_entropy(model: PreTrainedModel, batch: Batch, stage: Stage) -> tuple[Tensor, int]:
    return (supervised.dft if stage.dft else supervised.cross_entropy)(logprobs(model, batch))


def _constrained(model: PreTrainedModel, batch: Batch, stage: Stage) -> tuple[Tensor, int]:
    beta_K = supervised.constraint(_column(model, batch, logps.PLACES))
    return supervised.constrained(logprobs(model, batch), _column(model, batch, logps.REFERENCE_LOGPS), beta_K)


def _distill(model: PreTrainedModel, batch: Batch, stage: Stage) -> tuple[Tensor, int]:
    teacher_KC = _column(model, batch, logps.TEACHER_LOGPS)

    def loss(student_kC: Tensor, chunk: slice) -> Tensor:
        return supervised.jsd(student_kC, teacher_KC[chunk], beta=stage.beta)[0]

    return _column_loss(model, batch, loss, stage.temperature)


def _self_distill(model: PreTrainedModel, batch: Batch, stage: Stage) -> tuple[Tensor, int]:
    teacher_KC, drawn_K = (_column(model, batch, n) for n in (logps.TEACHER_LOGPS, logps.DRAWN_LOGPS))

    def loss(student_kC: Tensor, chunk: slice) -> Tensor:
        return supervised.self_distillation(
            student_kC, teacher_KC[chunk], student_kC[:, 0], drawn_K[chunk], clip=stage.ratio_clip
        )[0]

    return _column_loss(model, batch, loss, stage.temperature)


def _column_loss(model: PreTrainedModel, batch: Batch, loss: head.ColumnLoss, temperature: float) -> tuple[Tensor, int]:
    ids_KC = _column(model, batch, logps.TEACHER_IDS).long()
    weight_VD, softcap = model.get_output_embeddings().weight, head.softcap(model)
    hidden_KD = states(model, batch)
    return head.column_loss(hidden_KD, weight_VD, ids_KC, loss, softcap=softcap, temperature=temperature), len(ids_KC)


def _column(model: PreTrainedModel, batch: Batch, name: str) -> Tensor:
    return torch.from_numpy(batch.columns[name]).to(model.device)


LOSSES: dict[str, Callable[[PreTrainedModel, Batch, Stage], tuple[Tensor, int]]] = {
    "sft": _cross_entropy,
    "cpt": _cross_entropy,
    "constrained-sft": _constrained,
    "distill": _distill,
    "self-distill": _self_distill,
}


@torch.no_grad()
def _poisoned(model: PreTrainedModel, rows: Sequence[Row], prefix: int, stage: Stage) -> list[Row]:
    """The rows whose own loss is not finite; where each one's is, all of them."""

    def alone(row: Row) -> float:
        return float(LOSSES[stage.method](model, batches.layout([row], prefix), stage)[0])

    return [r for r in rows if not math.isfinite(alone(r))] or list(rows)


def _not_finite(loss: float, norm: float, step: int, rows: Sequence[Row]) -> NumericError:
    """The error for a step that would have poisoned the weights; they stay as they were."""
    shown = ", ".join(r.id for r in rows[:_SHOWN]) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
    return NumericError(
        f"the loss ({loss}) or its gradient ({norm}) is not finite in step {step + 1}; the step was not applied",
        where=f"rows {shown}",
        fix="where few rows are named, look at them; else lower train.learning_rate, or set machine.dtype to fp32",
    )
