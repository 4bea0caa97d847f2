"""Files for clusters: YAML that means what it should, and that the schemas of its readers accept."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

import metier
from conftest import write_specialist
from metier import cli
from metier.errors import ConfigError

TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """The schema of an object with these keys and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


CONTAINER = closed(
    {
        "name": LABEL,
        "image": TEXT,
        "command": {"type": "array", "items": TEXT},
        "env": {"type": "array", "items": closed({"name": TEXT, "value": TEXT})},
        "resources": closed({"requests": {"type": "object"}, "limits": {"type": "object"}}),
        "securityContext": closed(
            {"allowPrivilegeEscalation": {"const": False}, "capabilities": closed({"drop": {"const": ["ALL"]}})}
        ),
        "volumeMounts": {"type": "array", "items": closed({"name": LABEL, "mountPath": TEXT})},
    }
)
POD = closed(
    {
        "subdomain": LABEL,
        "restartPolicy": {"const": "Never"},
        "terminationGracePeriodSeconds": COUNT,
        "automountServiceAccountToken": {"const": False},
        "securityContext": {"type": "object", "required": ["runAsNonRoot", "seccompProfile"]},
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
        "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    }
)
METADATA = closed({"name": LABEL, "labels": {"type": "object", "additionalProperties": TEXT}})
JOB = closed(
    {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "metadata": METADATA,
        "spec": closed(
            {
                "completions": COUNT,
                "parallelism": COUNT,
                "completionMode": {"const": "Indexed"},
                "backoffLimit": COUNT,
                "template": closed({"metadata": closed({"labels": {"type": "object"}}), "spec": POD}),
            }
        ),
    }
)
SERVICE = closed(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "Service"},
        "metadata": METADATA,
        "spec": closed(
            {
                "clusterIP": {"const": "None"},
                "publishNotReadyAddresses": {"const": True},
                "selector": {"type": "object"},
                "ports": {"type": "array", "items": closed({"name": LABEL, "port": COUNT})},
            }
        ),
    }
)
TASK = closed(
    {
        "name": LABEL,
        "num_nodes": COUNT,
        "resources": closed(
            {"cpus": {"type": "string", "pattern": r"^\d+\+$"}, "memory": {"type": "string", "pattern": r"^\d+\+$"}},
            accelerators=TEXT,
        ),
        "workdir": TEXT,
        "setup": TEXT,
        "run": TEXT,
    }
)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A specialist whose folder and name need care."""
    return write_specialist(tmp_path / "my colours", "smollm2-135m", name="a.b_" + "c" * 60)


def words(script: str) -> list[list[str]]:
    """The commands of a script, `\\` at line ends joined; the shell itself must accept it."""
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    return [shlex.split(line) for line in script.replace("\\\n", " ").splitlines()]


def hold_commands(command: list[str], machines: int, processes: int, *settings: str) -> None:
    """What torchrun starts is parsed by the command line itself."""
    assert command[:2] == ["exec", "torchrun"]
    at = command.index("-m")
    assert command[at : at + 3] == ["-m", "metier", "train"]
    options = dict(zip(command[2:at:2], command[3:at:2], strict=True))
    assert (options["--nnodes"], options["--nproc-per-node"]) == (str(machines), str(processes))
    assert {"--node-rank", "--master-addr", "--master-port"} <= options.keys()
    # A context without the settings of its group would be remembered by the command, and show in its help.
    context = cli.commands.commands["train"].make_context("train", command[at + 3 :], **cli.commands.context_settings)
    assert context.params["settings"] == settings


@pytest.mark.parametrize("accelerators", ["", "H100:8"])
def test_a_kubernetes_job(spec: Path, accelerators: str) -> None:
    changes = ["train.rank=8", 'task.instruction="it\'s $HOME"']
    text = metier.cluster(
        spec, on="kubernetes", machines=3, cpus=6, memory_gb=24, accelerators=accelerators, settings=changes
    )
    service, job = yaml.safe_load_all(text)
    for document, schema in ((service, SERVICE), (job, JOB)):
        assert [e.message for e in Draft202012Validator(schema).iter_errors(document)] == []
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    # Pods find the first by its name inside the service, which must choose them by their labels.
    name = job["metadata"]["name"]
    assert len(f"{name}-1023") <= 63 and pod["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (8 if accelerators else None)
    script = words(container["command"][2])
    assert f"{name}-0.{name}" in script[-1]
    hold_commands(script[-1], 3, 8 if accelerators else 1, *changes)
    assert [s for s in script if s[:2] == ["metier", "build"]] == [["metier", "build", *script[-1][-7:]]]


@pytest.mark.parametrize("accelerators", ["", "A100:2"])
def test_a_skypilot_task(spec: Path, accelerators: str) -> None:
    task = yaml.safe_load(metier.cluster(spec, on="skypilot", machines=4, accelerators=accelerators))
    assert [e.message for e in Draft202012Validator(TASK).iter_errors(task)] == []
    assert task["num_nodes"] == 4 and task["workdir"] == str(spec) and metier.__version__ in task["setup"]
    assert task["resources"].get("accelerators", "") == accelerators
    script = words(task["run"])
    hold_commands(script[-1], 4, 2 if accelerators else 1)
    assert ["metier", "build", ".", "--runs", "~/runs"] in script


def test_kubernetes_own_schemas_accept_it(spec: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for accelerators in ("", "H100:8"):
        text = metier.cluster(spec, on="kubernetes", accelerators=accelerators)
        for document in yaml.safe_load_all(text):
            validate.validate(document, validate.latest_version(), strict=True)


def test_the_command_prints_what_the_function_returns(spec: Path) -> None:
    said = CliRunner().invoke(cli.commands, ["cluster", str(spec), "--on", "kubernetes", "--machines", "5"])
    assert said.exit_code == 0 and said.stdout == metier.cluster(spec, on="kubernetes", machines=5)
    said = CliRunner().invoke(cli.commands, ["cluster", str(spec), "--on", "skypilot", "--json"])
    assert json.loads(said.stdout) == {"on": "skypilot", "yaml": metier.cluster(spec, on="skypilot")}


@pytest.mark.parametrize("wrong", ["H100", "H100:0", ":8", "H100:x", "H100:8;rm"])
def test_accelerators_are_a_kind_and_a_number(spec: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="names no accelerators"):
        metier.cluster(spec, on="skypilot", accelerators=wrong)


def test_another_kind_of_cluster_is_refused(spec: Path) -> None:
    said = CliRunner().invoke(cli.commands, ["cluster", str(spec), "--on", "slurm"])
    assert said.exit_code == 2 and "kubernetes" in said.output
    with pytest.raises(ConfigError, match="slurm"):
        metier.cluster(spec, on="slurm")
