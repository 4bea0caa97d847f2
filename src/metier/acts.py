"""The acts, in order: what goes into each, whether it is out of date, and doing it.

Deciding needs no torch and no network, so that a finished run answers at once. An act's fingerprint covers the settings
it reads and the hash of everything it reads; nothing else makes it run again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import config, machine, progress, records, runs
from metier.config import Loaded, Spec, Stage, registration
from metier.errors import DataError, MetierError, PolicyError, RunError, needs_extra
from metier.records import Score
from metier.runs import ACTS, Run

if TYPE_CHECKING:
    from metier.cost import Rates

DONE, FRESH, PLANNED, FOLLOWED = "done", "up to date", "would be done", "took part"
MUTABLE = ("dataset.json", "checkpoints/", "tensorboard/")


@dataclass(frozen=True)
class Outcome:
    """What an act came to: `status`, wall seconds, main figures, and why it was (or would be) done."""

    act: str
    run: Path
    status: str
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The outcome as `--json` prints it."""
        head = {"act": self.act, "run": str(self.run), "status": self.status, "seconds": round(self.seconds, 2)}
        return head | {"outputs": list(self.outputs), "why": self.why} | self.figures


def perform(act: str, loaded: Loaded, run: Run, *, dry: bool = False) -> Outcome:
    """Does one act if it is out of date; `dry` only says whether it is, and why."""
    _hold_earlier(act, loaded, run)
    settings, inputs, fingerprint = _stand(act, loaded, run)
    if run.up_to_date(act, fingerprint):
        return Outcome(act, run.folder, FRESH, figures=_known(act, run), outputs=_outputs(act, run))
    why = _reason(act, run, settings, inputs)
    if dry:
        return Outcome(act, run.folder, PLANNED, why=why, figures=_forecast(act, loaded, run))
    hold_extras(act, loaded.spec.track)
    start = time.monotonic()
    work = run.work(act, fingerprint)
    runs.write(run.folder / "specialist.yaml", config.dump(_anywhere(loaded)))
    spent = _spent(work)
    try:
        figures = _FRONT[act](loaded, run, work)
    finally:
        seconds = spent + time.monotonic() - start
        _spend(work, seconds)
    machine.give_back()
    run.publish(act, settings=settings, inputs=inputs, seconds=seconds, mutable=MUTABLE)
    return Outcome(act, run.folder, DONE, seconds, why, figures, _outputs(act, run))


def _stand(act: str, loaded: Loaded, run: Run) -> tuple[dict[str, Any], dict[str, str], str]:
    """The settings and inputs of an act as they are now, and their fingerprint."""
    settings, inputs = _settings(act, loaded), _inputs(act, loaded, run)
    return settings, inputs, runs.digest({"act": act, "settings": settings, "inputs": inputs})


def _hold_earlier(act: str, loaded: Loaded, run: Run) -> None:
    """Refuses to build on an earlier act that was done with other settings or inputs than these."""
    for earlier in ACTS[: ACTS.index(act)]:
        if run.manifest(earlier) is not None:
            settings, inputs, fingerprint = _stand(earlier, loaded, run)
            if not run.up_to_date(earlier, fingerprint):
                raise RunError(
                    f"{earlier} is out of date: {_reason(earlier, run, settings, inputs)}",
                    where=str(run.folder),
                    fix=f"run `metier {earlier}` first with the same settings, or `metier run` for all that is due",
                )


def _spent(work: Path) -> float:
    """Seconds that interrupted attempts at this act took before."""
    try:
        return float((work / runs.SPENT).read_text())
    except (OSError, ValueError):
        return 0.0


def _spend(work: Path, seconds: float) -> None:
    with contextlib.suppress(MetierError):
        runs.write(work / runs.SPENT, f"{seconds:.3f}")


def hold_extras(act: str, track: Sequence[str] = ()) -> None:
    """Refuses before the work starts where an optional part is absent that the act needs at its end."""
    engine = {"torch": "train", "transformers": "train"}
    needed = {
        "train": engine | {"matplotlib": "report"} | {name: name for name in track},
        "prove": engine | {"llguidance": "train", "bm25s": "rag", "matplotlib": "report"},
        "ship": engine,
    }.get(act, {})
    for module, extra in needed.items():
        found = importlib.util.find_spec(module)
        # A folder of that name, such as trackers leave behind, is found too, but has no origin.
        if found is None or found.origin is None:
            raise needs_extra(module, extra)


def _anywhere(loaded: Loaded) -> Spec:
    """The settings with models that are paths made absolute, so that the run folder can be used from anywhere."""

    def absolute(name: str | None) -> str | None:
        return str(loaded.path(name)) if name and loaded.path(name).exists() else name

    stages = tuple(s.model_copy(update={"teacher": absolute(s.teacher)}) for s in loaded.spec.train)
    return loaded.spec.model_copy(update={"base": absolute(loaded.spec.base), "train": stages})


def plan(loaded: Loaded, run: Run) -> list[Outcome]:
    """For each act in order, whether it is up to date; once one is not, neither is what follows."""
    outcomes: list[Outcome] = []
    for act in ACTS:
        if any(o.status == PLANNED for o in outcomes):
            outcomes.append(Outcome(act, run.folder, PLANNED, why=f"follows {outcomes[-1].act}"))
        else:
            outcomes.append(perform(act, loaded, run, dry=True))
    return outcomes


def _settings(act: str, loaded: Loaded) -> dict[str, Any]:
    """The settings an act reads; a change in any other leaves it up to date."""
    whole = config.tree(loaded.spec)
    numerics = {k: whole["machine"][k] for k in ("device", "dtype", "threads", "tokens")}
    alone = {k: v for k, v in whole["machine"].items() if k not in ("on", "workers", "shard", "timeout_seconds")}
    return {
        "build": {k: whole[k] for k in ("name", "base", "seed", "task", "data")}
        | {"max_length": [s["max_length"] for s in whole["train"] if s["method"] != "cpt"]},
        "train": {k: whole[k] for k in ("base", "base_sha256", "seed", "train")}
        | {"mix": whole["data"]["mix"]}
        | numerics,
        "prove": {k: whole[k] for k in ("base", "base_sha256", "seed", "prove")} | {"machine": alone},
        "ship": {k: whole[k] for k in ("name", "base", "base_sha256", "ship")}
        | {"attribution": whole["data"]["attribution"]},
    }[act]


# Not every data set holds all of these.
_READS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "build": (
            *("train.jsonl", "valid.jsonl", "chat_template.jinja"),
            *("text-train.jsonl", "text-valid.jsonl", "text-test.jsonl", "replay.jsonl"),
        ),
    },
    "prove": {
        "build": ("test.jsonl", "train.jsonl", "task.json", "chat_template.jinja"),
        "train": ("registered.json",),
    },
    "ship": {"train": (), "prove": ("verdict.json",), "build": ("task.json",)},
}


def _inputs(act: str, loaded: Loaded, run: Run) -> dict[str, str]:
    """The sha256 of everything an act reads, by name."""
    from metier.data import build
    from metier.models import load, tuned

    found = {"base": load.identify(loaded.spec.base, loaded.folder, loaded.spec.base_sha256)}
    if act == "build":
        return build.inputs(loaded) | found
    if act == "train":
        found |= {
            f"teacher {s.teacher}": load.identify(s.teacher, loaded.folder) for s in loaded.spec.train if s.teacher
        }
    for earlier, names in _READS[act].items():
        folder = run.require(earlier)
        there = [n for n in names if (folder / n).is_file()]
        trained = tuned.weights(folder) if earlier == "train" else []
        found |= {f"{runs.FOLDERS[earlier]}/{n}": runs.sha256(folder / n) for n in (*trained, *there)}
    return found


def _reason(act: str, run: Run, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Why an act is out of date, in words."""
    before = run.manifest(act)
    if before is None:
        return "not done yet"
    changed = [k for k in settings if before["settings"].get(k) != settings[k]]
    changed += [k for k in inputs if before["inputs"].get(k) != inputs[k]]
    return f"changed: {', '.join(changed)}" if changed else run.damaged(act)


def _build(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    from metier.data import build
    from metier.models import load
    from metier.text.chat import Renderer

    base = load.resolve(loaded.spec.base, loaded.folder, loaded.spec.base_sha256)
    template = _template(loaded)
    made = build.build(loaded, work, Renderer(base.folder, template), load.stated_context(base), template)
    _keep_openings(run.act("build") / "dataset.json", work / "dataset.json")
    return made


def _template(loaded: Loaded) -> str | None:
    """The chat template that the task gives, as text."""
    from metier.data import ingest
    from metier.text.chat import TEMPLATES

    named = loaded.spec.task.template
    if named is None or named in TEMPLATES:
        return TEMPLATES.get(named or "")
    return ingest.text(ingest.beside(loaded, named, "template"), "template")


def _keep_openings(before: Path, now: Path) -> None:
    """A test set that was opened stays opened, however often it is built again."""
    if before.is_file():
        old, new = runs.read_json(before), runs.read_json(now)
        if old["seal"] == new["seal"]:
            runs.write_json(now, new | {"opened": old["opened"]})


def _train(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    from metier.training import run as training

    _hold_claims(loaded, run)
    if loaded.spec.machine.on == "ray":
        from metier.training import workers

        return workers.train(loaded, run, work)
    return training.train(loaded, run, work)


def follow(loaded: Loaded, folder: Path) -> Outcome:
    """The part of a process whose world is led by another: it trains along when called, and keeps nothing."""
    from metier.training import run as training
    from metier.training import world

    progress.quiet = True
    if world.called():
        with tempfile.TemporaryDirectory(prefix="metier-") as scratch:
            training.train(loaded, Run(folder), Path(scratch))
    return Outcome("train", folder, FOLLOWED)


def find_rate(loaded: Loaded, run: Run) -> dict[str, Any]:
    """A suggested learning rate, from trial steps on the rows that `train` would train on."""
    _hold_earlier("train", loaded, run)
    hold_extras("train")
    from metier.training import finder

    return finder.find(loaded, run)


def _hold_claims(loaded: Loaded, run: Run) -> None:
    """Refuses a claim that this task has no grader for; one validation row shows which graders there are."""
    from metier.evaluate import metrics

    if not loaded.spec.data.asks:
        return
    path = run.require("build") / "valid.jsonl"
    rows = records.examples(path)
    if not rows:
        raise DataError("no validation rows", where=str(path), fix="give more data, and run `metier build` again")
    metrics.hold_claims(loaded.spec.prove, rows[0].expected)


def _prove(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    from metier.evaluate import run as evaluation
    from metier.release import report

    if not loaded.spec.data.asks:
        raise DataError(
            "there is nothing to prove on: the data set holds raw text and no questions with answers",
            where="data",
            fix="give data.examples: some are learnt from, some are the sealed test",
        )
    _hold_claims(loaded, run)
    evaluation.measure(loaded, run, work)
    verdict = _judge(loaded, run, work, evaluation.rates(loaded))
    runs.write_json(work / "verdict.json", verdict)
    runs.write(work / "report.html", report.report(run.folder, work))
    return _verdict_figures(verdict)


def _judge(loaded: Loaded, run: Run, work: Path, rates: Rates) -> dict[str, Any]:
    """The verdict on the scores in `work`, with what each arm's answers cost at this machine's remembered speeds."""
    from metier.cost import arm_cost
    from metier.evaluate.run import OUTPUTS, SCORES
    from metier.release import gate

    completions = records.completions(work / OUTPUTS)
    scores = [Score(**row) for _, row in records.objects(work / SCORES)]
    shared = runs.read_json(work / "shared.json")
    costs = {}
    for arm in loaded.spec.prove.arms:
        own = [c for c in completions if c.arm == arm]
        tokens = (sum(c.prompt_tokens for c in own), shared[arm], sum(c.new_tokens for c in own))
        costs[arm] = arm_cost(*tokens, len(own), rates, loaded.spec.machine.dollars_per_hour)
    data = run.act("build")
    before = runs.read_json(run.act("train") / "registered.json")["registered"]
    card = runs.read_json(data / "dataset.json")
    sealed = {
        "registered": before,
        "registered_before_training": before
        == registration(loaded.spec, runs.read_json(data / "task.json"))["registered"],
        "seal": card["seal"],
    }
    groups = {e.id: e.group for e in records.examples(data / "test.jsonl")}
    return gate.verdict(scores, completions, groups, loaded.spec.prove, sealed=sealed, costs=costs)


def _ship(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    from metier.release import ship

    verdict = runs.read_json(run.require("prove") / "verdict.json")["verdict"]
    if verdict != "ship" and not loaded.spec.ship.unproved:
        raise PolicyError(
            f"the verdict is {verdict}, so nothing is released",
            where=str(run.act("prove") / "report.html"),
            fix="read the report; to release all the same, and say so on the card: --set ship.unproved=true",
        )
    return ship.ship(loaded, run, work)


_FRONT: dict[str, Callable[[Loaded, Run, Path], dict[str, Any]]] = {
    "build": _build,
    "train": _train,
    "prove": _prove,
    "ship": _ship,
}


def _known(act: str, run: Run) -> dict[str, Any]:
    """The main figures of an act that was done before."""
    folder = run.act(act)
    if act == "build":
        card = runs.read_json(folder / "dataset.json")
        return {"counts": card["counts"], "splits": card["splits"]}
    if act == "train":
        made = runs.read_json(folder / "plan.json")
        return {
            k: made[k] for k in ("tokens_per_second", "memory_gb", "bits_per_byte", "exact", "inexact") if k in made
        }
    if act == "prove":
        return _verdict_figures(runs.read_json(folder / "verdict.json"))
    return {"pass": runs.read_json(folder / "certificate.json")["pass"]}


def _verdict_figures(verdict: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": verdict["verdict"], "claims": verdict["claims"], "arms": verdict["arms"]}


def _forecast(act: str, loaded: Loaded, run: Run) -> dict[str, Any]:
    """What an act would cost, where its inputs are known already."""
    if act != "train" or run.manifest("build") is None:
        return {}
    splits = runs.read_json(run.act("build") / "dataset.json")["splits"]
    stages = [_stage_forecast(stage, splits) for stage in loaded.spec.train]
    tokens = sum(s["tokens"] for s in stages)
    before = run.manifest("train")
    measured = runs.read_json(run.act("train") / "plan.json")["tokens_per_second"]["measured"] if before else None
    known = {"seconds_expected": round(tokens / measured)} if measured else {}
    return {"rows": sum(s["rows"] for s in stages), "tokens": tokens, "stages": stages} | known


def _stage_forecast(stage: Stage, splits: dict[str, Any]) -> dict[str, Any]:
    """What a stage goes through: its rows (documents, in `cpt`) and the tokens of all its passes."""
    card = splits["text-train" if stage.method == "cpt" else "train"]
    return {
        "method": stage.method,
        "rows": card["rows"],
        "tokens": round(card["tokens"] * stage.epochs / (1 - stage.replay)),
    }


def _outputs(act: str, run: Run) -> tuple[str, ...]:
    main = {
        "build": ("train.jsonl", "valid.jsonl", "test.jsonl", "text-train.jsonl", "text-valid.jsonl", "card.md"),
        "train": ("adapter", "model", "metrics.jsonl", "plan.json"),
        "prove": ("report.html", "verdict.json"),
        "ship": ("adapter", "model", "README.md", "certificate.json"),
    }
    return tuple(str(run.act(act) / name) for name in main[act] if (run.act(act) / name).exists())


def perform_all(loaded: Loaded, run: Run) -> list[Outcome]:
    """Every act that is out of date, in order; nothing is shipped on a verdict that is not `ship`."""
    outcomes = []
    for act in ACTS:
        outcomes.append(perform(act, loaded, run))
        verdict = outcomes[-1].figures.get("verdict", "ship")
        if verdict != "ship" and not loaded.spec.ship.unproved:
            break
    return outcomes
