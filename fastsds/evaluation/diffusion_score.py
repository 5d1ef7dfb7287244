"""The diffusion model as a scorer of image-caption pairs (Diffusion Classifier, arXiv 2303.16203).

    S(c, i) = - mean over draws k of  mean over elements of (eps_hat(z_i,t_k, t_k, c) - eps_k)^2,
    z_i,t   = sqrt(abar_t) z_i + sqrt(1 - abar_t) eps

Unweighted, guidance 1. All four pairs of an item share every (t_k, eps_k), so that noise cancels from their comparison;
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
    first, last = timestep_range(teacher.alphas_cumprod, t_range)
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
            found = _scores(teacher, z, text, ids[rows].to(teacher.device), k, draws, (first, last), seed)
            scores[rows] += found.double().cpu().numpy() / draws
    return scores


def _scores(teacher, z, text, ids, k: int, draws: int, span: tuple[int, int], seed: int) -> torch.Tensor:
    """The scores of draw k. Shapes: z [b, 2, C, h, w], text [b, 2, L, D] -> [b, 2 captions, 2 images]."""
    b, (first, last) = len(z), span
    u = ops.Noise(seed, ops.draw(ops.Purpose.TIMESTEP, k), ids).uniform(1)[:, 0].double()  # in (0, 1]
    t = (first + (k + 1 - u) / draws * (last - first)).long().clamp(first, last - 1)
    eps = ops.Noise(seed, ops.draw(ops.Purpose.NOISE, k), ids).normal(teacher.latent_shape)

    def pairs(x, of: str):  # [b, 2, ...] or [b, ...] -> [4 b, ...], over (item, caption, image)
        x = {"caption": lambda: x[:, :, None], "image": lambda: x[:, None], "item": lambda: x[:, None, None]}[of]()
        return x.expand(b, 2, 2, *x.shape[3:]).flatten(0, 2)

    t_all, eps_all = pairs(t, "item"), pairs(eps, "item")
    found = teacher.score(pairs(z, "image").contiguous(), t_all, eps_all.contiguous(), pairs(text, "caption"))
    return found.unflatten(0, (b, 2, 2))
