"""Statistics of paired comparisons: every difference of two models is taken on the same items. numpy alone.

Intervals are percentile bootstrap intervals of the mean difference a - b, from a seed; all values are as given (shares,
percentages), nothing is scaled. weights [N]: of a weighted mean sum w d / sum w, as a macro mean is one; None: all alike.
"""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CHUNK = 500  # resamples at a time: bounds the index matrix
MANY = 1000  # degrees of freedom, past which t is the normal


class Interval(NamedTuple):
    """A mean difference and its bootstrap interval."""

    difference: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Items that only a, or only b, has right, and the exact two-sided p that both are equally often right."""

    only_a: int
    only_b: int
    p: float


def mcnemar(a, b) -> McNemar:
    """Exact McNemar test: of the items on which a and b differ, those won by a are binomial(n, 1/2).

    p = min(1, 2 P(X <= min(only_a, only_b))). Shapes: a, b bool [N].
    """
    a, b = _paired(a, b)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("mcnemar: right or wrong (0 or 1) expected")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    n, ways, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):  # ways = n over k
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return McNemar(only_a, only_b, 1.0 if 2 * tail >= 2**n else 2 * tail / 2**n)


def sign_flips(a, b, weights=None, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The two-sided p of sum w (a - b) if each item's a and b might as well be exchanged, by so many random exchanges.

    p = (1 + resamples with |sum +-w d| >= |sum w d|) / (1 + resamples). With equal weights and a, b of 0 and 1 it estimates
    McNemar's p. Shapes: a, b, weights [N]; None: all alike.
    """
    a, b = _paired(a, b)
    v = (a - b) * (1.0 if weights is None else _weights(weights, len(a)))
    sizes, counts = np.unique(np.abs(v), return_counts=True)  # of n exchanges Binomial(n, 1/2) keep their sign
    kept = np.random.default_rng(seed).binomial(counts, 0.5, size=(resamples, len(counts)))
    sums = np.abs((2 * kept - counts) @ sizes)
    reached = (sums >= abs(v.sum()) - 1e-9 * np.abs(v).sum()).sum()  # equal sums may differ in their last digits
    return float((1 + reached) / (1 + resamples))


def paired_bootstrap(a, b, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95, weights=None) -> Interval:
    """The mean of a - b over items, and its percentile interval from items drawn with replacement, their weights with them.

    Where few items have much of the weight (rare groups of a macro mean) the percentile interval is too short: the tails are
    taken at Phi(-t_f), f = (sum w^2)^2 / sum w^4 degrees of freedom (Satterthwaite's, if all items vary alike).
    Shapes: a, b [N].
    """
    a, b = _paired(a, b)
    d, w, generator = a - b, _weights(weights, len(a)), np.random.default_rng(seed)
    means = [_means(d, w, generator.integers(len(d), size=(n, len(d)))) for n in _chunks(resamples, len(d))]
    return _interval(np.average(d, weights=w), np.concatenate(means), _tail(level, w))


def two_level_bootstrap(
    a, b, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95, shared_items: bool = True, expand: bool = True,
    weights=None,
) -> Interval:  # fmt: skip
    """The mean of a - b over seeds and items, with an interval that holds for new seeds and for new items.

    Each resample draws seeds with replacement, then items: with shared_items one draw of items for all seeds (all runs
    were asked the same items, so what an item does to one run it does to all), else a draw for each seed.
    expand: with S seeds the percentile interval is too short, by sqrt((S - 1) / S) and by normal in place of t; the tails
        are taken at Phi(-sqrt(S / (S - 1)) t_{S-1}) instead (Hesterberg 2015, section 5.3). One seed: items alone.
    Shapes: a, b [S][N]; without shared_items N may differ between seeds. Every seed has the same weight. weights: with
        shared_items alone; of one seed as in `paired_bootstrap`.
    """
    difference, means = _two_levels(a, b, resamples, seed, shared_items, weights)
    return _interval(difference, means, _tail(level, weights, len(a) if expand else 1))


def two_level_p(a, b, resamples: int = RESAMPLES, seed: int = 0, weights=None) -> float:
    """The two-sided p that a and b are alike on new seeds and items, from S > 1 seeds: the companion of the interval above.

    p = 2 P(t_{S-1} > |difference| / (sd sqrt(S / (S - 1)))), sd of the two-level bootstrap's means. Shapes: a, b [S][N].
    """
    if len(a) < 2:
        raise ValueError(f"two_level_p: at least 2 seeds expected, got {len(a)}")
    difference, means = _two_levels(a, b, resamples, seed, True, weights)
    sd = float(means.std()) * math.sqrt(len(a) / (len(a) - 1))
    if sd == 0:
        return 1.0 if difference == 0 else 0.0
    return 2 * (1 - t_cdf(abs(difference) / sd, len(a) - 1))


def _two_levels(a, b, resamples: int, seed: int, shared_items: bool, weights) -> tuple[float, np.ndarray]:
    """The mean difference, and those of the resamples. Shapes: a, b [S][N] -> -, [resamples]."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"two_level_bootstrap: as many seeds in a as in b expected, got {len(a)} and {len(b)}")
    d = [x - y for x, y in (_paired(x, y) for x, y in zip(a, b, strict=True))]
    count, sizes, generator = len(d), [len(x) for x in d], np.random.default_rng(seed)
    if shared_items and len(set(sizes)) != 1:
        raise ValueError(f"two_level_bootstrap: the same items for every seed expected, got {sizes} of them")
    if weights is not None and not shared_items:
        raise ValueError("two_level_bootstrap: weights are of items that all seeds share")
    w, means = _weights(weights, sizes[0]), []
    for n in _chunks(resamples, sum(sizes)):
        chosen = generator.integers(count, size=(n, count))
        weight = np.stack([(chosen == s).sum(axis=1) for s in range(count)], axis=1) / count  # [n, S]
        if shared_items:
            items = generator.integers(sizes[0], size=(n, sizes[0]))
            of_seed = np.stack([_means(x, w, items) for x in d], axis=1)
            means.append((weight * of_seed).sum(axis=1))
            continue
        total = np.zeros(n)
        for place in range(count):  # a seed drawn twice gets two draws of items
            for s in range(count):
                rows = chosen[:, place] == s
                items = generator.integers(sizes[s], size=(int(rows.sum()), sizes[s]))
                total[rows] += d[s][items].mean(axis=1) / count
        means.append(total)
    return np.mean([np.average(x, weights=w) for x in d]), np.concatenate(means)


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: all p at which right / n is within z standard errors sqrt(p (1 - p) / n) of p."""
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def pairs_needed(share: float, level: float = 0.95, power: float = 0.8) -> int:
    """How many items it takes to see that a share is above 1/2: that its two-sided interval is, with probability `power`.

    n = ((z / 2 + z_power sqrt(share (1 - share))) / (share - 1/2))^2, normal approximation.
    """
    if not 0.5 < share < 1:
        raise ValueError(f"pairs_needed: a share between 1/2 and 1 expected, got {share}")
    normal = NormalDist()
    z, z_power = normal.inv_cdf((1 + level) / 2), normal.inv_cdf(power)
    return math.ceil(((z / 2 + z_power * math.sqrt(share * (1 - share))) / (share - 0.5)) ** 2)


def holm(p) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest of m times m - k + 1, never decreasing, at most 1."""
    order, adjusted, highest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for k, index in enumerate(order):
        highest = max(highest, min(1.0, float(p[index]) * (len(p) - k)))
        adjusted[index] = highest
    return adjusted


@lru_cache
def t_quantile(probability: float, dof: int) -> float:
    """The quantile of Student's t for a whole number of degrees of freedom."""
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, dof: int) -> float:
    """P(T < t) of Student's t for a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(dof))
    cosine, sine = math.cos(theta), math.sin(theta)
    if dof % 2:
        term, total = cosine, cosine if dof > 1 else 0.0
        for k in range(3, dof - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return 0.5 + (theta + sine * total) / math.pi
    term = total = 1.0
    for k in range(2, dof, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 0.5 + sine * total / 2


def _interval(difference, means: np.ndarray, tail: float) -> Interval:
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(difference), float(low), float(high))


def _tail(level: float, weights, seeds: int = 1) -> float:
    """What an interval leaves out on either side."""
    tail = (1 - level) / 2
    if seeds > 1:
        return NormalDist().cdf(-math.sqrt(seeds / (seeds - 1)) * t_quantile(1 - tail, seeds - 1))
    if weights is None:
        return tail
    w = np.asarray(weights)
    dof = int((w**2).sum() ** 2 / (w**4).sum() + 1e-9)
    return NormalDist().cdf(-t_quantile(1 - tail, dof)) if dof < MANY else tail


def _means(d: np.ndarray, w: np.ndarray | None, items: np.ndarray) -> np.ndarray:
    """The weighted mean of each resample. Shapes: items [n, N] -> [n]."""
    return d[items].mean(axis=1) if w is None else (w * d)[items].sum(axis=1) / w[items].sum(axis=1)


def _chunks(resamples: int, items: int) -> list[int]:
    size = max(1, min(CHUNK, 4_000_000 // items))
    return [min(size, resamples - done) for done in range(0, resamples, size)]


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"paired values of shape [N] expected, got {a.shape} and {b.shape}")
    return a, b


def _weights(weights, n: int) -> np.ndarray | None:
    if weights is None:
        return None
    w = np.asarray(weights, np.float64)
    if w.shape != (n,) or not (w > 0).all():
        raise ValueError(f"weights: {n} positive numbers expected, got shape {w.shape}, smallest {w.min(initial=np.inf)}")
    return w
