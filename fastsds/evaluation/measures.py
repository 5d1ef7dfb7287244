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
