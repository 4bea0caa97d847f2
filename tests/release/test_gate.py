"""Every result by hand, and what must not matter: order, missing scores, who registered when."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from metier import stats
from metier.config import Claim, Prove
from metier.records import Completion, Score
from metier.release import gate

COST = {"seconds_per_case": 0.1, "tokens_per_case": 100.0, "dollars_per_1000": 0.01}
SEALED = {"registered": "ab" * 32, "seal": "cd" * 32, "registered_before_training": True}
KEYS = [
    *("claim", "arm", "against", "grader", "estimate", "low", "high", "confidence", "n", "clusters", "test", "p"),
    *("p_exact", "b", "c", "smallest_detectable", "margin", "missing", "result", "why", "needs"),
]


def pairs(b: int, c: int, n: int) -> list[tuple[float, float]]:
    """(tuned, prompt) scores of n cases: b where only tuned is right, c where only the prompt is, else both."""
    return [(1.0, 0.0)] * b + [(0.0, 1.0)] * c + [(1.0, 1.0)] * (n - b - c)


def judge(
    scored: list[tuple[float | None, float | None]],
    *claims: Claim,
    schema: list[float | None] | None = None,
    groups: dict[str, str] | None = None,
    shuffle: int | None = None,
    **sealed: Any,
) -> dict[str, Any]:
    """The verdict on tuned and prompt from their `all` scores, case by case, and tuned's `schema` scores."""
    scores, completions = [], []
    for i, values in enumerate(scored):
        for arm, value in zip(("tuned", "prompt"), values, strict=True):
            completions.append(Completion(f"c{i}", arm, "{}", 100, 10, "stop", 0.1))
            scores.append(Score(f"c{i}", arm, "all", value, ""))
    scores += [Score(f"c{i}", "tuned", "schema", value, "") for i, value in enumerate(schema or [])]
    if shuffle is not None:
        random.Random(shuffle).shuffle(scores)
        random.Random(shuffle + 1).shuffle(completions)
    prove = Prove(arms=("prompt", "tuned"), claims=claims or (Claim(beats="prompt"),))
    costs = {"tuned": COST, "prompt": COST}
    return gate.verdict(scores, completions, groups or {}, prove, sealed=SEALED | sealed, costs=costs)


def only(verdict: dict[str, Any]) -> dict[str, Any]:
    (claim,) = verdict["claims"]
    return dict(claim)


# beats


def test_pass_by_hand() -> None:
    # Tango's interval of b = 12, c = 2, n = 50 is published as (.0611, .3447).
    # mid-p = 2 P(X < 2) + P(X = 2) with X ~ Bin(14, 1/2) = (2 * 15 + 91) / 16384.
    verdict = judge(pairs(12, 2, 50))
    claim = only(verdict)
    assert (claim["estimate"], claim["low"], claim["high"]) == pytest.approx((0.2, 0.0611, 0.3447), abs=1e-4)
    assert claim["p"] == pytest.approx(121 / 16384)
    assert (claim["b"], claim["c"], claim["n"], claim["clusters"], claim["missing"]) == (12, 2, 50, 50, 0)
    assert (claim["result"], claim["needs"], verdict["verdict"]) == ("pass", None, "ship")


def test_fail_where_the_interval_holds_no_improvement() -> None:
    verdict = judge(pairs(2, 12, 50))
    claim = only(verdict)
    assert (claim["low"], claim["high"]) == pytest.approx((-0.3447, -0.0611), abs=1e-4)
    assert (claim["result"], claim["needs"], verdict["verdict"]) == ("fail", None, "do-not-ship")


def test_fail_where_the_interval_lies_below_the_margin() -> None:
    # No discordant pair in 100: Tango's interval is +-.0370, so a gain of 5 points is ruled out and of 2 is not.
    assert only(judge(pairs(0, 0, 100), Claim(beats="prompt", margin=0.05)))["result"] == "fail"
    assert only(judge(pairs(0, 0, 100), Claim(beats="prompt", margin=0.02)))["result"] == "unclear"


def test_unclear_needs_the_cases_that_find_the_difference_seen() -> None:
    # D = .04, p_d = .2: (1.95996 sqrt(.2) + .84162 sqrt(.2 - .0016))^2 / .0016 = 978.7.
    verdict = judge(pairs(12, 8, 100))
    claim = only(verdict)
    assert claim["low"] < 0 < claim["estimate"]
    assert (claim["result"], claim["needs"], verdict["verdict"]) == ("unclear", 979, "cannot-tell")


@pytest.mark.parametrize(("b", "c"), [(5, 5), (4, 6)])
def test_unclear_without_a_gain_needs_the_cases_that_find_the_margin(b: int, c: int) -> None:
    # 2 points at p_d = .2 take 3,923 cases (table of powers for paired answers).
    assert only(judge(pairs(b, c, 50)))["needs"] == 3923


def test_unclear_is_finite_without_discordance_and_margin() -> None:
    claim = only(judge(pairs(0, 0, 30), Claim(beats="prompt", margin=0)))
    assert claim["result"] == "unclear"
    assert claim["needs"] == stats.cases_for_superiority(0.005, 0.005)


def test_better_but_below_the_margin_is_unclear() -> None:
    claim = only(judge(pairs(8, 1, 400)))
    assert 0 < claim["low"] < claim["estimate"] < claim["margin"] < claim["high"]
    assert (claim["result"], claim["needs"]) == ("unclear", stats.cases_for_superiority(0.005, 9 / 400))


def test_groups_are_clusters() -> None:
    groups = {f"c{i}": f"g{i // 2}" for i in range(50)}
    claim = only(judge(pairs(12, 2, 50), groups=groups))
    alone = only(judge(pairs(12, 2, 50)))
    assert (claim["n"], claim["clusters"]) == (50, 25)
    assert claim["test"].startswith("cluster")
    assert claim["high"] - claim["low"] > alone["high"] - alone["low"]
    unclear = only(judge(pairs(12, 8, 100), groups={f"c{i}": f"g{i // 4}" for i in range(100)}))
    assert unclear["needs"] > 979


def test_graded_scores_are_compared_too() -> None:
    scored: list[tuple[float | None, float | None]] = [(0.75, 0.5)] * 20 + [(1.0, 0.5)] * 20
    verdict = judge(scored)
    claim = only(verdict)
    assert (claim["estimate"], claim["b"], claim["result"]) == (pytest.approx(0.375), None, "pass")
    assert verdict["arms"]["tuned"]["intervals"]["all"]["low"] is None


# format


@pytest.mark.parametrize(
    ("failures", "n", "result"),
    [(0, 400, "pass"), (4, 400, "pass"), (5, 400, "unclear"), (12, 400, "fail"), (0, 122, "pass"), (0, 121, "unclear")],
)
def test_format_by_hand(failures: int, n: int, result: str) -> None:
    # 4 of 400 are .99, and the exact lower limit .9746 rules out .97. 12 of 400 have the upper limit .9844 < .99.
    # No failure in n has the lower limit .025 ** (1 / n), above .97 from n = 122.
    verdict = judge(pairs(0, 0, n), Claim(format="valid"), schema=[0.0] * failures + [1.0] * (n - failures))
    claim = only(verdict)
    assert (claim["claim"], claim["against"], claim["grader"]) == ("format: valid", None, "schema")
    assert claim["estimate"] == 1 - failures / n
    assert claim["low"] <= claim["estimate"] <= claim["high"]
    assert claim["result"] == result
    assert (claim["needs"] is not None) == (result == "unclear")


@pytest.mark.parametrize(("failures", "n"), [(5, 400), (0, 60), (1, 60), (2, 150), (399, 40_000)])
def test_format_needs_are_cases_at_which_the_share_settles(failures: int, n: int) -> None:
    schema: list[float | None] = [0.0] * failures + [1.0] * (n - failures)
    claim = only(judge(pairs(0, 0, n), Claim(format="valid"), schema=schema))
    if claim["result"] == "unclear":
        needs, share = claim["needs"], claim["estimate"]
        assert needs > n
        interval = stats.clopper_pearson(round(share * needs), needs)
        assert (share >= 0.99 and interval.low > 0.97) or interval.high < 0.99


# missing scores


def test_a_null_is_missing_and_never_zero() -> None:
    scored = [*pairs(12, 2, 99), (None, 1.0)]
    verdict = judge(scored)
    claim = only(verdict)
    assert (claim["n"], claim["missing"], claim["result"]) == (99, 1, "pass")
    assert claim["estimate"] == pytest.approx(10 / 99)
    assert verdict["arms"]["tuned"]["all"] == pytest.approx(97 / 99)
    assert verdict["arms"]["tuned"]["intervals"]["all"]["missing"] == 1
    assert "1 not judged" in gate.headline(verdict)[1]


def test_more_than_two_percent_missing_cannot_tell() -> None:
    two = judge([*pairs(12, 2, 98), (None, 1.0), (1.0, None)])
    three = judge([*pairs(12, 2, 97), (None, 1.0), (1.0, None), (None, None)])
    assert (two["verdict"], three["verdict"]) == ("ship", "cannot-tell")
    assert (only(three)["missing"], only(three)["needs"]) == (3, 100)
    lost = judge([*pairs(2, 12, 47), (None, None), (None, None)])
    assert lost["verdict"] == "cannot-tell"


def test_nothing_judged_cannot_tell() -> None:
    verdict = judge([(None, None)] * 10, Claim(beats="prompt"), Claim(format="valid"))
    assert verdict["verdict"] == "cannot-tell"
    for claim in verdict["claims"]:
        assert list(claim) == KEYS
        assert (claim["estimate"], claim["n"], claim["missing"], claim["result"]) == (None, 0, 10, "unclear")
        assert claim["needs"] >= 10
    assert "no case could be judged" in gate.headline(verdict)[1]
    assert "all" not in verdict["arms"]["tuned"]


# the verdict


def test_any_fail_decides_before_any_unclear() -> None:
    claims = Claim(beats="prompt"), Claim(format="valid")
    failing, few = [0.0] * 25 + [1.0] * 25, [1.0] * 50
    assert judge(pairs(12, 8, 50), *claims, schema=failing)["verdict"] == "do-not-ship"
    assert judge(pairs(12, 2, 50), *claims, schema=few)["verdict"] == "cannot-tell"
    assert judge(pairs(30, 5, 200), *claims, schema=[1.0] * 200)["verdict"] == "ship"


def test_claims_registered_after_training_do_not_ship() -> None:
    late = judge(pairs(12, 2, 50), registered_before_training=False)
    assert late["verdict"] == "cannot-tell"
    assert "registered after training" in late["note"]
    assert only(late)["result"] == "pass"
    assert "registered after training" in gate.headline(late)[0]
    assert judge(pairs(2, 12, 50), registered_before_training=False)["verdict"] == "do-not-ship"


def test_order_of_records_does_not_matter() -> None:
    random_ = random.Random(3)
    scored: list[tuple[float | None, float | None]] = [(random_.random(), random_.random()) for _ in range(40)]
    groups = {f"c{i}": f"g{i % 13}" for i in range(40)}
    for given in (scored, pairs(15, 4, 60)):
        texts = {json.dumps(judge(given, groups=groups, shuffle=s), allow_nan=False) for s in (None, 1, 2, 3)}
        assert len(texts) == 1


def test_keys_and_means_as_the_contract_has_them() -> None:
    random_ = random.Random(5)
    scored: list[tuple[float | None, float | None]] = [(random_.random(), None) for _ in range(33)]
    verdict = judge(scored, Claim(beats="prompt"), Claim(format="valid"), schema=[1.0] * 33)
    assert list(verdict) == ["verdict", "note", "claims", "arms", "sealed"]
    assert [list(c) for c in verdict["claims"]] == [KEYS, KEYS]
    assert verdict["sealed"] == SEALED
    assert list(verdict["arms"]) == ["prompt", "tuned"]
    tuned = verdict["arms"]["tuned"]
    assert list(tuned) == ["all", "schema", *COST, "n", "intervals"]
    assert abs(tuned["all"] - sum(a or 0 for a, _ in scored) / 33) < 1e-9
    assert tuned | COST == tuned
    json.dumps(verdict, allow_nan=False)


def test_arms_have_wilson_intervals() -> None:
    tuned = judge(pairs(12, 2, 50))["arms"]["tuned"]
    expected = stats.wilson(48, 50)
    assert tuned["intervals"]["all"] == {"low": expected.low, "high": expected.high, "n": 50, "missing": 0}


def test_broken_invariants_are_asserted() -> None:
    twice = [Score("c0", "tuned", "all", 1.0, "")] * 2
    with pytest.raises(AssertionError, match="twice"):
        gate.verdict(twice, [], {}, Prove(), sealed=SEALED, costs={})
    clash = [Score("c0", "tuned", "n", 1.0, "")]
    completion = Completion("c0", "tuned", "", 1, 1, "stop", 0.1)
    with pytest.raises(AssertionError, match="name of another figure"):
        gate.verdict(clash, [completion], {}, Prove(), sealed=SEALED, costs={"tuned": COST})


# words


def test_headline() -> None:
    claims = Claim(beats="prompt"), Claim(format="valid")
    assert gate.headline(judge(pairs(120, 20, 400), *claims, schema=[1.0] * 400)) == [
        "Ship: all 2 claims hold.",
        "tuned answers 95.0 % all right; the prompt 70.0 %: +25.0 points "
        "(95 % interval 19.8 to 30.3, mid-p < 0.001, 400 cases)",
        "100.0 % of tuned's answers are valid, at least 99 % asked (95 % interval 99.1 to 100.0, 400 cases)",
    ]
    assert gate.headline(judge(pairs(2, 12, 50)))[0] == "Do not ship: the claim “beats: prompt” does not hold."
    unclear = judge(pairs(12, 8, 100))
    assert gate.headline(unclear) == [
        "Cannot tell: the claim “beats: prompt” is unclear; about 979 cases would tell.",
        "tuned answers 92.0 % all right; the prompt 88.0 %: +4.0 points "
        "(95 % interval −5.1 to 13.3, mid-p = 0.383, 100 cases)",
    ]


def test_the_best_prompt_is_named() -> None:
    scores, completions = [], []
    for arm, right in (("prompt", 10), ("few-shot", 20), ("tuned", 38)):
        for i in range(40):
            completions.append(Completion(f"c{i}", arm, "{}", 100, 10, "stop", 0.1))
            scores.append(Score(f"c{i}", arm, "all", float(i < right), ""))
    prove = Prove(arms=("prompt", "few-shot", "tuned"), claims=(Claim(beats="prompt"), Claim(beats="few-shot")))
    costs = dict.fromkeys(prove.arms, COST)
    lines = gate.headline(gate.verdict(scores, completions, {}, prove, sealed=SEALED, costs=costs))
    assert "; the prompt 25.0 %" in lines[1]
    assert "; the best prompt (few-shot) 50.0 %" in lines[2]
