"""Frozen weights in 4 or 8 bits, and the full weight again when a product needs it.

`nf4` is the 4-bit NormalFloat of QLoRA with its scales quantised once more; `int8` is one scale a row. Only what is
frozen is ever quantised: nothing here has a gradient. Everything works in pieces that fit a cache and writes into
buffers that are used again, so that the memory of a model is that of its codes and one full weight.

Shape legend: O outputs, I inputs, N blocks of `BLOCK` weights (row by row, the last one filled up with zeros), M blocks
of `SCALE_BLOCK` scales.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["nf4", "int8"]
BLOCK, SCALE_BLOCK = 64, 256
BITS = {"nf4": 4 + 8 / BLOCK + 32 / (BLOCK * SCALE_BLOCK), "int8": 8}
"""Bits a weight; the one scale of each `int8` row is left out."""
PIECE = {"cpu": 4096, "other": 1 << 18}
CELLS = 16
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et al. 2023, appendix E)."""


class Scratch:
    """Buffers for full weights, used again and again: a model needs as many as it has full weights at one time."""

    def __init__(self) -> None:
        self._free: dict[torch.dtype, list[Tensor]] = {}

    @contextlib.contextmanager
    def lent(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """A buffer of this shape, until the block ends."""
        free = self._free.setdefault(dtype, [])
        buffer = free.pop() if free else None
        if buffer is None or buffer.numel() < shape.numel():
            with torch.inference_mode(False):  # a buffer made while validating must serve training too
                buffer = torch.empty(shape.numel(), dtype=dtype, device=device)
        try:
            yield buffer[: shape.numel()].view(shape)
        finally:
            free.append(buffer)


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantised(ABC):
    """A frozen (O, I) weight in few bits."""

    requires_grad: ClassVar[bool] = False
    shape: torch.Size
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def full(self, dtype: torch.dtype) -> Tensor:
        """(O, I): the weight that the codes stand for, computed in float32 and rounded once to `dtype`."""
        out_OI = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.write(out_OI)
        return out_OI

    @contextlib.contextmanager
    def lent(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """`full(dtype)` in a buffer that is used again after the block: keep no part of it."""
        with self.scratch.lent(self.shape, dtype, self.device) as out_OI:
            self.write(out_OI)
            yield out_OI

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def write(self, out_OI: Tensor) -> None:
        """Puts the full weight into a contiguous (O, I)."""


Weight = Tensor | Quantised


def lent(weight: Weight, dtype: torch.dtype) -> contextlib.AbstractContextManager[Tensor]:
    """The full (O, I) weight inside the block, whatever it is kept as; keep no part of it."""
    return contextlib.nullcontext(weight) if isinstance(weight, Tensor) else weight.lent(dtype)


def quantised(weight_OI: Tensor, kind: Kind, scratch: Scratch | None = None) -> Quantised:
    """The weight in few bits; finite numbers of any float dtype."""
    make = {"nf4": Nf4.of, "int8": Int8.of}[kind]
    return make(weight_OI, scratch or Scratch())


@dataclass(frozen=True, eq=False, kw_only=True)
class Nf4(Quantised):
    """4-bit NormalFloat with double quantisation (Dettmers et al. 2023, §3): 4.127 bits a weight.

    A block of 64 weights is divided by its largest magnitude and rounded to the nearest of 16 levels, two codes a byte,
    the earlier weight in the high bits. The magnitudes, less their mean, are quantised in blocks of 256 with the 8-bit
    dynamic code.
    """

    codes: Tensor  # (N · 32,) uint8
    scale_codes_N: Tensor  # uint8
    scale_scales_M: Tensor  # float32
    mean: Tensor  # () float32

    @classmethod
    def of(cls, weight_OI: Tensor, scratch: Scratch) -> Nf4:
        flat = weight_OI.reshape(-1)
        blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        found = [_nf4_codes(piece.float()) for piece in blocks.split(_piece(blocks.device))]
        largest_N = torch.cat([largest for _, largest in found])
        scale_codes_N, scale_scales_M, mean = _scale_codes(largest_N)
        return cls(
            shape=weight_OI.shape,
            scratch=scratch,
            codes=torch.cat([codes for codes, _ in found]),
            scale_codes_N=scale_codes_N,
            scale_scales_M=scale_scales_M,
            mean=mean,
        )

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scale_codes_N, self.scale_scales_M, self.mean))

    def write(self, out_OI: Tensor) -> None:
        pairs, dynamic = _pairs(self.device), dynamic_code(self.device)
        out = out_OI.view(-1)
        piece = _piece(self.device)
        scales_N = _repeated(self.scale_scales_M, len(self.scale_codes_N))
        for at in range(0, len(self.scale_codes_N), piece):
            blocks = slice(at, at + piece)
            scale = dynamic.index_select(0, self.scale_codes_N[blocks].int()).mul_(scales_N[blocks]).add_(self.mean)
            codes = self.codes[at * BLOCK // 2 : (at + piece) * BLOCK // 2]
            values = (
                pairs.index_select(0, codes.int()).view(torch.float32).view(-1, BLOCK).mul_(scale[:, None]).view(-1)
            )
            target = out[at * BLOCK : (at + piece) * BLOCK]
            target.copy_(values[: target.numel()])


@dataclass(frozen=True, eq=False, kw_only=True)
class Int8(Quantised):
    """8-bit integers, one scale a row: the row's largest magnitude is 127 (round half to even)."""

    codes_OI: Tensor  # int8
    scale_O: Tensor  # float32

    @classmethod
    def of(cls, weight_OI: Tensor, scratch: Scratch) -> Int8:
        rows = _rows(weight_OI.shape[1], weight_OI.device)
        found = [_int8_codes(piece.float()) for piece in weight_OI.split(rows)]
        return cls(
            shape=weight_OI.shape,
            scratch=scratch,
            codes_OI=torch.cat([codes for codes, _ in found]),
            scale_O=torch.cat([scale for _, scale in found]),
        )

    @property
    def device(self) -> torch.device:
        return self.codes_OI.device

    @property
    def nbytes(self) -> int:
        return self.codes_OI.nbytes + self.scale_O.nbytes

    def write(self, out_OI: Tensor) -> None:
        rows = _rows(self.shape[1], self.device)
        for out, codes, scale in zip(
            out_OI.split(rows), self.codes_OI.split(rows), self.scale_O.split(rows), strict=True
        ):
            out.copy_(codes.float().mul_(scale[:, None]))


@dataclass(frozen=True, eq=False, kw_only=True)
class SideBySide(Quantised):
    """Weights that read the same input, one below the other, as one (O, I)."""

    parts: tuple[Quantised, ...]

    @classmethod
    def of(cls, parts: Sequence[Quantised]) -> SideBySide:
        shape = torch.Size((sum(part.shape[0] for part in parts), parts[0].shape[1]))
        return cls(shape=shape, scratch=parts[0].scratch, parts=tuple(parts))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def write(self, out_OI: Tensor) -> None:
        for part, rows in zip(self.parts, out_OI.split([part.shape[0] for part in self.parts]), strict=True):
            part.write(rows)


def measured_speed(kind: Kind, dtype: torch.dtype, device: torch.device) -> float:
    """Weights a second that become full: the best of a few tries, because whatever else runs can only slow one down."""
    weight = quantised(torch.linspace(-1, 1, 2048 * 2048, device=device).view(2048, 2048), kind)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with weight.lent(dtype) as w_OI:
            w_OI[-1, -1].item()  # waits for a device that works on its own
        seconds.append(time.perf_counter() - start)
    return weight.shape.numel() / min(seconds)


def _nf4_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes (n · 32,) and largest magnitudes (n,) of float32 blocks (n, 64)."""
    largest = blocks.abs().amax(1)
    scaled = blocks / torch.where(largest == 0, 1, largest)[:, None]
    code = _nearest(scaled.view(-1)).view(-1, 2)
    return code[:, 0] << 4 | code[:, 1], largest


def _nearest(scaled: Tensor) -> Tensor:
    """uint8 number of the nearest level for each of flat numbers in [-1, 1]; the lower one where two are as near."""
    below, middle = _cells(scaled.device)
    cell = (scaled * CELLS + CELLS).int()
    return below.index_select(0, cell).add_(scaled > middle.index_select(0, cell))


@cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """The middles between levels below each of 2 · `CELLS` + 1 even cells, and the one inside it (or infinity).

    No cell holds two, so one comparison finds the nearest level: several times faster than a binary search.
    """
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(-CELLS, CELLS + 2) / CELLS
    below = torch.searchsorted(middles, edges)
    inside = torch.where(below[1:] > below[:-1], F.pad(middles, (0, 1))[below[:-1]], torch.inf)
    return below[:-1].to(torch.uint8).to(device), inside.to(device)


def _scale_codes(largest_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes in 8 bits: codes (N,), the scale of each block of them (M,), and their mean, which is taken off."""
    mean = largest_N.mean()
    blocks = F.pad(largest_N - mean, (0, -len(largest_N) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scale_M = blocks.abs().amax(1)
    dynamic = dynamic_code(largest_N.device)
    scaled = blocks / torch.where(scale_M == 0, 1, scale_M)[:, None]
    code = torch.bucketize(scaled, (dynamic[1:] + dynamic[:-1]) / 2, out_int32=True)
    return code.to(torch.uint8).view(-1)[: len(largest_N)].clone(), scale_M, mean


def _int8_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(1) / 127
    return (rows / torch.where(scale == 0, 1, scale)[:, None]).round_().to(torch.int8), scale


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """(256,) rising float32 levels in (-1, 1], dense around zero: the dynamic 8-bit code.

    Each of seven decimal places holds as many even steps as its remaining bits tell apart, a step standing for its
    middle; zero and one are added (Dettmers 2016, §2.1; Dettmers et al. 2022, §2).
    """
    positive = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (bits - 6))
    middles = torch.cat(positive)
    return torch.cat([-middles, middles, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,): both levels of a byte as one 64-bit number, so that one look-up gives two weights."""
    levels = torch.tensor(LEVELS)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).view(torch.int64).view(-1).to(device)


def _piece(device: torch.device) -> int:
    """Blocks worked on at once: what fits a CPU's cache, more where a launch costs more than memory."""
    return PIECE["cpu" if device.type == "cpu" else "other"]


def _rows(inputs: int, device: torch.device) -> int:
    return max(1, _piece(device) * BLOCK // inputs)


def _repeated(scale_M: Tensor, count: int) -> Tensor:
    return scale_M.repeat_interleave(SCALE_BLOCK)[:count]
