"""Where h_w starts: as torch makes it, trained alone for a while, or solved for in closed form.

All three run on the plain student, before an engine shards it, and give the same weights on every rank: the batches
are whole contrastive batches, whatever the number of ranks.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from fastsds.config import ConfigError
from fastsds.data import Batch
from fastsds.recipes.sds_clip import SDSCLIP, teacher_pixels
from fastsds.student import LatentHead, Student

WARMUP_VISIT = 1 << 27  # the warm-up's draws are not those of the training that follows


def init_head(
    student: Student,
    teacher,
    batches: Callable[[int], Batch],
    how: str,
    *,
    loss=None,
    seed: int = 0,
    samples: int = 2048,
    warmup_steps: int = 100,
    ridge: float = 1e-3,
    lr: float = 2e-3,
    micro_batch: int = 0,
) -> dict[str, float]:
    """Initialise `student.head` in place.

    Args: batches: k -> the k-th whole batch. how: "default" keeps what load_student made (torch's initialisation, or
        the head of the student's folder), "warmup" trains h_w alone on L_SDS, "ridge" regresses to VAE latents.
        loss, micro_batch: as `SDSCLIP` takes them, for "warmup".
    Returns: {} | {"first", "last"} (L_SDS) | {"r2", "samples"}.
    """
    if how == "default":
        return {}
    if how == "warmup":
        return warmup(student, teacher, batches, loss, seed, warmup_steps, lr, micro_batch)
    if how == "ridge":
        return ridge_regression(student, teacher, batches, samples, ridge)
    raise ConfigError(f"head.init: {how!r}, expected default, warmup or ridge")


def warmup(
    student: Student, teacher, batches, loss, seed: int, steps: int, lr: float, micro_batch: int = 0
) -> dict[str, float]:
    """Train the head alone on L_SDS, the CLIP untouched: AdamW, constant rate, no decay."""
    recipe = SDSCLIP(loss, teacher, seed, micro_batch=micro_batch)
    parameters = list(student.head.parameters())
    trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    history = []
    for step in range(steps):
        batch = batches(step)
        batch = replace(batch, visits=batch.visits + WARMUP_VISIT)
        z = student.head(_embeddings(student, batch))
        value, g_z = recipe.ask(z.detach(), batch)
        for parameter, gradient in zip(parameters, torch.autograd.grad(z, parameters, g_z), strict=True):
            parameter.grad = gradient
        optimizer.step()
        history.append(value)
    for parameter, wanted in zip(parameters, trained, strict=True):
        parameter.grad = None
        parameter.requires_grad_(wanted)
    return {"first": float(history[0]), "last": float(history[-1])} if history else {}


def ridge_regression(student: Student, teacher, batches, samples: int, ridge: float) -> dict[str, float]:
    """Solve h_w by least squares from f / |f| sqrt(d) to the VAE latents of the same images.

        min over W, b of  1/N sum ||W x_n + b - y_n||^2 + ridge ||W||^2

    The features have unit mean square, so `ridge` has no unit. b is not penalised.
    Returns: r2, the share of the latents' variance that the solution explains on its own N samples.
    Numerics: streaming normal equations in float64. Cost: (d + 1)(d + 1 + CHW) doubles.
    """
    head, seen, k = student.head, 0, 0
    width, outputs = head.linear.in_features, head.linear.out_features
    device = head.linear.weight.device
    xx = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
    xy = torch.zeros(width + 1, outputs, dtype=torch.float64, device=device)
    yy = torch.zeros(outputs, dtype=torch.float64, device=device)
    while seen < samples:
        batch = batches(k)
        keep = min(len(batch), samples - seen)
        x = LatentHead.features(_embeddings(student, batch).double())[:keep]
        x = torch.cat([x, x.new_ones(keep, 1)], dim=1)
        y = teacher.encode(teacher_pixels(batch)).to(device).double().flatten(1)[:keep]
        xx, xy, yy = xx + x.T @ x, xy + x.T @ y, yy + (y * y).sum(dim=0)
        seen, k = seen + keep, k + 1
    penalty = torch.full((width + 1,), float(ridge), dtype=torch.float64, device=device)
    penalty[-1] = 0.0
    solution = torch.linalg.solve(xx / seen + torch.diag(penalty), xy / seen)  # [d + 1, CHW]
    with torch.no_grad():
        head.linear.weight.copy_(solution[:-1].T)
        head.linear.bias.copy_(solution[-1])
    residual = yy.sum() - 2 * (solution * xy).sum() + (solution * (xx @ solution)).sum()
    variance = (yy - xy[-1] ** 2 / seen).sum()  # xy's last row is the sum of y
    return {"r2": float(1 - residual / variance), "samples": float(seen)}


@torch.no_grad()
def _embeddings(student: Student, batch: Batch) -> torch.Tensor:
    """Raw image embeddings. Shapes: [B, d]."""
    return student(batch.pixels).image_raw
