"""Ask a cross-modal student a task: batched, over all ranks; a result like a suite's.

A metric is SPLIT/NAME, NAME as the task has it: test/accuracy, shift/accuracy/label=neutral. A row is a unit of the task (an
example, or a question of several parts), with what was predicted of each of its examples.
"""

import hashlib
from collections.abc import Sequence

import torch

from fastsds.config import ConfigError
from fastsds.data.tasks import Example, Task
from fastsds.evaluation.measures import Metric, by_value, over_items
from fastsds.evaluation.results import Result
from fastsds.evaluation.run import Ranks
from fastsds.progress import watched
from fastsds.recipes.clip_td import reads

BATCH = 64


def evaluate_task(
    model, task: Task, splits: Sequence[str], batch: int = BATCH, examples: int | None = None, workers: int = 0
) -> Result:
    """Predict the answers of some splits, and count them. Every rank calls it, and gets the result.

    The prediction is the class, or choice, of the highest logit, the first of equal ones.
    Args: model: a `CrossModal` in eval mode, or an engine over one. splits: one named twice is asked once. examples: the first
        units of each split alone. workers: threads that decode.
    Raises: ConfigError for a split that the task has not, a head of other classes, or an image that cannot be read or logits
        that are not finite, with the example's id.
    """
    getattr(model, "module", model).check_answers(task.classes, f"task {task.name}")
    if unknown := [split for split in splits if split not in task.splits]:
        raise ConfigError(f"task {task.name}: split {unknown[0]!r}, expected some of {', '.join(task.splits)}")
    splits, ranks, parts, rows = list(dict.fromkeys(splits)), Ranks(), {}, []
    for split in splits:
        asked = first_units(task, split, examples)
        predicted = _predict(model, task, asked, batch, workers, ranks, split)
        of = task.outcomes(asked, predicted)
        said: dict[str, list[int]] = {}
        for example, p in zip(asked, predicted, strict=True):
            said.setdefault(task.unit(example), []).append(p)
        parts[split] = of
        rows += [
            {**row, "about": {**row["about"], "split": split}, "predicted": said[row["id"]]} for row in of.rows()
        ]
    measures, headline = _measures(task, parts)
    settings = {"splits": splits, "examples": examples, "classes": list(task.classes)}
    about = {"suite": task.name, "fingerprint": fingerprint(task, splits), "scorer": {"name": "student", "settings": settings}}
    return Result(task.name, rows, measures, tuple(headline), {**about, "notes": task.notes})


def measures_of(task: Task, splits: Sequence[str]) -> tuple[dict[str, Metric], list[str]]:
    """What `evaluate_task` measures, and its headline, without a student."""
    parts = {split: task.outcomes(task.splits[split], [0] * len(task.splits[split])) for split in splits}
    return _measures(task, parts)


def first_units(task: Task, split: str, units: int | None) -> list[Example]:
    """The examples of a split's first units, all of each. Args: units: None: all."""
    kept = set(list(dict.fromkeys(task.unit(e) for e in task.splits[split]))[:units])
    return [e for e in task.splits[split] if task.unit(e) in kept]


@torch.no_grad()
def _predict(model, task: Task, examples: list[Example], batch: int, workers: int, ranks: Ranks, split: str) -> list[int]:
    """The predicted class of each example. Ranks take batches in turn, equally often: a sharded model is gathered by all at
    once; one that has none left repeats a batch, and its answer is dropped.
    """
    student = getattr(model, "module", model)
    device, source = next(student.parameters()).device, task.source(examples, workers)
    starts, found = list(range(0, len(examples), batch)), {}

    def read(first: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(first, min(first + batch, len(examples)))
        samples = source.load(ids, torch.zeros_like(ids), student.image_size)
        for row, why in samples.damaged.items():
            raise ConfigError(f"task {task.name}, {split}: {examples[first + row].id}: {why}")
        texts = [reads(examples[k]) for k in ids.tolist()]
        tokens = student.tokenize(texts if examples[first].choices else [text for (text,) in texts])
        return samples.pixels.to(device), tokens.to(device)

    def answer(first: int, pixels: torch.Tensor, tokens: torch.Tensor) -> list[int]:
        logits = model(pixels, tokens).logits
        for row in (~logits.isfinite().all(1)).nonzero()[:1].flatten().tolist():  # argmax would call NaN the highest
            raise ConfigError(f"task {task.name}, {split}: {examples[first + row].id}: the student's logits are not finite")
        return logits.argmax(1).tolist()

    rounds = [starts[k : k + ranks.world] for k in range(0, len(starts), ranks.world)]
    for mine in watched(rounds, f"{task.name}, {split}"):
        own = mine[ranks.rank] if ranks.rank < len(mine) else mine[0]
        held = []
        ranks.agreed(lambda own=own, held=held: held.extend(read(own)))  # before any asks: a sharded model waits for all ranks
        found.update(zip(mine, ranks.agreed(lambda own=own, held=held: answer(own, *held)), strict=False))
    return [p for first in starts for p in found[first]]


def _measures(task: Task, parts: dict) -> tuple[dict[str, Metric], list[str]]:
    """Every metric of every split, over the rows of all of them; and those of whole splits."""
    units, measures, headline = [about for of in parts.values() for about in of.about], {}, []
    of_split = [split for split, of in parts.items() for _ in of.ids]
    outcomes = dict.fromkeys(name for of in parts.values() for name in of.values)
    for split in parts:
        mine = [of == split for of in of_split]
        for outcome in outcomes:
            chance = task.chance.get(outcome, 0.0)
            headline.append(f"{split}/{outcome}")
            found = over_items(outcome, mine, chance)
            for key in task.by:
                values = [(about[key],) if own and key in about else () for own, about in zip(mine, units, strict=True)]
                found |= by_value(outcome, key, values, chance)
            measures |= {f"{split}/{name}": metric for name, metric in found.items()}
    return measures, headline


def fingerprint(task: Task, splits: Sequence[str]) -> str:
    """128 bits of what some splits ask: examples, classes, answers; not of their images."""
    found = hashlib.blake2b(repr((task.name, task.classes)).encode(), digest_size=16)
    for split in splits:
        for e in task.splits[split]:
            found.update(repr((split, e.id, e.text, e.choices, e.target)).encode())
    return found.hexdigest()
