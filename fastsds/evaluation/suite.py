"""What an evaluation asks, and how answers are counted: the same surface for every suite.

    suite = load_suite("winoground", "data/winoground")
    scores = [score(item.images, item.captions) for item in suite.items]    # each [captions, images]
    outcomes = suite.outcomes(scores)                                       # {"text": bool [400], ...}
    suite.metrics(outcomes)                                                 # {"text": 31.25, "text/collapsed_tag=Object": ...}

A `Gallery` has one question for all: every text about every image, so its scores are one matrix [texts, images]
(`suite.gallery` tells). Metrics are means of outcomes, in percent, and named OUTCOME (a mean over items), OUTCOME/macro (over
groups, of the mean within each) or OUTCOME/FIELD=VALUE (over the items of one kind). They follow the convention that the
suite's published figures follow; where that lets ties count right, OUTCOME_strict has them wrong. `rows` are what is kept.

A suite is one file in `suites/`: it reads what was released, and registers its loader under a name.
"""

import difflib
import hashlib
import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fastsds.config import ConfigError
from fastsds.data.images import opened, squares
from fastsds.evaluation.choice import stacked
from fastsds.evaluation.measures import Metric
from fastsds.evaluation.retrieval import Places, places

LOADERS: dict[str, Callable[..., "Suite"]] = {}
MADE: set[str] = set()  # suites that are made here, of no data


@dataclass(frozen=True)
class ImageRef:
    """An image that is read when it is asked for: equal for equal pixels, so that a scorer may encode each once.

    name: the file, or the row and column of a table. where: file and row that name it, for errors. read: its bytes (OSError
    where there are none). box: (left, top, right, bottom) in pixels, cut out first.
    """

    name: str
    where: str = field(compare=False)
    read: Callable[[], bytes] = field(compare=False, repr=False)
    box: tuple[float, float, float, float] | None = None

    def open(self):
        """Decode it. Returns: a PIL image, RGB, the box cut out. Raises: ConfigError that names file, row and image."""
        return self.used(lambda image: image)

    def used(self, use: Callable):
        """What `use` makes of the opened image. Raises: ConfigError that names file, row and image."""
        try:
            return opened(self.read(), lambda image: use(self._cut(image.convert("RGB"))))  # RGB first, as every suite's code
        except OSError as error:
            raise ConfigError(f"{self.where}: {self.name}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.where}: {self.name}: {error}") from error

    def _cut(self, image):
        if self.box is None:
            return image
        left, top, right, bottom = (round(edge) for edge in self.box)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        if left >= right or top >= bottom:
            raise ValueError(f"box {self.box} holds nothing of an image of {image.width}x{image.height}")
        return image.crop((left, top, right, bottom))


@dataclass(frozen=True)
class Item:
    """Images and captions that are compared with one another.

    about: what results are broken down by. chosen: which choices decide its outcomes: "captions", those of each image among
    the captions, "images", those of each caption among the images. An outcome depends on who comes first in these, and on
    ties for it, alone; so a scorer may stop where that is settled.
    """

    id: str
    images: tuple[ImageRef, ...]
    captions: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)
    chosen: tuple[str, ...] = ("captions", "images")


def pixels(ref: ImageRef, size: int) -> torch.Tensor:
    """Decode an image to RGB: box cut out, shorter side resized to `size` (bicubic), cut to the centre square.

    Returns: uint8 [3, size, size]. Raises: ConfigError that names file, row and image.
    """
    return ref.used(lambda image: squares(image, [size]))[0]


@dataclass(frozen=True)
class Export:
    """A result file as CLIP_benchmark writes it. metrics: its name of each -> ours."""

    dataset: str
    task: str
    metrics: dict[str, str]


@dataclass(kw_only=True)
class Suite:
    """Items that are asked one by one, all with as many captions and images.

    judge: scores [N, captions, images] -> outcomes, arrays [N]; one that begins with `tied` says where a tie was met.
    headline: the metrics of a short table. notes: what a reader of the results must know. exports: CLIP_benchmark's files.
    kind: what of an item's `about` says its kind, where a part of the suite is to have some of each.
    """

    gallery: ClassVar[bool] = False
    name: str
    items: list[Item]
    judge: Callable[[Any], dict[str, np.ndarray]]
    measures: dict[str, Metric]
    headline: tuple[str, ...]
    kind: str | None = None
    exports: list[Export] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def chance(self) -> dict[str, float]:
        """What random scores reach, in percent, by metric."""
        return {name: metric.chance for name, metric in self.measures.items()}

    @property
    def size(self) -> int:
        """How many rows its results have."""
        return len(self.items)

    def fingerprint(self) -> str:
        """A digest of what is asked: ids, texts, boxes, kinds, metrics. Equal wherever the images lie, in any format."""
        found = hashlib.blake2b(digest_size=16)
        for row in (self.name, list(self.measures), *self._asked()):
            found.update(repr(row).encode())
        return found.hexdigest()

    def _asked(self) -> list:
        return [(item.id, [ref.box for ref in item.images], item.captions, item.about) for item in self.items]

    @property
    def summary(self) -> dict[str, int]:
        """How many items each metric counts."""
        return {name: metric.n for name, metric in self.measures.items()}

    def outcomes(self, scores) -> dict[str, np.ndarray]:
        """Judge every item. Shapes: scores, N of [captions, images] -> each outcome [N]. Raises: ValueError."""
        s = self._stacked(scores)
        if len(s) != len(self.items):
            raise ValueError(f"scores: {len(self.items)} items in {self.name}, got {len(s)}")
        return self.judge(s)

    def metrics(self, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """All metrics, in percent."""
        return {name: metric.value(outcomes[metric.outcome]) for name, metric in self.measures.items()}

    def ties(self, outcomes: dict[str, np.ndarray]) -> int:
        """How often a comparison that decides an outcome was of equal scores."""
        return sum(int(values.sum()) for name, values in outcomes.items() if name.startswith("tied"))

    def rows(self, scores, first: int = 0) -> list[dict]:
        """One JSON object an item: id, about, scores and outcomes. first: the number of the item that scores begin with."""
        s = self._stacked(scores)
        kept, outcomes = s.tolist(), self.judge(s)
        return [
            {"id": item.id, "about": item.about, "scores": kept[k], "outcomes": _row(outcomes, k)}
            for k, item in enumerate(self.items[first : first + len(kept)])
        ]

    def outcomes_of(self, rows: list[dict]) -> dict[str, np.ndarray]:
        """Judge kept rows again, from their scores alone. Raises: ValueError if they are of other items."""
        _same([item.id for item in self.items], rows, self.name)
        return self.outcomes([row["scores"] for row in rows])

    def _stacked(self, scores) -> np.ndarray:
        return stacked(scores, len(self.items[0].captions), len(self.items[0].images))


@dataclass(frozen=True, eq=False)
class Query:
    """One direction of a gallery: images ask for texts, or texts for images; or both, where text k belongs to image k.

    Shapes: own [queries], labels [candidates]: a query's own candidates are those with its label. ids: the queries'.
    judge: where they stand -> outcomes [queries]. Of "pair" they stand [queries, 2]: the text's image, the image's text.
    """

    asks: str  # "image", "text" or "pair"
    own: np.ndarray
    labels: np.ndarray
    ids: list[str]
    judge: Callable[[Places], dict[str, np.ndarray]]


@dataclass(kw_only=True)
class Gallery(Suite):
    """Every text is scored with every image: `texts` is the other side of `items`, each of which has one image.

    texts: each one or several phrasings: a scorer that has features averages their unit features (`prompts.pool_features`), any
    other their scores (`prompts.pool_scores`). queries: whose outcomes are the gallery's; rows keep where the best stand.
    """

    gallery: ClassVar[bool] = True
    judge: None = None
    texts: list[tuple[str, ...]]
    queries: list[Query]

    @property
    def size(self) -> int:
        return sum(len(query.ids) for query in self.queries)

    def _asked(self) -> list:
        return [*super()._asked(), *self.texts, *((query.asks, query.own.tolist()) for query in self.queries)]

    def outcomes(self, scores) -> dict[str, np.ndarray]:
        """Judge every query. Shapes: scores [texts, images] -> each outcome [its query's]. Raises: ValueError.

        scores: an array, a tensor, or what has `shape`, `T` and slices of rows (`run.Similarity`, which is never whole).
        """
        return self._judge(self._places(scores))

    def rows(self, scores) -> list[dict]:
        """One JSON object a query: who asks, id, about, `places` (above, level, before: see retrieval.py) and outcomes."""
        found, rows = self._places(scores), []
        about = {item.id: item.about for item in self.items}
        for query, stand in zip(self.queries, found, strict=True):
            outcomes, where = query.judge(stand), np.stack(stand, axis=1).tolist()
            rows += [
                {"asks": query.asks, "id": i, "about": about.get(i, {}), "places": where[k], "outcomes": _row(outcomes, k)}
                for k, i in enumerate(query.ids)
            ]
        return rows

    def outcomes_of(self, rows: list[dict]) -> dict[str, np.ndarray]:
        """Judge kept rows again, from their places alone. Raises: ValueError if they are of other queries."""
        found = []
        for query in self.queries:
            of = [row for row in rows if row["asks"] == query.asks]
            _same(query.ids, of, self.name)
            found.append(Places(*np.moveaxis(np.array([row["places"] for row in of], np.int64), 1, 0)))
        return self._judge(found)

    def _places(self, scores) -> list[Places]:
        s = scores.detach().float().cpu().numpy() if isinstance(scores, torch.Tensor) else scores
        if s.shape != (len(self.texts), len(self.items)):
            raise ValueError(f"scores: shape {(len(self.texts), len(self.items))} [texts, images] expected, got {s.shape}")
        found = []
        for query in self.queries:
            ways = {"text": [s], "image": [s.T], "pair": [s, s.T]}[query.asks]
            stand = [places(way, query.own, query.labels) for way in ways]
            found.append(stand[0] if len(stand) == 1 else Places(*(np.stack(x, axis=1) for x in zip(*stand, strict=True))))
        return found

    def _judge(self, found: list[Places]) -> dict[str, np.ndarray]:
        outcomes = {}
        for query, stand in zip(self.queries, found, strict=True):
            outcomes |= query.judge(stand)
        return outcomes


@dataclass(kw_only=True)
class Composed(Suite):
    """Suites that are asked one after the other under one name. Scores, rows and outcomes are those of `parts`, in order.

    Outcomes of one name in several parts are one outcome. Ids differ between parts.
    """

    items: list[Item] = field(default_factory=list)
    judge: None = None
    parts: list[Suite]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def _asked(self) -> list:
        return [row for part in self.parts for row in part._asked()]

    def outcomes(self, scores) -> dict[str, np.ndarray]:
        """Judge every part. Shapes: scores, one a part."""
        return _joined([part.outcomes(s) for part, s in zip(self.parts, scores, strict=True)])

    def rows(self, scores) -> list[dict]:
        """The rows of all parts."""
        return [row for part, s in zip(self.parts, scores, strict=True) for row in part.rows(s)]

    def outcomes_of(self, rows: list[dict]) -> dict[str, np.ndarray]:
        """Judge kept rows again. Raises: ValueError if they are of other items."""
        ends = np.cumsum([part.size for part in self.parts]).tolist()
        found = [part.outcomes_of(rows[end - part.size : end]) for part, end in zip(self.parts, ends, strict=True)]
        _same([row["id"] for row in rows[: self.size]], rows, self.name)
        return _joined(found)


def register(name: str, data: bool = True) -> Callable:
    """Make a loader, (path, **options) -> Suite, known under a name. data: False for (**options) -> Suite.

    An option `items` is for the loader to make a part of the suite; `load_suite` makes it where a loader has none.
    """

    def known(loader):
        LOADERS[name] = loader
        if not data:
            MADE.add(name)
        return loader

    return known


def suite_names() -> list[str]:
    """The names of all suites: what the files in `suites/` register."""
    from fastsds.evaluation import suites

    for module in pkgutil.iter_modules(suites.__path__):
        importlib.import_module(f"{suites.__name__}.{module.name}")
    return sorted(LOADERS)


def options_of(name: str) -> dict[str, type]:
    """The options of a suite and their types: those of its loader, and `items`. Raises: ConfigError for an unknown suite."""
    if name not in (names := suite_names()):
        near = "".join(f"; nearest: {one}" for one in difflib.get_close_matches(name, names, 1))
        raise ConfigError(f"suite {name!r}: expected one of {', '.join(names)}{near}")
    own = list(inspect.signature(LOADERS[name]).parameters.values())[name not in MADE :]
    return {option.name: option.annotation for option in own} | {"items": int}


def load_suite(name: str, path=None, items: int | None = None, **options) -> Suite:
    """Read a suite from where it lies. Nothing is downloaded, and no image is decoded.

    Args: path: None for a suite of no data (world_dev, world_test). items: the first ones alone: so many of each kind
        (`Suite.kind`; the world's swaps, classes) where there are kinds, else of the suite; of a retrieval suite, images.
    Raises: ConfigError that names the suite, or option, or the file and row, and what was expected.
    """
    known = options_of(name)
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"suite {name}: unknown option {unknown[0]!r}, expected one of {', '.join(known)}")
    if items is not None and items < 1:
        raise ConfigError(f"suite {name}: items is {items}, expected at least 1")
    if name in MADE and path is not None:
        raise ConfigError(f"suite {name}: made here, of no data: expected no path, found {path}")
    if name not in MADE and path is None:
        raise ConfigError(f"suite {name}: expected the path of its data (docs/evaluation.md)")
    if path is not None and not Path(path).exists():
        raise ConfigError(f"suite {name}: {path} does not exist")
    own = items is not None and "items" in inspect.signature(LOADERS[name]).parameters
    suite = LOADERS[name](*([] if path is None else [Path(path)]), **options, **({"items": items} if own else {}))
    return suite if items is None or own else first_items(suite, items)


def first_items(suite: Suite, n: int) -> Suite:
    """The first n items of each kind, and the metrics that count any of them."""
    seen, places = Counter(), []
    for k, item in enumerate(suite.items):
        kind = item.about.get(suite.kind)
        seen[kind] += 1
        if seen[kind] <= n:
            places.append(k)
    if len(places) == len(suite.items):
        return suite
    measures = {name: part for name, metric in suite.measures.items() if (part := metric.part(places)).n}
    each = "" if suite.kind is None else f" of each {suite.kind}"
    note = f"the first {n} items{each} alone: {len(places)} of {len(suite.items)}"
    return replace(
        suite, items=[suite.items[k] for k in places], measures=measures, notes=[*suite.notes, note], exports=[],
        headline=tuple(name for name in suite.headline if name in measures),
    )  # fmt: skip


def clip_benchmark(suite: Suite, metrics: dict[str, float], model: str, pretrained: str, language: str = "en") -> list[dict]:
    """Results in CLIP_benchmark's shape, one object a file, as shares of 1. A suite it does not have keeps our names."""
    exports = suite.exports or [Export(suite.name, "fastsds", {name: name for name in metrics})]
    return [
        {
            "dataset": export.dataset, "model": model, "pretrained": pretrained, "task": export.task,
            "metrics": {theirs: metrics[ours] / 100 for theirs, ours in export.metrics.items()}, "language": language,
        }
        for export in exports
    ]  # fmt: skip


def _joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for outcomes in found for name in outcomes)
    return {name: np.concatenate([of[name] for of in found if name in of]) for name in names}


def _row(outcomes: dict[str, np.ndarray], k: int) -> dict:
    return {name: values[k].item() for name, values in outcomes.items()}


def _same(ids: list[str], rows: list[dict], name: str) -> None:
    if ids != (got := [row["id"] for row in rows]):
        k = next((k for k, (a, b) in enumerate(zip(ids, got)) if a != b), min(len(ids), len(got)))
        raise ValueError(f"rows: {len(ids)} of {name} expected, got {len(got)}; the first that differs is number {k}")
