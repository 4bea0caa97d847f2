"""What this machine can do for Metier, in words and as numbers."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from typing import Any

from metier import fetch, machine, runs
from metier.models import load

EXTRAS = {
    "train": ("torch", "transformers", "gguf", "llguidance"),
    "rag": ("bm25s",),
    "report": ("matplotlib",),
    "scale": ("ray",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def examine(version: str) -> dict[str, Any]:
    """Cores, memory, disk, number formats, devices, caches and extras of this machine."""
    cache = fetch.cache_dir()
    found: dict[str, Any] = {
        "metier": version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": machine.cores(),
        "memory_gb": round(machine.memory_gb(), 1),
        "cache": {
            "folder": str(cache),
            "free_gb": round(shutil.disk_usage(runs.existing(cache)).free / 1e9, 1),
            "bases": {name: _converted(name) for name in load.EMBEDDED},
        },
        "extras": {extra: _missing(modules) for extra, modules in EXTRAS.items()},
    }
    found["torch"] = _torch() if not found["extras"]["train"] else None
    return found


def words(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [
        f"Metier {found['metier']}, Python {found['python']}, {found['system']}",
        f"{found['cores']} cores, {found['memory_gb']} GB of memory",
        f"cache {found['cache']['folder']}, {found['cache']['free_gb']} GB free",
    ]
    for name, there in found["cache"]["bases"].items():
        lines.append(
            f"base {name}: {'ready' if there else 'is fetched on first use'} ({load.EMBEDDED[name].megabytes} MB)"
        )
    for extra, missing in found["extras"].items():
        lines.append(
            f"extra {extra}: ready"
            if not missing
            else f'extra {extra}: {", ".join(missing)} missing; run: pip install "metier[{extra}]"'
        )
    torch = found["torch"]
    if torch:
        lines.append(f"torch {torch['version']}, {torch['threads']} threads, devices: {', '.join(torch['devices'])}")
        speeds = torch["gflops"]
        lines.append(
            f"CPU: bf16 {speeds['bf16']:,.0f} GFLOP/s, fp32 {speeds['fp32']:,.0f} GFLOP/s: "
            f"training on it uses {torch['cpu_dtype']}"
        )
    return lines


def _torch() -> dict[str, Any]:
    import torch

    machine.prepare()
    devices = ["cpu"] + [f"cuda ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": devices,
        "gflops": machine.gflops(),
        "cpu_dtype": str(machine.dtype("auto", torch.device("cpu"))).removeprefix("torch."),
    }


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [m for m in modules if importlib.util.find_spec(m) is None]


def _converted(name: str) -> bool:
    return load.embedded_folder(name).is_dir()
