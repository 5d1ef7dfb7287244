"""What a comparison of arms rests on: what a saved student answers, what a teacher reads of it, how long it trained."""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

from fastsds import world
from fastsds.evaluation.diffusion_score import diffusion_scores
from fastsds.evaluation.results import load_result
from fastsds.evaluation.run import evaluate
from fastsds.evaluation.scorer import ClipScorer
from fastsds.evaluation.suite import Suite, first_items
from fastsds.evaluation.suites import world as world_suite
from fastsds.evaluation.winoground import winoground
from fastsds.metrics import read
from fastsds.student import Student, load_student

READING = {"items": 50, "draws": 4}  # what the teacher reads: items a kind, noises an item


def ask(student: Student, suite: Suite, folder: Path, teacher: str) -> dict[str, float]:
    """Evaluate a student: all metrics in percent, of a world's suite with its `readings`; the evaluation goes to the folder."""
    metrics = dict(evaluate(suite, ClipScorer(student), folder).metrics)
    return metrics | (readings(suite, teacher, student) if student.head is not None else {})


def readings(suite: Suite, teacher: str, student: Student | None = None) -> dict[str, float]:
    """The text score of what the teacher reads of h_w(f(x)), by split of a world's suite, in percent; {} of any other suite.

    student: None reads the images' own latents.
    """
    found = {}
    for asked in suite.parts if suite.name in world_suite.SUITES else ():
        if asked.gallery:
            continue
        split, part = asked.name, world_suite.drawn(first_items(asked, READING["items"]))
        latents = None if student is None else _latents(student, part)
        scores = diffusion_scores(load_teacher(teacher), part, draws=READING["draws"], latents=latents)
        found[f"{split}/reading"] = 100 * float(winoground(scores).text.mean())
    return found


def training_seconds(path: Path, images_a_step: int) -> float:
    """Seconds of training alone, without start and evaluations."""
    rows = [row for row in read(path) if row["split"] == "train"]
    before = [0, *(row["step"] for row in rows)]
    return sum((row["step"] - at) * images_a_step / row["images_per_s"] for row, at in zip(rows, before, strict=False))


def choices(folder: Path, split: str) -> dict[str, tuple[bool, bool]]:
    """Whether image 0 and image 1 got their own captions, by swap item of a split."""
    rows = [row for row in load_result(folder).rows if row["about"]["split"] == split and "scores" in row]
    scores = {row["id"]: row["scores"] for row in rows}
    return {item: (s[0][0] > s[1][0], s[1][1] > s[0][1]) for item, s in scores.items()}


def shown(student: Path, suite: str, split: str, items: int, each: int, teacher: str) -> list[dict]:
    """The first items of each kind of a split, with what h_w(f(x)) decodes to (None without a head)."""
    whole = world_suite.swaps(suite, split, items)
    part, model = world_suite.first_of_each_kind(whole, each), load_student(student).eval()
    decoded = [None] * len(part)
    if model.head is not None:
        decoded = load_teacher(teacher).decode(_latents(model, part).flatten(0, 1)).unflatten(0, (-1, 2)).numpy()
    first = {kind: whole.kind.index(kind) for kind in dict.fromkeys(whole.kind)}
    ids = [f"{whole.split}/{k + n}" for kind, k in first.items() for n in range(part.kind.count(kind))]
    cells = zip(ids, part.kind, part.captions, part.pixels.numpy(), decoded, strict=True)
    return [dict(zip(("id", "kind", "captions", "images", "decoded"), cell, strict=True)) for cell in cells]


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's contrastive loss, and object-swap accuracy on development items, by step."""
    rows = read(path)
    lines = {"loss": [(row["step"], row["clip"]) for row in rows if row["split"] == "train"]}
    for name, key in (("held out", "dev/swap_object"), ("seen", "seen/swap_object")):
        lines[name] = [(row["step"], row[key]) for row in rows if row["split"] == "eval" and key in row]
    return lines


@lru_cache
def weights() -> str:
    """A checksum of the shipped weights: results of other weights are other results."""
    digest = hashlib.sha256()
    for path in sorted(Path(world.WEIGHTS).rglob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def load_teacher(path: str):
    from fastsds.teacher import Teacher

    return Teacher.load(path)


@torch.no_grad()
def _latents(model, items) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(items.pixels.flatten(0, 1).to(device)).z.unflatten(0, (-1, 2)).cpu()
