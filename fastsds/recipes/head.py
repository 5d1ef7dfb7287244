"""Where h_w starts: as torch makes it, trained alone for a while, or solved for in closed form.

All three run on the plain student, before an engine shards it, and give the same weights on every rank: every rank does all
of it, on whole contrastive batches in one order, so that nothing depends on how many ranks there are. DeepSpeed then hands
rank 0's weights to all.

    OUTPUT/head/sums.safetensors    what "ridge" has summed so far and of what; rank 0 writes it every half minute, and a run
                                    that was stopped goes on there, with the same bits. Training removes it when it begins.
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastsds.config import ConfigError, Recipe
from fastsds.data import Batch
from fastsds.progress import EVERY, Line, clock
from fastsds.recipes import least_squares
from fastsds.recipes.least_squares import Singular, Sums
from fastsds.recipes.sds_clip import SDSCLIP, teacher_pixels
from fastsds.student import LatentHead, Student
from fastsds.teacher.loading import fingerprint

WARMUP_VISIT = 1 << 27  # the warm-up's draws are not those of the training that follows
HELD_OUT = 8  # "ridge" solves from this many images for each one that it is then judged by
SAVE_EVERY = 30.0  # seconds
FOLDER, SUMS = "head", "sums.safetensors"


def init_head(
    student: Student,
    teacher,
    batches: Callable[[int, torch.Tensor | None], Iterator[tuple[Batch, torch.Tensor]]],
    recipe: Recipe,
    source,
    *,
    latents: Callable[[Batch], torch.Tensor] | None = None,
    rank: int = 0,
) -> dict[str, float]:
    """Initialise `student.head` in place, as `recipe.head` says.

    "default" keeps what load_student made (torch's initialisation, or the head of the student's folder), "warmup" trains h_w
    alone on L_SDS, "ridge" regresses to the images' latents.

    Args: batches: (samples before, cursors) -> the whole batches from there on, each with the cursors after it (`data.Loader`).
        source: what they are from.
        latents: batch -> [B, C, h, w], what "ridge" regresses to; None: the teacher's VAE. rank: 0 writes and prints.
    Returns: {} | {"first", "last"} (L_SDS) | {"samples", "r2"} with, where there are further data, {"held_out", "r2_held_out"}.
    Raises: ConfigError if "ridge" has no unique solution.
    """
    if recipe.head.init == "default":
        return {}
    line = Line(sys.stderr) if rank == 0 else None
    if recipe.head.init == "warmup":
        return warmup(student, teacher, batches, recipe, line)
    if recipe.head.init == "ridge":
        return ridge_regression(student, teacher, batches, recipe, source, latents, line)
    raise ConfigError(f"head.init: {recipe.head.init!r}, expected default, warmup or ridge")


def images_asked(recipe: Recipe, available: int) -> int:
    """How many samples of the sequence `init_head` takes."""
    if recipe.head.init == "ridge":
        return sum(_split(recipe.head.samples, available))
    return recipe.head.warmup_steps * recipe.data.batch if recipe.head.init == "warmup" else 0


def forget_sums(output: Path) -> None:
    """Remove what "ridge" keeps for a run that is stopped before it trains."""
    path = Path(output) / FOLDER / SUMS
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or something else lies in it
        path.parent.rmdir()


def warmup(student: Student, teacher, batches, recipe: Recipe, line: Line | None = None) -> dict[str, float]:
    """Train the head alone on L_SDS, the CLIP untouched: AdamW, constant rate, no decay."""
    objective = SDSCLIP(recipe.loss, teacher, recipe.seed, micro_batch=recipe.teacher.micro_batch)
    parameters = list(student.head.parameters())
    trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.optimizer.head_lr, betas=(0.9, 0.98), weight_decay=0.0)
    history, steps, began = [], recipe.head.warmup_steps, time.monotonic()
    for step, (batch, _) in zip(range(steps), batches(0, None)):
        batch = replace(batch, visits=batch.visits + WARMUP_VISIT)
        z = student.head(_embeddings(student, batch))
        value, g_z = objective.ask(z.detach(), batch)
        for parameter, gradient in zip(parameters, torch.autograd.grad(z, parameters, g_z), strict=True):
            parameter.grad = gradient
        optimizer.step()
        history.append(value)
        _say(line, "warm-up", "steps", step + 1, steps, began)
    for parameter, wanted in zip(parameters, trained, strict=True):
        parameter.grad = None
        parameter.requires_grad_(wanted)
    if not history:
        return {}
    found = {"first": float(history[0]), "last": float(history[-1])}
    if line:
        line.note(f"head: warmed up in {steps} steps, L_SDS {found['first']:.4g} to {found['last']:.4g}")
    return found


def ridge_regression(
    student: Student, teacher, batches, recipe: Recipe, source, latents=None, line: Line | None = None
) -> dict[str, float]:
    """Solve h_w by least squares from x = f / |f| sqrt(d) to the latents y of the same images.

        min over W, b of  1/N sum_n ||W x_n + b - y_n||^2 + ridge ||W||^2

    The features have unit mean square, so the eigenvalues of 1/N sum x x^T have mean 1 and `ridge` has their unit, i.e. none:
    what lies along an eigenvector of eigenvalue `ridge` is halved. b is not penalised. From the first N = `head.samples` of the
    sequence; the next N / 8 judge it (of few data eight ninths and one ninth).
    Returns: as `init_head`; r2 is the share of the latents' variance that h_w explains.
    Cost: N (1 + 1/8) images through the student and the VAE; two times (d + 1)(d + 1 + CHW) doubles, whatever N is.
    """
    if not hasattr(source, "__len__"):
        raise ConfigError("head.init: ridge, but this data.source can be read in its own order alone; expected data on disk")
    linear, ridge = student.head.linear, recipe.head.ridge
    wanted, held = _split(recipe.head.samples, len(source))
    if ridge == 0 and wanted <= linear.in_features:
        raise _singular(ridge, wanted, linear.in_features)
    about = {
        "student": weights_digest(student), "teacher": fingerprint(recipe.teacher.path), "data": source.identity(),
        "latents": f"vae in {teacher.dtype}" if latents is None else "given", "seed": recipe.seed, "samples": wanted,
        "streams": recipe.data.streams,
    }  # fmt: skip
    latents = latents or (lambda batch: teacher.encode(teacher_pixels(batch)))
    path = Path(recipe.output) / FOLDER / SUMS
    fit, judge = sums = [Sums(linear.in_features, linear.out_features, linear.weight.device) for _ in range(2)]
    kept, cursors = dict(zip(("fit", "held_out"), sums, strict=True)), None
    if path.is_file():
        why, cursors = least_squares.take_up(path, about, kept)
        if line:
            line.note(f"head: {path} not used, {why}" if why else f"head: goes on from {path}")
    seen = before = fit.count + judge.count
    began = saved = time.monotonic()
    following = batches(seen, cursors)
    while seen < wanted + held:
        batch, cursors = next(following)
        rows = slice(wanted + held - seen)
        x = LatentHead.features(_embeddings(student, batch).double())[rows]
        y = latents(batch).to(x.device).flatten(1)[rows]
        at = max(0, min(len(x), wanted - seen))
        fit.add(x[:at], y[:at])
        judge.add(x[at:], y[at:])
        seen += len(x)
        _say(line, "ridge", "images", seen, wanted + held, began, before)
        if line and (seen == wanted + held or time.monotonic() - saved > SAVE_EVERY):
            least_squares.write(path, about, kept, cursors)
            saved = time.monotonic()
    try:
        solution = fit.solve(ridge)
    except Singular:
        raise _singular(ridge, wanted, linear.in_features) from None
    with torch.no_grad():
        linear.weight.copy_(solution[:-1].T)
        linear.bias.copy_(solution[-1])
    found = {"samples": float(wanted), "r2": fit.r2(solution)}
    if held > 1:
        found |= {"held_out": float(held), "r2_held_out": judge.r2(solution)}
    if line:
        line.note(_report(found, ridge))
    return found


def weights_digest(student: Student, head: bool = False) -> str:
    """128 bits of what decides f(x), or h_w(f(x)): weights and buffers, kinds of layers (QuickGELU, say), pixels normalised."""
    grey = torch.full((1, 3, student.image_size, student.image_size), 128, dtype=torch.uint8)
    values = {name: value for name, value in student.state_dict().items() if head or not name.startswith("head.")}
    values["normalised"] = student.normalise(grey.to(student.clip.logit_scale.device))
    kinds = [type(module).__name__ for module in student.clip.modules()]
    found = hashlib.blake2b(repr(kinds).encode(), digest_size=16)
    for name, value in values.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def _embeddings(student: Student, batch: Batch) -> torch.Tensor:
    """Raw image embeddings. Shapes: [B, d]."""
    return student(batch.pixels).image_raw


def _split(samples: int, available: int) -> tuple[int, int]:
    """How many samples are solved from, and how many judge the solution."""
    total = min(samples + samples // HELD_OUT, available)
    return total - total // (HELD_OUT + 1), total // (HELD_OUT + 1)


def _singular(ridge: float, samples: int, width: int) -> ConfigError:
    return ConfigError(
        f"head.ridge is {ridge:g}: {samples} images do not determine h_w, whose input has {width} dimensions; expected "
        f"head.ridge above 0 (1.0e-3), or head.samples well above {width}"
    )


def _report(found: dict[str, float], ridge: float) -> str:
    text = f"head: ridge {ridge:g}, R^2 {found['r2']:.3f} on its {found['samples']:,.0f} images"
    if "r2_held_out" not in found:
        return f"{text}; the data have none left to hold out"
    text += f", {found['r2_held_out']:.3f} on {found['held_out']:,.0f} others"
    return text if found["r2_held_out"] > 0 else f"{text}: worse than the mean latent; expected more head.samples or head.ridge"


def _say(line: Line | None, what: str, unit: str, done: int, of: int, began: float, before: int = 0) -> None:
    seconds = time.monotonic() - began
    if line is None or seconds < EVERY:
        return
    if done == of:
        line.end()
        return
    line.say(f"head: {what}, {done:,} of {of:,} {unit}, left {clock((of - done) * seconds / (done - before))}")
