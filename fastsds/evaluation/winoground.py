"""Winoground's scores (arXiv 2204.03162) and swap accuracy, from raw scores alone: one implementation, numpy.

An item has two images and two captions; caption c belongs to image c. S[n, c, i] is the score of caption c with image i.

    text    S[0,0] > S[1,0]  and  S[1,1] > S[0,1]      both images choose their caption          chance 25 %
    image   S[0,0] > S[0,1]  and  S[1,1] > S[1,0]      both captions choose their image          chance 25 %
    group   text and image                                                                       chance 16.67 %
    swap    mean of the two caption choices in `text`: 0, 1/2 or 1                               chance 50 %

All inequalities are strict, so a tie is wrong. Chance is a model whose four scores are independent and never tie; group
is 1/6 and not 1/16 because it asks that the two right scores be the two largest of four.
"""

from typing import NamedTuple

import numpy as np

from fastsds.evaluation.choice import stacked

CHANCE = {"text": 25.0, "image": 25.0, "group": 100 / 6, "swap": 50.0}


class Winoground(NamedTuple):
    """Outcomes an item: bool [N] each."""

    text: np.ndarray
    image: np.ndarray
    group: np.ndarray


def winoground(scores) -> Winoground:
    """Return text, image and group outcomes. Shapes: scores [N, 2 captions, 2 images] (array or tensor) -> bool [N]."""
    s = stacked(scores, 2, 2)
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return Winoground(text, image, text & image)


def swap_accuracy(scores) -> np.ndarray:
    """Return the share of right caption choices an item: 0, 1/2 or 1. Shapes: [N, 2, 2] -> float64 [N]."""
    s = stacked(scores, 2, 2)
    return ((s[:, 0, 0] > s[:, 1, 0]).astype(np.float64) + (s[:, 1, 1] > s[:, 0, 1])) / 2


def tied(scores) -> np.ndarray:
    """Return whether one of the four comparisons of `winoground` is of equal scores. Shapes: [N, 2, 2] -> bool [N]."""
    s = stacked(scores, 2, 2)
    return (s[:, 0] == s[:, 1]).any(axis=1) | (s[:, :, 0] == s[:, :, 1]).any(axis=1)

