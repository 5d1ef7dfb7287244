"""Paired comparisons: each part against an independent implementation, and its coverage where the truth is known."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from fastsds.config import ConfigError
from fastsds.evaluation.compare import Difference, compare, difference
from fastsds.evaluation.measures import Metric, over_groups, over_items
from fastsds.evaluation.results import Result
from fastsds.evaluation.statistics import (
    mcnemar,
    paired_bootstrap,
    sign_flips,
    t_cdf,
    two_level_bootstrap,
    two_level_p,
)

WEIGHTS = np.array([1, 1, 2, 5, 0.5, 3, 1, 1, 4, 2.5])
SIZES, SHARES = (4, 12, 60, 150), (0.5, 0.7, 0.6, 0.4)


def of(n, share, seed=0):
    return np.random.default_rng(seed).random(n) < share


def metric(groups):
    """A macro metric over groups, -1 for what does not count."""
    (found,) = over_groups("x", [None if g < 0 else g for g in groups], 50.0).values()
    return found


# statistics


def test_mcnemar_of_many_items_is_still_exact():
    a, b = of(25_000, 0.62), of(25_000, 0.6, 1)
    found = mcnemar(a, b)
    expected = stats.binomtest(found.only_a, found.only_a + found.only_b).pvalue
    assert found.only_a + found.only_b > 10_000 and found.p == pytest.approx(expected, rel=1e-9)


def test_sign_flips_are_every_exchange():
    """2^10 exchanges, one by one."""
    generator = np.random.default_rng(5)
    a, b = generator.random(10), generator.random(10)
    v = WEIGHTS * (a - b + 0.2)
    sums = [abs(sum(s * x for s, x in zip(signs, v, strict=True))) for signs in itertools.product((1, -1), repeat=10)]
    expected = np.mean([x >= abs(sum(v)) - 1e-12 for x in sums])
    found = sign_flips(a + 0.2, b, WEIGHTS)
    assert 0.02 < expected < 0.9 and found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 10_000))
    assert sign_flips(a, b, WEIGHTS) == sign_flips(a, b, WEIGHTS) != sign_flips(a, b, WEIGHTS, seed=1)
    assert sign_flips(b, a, WEIGHTS) == pytest.approx(sign_flips(a, b, WEIGHTS), abs=0.02)
    assert sign_flips(a, a) == 1.0 and sign_flips(np.ones(60), np.zeros(60)) == 1 / 10_001


def test_sign_flips_of_equal_weights_are_mcnemars():
    for seed, share in enumerate((0.5, 0.55, 0.62)):
        a, b = of(200, share, seed), of(200, 0.5, seed + 10)
        p = mcnemar(a, b).p
        assert sign_flips(a, b) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 10_000) + 1e-4)
        assert sign_flips(a, b, np.full(200, 1 / 200)) == sign_flips(a, b)  # ties of sums are found in floats, too


def test_t_cdf():
    for dof in (1, 2, 3, 4, 9, 30):
        for t in (-2.0, 0.0, 0.7, 4.0):
            assert t_cdf(t, dof) == pytest.approx(stats.t.cdf(t, dof), rel=1e-12)


# intervals and p where the truth is known


def unequal(generator, trials, shares_a, shares_b, sizes):
    """Outcomes of two models on groups of unequal sizes, each with shares of its own; the items of a pair go together."""
    pa, pb = (np.repeat(shares, sizes) for shares in (shares_a, shares_b))
    u = generator.random((trials, sum(sizes)))
    v = np.where(generator.random(u.shape) < 0.5, u, generator.random(u.shape))
    return u < pa, v < pb


@pytest.mark.parametrize(
    "sizes",
    [
        (15,) * 9,  # MMVP's patterns
        (25, 30, 40, 80, 200, 300),  # VG-Attribution's kind
        (1, 1, 1, 2, 3, 5, *(20 * k for k in range(1, 12))),  # VG-Relation's, with rare relations
        (4, 12, 60, 150),
    ],
)
def test_the_interval_of_a_macro_mean_covers(sizes):
    shares, macro = np.linspace(0.4, 0.8, len(sizes)), metric(np.repeat(range(len(sizes)), sizes))
    outcomes = unequal(np.random.default_rng(6), 600, shares, shares - 0.1, sizes)
    found = [paired_bootstrap(a, b, 400, weights=macro.weights()) for a, b in zip(*outcomes, strict=True)]
    assert 0.925 < np.mean([one.low <= 0.1 <= one.high for one in found]) < 0.98


def test_weighted_bootstrap_against_a_loop():
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.3, 1, 10), generator.normal(0, 1, 10)
    found, means, other = paired_bootstrap(a, b, weights=WEIGHTS), [], np.random.default_rng(9)
    for _ in range(10_000):
        rows = other.integers(10, size=10)
        means.append(sum(WEIGHTS[r] * (a[r] - b[r]) for r in rows) / sum(WEIGHTS[r] for r in rows))
    t = stats.t.ppf(0.975, int(sum(WEIGHTS**2) ** 2 / sum(WEIGHTS**4)))
    low, high = np.quantile(means, [stats.norm.cdf(-t), stats.norm.cdf(t)])
    assert 2.3 < t < 3 and found.difference == pytest.approx(sum(WEIGHTS * (a - b)) / sum(WEIGHTS))
    assert found.low == pytest.approx(low, abs=0.06) and found.high == pytest.approx(high, abs=0.06)
    assert paired_bootstrap(b + 0.1, b, weights=WEIGHTS) == pytest.approx((0.1,) * 3)  # what all have in common has no error
    assert paired_bootstrap(a, b, weights=7 * WEIGHTS) == pytest.approx(found, rel=1e-12)
    two = two_level_bootstrap([a], [b], weights=WEIGHTS)
    assert two.low == pytest.approx(low, abs=0.06) and two.high == pytest.approx(high, abs=0.06)


def test_equal_weights_are_no_weights():
    generator = np.random.default_rng(2)
    a, b, equal = generator.random((3, 2000)), generator.random((3, 2000)), np.full(2000, 0.3)
    assert paired_bootstrap(a[0], b[0], 300, weights=equal) == pytest.approx(paired_bootstrap(a[0], b[0], 300))
    assert two_level_bootstrap(a, b, 300, weights=equal) == pytest.approx(two_level_bootstrap(a, b, 300))
    assert two_level_p(a, b, 300, weights=equal) == pytest.approx(two_level_p(a, b, 300))


def test_weights_are_checked():
    for weights in ([1, 2], [1, 0, 1], [1, math.nan, 1]):
        for call in (sign_flips, paired_bootstrap):
            with pytest.raises(ValueError, match="weights: 3 positive numbers"):
                call([1, 0, 1], [0, 0, 1], weights=weights)
    with pytest.raises(ValueError, match="items that all seeds share"):
        two_level_bootstrap([[1, 2]], [[0, 0]], shared_items=False, weights=[1, 1])


MACRO = metric(np.repeat(range(4), SIZES))


def test_p_is_not_too_small_where_there_is_no_difference():
    pairs = list(zip(*unequal(np.random.default_rng(7), 400, SHARES, SHARES, SIZES), strict=True))
    for p in ([sign_flips(a, b, MACRO.weights(), 1000) for a, b in pairs], [mcnemar(a, b).p for a, b in pairs]):
        assert np.mean(np.array(p) <= 0.05) < 0.08 and np.mean(np.array(p) <= 0.5) > 0.35


def test_p_of_several_seeds_is_not_too_small():
    generator, p = np.random.default_rng(8), []
    for trial in range(200):
        seeds, items, rest = generator.normal(size=(5, 1)), generator.normal(size=(1, 40)), generator.normal(size=(5, 40))
        p.append(two_level_p(0.3 * seeds + items + rest, np.zeros((5, 40)), 400, trial))
    assert np.mean(np.array(p) <= 0.05) < 0.08 and np.mean(np.array(p) <= 0.5) > 0.25


def test_p_of_seeds_is_that_of_the_bootstraps_t():
    generator = np.random.default_rng(9)
    a, b = generator.normal(0.4, 1, (4, 30)), generator.normal(0, 1, (4, 30))
    means, other = [], np.random.default_rng(99)
    for _ in range(10_000):
        rows = other.integers(30, size=30)
        means.append(np.mean([np.mean(a[s][rows] - b[s][rows]) for s in other.integers(4, size=4)]))
    t = (a - b).mean() / (np.std(means) * math.sqrt(4 / 3))
    assert two_level_p(a, b) == pytest.approx(2 * stats.t.sf(t, 3), rel=0.05)
    assert two_level_p(b, a) == pytest.approx(two_level_p(a, b))
    assert two_level_p(a, a) == 1.0 and two_level_p(a + 1, a) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="2 seeds"):
        two_level_p(a[:1], b[:1])


# a difference and what it says


def flat(n):
    return Metric("x", np.zeros(n, np.int64), 50.0)


def test_a_difference_chooses_its_test():
    a, b = of(60, 0.6), of(60, 0.5, 1)
    d = difference([a], [b], flat(60))
    expected = mcnemar(a, b)
    assert (d.test, d.p, d.only_a, d.only_b) == ("mcnemar", expected.p, expected.only_a, expected.only_b)
    interval = two_level_bootstrap([a], [b])
    assert d[:3] == pytest.approx([100 * x for x in interval])
    halves = difference([(a + of(60, 0.5, 2)) / 2], [b], flat(60))
    assert halves.test == "exchange" and halves.only_a is None
    macro = metric(np.arange(60) % 7 // 3)
    assert difference([a], [b], macro).test == "exchange"
    seeds = [[a, of(60, 0.6, 3)], [b, of(60, 0.5, 4)]]
    d, w = difference(*seeds, macro), macro.weights()
    assert d.test == "seeds" and d.p == pytest.approx(two_level_p(*seeds, weights=w))
    assert d[:3] == pytest.approx([100 * x for x in two_level_bootstrap(*seeds, weights=w)])
    assert d.points == pytest.approx(np.mean([macro.value(x) - macro.value(y) for x, y in zip(*seeds, strict=True)]))


def test_only_what_counts_is_compared():
    a, b, counted = of(80, 0.6), of(80, 0.5, 1), of(80, 0.4, 2)
    (some,) = over_items("x", counted, 50.0).values()
    assert difference([a], [b], some) == difference([a[counted]], [b[counted]], flat(counted.sum()))
    groups = np.where(counted, np.arange(80) % 5 // 3, -1)
    assert difference([a], [b], metric(groups)) == difference([a[counted]], [b[counted]], metric(groups[counted]))
    (alone,) = over_groups("x", ["one" if c else None for c in counted], 50.0).values()
    assert difference([a], [b], alone).test == "mcnemar"  # the mean over one group weighs all alike


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((1.5, -2.1, 5.04, 0.4123), "+1.5 (95 % -2.1 to +5.0), p = 0.41"),
        ((-0.01, -0.04, 0.0, 1.0), "+0.0 (95 % +0.0 to +0.0), p = 1"),
        ((22.2, 18.1, 26.3, 3.04e-9), "+22.2 (95 % +18.1 to +26.3), p = 3e-09"),
        ((90.0, 80.0, 99.0, 0.0), "+90.0 (95 % +80.0 to +99.0), p < 1e-15"),
    ],
)
def test_a_difference_is_never_said_alone(found, said):
    assert str(Difference(*found, "mcnemar")) == said


# results


def result(suite, right, fingerprint="1", ids=None, other=None, **about):
    """A result with the headline metrics `x` and `x/macro`, the mean over three groups, and `y`, which is none."""
    ids = ids or [str(k) for k in range(len(right))]
    other = right if other is None else other
    rows = [{"id": i, "outcomes": {"x": bool(x), "y": bool(y)}} for i, x, y in zip(ids, right, other, strict=True)]
    macro = metric(np.arange(len(right)) % 5 // 2)
    measures = {"x": flat(len(right)), "x/macro": macro, "y": Metric("y", np.zeros(len(right), np.int64), 50.0)}
    return Result(suite, rows, measures, ("x", "x/macro"), {"suite": suite, "fingerprint": fingerprint, **about})


def test_holm_is_over_the_headline_metrics_of_all_suites():
    pairs = []
    for seed, (name, share) in enumerate((("one", 0.8), ("two", 0.65), ("three", 0.5))):
        of_a, of_b = of(90, share, 2 * seed), of(90, 0.5, 2 * seed + 1)
        pairs.append(([result(name, of_a, other=of_b)], [result(name, of_b, other=of_a)]))
    found = compare(pairs, every=True)
    assert [one.suite for one in found] == ["one"] * 3 + ["two"] * 3 + ["three"] * 3
    assert [one.metric for one in found] == ["x", "x/macro", "y"] * 3
    family = [one for one in found if one.metric != "y"]
    assert [one.p_holm for one in found if one.metric == "y"] == [None] * 3
    p = sorted(one.difference.p for one in family)  # by hand: the k-th smallest of 6, times those that are left
    by_hand = {x: min(1.0, max(p[j] * (6 - j) for j in range(k + 1))) for k, x in enumerate(p)}
    assert [one.p_holm for one in family] == [by_hand[one.difference.p] for one in family]
    alone = compare(pairs)
    assert alone == family and all(one.n == 90 for one in alone)
    assert compare(pairs[:1])[0].p_holm < compare(pairs)[0].p_holm  # the family is what is compared in one call


def test_arms_of_several_seeds():
    a, b = ([result("one", of(90, share, seed), fingerprint="7") for seed in range(3)] for share in (0.7, 0.5))
    (d, macro) = compare([(a, b)])
    assert d.difference.test == macro.difference.test == "seeds"
    assert d.difference.points == pytest.approx(np.mean([x.metrics["x"] - y.metrics["x"] for x, y in zip(a, b, strict=True)]))
    with pytest.raises(ValueError, match="as many seeds in a as in b"):
        compare([(a, b[:2])])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"right": [1, 0, 1, 1]}, "of 5 and 4 items; the first that differs is number 4: '4' and none"),
        ({"ids": list("01x34")}, "of 5 and 5 items; the first that differs is number 2: '2' and 'x'"),
        ({"fingerprint": "2"}, "of items with the same ids, but other captions, boxes or metrics"),
        ({"suite": "mmvp"}, "of suites winoground and mmvp"),
    ],
)
def test_other_items_are_one_error(changed, words):
    a = {"suite": "winoground", "right": [1, 0, 1, 1, 0]}
    with pytest.raises(ConfigError, match="same items alone, these results are " + re.escape(words)):
        compare([([result(**a)], [result(**{**a, "fingerprint": "2", **changed})])])
