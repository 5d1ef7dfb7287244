"""An image chooses among captions of which the first is the true one, from raw scores alone: numpy.

    right   S[0] > S[c] for every other c      a tie for the first place is wrong      chance 1 / captions
    tied    S[0] = max S[c] over the others    where a reference lets the true caption win a tie, it counts right | tied
"""

from typing import NamedTuple

import numpy as np
import torch


class Choice(NamedTuple):
    """Outcomes an item: bool [N] each. No item is both."""

    right: np.ndarray
    tied: np.ndarray


def choose(scores) -> Choice:
    """Return whether each image chooses its first caption. Shapes: scores [N, captions, 1] -> bool [N]."""
    s = stacked(scores, None, 1)[:, :, 0]
    own, best = s[:, 0], s[:, 1:].max(axis=1)
    return Choice(own > best, own == best)


def stacked(scores, captions: int | None, images: int | None) -> np.ndarray:
    """Return the scores of N items as one float64 array [N, captions, images].

    Args: scores: an array, a tensor, or N of either of shape [captions, images]. captions, images: as many; None: any number.
    Raises: ValueError for another shape, or NaN, naming the first such item.
    """
    if not isinstance(scores, (np.ndarray, torch.Tensor)):
        scores = [_array(s) for s in scores]
        if other := [k for k, s in enumerate(scores) if s.shape != scores[0].shape]:
            raise ValueError(f"scores: item 0 has shape {scores[0].shape}, item {other[0]} {scores[other[0]].shape}")
    s = np.asarray(_array(scores), np.float64)
    if s.ndim != 3 or captions not in (None, s.shape[1]) or images not in (None, s.shape[2]):
        wanted = f"[N, {captions or 'any'} captions, {images or 'any'} images]"
        raise ValueError(f"scores: shape {wanted} expected, got {s.shape}")
    if np.isnan(s).any():
        raise ValueError("scores: NaN in item " + str(int(np.isnan(s).any(axis=(1, 2)).argmax())))
    return s


def _array(scores) -> np.ndarray:
    return scores.detach().cpu().double().numpy() if isinstance(scores, torch.Tensor) else np.asarray(scores)
