"""Ask a scorer a whole suite: batched, over all ranks, and from where it was stopped.

    evaluate(suite, scorer, folder) -> Result

Work is cut into tasks that depend on suite and scorer alone: a batch of distinct images or texts to encode, some items to
score, a block of a gallery's pairs. Ranks take tasks of one kind in turn, all equally often (where tasks run out, one is
repeated and dropped: a sharded model is gathered by all ranks at once), and every rank has every answer. So any number of
ranks gives the same scores as one, and an evaluation that goes on the same as one that was never stopped.
"""

from collections.abc import Iterator, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsds.config import ConfigError
from fastsds.evaluation.prompts import pool_features, pool_scores
from fastsds.evaluation.results import ITEMS as FILE
from fastsds.evaluation.results import Growing, Result, about
from fastsds.evaluation.scorer import BATCH
from fastsds.evaluation.suite import Composed, Gallery, Suite
from fastsds.progress import watched

ITEMS = 8  # a task, of a scorer without `batch` (and of one that has features, scorer.BATCH)
PAIRS = 256  # of a gallery, a task, of a scorer without features


class Task(NamedTuple):
    """What one rank does in one go. kind: "images" or "texts", to encode; "items"; "block": (images, phrasings of texts)."""

    kind: str
    of: Sequence


def evaluate(suite: Suite, scorer, folder: Path | str | None = None) -> Result:
    """Score a suite and judge it. Every rank calls it, and gets the result.

    Args: scorer: see `scorer.Scorer`. folder: where rows are appended as they come, and the result is written; what was
        stopped there goes on, what is finished is read. None: nothing is written.
    Raises: ConfigError if the folder holds another evaluation, an image cannot be read, scores have another shape or are
        not finite, or the scorer's settings are not of JSON's kinds.
    """
    ranks, asked = Ranks(), about(suite, scorer)
    where = None if folder is None or ranks.rank else Path(folder)
    there = ranks.agreed(lambda: _checked_rows(suite, Growing(where, asked, suite.size)))[0]
    growing = there if ranks.rank == 0 else Growing(None, asked, suite.size, there.rows, there.kept)
    end = 0
    for number, part in enumerate(suite.parts if isinstance(suite, Composed) else [suite]):
        end += part.size
        if (done := max(0, len(growing.rows) - end + part.size)) < part.size:
            rows_of = _gallery_rows if part.gallery else _item_rows
            for rows in rows_of(part, Asked(scorer, ranks, suite.name), done, growing, number):
                growing.append(rows)
    result = Result(suite.name, growing.rows, suite.measures, suite.headline, {**asked, "notes": suite.notes})
    growing.finish(result)
    return result


def _checked_rows(suite: Suite, growing: Growing) -> Growing:
    """What is there already. Raises: ConfigError if its rows are not the suite's first ones, as where two commands wrote."""
    ids = []
    for part in suite.parts if isinstance(suite, Composed) else [suite]:
        ids += [i for query in part.queries for i in query.ids] if part.gallery else [item.id for item in part.items]
    if (found := [row.get("id") for row in growing.rows]) != ids[: len(found)]:
        k = next((k for k, (a, b) in enumerate(zip(found, ids)) if a != b), len(ids))
        raise ConfigError(f"{growing.folder / FILE}: row {k + 1} is not the suite's; delete the folder, or name another")
    return growing


def _item_rows(suite: Suite, asked: "Asked", done: int, growing: Growing, number: int) -> Iterator[list[dict]]:
    """The rows of a suite's items from the done-th on, as they come, in the order of the items."""
    if not asked.encodes:
        size = asked.batch
        starts = range(done - done % size, len(suite.items), size)
        tasks = {first: Task("items", suite.items[first : first + size]) for first in starts}
        for first, scores in asked.answers(tasks):
            yield suite.rows(scores, first)[max(0, done - first) :]
        return
    tasks, place = _batches([(item.images, item.captions) for item in suite.items], asked.batch)
    kinds = [[("images", ref) for ref in item.images] + [("texts", text) for text in item.captions] for item in suite.items]
    needs = [{place[x][0] for x in of} for of in kinds]
    features: dict[int, np.ndarray] = {}
    wanted = set().union(*needs[done:])
    for n, answer in asked.answers({n: task for n, task in enumerate(tasks) if n in wanted}):
        features[n] = answer.astype(np.float64)
        first, scores = done, []
        while done < len(needs) and needs[done] <= features.keys():
            found = np.stack([features[task][row] for task, row in map(place.__getitem__, kinds[done])])
            images, texts = np.split(found, [len(suite.items[done].images)])
            scores.append((texts[:, None] * images).sum(-1))  # equal texts are to have equal scores, to the bit
            done += 1
        if scores:
            yield suite.rows(scores, first)


def _gallery_rows(suite: Gallery, asked: "Asked", done: int, growing: Growing, number: int) -> Iterator[list[dict]]:
    """The rows of a gallery from the done-th on. What was answered before is kept in the folder until then."""
    if asked.encodes:
        wants = [(item.images, ()) for item in suite.items] + [((), text) for text in suite.texts]
        size = asked.batch
        tasks, place = _batches(wants, size)
    else:
        size = PAIRS
        tasks, place = _blocks(suite)
    keys = [f"{number}_{n}_of_{size}" for n in range(len(tasks))]  # another `batch` has other tasks under these numbers
    found = {n: growing.kept[key] for n, key in enumerate(keys) if key in growing.kept}
    for n, answer in asked.answers({n: task for n, task in enumerate(tasks) if n not in found}):
        growing.keep(keys[n], answer)
        found[n] = answer
    if asked.encodes:
        scores = _similarity(suite, found, place)
    else:
        scores = np.empty((len(suite.texts), len(suite.items)))
        for n, (texts, images) in enumerate(place):
            scores[texts, images] = found[n]
    yield suite.rows(scores)[done:]


def _batches(wants: list[tuple[Sequence, Sequence]], size: int) -> tuple[list[Task], dict[tuple[str, Any], tuple[int, int]]]:
    """Batches of distinct images and texts in the order in which they are first wanted.

    Args: wants: (images, texts) one after the other. Returns: tasks; and (kind, image or text) -> (its task, its row there).
    """
    tasks, place, filling = [], {}, {}
    for want in wants:
        for kind, of in zip(("images", "texts"), want, strict=True):
            for x in of:
                if (kind, x) in place:
                    continue
                if kind not in filling or len(tasks[filling[kind]].of) == size:
                    filling[kind] = len(tasks)
                    tasks.append(Task(kind, []))
                place[kind, x] = filling[kind], len(tasks[filling[kind]].of)
                tasks[filling[kind]].of.append(x)
    return tasks, place


def _blocks(suite: Gallery) -> tuple[list[Task], list[tuple[slice, slice]]]:
    """A gallery's pairs in blocks of some images and some texts with all their phrasings; and where each block lies."""
    tasks, place, side = [], [], isqrt(PAIRS)
    texts, first = [], 0
    while first < len(suite.texts):
        last = first + 1
        while last < len(suite.texts) and sum(map(len, suite.texts[first : last + 1])) <= side:
            last += 1
        texts.append(slice(first, last))
        first = last
    for k in range(0, len(suite.items), side):
        images = slice(k, min(k + side, len(suite.items)))
        for of in texts:
            tasks.append(Task("block", ([item.images[0] for item in suite.items[images]], suite.texts[of])))
            place.append((of, images))
    return tasks, place


def _similarity(suite: Gallery, found: dict[int, np.ndarray], place: dict) -> "Similarity":
    """The cosines of a gallery's distinct texts and images."""

    def features(kind: str, of) -> torch.Tensor:
        return torch.from_numpy(np.stack([found[task][row] for task, row in (place[kind, x] for x in of)])).double()

    texts, images = list(dict.fromkeys(suite.texts)), list(dict.fromkeys(item.images[0] for item in suite.items))
    sizes = [len(text) for text in texts]
    g = features("texts", [phrasing for text in texts for phrasing in text])
    if max(sizes) > 1:
        g = pool_features(g, sizes)
    at = {text: k for k, text in enumerate(texts)}, {ref: k for k, ref in enumerate(images)}
    of_texts = np.array([at[0][text] for text in suite.texts])
    of_images = np.array([at[1][item.images[0]] for item in suite.items])
    return Similarity(g.numpy(), features("images", images).numpy(), of_texts, of_images)


class Similarity:
    """Scores rows . columns, computed where they are sliced, in float64: 25,010 x 5,000 of them are never there at once.

    Shapes: rows [R, d], columns [C, d], distinct; of_rows, of_columns: which one each row and each column of scores has, so
    that equal ones have equal scores, to the bit.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, of_rows: np.ndarray, of_columns: np.ndarray):
        self.rows, self.columns, self.of_rows, self.of_columns = rows, columns, of_rows, of_columns
        self.shape = (len(of_rows), len(of_columns))

    @property
    def T(self) -> "Similarity":
        return Similarity(self.columns, self.rows, self.of_columns, self.of_rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        return (self.rows[self.of_rows[part]] @ self.columns.T)[:, self.of_columns]


class Asked:
    """A scorer that all ranks ask together."""

    def __init__(self, scorer, ranks: "Ranks", suite: str):
        self.scorer, self.ranks, self.text = scorer, ranks, f"{suite}, {scorer.name}"
        self.encodes = hasattr(scorer, "encode_images") and hasattr(scorer, "encode_texts")
        self.batch = getattr(scorer, "batch", BATCH if self.encodes else ITEMS)

    def answers(self, tasks: dict[int, Task]) -> Iterator[tuple[int, Any]]:
        """Each task's number and answer, on every rank."""
        rounds, expect = self._rounds(tasks), getattr(self.scorer, "expect", None)
        for k, numbers in enumerate(watched(rounds, self.text)):
            if expect is not None:
                for near in rounds[k : k + 2]:
                    expect(_images(tasks[self._mine(near)]))
            found = self.ranks.agreed(lambda numbers=numbers: self._answer(tasks[self._mine(numbers)]))
            yield from zip(numbers, found, strict=False)

    def _rounds(self, tasks: dict[int, Task]) -> list[list[int]]:
        """Tasks of one kind, as many as there are ranks, or fewer at the end."""
        waiting: dict[str, list[int]] = {}
        rounds = []
        for n, task in tasks.items():
            waiting.setdefault(task.kind, []).append(n)
            if len(waiting[task.kind]) == self.ranks.world:
                rounds.append(waiting.pop(task.kind))
        return rounds + list(waiting.values())

    def _mine(self, numbers: list[int]) -> int:
        return numbers[self.ranks.rank] if self.ranks.rank < len(numbers) else numbers[0]

    def _answer(self, task: Task):
        if task.kind == "images":
            return self._checked(self.scorer.encode_images(task.of), (len(task.of), None), f"images from {task.of[0].name} on")
        if task.kind == "texts":
            return self._checked(self.scorer.encode_texts(task.of), (len(task.of), None), f"texts from {task.of[0]!r:.60} on")
        if task.kind == "block":
            images, texts = task.of
            said = [phrasing for text in texts for phrasing in text]
            found, of = self.scorer.score(images, said), f"images from {images[0].name} on"
            scores = self._checked(found, (len(said), len(images)), of)
            return pool_scores(torch.from_numpy(scores).double(), [len(text) for text in texts]).numpy()
        if hasattr(self.scorer, "score_items"):
            found = list(self.scorer.score_items(task.of))
        else:
            found = [self.scorer.score(item.images, item.captions) for item in task.of]
        if len(found) != len(task.of):
            raise ConfigError(f"scorer {self.scorer.name}: scores of {len(task.of)} items expected, got {len(found)}")
        return [
            self._checked(s, (len(item.captions), len(item.images)), f"item {item.id}")
            for s, item in zip(found, task.of, strict=True)
        ]

    def _checked(self, x, shape: tuple[int, int | None], of: str) -> np.ndarray:
        """What a scorer gave, as an array. shape: what it must have, None: any. Raises: ConfigError, also if not finite."""
        found, wanted = _array(x), f"[{shape[0]}, {'d' if shape[1] is None else shape[1]}]"
        if found.ndim != 2 or found.dtype.kind not in "fiub" or found.shape != (shape[0], shape[1] or found.shape[1]):
            got = f"{found.dtype} of shape {list(found.shape)}"
            raise ConfigError(f"scorer {self.scorer.name}: {of}: numbers of shape {wanted} expected, got {got}")
        if not np.isfinite(found).all():  # JSON has no such number
            what = "NaN" if np.isnan(found).any() else "infinity"
            raise ConfigError(f"scorer {self.scorer.name}: {of}: {what}; expected finite numbers")
        return found


class Ranks:
    """The ranks of torch.distributed, or this process alone."""

    def __init__(self):
        on = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)

    def agreed(self, work) -> list:
        """What `work()` gives on each rank. An error on one is an error on all."""
        if self.world == 1:
            return [work()]
        mine = error = None
        try:
            mine = work()
        except Exception as found:  # of whatever kind: the others wait
            error = found
        everyone = [None] * self.world
        said = None if error is None else (isinstance(error, ConfigError), str(error))
        torch.distributed.all_gather_object(everyone, (mine, said))
        if error is not None:
            raise error
        for rank, (_, other) in enumerate(everyone):
            if other is not None:
                raise ConfigError(other[1]) if other[0] else RuntimeError(f"rank {rank}: {other[1]}")
        return [answer for answer, _ in everyone]


def _images(task: Task) -> list:
    if task.kind == "items":
        return [ref for item in task.of for ref in item.images]
    return {"images": task.of, "texts": [], "block": task.of[0]}[task.kind]


def _array(x) -> np.ndarray:
    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()  # numpy has no bfloat16
