"""The processes that train together: who they are, what they add up, and how they end.

One process is a world of its own, and everything here then returns at once. `torchrun`, or whatever else sets RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT, makes a larger one. Its first process does the act: it holds the run folder,
decides whether anything is due, writes and publishes. The others wait until it calls them, train along in a scratch
folder of their own, and write nothing that is kept.

Every process reads the same rows and deals them the same way, so what a step learns from does not depend on how many
they are. Only plain numbers and JSON cross between them, never a pickle.

Shape legend: N numbers, R ranks, S = N / R rounded up.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from metier import runs
from metier.errors import ConfigError, ResourceError, RunError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store
    from transformers import PreTrainedModel

PIECE = 1 << 24
_CALL, _TRAIN, _NOTHING = "metier-call", b"train", b"nothing"
_POLL_SECONDS, _HEARING = 0.1, datetime.timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class World:
    """A process among `size`, numbered from 0; `sharded` where the frozen base is spread over all of them."""

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and publishes."""
        return self.rank == 0

    def total(self, *values: float) -> tuple[float, ...]:
        """Each value summed over all ranks, in float64 and in the order of ranks; counts below 2^53 stay exact."""
        return values if self.size == 1 else tuple(sum(column) for column in zip(*self._all(values), strict=True))

    def most(self, value: int) -> int:
        """The largest value of any rank."""
        return value if self.size == 1 else int(max(row[0] for row in self._all((value,))))

    def add(self, sum_N: torch.Tensor) -> None:
        """Sums a tensor over all ranks, in place.

        Each number is added up by one rank, in the order of ranks, and sent to the others. So the result depends on the
        number of ranks alone, not on a backend's algorithm, and is the same on all of them, bit for bit; the traffic is
        that of a ring.
        """
        if self.size > 1:
            for piece_N in sum_N.split(PIECE):
                _add(piece_N, self.size)

    def told(self, made: Callable[[], Any]) -> Any:
        """What `made` gives on the first rank, a JSON value, on every rank; the others do not call it."""
        if self.size == 1:
            return made()
        import torch
        from torch import distributed

        text = json.dumps(made(), allow_nan=False).encode() if self.writes else b""
        length = torch.tensor([len(text)])
        distributed.broadcast(length, 0)
        payload = torch.zeros(int(length), dtype=torch.uint8)
        if self.writes:
            payload = torch.tensor(list(text), dtype=torch.uint8)
        distributed.broadcast(payload, 0)
        return json.loads(payload.numpy().tobytes())

    def copy(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """The first rank's CPU tensors, on every rank."""
        if self.size == 1:
            return tensors
        import torch
        from torch import distributed

        shapes = self.told(
            lambda: None if tensors is None else {k: [str(v.dtype), *v.shape] for k, v in tensors.items()}
        )
        if shapes is None:
            return None
        own = tensors or {}
        for name, (kind, *shape) in shapes.items():
            if not self.writes:
                own[name] = torch.empty(shape, dtype=getattr(torch, kind.removeprefix("torch.")))
            distributed.broadcast(own[name], 0)
        return own

    @contextlib.contextmanager
    def in_turns(self) -> Iterator[None]:
        """Lets the first process through, then one of each machine, then the others: whether machines share a cache or
        each has its own, those that come later find in it what an earlier one left."""
        turn = 0 if self.rank == 0 else 1 if _number("LOCAL_RANK") == 0 else 2
        for _ in range(turn):
            self.total(0)
        yield
        for _ in range(2 - turn):
            self.total(0)

    def hold_alike(self, facts: dict[str, Any]) -> None:
        """Refuses a world whose processes were started with different settings, data or versions; `facts` are JSON."""
        if self.size == 1:
            return
        mine = {name: runs.digest(value) for name, value in facts.items()}
        first = self.told(lambda: mine)
        strange = [self.rank if mine.get(name) != first[name] else -1 for name in first]
        for name, rank in zip(first, (max(row) for row in zip(*self._all(strange), strict=True)), strict=True):
            if rank >= 0:
                raise RunError(
                    f"the processes differ in their {name}: rank {int(rank)} has another than rank 0",
                    where=name,
                    fix="start all with the same command, the same version, and the same specialist and run folder",
                )

    def _all(self, values: Sequence[float]) -> list[list[float]]:
        """What each rank gave, in the order of ranks."""
        import torch
        from torch import distributed

        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own)
        return [row.tolist() for row in found]


ALONE = World()


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def follows() -> bool:
    """Whether another process of this world holds the run."""
    return launched() and _number("RANK") > 0


def beside() -> int:
    """Processes of this world that share this machine's cores."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)) if launched() else 1


def called() -> bool:
    """Waits for the first process; True where it trains, False where nothing is due or it failed before."""
    with _lost():
        while not _store().check([_CALL]):
            time.sleep(_POLL_SECONDS)
        call = _store().get(_CALL)
        _store().set(_heard(_number("RANK")), "yes")
        return call == _TRAIN


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """The first process's work on a run; the others are let go at its end, if they were not called."""
    if not launched():
        yield
        return
    store = _store()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            store.compare_set(_CALL, "", _NOTHING.decode())
            # torchrun keeps the store; one that lives in this process must not end before the others have heard.
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                store.wait([_heard(rank) for rank in range(1, _number("WORLD_SIZE"))], _HEARING)


@contextlib.contextmanager
def joined(device: torch.device, timeout_seconds: float) -> Iterator[World]:
    """The world of this process, for as long as it trains.

    The end of any process ends the others: with an error at once where a connection breaks, and after
    `timeout_seconds` where one no longer answers.
    """
    if not launched():
        yield ALONE
        return
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if device.type == "cuda":
        torch.cuda.set_device(_number("LOCAL_RANK") % torch.cuda.device_count())
    store = _store()
    if rank == 0:
        store.set(_CALL, _TRAIN.decode())
    with _lost():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("metier", store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        try:
            yield World(rank, size)
        finally:
            distributed.destroy_process_group()


def place(world: World, model: PreTrainedModel, device: torch.device, *, sharded: bool) -> World:
    """Puts the model on the device: whole, or spread over all ranks."""
    if sharded:
        return shard(world, model, device)
    from metier.models.block import Block

    if model.device.type != device.type:
        model.to(device)
        for layer in model.get_decoder().layers:
            if isinstance(layer, Block):
                layer.lay_out()
    return world


def shard(world: World, model: PreTrainedModel, device: torch.device) -> World:
    """Spreads the frozen weights of every decoder layer over all ranks with FSDP2 (Zhao et al. 2023).

    A layer's weights are gathered when it is computed and let go after. What is trained, embeddings, norms outside the
    layers and the head stay whole on every rank; so gradients are added up as in a world that is not sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()
    if not any(p.dim() == 2 and not p.requires_grad for p in decoder.layers.parameters()):
        raise ConfigError(
            "only frozen weights that are not quantised can be spread over processes, and this base has none",
            where="machine.shard",
            fix="set machine.shard to never, or train an adapter on a base that is not quantised",
        )
    mesh = init_device_mesh(device.type, (world.size,))
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters(recurse=True)))
    model.to(device)
    return replace(world, sharded=True)


def _add(sum_N: torch.Tensor, size: int) -> None:
    from torch import distributed
    from torch.nn import functional

    share = -(-sum_N.numel() // size)
    all_RS = functional.pad(sum_N, (0, share * size - sum_N.numel()))
    own_RS = all_RS.new_empty(share * size)
    distributed.all_to_all_single(own_RS, all_RS)
    total_S, *others = own_RS.view(size, share)
    for other_S in others:
        total_S += other_S
    distributed.all_gather(list(all_RS.view(size, share)), total_S)
    sum_N.copy_(all_RS[: sum_N.numel()])


@cache
def _store() -> Store:
    """The store through which the processes find each other: torchrun's, or one that the first process opens."""
    from torch.distributed.rendezvous import rendezvous

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE is set, {name} is not", where="environment", fix="start the processes with torchrun"
            )
    with _lost():
        store: Store = next(rendezvous("env://", _number("RANK"), _number("WORLD_SIZE")))[0]
        return store


def _heard(rank: int) -> str:
    return f"{_CALL}-{rank}"


def _number(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, not a number", where="environment", fix="start with torchrun")
    return int(value)


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """A broken or silent connection as one clear error."""
    try:
        yield
    except RuntimeError as error:
        if not _of_the_world(error):
            raise
        raise ResourceError(
            "another process of this world has ended or no longer answers",
            where=f"rank {os.environ.get('RANK')}: {str(error).splitlines()[0][:200]}",
            fix="see what it said above; the same command goes on from the last checkpoint",
        ) from error


def _of_the_world(error: RuntimeError) -> bool:
    from torch import distributed

    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in words)
