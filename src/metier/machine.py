"""What this machine can do: cores, memory, devices, and speeds that were measured once and are remembered.

Which number format is faster is measured, not assumed: without bf16 instructions a CPU multiplies bf16 matrices tens
of times slower than float32. A measurement is kept in the cache folder under the machine's key, so later runs decide
the same way and give the same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import fetch, runs
from metier.errors import ConfigError, MetierError, needs_extra

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BF16_MUST_WIN_BY = 1.05


def cores() -> int:
    """Cores this process may use: its affinity, cut by a container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        affinity = min(affinity, math.ceil(int(quota) / int(period)))
    return max(affinity, 1)


def memory_gb(where: torch.device | None = None) -> float:
    """Memory of a device; of the machine where none is given, or where the device has none of its own."""
    import psutil

    if where is not None and where.type == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(where).total_memory) / 1e9
    return float(psutil.virtual_memory().total) / 1e9


def peak_memory_gb() -> float:
    """The most memory this process has held since `forget_peak`, or since it began where that is not possible."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().split("\n")
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024 / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def forget_peak() -> None:
    """Lets `peak_memory_gb` count from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@cache
def key() -> str:
    """Names this machine, its threads and its torch for remembered measurements."""
    import torch

    return runs.digest([processor(), cores(), torch.__version__, torch.backends.cpu.get_cpu_capability()])[:16]


def processor() -> str:
    """The processor's name as it gives it."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return model


def prepare(threads: int = 0) -> None:
    """Sets threads, and keeps freed memory in the process: page faults on fresh buffers can cost more than maths."""
    import torch

    torch.set_num_threads(threads or cores())
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back() -> None:
    """Returns freed memory to the system between acts; `prepare` otherwise keeps it, so that peaks would add up."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def device(choice: str) -> torch.device:
    """The torch device of a setting; `auto` takes a GPU where there is one."""
    import_torch()
    import torch

    present = ["cpu"]
    present += ["cuda"] if torch.cuda.is_available() else []
    present += ["mps"] if torch.backends.mps.is_available() else []
    if choice == "auto":
        return torch.device(present[-1])
    if choice not in present:
        raise ConfigError(f"there is no {choice} here", where="machine.device", fix=f"use one of: {', '.join(present)}")
    return torch.device(choice)


def dtype(choice: str, where: torch.device) -> torch.dtype:
    """The number format of a setting; `auto` takes bf16 where it was measured to be faster."""
    import torch

    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if where.type == "mps":
        return torch.float32
    speeds = gflops()
    return torch.bfloat16 if speeds["bf16"] > _BF16_MUST_WIN_BY * speeds["fp32"] else torch.float32


def gflops() -> dict[str, float]:
    """Billions of operations a second of a layer-shaped matrix product, by number format: the best of several tries,
    because whatever else runs on the machine can only slow one down."""
    return dict(remembered("gflops", _measure_gflops))


def remembered(name: str, measure: Callable[[], Any]) -> Any:
    """The measurement `name` of this machine: read from the cache folder, or measured now and kept there."""
    path = fetch.cache_dir() / "machines" / f"{key()}.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(MetierError):
        known = runs.read_json(path)
    if name not in known:
        known[name] = measure()
        with runs.disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, known)
    return known[name]


def _measure_gflops() -> dict[str, float]:
    import torch

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1024, 1024, generator=generator)
    b = torch.randn(2048, 1024, generator=generator)
    speeds = {}
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = a.to(kind), b.to(kind)
        seconds = []
        for _ in range(15):
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            seconds.append(time.perf_counter() - start)
        speeds[name] = round(2 * a.numel() * b.shape[0] / min(seconds) / 1e9, 1)
    return speeds


def import_torch() -> None:
    """Says how to install torch where it is absent."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise needs_extra("torch", "train") from error
