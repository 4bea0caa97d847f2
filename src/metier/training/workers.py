"""The same training on a Ray cluster: plain actors, one for each process of the world.

The driver does the act, as a process alone does: it holds the run folder, decides, and publishes. Each worker sets the
variables that `torchrun` would and runs `training.run.train`; the first one writes into the driver's working folder, so
every node must see the specialist, the run folder and the base under the same paths, and have the same Metier. A worker
that ends ends the others: Ray is not asked to start it again, because the run goes on from its own checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metier import config, progress, runs
from metier.config import Loaded
from metier.errors import ConfigError, MetierError, ResourceError, Terminated, needs_extra, recorded
from metier.runs import Run
from metier.training import world

GRACE_SECONDS = 20.0
STOPPED = "stopped"
Place = tuple[str, str, int, int]


class Worker:
    """One process of the world; its methods run on whatever node Ray gave it."""

    def place(self) -> Place:
        """(node, address, a free port, process id) of this worker."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port, os.getpid()

    def train(
        self, environment: dict[str, str], quiet: bool, spec: dict[str, Any], folder: str, run: str, work: str
    ) -> dict[str, Any]:
        """What training came to: its figures, or the record of an error, or that it was stopped."""
        os.environ |= environment
        progress.quiet = quiet or world.follows()
        from metier.training import run as training

        try:
            loaded = Loaded(spec=config.validate(spec, f"{run}/specialist.yaml"), folder=Path(folder))
            if not world.follows():
                return {"figures": training.train(loaded, Run(Path(run)), Path(work))}
            with tempfile.TemporaryDirectory(prefix="metier-") as scratch:
                return {"figures": training.train(loaded, Run(Path(run)), Path(scratch))}
        except MetierError as error:
            return {"error": error.record()}
        except (KeyboardInterrupt, Terminated):
            return {STOPPED: True}


def train(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    """Trains into `work` with `machine.workers` processes on a Ray cluster; the figures are the first one's."""
    if importlib.util.find_spec("ray") is None:
        raise needs_extra("ray", "scale")
    if world.launched():
        raise ConfigError(
            "torchrun and machine.on: ray each start the processes", where="machine.on", fix="use one of the two"
        )
    spec, paths = config.tree(loaded.spec), [str(p) for p in (loaded.folder, run.folder.resolve(), work.resolve())]
    with _cluster(), _workers(loaded) as (workers, places), runs.stoppable() as stop:
        environments = _environments(places)
        tasks = [w.train.remote(e, progress.quiet, spec, *paths) for w, e in zip(workers, environments, strict=True)]
        found = _wait(tasks, places, stop)
        stop.check()
    if STOPPED in found:
        raise Terminated
    if "error" in found:
        raise recorded(found["error"])
    return dict(found["figures"])


def _wait(tasks: list[Any], places: list[Place], stop: runs.Stop) -> dict[str, Any]:
    """The first worker's result once all have ended; where one fails, the first failure, and the others' end."""
    import ray

    pending, told = list(tasks), False
    while pending:
        if stop.signal and not told:
            _terminate(places)
            told = True
        done, pending = ray.wait(pending, timeout=0.2)
        found = [_result(task, tasks.index(task)) for task in done]
        if failed := next((f for f in found if "error" in f), None):
            ray.wait(pending, num_returns=len(pending), timeout=GRACE_SECONDS) if pending else None
            return failed
    return _result(tasks[0], 0)


def _result(task: Any, rank: int) -> dict[str, Any]:
    import ray

    try:
        return dict(ray.get(task))
    except ray.exceptions.RayError as lost:
        error = ResourceError(
            f"worker {rank} ended: {str(lost).splitlines()[0][:200]}",
            where="machine.workers",
            fix="see its log; the same command goes on from the last checkpoint",
        )
        return {"error": error.record()}


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """A connection to the cluster that RAY_ADDRESS names or that runs here, or one on this machine for the meantime."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(include_dashboard=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster: {str(error).splitlines()[0][:200]}",
            where="machine.on",
            fix="check RAY_ADDRESS, or unset it to start Ray on this machine",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _workers(loaded: Loaded) -> Iterator[tuple[list[Any], list[Place]]]:
    """The workers and where they are, each with its GPU where the cluster has them, or its share of cores."""
    import ray

    settings = loaded.spec.machine
    total = ray.cluster_resources()
    cuda = settings.device == "cuda" or (settings.device == "auto" and total.get("GPU", 0) > 0)
    need = {"GPU": 1.0} if cuda else {"CPU": float(max(1, settings.threads))}
    for name, amount in need.items():
        if total.get(name, 0) < amount * settings.workers:
            raise ResourceError(
                f"{settings.workers} workers need {amount * settings.workers:.0f} {name}, "
                f"the cluster has {total.get(name, 0):.0f}",
                where="machine.workers",
                fix="use fewer workers or threads, or a larger cluster",
            )
    actor = ray.remote(num_cpus=need.get("CPU", 0), num_gpus=need.get("GPU", 0))(Worker)
    workers = [actor.remote() for _ in range(settings.workers)]
    try:
        yield workers, ray.get([w.place.remote() for w in workers], timeout=settings.timeout_seconds)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            "the cluster did not start the workers in time",
            where="machine.workers",
            fix="wait until it has room, use fewer workers, or raise machine.timeout_seconds",
        ) from error
    finally:
        for worker in workers:
            ray.kill(worker)


def _environments(places: list[Place]) -> list[dict[str, str]]:
    """What `torchrun` would set for each worker."""
    nodes = [node for node, *_ in places]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(nodes[:rank].count(node)),
            "LOCAL_WORLD_SIZE": str(nodes.count(node)),
            "MASTER_ADDR": places[0][1],
            "MASTER_PORT": str(places[0][2]),
        }
        for rank, node in enumerate(nodes)
    ]


def _terminate(places: list[Place]) -> None:
    """SIGTERM for every worker, on its own node: it stops at the next step edge with a checkpoint."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kill = ray.remote(num_cpus=0)(os.kill)
    for node, _, _, process in places:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        kill.options(scheduling_strategy=there).remote(process, signal.SIGTERM)
