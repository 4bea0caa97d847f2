"""May it ship: what the scores say about each claim that was registered before training.

An interval decides, not a point. A claim passes where its interval excludes what would refute it and its estimate
reaches what was asked; it fails where the interval lies wholly on the bad side; between the two the evidence cannot
tell, and the claim says how many cases would. A score of None is a case that its grader could not judge: it is left out
and counted, never read as 0.

Pure: records in, `verdict.json` out. The order of the records does not matter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from metier import stats
from metier.config import Claim, Prove
from metier.records import Completion, Score

SHIP, DO_NOT_SHIP, CANNOT_TELL = "ship", "do-not-ship", "cannot-tell"
OURS, ALL, SCHEMA, FIELD = "tuned", "all", "schema", "field:"
PROMPTS = ("prompt", "few-shot")

MAX_MISSING = 0.02
FORMAT_TOLERANCE = 0.02
"""How far under `at_least` the interval of a format claim may reach.

An interval wholly above .99 takes 368 flawless cases, and one failure in 400 would undo it: a model that is valid 999
times in 1,000 would not pass in a third of all proofs. So the observed share must reach `at_least`, and a share two
points lower must be ruled out. At .99, 400 cases may hold 4 failures; 121 flawless cases are too few, 122 are enough.
"""

_FINEST = 0.005
_MOST_CASES = 10_000_000
_FIGURES = ("seconds_per_case", "tokens_per_case", "dollars_per_1000")

Values = dict[tuple[str, str], dict[str, float | None]]


def verdict(
    scores: Sequence[Score],
    completions: Sequence[Completion],
    groups: Mapping[str, str],
    prove: Prove,
    *,
    sealed: Mapping[str, Any],
    costs: Mapping[Any, Mapping[str, float]],
) -> dict[str, Any]:
    """`verdict.json` as the contract has it.

    `groups` names each case's cluster. `sealed` is passed on; where its `registered_before_training` is False, nothing
    ships. `costs` holds `cost.arm_cost` of every arm.
    """
    values = _values(scores)
    cases: dict[str, set[str]] = defaultdict(set)
    for completion in completions:
        cases[completion.arm].add(completion.case)
    claims = [_claim(claim, values, cases, groups, prove.confidence) for claim in prove.claims]
    decision, note = _decide([c["result"] for c in claims], sealed)
    return {
        "verdict": decision,
        "note": note,
        "claims": claims,
        "arms": {
            arm: _arm(arm, values, len(cases[arm]), costs[arm], prove.confidence) for arm in _ordered(cases, prove)
        },
        "sealed": dict(sealed),
    }


def headline(verdict: Mapping[str, Any]) -> list[str]:
    """The verdict in a person's words: one sentence for the decision, then one line a claim."""
    return [decision(verdict), *(_line(claim, verdict["arms"]) for claim in verdict["claims"])]


def decision(verdict: Mapping[str, Any]) -> str:
    """The decision and its reason as one sentence."""
    claims = verdict["claims"]
    if verdict["verdict"] == SHIP:
        return f"Ship: {'the one claim holds' if len(claims) == 1 else f'all {len(claims)} claims hold'}."
    if verdict["verdict"] == DO_NOT_SHIP:
        failed = [c["claim"] for c in claims if c["result"] == "fail"]
        return f"Do not ship: {_claims_named(failed)} {'does' if len(failed) == 1 else 'do'} not hold."
    if verdict["note"]:
        return f"Cannot tell: {verdict['note']}."
    unclear = [c for c in claims if c["result"] == "unclear"]
    names, verb = _claims_named([c["claim"] for c in unclear]), "is" if len(unclear) == 1 else "are"
    return f"Cannot tell: {names} {verb} unclear; about {max(c['needs'] for c in unclear):,} cases would tell."


def _values(scores: Iterable[Score]) -> Values:
    values: Values = defaultdict(dict)
    for score in scores:
        of_grader = values[score.arm, score.grader]
        assert score.case not in of_grader, f"{score.grader} judged case {score.case} of {score.arm} twice"
        of_grader[score.case] = score.value
    return values


def _ordered(arms: Iterable[str], prove: Prove) -> list[str]:
    """The arms as the settings list them, any other after them."""
    rank: dict[str, int] = {arm: place for place, arm in enumerate(prove.arms)}
    return sorted(arms, key=lambda arm: (rank.get(arm, len(rank)), arm))


def _arm(arm: str, values: Values, cases: int, costs: Mapping[str, float], confidence: float) -> dict[str, Any]:
    """One arm's means over the cases each grader could judge, its cost, and the interval behind each mean."""
    graders = sorted(g for a, g in values if a == arm)
    clash = {*_FIGURES, "n", "intervals"} & set(graders)
    assert not clash, f"a grader has the name of another figure: {sorted(clash)}"
    judged = {g: [v for v in values[arm, g].values() if v is not None] for g in graders}
    return {
        **{g: math.fsum(v) / len(v) for g, v in judged.items() if v},
        **{figure: costs[figure] for figure in _FIGURES},
        "n": cases,
        "intervals": {g: _mean_interval(v, cases, confidence) for g, v in judged.items() if v},
    }


def _mean_interval(judged: Sequence[float], cases: int, confidence: float) -> dict[str, Any]:
    """The interval of a share of right answers; graded scores have none here."""
    binary = set(judged) <= {0, 1}
    interval = stats.proportion(round(math.fsum(judged)), len(judged), confidence) if binary else None
    return {
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "n": len(judged),
        "missing": cases - len(judged),
    }


def _claim(
    claim: Claim, values: Values, cases: Mapping[str, set[str]], groups: Mapping[str, str], confidence: float
) -> dict[str, Any]:
    if claim.beats:
        return _beats(claim, claim.beats, values, cases, groups, confidence)
    return _format(claim, values, cases, groups, confidence)


def _beats(
    claim: Claim,
    against: str,
    values: Values,
    cases: Mapping[str, set[str]],
    groups: Mapping[str, str],
    confidence: float,
) -> dict[str, Any]:
    """Ours minus theirs on the cases where both could be judged."""
    asked = cases.get(OURS, set()) | cases.get(against, set())
    ours, theirs = values.get((OURS, claim.grader), {}), values.get((against, claim.grader), {})
    paired = difference(ours, theirs, groups, confidence)
    missing = len(asked) - (paired.n if paired else 0)
    row = _row(claim.name, against, claim.grader, claim.margin, confidence)
    if paired is None:
        return row | _no_evidence(missing, _cases_for(max(claim.margin, _FINEST), 0, 1 - confidence))
    result, why = _beats_result(paired, claim.margin)
    needs = _beats_needs(paired, claim.margin) if result == "unclear" else None
    row |= {
        "estimate": paired.estimate,
        "low": paired.low,
        "high": paired.high,
        "n": paired.n,
        "clusters": paired.clusters,
        "test": paired.test,
        "p": paired.p,
        "p_exact": paired.p_exact,
        "b": paired.b,
        "c": paired.c,
        "smallest_detectable": paired.smallest_detectable,
    }
    return row | _settled(result, why, needs, paired.n, missing)


def difference(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], groups: Mapping[str, str], confidence: float
) -> stats.Paired | None:
    """Ours minus theirs, by case, on the cases where both could be judged; None where there is no such case."""
    both = [(c, a, b) for c in sorted(ours) if (a := ours[c]) is not None and (b := theirs.get(c)) is not None]
    if not both:
        return None
    names, left, right = zip(*both, strict=True)
    compare: Callable[..., stats.Paired] = stats.paired_binary if {*left, *right} <= {0, 1} else stats.paired_continuous
    return compare(left, right, [groups.get(c, c) for c in names], confidence)


def _beats_result(paired: stats.Paired, margin: float) -> tuple[str, str]:
    if paired.low > 0 and paired.estimate >= margin:
        return "pass", f"the interval lies above 0 and the estimate reaches the margin of {_points(margin)}"
    if paired.high <= 0:
        return "fail", "the interval holds no improvement"
    if paired.high < margin:
        return "fail", f"the interval lies below the margin of {_points(margin)}"
    if paired.low > 0:
        return "unclear", f"better, but the estimate is below the margin of {_points(margin)}"
    return "unclear", "the interval holds both an improvement and none"


def _beats_needs(paired: stats.Paired, margin: float) -> int:
    """Cases in total that settle the claim with power .8, at the discordance seen here.

    Not yet better than 0: cases that find the difference seen, or the margin where less was seen. Better, but below the
    margin: cases that tell this difference from the margin.
    """
    difference = margin - paired.estimate if paired.low > 0 else max(paired.estimate, margin)
    difference = max(difference, _FINEST)
    alpha = 1 - paired.confidence
    independent = paired.b is not None and paired.clusters == paired.n
    discordant = ((paired.b or 0) + (paired.c or 0)) / paired.n
    needs = _cases_for(difference, discordant, alpha) if paired.b is not None else 0
    if not independent and paired.smallest_detectable is not None:
        # An error shrinks with the root of the cases, clustered or graded alike.
        needs = max(needs, math.ceil(paired.n * (paired.smallest_detectable / difference) ** 2))
    return min(max(needs, paired.n + 1), _MOST_CASES)


def _cases_for(difference: float, discordant: float, alpha: float) -> int:
    return stats.cases_for_superiority(difference, max(discordant, difference), alpha=alpha)


def _format(
    claim: Claim, values: Values, cases: Mapping[str, set[str]], groups: Mapping[str, str], confidence: float
) -> dict[str, Any]:
    """The share of our answers that are valid, with its exact interval."""
    asked, ours = cases.get(OURS, set()), values.get((OURS, SCHEMA), {})
    judged = {c: v for c in sorted(asked) if (v := ours.get(c)) is not None}
    missing = len(asked) - len(judged)
    row = _row(claim.name, None, SCHEMA, claim.at_least, confidence)
    if not judged:
        return row | _no_evidence(missing, _format_needs(1, claim.at_least, confidence, 1))
    n, valid = len(judged), sum(v == 1 for v in judged.values())
    interval = stats.clopper_pearson(valid, n, confidence)
    result, why = _format_result(valid / n, interval, claim.at_least)
    needs = _format_needs(valid / n, claim.at_least, confidence, n) if result == "unclear" else None
    row |= {
        "estimate": valid / n,
        "low": interval.low,
        "high": interval.high,
        "n": n,
        "clusters": len({groups.get(c, c) for c in judged}),
        "test": "Clopper-Pearson interval",
        "smallest_detectable": 1 - stats.clopper_pearson(n, n, confidence).low,
    }
    return row | _settled(result, why, needs, n, missing)


def _format_result(share: float, interval: stats.Interval, at_least: float) -> tuple[str, str]:
    """See `FORMAT_TOLERANCE` for the rule and its reason."""
    asked, floor = (f"{100 * limit:.4g} %" for limit in (at_least, at_least - FORMAT_TOLERANCE))
    if share >= at_least and interval.low > at_least - FORMAT_TOLERANCE:
        return "pass", f"the share reaches {asked} and the interval rules out {floor}"
    if interval.high < at_least:
        return "fail", f"the interval lies below {asked}"
    if share >= at_least:
        return "unclear", f"the share reaches {asked}, but the interval does not rule out {floor}"
    return "unclear", f"the share is below {asked}, but the interval reaches it"


def _format_needs(share: float, at_least: float, confidence: float, n: int) -> int:
    """Cases in total at which this share would settle the claim: doubled until it does, then halved back to 1 %."""

    def settles(cases: int) -> bool:
        interval = stats.clopper_pearson(round(share * cases), cases, confidence)
        return _format_result(share, interval, at_least)[0] != "unclear"

    low = high = n
    while not settles(high) and high < _MOST_CASES:
        low, high = high, 2 * high
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if settles(middle) else (middle, high)
    return min(high, _MOST_CASES)


def _row(name: str, against: str | None, grader: str, margin: float, confidence: float) -> dict[str, Any]:
    """A claim of which nothing is known yet, its keys in the order they are written."""
    unknown = dict.fromkeys(("estimate", "low", "high"))
    rest = dict.fromkeys(("p", "p_exact", "b", "c", "smallest_detectable"))
    return {
        "claim": name,
        "arm": OURS,
        "against": against,
        "grader": grader,
        **unknown,
        "confidence": confidence,
        "n": 0,
        "clusters": 0,
        "test": "none",
        **rest,
        "margin": margin,
        "missing": 0,
        "result": "unclear",
        "why": "",
        "needs": None,
    }


def _no_evidence(missing: int, needs: int) -> dict[str, Any]:
    return {"missing": missing, "why": "no case could be judged", "needs": max(needs, missing)}


def _settled(result: str, why: str, needs: int | None, n: int, missing: int) -> dict[str, Any]:
    """The result, unless too many cases are missing to trust it."""
    if missing > MAX_MISSING * (n + missing):
        why = f"{missing} of {n + missing} cases could not be judged, more than {100 * MAX_MISSING:g} %"
        result, needs = "unclear", max(needs or 0, n + missing)
    return {"missing": missing, "result": result, "why": why, "needs": needs}


def _decide(results: Sequence[str], sealed: Mapping[str, Any]) -> tuple[str, str]:
    if "fail" in results:
        return DO_NOT_SHIP, ""
    if set(results) != {"pass"}:
        return CANNOT_TELL, ""
    if sealed.get("registered_before_training") is False:
        return (
            CANNOT_TELL,
            "every claim holds, but the claims were registered after training, when they could be chosen to fit",
        )
    return SHIP, ""


def comparison(claim: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> str:
    """What a claim is about in plain figures: `tuned answers 72.5 % all right; the best prompt (few-shot) 43.0 %`."""
    if claim["estimate"] is None:
        return f"{claim['claim']}: {claim['why']}"
    if not claim["against"]:
        share = f"{claim['estimate'] * 100:.1f} % of tuned's answers are valid"
        return f"{share}, at least {claim['margin'] * 100:g} % asked"
    grader, against = claim["grader"], claim["against"]
    right = "all right" if grader == ALL else f"right in {grader.removeprefix(FIELD)}"
    ours, theirs = (f"{arms[arm][grader] * 100:.1f} %" for arm in (OURS, against))
    return f"tuned answers {ours} {right}; {_rival(against, grader, arms)} {theirs}"


def _line(claim: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> str:
    if claim["estimate"] is None:
        return comparison(claim, arms)
    notes = [f"{claim['confidence'] * 100:g} % interval {_range(claim)}"]
    notes += [_p_value(claim)] if claim["p"] is not None else []
    notes += [f"{claim['n']:,} cases"]
    notes += [f"{claim['missing']:,} not judged"] if claim["missing"] else []
    gain = f": {signed_points(claim['estimate'])} points" if claim["against"] else ""
    return f"{comparison(claim, arms)}{gain} ({', '.join(notes)})"


def _rival(arm: str, grader: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """`the best prompt (few-shot)` where it is; else the arm in words."""
    prompts = {a: arms[a][grader] for a in PROMPTS if a in arms and grader in arms[a]}
    if len(prompts) > 1 and max(prompts, key=lambda a: prompts[a]) == arm:
        return f"the best prompt ({arm})"
    return {"base": "the base model", "prompt": "the prompt", "few-shot": "few-shot prompting"}.get(arm, arm)


def _p_value(claim: Mapping[str, Any]) -> str:
    """`mid-p = 0.027`, `p < 0.001`."""
    name = "mid-p" if claim["test"].startswith("mid-p") else "p"
    return f"{name} < 0.001" if claim["p"] < 0.001 else f"{name} = {claim['p']:.3f}"


def signed_points(share: float) -> str:
    """`+29.5`, `−3.0`: a difference of shares in points."""
    return f"{share * 100:+.1f}".replace("-", "−")


def _range(claim: Mapping[str, Any]) -> str:
    low, high = (f"{claim[k] * 100:.1f}".replace("-", "−") for k in ("low", "high"))
    return f"{low} to {high}"


def _points(share: float) -> str:
    return f"{share * 100:g} points"


def _claims_named(names: Sequence[str]) -> str:
    quoted = [f"“{n}”" for n in names]
    if len(quoted) == 1:
        return f"the claim {quoted[0]}"
    return f"the claims {', '.join(quoted[:-1])} and {quoted[-1]}"
