"""Metrics are means of outcomes, in percent: over items, over groups, or over the items of one kind; how they are named."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Metric:
    """The mean over groups of the mean of an outcome within each, in percent.

    groups: int [N], the item's group of 0 .. G-1, or -1 where it does not count. chance: percent, of scores that are random.
    """

    outcome: str
    groups: np.ndarray
    chance: float

    @property
    def n(self) -> int:
        """How many items count."""
        return int((self.groups >= 0).sum())

    def value(self, outcome) -> float:
        """The metric, in percent. Shapes: outcome bool or numbers [N]."""
        counted = self.groups >= 0
        groups = self.groups[counted]
        return 100 * float((np.bincount(groups, np.asarray(outcome, np.float64)[counted]) / np.bincount(groups)).mean())

    def weights(self) -> np.ndarray:
        """What each item adds to the metric: value = 100 sum(weights outcome). Shapes: -> float64 [N], of sum 1."""
        sizes = np.bincount(self.groups[self.groups >= 0])
        return np.where(self.groups >= 0, 1 / (len(sizes) * sizes[self.groups]), 0.0)

    def values(self, outcome) -> np.ndarray:
        """One number a counted item whose plain mean is the metric, in percent, whatever the items' weights.

        v_j = m + 100 n w_j (x_j - m / 100), m the metric: 100 x_j where all weigh the same. So an interval of a mean, or a
        paired difference of means, is one of the metric. Shapes: [N] -> float64 [n].
        """
        counted, mean = self.groups >= 0, self.value(outcome)
        x = 100 * np.asarray(outcome, np.float64)[counted]
        if (self.groups[counted] == self.groups[counted][0]).all():
            return x
        return mean + self.n * self.weights()[counted] * (x - mean)

    def error(self, outcome) -> float | None:
        """The metric's standard error over items, in points: of `values`, 1 / (n - 1); None for one item."""
        return None if self.n < 2 else float(self.values(outcome).std(ddof=1)) / self.n**0.5

    def part(self, places: Sequence[int]) -> "Metric":
        """The same metric of some of the items. Chance is as it was."""
        groups = self.groups[places]
        groups[groups >= 0] = np.unique(groups[groups >= 0], return_inverse=True)[1]
        return Metric(self.outcome, groups, self.chance)


def over_items(outcome: str, counted: Sequence[bool], chance: float) -> dict[str, Metric]:
    """The mean over the items that count: {OUTCOME: Metric}."""
    return {outcome: Metric(outcome, np.where(np.asarray(counted, bool), 0, -1), chance)}


def over_groups(outcome: str, labels: Sequence[Hashable], chance: float) -> dict[str, Metric]:
    """The mean over groups of the mean within each: {OUTCOME/macro: Metric}. labels: one an item; None: it does not count."""
    numbers = {label: k for k, label in enumerate(dict.fromkeys(x for x in labels if x is not None))}
    return {f"{outcome}/macro": Metric(outcome, np.array([numbers.get(x, -1) for x in labels]), chance)}


def by_value(outcome: str, name: str, values: Sequence[Sequence[Hashable]], chance: float) -> dict[str, Metric]:
    """The mean over the items of each kind: {OUTCOME/NAME=VALUE: Metric}. values: an item's own, none, one or several."""
    found = {}
    for value in sorted({v for of in values for v in of}, key=str):
        (metric,) = over_items(outcome, [value in of for of in values], chance).values()
        found[f"{outcome}/{name}={value}"] = metric
    return found
