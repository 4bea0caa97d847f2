"""The file that trains a specialist on several machines: a Kubernetes Job, or a SkyPilot task, as YAML.

Nothing is started here and no cluster is asked: the text is for a person to read, keep and hand to `kubectl` or `sky`.
Both run `metier build` and then `metier train` under `torchrun`, so every machine is part of one world.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from metier.config import Loaded
from metier.errors import ConfigError

PORT = 29500
MOUNT = "/claim"
"""Where a pod sees the claim."""
ACCELERATORS = r"[A-Za-z0-9_.-]+:[1-9][0-9]*"
_KUBERNETES_NAME = 50


@dataclass(frozen=True)
class Machines:
    """How many machines, and what each has; `accelerators` is a kind and a number, such as H100:8, or empty."""

    count: int
    cpus: int
    memory_gb: int
    accelerators: str = ""

    def __post_init__(self) -> None:
        if self.accelerators and not re.fullmatch(ACCELERATORS, self.accelerators):
            raise ConfigError(
                f"{self.accelerators!r} names no accelerators",
                where="--accelerators",
                fix="write KIND:NUMBER, as H100:8",
            )

    @property
    def processes(self) -> int:
        """Processes on each machine: one for each accelerator, or one that uses all cores."""
        return int(self.accelerators.partition(":")[2] or 1)


def kubernetes(loaded: Loaded, machines: Machines, settings: Sequence[str], *, image: str, claim: str) -> str:
    """An indexed Job and the headless Service by which its pods find the first one.

    `claim` is a PersistentVolumeClaim that all pods may write (ReadWriteMany); it holds the specialist's folder, and
    the run folder in `runs/`. Pods run without privileges. One that is stopped has a minute, of which `torchrun` gives
    its processes 30 seconds to reach a step edge.
    """
    name = _kubernetes_name(loaded.spec.name)
    labels = {"app.kubernetes.io/name": "metier", "app.kubernetes.io/instance": name}
    script = _script(
        f"{MOUNT}/{loaded.folder.name}",
        f"{MOUNT}/runs",
        machines,
        settings,
        rank="$JOB_COMPLETION_INDEX",
        first=f"{name}-0.{name}",
        build='if [ "$JOB_COMPLETION_INDEX" = 0 ]; then\n  {build}\nfi',
    )
    limits: dict[str, Any] = {"cpu": machines.cpus, "memory": f"{machines.memory_gb}G"}
    if machines.accelerators:
        limits["nvidia.com/gpu"] = machines.processes
    container = {
        "name": "train",
        "image": image,
        "command": ["/bin/sh", "-c", script],
        "env": [{"name": "METIER_CACHE", "value": f"{MOUNT}/cache"}, {"name": "HOME", "value": MOUNT}],
        "resources": {"requests": limits, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "claim", "mountPath": MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "claim", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "torchrun", "port": PORT}],
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completions": machines.count,
            "parallelism": machines.count,
            "completionMode": "Indexed",
            "backoffLimit": 3 * machines.count,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return _text(service, job)


def skypilot(loaded: Loaded, machines: Machines, settings: Sequence[str], *, version: str) -> str:
    """A task that sends the specialist's folder to every node; each builds the data set, which comes out alike.

    The run folder is on the first node's disk, in `~/runs`.
    """
    script = _script(
        ".",
        "~/runs",
        machines,
        settings,
        rank="$SKYPILOT_NODE_RANK",
        first='"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
        build="{build}",
    )
    resources: dict[str, Any] = {"cpus": f"{machines.cpus}+", "memory": f"{machines.memory_gb}+"}
    if machines.accelerators:
        resources["accelerators"] = machines.accelerators
    return _text(
        {
            "name": _kubernetes_name(loaded.spec.name),
            "num_nodes": machines.count,
            "resources": resources,
            "workdir": str(loaded.folder),
            "setup": f'python -m pip install "metier[all]=={version}"\n',
            "run": script,
        }
    )


def _script(
    spec: str, folder: str, machines: Machines, settings: Sequence[str], *, rank: str, first: str, build: str
) -> str:
    """What a machine runs; `rank` and `first` are what the shell makes of them there."""
    changed = "".join(f" --set {shlex.quote(s)}" for s in settings)
    words = f"{spec if spec == '.' else shlex.quote(spec)} --runs {folder}{changed}"
    return "\n".join(
        [
            "set -eu",
            build.format(build=f"metier build {words}"),
            f"exec torchrun --nnodes {machines.count} --nproc-per-node {machines.processes} --node-rank {rank} \\",
            f"  --master-addr {first} --master-port {PORT} -m metier train {words}",
            "",
        ]
    )


def _kubernetes_name(name: str) -> str:
    """A run's name as a DNS label, with room for the number of a pod."""
    return "metier-" + re.sub(r"[^a-z0-9-]", "-", name)[:_KUBERNETES_NAME].strip("-")


class _Dumper(yaml.SafeDumper):
    """Longer texts as blocks, and nothing by reference, so that a person can read the file."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


def _text(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
