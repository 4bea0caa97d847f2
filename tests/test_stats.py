"""Published values, brute force, exact enumeration: three witnesses for every number a verdict rests on."""

import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, multinomial, norm, t, ttest_1samp

from metier import stats
from metier.errors import DataError

approx = pytest.approx
# A first call imports SciPy, which no deadline for one example should include.
unhurried = settings(deadline=None)
PAIRS = st.tuples(*[st.integers(0, 40)] * 3).filter(lambda bca: sum(bca) > 0)
SCORES = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30)


def case_lists(labels: st.SearchStrategy[int], scores: st.SearchStrategy[float]) -> st.SearchStrategy[list]:
    return st.lists(st.tuples(scores, scores, labels), min_size=2, max_size=30)


BINARY = case_lists(st.integers(0, 8), st.sampled_from([0.0, 1.0]))
GRADED = case_lists(st.integers(0, 8), st.floats(0, 1))


def chance(n: int, wins: float, losses: float, event: Callable[[int, int], bool]) -> float:
    """Exact probability of event(b, c) over n pairs, leaving out outcomes rarer than 1e-8."""
    b, c = np.divmod(np.arange((n + 1) ** 2), n + 1)
    b, c = b[b + c <= n], c[b + c <= n]
    weight = multinomial.pmf(np.stack([b, c, n - b - c], axis=1), n, [wins, losses, 1 - wins - losses])
    return float(sum(w for w, i, j in zip(weight, b, c, strict=True) if w > 1e-8 and event(int(i), int(j))))


# McNemar


@pytest.mark.parametrize(
    ("b", "c", "mid", "exact"),
    [(15, 5, 0.026604, 0.041389), (40, 12, 8.171e-5, 1.275e-4), (5, 5, 1, 1), (0, 0, 1, 1)],
)
def test_mcnemar_published(b, c, mid, exact):
    assert stats.mcnemar(b, c) == approx((mid, exact), rel=4e-4)


@unhurried
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(b, c):
    assume(b + c > 0)
    mid, exact = stats.mcnemar(b, c)
    assert exact == approx(binomtest(b, b + c).pvalue, rel=1e-12, abs=1e-12)
    # mid-p takes half of the observed outcome's chance from each side: a whole one, or half if b = c
    observed = math.comb(b + c, b) / 2 ** (b + c)
    assert mid == approx(1 if b == c else exact - observed, abs=1e-12)
    assert (mid, exact) == stats.mcnemar(c, b)


@pytest.mark.parametrize(("n", "discordant"), [(100, 0.2), (100, 0.3), (150, 0.1)])
def test_mid_p_errs_as_often_as_it_says(n, discordant):
    half = discordant / 2
    assert 0.03 <= chance(n, half, half, lambda b, c: stats.mcnemar(b, c)[0] <= 0.05) <= 0.06


# Tango


@pytest.mark.parametrize(
    ("b", "c", "n", "confidence", "low", "high"),
    [
        (48, 41, 549, 0.90, -0.0157, 0.0414),  # R PropCIs
        (1, 7, 21, 0.95, -0.5172, -0.0260),
        (12, 2, 50, 0.95, 0.0611, 0.3447),
        (0, 0, 100, 0.95, -0.0370, 0.0370),
    ],
)
def test_tango_published(b, c, n, confidence, low, high):
    interval = stats.tango(b, c, n, confidence)
    assert (interval.low, interval.high) == approx((low, high), abs=6e-5)
    assert interval.confidence == confidence


@pytest.mark.parametrize("n", [1, 10, 1000, 67_000])
def test_tango_at_the_edges(n):
    z2 = norm.ppf(0.975) ** 2
    # b = c = 0: n D / (1 - D) = z^2. b = n: n (1 - D) / (1 + D) = z^2.
    assert stats.tango(0, 0, n).high == approx(z2 / (n + z2))
    won = stats.tango(n, 0, n)
    assert (won.low, won.high) == approx(((n - z2) / (n + z2), 1))


def brute_score(b: int, c: int, n: int, differences: np.ndarray) -> np.ndarray:
    """Score statistic with the losing share found by halving the slope of the log-likelihood."""
    low, high = np.maximum(0, -differences), (1 - differences) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(80):
            q = (low + high) / 2
            slope = (
                (b / (q + differences) if b else 0) + (c / q if c else 0) - 2 * (n - b - c) / (1 - 2 * q - differences)
            )
            low, high = np.where(slope > 0, q, low), np.where(slope > 0, high, q)
    return (b - c - n * differences) / np.sqrt(n * (2 * q + differences * (1 - differences)))


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_tango_holds_what_the_constrained_likelihood_allows(pairs, confidence):
    b, c, n = pairs[0], pairs[1], sum(pairs)
    interval = stats.tango(b, c, n, confidence)
    differences = np.linspace(-0.995, 0.995, 200)
    allowed = np.abs(brute_score(b, c, n, differences)) <= norm.ppf((1 + confidence) / 2)
    clear = np.minimum(abs(differences - interval.low), abs(differences - interval.high)) > 1e-7
    inside = (differences >= interval.low) & (differences <= interval.high)
    assert np.array_equal(inside[clear], allowed[clear])
    limits = np.array([limit for limit in (interval.low, interval.high) if abs(limit) < 1])
    assert np.abs(brute_score(b, c, n, limits)) == approx(norm.ppf((1 + confidence) / 2), abs=1e-6)


@unhurried
@given(PAIRS)
def test_tango_mirrors_exactly(pairs):
    b, c, n = pairs[0], pairs[1], sum(pairs)
    ours, theirs = stats.tango(b, c, n), stats.tango(c, b, n)
    assert (ours.low, ours.high) == (-theirs.high, -theirs.low)
    assert -1 <= ours.low <= (b - c) / n <= ours.high <= 1
    assert ours.low < ours.high


@pytest.mark.parametrize(("n", "wins", "losses"), [(50, 0.2, 0.1), (100, 0.1, 0.1), (100, 0.08, 0.02)])
def test_tango_covers(n, wins, losses):
    def covered(b: int, c: int) -> bool:
        interval = stats.tango(b, c, n)
        return interval.low <= wins - losses <= interval.high

    assert 0.93 <= chance(n, wins, losses, covered) <= 0.97


def test_noninferiority_errs_as_often_as_it_says():
    # the truth sits on the margin of 5 points, 10 % discordant; 90 % two-sided is 95 % one-sided
    assert 0.03 <= chance(248, 0.025, 0.075, lambda b, c: stats.tango(b, c, 248, 0.9).low > -0.05) <= 0.06


# Clusters


@unhurried
@given(SCORES)
def test_singleton_clusters_give_the_plain_standard_error(differences):
    plain = np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert stats.cluster_se(differences) == approx(plain, rel=1e-9, abs=1e-12)
    assert stats.cluster_se(differences, range(len(differences))) == stats.cluster_se(differences)


def test_cluster_standard_error_by_hand():
    # mean 1/4; deviations sum to 1/2 and -1/2: SE^2 = 2/1 * (1/4 + 1/4) / 4^2 = 1/16
    assert stats.cluster_se([1, 0, 0, 0], ["a", "a", "b", "b"]) == approx(0.25)
    # four copies of each of two cases know no more than the two: SE of (1, 0) is 1/2
    assert stats.cluster_se([1, 1, 1, 1, 0, 0, 0, 0], [7] * 4 + [8] * 4) == approx(0.5)
    assert stats.cluster_se([1], None) is None
    assert stats.cluster_se([1, 0, 1], ["a", "a", "a"]) is None


@pytest.mark.parametrize("size", [1, 2], ids=["independent", "clusters of two"])
def test_bootstrap_covers(size):
    random, sims, hits = np.random.default_rng(1), 2000, np.zeros(2)
    labels = np.repeat(np.arange(120 // size), size)
    for seed in range(sims):
        # what graded answers give: many ties, the rest of any size, alike within a cluster
        shared = random.uniform(-1, 1, size=120 // size) * (random.random(120 // size) < 0.5) + 0.1
        d = np.repeat(shared, size) + random.normal(size=120) / 5
        bootstrap = stats.paired_bootstrap(d, labels, draws=500, seed=seed)
        result = stats.paired_continuous(d, 0 * d, labels, span=9, draws=100, seed=seed)
        hits += [interval.low <= 0.1 <= interval.high for interval in (bootstrap, result)]
    assert all((hits / sims >= 0.93) & (hits / sims <= 0.97)), hits / sims


def test_bootstrap_of_few_values_is_the_binomial():
    # 3 of 4 cases differ by 1, so a resampled mean is Binomial(4, 3/4) / 4: P(<= 1/4) = .0508, P(4/4) = .316
    assert stats.paired_bootstrap([1, 1, 1, 0], None, 0.85, draws=50_000) == stats.Interval(0.5, 1.0, 0.85)
    assert stats.paired_bootstrap([1, 1, 1, 0], None, 0.95, draws=50_000) == stats.Interval(0.25, 1.0, 0.95)


def test_bootstrap_weighs_clusters_by_their_cases():
    # clusters (3 cases of 0) and (1 of 1): equal chance of means 0, 1/4, 1/4, 1
    interval = stats.paired_bootstrap([0, 0, 0, 1], "aaab", 0.4)
    assert (interval.low, interval.high) == (0.25, 0.25)
    assert str(stats.paired_bootstrap([0, 0, 0, 1], None, 0.5).low) == "0.0"
    assert stats.paired_bootstrap([0, 0, 0, 1], "aaaa") == stats.Interval(-math.inf, math.inf, 0.95)


def test_sign_flip_counts_the_flips_that_reach_as_far():
    # eight clusters of 1: only all-plus and all-minus reach, 2 of 2^8
    p = stats.sign_flip([1.0] * 16, [i // 2 for i in range(16)], draws=100_000)
    assert p == approx(2 / 256, rel=0.1)
    assert stats.sign_flip([1.0] * 40, draws=999) == 1 / 1000
    assert stats.sign_flip([0.0] * 5, draws=99) == 1
    assert stats.sign_flip([1.0, 1.0, 1.0], "aaa", draws=99) == 1


def test_sign_flip_counts_ties_whatever_their_rounding():
    # 26 of 32 flips end at least as far from 0 as .2; for 10 of them the last bit says less than .2
    assert stats.sign_flip([0.1, 0.1, 0.1, 0.2, -0.3], draws=20_000) == approx(26 / 32, abs=0.01)


def test_sign_flip_errs_as_often_as_it_says_and_a_case_wise_test_does_not():
    random, labels = np.random.default_rng(3), np.repeat(np.arange(30), 5)
    samples = [np.repeat(random.normal(size=30), 5) + random.normal(size=150) for _ in range(1000)]
    by_cluster = np.mean([stats.sign_flip(d, labels, draws=199, seed=i) <= 0.05 for i, d in enumerate(samples)])
    by_case = np.mean([stats.sign_flip(d, draws=199, seed=i) <= 0.05 for i, d in enumerate(samples)])
    assert 0.03 <= by_cluster <= 0.065
    assert by_case > 0.2


# Paired comparisons


def test_paired_binary_without_clusters():
    ours, theirs = [1] * 12 + [0] * 2 + [1] * 36, [0] * 12 + [1] * 2 + [1] * 36
    result = stats.paired_binary(ours, theirs)
    interval, (mid, exact) = stats.tango(12, 2, 50), stats.mcnemar(12, 2)
    assert astuple(result) == (
        *(0.2, interval.low, interval.high, 0.95, 50, 50),
        *("mid-p McNemar, Tango interval", mid, exact, 12, 2, stats.smallest_detectable(50, 0.28)),
    )
    wider_alpha = stats.smallest_detectable(50, 0.28, alpha=0.1)
    assert stats.paired_binary(ours, theirs, confidence=0.9).smallest_detectable == approx(wider_alpha)
    assert stats.paired_binary(np.array(ours, bool), theirs, [f"case-{i}" for i in range(50)]) == result


def test_agreeing_clusters_widen_the_interval():
    # ten copies of each of fifty cases
    ours, theirs = np.repeat([1] * 12 + [0] * 38, 10), np.repeat([0] * 12 + [1] * 2 + [0] * 36, 10)
    labels = np.repeat(np.arange(50), 10)
    result, naive = stats.paired_binary(ours, theirs, labels), stats.paired_binary(ours, theirs)
    differences = np.r_[np.ones(12), -np.ones(2), np.zeros(36)]
    reach = t.ppf(0.975, 49) * differences.std(ddof=1) / math.sqrt(50)
    assert (result.low, result.high) == approx((0.2 - reach, 0.2 + reach))
    assert result.low < naive.low < naive.high < result.high
    assert (result.n, result.clusters, result.b, result.c, result.p_exact) == (500, 50, 120, 20, None)
    assert result.test == "cluster sign-flip, wider of Tango and t interval"
    assert result.p == stats.sign_flip(differences)
    assert result.p > 100 * naive.p
    z = norm.ppf(0.975) + norm.ppf(0.8)
    assert result.smallest_detectable == approx(z * differences.std(ddof=1) / math.sqrt(50))


def test_clusters_that_cancel_do_not_narrow_the_interval():
    # each cluster of two holds a win and a loss but for four: the robust interval is the narrower one
    ours, theirs = [1, 0] * 38 + [1, 1] * 4, [0, 1] * 38 + [0, 1] * 4
    labels = np.repeat(np.arange(42), 2)
    result, score = stats.paired_binary(ours, theirs, labels), stats.tango(42, 38, 84)
    reach = t.ppf(0.975, 41) * stats.cluster_se(np.subtract(ours, theirs), labels)
    assert (result.low, result.high) == (score.low, score.high)
    assert score.high - score.low > 4 * reach
    assert result.smallest_detectable == stats.smallest_detectable(84, 80 / 84)


def test_each_limit_is_the_more_cautious_one():
    random, sources = np.random.default_rng(5), set()
    for _ in range(40):
        labels = random.integers(0, 30, size=60)
        ours, theirs = random.random((2, 60)) < [[0.9], [0.7]]
        result = stats.paired_binary(ours, theirs, labels)
        score, d = stats.tango(result.b, result.c, 60), np.subtract(ours, theirs, dtype=float)
        reach = t.ppf(0.975, result.clusters - 1) * stats.cluster_se(d, labels)
        robust = d.mean() - reach, d.mean() + reach
        assert (result.low, result.high) == approx((min(score.low, robust[0]), max(score.high, robust[1])))
        sources.add((score.low < robust[0], score.high > robust[1]))
    assert len(sources) > 2


def test_nothing_is_certain_from_too_little():
    one = stats.paired_binary([1] * 9, [0] * 9, ["only"] * 9)
    assert (one.low, one.high, one.p, one.clusters, one.smallest_detectable) == (-1, 1, 1, 1, None)
    graded = stats.paired_continuous([0.5] * 9, [0.4] * 9, ["only"] * 9, span=2)
    assert (graded.low, graded.high, graded.p, graded.smallest_detectable) == (-2, 2, 1, None)
    assert graded.test == "cluster sign-flip, wider of bootstrap and no bound (one cluster)"
    # nobody differs: as many hidden differences as the score bound allows for 25 cases that agree
    same = stats.paired_continuous([0.7] * 25, [0.7] * 25)
    bound = stats.tango(0, 0, 25)
    assert (same.low, same.high) == approx((bound.low, bound.high))
    # everyone differs by .5: the others lie at most 1.5 away, and no further than span
    alike = stats.paired_continuous([0.9] * 25, [0.4] * 25)
    assert (alike.low, alike.high) == approx((0.5 - 1.5 * bound.high, 0.5 + 1.5 * bound.high))
    assert stats.paired_continuous([0.9] * 5, [0.4] * 5).high == 1
    assert (same.test, same.smallest_detectable) == ("sign-flip, wider of bootstrap and no-spread bound", None)
    assert stats.paired_continuous([3.0] * 25, [3.0] * 25, span=math.inf).high == math.inf
    assert stats.paired_binary([1] * 50, [1] * 50, np.repeat(range(25), 2)).high == approx(bound.high)


def test_paired_continuous_agrees_with_the_t_test():
    random = np.random.default_rng(11)
    theirs = random.uniform(0.2, 0.6, size=400)
    ours = theirs + random.normal(0.02, 0.1, size=400)
    result, expected = stats.paired_continuous(ours, theirs, confidence=0.9), ttest_1samp(ours - theirs, 0)
    low, high = expected.confidence_interval(0.9)
    assert result.estimate == approx(np.mean(ours - theirs))
    assert (result.low, result.high) == approx((low, high), abs=0.1 * (high - low))
    assert result.p == approx(expected.pvalue, abs=0.005)
    assert result.smallest_detectable == approx((norm.ppf(0.95) + norm.ppf(0.8)) * stats.cluster_se(ours - theirs))
    assert (result.n, result.clusters, result.b, result.c, result.p_exact) == (400, 400, None, None, None)


def test_few_clusters_use_the_t_interval():
    # three seeds: a bootstrap would stop at the best and the worst seed
    ours, reach = [0.1, 0.2, 0.3], t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    result = stats.paired_continuous(ours, [0, 0, 0])
    assert (result.low, result.high) == approx((0.2 - reach, 0.2 + reach))
    assert result.test == "sign-flip, wider of bootstrap and t interval"
    assert stats.paired_bootstrap(ours).high <= 0.3 < result.high


def test_skewed_scores_lean_the_interval():
    leaning = 0
    for seed in range(20):
        d = np.random.default_rng(seed).exponential(size=50)
        result = stats.paired_continuous(d, 0 * d, span=math.inf, draws=2000)
        bootstrap, reach = stats.paired_bootstrap(d, draws=2000), t.ppf(0.975, 49) * np.std(d, ddof=1) / math.sqrt(50)
        assert result.low == approx(min(bootstrap.low, d.mean() - reach))
        assert result.high == approx(max(bootstrap.high, d.mean() + reach))
        leaning += bootstrap.high > d.mean() + reach
    assert leaning > 10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 8)), min_size=2, max_size=30), st.randoms())
def test_neither_order_nor_direction_shows_in_the_last_bit(cases, random):
    def numbers(rows: list[tuple[float, int]], sign: int) -> tuple:
        d, labels = sign * np.array([value for value, _ in rows]), [label for _, label in rows]
        interval = stats.paired_bootstrap(d, labels, draws=50)
        limits = (interval.low, interval.high) if sign == 1 else (-interval.high, -interval.low)
        return stats.cluster_se(d, labels), stats.sign_flip(d, labels, draws=50), *limits

    shuffled = random.sample(cases, len(cases))
    assert numbers(cases, 1) == numbers(shuffled, 1) == numbers(shuffled, -1)


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.tuples(st.just(stats.paired_binary), BINARY), st.tuples(st.just(stats.paired_continuous), GRADED)),
    st.randoms(),
)
def test_order_and_names_of_clusters_do_not_matter(method_and_cases, random):
    method, cases = method_and_cases
    shuffled = random.sample(cases, len(cases))
    ours, theirs, labels = zip(*cases, strict=True)
    again = method(*list(zip(*shuffled, strict=True))[:2], [f"doc {label}" for *_, label in shuffled], draws=100)
    assert repr(method(ours, theirs, labels, draws=100)) == repr(again)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.tuples(st.just(stats.paired_binary), BINARY), st.tuples(st.just(stats.paired_continuous), GRADED)))
def test_swapping_the_systems_mirrors_everything(method_and_cases):
    method, cases = method_and_cases
    ours, theirs, labels = zip(*cases, strict=True)
    for clusters in (labels, None):
        here, there = method(ours, theirs, clusters, draws=100), method(theirs, ours, clusters, draws=100)
        assert (here.estimate, here.low, here.high) == (-there.estimate, -there.high, -there.low)
        assert (here.b, here.c, here.p, here.p_exact) == (there.c, there.b, there.p, there.p_exact)
        assert (here.test, here.smallest_detectable) == (there.test, there.smallest_detectable)
        assert -1 <= here.low <= here.high <= 1
        assert 0 < here.p <= 1


def test_the_seed_decides_every_byte():
    code = (
        "import numpy as np; from metier import stats; d = np.random.default_rng(0).normal(size=200) / 9\n"
        "print([stats.paired_continuous(d, 0 * d, np.arange(200) // 3, seed=s) for s in (4, 5)])"
    )
    first, second = (subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(2))
    assert first.stdout == second.stdout
    d = np.random.default_rng(0).normal(size=200) / 9
    here = [stats.paired_continuous(d, 0 * d, np.arange(200) // 3, seed=seed) for seed in (4, 5)]
    assert f"{here}\n" == first.stdout.decode()
    assert here[0] != here[1]
    assert stats.paired_bootstrap(d, seed=4) != stats.paired_bootstrap(d, seed=5)


def test_large_suites_are_drawn_in_blocks():
    d = np.random.default_rng(2).normal(0.01, 1, size=60_000)
    tracemalloc.start()
    interval, reach = stats.paired_bootstrap(d, draws=300), norm.ppf(0.975) / math.sqrt(60_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6 < 300 * d.nbytes
    assert (interval.low, interval.high) == approx((d.mean() - reach, d.mean() + reach), abs=reach / 3)
    assert stats.sign_flip(d, draws=299) == approx(ttest_1samp(d, 0).pvalue, abs=0.03)


# Rates


@pytest.mark.parametrize(("failures", "n", "percent"), [(0, 313, 0.95), (3, 313, 2.46), (10, 313, 5.36), (0, 50, 5.82)])
def test_clopper_pearson_published(failures, n, percent):
    assert 100 * stats.clopper_pearson(failures, n, 0.95, "upper").high == approx(percent, abs=0.005)


def test_cases_without_failure_that_bound_half_a_percent():
    assert stats.clopper_pearson(0, 598, side="upper").high <= 0.005 < stats.clopper_pearson(0, 597, side="upper").high
    assert (
        stats.clopper_pearson(2, 1258, side="upper").high <= 0.005 < stats.clopper_pearson(2, 1257, side="upper").high
    )


@unhurried
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_rate_intervals_against_scipy(counts, confidence):
    k, n = counts
    for ours, method in ((stats.clopper_pearson, "exact"), (stats.wilson, "wilson")):
        expected = binomtest(k, n).proportion_ci(confidence, method)
        interval = ours(k, n, confidence)
        assert (interval.low, interval.high) == approx((expected.low, expected.high), abs=1e-9)
        assert 0 <= interval.low <= k / n <= interval.high <= 1
        assert interval.confidence == confidence
    assert stats.proportion(k, n, confidence) == stats.wilson(k, n, confidence)
    lower, upper = (stats.clopper_pearson(k, n, confidence, side) for side in ("lower", "upper"))
    assert (lower.high, upper.low) == (1, 0)
    assert lower.low == approx(beta.ppf(1 - confidence, k, n - k + 1) if k else 0, abs=1e-9)
    assert upper.high == approx(beta.ppf(confidence, k + 1, n - k) if k < n else 1, abs=1e-9)


# Planning

SUPERIORITY = {
    0.02: [(979, 1310), (1960, 2623), (3923, 5250), (5885, 7877)],
    0.03: [(434, 580), (870, 1164), (1742, 2331), (2614, 3499)],
    0.05: [(155, 206), (312, 417), (626, 837), (940, 1257)],
    0.10: [None, (77, 101), (155, 206), (234, 312)],
}
NONINFERIORITY = {
    0.01: [(3092, 4282), (6183, 8564), (12366, 17128)],
    0.02: [(773, 1071), (1546, 2141), (3092, 4282)],
    0.03: [(344, 476), (687, 952), (1374, 1904)],
    0.05: [(124, 172), (248, 343), (495, 686)],
}
# cases: (smallest detectable difference at 20 % discordant, margin at 10 %), in points
RESOLUTION = {
    250: (7.9, 5.0),
    313: (7.1, 4.4),
    541: (5.4, 3.4),
    1000: (4.0, 2.5),
    1319: (3.5, 2.2),
    1838: (2.9, 1.8),
    2376: (2.6, 1.6),
    5153: (1.8, 1.1),
    67_000: (0.5, 0.3),
}


def test_superiority_table():
    for difference, row in SUPERIORITY.items():
        for discordant, cell in zip((0.05, 0.1, 0.2, 0.3), row, strict=True):
            if cell is None:
                with pytest.raises(DataError, match="cannot come from"):
                    stats.cases_for_superiority(difference, discordant)
            else:
                cases = [stats.cases_for_superiority(difference, discordant, power) for power in (0.8, 0.9)]
                assert tuple(cases) == cell


def test_noninferiority_table():
    for margin, row in NONINFERIORITY.items():
        for discordant, cell in zip((0.05, 0.1, 0.2), row, strict=True):
            assert tuple(stats.cases_for_noninferiority(margin, discordant, power) for power in (0.8, 0.9)) == cell


def test_resolution_of_known_suites():
    for n, (difference, margin) in RESOLUTION.items():
        assert 100 * stats.smallest_detectable(n, 0.2) == approx(difference, abs=0.1)
        largest, smallest = (stats.cases_for_noninferiority((margin + side) / 100, 0.1) for side in (-0.05, 0.05))
        assert smallest <= n <= largest


def test_joint_power_of_eight_claims():
    # .9875^8 = .9: each of eight claims then needs 2.44 times its cases
    assert 8 * math.log(0.9875) == approx(math.log(0.9), abs=0.005)
    ratio = stats.cases_for_noninferiority(0.002, 0.1, 0.9875) / stats.cases_for_noninferiority(0.002, 0.1)
    assert ratio == approx(2.44, abs=0.005)


@unhurried
@given(
    st.integers(1, 100_000),
    st.floats(0.001, 1),
    st.sampled_from([0.5, 0.8, 0.9, 0.99]),
    st.sampled_from([0.01, 0.05, 0.1]),
)
def test_smallest_detectable_inverts_the_plan(n, discordant, power, alpha):
    difference = stats.smallest_detectable(n, discordant, power, alpha)
    if difference is None:
        assert stats.cases_for_superiority(discordant, discordant, power, alpha) >= n
    else:
        assert 0 < difference <= discordant
        assert stats.cases_for_superiority(min(discordant, difference * (1 + 1e-9)), discordant, power, alpha) <= n + 1
        assert stats.cases_for_superiority(difference * (1 - 1e-9), discordant, power, alpha) >= n


def test_too_few_cases_detect_nothing():
    assert stats.smallest_detectable(76, 0.1) is None
    assert stats.smallest_detectable(77, 0.1) == approx(0.0994, abs=1e-4)
    assert stats.smallest_detectable(1000, 0) is None
    assert stats.smallest_detectable(3, 1) is None
    assert stats.smallest_detectable(1, 1, power=0.3) is None
    # the equation has a solution here, but beyond the largest difference: its root would be negative
    assert stats.smallest_detectable(2, 1, alpha=0.1) is None


@pytest.mark.parametrize(("difference", "discordant"), [(0.05, 0.1), (0.05, 0.2), (0.1, 0.2)])
def test_planned_cases_reach_their_power(difference, discordant):
    n = stats.cases_for_superiority(difference, discordant)
    wins, losses = (discordant + difference) / 2, (discordant - difference) / 2
    assert chance(n, wins, losses, lambda b, c: stats.mcnemar(b, c)[0] <= 0.05) == approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("margin", "discordant", "power"), [(0.05, 0.2, 0.8), (0.03, 0.1, 0.8), (0.05, 0.1, 0.77), (0.05, 0.05, 0.71)]
)
def test_planned_noninferiority_reaches_its_power(margin, discordant, power):
    n, half = stats.cases_for_noninferiority(margin, discordant), discordant / 2
    reached = chance(n, half, half, lambda b, c: stats.tango(b, c, n, 0.9).low > -margin)
    assert reached == approx(power, abs=0.02 if power == 0.8 else 0.01)


# Several questions


def test_holm_by_hand():
    # .01 * 4; .02 * 3 = .06; .03 * 2 = .06; .9
    assert stats.holm([0.03, 0.9, 0.01, 0.02]) == approx((0.06, 0.9, 0.04, 0.06))
    # .04 * 1 would fall below .03 * 2
    assert stats.holm([0.04, 0.03]) == approx((0.06, 0.06))
    assert stats.holm([]) == ()


@unhurried
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_the_stepwise_procedure_does(p_values):
    level, refused = 0.05, 0
    for rank, p in enumerate(sorted(p_values)):
        if p * (len(p_values) - rank) > level:
            break
        refused += 1
    adjusted = stats.holm(p_values)
    assert sum(p <= level for p in adjusted) == refused
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))


# Refusals

NAN = math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.paired_binary([1, 0], [1]), "2 scores of ours, 1 of theirs"),
        (lambda: stats.paired_binary([], []), "ours has shape"),
        (lambda: stats.paired_binary([1, 0.5], [1, 0]), "ours holds 0.5"),
        (lambda: stats.paired_binary([1, 0], [1, NAN]), "theirs holds nan"),
        (lambda: stats.paired_binary([[1, 0]], [[1, 0]]), "ours has shape"),
        (lambda: stats.paired_binary([1, 0], [1, 0], ["a"]), "1 cluster labels, 2 cases"),
        (lambda: stats.paired_binary([1, 0], [1, 0], ["a", None]), "None is not a cluster label"),
        (lambda: stats.paired_continuous([1.0, 0.2], [0.1, NAN]), "theirs holds nan"),
        (lambda: stats.paired_continuous([0.1, math.inf], [0.1, 0.1], span=math.inf), "ours holds inf"),
        (lambda: stats.paired_continuous([0.1, 0.0], [0.1, 1.5]), "a difference of -1.5 is larger"),
        (lambda: stats.cluster_se([]), "differences has shape"),
        (lambda: stats.paired_bootstrap([NAN]), "differences holds nan"),
        (lambda: stats.sign_flip([1.0], [NAN]), "nan is not a cluster label"),
        (lambda: stats.mcnemar(-1, 2), "b is -1"),
        (lambda: stats.mcnemar(1, 2.5), "c is 2.5"),
        (lambda: stats.tango(3, 4, 6), "3 \\+ 4 discordant pairs among 6"),
        (lambda: stats.tango(0, 0, 0), "0 \\+ 0 discordant pairs among 0"),
        (lambda: stats.wilson(0, 0), "0 successes among 0"),
        (lambda: stats.clopper_pearson(5, 4), "5 successes among 4"),
        (lambda: stats.proportion(-1, 4), "successes is -1"),
        (lambda: stats.cases_for_superiority(0, 0.1), "cannot come from"),
        (lambda: stats.cases_for_superiority(0.1, 1.1), "discordant share of 1.1"),
        (lambda: stats.cases_for_superiority(NAN, 0.1), "cannot come from"),
        (lambda: stats.cases_for_noninferiority(0.01, 0), "discordant share of 0"),
        (lambda: stats.cases_for_noninferiority(0, 0.1), "a margin of 0"),
        (lambda: stats.smallest_detectable(0, 0.1), "0.1 discordant of 0 cases"),
        (lambda: stats.smallest_detectable(10, NAN), "nan discordant"),
        (lambda: stats.holm([0.1, NAN]), "outside 0..1"),
    ],
)
def test_bad_numbers_are_refused_with_a_remedy(call, message):
    with pytest.raises(DataError, match=message) as error:
        call()
    assert error.value.fix


def test_the_place_of_a_bad_score_is_named():
    with pytest.raises(DataError) as error:
        stats.paired_binary([1, 1, 1, 2], [0, 0, 0, 0])
    assert error.value.where == "case 3"


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.tango(1, 1, 4, confidence=95),
        lambda: stats.wilson(1, 4, confidence=0),
        lambda: stats.clopper_pearson(1, 4, side="both"),
        lambda: stats.paired_bootstrap([1.0, 0.0], draws=0),
        lambda: stats.sign_flip([1.0, 0.0], draws=0),
        lambda: stats.smallest_detectable(10, 0.1, power=1),
        lambda: stats.cases_for_superiority(0.1, 0.2, alpha=0),
    ],
)
def test_settings_no_caller_should_pass_are_asserted(call):
    with pytest.raises(AssertionError):
        call()


def test_importing_stats_does_not_wait_for_scipy():
    code = "import sys, metier.stats; print(any(name.startswith('scipy') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "False\n"
