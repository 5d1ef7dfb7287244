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
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fastsds.config import ConfigError
from fastsds.data.images import decode_image
from fastsds.evaluation.choice import stacked
from fastsds.evaluation.measures import Metric
from fastsds.evaluation.retrieval import Places, places

LOADERS: dict[str, Callable[..., "Suite"]] = {}


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

    def cut(image):
        image = image.convert("RGB")  # first, as every suite's own code does
        if ref.box is None:
            return image
        left, top, right, bottom = (round(edge) for edge in ref.box)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        if left >= right or top >= bottom:
            raise ValueError(f"box {ref.box} holds nothing of an image of {image.width}x{image.height}")
        return image.crop((left, top, right, bottom))

    try:
        return decode_image(ref.read(), [size], cut)[0]
    except OSError as error:
        raise ConfigError(f"{ref.where}: {ref.name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{ref.where}: {ref.name}: {error}") from error


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
    """

    gallery: ClassVar[bool] = False
    name: str
    items: list[Item]
    judge: Callable[[Any], dict[str, np.ndarray]]
    measures: dict[str, Metric]
    headline: tuple[str, ...]
    exports: list[Export] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def chance(self) -> dict[str, float]:
        """What random scores reach, in percent, by metric."""
        return {name: metric.chance for name, metric in self.measures.items()}

    @property
    def summary(self) -> dict[str, int]:
        """How many items each metric counts."""
        return {name: metric.n for name, metric in self.measures.items()}

    def outcomes(self, scores) -> dict[str, np.ndarray]:
        """Judge every item. Shapes: scores, N of [captions, images] -> each outcome [N]. Raises: ValueError."""
        first = self.items[0]
        s = stacked(scores, len(first.captions), len(first.images))
        if len(s) != len(self.items):
            raise ValueError(f"scores: {len(self.items)} items in {self.name}, got {len(s)}")
        return self.judge(s)

    def metrics(self, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
        """All metrics, in percent."""
        return {name: metric.value(outcomes[metric.outcome]) for name, metric in self.measures.items()}

    def ties(self, outcomes: dict[str, np.ndarray]) -> int:
        """How often a comparison that decides an outcome was of equal scores."""
        return sum(int(values.sum()) for name, values in outcomes.items() if name.startswith("tied"))

    def rows(self, scores) -> list[dict]:
        """One JSON object an item: id, about, scores and outcomes."""
        kept = [np.asarray(s, np.float64).tolist() for s in stacked(scores, None, None)]
        outcomes = self.outcomes(scores)
        return [
            {"id": item.id, "about": item.about, "scores": kept[k], "outcomes": _row(outcomes, k)}
            for k, item in enumerate(self.items)
        ]

    def outcomes_of(self, rows: list[dict]) -> dict[str, np.ndarray]:
        """Judge kept rows again, from their scores alone. Raises: ValueError if they are of other items."""
        _same([item.id for item in self.items], rows, self.name)
        return self.outcomes([row["scores"] for row in rows])


@dataclass(frozen=True, eq=False)
class Query:
    """One direction of a gallery: images ask for texts, or texts for images.

    Shapes: own [queries], labels [candidates]: a query's own candidates are those with its label. ids: the queries'.
    judge: where they stand -> outcomes [queries].
    """

    asks: str  # "image" or "text"
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

    def outcomes(self, scores) -> dict[str, np.ndarray]:
        """Judge every query. Shapes: scores [texts, images] -> each outcome [its query's]. Raises: ValueError."""
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
            found.append(Places(*np.array([row["places"] for row in of], np.int64).T))
        return self._judge(found)

    def _places(self, scores) -> list[Places]:
        s = scores.detach().float().cpu().numpy() if isinstance(scores, torch.Tensor) else np.asarray(scores)
        if s.shape != (len(self.texts), len(self.items)):
            raise ValueError(f"scores: shape {(len(self.texts), len(self.items))} [texts, images] expected, got {s.shape}")
        return [places(s.T if query.asks == "image" else s, query.own, query.labels) for query in self.queries]

    def _judge(self, found: list[Places]) -> dict[str, np.ndarray]:
        outcomes = {}
        for query, stand in zip(self.queries, found, strict=True):
            outcomes |= query.judge(stand)
        return outcomes


def register(name: str) -> Callable:
    """Make a loader, (path, **options) -> Suite, known under a name."""

    def known(loader):
        LOADERS[name] = loader
        return loader

    return known


def suite_names() -> list[str]:
    """The names of all suites: what the files in `suites/` register."""
    from fastsds.evaluation import suites

    for module in pkgutil.iter_modules(suites.__path__):
        importlib.import_module(f"{suites.__name__}.{module.name}")
    return sorted(LOADERS)


def load_suite(name: str, path, **options) -> Suite:
    """Read a suite from where it lies. Nothing is downloaded, and no image is decoded.

    Raises: ConfigError that names the suite, or option, or the file and row, and what was expected.
    """
    if name not in (names := suite_names()):
        near = difflib.get_close_matches(name, names, 1)
        raise ConfigError(f"suite {name!r}: expected one of {', '.join(names)}" + f"; nearest: {near[0]}" * bool(near))
    known = list(inspect.signature(LOADERS[name]).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"suite {name}: unknown option {unknown[0]!r}, expected one of {', '.join(known) or 'none'}")
    if not Path(path).exists():
        raise ConfigError(f"suite {name}: {path} does not exist")
    return LOADERS[name](Path(path), **options)


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


def _row(outcomes: dict[str, np.ndarray], k: int) -> dict:
    return {name: values[k].item() for name, values in outcomes.items()}


def _same(ids: list[str], rows: list[dict], name: str) -> None:
    if ids != (got := [row["id"] for row in rows]):
        k = next((k for k, (a, b) in enumerate(zip(ids, got)) if a != b), min(len(ids), len(got)))
        raise ValueError(f"rows: {len(ids)} of {name} expected, got {len(got)}; the first that differs is number {k}")
