"""Where its own candidates stand for each query of a gallery, from raw scores alone; recall at k. numpy.

A query finds at k if fewer than k candidates come before the best of its own. Of those with its score,

    strict      all come before it: a tie is wrong                    above + level < k
    in order    those listed earlier do, as in a stable sort          above + before < k
"""

from typing import NamedTuple

import numpy as np

CHUNK = 256


class Places(NamedTuple):
    """Candidates that are none of the query's own: above its best one, level with it, and level but listed earlier.

    Shapes: int64 [queries] each.
    """

    above: np.ndarray
    level: np.ndarray
    before: np.ndarray

    def found(self, k: int) -> np.ndarray:
        """Whether one of its own is among the first k, ties in the order of the list. Shapes: -> bool [queries]."""
        return self.above + self.before < k

    def found_strictly(self, k: int) -> np.ndarray:
        """Whether one of its own is among the first k, a tie being wrong. Shapes: -> bool [queries]."""
        return self.above + self.level < k


def places(scores, own, labels, chunk: int = CHUNK) -> Places:
    """Return where the best of each query's own candidates stands: its own are those with its label.

    Shapes: scores [queries, candidates], own [queries], labels [candidates]. Args: chunk: queries at a time.
    Raises: ValueError for other shapes, NaN, or a query without a candidate of its own.
    """
    own, labels = np.asarray(own), np.asarray(labels)
    if scores.shape != (len(own), len(labels)):
        raise ValueError(f"scores: shape {(len(own), len(labels))} expected, got {tuple(scores.shape)}")
    order, parts = np.arange(len(labels)), []
    for first in range(0, len(own), chunk):
        s = np.asarray(scores[first : first + chunk])
        mine = own[first : first + chunk, None] == labels
        if np.isnan(s).any():
            raise ValueError(f"scores: NaN in row {first + int(np.isnan(s).any(axis=1).argmax())}")
        if not mine.any(axis=1).all():
            raise ValueError(f"labels: query {first + int(mine.any(axis=1).argmin())} has no candidate of its own")
        best = np.where(mine, s, -np.inf).max(axis=1, keepdims=True)
        level = (s == best) & ~mine
        earliest = (mine & (s == best)).argmax(axis=1)[:, None]
        parts.append([((s > best) & ~mine).sum(axis=1), level.sum(axis=1), (level & (order < earliest)).sum(axis=1)])
    return Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))

