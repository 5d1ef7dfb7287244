"""Parts of a task: few of its training examples, or training and testing on different ones.

Every draw is of (seed, id) alone, so a part does not depend on the order of a file.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.data.rows import read_json, read_text, unique
from fastsds.data.tasks import Example, Task
from fastsds.ops import Noise, Purpose, draw

_MEMBER, _STRATUM, _VALUE = (draw(Purpose.ORDER, (1 << 28) - k) for k in (1, 2, 3))  # visits that no epoch reaches
TRAIN = "train"


def low_shot(task: Task, fraction: float, seed: int, split: str = TRAIN) -> Task:
    """Return the task with a fraction of one split's units: stratified by class, and inside every larger fraction.

    In each class the units stand in a drawn order; unit r of n has priority (r + u) / n, u the class's own in (0, 1], and the
    round(fraction N) of least priority are kept (at least one). So a class of n keeps fraction n, give or take one.
    A class: the answer, or the answers of a unit's parts. The classes and all other splits stay as they are.
    Raises: ConfigError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction: {fraction!r}, expected a number in (0, 1]")
    if fraction == 1:
        return task
    units: dict[str, list[Example]] = {}
    for example in task.splits[split]:
        units.setdefault(task.unit(example), []).append(example)
    strata: dict[str, list[str]] = {}
    for unit, examples in units.items():
        strata.setdefault(repr([e.answer for e in sorted(examples, key=lambda e: e.id)]), []).append(unit)
    place = {unit: (words, unit) for unit, words in zip(units, _words(seed, _MEMBER, units), strict=True)}
    priority = {}
    for (_, members), (word, _) in zip(strata.items(), _words(seed, _STRATUM, strata), strict=True):
        u = (word + 1) / 2**32
        for r, unit in enumerate(sorted(members, key=place.__getitem__)):
            priority[unit] = ((r + u) / len(members), unit)
    wanted = max(1, round(fraction * len(units)))
    kept = set(sorted(units, key=priority.__getitem__)[:wanted])
    return replace(task, splits={**task.splits, split: [e for e in task.splits[split] if task.unit(e) in kept]})


def shift_by(
    task: Task,
    by: str,
    train: Collection | None = None,
    test: Collection | None = None,
    share: float | None = None,
    seed: int = 0,
) -> Task:
    """Return the task trained on some values of a field of `about`, and tested on others.

    `train` keeps the values of train; every other split S keeps them as S, and those of test as S_shift. Where S then has
    none of train's, there is no S. A split S_shift that a task has of its own (the world's dev_shift) gives way to this one.
    Args: train, test: values; one that is None has all that the other lacks. share: in place of both, the share of values that
        are drawn for train.
    Raises: ConfigError for a value that no example has, one on both sides, a unit on both, or a side without examples.
    """
    values = {str(e.about[by]) for examples in task.splits.values() for e in examples if by in e.about}
    if not values:
        known = sorted({key for examples in task.splits.values() for e in examples for key in e.about})
        raise ConfigError(f"task {task.name}: no example has the field {by!r}; expected one of {', '.join(known)}")
    if share is not None:
        if train is not None or test is not None or not 0 < share < 1 or len(values) < 2:
            found = f"share {share!r} of {len(values)} values"
            raise ConfigError(f"shift by {by}: {found}, expected one in (0, 1) of at least 2, without train and test")
        drawn = sorted(zip(_words(seed, _VALUE, sorted(values)), sorted(values), strict=True))
        train = [name for _, name in drawn[: min(len(values) - 1, max(1, round(share * len(values))))]]
    elif train is None and test is None:
        raise ConfigError(f"shift by {by}: expected values of train or of test, or a share")
    ours, theirs = (None if side is None else {str(v) for v in side} for side in (train, test))
    ours = values - theirs if ours is None else ours
    theirs = values - ours if theirs is None else theirs
    if unknown := sorted((ours | theirs) - values):
        raise ConfigError(f"shift by {by}: no example has {unknown[0]!r}; found {', '.join(sorted(values)[:10])}, ...")
    if both := sorted(ours & theirs):
        raise ConfigError(f"shift by {by}: {both[0]!r} is both in train and in test")
    side_of: dict[str, tuple[bool, bool]] = {}
    for e in (e for examples in task.splits.values() for e in examples):
        said = str(e.about[by]) if by in e.about else None
        if side_of.setdefault(task.unit(e), side := (said in ours, said in theirs)) != side:
            raise ConfigError(f"shift by {by}: {task.unit(e)!r} has a part on each side; expected a field that its parts share")
    splits, own = {}, {f"{split}_shift" for split in task.splits}
    for split, examples in task.splits.items():
        if split in own:
            continue
        sides = {split: ours} if split == TRAIN else {split: ours, f"{split}_shift": theirs}
        splits |= {name: [e for e in examples if by in e.about and str(e.about[by]) in side] for name, side in sides.items()}
    splits = {name: examples for name, examples in splits.items() if examples}
    if TRAIN not in splits or not any(name.endswith("_shift") for name in splits):
        raise ConfigError(f"shift by {by}: no example is left to {'test on' if TRAIN in splits else 'train on'}")
    return replace(task, splits=splits)


def shift_lists(task: Task, lists: dict[str, Path]) -> Task:
    """Return the task with the splits that files of ids name, whatever split each example was in.

    Args: lists: split -> file: one id a line, or JSON: a list of ids, or of objects with question_id (VQA-CP's questions), or
        such a list under "questions". An id is a unit's: VQA's question_id, VCR's annot_id, SNLI-VE's pairID.
    Raises: ConfigError that names file and row of an id that is unknown or listed twice.
    """
    units: dict[str, list[Example]] = {}
    for examples in task.splits.values():
        for example in examples:
            units.setdefault(task.unit(example), []).append(example)
    splits, seen = {}, {}
    for split, path in lists.items():
        splits[split] = []
        for where, unit in _ids(Path(path)):
            unique(seen, unit, where, "id")
            if unit not in units:
                raise ConfigError(f"{where}: id {unit!r} is none of {task.name}'s")
            splits[split] += units[unit]
        if not splits[split]:
            raise ConfigError(f"{path}: no ids in it")
    if TRAIN not in splits:
        raise ConfigError(f"lists: expected one for {TRAIN!r}, found {', '.join(lists) or 'none'}")
    return replace(task, splits=splits)


def _ids(path: Path) -> Iterable[tuple[str, str]]:
    if path.suffix != ".json":
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                yield f"{path}: row {number}", line.strip()
        return
    found = read_json(path)
    found = found.get("questions") if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ConfigError(f"{path}: a list of ids, or of objects with question_id, expected")
    for i, row in enumerate(found):
        unit = row.get("question_id") if isinstance(row, dict) else row
        if not isinstance(unit, (str, int)) or isinstance(unit, bool):
            raise ConfigError(f"{path}: [{i}]: an id, or an object with question_id, expected, found {row!r:.60}")
        yield f"{path}: [{i}]", str(unit)


def _words(seed: int, purpose: int, names: Collection[str]) -> list[tuple[int, int]]:
    """Two random words a name, of (seed, name) alone."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    ids = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)
    return [tuple(words) for words in Noise(seed, purpose, ids).words(2).tolist()]
