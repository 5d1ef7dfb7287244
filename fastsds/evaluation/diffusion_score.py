"""The teacher as a scorer: how well a caption explains a picture's noise (Diffusion Classifier, arXiv 2303.16203).

    S(c, i) = - mean over draws k of  w(t_k) mean over elements of (eps_hat(z_i,t_k, t_k, c) - eps_k)^2
    z_i,t   = sqrt(abar_t) z_i + sqrt(1 - abar_t) eps,     z_i: the mean of the VAE's posterior; guidance 1

All pairs of an item share every (t_k, eps_k), so that noise cancels from their comparison; these depend on (seed, item id, k)
alone. The draws of t are stratified: one in each of as many equal parts of the band. With `correction="unconditional"` a pair
scores S(c, i) - S("", i) (DiffusionITM, NeurIPS 2023): some pictures are denoised better than others, whatever is said of
them. It changes which image a caption chooses, and never which caption an image chooses.
"""

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from math import isqrt

import numpy as np
import torch

from fastsds import ops
from fastsds.arguments import WEIGHTINGS, weights
from fastsds.config import ConfigError
from fastsds.data import SwapItems, digest
from fastsds.evaluation.elimination import Race, run, spread
from fastsds.evaluation.run import PAIRS
from fastsds.evaluation.scorer import weights_digest
from fastsds.evaluation.suite import Composed, ImageRef, Item, Suite, pixels
from fastsds.progress import clock
from fastsds.schedule import level_range, timestep_range

BATCH, STEPS = 64, 32
T_RANGE = (0.3, 0.95)  # below, the latent alone gives the noise away; above, it holds nothing to compare a caption with
GROUP = 8  # batches of pairs whose texts and latents are held at a time
CORRECTIONS = ("none", "unconditional")


class _Question:
    """Captions and images that meet at one series of draws, each different one once.

    images: names of latents, equal for equal ones. said: the captions, and where it is corrected "", which is asked of every
    image that is asked of anything. texts, latents: their rows in the tables of a group.
    """

    def __init__(self, scorer, id: int, captions: Sequence[str], images: Sequence[Hashable], chosen=(), corrected=False):
        (self.said, self.c), (self.images, self.i) = distinct(captions), distinct(images)
        self.id, self.corrected = id, corrected
        self.race = Race(len(self.said), len(self.images), scorer.steps, chosen, scorer.stop)
        self.said += [""] * corrected

    def begin(self, texts: dict[str, int], latents: dict[Hashable, int]) -> None:
        self.texts, self.latents = np.array([texts[c] for c in self.said]), np.array([latents[i] for i in self.images])

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the pairs that still need draws, in `texts` and in `latents`."""
        alive = self.race.alive
        return (np.vstack([alive, alive.any(axis=0)]) if self.corrected else alive).nonzero()

    def put(self, first: int, terms: np.ndarray) -> None:
        """Take the terms of S of all wanted pairs, from the first-th draw on. Shapes: [draws, pairs]."""
        x = np.full((len(terms), len(self.texts), len(self.latents)), np.nan)
        x[:, *self.wanted()] = terms
        self.race.x[first : first + len(terms)] = x[:, :-1] - x[:, -1:] if self.corrected else x

    def scores(self) -> np.ndarray:
        return self.race.scores()[self.c][:, self.i]

    def terms(self) -> np.ndarray:
        return self.race.x[:, self.c][:, :, self.i]


class DiffusionScorer:
    """Scores of a frozen teacher. Every call of its UNet has `batch` pairs, the last of a stage filled up: one shape, so that
    what a pair scores does not depend on what else is asked.

    Args:
        steps: draws of (t, eps) an item. band: (low, high) log SNR they come from; None: `t_range`, fractions of T.
        weighting: w(t): "uniform", as in the paper, or another name of `ops.denoising_loss`'s that goes by the noise level.
        stop: the risk that one choice ends otherwise than with all draws, at which hopeless candidates are dropped
            (elimination.py); None: none is. correction: "none" or "unconditional".
        batch: pairs a UNet call.
    Raises: ValueError for another value, or for a weighting that has no bound in the band.
    """

    name = "diffusion"

    def __init__(
        self, teacher, *, steps: int = STEPS, band: tuple[float, float] | None = None, t_range: tuple[float, float] = T_RANGE,
        weighting: str = "uniform", stop: float | None = None, correction: str = "none", batch: int = BATCH, seed: int = 0,
    ):  # fmt: skip
        by_level = [name for name in WEIGHTINGS if not name.startswith("x0_error")]
        for name, value, known in (("weighting", weighting, by_level), ("correction", correction, CORRECTIONS)):
            if value not in known:
                raise ValueError(f"{name}: one of {', '.join(known)} expected, got {value!r}")
        for name, value in (("steps", steps), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name}: at least 1 expected, got {value}")
        if stop is not None and not 0 < stop < 1:
            raise ValueError(f"stop: a risk between 0 and 1 expected, got {stop}")
        abar = teacher.alphas_cumprod
        self.span = timestep_range(abar, t_range if band is None else None, band)
        self.weights = weights(weighting, abar.sqrt(), (1 - abar).sqrt(), abar, 1)
        if not bool(self.weights[slice(*self.span)].isfinite().all()):
            raise ValueError(f"weighting: {weighting!r} has no bound in the band, where this teacher leaves no signal")
        self.teacher, self.steps, self.stop, self.batch, self.seed = teacher, steps, stop, batch, seed
        self.weighting, self.corrected = weighting, correction == "unconditional"
        self.passes = 0  # pairs and draws that the UNet was asked for
        self._order = np.array(spread(steps))
        self._digests: dict[str, str] = {}

    @property
    def settings(self) -> dict:
        """What scores depend on; the teacher by digests of its parts' weights and of its schedule, and latents' scale."""
        teacher, parts = self.teacher, ("unet", "vae", "text_encoder")
        if not self._digests:
            self._digests = {part: weights_digest(getattr(teacher, part)) for part in parts}
            levels = teacher.alphas_cumprod.cpu().numpy().tobytes()
            self._digests["schedule"] = hashlib.blake2b(levels, digest_size=16).hexdigest()
        vae = teacher.vae.config
        return {
            "steps": self.steps, "timesteps": list(self.span), "weighting": self.weighting, "stop": self.stop,
            "log_snr": list(level_range(teacher.alphas_cumprod, *self.span)), "seed": self.seed,
            "correction": CORRECTIONS[self.corrected], "dtype": str(teacher.dtype).removeprefix("torch."),
            "prediction_type": teacher.prediction_type, "teacher": self._digests, "image_size": teacher.image_size,
            "latents": {"scaling_factor": vae.scaling_factor, "shift_factor": vae.get("shift_factor")},
        }  # fmt: skip

    def score(self, images: Sequence[ImageRef], captions: Sequence[str]) -> np.ndarray:
        """Score every caption with every image, by all draws. Shapes: -> float64 [captions, images].

        All pairs share the draws of one item, whose id is 0: what is scored in several calls compares.
        """
        width = GROUP * self.batch
        parts = [captions[k : k + width] for k in range(0, len(captions), width)]
        asked = (_Question(self, 0, part, [ref], corrected=self.corrected) for ref in images for part in parts)
        found = [q.scores() for q in self._answered(asked, self._encoded)]
        return np.concatenate(found).reshape(len(images), len(captions)).T

    def score_items(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Score the pairs of each item, with draws that come from its id. Shapes: -> float64 [captions, images] each.

        `item.chosen` says which choices have to come out right if `stop` drops candidates; what those score: `Race.scores`.
        """
        return [q.scores() for q in self._answered(self._questions(items), self._encoded)]

    def terms(self, items: Sequence[Item]) -> list[np.ndarray]:
        """The terms of `score_items`' means, in the order in which the draws are made: NaN after a pair's last one.

        Shapes: -> float64 [steps, captions, images] each.
        """
        return [q.terms() for q in self._answered(self._questions(items), self._encoded)]

    def score_latents(self, latents: torch.Tensor, captions: Sequence[Sequence[str]], ids: torch.Tensor) -> np.ndarray:
        """Score latents in place of images, by all draws: what a student's h_w(f(x)) says to the teacher.

        Shapes: latents [N, I, C, h, w], captions [N][K], ids int64 [N] -> float64 [N, K, I].
        Raises: ValueError for latents of another shape.
        """
        n, count, shape = len(captions), latents.shape[1], self.teacher.latent_shape
        if tuple(latents.shape) != (n, count, *shape) or len(ids) != n:
            raise ValueError(f"latents: shape {(n, 'I', *shape)} expected for {len(ids)} ids, got {tuple(latents.shape)}")
        flat = latents.flatten(0, 1)
        asked = (_Question(self, i, captions[k], range(k * count, (k + 1) * count)) for k, i in enumerate(ids.tolist()))
        answered = self._answered(asked, lambda rows: flat[rows].to(self.teacher.device, torch.float32))
        return np.stack([q.scores() for q in answered])

    def forecast(self, suite: Suite) -> str:
        """How many passes of the UNet a suite takes, and about how long, from two timed calls."""
        pairs = images = 0
        for part in suite.parts if isinstance(suite, Composed) else [suite]:
            if part.gallery:
                pairs += len(part.items) * sum(map(len, part.texts))
                images += len(part.items) * -(-sum(map(len, part.texts)) // isqrt(PAIRS))  # of each block of texts
            else:
                pairs += sum(len(item.captions) * len(item.images) for item in part.items)
                images += sum(len(item.images) for item in part.items)
        passes = self.steps * (pairs + images * self.corrected)
        z, text = torch.zeros(1, *self.teacher.latent_shape, device=self.teacher.device), self.teacher.embed([""])
        one = np.zeros(self.batch, np.int64)
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            self._terms(z, text, one, one, one, one)
            took = time.monotonic() - began
        least = "at most " if self.stop and not suite.gallery else ""
        about = clock(passes / self.batch * took)
        return f"{suite.name}: {least}{passes:,} passes of the UNet, {least or 'about '}{about} on {self.teacher.device}"

    def _questions(self, items: Sequence[Item]) -> Iterator[_Question]:
        for item in items:
            yield _Question(self, digest(item.id.encode()), item.captions, item.images, item.chosen, self.corrected)

    def _answered(self, asked: Iterable[_Question], latents: Callable[[list], torch.Tensor]) -> Iterator[_Question]:
        """The questions, their races run. latents: names -> [n, C, h, w]."""
        for group in self._groups(asked):
            texts = _numbered(c for q in group for c in q.said)
            images = _numbered(i for q in group for i in q.images)
            z, text = latents(list(images)), self.teacher.embed(list(texts))
            for q in group:
                q.begin(texts, images)
            run([q.race for q in group], lambda first, last: self._fill(group, z, text, first, last))  # noqa: B023
            yield from group

    def _fill(self, group: list[_Question], z: torch.Tensor, text: torch.Tensor, first: int, last: int) -> None:
        """Ask the draws first, ... last - 1 of all pairs that need them."""
        draws, units, sizes = self._order[first:last], [], []
        for q in group:
            c, i = q.wanted()
            pairs = np.stack([np.full(len(c), q.id), q.texts[c], q.latents[i]])
            units += [np.vstack([pairs, np.full(len(c), draw)]) for draw in draws]
            sizes.append(len(draws) * len(c))
        terms = self._terms(z, text, *np.hstack(units))
        for q, own in zip(group, np.split(terms, np.cumsum(sizes)[:-1]), strict=True):
            q.put(first, own.reshape(len(draws), -1))

    @torch.no_grad()
    def _terms(self, z, text, ids: np.ndarray, texts: np.ndarray, latents: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """One term of S a pair. Shapes: ids, rows of text, rows of z, draws, int64 [n] -> float64 [n]."""
        found, place = [], self.teacher.device
        for start in range(0, len(ids), self.batch):
            rows = np.arange(start, start + self.batch).clip(max=len(ids) - 1)
            i, c, k, draw = (torch.from_numpy(of[rows]).to(place) for of in (ids, texts, latents, draws))
            t, eps = timesteps_and_noise(self.teacher, i, draw, self.span, draw, self.steps, self.seed)
            found.append(self.teacher.score(z[k], t, eps, text[c]).double() * self.weights[t].double())
        self.passes += len(ids)
        return torch.cat(found)[: len(ids)].cpu().numpy()

    def _groups(self, asked: Iterable[_Question]) -> Iterator[list[_Question]]:
        """Questions of about GROUP batches of pairs."""
        group, pairs = [], 0
        for q in asked:
            group.append(q)
            pairs += q.race.alive.size
            if pairs >= GROUP * self.batch:
                yield group
                group, pairs = [], 0
        if group:
            yield group

    def _encoded(self, images: list[ImageRef]) -> torch.Tensor:
        """Latents of images, one after another: none depends on the others. Shapes: -> fp32 [n, C, h, w]."""
        try:
            return torch.cat([self.teacher.encode(pixels(ref, self.teacher.image_size)[None]) for ref in images])
        except FloatingPointError as error:  # of the command line's --teacher and --precision
            raise ConfigError(f"scorer {self.name}: {error}") from error


def diffusion_scores(
    teacher,
    items: SwapItems,
    *,
    draws: int = 8,
    t_range: tuple[float, float] = T_RANGE,
    batch: int = 256,
    latents: torch.Tensor | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
) -> np.ndarray:
    """Score all four pairs of each swap item by all draws: `DiffusionScorer.score_latents` of the VAE's latents, or others.

    Shapes: latents [N, 2, C, h, w] or None, ids int64 [N] or None: 0 .. N-1 -> float64 [N, 2 captions, 2 images].
    """
    scorer = DiffusionScorer(teacher, steps=draws, t_range=t_range, batch=batch, seed=seed)
    if latents is None:
        parts = items.pixels.flatten(0, 1).split(batch)
        latents = torch.cat([teacher.encode(part) for part in parts]).unflatten(0, (-1, 2))
    return scorer.score_latents(latents, items.captions, torch.arange(len(items)) if ids is None else ids)


def timesteps_and_noise(
    teacher, ids: torch.Tensor, visit, span: tuple[int, int], part=0, parts: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One (t, eps) an item, from (seed, id, visit) alone: t in the part-th of `parts` equal parts of the timesteps in span.

    Shapes: ids int64 [b]; visit and part ints, or int64 [b] -> int64 [b], fp32 [b, C, h, w]. Args: span: half-open.
    """
    first, last = span
    u = ops.Noise(seed, ops.draw(ops.Purpose.TIMESTEP, visit), ids).uniform(1)[:, 0].double()  # in (0, 1]
    t = (first + (part + 1 - u) / parts * (last - first)).long().clamp(first, last - 1)
    return t, ops.Noise(seed, ops.draw(ops.Purpose.NOISE, visit), ids).normal(teacher.latent_shape)


@torch.no_grad()
def pair_scores(teacher, z: torch.Tensor, text: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """One term of S for every caption with every latent of an item, at the item's one (t, eps).

    Shapes: z [b, I, C, h, w], text [b, K, L, D], t [b], eps [b, C, h, w] -> fp32 [b, K captions, I latents].
    """
    (b, latents), captions = z.shape[:2], text.shape[1]

    def pairs(x, of: str):  # [b, I or K, ...] or [b, ...] -> [b K I, ...], over (item, caption, latent)
        x = {"caption": lambda: x[:, :, None], "latent": lambda: x[:, None], "item": lambda: x[:, None, None]}[of]()
        return x.expand(b, captions, latents, *x.shape[3:]).flatten(0, 2)

    z, t, eps, text = pairs(z, "latent"), pairs(t, "item"), pairs(eps, "item"), pairs(text, "caption")
    return teacher.score(z.contiguous(), t, eps.contiguous(), text).unflatten(0, (b, captions, latents))


def distinct(values: Sequence) -> tuple[list, list[int]]:
    """The different ones, and which of them each is."""
    numbers = _numbered(values)
    return list(numbers), [numbers[v] for v in values]


def _numbered(values: Iterable) -> dict:
    return {value: k for k, value in enumerate(dict.fromkeys(values))}
