"""The model card: front matter that hubs read, and sentences made from measurements only."""

from __future__ import annotations

from typing import Any

import yaml

from metier import runs
from metier.config import Loaded, Stage
from metier.models.load import Base
from metier.release import gate
from metier.runs import Run


def model_card(loaded: Loaded, run: Run, base: Base) -> str:
    """The card of a release, as Markdown with YAML front matter."""
    spec = loaded.spec
    verdict = runs.read_json(run.act("prove") / "verdict.json")
    data = runs.read_json(run.act("build") / "dataset.json")
    plan = runs.read_json(run.act("train") / "plan.json")
    parts = [
        "---\n"
        + yaml.safe_dump(_front_matter(loaded, base, verdict, _stages(run)[0]), sort_keys=False, allow_unicode=True)
        + "---",
        f"# {spec.name}",
        _proved(verdict),
        "\n".join(f"- {line}" for line in gate.headline(verdict)),
        "## What it does\n\n" + spec.task.instruction,
        "## Measured on the sealed test set\n\n" + _arms(verdict),
        "## Claims\n\n" + _claims(verdict),
        "## Training\n\n" + _training(run, base, data, plan),
        "## Data\n\n" + _data(loaded, data),
        "## Limits\n\n" + _limits(verdict, loaded.spec.prove.constrained),
        "## Use\n\n" + _use(base, full=_stages(run)[0].tune == "full"),
    ]
    return "\n\n".join(parts) + "\n"


def _stages(run: Run) -> list[Stage]:
    """The stages of training, with every default written out."""
    return [Stage.model_validate(s) for s in (run.manifest("train") or {})["settings"]["train"]]


def _front_matter(loaded: Loaded, base: Base, verdict: dict[str, Any], stage: Stage) -> dict[str, Any]:
    tuned = verdict["arms"]["tuned"]
    metrics = [
        {"type": "accuracy", "name": name, "value": round(tuned[name], 4)}
        for name in ("all", "schema")
        if tuned.get(name) is not None
    ]
    task = {"type": "text-generation"}
    data = {"name": loaded.spec.name, "type": "private"}
    return {
        "base_model": base.source.split(",")[0],
        "license": loaded.spec.ship.license,
        "library_name": "transformers" if stage.tune == "full" else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["metier"] if stage.tune == "full" else ["metier", "lora"],
        "model-index": [{"name": loaded.spec.name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}],
    }


def _proved(verdict: dict[str, Any]) -> str:
    if verdict["verdict"] == "ship":
        return "Every claim below was established on a test set sealed before training."
    return f"**Not proved: the verdict is {verdict['verdict']}.** It was released on its owner's explicit wish."


def _arms(verdict: dict[str, Any]) -> str:
    graders = list(dict.fromkeys(g for figures in verdict["arms"].values() for g in figures["intervals"]))
    rows = [f"| arm | {' | '.join(graders)} | seconds a case |", "|---" * (len(graders) + 2) + "|"]
    for arm, figures in verdict["arms"].items():
        shown = " | ".join(_percent(figures.get(g)) for g in graders)
        rows.append(f"| {arm} | {shown} | {figures['seconds_per_case']:.3f} |")
    return "\n".join(rows)


def _percent(share: float | None) -> str:
    return "not judged" if share is None else f"{100 * share:.1f} %"


def _claims(verdict: dict[str, Any]) -> str:
    return "\n".join(f"- {c['claim']}: {c['result']}, {_estimate(c)}" for c in verdict["claims"])


def _estimate(claim: dict[str, Any]) -> str:
    if claim["estimate"] is None:
        return f"not judged ({claim['missing']} of {claim['n'] + claim['missing']} cases without a score)"
    low, high, level = (100 * claim[k] for k in ("low", "high", "confidence"))
    return (
        f"estimate {100 * claim['estimate']:.1f} points ({level:.0f} % interval {low:.1f} to {high:.1f}, "
        f"n = {claim['n']}, {claim['test']})"
    )


def _training(run: Run, base: Base, data: dict[str, Any], plan: dict[str, Any]) -> str:
    settings = (run.manifest("train") or {})["settings"]
    stages = _stages(run)
    walked = " ".join(_walked(s, p, data["splits"]) for s, p in zip(stages, plan["stages"], strict=True))
    return (
        f"{_tuning(stages[0])} of {base.source} (weights sha256 `{base.sha256}`). {walked} "
        f"{plan['dtype']}{_bits(stages[0].quantize)}, seed {settings['seed']}. "
        f"{plan['seconds']['measured'] / 60:.1f} minutes at "
        f"{plan['tokens_per_second']['measured']:,.0f} tokens/s on one {plan['device']}, "
        f"{plan['memory_gb']['measured']:.1f} GB peak memory.{_inexact(plan)}"
    )


def _tuning(stage: Stage) -> str:
    """`LoRA, rank 16, alpha 32, on all linear layers`, or that every weight was trained."""
    if stage.tune == "full":
        return "Full fine-tuning: every weight"
    name = " with DoRA" if stage.dora else ""
    scale = " over the root of the rank" if stage.rslora else ""
    dropout = f", dropout {stage.dropout:g}" if stage.dropout else ""
    places = "all linear layers" if stage.targets == "all-linear" else ", ".join(stage.targets)
    whole = f", and {', '.join(stage.modules_to_save)} trained whole" if stage.modules_to_save else ""
    return f"LoRA{name}, rank {stage.rank}, alpha {stage.alpha:g}{scale}{dropout}, on {places}{whole}"


def _bits(quantize: str) -> str:
    return "" if quantize == "none" else f" on a base in {quantize} (proved on the base as released)"


def _walked(stage: Stage, planned: dict[str, Any], splits: dict[str, Any]) -> str:
    split = splits["text-train" if stage.method == "cpt" else "train"]
    rows = "documents" if stage.method == "cpt" else "rows"
    replayed = f", {stage.replay:.0%} general text mixed in" if stage.replay else ""
    return (
        f"{stage.method}{_teacher(stage)}: {split['rows']:,} {rows}, "
        f"{split['supervised_tokens']:,} supervised tokens{replayed}, "
        f"at most {stage.epochs:g} epochs, {stage.batch_size} rows a step, "
        f"learning rate {planned['learning_rate']:g}."
    )


def _teacher(stage: Stage) -> str:
    return f" from the teacher {stage.teacher}" if stage.teacher else ""


def _inexact(plan: dict[str, Any]) -> str:
    """Why the training cannot be repeated bit for bit, where it cannot."""
    reasons = plan.get("inexact", [])
    return f" It cannot be repeated bit for bit: {'; '.join(reasons)}." if reasons else ""


def _data(loaded: Loaded, data: dict[str, Any]) -> str:
    counts = data["counts"]
    credit = f"{loaded.spec.data.attribution}\n\n" if loaded.spec.data.attribution else ""
    return (
        f"{credit}{counts['in']:,} input rows: {counts['used']:,} used, {counts['duplicate']:,} duplicates, "
        f"{counts['rejected']:,} rejected with a reason. Near-duplicates stay on one side of the split. "
        f"Test set sha256 `{data['seal']}`, opened {data['opened']} time{'s' if data['opened'] != 1 else ''}."
    )


def _limits(verdict: dict[str, Any], constrained: bool) -> str:
    smallest = [c["smallest_detectable"] for c in verdict["claims"] if c.get("smallest_detectable")]
    lines = [
        "- One training run with one seed: the claims are about these weights, not about the recipe.",
        *(
            ["- Answers were written under the task's JSON Schema; decode under it too, or some will not be valid."]
            if constrained
            else []
        ),
        "- Inputs unlike the data were not tested. General ability, safety and long conversations were not measured.",
    ]
    if smallest:
        lines.append(f"- Differences under {100 * max(smallest):.1f} points could not have been seen.")
    return "\n".join(lines)


def _use(base: Base, *, full: bool) -> str:
    if full:
        return "The model is a folder of safetensors with its tokenizer and chat template, for any tool that reads one."
    return (
        f"The adapter is in PEFT's layout, for the base {base.source}. Load it with any tool that reads PEFT adapters, "
        "with the tokenizer and chat template beside it."
    )
