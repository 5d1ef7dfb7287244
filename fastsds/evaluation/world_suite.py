"""The embedded world's evaluation: swap items and retrieval, on seen and on held-out combinations.

    world_dev     splits seen and dev: for choosing settings, and what the trainer shows while it runs
    world_test    splits seen and test, scenes of their own: for figures that are reported, and nothing else

Metrics are percentages, "<split>/<name>": text, image, group, swap (see winoground.py), swap_object, swap_colour,
swap_shape, and retrieval: recall@1, the mean of both directions over galleries of 100 scenes with distinct meanings.
"""

from functools import lru_cache

import numpy as np

from fastsds.config import ConfigError
from fastsds.data import Samples, SwapItems
from fastsds.evaluation.retrieval import evaluate_retrieval
from fastsds.evaluation.winoground import Encode, evaluate_swaps, swap_accuracy, winoground

KINDS = ("object", "colour", "shape")
NAMES = ("text", "image", "group", "swap", *(f"swap_{kind}" for kind in KINDS), "retrieval")
SUITES = {"world_dev": ("seen", "dev"), "world_test": ("seen", "test")}
SEEDS = {"world_dev": 1_000_000, "world_test": 2_000_000}  # so that both have "seen" scenes of their own
GALLERIES, CANDIDATES = 3, 100
PAIRS = GALLERIES * CANDIDATES  # that retrieval is asked about


def splits(suite: str) -> tuple[str, str]:
    """The splits of a suite: seen combinations first. Raises ConfigError for an unknown one."""
    if suite not in SUITES:
        raise ConfigError(f"eval.suite: {suite!r}, expected one of {', '.join(SUITES)}")
    return SUITES[suite]


@lru_cache(maxsize=4)
def swaps(suite: str, split: str, items: int, seed: int = 0) -> SwapItems:
    """`items` swap items of each kind; rendered once a process."""
    from fastsds.world.scenes import swap_items

    return swap_items(split, items, seed=SEEDS[suite] + seed)


@lru_cache(maxsize=4 * GALLERIES)
def gallery(suite: str, split: str, number: int, seed: int = 0) -> Samples:
    from fastsds.world.scenes import retrieval_set

    return retrieval_set(split, CANDIDATES, seed=SEEDS[suite] + GALLERIES * seed + number)


def evaluate(encode: Encode, suite: str, items: int = 300, seed: int = 0) -> tuple[dict[str, float], list[dict]]:
    """Evaluate a student on a suite.

    Args: encode: (pixels uint8 [n, 3, S, S], captions [n]) -> (image [n, d], text [n, d]), unit length. items: swap items
        a kind. seed: of the suite's scenes. It is 0 for every run, whatever the run's own seed, so that runs are paired.
    Returns: metrics in percent, and one row an item: {"split", "kind", "id", "s00", "s01", "s10", "s11"} with
        s_ci = score of caption c with image i.
    """
    metrics, rows = {}, []
    for split in splits(suite):
        chosen = swaps(suite, split, items, seed)
        scores = evaluate_swaps(encode, chosen)
        metrics |= {f"{split}/{name}": value for name, value in swap_metrics(scores, chosen.kind).items()}
        metrics[f"{split}/retrieval"] = 100 * float(retrieve(encode, suite, split, seed).mean())
        for k, s in enumerate(scores.tolist()):
            cells = {"s00": s[0][0], "s01": s[0][1], "s10": s[1][0], "s11": s[1][1]}
            rows.append({"split": split, "kind": chosen.kind[k], "id": k, **cells})
    return metrics, rows


def retrieve(encode: Encode, suite: str, split: str, seed: int = 0) -> np.ndarray:
    """The share of a pair's two directions that found it, for each pair of a split's galleries: 0, 1/2 or 1."""
    galleries = [gallery(suite, split, k, seed) for k in range(GALLERIES)]
    return np.concatenate([np.mean(evaluate_retrieval(encode, samples), axis=0) for samples in galleries])


def first_of_each_kind(items: SwapItems, n: int) -> SwapItems:
    """The first n items of each kind."""
    places = [[k for k, kind in enumerate(items.kind) if kind == wanted][:n] for wanted in dict.fromkeys(items.kind)]
    rows = [k for place in places for k in place]
    return SwapItems(items.pixels[rows], [items.captions[k] for k in rows], [items.kind[k] for k in rows], items.split)


def swap_metrics(scores, kinds: list[str]) -> dict[str, float]:
    """text, image, group, swap and swap by kind, in percent. Shapes: scores [N, 2, 2], kinds [N]."""
    return {name: 100 * float(shares.mean()) for name, shares in _shares(scores, np.array(kinds)).items()}


def outcomes(rows: list[dict], split: str) -> dict[str, np.ndarray]:
    """Each item's outcome in percent, by metric, from `evaluate`'s rows; in the order of the items' ids."""
    return {name: 100.0 * shares for name, shares in _shares(*scores_of(rows, split)).items()}


def _shares(scores, kinds: np.ndarray) -> dict[str, np.ndarray]:
    outcome, swap = winoground(scores), swap_accuracy(scores)
    by_kind = {f"swap_{kind}": swap[kinds == kind] for kind in KINDS if (kinds == kind).any()}
    return {**outcome._asdict(), "swap": swap, **by_kind}


def scores_of(rows: list[dict], split: str) -> tuple[np.ndarray, np.ndarray]:
    """The scores and kinds of one split's rows, in the order of their ids. Shapes: -> [N, 2, 2], [N]."""
    chosen = sorted((r for r in rows if r["split"] == split), key=lambda r: r["id"])
    cells = np.array([[r["s00"], r["s01"], r["s10"], r["s11"]] for r in chosen], np.float64)
    return cells.reshape(-1, 2, 2), np.array([r["kind"] for r in chosen])


def encoder(call, tokenize, device="cpu") -> Encode:
    """An `encode` from what answers (pixels, tokens) with a StudentOutput: a student, or the engine around it."""

    def encode(pixels, captions):
        out = call(pixels.to(device), tokenize(captions).to(device))
        return out.image, out.text

    return encode
