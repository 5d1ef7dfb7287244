"""The task that a recipe's `data` section names, as it is trained on."""

from pathlib import Path

from fastsds.config import ConfigError, TaskDataConfig
from fastsds.data.tasks import Task, load_task
from fastsds.data.tasks.subsets import low_shot, shift_by, shift_lists


def open_task(data: TaskDataConfig, seed: int = 0) -> Task:
    """Load a task, shift it, keep a fraction of its training examples. Args: seed: of the examples and values drawn.

    Raises: ConfigError that names the section, and what is wrong in it: a file and row, an option, a value.
    """
    if other := [option for option in data.options if not isinstance(option, str)]:
        raise ConfigError(f"data.options: {other[0]!r}, expected the name of an option")
    try:
        task = load_task(data.task, data.folder, **data.options)
    except ConfigError as error:
        raise ConfigError(f"data: {error}") from error
    shift = data.shift
    try:
        if shift.by is not None:
            task = shift_by(task, shift.by, shift.train, shift.test, shift.share, seed)
        if shift.lists:
            task = shift_lists(task, {split: Path(file) for split, file in shift.lists.items()})
    except ConfigError as error:
        raise ConfigError(f"data.shift: {error}") from error
    return low_shot(task, data.fraction, seed)
