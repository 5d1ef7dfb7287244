"""A run that is over, or still running, read back from its folder: what it logged, and its evaluations with intervals."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation.results import RESULT, Result, load_result
from fastsds.evaluation.statistics import RESAMPLES, paired_bootstrap
from fastsds.metrics import evaluation_folder, read

ROW = {"split", "step"}
BAND = re.compile(r"(residual|weighted)/(-?[\d.]+)_(-?[\d.]+)$")


class Score(NamedTuple):
    """A metric in percent, its 95 % bootstrap interval over n items, and chance; all but the value None without the items."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    chance: float | None = None


@dataclass
class Run:
    """train, evaluations: the rows of metrics.jsonl."""

    folder: Path
    name: str
    train: list[dict]
    evaluations: list[dict]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of what training rows have under a key."""
        points = [(row["step"], row[key]) for row in self.train if key in row]
        return [step for step, _ in points], [value for _, value in points]

    def bands(self) -> list[dict]:
        """[{"step", "bands": {(low, high): {"residual", "weighted"}}}] of the rows that have them."""
        rows = []
        for row in self.train:
            bands: dict[tuple, dict] = {}
            for key, value in row.items():
                if found := BAND.match(key):
                    bands.setdefault((float(found[2]), float(found[3])), {})[found[1]] = value
            if bands:
                rows.append({"step": row["step"], "bands": bands})
        return rows

    def scores(self, row: dict, resamples: int = RESAMPLES) -> dict[str, Score]:
        """The metrics of an evaluation, by name; those of one kind of items (NAME=VALUE) are left to its folder."""
        result, found = self.result(row), {}
        for key, value in row.items():
            if not isinstance(value, float) or "=" in key:
                continue
            found[key] = Score(value)
            if result is not None:
                values = result.values(key)
                _, low, high = paired_bootstrap(values, np.zeros(len(values)), resamples)
                found[key] = Score(value, low, high, len(values), result.measures[key].chance)
        return found

    def result(self, row: dict) -> Result | None:
        """An evaluation with its items, or None where they are not there."""
        folder = evaluation_folder(self.folder, row["step"])
        return load_result(folder) if (folder / RESULT).is_file() else None


def read_runs(folders: list[str | Path]) -> list[Run]:
    """Runs with the shortest names that tell them apart. Raises: ConfigError that names the folder."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"{next(p for p in paths if paths.count(p) > 1)} is named twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, paths, strict=True)]


def read_run(folder: str | Path, name: str = "", until: int | None = None) -> Run:
    """A run. until: leave out what came after this step. Raises: ConfigError."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder}: no metrics.jsonl in it; expected the output folder of a run")
    try:
        rows = read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not ROW <= row.keys() or (row["split"] == "eval" and "suite" not in row):
            raise ConfigError(f"{path}: not a run's: row {number} is {json.dumps(row):.60}")
    rows = [row for row in rows if until is None or row["step"] <= until]
    if not rows:
        raise ConfigError(f"{path}: no whole row in it; the run has logged nothing yet")
    of = {split: [row for row in rows if row["split"] == split] for split in ("train", "eval")}
    return Run(folder, name or folder.name, of["train"], of["eval"])
