"""Which candidates of an item's choices still need draws: successive elimination by paired differences. numpy alone.

A choice is an image among captions, or a caption among images, by the mean score over N draws; all candidates share each
draw, so that what a draw does to all of them cancels. After n of the N draws, d_1 .. d_n being a candidate's differences
to the leader, the mean over all N has the other sign with probability

    p = P(T_{n-1} < - |mean d| / (s sqrt(1/n - 1/N)))          s^2: the sample variance of d, 1 / (n - 1)

if draws are exchangeable and d normal, under a flat prior of its mean and log s (mean d over the N - n others is then
mean d + s sqrt(1/n + 1/(N-n)) T_{n-1}). So the bound is about agreeing with all N draws, not about the truth, and closes
at n = N. A candidate is dropped where p < risk / (looks (candidates - 1)), so that a choice ends otherwise than with all
draws with probability at most `risk`. Looks are taken at n = 4, 8, 16, ...: stages as in Diffusion Classifier (arXiv
2303.16203), whose code keeps a fixed number in each, whatever the differences are: 500, 50, 10 and 1 of ImageNet's classes
after 50, 100, 500 and 1000 draws.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np

from fastsds.evaluation.statistics import t_quantile

FEWEST = 4  # draws before the first look
BOTH = ("captions", "images")


def spread(n: int) -> list[int]:
    """0 .. n-1 in an order of which every beginning is spread evenly: n (v_j + 1/3 mod 1), v van der Corput's sequence.

    The 1/3 keeps the mean of every beginning near the middle. Of 2^m, the first 2^k have one in each of 2^k equal parts.
    """
    order: dict[int, None] = {}
    j = 0
    while len(order) < n:
        bits = max(1, j.bit_length())
        v = int(f"{j:0{bits}b}"[::-1], 2) / 2**bits
        order[int(n * ((v + 1 / 3) % 1))] = None
        j += 1
    return list(order)


def stages(draws: int) -> list[int]:
    """How many draws have been made at each look, and at the end: 4, 8, 16, ..., draws."""
    looks = [FEWEST]
    while looks[-1] < draws:
        looks.append(2 * looks[-1])
    return [n for n in looks if n < draws] + [draws]


class Race:
    """The choices of one item, and what is known of its candidates.

    x: [draws, captions, images], to be filled in for every candidate that is `alive` [captions, images]. Where both kinds of
    choice are asked for, each pair is in two of them, and one order of the scores has to serve both: then all go on until
    every choice is settled. Else each choice is on its own, and drops its candidates one by one.
    Args: chosen: "captions": each image chooses among captions; "images": each caption among images. risk: None: none is
        dropped.
    """

    def __init__(self, captions: int, images: int, draws: int, chosen: tuple[str, ...] = BOTH, risk: float | None = None):
        self.x = np.full((draws, captions, images), np.nan)
        self.alive = np.ones((captions, images), bool)
        self.made = np.zeros((captions, images), np.int64)  # draws of each
        self.risk, self.lost_to = risk, {}
        cells = np.arange(captions * images).reshape(captions, images)
        columns = list(cells.T) if "captions" in chosen and captions > 1 else []
        rows = list(cells) if "images" in chosen and images > 1 else []
        self.choices, self.joint = [*columns, *rows], bool(columns and rows)

    def look(self, n: int) -> None:
        """Say that n draws have been made of all that are alive, and drop what has no hope."""
        self.made[self.alive] = n
        if self.risk is None or n == len(self.x):
            return
        found = [self._losers(cells, n) for cells in self.choices]
        if self.joint:
            if all(len(lost) == len(cells) - 1 for cells, (_, lost) in zip(self.choices, found, strict=True)):
                self.alive[:] = False
            return
        alive = self.alive.reshape(-1)  # a view
        for cells, (leader, lost) in zip(self.choices, found, strict=True):
            self.lost_to |= dict.fromkeys(lost, leader)
            alive[lost] = False
            if alive[cells].sum() == 1:
                alive[cells] = False

    def scores(self) -> np.ndarray:
        """The mean of x over the draws; a dropped candidate's is that of the one it lost to, and their mean difference over
        the draws it had. Shapes: -> [captions, images]."""
        x, made = self.x.reshape(len(self.x), -1), self.made.reshape(-1)
        s = np.array([x[:n, cell].mean() for cell, n in enumerate(made)])
        for cell, leader in reversed(self.lost_to.items()):  # who lost last has its score first
            n = made[cell]
            s[cell] = s[leader] + (x[:n, cell] - x[:n, leader]).mean()
        return s.reshape(self.made.shape)

    def _losers(self, cells: np.ndarray, n: int) -> tuple[int, list[int]]:
        """The leader of a choice, and those that are below it for good."""
        running = [cell for cell in cells.tolist() if self.alive.reshape(-1)[cell]]
        if len(running) < 2:
            return -1, []
        x = self.x.reshape(len(self.x), -1)[:n, running]
        leader = int(x.mean(axis=0).argmax())
        d = x[:, leader, None] - x
        level = self.risk / (len(stages(len(self.x))) - 1) / (len(cells) - 1)
        bound = _quantile(1 - level, n - 1) * d.std(axis=0, ddof=1) * (1 / n - 1 / len(self.x)) ** 0.5
        return running[leader], [cell for cell, below in zip(running, d.mean(axis=0) > bound, strict=True) if below]


def run(races: list[Race], fill: Callable[[int, int], None]) -> None:
    """Run races of equally many draws to their end. Args: fill: (first, last) puts those draws into every race's x."""
    for first, last in pairwise([0, *stages(len(races[0].x))] if races else []):
        if not any(race.alive.any() for race in races):
            return
        fill(first, last)
        for race in races:
            if race.alive.any():
                race.look(last)


@lru_cache
def _quantile(probability: float, dof: int) -> float:
    return t_quantile(probability, dof)
