"""What a comparison of arms rests on: each saved student's outcomes on the test items, and their paired differences."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fastsds import report, world
from fastsds.evaluation.diffusion_score import diffusion_scores
from fastsds.evaluation.results import load_result
from fastsds.evaluation.run import evaluate
from fastsds.evaluation.scorer import ClipScorer
from fastsds.evaluation.statistics import holm, mcnemar, two_level_bootstrap
from fastsds.evaluation.suite import load_suite
from fastsds.evaluation.suites import world as world_suite
from fastsds.evaluation.winoground import winoground
from fastsds.metrics import read
from fastsds.student import load_student

SUITE = "world_test"
READING = {"items": 50, "draws": 4}  # what the teacher reads of h_w(f(x)): items a kind, noises an item


def splits() -> tuple[str, str]:
    return world_suite.SUITES[SUITE]


def assess(student: Path | str, folder: Path, items: int, teacher: str, of_images: bool = False) -> dict:
    """Evaluate a saved student on the test suite: metrics in percent; the evaluation goes to the folder.

    of_images: also the text score of what the teacher reads of the images themselves.
    """
    model = load_student(student).eval()
    metrics, own = dict(evaluate(load_suite(SUITE, items=items), ClipScorer(model), folder).metrics), {}
    for split in splits():
        part = world_suite.first_of_each_kind(world_suite.swaps(SUITE, split, items), min(items, READING["items"]))
        if model.head is not None:
            scores = diffusion_scores(load_teacher(teacher), part, draws=READING["draws"], latents=_latents(model, part))
            metrics[f"{split}/reading"] = 100 * float(winoground(scores).text.mean())
        if of_images:
            scores = diffusion_scores(load_teacher(teacher), part, draws=READING["draws"])
            own[report.SPLIT_NAMES[split]] = 100 * float(winoground(scores).text.mean())
    return {"metrics": metrics, **({"of_images": own} if of_images else {})}


def outcomes(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Each item's outcome in percent, by (split, metric), in a fixed order: what comparisons pair."""
    result = load_result(folder)
    return {tuple(name.split("/")): result.values(name) for name in result.measures}


def compare(of: str, a: list[dict], b: list[dict], metrics, tested=()) -> list[dict]:
    """Paired differences a - b of two arms over the same seeds.

    tested: metrics that also get the exact McNemar p of the first seed, and Holm's over all of them.
    """
    rows = []
    for split in splits():
        for metric in metrics:
            left, right = ([seed[split, metric] for seed in arm] for arm in (a, b))
            row = {"of": of, "split": split, "metric": metric, **two_level_bootstrap(left, right)._asdict()}
            row["seeds"] = [float(np.mean(x - y)) for x, y in zip(left, right, strict=True)]
            if metric in tested:
                test = mcnemar(left[0] > 0, right[0] > 0)
                row |= {"only_first": test.only_a, "only_second": test.only_b, "p": test.p}
            rows.append(row)
    with_p = [row for row in rows if "p" in row]
    for row, adjusted in zip(with_p, holm([row["p"] for row in with_p]), strict=True):
        row["p_holm"] = adjusted
    return rows


def training_seconds(path: Path, images_a_step: int) -> float:
    """Seconds of training alone, without start and evaluations."""
    rows = [row for row in read(path) if row["split"] == "train"]
    before = [0, *(row["step"] for row in rows)]
    return sum((row["step"] - at) * images_a_step / row["images_per_s"] for row, at in zip(rows, before, strict=False))


def choices(folder: Path) -> dict[str, tuple[bool, bool]]:
    """Whether image 0 and image 1 got their own captions, by held-out item."""
    rows = [row for row in load_result(folder).rows if row["about"]["split"] == splits()[1] and "scores" in row]
    scores = {row["id"]: row["scores"] for row in rows}
    return {item: (s[0][0] > s[1][0], s[1][1] > s[0][1]) for item, s in scores.items()}


def shown(student: Path, items: int, each: int, teacher: str) -> list[dict]:
    """The first held-out items of each kind, with what h_w(f(x)) decodes to (None without a head)."""
    whole = world_suite.swaps(SUITE, splits()[1], items)
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
    return model(items.pixels.flatten(0, 1)).z.unflatten(0, (-1, 2))
