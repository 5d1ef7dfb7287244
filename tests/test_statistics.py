"""Statistics against independent implementations, and their coverage on data whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from fastsds.evaluation.statistics import (
    holm,
    mcnemar,
    paired_bootstrap,
    t_quantile,
    two_level_bootstrap,
)


def test_mcnemar_is_the_exact_binomial_test():
    generator = np.random.default_rng(0)
    for n in (1, 2, 5, 40, 900):
        for share in (0.5, 0.8):
            a, b = generator.random(n) < share, generator.random(n) < 0.5
            result = mcnemar(a, b)
            only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
            assert (result.only_a, result.only_b) == (only_a, only_b)
            expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
            assert math.isclose(result.p, expected, rel_tol=1e-9)


def test_mcnemar_known_values():
    assert mcnemar([1, 1, 1, 1, 1], [0, 0, 0, 0, 0]).p == 2 / 32
    assert mcnemar([1, 0], [0, 1]).p == 1.0
    assert mcnemar([1, 1], [1, 1]) == (0, 0, 1.0)
    assert 0 < mcnemar(np.ones(1000), np.zeros(1000)).p < 1e-300  # exact where floats would be gone
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5], [0])


def test_paired_bootstrap_against_a_loop():
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.3, 1, 60), generator.normal(0, 1, 60)
    result = paired_bootstrap(a, b, seed=3)
    means, other = [], np.random.default_rng(99)
    for _ in range(10_000):
        rows = other.integers(60, size=60)
        means.append(np.mean([a[r] - b[r] for r in rows]))
    assert result.difference == pytest.approx(np.mean(a) - np.mean(b))
    low, high = np.percentile(means, [2.5, 97.5])
    assert result.low == pytest.approx(low, abs=0.02) and result.high == pytest.approx(high, abs=0.02)
    assert paired_bootstrap(a, b, seed=3) == result != paired_bootstrap(a, b, seed=4)
    reverse = paired_bootstrap(b, a, seed=3)
    assert (reverse.low, reverse.high) == pytest.approx((-result.high, -result.low))


def test_paired_bootstrap_uses_the_pairing():
    generator = np.random.default_rng(2)
    b = generator.random(200)
    constant = paired_bootstrap(b + 0.1, b)
    assert constant.high - constant.low < 1e-9
    shuffled = paired_bootstrap(b + 0.1, generator.permutation(b))
    assert shuffled.high - shuffled.low > 0.05


def covered(interval, truth):
    return interval.low <= truth <= interval.high


def test_paired_bootstrap_covers():
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(400):
        right = generator.random((2, 150)) < np.array([[0.6], [0.5]])
        hits += covered(paired_bootstrap(right[0], right[1], 400, trial), 0.1)
    assert 0.91 < hits / 400 < 0.98


def crossed(generator, seeds, items, sd_seed, sd_item, sd_rest):
    """Differences with an effect of the run, one of the item, and the rest; the true mean is 0."""
    return (
        generator.normal(0, sd_seed, (seeds, 1))
        + generator.normal(0, sd_item, (1, items))
        + generator.normal(0, sd_rest, (seeds, items))
    )


@pytest.mark.parametrize("sd", [(1.0, 1.0, 1.0), (0.2, 3.0, 1.0), (0.0, 0.0, 1.0)])
def test_two_level_bootstrap_covers_for_five_seeds(sd):
    generator = np.random.default_rng(4)
    trials, hits, short, own = 200, 0, 0, 0
    for trial in range(trials):
        a = crossed(generator, 5, 80, *sd)
        b = np.zeros_like(a)
        hits += covered(two_level_bootstrap(a, b, 400, trial), 0)
        short += covered(two_level_bootstrap(a, b, 400, trial, expand=False), 0)
        own += covered(two_level_bootstrap(a, b, 200, trial, shared_items=False, expand=False), 0)
    assert hits / trials > 0.92, "the interval that is reported must cover"
    if sd[0] == 1.0:
        assert short / trials < 0.92, "a plain percentile interval of five seeds is known to be too short"
    if sd[1] == 3.0:
        assert own < short, "items that all runs share must be drawn once for all"


def test_two_level_bootstrap_against_a_loop():
    generator = np.random.default_rng(5)
    a = [generator.normal(0.5, 1, n) for n in (7, 9, 4)]
    b = [np.zeros(len(x)) for x in a]
    result = two_level_bootstrap(a, b, shared_items=False, expand=False)
    means = []
    for _ in range(10_000):
        of = []
        for s in generator.integers(3, size=3):
            of.append(a[s][generator.integers(len(a[s]), size=len(a[s]))].mean())
        means.append(np.mean(of))
    low, high = np.percentile(means, [2.5, 97.5])
    assert result.difference == pytest.approx(np.mean([x.mean() for x in a]))
    assert result.low == pytest.approx(low, abs=0.04) and result.high == pytest.approx(high, abs=0.04)


def test_two_level_bootstrap_of_one_seed_is_the_paired_one():
    generator = np.random.default_rng(6)
    a, b = generator.random(50), generator.random(50)
    one, two = paired_bootstrap(a, b), two_level_bootstrap([a], [b])
    assert two.difference == pytest.approx(one.difference)
    assert two.low == pytest.approx(one.low, abs=0.01) and two.high == pytest.approx(one.high, abs=0.01)


def test_shared_items_must_be_the_same():
    with pytest.raises(ValueError, match="same items"):
        two_level_bootstrap([[1, 2], [1, 2, 3]], [[0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="shape"):
        paired_bootstrap([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="as many seeds"):
        two_level_bootstrap([[1]], [])


def test_t_quantile():
    for dof in (1, 2, 3, 4, 5, 9, 30):
        for p in (0.6, 0.975, 0.999):
            assert t_quantile(p, dof) == pytest.approx(stats.t.ppf(p, dof), rel=1e-9)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    generator = np.random.default_rng(7)
    for _ in range(20):
        p = generator.random(6) ** 3
        # by definition: rejected at level x exactly if every smaller p is below x / (how many are left)
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2):
            rejected, rank = set(), sorted(range(6), key=lambda k: p[k])
            for k, index in enumerate(rank):
                if p[index] > level / (6 - k):
                    break
                rejected.add(index)
            assert {k for k in range(6) if adjusted[k] <= level} == rejected
