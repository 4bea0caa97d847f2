"""Answers from a model: batched decoding with a cache, the shared beginning of all prompts computed once.

A row's answer depends on its own prompt and seed alone; batching changes rounding and nothing else (in float32 the
ids are equal to one-by-one decoding). Rows are grouped by length, prompts go through the same attention as training,
and finished rows leave their batch once they are many: matrix kernels are made anew for every new number of rows.

Shape legend: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from metier.errors import DataError
from metier.models import head, load
from metier.models.attention import Cache, Prefix, Rows, Step, hidden_states
from metier.models.schema import Grammar

ROWS = 128
CACHE_TOKENS = 49_152
LEAVE_BELOW = 0.7
PROMPT_TOKENS = 3072
SHARE_FROM = 8


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are drawn. Temperature 0 is greedy; `seed` matters above it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer: its ids without the stop token, how it ended, and its share of the batch's wall time."""

    ids: list[int]
    finish: str
    seconds: float


def batches(prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[list[int]]:
    """Indices of the prompts, grouped by length; a function of the lengths alone, so a resumed proof groups alike."""
    shared = common_prefix(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: (-prompts[i].size, i))
    groups: list[list[int]] = []
    for index in by_length:
        full = not groups or len(groups[-1]) == ROWS
        slots = 0 if full else prompts[groups[-1][0]].size - shared + max_new_tokens
        if full or (len(groups[-1]) + 1) * slots > CACHE_TOKENS:
            groups.append([])
        groups[-1].append(index)
    return groups


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Leading tokens that all prompts share, leaving each at least one of its own; 0 where it would not pay."""
    first = min(prompts, key=len)[:-1]
    for prompt in prompts:
        same = first == prompt[: first.size]
        first = first if same.all() else first[: int(np.argmin(same))]
    return int(first.size) if first.size >= SHARE_FROM and len(prompts) > 1 else 0


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    stop_ids: frozenset[int],
    decoding: Decoding,
    *,
    grammar: Grammar | None = None,
    skip: frozenset[int] = frozenset(),
) -> Iterator[list[tuple[int, Generated]]]:
    """Yields (index, answer) pairs a batch at a time; batches whose prompts are all in `skip` are passed over.

    With `grammar`, an answer that stops is valid against its schema.
    """
    groups = [g for g in batches(prompts, decoding.max_new_tokens) if not skip.issuperset(g)]
    if not groups:
        return
    longest, context = max(p.size for p in prompts) + decoding.max_new_tokens, load.context(model)
    if longest > context:
        raise DataError(
            f"a prompt with room for its answer has {longest:,} tokens, and this model's context {context:,}",
            where="prove.max_new_tokens",
            fix="lower it or task.shots, or use a base with a longer context",
        )
    shared = common_prefix(prompts)
    cache = Cache()
    if shared:
        hidden_states(model, prompts[0][:shared], Prefix(shared, cache, model.device))
    for group in groups:
        start = time.perf_counter()
        draw = _Draw(decoding, group, grammar)
        answers = _decode(model, [prompts[i][shared:] for i in group], draw, cache, stop_ids)
        seconds = (time.perf_counter() - start) / len(group)
        yield [(i, Generated(ids, finish, seconds)) for i, (ids, finish) in zip(group, answers, strict=True)]


def _decode(
    model: PreTrainedModel,
    tails: list[np.ndarray],
    draw: _Draw,
    cache: Cache,
    stop_ids: frozenset[int],
) -> list[tuple[list[int], str]]:
    lengths = [t.size for t in tails]
    cache.open_rows(len(tails), max(lengths) + draw.decoding.max_new_tokens)
    hidden_BD = torch.cat([_read(model, part, cache) for part in _parts(tails)])
    answers: list[list[int]] = [[] for _ in tails]
    finish = ["length"] * len(tails)
    alive = list(range(len(tails)))
    ended: set[int] = set()
    filled_B = torch.tensor(lengths, device=model.device)
    for position in range(draw.decoding.max_new_tokens):
        token_B = draw(head.logits(model, hidden_BD), alive, position)
        for row, token in zip(alive, token_B.tolist(), strict=True):
            if row in ended:
                continue
            if token in stop_ids:
                finish[row] = "stop"
                ended.add(row)
            else:
                answers[row].append(token)
        if len(ended) == len(tails) or position + 1 == draw.decoding.max_new_tokens:
            break
        going = [place for place, row in enumerate(alive) if row not in ended]
        if len(going) <= LEAVE_BELOW * len(alive):
            keep = torch.tensor(going, device=model.device)
            cache.select(keep)
            token_B, filled_B = token_B[keep], filled_B[keep]
            alive = [alive[p] for p in going]
        hidden_BD = hidden_states(model, token_B, Step(cache, filled_B))
        filled_B = filled_B + 1
    return list(zip(answers, finish, strict=True))


def _parts(tails: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Consecutive rows of at most `PROMPT_TOKENS` tokens together (or one row)."""
    part: list[np.ndarray] = []
    for tail in tails:
        if part and sum(t.size for t in part) + tail.size > PROMPT_TOKENS:
            yield part
            part = []
        part.append(tail)
    yield part


def _read(model: PreTrainedModel, tails: list[np.ndarray], cache: Cache) -> Tensor:
    """Reads some rows' prompts into the cache; the states (rows, D) of their last tokens."""
    lengths = [t.size for t in tails]
    rows = Rows(lengths, prefix=0, device=model.device, cache=cache)
    hidden_TD = hidden_states(model, np.concatenate(tails), rows)
    cache.kept(len(tails))
    return hidden_TD[torch.tensor(np.cumsum(lengths) - 1, device=model.device)]


class _Draw:
    """The next token of each row: the likeliest, or one drawn with the row's own random numbers."""

    def __init__(self, decoding: Decoding, indices: Sequence[int], grammar: Grammar | None = None) -> None:
        self.decoding, self.indices = decoding, indices
        self.states = grammar.rows(len(indices)) if grammar else None

    def __call__(self, logits_BV: Tensor, alive: Sequence[int], position: int) -> Tensor:
        if self.states is None:
            return self._choose(logits_BV, alive, position)
        self.states.forbid(logits_BV, alive)
        token_B = self._choose(logits_BV, alive, position)
        self.states.take(token_B.tolist(), alive)
        return token_B

    def _choose(self, logits_BV: Tensor, alive: Sequence[int], position: int) -> Tensor:
        if self.decoding.temperature == 0:
            return logits_BV.argmax(-1)
        probs = (logits_BV / self.decoding.temperature).softmax(-1)
        sorted_BV, token_BV = probs.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        kept_BV = sorted_BV.masked_fill(before_BV >= self.decoding.top_p, 0)
        uniform = torch.tensor([_uniform(self.decoding.seed, self.indices[r], position) for r in alive])
        point = uniform.to(kept_BV)[:, None] * kept_BV.sum(-1, keepdim=True)
        chosen = (kept_BV.cumsum(-1) <= point).sum(-1, keepdim=True).clamp_(max=kept_BV.shape[-1] - 1)
        return token_BV.gather(1, chosen)[:, 0]


def _uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that belongs to (seed, row, position), whatever else is in the batch."""
    key = hashlib.sha256(f"draw:{seed}:{row}:{position}".encode()).digest()
    return int.from_bytes(key[:6], "big") / 2**48
