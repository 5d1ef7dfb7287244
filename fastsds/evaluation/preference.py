"""Which of two captions a teacher prefers, band by band of log SNR: shares, differences, the range to train in, go or no-go.

From errors of every pair, means over draws: of eps, and of x0hat, which is the error of eps over the SNR. Of n pairs in a band:

    right wins    the share whose eps error with the right caption is the smaller; a tie is no win
    difference    mean of (error with the wrong caption) - (error with the right one) and its standard error, in eps and in x0

A band is *sure* if Wilson's interval at 1 - 5 % / bands lies above 1/2 on real latents: of forty teachers that prefer nothing,
one has such a band. It is *used* if moreover its difference in x0 is at least 3/4 of the greatest of a sure band: at low noise
the latent itself gives x0 away, whatever the caption says, and there is little to teach. The range to train in is the
longest run of bands used; of equally long ones, the one whose differences in x0 sum to more.
"""

import math
from typing import NamedTuple

import numpy as np

from fastsds.evaluation.statistics import pairs_needed, wilson
from fastsds.schedule import log_snr, timestep_range

CAPTIONS = ("right", "swapped", "another's")
LEVEL, SHOWN, ENOUGH = 0.95, 0.6, 0.75  # ENOUGH: of the greatest difference in x0


class Band(NamedTuple):
    """A range of log SNR and its timesteps [first, last)."""

    low: float
    high: float
    first: int
    last: int


class Outcome(NamedTuple):
    """How often, and by how much, the right caption beat another in one band. low, high: Wilson's interval, 95 %."""

    pairs: int
    wins: int
    ties: int
    low: float
    high: float
    sure: bool
    eps: float
    eps_error: float
    x0: float
    x0_error: float

    @property
    def share(self) -> float:
        return self.wins / self.pairs


class Verdict(NamedTuple):
    """go: whether to train; span: log SNR of the range to train in, or None; text: the reason in words."""

    go: bool
    span: tuple[float, float] | None
    bands: tuple[int, ...]
    text: str


def bands_of(alphas_cumprod, count: int) -> list[Band]:
    """A schedule's log SNR in `count` equal bands, from noise to clean; a timestep without any signal is in none.

    Raises: ValueError if a band holds no timestep.
    """
    levels = log_snr(alphas_cumprod)
    levels = levels[levels.isfinite()]
    edges = np.linspace(float(levels.min()), float(levels.max()), count + 1)
    edges[0], edges[-1] = edges[0] - 1e-6, edges[-1] + 1e-6
    return [Band(low, high, *timestep_range(alphas_cumprod, None, (low, high))) for low, high in zip(edges, edges[1:])]


def compare(errors: np.ndarray, wrong: str, latents: int, of: int) -> list[Outcome]:
    """The right caption against a wrong one, in every band.

    Shapes: errors [N, 2 (eps, x0), bands, 3 captions, latents]. Args: of: how many bands are looked at together.
    """
    found = []
    for band in range(errors.shape[2]):
        gap = errors[:, :, band, CAPTIONS.index(wrong), latents] - errors[:, :, band, 0, latents]  # [N, 2]
        n, wins = len(gap), int((gap[:, 0] > 0).sum())
        mean, error = gap.mean(axis=0), gap.std(axis=0, ddof=1) / math.sqrt(n)
        low, high = wilson(wins, n, LEVEL)
        sure = wilson(wins, n, together(of))[0] > 0.5
        ties = int((gap[:, 0] == 0).sum())
        found.append(Outcome(n, wins, ties, low, high, sure, *map(float, (mean[0], error[0], mean[1], error[1]))))
    return found


def together(bands: int) -> float:
    """The level of each of so many intervals that are to hold together (Bonferroni)."""
    return 1 - (1 - LEVEL) / bands


def choose(real: list[Outcome]) -> tuple[int, ...]:
    """The bands to train in: see above. Empty where none is sure."""
    most = max((o.x0 for o in real if o.sure), default=0.0)
    used = [o.sure and o.x0 >= ENOUGH * most for o in real]
    runs = [range(a, b) for a in range(len(real)) for b in range(a + 1, len(real) + 1) if all(used[a:b])]
    return tuple(max(runs, key=lambda run: (len(run), sum(real[k].x0 for k in run)), default=()))


def judge(bands: list[Band], real: list[Outcome], other: list[Outcome], head: list[Outcome] | None) -> Verdict:
    """Go or no-go. Args: real, other: against the swapped, another picture's caption on real latents; head: on h_w(f(x))."""
    n, chosen = real[0].pairs, choose(real)
    if not any(o.sure for o in other):
        return Verdict(False, None, (), (
            "no-go: in no band is it sure that the teacher prefers a picture's own caption to another picture's (best "
            f"{percent(best(other))} of {n} pairs). A teacher that works does: look for a wrong teacher.prediction_type, text "
            "encoder or tokenizer, for untrained weights, or for captions that do not belong to their images"
        ))  # fmt: skip
    if not chosen:
        return Verdict(False, None, (), (
            "no-go: the teacher tells the captions of different pictures apart, but in no band is it sure that it prefers the "
            f"right caption to the swapped one (best {percent(best(real))} of {n} pairs): it would teach what a caption names, "
            f"not how it is arranged. {n} pairs show {percent(smallest_seen(n, len(real)))} or more; try more (--pairs), more "
            "noises (--draws), captions that say where things are, or another teacher"
        ))  # fmt: skip
    span = math.floor(100 * bands[chosen[0]].low) / 100, math.ceil(100 * bands[chosen[-1]].high) / 100
    mean = sum(real[k].share for k in chosen) / len(chosen)
    text = (
        f"go: in log SNR [{span[0]}, {span[1]}] (timesteps {bands[chosen[-1]].first} to {bands[chosen[0]].last - 1}) the "
        f"teacher prefers the right caption on {percent(mean)} of {n} real latents"
    )
    if head is not None:
        said = sum(head[k].share for k in chosen) / len(chosen)
        text += f", and on {percent(said)} of h_w(f(x)): so much the image embedding shows, linearly, before training"
    return Verdict(True, span, chosen, text)


def best(outcomes: list[Outcome]) -> float:
    return max(o.share for o in outcomes)


def smallest_seen(pairs: int, bands: int) -> float:
    """The smallest share, in steps of half a percent, that so many pairs show to be above 1/2 (power 80 %)."""
    return next((k / 200 for k in range(101, 200) if pairs_needed(k / 200, together(bands)) <= pairs), 1.0)


def needed(pairs: int, bands: int) -> str:
    """How many pairs it takes, in words."""
    return (
        f"{percent(SHOWN)} is told from 50 % (power 80 %) by {pairs_needed(SHOWN, together(bands))} pairs in {bands} bands at "
        f"once, by {pairs_needed(SHOWN)} in one band alone; {pairs} pairs show {percent(smallest_seen(pairs, bands))} or more"
    )


def recipe_line(verdict: Verdict) -> str:
    """What makes a recipe train in the range."""
    low, high = verdict.span
    return f'--set loss.t=null --set "loss.log_snr=[{low}, {high}]" --set loss.shift=0.0'


def table(bands: list[Band], outcomes: list[Outcome], other: list[Outcome], chosen: tuple[int, ...] = ()) -> str:
    """Aligned rows, one a band."""
    rows = [("log SNR", "timesteps", "right wins", "95 %", "ties", "difference in eps", "in x0", "another's caption", "")]
    for k, (band, o, easy) in enumerate(zip(bands, outcomes, other, strict=True)):
        rows.append((
            f"{band.low:6.2f} .. {band.high:5.2f}", f"{band.first} .. {band.last - 1}", percent(o.share),
            f"{100 * o.low:.1f} .. {100 * o.high:.1f}", str(o.ties), f"{o.eps:.2g} ± {o.eps_error:.1g}",
            f"{o.x0:.2g} ± {o.x0_error:.1g}", percent(easy.share), "train here" if k in chosen else "sure" if o.sure else "",
        ))  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
