"""Two models on the same items: how far apart each metric is, within what interval, and how easily chance does as much.

    points      of the metric, a - b
    interval    95 %, paired bootstrap: items are drawn with their weights; with several seeds two-level, seeds and then items
    p           two-sided, that nothing tells the two apart
                  mcnemar    exact, of outcomes 0 and 1 that all weigh the same
                  exchange   a macro mean, or outcomes such as 1/2: 10,000 times each item's two outcomes are exchanged, or not;
                             with equal weights that is McNemar's test again
                  seeds      several seeds: t of the two-level bootstrap
    Holm p      over one family: the headline metrics of all suites that are compared in one call

Items are taken to be independent. Captions of one image are not quite, so intervals of recalls are a little too short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation.measures import Metric
from fastsds.evaluation.results import Result
from fastsds.evaluation.statistics import holm, mcnemar, sign_flips, two_level_bootstrap, two_level_p

LEAST = 1e-15  # smaller ones are not told apart


class Difference(NamedTuple):
    """a - b in points. only_a, only_b: items that one alone has right, where the test is McNemar's."""

    points: float
    low: float
    high: float
    p: float
    test: str
    only_a: int | None = None
    only_b: int | None = None

    def __str__(self) -> str:
        """Say it with its interval and p: +1.5 (95 % -2.1 to +5.0), p = 0.41."""
        points, low, high = (round(x, 1) + 0.0 for x in self[:3])  # + 0.0: no -0.0
        return f"{points:+.1f} (95 % {low:+.1f} to {high:+.1f}), p {shown(self.p)}"


@dataclass
class Compared:
    """A metric of a suite. n: how many items count. p_holm: None of what is no headline metric."""

    suite: str
    metric: str
    n: int
    difference: Difference
    p_holm: float | None = None


def shown(p: float) -> str:
    """A p with its sign: "= 0.41", "= 3e-09", "< 1e-15"."""
    return f"= {p:.2g}" if p >= LEAST else f"< {LEAST:.0e}"


def difference(a, b, metric: Metric, seed: int = 0) -> Difference:
    """Compare one metric of two arms, of as many seeds each. Shapes: a, b [seeds][N], the metric's outcome by item."""
    counted = metric.groups >= 0
    weights = metric.weights()[counted]
    weights = None if len(np.unique(weights)) == 1 else weights
    a, b = ([100 * np.asarray(outcome, np.float64)[counted] for outcome in arm] for arm in (a, b))
    points = two_level_bootstrap(a, b, seed=seed, weights=weights)
    if len(a) > 1:
        return Difference(*points, two_level_p(a, b, seed=seed, weights=weights), "seeds")
    (a,), (b,) = a, b
    if weights is None and np.isin([a, b], (0, 100)).all():
        test = mcnemar(a > 0, b > 0)
        return Difference(*points, test.p, "mcnemar", test.only_a, test.only_b)
    return Difference(*points, sign_flips(a, b, weights, seed=seed), "exchange")


def compare(pairs: Sequence[tuple[Sequence[Result], Sequence[Result]]], every: bool = False, seed: int = 0) -> list[Compared]:
    """Compare two models, or two arms of as many seeds, on every suite that both answered.

    Args: pairs: for each suite, the results of the one and of the other, a seed each. every: all metrics, not the headline ones
        alone; Holm's family is of these in any case.
    Raises: ConfigError if results of a pair are of other items.
    """
    found, family = [], []
    for a, b in pairs:
        first = a[0]
        for other in (*a[1:], *b):
            same_items(first, other)
        for name, metric in first.measures.items():
            headline = name in first.headline
            if headline or every:
                arms = ([result.outcomes[metric.outcome] for result in arm] for arm in (a, b))
                found.append(Compared(first.suite, name, metric.n, difference(*arms, metric, seed)))
                family += [found[-1]] * headline
    for one, adjusted in zip(family, holm([one.difference.p for one in family]), strict=True):
        one.p_holm = adjusted
    return found


def same_items(a: Result, b: Result) -> None:
    """Raise one ConfigError that names both results, and the first item that differs, unless both answered the same."""
    if a.about["fingerprint"] == b.about["fingerprint"] and _ids(a) == _ids(b):
        return
    x, y = _ids(a), _ids(b)
    k = next((k for k, (one, other) in enumerate(zip(x, y)) if one != other), min(len(x), len(y)))
    if a.suite != b.suite:
        why = f"of suites {a.suite} and {b.suite}"
    elif x != y:
        why = f"of {len(x)} and {len(y)} items; the first that differs is number {k}: " + " and ".join(
            repr(ids[k]) if k < len(ids) else "none" for ids in (x, y)
        )
    else:
        why = "of items with the same ids, but other captions, boxes or metrics"
    raise ConfigError(f"{a.suite}: models are compared on the same items alone, these results are {why}; evaluate both anew")


def _ids(result: Result) -> list[str]:
    return [f"{row['asks']} {row['id']}" if "asks" in row else row["id"] for row in result.rows]
