"""Cross-modal tasks as data: an image, a text, an answer. No model, no tokenizer, nothing downloaded.

    task = load_task("snli_ve", "data/snli_ve")
    few = low_shot(task, 0.01, seed=0)                          # subsets.py: nested, stratified
    source = few.source(few.splits["train"], workers=4)         # images and texts, as the loader takes them
    outcomes = task.outcomes(task.splits["test"], predicted)    # {"accuracy": [N]}, with ids and groups
    task.metrics(outcomes)                                      # {"accuracy": 74.1, "accuracy/label=neutral": 68.0, ...}

Metrics are means of outcomes, in percent, named OUTCOME or OUTCOME/FIELD=VALUE. A task is one file: a subclass of `Task` that
says its prompts, and a loader of the released format that names file and row in its errors.
"""

import difflib
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from fastsds.config import ConfigError
from fastsds.data import Source
from fastsds.data.images import Images, Listing
from fastsds.data.tasks.files import ImageRef
from fastsds.strict import convert, describe, show

LOADERS = {  # name: its module, which has load(folder, ...); the world's take no folder
    "snli_ve": "fastsds.data.tasks.snli_ve",
    "vqa_v2": "fastsds.data.tasks.vqa",
    "vqa_cp_v2": "fastsds.data.tasks.vqa",
    "vcr": "fastsds.data.tasks.vcr",
    "world_entailment": "fastsds.world.tasks",
    "world_questions": "fastsds.world.tasks",
    "world_choice": "fastsds.world.tasks",
}


@dataclass(frozen=True, slots=True)
class Example:
    """An image, what is said or asked about it, and the answer.

    text: what a student reads. choices: this example's own candidates, in order; empty where the task's classes are every
    example's. target: the right class (or choice), or a score in (0, 1] for each class that has one. about: what metrics are
    broken down by, and what a shift goes by.
    """

    id: str
    image: ImageRef
    text: str
    choices: tuple[str, ...]
    target: int | dict[int, float]
    about: dict[str, Any]

    @property
    def answer(self) -> int | None:
        """The class of the highest score, the first of several; None where none has any."""
        if isinstance(self.target, int):
            return self.target
        return max(sorted(self.target), key=self.target.__getitem__, default=None)

    def score(self, predicted: int) -> float:
        """What a predicted class earns: 0 to 1."""
        return float(predicted == self.target) if isinstance(self.target, int) else self.target.get(predicted, 0.0)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What was counted, one a unit (an example, or a question of several parts). Shapes: each of values, float64 [N]."""

    ids: list[str]
    about: list[dict[str, Any]]
    values: dict[str, np.ndarray]

    def rows(self) -> list[dict]:
        """One JSON object a unit: id, about and outcomes."""
        columns = {name: of.tolist() for name, of in self.values.items()}
        return [
            {"id": i, "about": about, "outcomes": {name: of[k] for name, of in columns.items()}}
            for k, (i, about) in enumerate(zip(self.ids, self.about, strict=True))
        ]


@dataclass(kw_only=True)
class Task:
    """Examples by split, and how answers about them are counted.

    classes: shared by all examples, in order; empty where each has choices of its own. by: the fields of `about` that metrics
    are broken down by. chance: what random answers reach, in percent, by metric. notes: what a reader of results must know.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Example]]
    by: tuple[str, ...] = ()
    chance: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def prompts(self, example: Example) -> Sequence[str]:
        """The texts that a CLIP scores against the image, one a class (or choice), in order."""
        raise NotImplementedError

    def caption(self, example: Example) -> str | None:
        """A text that is true of the image, for contrastive training: the right prompt; None where there is none."""
        return None if example.answer is None else self.prompts(example)[example.answer]

    def unit(self, example: Example) -> str:
        """What is drawn into a subset as one, and what id lists name."""
        return example.id

    def outcomes(self, examples: Sequence[Example], predicted) -> Outcomes:
        """Count predictions. Shapes: predicted, integers [N]. Raises: ValueError for another shape or an unknown class."""
        values = {"accuracy": self.scores(examples, predicted)}
        return Outcomes([e.id for e in examples], [e.about for e in examples], values)

    def scores(self, examples: Sequence[Example], predicted) -> np.ndarray:
        """What each prediction earns. Shapes: predicted, integers [N] -> float64 [N]. Raises: ValueError."""
        found = np.asarray(predicted)
        if found.shape != (len(examples),) or found.dtype.kind not in "iu":
            raise ValueError(f"predicted: {len(examples)} integers expected, got {found.dtype} of shape {found.shape}")
        for example, p in zip(examples, found.tolist(), strict=True):
            if not 0 <= p < (n := len(example.choices or self.classes)):
                raise ValueError(f"predicted: {p} for {example.id}, expected a class in [0, {n})")
        return np.array([e.score(p) for e, p in zip(examples, found.tolist(), strict=True)], np.float64)

    def metrics(self, outcomes: Outcomes) -> dict[str, float]:
        """Means in percent: over all, and over those of each value of each field of `by`."""
        found = {name: 100 * float(of.mean()) for name, of in outcomes.values.items()}
        for name, of in outcomes.values.items():
            for key in self.by:
                groups: dict[str, list[int]] = {}
                for k, about in enumerate(outcomes.about):
                    if key in about:
                        groups.setdefault(str(about[key]), []).append(k)
                found |= {f"{name}/{key}={group}": 100 * float(of[groups[group]].mean()) for group in sorted(groups)}
        return found

    def source(self, examples: Sequence[Example], workers: int = 0) -> Source:
        """These examples' images and texts, sample k of example k; a damaged image is named in what `load` answers.

        Args: workers: threads that decode.
        """
        refs = [e.image for e in examples]
        listing = Listing(
            [ref.name for ref in refs],
            [(e.text,) for e in examples],
            [ref.size for ref in refs],
            lambda i: refs[i].read(),
        )
        return Images(listing, "first", workers=workers)


def load_task(name: str, folder=None, /, **options) -> Task:
    """Read a task from where it lies; no image is decoded. The world's tasks are made, and take no folder.

    Raises: ConfigError that names the task, or option, or the file and row, and what was expected.
    """
    if name not in LOADERS:
        near = difflib.get_close_matches(name, LOADERS, 1)
        raise ConfigError(f"task {name!r}: expected one of {', '.join(LOADERS)}" + "".join(f"; nearest: {n}" for n in near))
    load = importlib.import_module(LOADERS[name]).load
    made = "folder" not in inspect.signature(load).parameters
    known = list(inspect.signature(load).parameters)[1 if made else 2 :]
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"task {name}: unknown option {unknown[0]!r}, expected one of {', '.join(known)}")
    kinds = get_type_hints(load)
    for option, value in options.items():
        try:
            convert(value, kinds[option])
        except TypeError:
            raise ConfigError(f"task {name}: {option} is {show(value)}, expected {describe(kinds[option])}") from None
    if made != (folder is None):
        raise ConfigError(f"task {name}: " + (f"takes no folder, got {folder}" if made else "expected the folder of its files"))
    if made:
        return load(name, **options)
    if not Path(folder).is_dir():
        raise ConfigError(f"task {name}: folder {folder} does not exist")
    return load(name, Path(folder), **options)
