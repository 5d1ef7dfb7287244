"""The embedded world's suites: swap items and retrieval, on seen and on held-out combinations. They are made here, of no data.

    world_dev     splits seen and dev: for choosing settings, and what the trainer shows while it runs
    world_test    splits seen and test, scenes of their own: for figures that are reported, and nothing else

Metrics are SPLIT/NAME: text, image, group (see `evaluation/winoground.py`), swap, which is the mean of text's two choices,
swap_object, swap_colour, swap_shape, and retrieval: recall@1 of galleries of 100 scenes with distinct meanings, of a pair the
mean of both directions. A tie is wrong. Options: items, swap items of each kind (300); seed, of the scenes.
"""

from functools import lru_cache, partial

import numpy as np
import torch

from fastsds.data import Samples, SwapItems
from fastsds.evaluation.measures import Metric
from fastsds.evaluation.retrieval import Places
from fastsds.evaluation.suite import Composed, Gallery, ImageRef, Item, Query, Suite, pixels, register
from fastsds.evaluation.suites.files import png
from fastsds.evaluation.winoground import CHANCE, swap_accuracy, tied, winoground

KINDS = ("object", "colour", "shape")
NAMES = ("text", "image", "group", "swap", *(f"swap_{kind}" for kind in KINDS), "retrieval")
SUITES = {"world_dev": ("seen", "dev"), "world_test": ("seen", "test")}
SEEDS = {"world_dev": 1_000_000, "world_test": 2_000_000}  # so that both have "seen" scenes of their own
GALLERIES, CANDIDATES = 3, 100
ITEMS = 300


@register("world_dev", data=False)
def load_dev(items: int = ITEMS, seed: int = 0) -> Composed:
    """Args: items: swap items of each kind. seed: of the scenes: 0 for every run, whatever its own, so that runs are paired."""
    return _load("world_dev", items, seed)


@register("world_test", data=False)
def load_test(items: int = ITEMS, seed: int = 0) -> Composed:
    """Args: as of world_dev."""
    return _load("world_test", items, seed)


@lru_cache(maxsize=4)
def swaps(suite: str, split: str, items: int, seed: int = 0) -> SwapItems:
    """`items` swap items of each kind; rendered once a process."""
    from fastsds.world.scenes import swap_items

    return swap_items(split, items, seed=SEEDS[suite] + seed)


@lru_cache(maxsize=4 * GALLERIES)
def gallery(suite: str, split: str, number: int, seed: int = 0) -> Samples:
    """Captioned scenes with distinct meanings."""
    from fastsds.world.scenes import retrieval_set

    return retrieval_set(split, CANDIDATES, seed=SEEDS[suite] + GALLERIES * seed + number)


def first_of_each_kind(items: SwapItems, n: int) -> SwapItems:
    """The first n items of each kind."""
    places = [[k for k, kind in enumerate(items.kind) if kind == wanted][:n] for wanted in dict.fromkeys(items.kind)]
    rows = [k for place in places for k in place]
    return SwapItems(items.pixels[rows], [items.captions[k] for k in rows], [items.kind[k] for k in rows], items.split)


def drawn(part: Suite) -> SwapItems:
    """A split's swap items, which a suite asks, with their pixels."""
    from fastsds.world.scenes import SIZE

    images = torch.stack([pixels(ref, SIZE) for item in part.items for ref in item.images]).unflatten(0, (-1, 2))
    return SwapItems(images, [item.captions for item in part.items], [item.about["kind"] for item in part.items], part.name)


def _load(name: str, items: int, seed: int) -> Composed:
    parts, measures, pairs = [], {}, np.zeros(GALLERIES * CANDIDATES, np.int64)
    for split in SUITES[name]:
        asked = swaps(name, split, items, seed)
        parts += [_swaps(f"{name} {seed}", asked), *(_gallery(name, split, k, seed) for k in range(GALLERIES))]
        kinds = np.array(asked.kind)
        for kind, where in {"": kinds != "", **{f"_{kind}": kinds == kind for kind in KINDS}}.items():
            for outcome in ("swap",) if kind else ("text", "image", "group", "swap"):
                groups = np.where(where, 0, -1)
                measures[f"{split}/{outcome}{kind}"] = Metric(f"{split}/{outcome}", groups, CHANCE[outcome])
        measures[f"{split}/retrieval"] = Metric(f"{split}/retrieval", pairs, 100 / CANDIDATES)
    headline = tuple(f"{split}/{metric}" for split in SUITES[name] for metric in ("text", "image", "group", "retrieval"))
    return Composed(name=name, parts=parts, measures=measures, headline=headline)


def _swaps(prefix: str, asked: SwapItems) -> Suite:
    split, items = asked.split, []
    for k, (pair, captions, kind) in enumerate(zip(asked.pixels.numpy(), asked.captions, asked.kind, strict=True)):
        images = tuple(_ref(f"{prefix} {split} {k}.{side}", image) for side, image in enumerate(pair))
        items.append(Item(f"{split}/{k}", images, captions, {"split": split, "kind": kind}))

    def judge(scores) -> dict:
        found = winoground(scores)._asdict() | {"swap": swap_accuracy(scores)}
        return {f"{split}/{outcome}": values for outcome, values in found.items()} | {f"tied/{split}": tied(scores)}

    return Suite(name=split, items=items, judge=judge, measures={}, headline=(), kind="kind")


def _gallery(name: str, split: str, number: int, seed: int) -> Gallery:
    samples = gallery(name, split, number, seed)
    ids = [f"{split}/gallery {number}/{k}" for k in range(len(samples))]
    items = [
        Item(i, (_ref(f"{name} {seed} {i}", image),), (caption,), {"split": split})
        for i, image, caption in zip(ids, samples.pixels.numpy(), samples.captions, strict=True)
    ]

    def judge(places: Places) -> dict:
        share = places.found_strictly(1).mean(axis=1)
        return {f"{split}/retrieval": share, f"tied/{split}/retrieval": (places.level > 0).any(axis=1)}

    own = np.arange(len(samples))
    return Gallery(
        name=f"{split}/gallery {number}", items=items, texts=[(caption,) for caption in samples.captions],
        queries=[Query("pair", own, own, ids, judge)], measures={}, headline=(),
    )  # fmt: skip


def _ref(name: str, pixels: np.ndarray) -> ImageRef:
    return ImageRef(name, "the embedded world", partial(png, pixels))
