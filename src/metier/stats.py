"""How sure we are: intervals, paired tests, and how many cases a claim needs.

Every comparison in a proof is paired: both systems answer the same cases, and a case contributes the
difference of its two scores. Numbers go in as arrays, come out as small frozen records, and depend on the
values and the seed alone: not on the order of the cases, and swapping the two systems mirrors the result.

Cases that came from one document, dialogue or seed are not independent. Whoever calls names that cluster
for each case; without clusters every case stands alone. Where the data cannot carry a statement (one
cluster, no spread at all) the interval opens up or the figure is None. It never shrinks to a point.

Shapes: N cases, C clusters. Rates and differences of rates are shares, so .05 is five points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metier.errors import DataError

Floats = NDArray[np.float64]
Clusters = Sequence[str | int] | NDArray[Any] | None


@dataclass(frozen=True)
class Interval:
    """The values of an unknown quantity that the data do not rule out at this confidence."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Paired:
    """Ours minus theirs on the same cases.

    `p` is two-sided against no difference, and `test` names how it and the interval were computed.
    `p_exact` (McNemar's, for independent cases), `b` (only we were right) and `c` (only they were right)
    exist for right-or-wrong answers. `smallest_detectable` is the true difference that this many cases find
    with power .8 at `alpha = 1 - confidence`; None if no possible difference would be, or no spread was seen.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    n: int
    clusters: int
    test: str
    p: float
    p_exact: float | None
    b: int | None
    c: int | None
    smallest_detectable: float | None


# Paired comparisons


def paired_binary(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Clusters = None,
    confidence: float = 0.95,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Difference in the share of right answers, from two aligned arrays (N,) of 0 and 1.

    Independent cases: mid-p McNemar test and Tango interval. Real clusters: sign-flip test over clusters, and
    the wider, limit by limit, of the Tango interval and the cluster-robust one. Tango's alone would be too
    narrow where the cases of a cluster agree, since it counts each as news; the robust one alone would be too
    narrow with a handful of discordant cases, since it then estimates the spread from next to nothing.
    """
    differences = _difference(_binary(ours, "ours"), _binary(theirs, "theirs"))
    n, count = len(differences), len(_by_cluster(differences, clusters)[0])
    b, c = int(np.count_nonzero(differences > 0)), int(np.count_nonzero(differences < 0))
    interval = tango(b, c, n, confidence)
    detectable = smallest_detectable(n, (b + c) / n, alpha=1 - confidence)
    exact: float | None
    if count == n:
        p, exact = mcnemar(b, c)
        test = "mid-p McNemar, Tango interval"
    else:
        p, exact = sign_flip(differences, clusters, draws=draws, seed=seed), None
        name, robust = _robust(differences, clusters, confidence, span=1.0)
        interval, test = _wider(interval, robust), f"cluster sign-flip, wider of Tango and {name}"
        across = _detectable(differences, clusters, confidence)
        detectable = None if detectable is None or across is None else max(detectable, across)
    return Paired(
        estimate=(b - c) / n,
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        n=n,
        clusters=count,
        test=test,
        p=p,
        p_exact=exact,
        b=b,
        c=c,
        smallest_detectable=detectable,
    )


def paired_continuous(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Clusters = None,
    confidence: float = 0.95,
    *,
    span: float = 1.0,
    draws: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Mean difference of two aligned arrays of scores (N,), in the unit of the scores.

    Sign-flip test over clusters, and the wider, limit by limit, of the bootstrap and the cluster-robust
    interval: the first leans the way that skewed scores do, the second holds with few clusters, where a
    bootstrap is too narrow. `span` is the largest difference the score allows: 1 for scores within 0..1,
    `math.inf` for nats or seconds. It bounds the interval where the data cannot.
    """
    differences = _difference(_finite(ours, "ours"), _finite(theirs, "theirs"))
    worst = int(np.argmax(np.abs(differences)))
    if abs(differences[worst]) > span:
        raise DataError(
            f"a difference of {differences[worst]:g} is larger than these scores allow ({span:g})",
            where=f"case {worst}",
            fix="give scores within 0..1, or state their largest difference as span",
        )
    bootstrap = paired_bootstrap(differences, clusters, confidence, draws=draws, seed=seed)
    name, robust = _robust(differences, clusters, confidence, span)
    interval = _wider(_within(bootstrap, span), robust)
    count = len(_by_cluster(differences, clusters)[0])
    flip = "sign-flip" if count == len(differences) else "cluster sign-flip"
    return Paired(
        estimate=_mean(differences),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        n=len(differences),
        clusters=count,
        test=f"{flip}, wider of bootstrap and {name}",
        p=sign_flip(differences, clusters, draws=draws, seed=seed),
        p_exact=None,
        b=None,
        c=None,
        smallest_detectable=_detectable(differences, clusters, confidence),
    )


def mcnemar(b: int, c: int) -> tuple[float, float]:
    """(mid-p, exact p), two-sided, that b and c discordant pairs are equally likely.

    With X ~ Binomial(b + c, 1/2) and k = min(b, c): exact = 2 P(X <= k), at most 1;
    mid-p = 2 P(X < k) + P(X = k) (Fagerland, Lydersen and Laake 2013). Mid-p is the default because the exact
    test is too timid: its true error rate is well below the stated one.
    """
    b, c = _count(b, "b"), _count(c, "c")
    k, pairs = min(b, c), b + c
    at_most = float(_special().bdtr(k, pairs, 0.5))
    below = float(_special().bdtr(k - 1, pairs, 0.5)) if k else 0.0
    return min(1.0, below + at_most), min(1.0, 2 * at_most)


def tango(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval for (b - c) / n from n pairs, b won and c lost (Tango 1998, eq. 7-9).

    Holds every difference D whose score statistic, with the losing share q at its most likely value given D,
    stays within the normal quantile. It covers well even at b = c = 0, where the usual interval is a point.
    """
    b, c, n = _count(b, "b"), _count(c, "c"), _count(n, "n")
    if not 0 < n >= b + c:
        raise DataError(f"{b} + {c} discordant pairs among {n}", fix="n counts all pairs, at least one")
    z = _two_sided_z(confidence)
    return Interval(_tango_low(b, c, n, z), -_tango_low(c, b, n, z), confidence)


def cluster_se(differences: ArrayLike, clusters: Clusters = None) -> float | None:
    """Standard error of the mean of differences (N,), or None (undefined) with fewer than two clusters.

    SE^2 = C/(C-1) * sum over clusters of (sum of its deviations from the mean)^2 / N^2 (Miller 2024,
    arXiv 2411.00640, with the C/(C-1) correction). Equals s^2/N when each case is its own cluster.
    """
    values = _finite(differences, "differences")
    sums_C, sizes_C = _by_cluster(values, clusters)
    count = len(sums_C)
    if count < 2:
        return None
    squares = math.fsum((sums_C - sizes_C * _mean(values)) ** 2)
    return math.sqrt(count / (count - 1) * squares) / len(values)


def paired_bootstrap(
    differences: ArrayLike,
    clusters: Clusters = None,
    confidence: float = 0.95,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of differences (N,), whole clusters resampled (Efron and Tibshirani 1993).

    Unbounded with fewer than two clusters: resampling one cluster gives itself, which says nothing.
    """
    assert draws > 0, f"draws must be positive: {draws}"
    tail = (1 - _share(confidence, "confidence")) / 2
    sums_C, sizes_C = _by_cluster(_finite(differences, "differences"), clusters)
    if len(sums_C) < 2:
        return Interval(-math.inf, math.inf, confidence)
    rows = list(zip(sums_C.tolist(), sizes_C.tolist(), strict=True))
    mirrored = sorted((-total, size) for total, size in rows)
    # The same draws must serve both directions, or swapping the systems would change the interval.
    swap = mirrored < rows
    means = _resampled_means(np.array(mirrored if swap else rows), draws, np.random.default_rng(seed))
    low, high = (float(limit) for limit in np.quantile(means, [tail, 1 - tail]))
    # Subtracted, not negated: a report should not print -0.0.
    return Interval(0.0 - high, 0.0 - low, confidence) if swap else Interval(low, high, confidence)


def sign_flip(differences: ArrayLike, clusters: Clusters = None, *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of differences (N,) under random signs, one sign for each cluster.

    p = (1 + hits) / (1 + draws), so that it is never 0 (Phipson and Smyth 2010). Tests that the differences
    of a cluster are as likely as their negatives.
    """
    assert draws > 0, f"draws must be positive: {draws}"
    sums_C, _ = _by_cluster(_finite(differences, "differences"), clusters)
    magnitudes = np.sort(np.abs(sums_C[sums_C != 0]))
    # Sums of the same numbers in another order differ in the last bits; they are ties, and ties are hits.
    reached = abs(math.fsum(sums_C)) - 1e-12 * float(magnitudes.sum())
    random = np.random.default_rng(seed)
    hits = 0
    for rows in _blocks(draws, len(magnitudes)):
        signs = 2 * random.integers(0, 2, size=(rows, len(magnitudes)), dtype=np.int8) - 1
        hits += int(np.count_nonzero(np.abs(signs @ magnitudes) >= reached))
    return (1 + hits) / (1 + draws)


# Rates of one system


def proportion(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The interval of one system's rate as reports print it: Wilson's (Brown, Cai and DasGupta 2001)."""
    return wilson(successes, n, confidence)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided score interval of a rate (Wilson 1927): right on average, close to nominal at any n."""
    successes, n = _successes(successes, n)
    z = _two_sided_z(confidence)
    return Interval(_wilson_low(successes, n, z), 1 - _wilson_low(n - successes, n, z), confidence)


def clopper_pearson(
    successes: int, n: int, confidence: float = 0.95, side: Literal["two", "upper", "lower"] = "two"
) -> Interval:
    """Exact interval of a rate (Clopper and Pearson 1934): covers at least as often as it says.

    `upper` and `lower` spend all doubt on that limit and leave the other at 0 or 1: they are for claims such as
    "at most 3 % of answers fail".
    """
    assert side in ("two", "upper", "lower"), f"side must be two, upper or lower: {side}"
    successes, n = _successes(successes, n)
    doubt = 1 - _share(confidence, "confidence")
    tail = doubt / 2 if side == "two" else doubt
    quantile = _special().betaincinv
    low, high = 0.0, 1.0
    if side != "upper" and successes > 0:
        low = float(quantile(successes, n - successes + 1, tail))
    if side != "lower" and successes < n:
        high = float(quantile(successes + 1, n - successes, 1 - tail))
    return Interval(low, high, confidence)


# Planning


def cases_for_superiority(difference: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Paired cases that show a true difference with this power, two-sided at alpha (Connor 1987).

    n = (z_{1-alpha/2} sqrt(p_d) + z_power sqrt(p_d - D^2))^2 / D^2, where p_d (`discordant`) is the share of
    cases that one system gets right and the other wrong.
    """
    _discordant(discordant)
    if not 0 < difference <= discordant:
        raise DataError(
            f"a difference of {difference:g} cannot come from {discordant:g} discordant cases",
            fix="the difference is above 0 and at most the discordant share",
        )
    test, reach = _two_sided_z(1 - _share(alpha, "alpha")), _z(power, "power")
    root = test * math.sqrt(discordant) + reach * math.sqrt(discordant - difference**2)
    return math.ceil((root / difference) ** 2)


def cases_for_noninferiority(margin: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Paired cases that show "worse by less than margin" when nothing changed, one-sided at alpha (Nam 1997).

    n = (z_{1-alpha} + z_power)^2 p_d / margin^2. Right to two points of power for the Tango limit while the
    margin is at most a third of p_d; at half of p_d the real power is some three points lower, at p_d itself nine.
    """
    _discordant(discordant)
    if not 0 < margin <= 1:
        raise DataError(f"a margin of {margin:g} is not possible", fix="give a share above 0, at most 1")
    z = _z(1 - _share(alpha, "alpha"), "alpha") + _z(power, "power")
    return math.ceil(z**2 * discordant / margin**2)


def smallest_detectable(n: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The true difference that n paired cases show with this power: the inverse of `cases_for_superiority`.

    With D = sqrt(p_d) sin(t), its equation reads z_{1-alpha/2} + z_power cos(t) = sqrt(n) sin(t), which has a
    closed solution. None if not even the largest possible difference, p_d, would be shown.
    """
    n = _count(n, "n")
    if n == 0 or not 0 <= discordant <= 1:
        raise DataError(f"{discordant:g} discordant of {n} cases", fix="give a share within 0..1 of at least one case")
    test, reach = _two_sided_z(1 - _share(alpha, "alpha")), _z(power, "power")
    ratio = test / math.hypot(math.sqrt(n), reach)
    angle = math.atan2(reach, math.sqrt(n)) + math.asin(min(1, ratio))
    if ratio > 1 or angle > math.pi / 2 or math.sin(angle) > math.sqrt(discordant):
        return None
    return math.sqrt(discordant) * math.sin(angle)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values adjusted for asking several questions at once, in the given order (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    if not bool(np.all((p >= 0) & (p <= 1))):
        raise DataError("a p-value lies outside 0..1", fix="leave out tests that could not be computed")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return tuple(adjusted.tolist())


# Parts of the above


def _tango_low(b: int, c: int, n: int, z: float) -> float:
    """The smallest difference within z of the data. The largest is this of the swapped systems, mirrored."""
    if c == n:
        return -1.0
    low, high = -1.0, (b - c) / n
    # Halving, because the score is infinite or 0/0 at the two ends, where steeper methods step.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tango_score(b, c, n, middle) > z else (low, middle)
    return high


def _tango_score(b: int, c: int, n: int, difference: float) -> float:
    """Standardised distance of the data from a true difference, -1 < difference < 1."""
    if difference < 0:
        return -_tango_score(c, b, n, -difference)
    middle = (2 * n - b + c) * difference - (b + c)
    product = c * difference * (1 - difference)
    root = math.sqrt(middle**2 + 8 * n * product)
    # Two forms of one root of 2n q^2 + middle q - product = 0: each is free of cancellation on its side.
    losing = 2 * product / (root + middle) if middle > 0 else (root - middle) / (4 * n)
    return (b - c - n * difference) / math.sqrt(n * (2 * losing + difference * (1 - difference)))


def _wilson_low(successes: int, n: int, z: float) -> float:
    if successes == 0:
        return 0.0
    rate, square = successes / n, z**2 / n
    return (rate + square / 2 - math.sqrt(square * (rate * (1 - rate) + square / 4))) / (1 + square)


def _robust(differences: Floats, clusters: Clusters, confidence: float, span: float) -> tuple[str, Interval]:
    """(name, interval) of the mean from the spread between clusters: estimate +- t(C - 1) * cluster_se."""
    estimate, error = _mean(differences), cluster_se(differences, clusters)
    if error is None:
        return "no bound (one cluster)", Interval(-span, span, confidence)
    count = len(_by_cluster(differences, clusters)[0])
    if _spread(differences, error):
        name, reach = "t interval", error * float(_special().stdtrit(count - 1, (1 + confidence) / 2))
    else:
        # Alike in C clusters: the score bound says how many others may differ, and span by how much.
        z = _two_sided_z(confidence)
        name, reach = "no-spread bound", (span + abs(estimate)) * z**2 / (count + z**2)
    return name, _within(Interval(estimate - reach, estimate + reach, confidence), span)


def _detectable(differences: Floats, clusters: Clusters, confidence: float) -> float | None:
    """The difference found with power .8 at this spread between clusters; None if no spread was seen."""
    error = cluster_se(differences, clusters)
    if error is None or not _spread(differences, error):
        return None
    return (_two_sided_z(confidence) + _z(0.8, "power")) * error


def _spread(differences: Floats, error: float) -> bool:
    """Whether a standard error is more than rounding."""
    return error > 1e-12 * float(np.abs(differences).max())


def _wider(one: Interval, other: Interval) -> Interval:
    # By limit, not by width: a claim reads one limit, and that one must be the more cautious of the two.
    return Interval(min(one.low, other.low), max(one.high, other.high), one.confidence)


def _within(interval: Interval, span: float) -> Interval:
    return Interval(max(-span, interval.low), min(span, interval.high), interval.confidence)


def _by_cluster(differences: Floats, clusters: Clusters) -> tuple[Floats, Floats]:
    """(sum of differences, number of cases) of each cluster, (C,) each, in an order set by the values alone."""
    labels = range(len(differences)) if clusters is None else clusters
    if len(labels) != len(differences):
        raise DataError(f"{len(labels)} cluster labels, {len(differences)} cases", fix="give one label for each case")
    groups: dict[str | Integral, list[float]] = {}
    for position, (label, difference) in enumerate(zip(labels, differences.tolist(), strict=True)):
        if not isinstance(label, (str, Integral)):
            raise DataError(
                f"{label!r} is not a cluster label", where=f"case {position}", fix="use strings or whole numbers"
            )
        groups.setdefault(label, []).append(difference)
    rows = sorted((math.fsum(group), len(group)) for group in groups.values())
    sums_C, sizes_C = np.array(rows, dtype=np.float64).T
    return sums_C, sizes_C


def _resampled_means(rows: Floats, draws: int, random: np.random.Generator) -> Floats:
    """Means (draws,) of resampled clusters, from their (sum, cases) rows (C, 2)."""
    sums_C, sizes_C = np.ascontiguousarray(rows.T)
    means = []
    for block in _blocks(draws, len(rows)):
        picked = random.integers(len(rows), size=(block, len(rows)))
        means.append(sums_C[picked].sum(axis=1) / sizes_C[picked].sum(axis=1))
    return np.concatenate(means)


def _blocks(draws: int, width: int) -> Iterator[int]:
    """Numbers of draws that sum to `draws`, so small that one block holds about a million numbers."""
    rows = max(1, 2**20 // max(1, width))
    for start in range(0, draws, rows):
        yield min(rows, draws - start)


def _mean(values: Floats) -> float:
    # Rounded once, so that neither the order nor the direction of the differences can show in the last bit.
    return math.fsum(values) / len(values)


def _finite(values: ArrayLike, name: str) -> Floats:
    """The values as a checked array (N,), N >= 1."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"{name} has shape {array.shape}", fix="give one score for each case, and at least one case")
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise DataError(
            f"{name} holds {array[wrong[0]]}",
            where=f"case {wrong[0]}",
            fix="score every case, or leave the case out of both systems",
        )
    return array


def _binary(values: ArrayLike, name: str) -> Floats:
    array = _finite(values, name)
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if wrong.size:
        raise DataError(
            f"{name} holds {array[wrong[0]]:g}, neither 0 nor 1",
            where=f"case {wrong[0]}",
            fix="compare graded scores with paired_continuous",
        )
    return array


def _difference(ours: Floats, theirs: Floats) -> Floats:
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} scores of ours, {len(theirs)} of theirs", fix="score the same cases in both")
    return ours - theirs


def _count(value: int, name: str) -> int:
    if not isinstance(value, Integral) or value < 0:
        raise DataError(f"{name} is {value}", fix=f"{name} counts cases: give a whole number, 0 or more")
    return int(value)


def _successes(successes: int, n: int) -> tuple[int, int]:
    successes, n = _count(successes, "successes"), _count(n, "n")
    if not 0 < n >= successes:
        raise DataError(f"{successes} successes among {n}", fix="n counts all cases, at least one")
    return successes, n


def _discordant(share: float) -> None:
    if not 0 < share <= 1:
        raise DataError(
            f"a discordant share of {share:g} cannot plan anything",
            fix="give the share of cases the two systems answer differently, above 0, at most 1",
        )


def _share(value: float, name: str) -> float:
    assert 0 < value < 1, f"{name} must lie between 0 and 1: {value}"
    return value


def _z(probability: float, name: str) -> float:
    return float(_special().ndtri(_share(probability, name)))


def _two_sided_z(confidence: float) -> float:
    return _z((1 + _share(confidence, "confidence")) / 2, "confidence")


def _special() -> Any:
    # Imported on first use: commands that measure nothing should not wait for SciPy.
    from scipy import special

    return special
