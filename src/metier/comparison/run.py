"""From run folders to one document of what differs: the front of `metier compare`.

Reads run folders and writes nothing. The first run is what the others are held against. A run that lacks an act is
shown with what it has; figures that do not measure the same thing are not subtracted, and a note says why.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metier import config, curves, records, runs
from metier.config import Spec
from metier.curves import Point
from metier.errors import ConfigError
from metier.records import Score
from metier.release import gate
from metier.runs import ACTS, FOLDERS, Run
from metier.talk import of_run

LAST_STEPS = 10
SPLITS = ("train.jsonl", "valid.jsonl", "test.jsonl")


@dataclass(frozen=True)
class Side:
    """What one run folder holds; what its acts did not leave is empty."""

    label: str
    folder: Path
    spec: Spec
    manifests: dict[str, dict[str, Any]]
    dataset: dict[str, Any]
    task: dict[str, Any]
    points: list[Point]
    plan: dict[str, Any]
    verdict: dict[str, Any]
    scores: dict[str, dict[str, float | None]]
    groups: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        return config.dotted(config.tree(self.spec))


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """The document that `metier compare --json` prints, as docs/contract.md has it."""
    sides = _sides(folders)
    pairs = [(sides[0], other) for other in sides[1:]]
    return {
        "runs": [_run(side) for side in sides],
        "settings": _differing(sides),
        "same": {name: _same([side.dataset.get("hashes", {}).get(name) for side in sides]) for name in SPLITS},
        "differences": [row for first, other in pairs for row in _differences(first, other)],
        "notes": [
            *(note for side in sides for note in _doubts(side)),
            *(note for first, other in pairs for note in _incomparable(first, other)),
        ],
    }


# Reading


def _sides(folders: Sequence[Path]) -> list[Side]:
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise ConfigError(
            "a comparison takes different runs, at least two",
            where=", ".join(map(str, folders)),
            fix="give run folders, such as: metier compare runs/first runs/second",
        )
    return [_side(place, label) for place, label in zip(places, _labels(places), strict=True)]


def _labels(places: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    for depth in itertools.count(1):
        labels = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError


def _side(folder: Path, label: str) -> Side:
    spec, run = of_run(folder).spec, Run(folder)
    data, train, proof = (folder / FOLDERS[act] for act in ("build", "train", "prove"))
    manifests = {act: manifest for act in ACTS if (manifest := run.manifest(act)) is not None}
    # A training at work, or one that was interrupted, has its metrics in the working folder.
    metrics = (train if "train" in manifests else folder / ".work-train") / "metrics.jsonl"
    test = data / "test.jsonl"
    return Side(
        label=label,
        folder=folder,
        spec=spec,
        manifests=manifests,
        dataset=_object(data / "dataset.json"),
        task=_object(data / "task.json"),
        points=curves.read(metrics),
        plan=_object(train / "plan.json"),
        verdict=_object(proof / "verdict.json"),
        scores=_scores(proof / "scores.jsonl"),
        groups={e.id: e.group for e in records.examples(test)} if test.is_file() else {},
    )


def _object(path: Path) -> dict[str, Any]:
    return dict(runs.read_json(path)) if path.is_file() else {}


def _scores(path: Path) -> dict[str, dict[str, float | None]]:
    """{grader: {case: value}} of the specialist's answers."""
    scores: dict[str, dict[str, float | None]] = defaultdict(dict)
    for _, row in records.objects(path) if path.is_file() else ():
        score = Score(**row)
        if score.arm == gate.OURS:
            scores[score.grader][score.case] = score.value
    return scores


# What one run says


def _run(side: Side) -> dict[str, Any]:
    return {
        "run": side.label,
        "folder": str(side.folder),
        "acts": list(side.manifests),
        "data": _data(side.dataset) if side.dataset else None,
        "training": _training(side) if side.points else None,
        "curves": {name: _curve(side.points, name) for name in ("loss", "valid_loss")},
        "proof": {k: side.verdict[k] for k in ("verdict", "claims", "arms")} if side.verdict else None,
    }


def _data(dataset: Mapping[str, Any]) -> dict[str, Any]:
    return {k: dataset[k] for k in ("counts", "splits", "hashes", "seal", "opened")}


def _training(side: Side) -> dict[str, Any]:
    """`loss` is the mean of the last steps, `valid_loss` the best of the last stage, `seconds` those of the steps."""
    stage = side.points[-1].stage
    validations = [p.figures["valid_loss"] for p in side.points if p.stage == stage and "valid_loss" in p.figures]
    steps = [p.figures for p in side.points if "loss" in p.figures]
    last = [figures["loss"] for figures in steps[-LAST_STEPS:]]
    seconds = side.points[-1].seconds
    tokens = math.fsum(figures.get("tokens", 0) for figures in steps)
    return {
        "finished": "train" in side.manifests,
        "steps": len(steps),
        "tokens": round(tokens),
        "loss": math.fsum(last) / len(last) if last else None,
        "valid_loss": min(validations, default=None),
        "seconds": round(seconds, 3),
        "act_seconds": side.manifests["train"]["seconds"] if "train" in side.manifests else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "memory_gb": side.plan.get("memory_gb", {}).get("measured"),
    }


def _curve(points: Sequence[Point], name: str) -> list[list[float]]:
    """[step, seconds, value] of each point of a curve."""
    return [[p.step, round(p.seconds, 3), p.figures[name]] for p in points if name in p.figures]


# What differs


def _differing(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Every setting that is not the same in all runs, in the order of the file; None where a run has none."""
    settings = [side.settings for side in sides]
    keys = dict.fromkeys(key for tree in settings for key in tree)
    rows = [{"key": key, "values": [tree.get(key) for tree in settings]} for key in keys if key != "name"]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _same(values: Sequence[Any]) -> bool | None:
    """Whether all are equal; None where fewer than two are there."""
    if sum(value is not None for value in values) < 2:
        return None
    return all(value == values[0] for value in values)


def _differences(first: Side, other: Side) -> Iterator[dict[str, Any]]:
    """For every grader of both, the other's specialist minus the first's on the sealed cases they share."""
    if not (first.scores and other.scores) or first.dataset["seal"] != other.dataset["seal"]:
        return
    confidence = max(side.spec.prove.confidence for side in (first, other))
    for grader in sorted(first.scores.keys() & other.scores.keys(), key=_rank):
        if grader == gate.SCHEMA and first.task["schema"] != other.task["schema"]:
            continue
        ours, theirs = other.scores[grader], first.scores[grader]
        if paired := gate.difference(ours, theirs, first.groups, confidence):
            missing = len(ours.keys() | theirs.keys()) - paired.n
            head = {"run": other.label, "against": first.label, "arm": gate.OURS, "grader": grader}
            yield head | asdict(paired) | {"missing": missing}


def _rank(grader: str) -> tuple[bool, bool, str]:
    """What the verdict counts first, then fields, then form."""
    return grader != gate.ALL, not grader.startswith(gate.FIELD), grader


# What must be said beside the figures


def _doubts(side: Side) -> Iterator[str]:
    """Why figures of one run may not be what they seem."""
    settings = side.settings | config.dotted(config.tree(side.spec.machine))
    for act, manifest in side.manifests.items():
        ran = config.dotted(manifest["settings"])
        changed = [key for key, value in ran.items() if key in settings and settings[key] != value]
        changed += [name for name, now in _inputs_now(side) if manifest["inputs"].get(name, now) != now]
        if changed:
            yield f"{side.label}: {act} is out of date; since then changed: {', '.join(changed)}"
        for name in ("metrics.jsonl", "plan.json", "scores.jsonl", "verdict.json", "test.jsonl", "task.json"):
            path = side.folder / FOLDERS[act] / name
            if name in manifest["outputs"] and runs.sha256(path) != manifest["outputs"][name]:
                yield f"{side.label}: {FOLDERS[act]}/{name} was altered after {act}"
    if side.points and "train" not in side.manifests:
        yield f"{side.label}: the training is not finished; its figures are those so far"


def _inputs_now(side: Side) -> Iterator[tuple[str, str]]:
    """(name as later acts list it, sha256) of every file the acts left."""
    for act, manifest in side.manifests.items():
        yield from ((f"{FOLDERS[act]}/{name}", digest) for name, digest in manifest["outputs"].items())


def _incomparable(first: Side, other: Side) -> Iterator[str]:
    """Which figures of two runs do not measure the same thing."""
    both = f"{other.label} and {first.label}"
    if _same([side.dataset.get("hashes", {}).get("valid.jsonl") for side in (first, other)]) is False:
        yield f"{both} were validated on different rows: their validation losses are not comparable"
    losses = ("method", "teacher", "beta", "temperature", "top_k", "dft")
    if any(getattr(first.spec.train[-1], k) != getattr(other.spec.train[-1], k) for k in losses):
        yield f"{both} end with different losses: their losses are not comparable"
    if first.spec.base != other.spec.base:
        yield f"{both} have different bases: where the tokens differ, losses per token are not comparable"
    if not (first.verdict and other.verdict):
        return
    if first.dataset["seal"] != other.dataset["seal"]:
        yield f"{both} were proved on different test sets: their scores are not compared"
    elif first.task["schema"] != other.task["schema"]:
        yield f"{both} have different schemas: their shares of valid answers are not compared"
