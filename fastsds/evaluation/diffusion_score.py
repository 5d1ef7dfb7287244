"""The diffusion model as a scorer of image-caption pairs (Diffusion Classifier, arXiv 2303.16203).

    S(c, i) = - mean over draws k of  mean over elements of (eps_hat(z_i,t_k, t_k, c) - eps_k)^2,
    z_i,t   = sqrt(abar_t) z_i + sqrt(1 - abar_t) eps

Unweighted, guidance 1. All pairs of an item share every (t_k, eps_k), so that noise cancels from their comparison;
they depend on (seed, item id, k) alone. The draws of t are stratified: one in each of `draws` equal parts of the range.
"""

import numpy as np
import torch

from fastsds import ops
from fastsds.data import SwapItems
from fastsds.schedule import timestep_range

BATCH = 256
T_RANGE = (0.3, 0.95)  # below, the latent alone gives the noise away; above, it holds nothing to compare a caption with


@torch.no_grad()
def diffusion_scores(
    teacher,
    items: SwapItems,
    *,
    draws: int = 8,
    t_range: tuple[float, float] = T_RANGE,
    batch: int = BATCH,
    latents: torch.Tensor | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
) -> np.ndarray:
    """Score all four pairs of each item by the teacher.

    Shapes: latents [N, 2, C, h, w] or None -> float64 [N, 2 captions, 2 images].
    Args:
        draws: timesteps and noises an item. t_range: fractions of T they come from. batch: pairs a UNet call.
        latents: score these in place of the VAE's latents of the images: what a student's h_w(f(x)) says to the teacher.
        ids: int64 [N], the items' ids in the noise; default 0 .. N-1. The same ids give the same noise.
    Raises: ValueError for latents of another shape.
    """
    n, shape = len(items), teacher.latent_shape
    if latents is not None and tuple(latents.shape) != (n, 2, *shape):
        raise ValueError(f"latents: shape {(n, 2, *shape)} expected, got {tuple(latents.shape)}")
    if draws < 1:
        raise ValueError(f"draws: at least 1 expected, got {draws}")
    span = timestep_range(teacher.alphas_cumprod, t_range)
    ids = torch.arange(n) if ids is None else ids
    scores = np.zeros((n, 2, 2))
    step = max(1, batch // 4)
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        if latents is None:
            z = teacher.encode(items.pixels[rows].flatten(0, 1)).unflatten(0, (-1, 2))
        else:
            z = latents[rows].to(teacher.device, torch.float32)
        text = teacher.embed([c for pair in items.captions[rows] for c in pair]).unflatten(0, (-1, 2))
        for k in range(draws):
            t, eps = timesteps_and_noise(teacher, ids[rows].to(teacher.device), k, span, k, draws, seed)
            scores[rows] += pair_scores(teacher, z, text, t, eps).double().cpu().numpy() / draws
    return scores


def timesteps_and_noise(
    teacher, ids: torch.Tensor, visit: int, span: tuple[int, int], part: int = 0, parts: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One (t, eps) an item, from (seed, id, visit) alone: t in the part-th of `parts` equal parts of the timesteps in span.

    Shapes: ids int64 [b] -> int64 [b], fp32 [b, C, h, w]. Args: span: half-open.
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
