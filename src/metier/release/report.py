"""The proof as one page that a person can read, keep, print and send.

Reads a run folder and writes nothing: `report` returns the page. Everything on it comes from files of the run and the
versions installed here, so the same run gives the same bytes. The page reaches for nothing outside itself and runs no
script; what documents, settings and models wrote is shown as text, and characters that could disguise a text are made
visible.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from metier import config, cost, plots, records, runs
from metier.progress import clock
from metier.records import Completion, Example, Score
from metier.release import gate, page
from metier.release.gate import ALL, FIELD, OURS, SCHEMA

WRONG_CASES, WON_CASES = 12, 8
CONFUSIONS, REASONS = 5, 12
MAX_INPUT, MAX_ANSWER, MAX_VALUE = 1500, 500, 120
PARSES = "json"
NOT_JSON = "not a JSON object"

ARMS = {
    "base": "the base model with the bare instruction",
    "prompt": "the base model with the written prompt",
    "few-shot": "the written prompt and the nearest training examples",
    "rag": "the base model with retrieved passages",
    "tuned": "the specialist",
    "tuned+rag": "the specialist with retrieved passages",
}
VERDICTS = {
    gate.SHIP: ("pass", "Ship it."),
    gate.DO_NOT_SHIP: ("fail", "Do not ship."),
    gate.CANNOT_TELL: ("unclear", "Cannot tell yet."),
}
OUTCOMES = (
    ("right", "all right"),
    ("wrong", "valid, but wrong"),
    ("invalid", "not valid against the schema"),
    ("broken", "not JSON"),
    ("unjudged", "could not be judged"),
)
GRADERS = {PARSES: "parses as JSON", SCHEMA: "valid by schema", ALL: "all right"}
PACKAGES = ("metier", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Proof:
    """What the page is made from."""

    spec: config.Spec
    settings: str
    dataset: dict[str, Any]
    card: str
    cases: dict[str, Example]
    metrics: list[dict[str, Any]]
    plan: dict[str, Any]
    trained: dict[str, Any]
    outputs: dict[str, dict[str, Completion]]
    scores: dict[tuple[str, str], dict[str, Score]]
    verdict: dict[str, Any]

    @property
    def arms(self) -> list[str]:
        return list(self.verdict["arms"])

    @property
    def rivals(self) -> list[str]:
        return [arm for arm in self.arms if arm != OURS]

    @property
    def graders(self) -> list[str]:
        """In the order a reader asks: is it JSON, is it valid, which fields are right, is everything right."""
        names = dict.fromkeys(grader for _, grader in self.scores)
        fields = [g for g in names if g not in GRADERS]
        return [*(g for g in (PARSES, SCHEMA) if g in names), *fields, *(g for g in (ALL,) if g in names)]

    def value(self, arm: str, grader: str, case: str) -> float | None:
        score = self.scores.get((arm, grader), {}).get(case)
        return score.value if score else None

    def best_rival(self) -> str | None:
        """The other arm with most answers all right."""
        known = {arm: self.verdict["arms"][arm].get(ALL) for arm in self.rivals}
        known = {arm: share for arm, share in known.items() if share is not None}
        return max(known, key=lambda arm: known[arm]) if known else None


def report(run_folder: Path, proof_folder: Path) -> str:
    """The page for the outputs, scores and verdict in `proof_folder`, about the run in `run_folder`."""
    proof = _read(run_folder, proof_folder)
    kind, title = VERDICTS[proof.verdict["verdict"]]
    context = {
        "proof": proof,
        "spec": proof.spec,
        "verdict": proof.verdict,
        "kind": kind,
        "title": title,
        "sentence": _sentence(proof),
        "figures": _figures(proof),
        "claims": _claims(proof),
        "arms": _arms(proof),
        "columns": [grader_name(g) for g in proof.graders],
        "arms_plot": _arms_plot(proof),
        "outcomes": _outcomes(proof),
        "outcome_names": dict(OUTCOMES),
        "tables": _tables(proof),
        "confusions": _confusions(proof),
        "wrong": _cases(proof, _tuned_wrong(proof), WRONG_CASES),
        "won": _cases(proof, _only_tuned(proof), WON_CASES),
        "loss_plot": plots.loss_plot(proof.metrics),
        "training": _training(proof),
        "predictions": _predictions(proof.plan),
        "plan": _plan(proof.plan),
        "costs": _costs(proof),
        "data": _data(proof),
        "hashes": _hashes(proof),
        "versions": _versions(),
        "limits": _limits(proof),
    }
    return page.render(Path(__file__).with_name("report.html.j2"), context)


# Reading


def _read(run: Path, proof: Path) -> Proof:
    outputs: dict[str, dict[str, Completion]] = defaultdict(dict)
    for completion in records.completions(proof / "outputs.jsonl"):
        outputs[completion.arm][completion.case] = completion
    scores: dict[tuple[str, str], dict[str, Score]] = defaultdict(dict)
    for _, row in records.objects(proof / "scores.jsonl"):
        scores[row["arm"], row["grader"]][row["case"]] = Score(**row)
    settings = run / "specialist.yaml"
    card = run / "data" / "card.md"
    return Proof(
        spec=config.load(settings).spec,
        settings=settings.read_text("utf-8"),
        dataset=runs.read_json(run / "data" / "dataset.json"),
        card=card.read_text("utf-8") if card.is_file() else "",
        cases={example.id: example for example in records.examples(run / "data" / "test.jsonl")},
        metrics=_lines(run / "train" / "metrics.jsonl"),
        plan=_object(run / "train" / "plan.json"),
        trained=_object(run / "train" / runs.MANIFEST),
        outputs=outputs,
        scores=scores,
        verdict=runs.read_json(proof / "verdict.json"),
    )


def _object(path: Path) -> dict[str, Any]:
    return dict(runs.read_json(path)) if path.is_file() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in records.objects(path)] if path.is_file() else []


# Sections, from the top of the page down


def _sentence(proof: Proof) -> str:
    """The reason of the decision, without the decision, which stands above it in large letters."""
    reason = _unbroken(gate.decision(proof.verdict).partition(": ")[2])
    return reason[:1].upper() + reason[1:]


def _figures(proof: Proof) -> list[dict[str, str]]:
    """The four numbers that a reader should take away: big figure, what it is, what to hold it against."""
    arms, rival = proof.verdict["arms"], proof.best_rival()
    ours = arms.get(OURS, {})
    out = []
    if ALL in ours:
        beside = f"{rival}: {page.percent(arms[rival][ALL])}" if rival else ""
        out.append({"figure": page.percent(ours[ALL]), "what": "answers all right", "beside": beside})
    if SCHEMA in ours:
        beside = f"{rival}: {page.percent(arms[rival][SCHEMA])}" if rival and SCHEMA in arms[rival] else ""
        out.append({"figure": page.percent(ours[SCHEMA]), "what": "valid answers", "beside": beside})
    if ours:
        beside = f"{rival}: {page.dollars(arms[rival]['dollars_per_1000'])}" if rival else ""
        out.append({"figure": page.dollars(ours["dollars_per_1000"]), "what": "for 1,000 answers", "beside": beside})
    if seconds := proof.trained.get("seconds"):
        price = page.dollars(cost.training_cost(seconds, proof.spec.machine.dollars_per_hour))
        out.append({"figure": clock(seconds), "what": "of training", "beside": f"{price} on this machine"})
    return out


def _claims(proof: Proof) -> list[dict[str, Any]]:
    """Each claim with its sentence, its drawing and its small print."""
    claims = proof.verdict["claims"]
    spans = {kind: _span([c for c in claims if bool(c["against"]) == kind]) for kind in (True, False)}
    return [
        {
            **claim,
            "title": _claim_title(claim),
            "line": _unbroken(gate.comparison(claim, proof.verdict["arms"])),
            "why": _unbroken(claim["why"]),
            "figure": _claim_figure(claim),
            "interval": _interval(claim),
            "whisker": _whisker(claim, spans[bool(claim["against"])]),
            "facts": _claim_facts(claim),
        }
        for claim in claims
    ]


def _claim_title(claim: Mapping[str, Any]) -> str:
    if not claim["against"]:
        return "Answers are valid"
    rival = {"base": "the base model", "prompt": "the prompt", "few-shot": "few-shot prompting"}
    about = "" if claim["grader"] == ALL else f" in {grader_name(claim['grader'])}"
    return f"Beats {rival.get(claim['against'], claim['against'])}{about}"


def _claim_figure(claim: Mapping[str, Any]) -> str:
    if claim["estimate"] is None:
        return "—"
    return f"{gate.signed_points(claim['estimate'])} points" if claim["against"] else page.percent(claim["estimate"])


def _interval(claim: Mapping[str, Any]) -> str:
    if claim["estimate"] is None:
        return ""
    show = gate.signed_points if claim["against"] else lambda share: f"{share * 100:.1f}"
    return f"{show(claim['low'])} to {show(claim['high'])}"


def _span(claims: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The line, in percent, on which all these claims fit with their thresholds."""
    ends = [c[k] for c in claims if c["estimate"] is not None for k in ("low", "high")]
    ends += [t for c in claims for t in _thresholds(c)]
    low, high = 100 * min(ends, default=0), 100 * max(ends, default=1)
    room = 0.06 * (high - low)
    return low - room, high + room


def _thresholds(claim: Mapping[str, Any]) -> tuple[float, float]:
    """(what the interval must rule out, what the estimate must reach)."""
    return (0.0 if claim["against"] else claim["margin"] - gate.FORMAT_TOLERANCE), claim["margin"]


def _whisker(claim: Mapping[str, Any], span: tuple[float, float]) -> str:
    if claim["estimate"] is None:
        return ""
    threshold, asked = _thresholds(claim)
    return plots.whisker(
        *(100 * claim[k] for k in ("estimate", "low", "high")),
        span=span,
        threshold=100 * threshold,
        asked=100 * asked,
        colour=claim["result"],
        title=f"{_claim_title(claim)}: {_claim_figure(claim)}, interval {_interval(claim)}",
    )


def _claim_facts(claim: Mapping[str, Any]) -> list[tuple[str, str]]:
    against = claim["against"]
    detectable, rules_out = claim["smallest_detectable"], "smallest failure rate these cases can rule out"
    asked = f"{claim['margin'] * 100:g}" + (" points" if against else "\u00a0%")
    facts = [
        ("interval", f"{_interval(claim)} at {claim['confidence'] * 100:g}\u00a0% confidence"),
        ("smallest estimate accepted", asked),
        ("cases", f"{claim['n']:,} in {claim['clusters']:,} independent groups"),
        ("not judged", f"{claim['missing']:,}"),
        ("test", claim["test"]),
    ]
    if claim["p"] is not None:
        exact = f" (exact {page.p(claim['p_exact'])})" if claim["p_exact"] is not None else ""
        facts.append(("p", page.p(claim["p"]) + exact))
    if claim["b"] is not None:
        facts.append(("only tuned right / only the other", f"{claim['b']:,} / {claim['c']:,}"))
    if detectable is not None:
        shown = f"{detectable * 100:.1f}" + (" points" if against else "\u00a0%")
        facts.append(("smallest difference found 4 times in 5" if against else rules_out, shown))
    if claim["needs"] is not None:
        facts.append(("cases that would tell", f"about {claim['needs']:,}"))
    return facts


def _arms(proof: Proof) -> list[dict[str, Any]]:
    """Each arm with the share of every grader and its interval."""
    rows = []
    for arm in proof.arms:
        figures = proof.verdict["arms"][arm]
        cells = [(figures.get(g), figures["intervals"].get(g, {})) for g in proof.graders]
        rows.append(
            {
                "arm": arm,
                "what": ARMS.get(arm, ""),
                "n": figures["n"],
                "cells": [(page.percent(m) if m is not None else "—", _cell_interval(i)) for m, i in cells],
            }
            | _mark(arm)
        )
    return rows


def _mark(arm: str) -> dict[str, str]:
    colour = plots.colour_of(arm)
    return {"colour": colour, "shape": plots.SHAPES[colour][1]}


def _cell_interval(interval: Mapping[str, Any]) -> str:
    if interval.get("low") is None:
        return ""
    missing = f", {interval['missing']:,} not judged" if interval["missing"] else ""
    return f"{interval['low'] * 100:.1f} to {interval['high'] * 100:.1f}{missing}"


def _arms_plot(proof: Proof) -> str:
    rows = []
    for grader in proof.graders[-24:]:
        values = {}
        for arm in proof.arms:
            figures = proof.verdict["arms"][arm]
            mean, interval = figures.get(grader), figures["intervals"].get(grader, {})
            if mean is not None:
                low, high = (interval[k] if interval[k] is not None else mean for k in ("low", "high"))
                values[arm] = (100 * mean, 100 * low, 100 * high)
        rows.append((grader_name(grader).translate(page.VISIBLE), values))
    return plots.arms_plot(rows, proof.arms)


def _outcomes(proof: Proof) -> list[dict[str, Any]]:
    """What became of each arm's answers, as shares that add up."""
    rows = []
    for arm in proof.arms:
        answers = proof.outputs.get(arm, {})
        count = Counter(_outcome(proof, arm, case) for case in answers)
        parts = [
            {"kind": kind, "count": count[kind], "share": count[kind] / len(answers)}
            for kind, _ in OUTCOMES
            if count[kind]
        ]
        cut = sum(answer.finish == "length" for answer in answers.values())
        rows.append({"arm": arm, "parts": parts, "cut": cut} | _mark(arm))
    return rows


def _outcome(proof: Proof, arm: str, case: str) -> str:
    right = proof.value(arm, ALL, case)
    if right == 1:
        return "right"
    if proof.value(arm, PARSES, case) == 0:
        return "broken"
    if proof.value(arm, SCHEMA, case) == 0:
        return "invalid"
    return "unjudged" if right is None else "wrong"


def _tables(proof: Proof) -> list[dict[str, Any]]:
    """For every other arm, how often both, one or neither was all right, over cases where both could be judged."""
    tables = []
    for arm in proof.rivals if OURS in proof.arms else []:
        pairs = [(proof.value(OURS, ALL, c), proof.value(arm, ALL, c)) for c in proof.outputs.get(arm, {})]
        count = Counter((ours == 1, theirs == 1) for ours, theirs in pairs if ours is not None and theirs is not None)
        if total := sum(count.values()):
            cells = {f"{int(a)}{int(b)}": count[a, b] for a in (True, False) for b in (True, False)}
            tables.append({"arm": arm, "total": total, "cells": cells, "gain": cells["10"] - cells["01"]} | _mark(arm))
    return tables


def _confusions(proof: Proof) -> list[dict[str, Any]]:
    """For every arm, ours first, and every field: what it answered where it was wrong."""
    arms = sorted(proof.arms, key=lambda arm: arm != OURS)
    rows = [{"arm": arm, "fields": _arm_confusions(proof, arm)} | _mark(arm) for arm in arms]
    return [row for row in rows if row["fields"]]


def _arm_confusions(proof: Proof, arm: str) -> list[dict[str, Any]]:
    wrong: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for case, completion in proof.outputs.get(arm, {}).items():
        expected = _expected(proof, case)
        answer = _answer(completion.text)
        for field in expected:
            if _right(proof, arm, case, field, expected, answer) is False:
                given = NOT_JSON if answer is None else _cut(_text(answer.get(field, "missing")), MAX_VALUE)
                wrong[field][_cut(_text(expected[field]), MAX_VALUE), given] += 1
    fields = []
    for field, count in wrong.items():
        ranked = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
        most = ranked[0][1]
        top = [{"expected": e, "given": g, "count": n, "share": n / most} for (e, g), n in ranked]
        fields.append({"field": field, "wrong": count.total(), "kinds": len(count), "top": top})
    return fields


def _tuned_wrong(proof: Proof) -> list[str]:
    return [case for case in proof.cases if proof.value(OURS, ALL, case) == 0]


def _only_tuned(proof: Proof) -> list[str]:
    def only(case: str) -> bool:
        return proof.value(OURS, ALL, case) == 1 and all(proof.value(arm, ALL, case) == 0 for arm in proof.rivals)

    return [case for case in proof.cases if proof.rivals and only(case)]


def _cases(proof: Proof, names: Sequence[str], most: int) -> dict[str, Any]:
    """The first cases in the order of the test set, so that nobody picked them, and how many there are."""
    return {"total": len(names), "shown": [_case(proof, name) for name in names[:most]]}


def _case(proof: Proof, name: str) -> dict[str, Any]:
    example = proof.cases[name]
    asked = next((m.content for m in reversed(example.prompt) if m.role == "user"), "")
    expected = _expected(proof, name)
    answers = [_case_answer(proof, arm, name, expected) for arm in proof.arms if name in proof.outputs.get(arm, {})]
    ours: list[dict[str, Any]] = next((a["cells"] for a in answers if a["arm"] == OURS), [])
    wrong = [field for field, cell in zip(expected, ours, strict=True) if cell["right"] is False] if ours else []
    return {
        "id": name,
        "excerpt": " ".join(asked.split())[:160],
        "input": _cut(asked, MAX_INPUT),
        "fields": list(expected),
        "expected": [_cut(_text(v), MAX_VALUE) for v in expected.values()],
        "expected_text": "" if expected else _cut(_text(example.expected), MAX_ANSWER),
        "wrong": wrong or ([NOT_JSON] if expected and not ours else []),
        "answers": answers,
    }


def _case_answer(proof: Proof, arm: str, case: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """One arm's answer: a cell for each expected field where it is an object, else its text."""
    completion = proof.outputs[arm][case]
    answer = _answer(completion.text) if expected else None
    cells, extra = [], {}
    if answer is not None:
        rights = [_right(proof, arm, case, field, expected, answer) for field in expected]
        texts = [_cut(_text(answer[field]), MAX_VALUE) if field in answer else "missing" for field in expected]
        cells = [{"text": text, "right": right} for text, right in zip(texts, rights, strict=True)]
        extra = {k: v for k, v in answer.items() if k not in expected}
    form = [proof.scores.get((arm, g), {}).get(case) for g in (PARSES, SCHEMA)]
    return {
        "arm": arm,
        "right": proof.value(arm, ALL, case),
        "cells": cells,
        "text": _cut(completion.text, MAX_ANSWER),
        "extra": _cut(_text(extra), MAX_VALUE) if extra else "",
        "cut": completion.finish == "length",
        "why": next((_cut(s.why, 200) for s in form if s and s.value == 0 and s.why), ""),
    } | _mark(arm)


def _training(proof: Proof) -> list[tuple[str, str]]:
    steps = [line for line in proof.metrics if "loss" in line]
    last = [line for line in steps if line.get("stage") == steps[-1].get("stage")]
    validation = [
        line["valid_loss"]
        for line in proof.metrics
        if "valid_loss" in line and line.get("stage") == (last[-1].get("stage") if last else line.get("stage"))
    ]
    facts = []
    if seconds := proof.trained.get("seconds"):
        facts.append(("time", clock(seconds)))
        facts.append(("price", page.dollars(cost.training_cost(seconds, proof.spec.machine.dollars_per_hour))))
    if steps:
        facts.append(("steps", f"{len(steps):,}"))
        facts.append(("tokens", f"{sum(line.get('tokens', 0) for line in steps):,}"))
        facts.append(("of them supervised", f"{sum(line.get('supervised_tokens', 0) for line in steps):,}"))
        facts.append(("training loss", f"{last[0]['loss']:.3f} → {last[-1]['loss']:.3f}"))
    if validation:
        facts.append(("validation loss", f"{validation[0]:.3f} → best {min(validation):.3f}"))
    for name, bits in proof.plan.get("bits_per_byte", {}).items():
        facts.append((f"bits per byte of held-out text, {name}", f"{bits['before']:.4f} → {bits['after']:.4f}"))
    planned = proof.plan.get("stages") or [{}] * len(proof.spec.train)
    for stage, plan in zip(proof.spec.train, planned, strict=True):
        rate = plan.get("learning_rate", stage.learning_rate)
        shown = f", learning rate {rate:g}" if rate else ""
        tuned = f"LoRA rank {stage.rank}" if stage.tune == "lora" else "every weight"
        facts.append(("method", f"{plan.get('stage', stage.method)}, {tuned}{shown}"))
    return facts


PLANNED: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time", clock),
    "memory_gb": ("peak memory", lambda gb: f"{gb:.2f} GB"),
    "tokens_per_second": ("tokens per second", lambda rate: f"{rate:,.0f}"),
}


def _predictions(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the plan predicted beside what was measured, for every figure that holds both."""
    rows = []
    for key, value in plan.items():
        if isinstance(value, dict) and {"predicted", "measured"} <= set(value):
            what, show = PLANNED.get(key, (key.replace("_", " "), _number))
            predicted, measured = value["predicted"], value["measured"]
            known = predicted and measured is not None
            rows.append(
                {
                    "what": what,
                    "predicted": show(predicted),
                    "measured": show(measured) if measured is not None else "not measured",
                    "error": _signed_percent(measured / predicted - 1) if known else "",
                }
            )
    return rows


def _plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's choices, and its reasons in its own words."""
    choices = [
        (k.replace("_", " "), _number(v))
        for k, v in plan.items()
        if isinstance(v, (str, int, float)) and not isinstance(v, bool)
    ]
    if "exact" in plan:
        exact = "all steps ran alike" if plan["exact"] else f"not bit for bit: {'; '.join(plan['inexact'])}"
        choices.append(("repeatable", exact))
    return {"choices": choices, "reasons": plan.get("why", [])}


def _costs(proof: Proof) -> dict[str, Any]:
    """Every arm's price from counted tokens, beside the seconds as measured, and when training has paid for itself."""
    arms, rival = proof.verdict["arms"], proof.best_rival()
    ours = arms.get(OURS)
    rows = []
    for arm in proof.arms:
        figures, answers = arms[arm], proof.outputs.get(arm, {})
        measured = math.fsum(a.seconds for a in answers.values()) / max(1, len(answers))
        rows.append(
            {
                "arm": arm,
                "tokens": f"{figures['tokens_per_case']:,.0f}",
                "seconds": clock(1000 * figures["seconds_per_case"]),
                "measured": clock(1000 * measured),
                "dollars": page.dollars(figures["dollars_per_1000"]),
                "times": _times(figures["dollars_per_1000"], ours["dollars_per_1000"]) if ours else "",
            }
            | _mark(arm)
        )
    return {"rows": rows, "hour": page.dollars(proof.spec.machine.dollars_per_hour), "pays": _pays(proof, rival)}


def _pays(proof: Proof, rival: str | None) -> str:
    seconds, arms = proof.trained.get("seconds"), proof.verdict["arms"]
    if not seconds or rival is None or OURS not in arms:
        return ""
    spent = cost.training_cost(seconds, proof.spec.machine.dollars_per_hour)
    answers = cost.answers_to_break_even(spent, *(arms[a]["dollars_per_1000"] for a in (OURS, rival)))
    if answers is None:
        return f"A specialist’s answer costs no less than one by {rival}: training pays in quality, not in money."
    return f"Training cost {page.dollars(spent)}; against {rival} it has paid for itself after {answers:,} answers."


def _data(proof: Proof) -> dict[str, Any]:
    dataset = proof.dataset
    splits = [
        (name, *(f"{s.get(k, 0):,}" for k in ("rows", "groups", "tokens", "supervised_tokens")))
        for name, s in dataset["splits"].items()
    ]
    reasons = list(dataset.get("reasons", {}).items())
    return {
        "counts": dataset["counts"],
        "splits": splits,
        "reasons": reasons[:REASONS],
        "more": max(0, len(reasons) - REASONS),
        "findings": dataset.get("findings", []),
        "seal": dataset["seal"],
        "opened": dataset["opened"],
        "attribution": proof.spec.data.attribution or "",
    }


def _hashes(proof: Proof) -> list[tuple[str, str]]:
    """(what, sha256) of everything the proof stands on."""
    sealed = proof.verdict["sealed"]
    rows = [("claims, registered", sealed.get("registered")), ("test set, sealed", sealed.get("seal"))]
    rows += [(f"data/{name}", value) for name, value in proof.dataset["hashes"].items()]
    rows += [(f"training input: {name}", value) for name, value in proof.trained.get("inputs", {}).items()]
    adapter = {
        n: h
        for n, h in proof.trained.get("outputs", {}).items()
        if n.endswith(".safetensors") and "checkpoint" not in n
    }
    rows += [(f"train/{name}", value) for name, value in adapter.items()]
    return [(name, value) for name, value in rows if isinstance(value, str) and value]


def _versions() -> list[tuple[str, str]]:
    out = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            out.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return out


def _limits(proof: Proof) -> list[str]:
    """What this page does not show, as far as the files tell."""
    spec = proof.spec
    out = [
        f"One training run, seed {spec.seed}. The intervals say how another draw of cases would move the figures, not "
        "how another seed would.",
        "The test cases come from the same sources as the training rows. Inputs of another kind were not tried.",
        "Only this task was measured. Whether the specialist lost general ability or became less safe is not known "
        "from this page.",
    ]
    if spec.task.prompt is None and set(proof.arms) & set(gate.PROMPTS):
        out.append("The prompt was put together from the instruction and the schema. A better one may exist.")
    if spec.prove.temperature > 0:
        out.append(f"Answers were sampled at temperature {spec.prove.temperature:g}, once each.")
    if spec.prove.constrained:
        out.append(
            "Every arm wrote under the schema, so valid answers are given by construction and show no skill. How often "
            "they would be valid without it was not measured; decode under the schema where you use the specialist."
        )
    return [*out, *_limits_of_claims(proof), *_limits_of_answers(proof), *_limits_of_seal(proof)]


def _limits_of_claims(proof: Proof) -> list[str]:
    claims = proof.verdict["claims"]
    found = [c["smallest_detectable"] for c in claims if c["against"] and c["smallest_detectable"] is not None]
    least = (
        f"A true difference under {max(found, default=0) * 100:.1f} points would be missed more than one time in five."
    )
    clustered = [c for c in claims if not c["against"] and c["clusters"] < c["n"]]
    return ([least] if found else []) + [
        f"The interval of “{c['claim']}” counts {c['n']:,} cases as independent; they come in {c['clusters']:,} groups."
        for c in clustered
    ]


def _limits_of_answers(proof: Proof) -> list[str]:
    pairs = [(arm, grader) for arm in proof.arms for grader in proof.graders]
    missing = [(arm, grader_name(grader), _unjudged(proof, arm, grader)) for arm, grader in pairs]
    cut = [(row["arm"], row["cut"]) for row in _outcomes(proof)]
    out = [
        f"Of {arm}’s answers, {n:,} could not be judged by “{name}”; its figures leave them out."
        for arm, name, n in missing
        if n
    ]
    most = proof.spec.prove.max_new_tokens
    return out + [
        f"Of {arm}’s answers, {n:,} reached the limit of {most} tokens, judged as they stood." for arm, n in cut if n
    ]


def _limits_of_seal(proof: Proof) -> list[str]:
    opened = proof.dataset["opened"]
    out = []
    if opened > 1:
        out.append(f"The test set was opened {opened} times. Every look makes a good result easier to find by chance.")
    if proof.verdict["sealed"].get("registered_before_training") is False:
        out.append("The claims were registered after training.")
    return out


def _unjudged(proof: Proof, arm: str, grader: str) -> int:
    return sum(score.value is None for score in proof.scores.get((arm, grader), {}).values())


# Answers and fields


def _expected(proof: Proof, case: str) -> dict[str, Any]:
    """The expected answer by field; empty where the answer is not an object."""
    expected = proof.cases[case].expected if case in proof.cases else None
    return expected if isinstance(expected, dict) else {}


def _answer(text: str) -> dict[str, Any] | None:
    """The answer by field, or None where it is not a JSON object. Graders judge; this is only for showing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _right(
    proof: Proof, arm: str, case: str, field: str, expected: Mapping[str, Any], answer: Mapping[str, Any] | None
) -> bool | None:
    """What the field's grader said; where it has none, whether the values are equal."""
    for grader in (FIELD + field, field):
        if (arm, grader) in proof.scores:
            value = proof.value(arm, grader, case)
            return None if value is None else value == 1
    return answer is not None and field in answer and bool(answer[field] == expected[field])


def grader_name(grader: str) -> str:
    return GRADERS.get(grader, grader.removeprefix(FIELD))


# Numbers and texts


def _unbroken(text: str) -> str:
    """The text with numbers and their percent signs kept on one line."""
    return text.replace(" %", "\u00a0%")


def _times(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.1f}\u00a0×" if ours > 0 else ""


def _signed_percent(share: float) -> str:
    return f"{share * 100:+.0f}\u00a0%".replace("-", "−")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _text(value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} … ({len(text) - most:,} more characters)"
