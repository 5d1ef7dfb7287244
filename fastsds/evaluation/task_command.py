"""`fastsds eval --task`: one cross-modal student, or two, asked a task; kept and shown as suites are."""

import argparse
import contextlib
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.data.tasks import Task, load_task
from fastsds.evaluation import named
from fastsds.evaluation.results import RESULT, Result, check_same, load_result
from fastsds.evaluation.run import Ranks
from fastsds.evaluation.scorer import WORKERS, weights_digest
from fastsds.evaluation.table import Shown
from fastsds.evaluation.tasks import BATCH, evaluate_task, fingerprint
from fastsds.strict import parse

WANTED = "a run's, a checkpoint's or a cross-modal student's folder"


def check(asked: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go with --task."""
    for name, wrong in (("suite", bool(asked.suite)), ("data", asked.data is not None), ("scorer", asked.scorer != "clip")):
        if wrong:
            raise ConfigError(f"--{name}: of suites; expected none beside --task NAME=PATH, which a --model answers")
    if asked.model is None:
        raise ConfigError(f"--model: expected {WANTED}")


def evaluated(asked: argparse.Namespace, place: torch.device) -> list[Shown]:
    """Ask one student after the other. Every rank calls it."""
    task = load(asked)
    models = [asked.model, *([asked.baseline] if asked.baseline is not None else [])]
    return [Shown(*(answered(asked, task, model, place) for model in models))]


def load(asked: argparse.Namespace) -> Task:
    """The task of the command line, with the splits that are asked. Raises: ConfigError."""
    name, equals, path = asked.task.partition("=")
    options = {}
    for text in asked.option:
        key, has_value, value = text.partition("=")
        if not has_value or not key:
            raise ConfigError(f"--option {text}: expected NAME=VALUE")
        options[key] = parse(value, f"--option {text}")
    task = load_task(name, Path(path).expanduser() if equals else None, **options)
    if not asked.split or not set(asked.split) <= task.splits.keys():
        said = ", ".join(split for split in asked.split if split not in task.splits) or "none"
        raise ConfigError(f"--split: {said}; expected some of {', '.join(task.splits)}, the splits of {name}")
    return task


def answered(asked: argparse.Namespace, task: Task, model: str, place: torch.device) -> Result:
    """What a student answers; what it answered before is read. Raises: ConfigError where that is of another one, or of else."""
    student, splits, ranks = named.crossmodal(model, place), list(dict.fromkeys(asked.split)), Ranks()
    student.check_answers(task.classes, f"model {model}, task {task.name}")
    name = named.called(model)
    settings = {"weights": weights_digest(student), "precision": asked.precision, "splits": splits}
    about = {"suite": task.name, "scorer": {"name": name, "settings": settings}, "fingerprint": fingerprint(task, splits)}
    folder = asked.output / named.folder(name) / task.name

    def before() -> Result | None:
        if ranks.rank:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}") from error
        if not (folder / RESULT).is_file():
            return None
        check_same(folder / RESULT, about)
        return load_result(folder)

    if (kept := ranks.agreed(before)[0]) is not None:
        return kept
    dtype = named.AUTOCAST[asked.precision]
    with contextlib.nullcontext() if dtype is None else torch.autocast(place.type, dtype):
        workers = WORKERS if asked.workers is None else asked.workers
        found = evaluate_task(student, task, splits, asked.batch or BATCH, workers=workers)
    found.about |= about
    if ranks.rank == 0:
        found.save(folder)
    return found
