"""A run that is over, or still running, read back from its folder: what it logged, and its evaluations with intervals."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation import world_suite
from fastsds.evaluation.statistics import RESAMPLES, paired_bootstrap
from fastsds.metrics import read

ROW = {"split", "step"}
BAND = re.compile(r"(residual|weighted)/(-?[\d.]+)_(-?[\d.]+)$")


class Score(NamedTuple):
    """A metric in percent, its 95 % bootstrap interval over n items; low and high are None where items were not kept."""

    value: float
    low: float | None
    high: float | None
    n: int | None


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
        """The metrics of an evaluation, "<split>/<name>"."""
        outcomes = self.outcomes(row)
        found = {}
        for key, value in row.items():
            if not isinstance(value, float):
                continue
            if (of := outcomes.get(key)) is not None:
                _, low, high = paired_bootstrap(of, np.zeros(len(of)), resamples)
                found[key] = Score(value, low, high, len(of))
            else:
                known = row["suite"] in world_suite.SUITES and key.endswith("/retrieval")
                found[key] = Score(value, None, None, world_suite.PAIRS if known else None)
        return found

    def outcomes(self, row: dict) -> dict[str, np.ndarray]:
        """Each item's outcome in percent, by "<split>/<name>", from the items kept beside an evaluation; {} without."""
        path = self.folder / f"items_{row['step']}.jsonl"
        if row["suite"] not in world_suite.SUITES or not path.is_file():
            return {}
        items, found = read(path), {}
        for split in dict.fromkeys(item["split"] for item in items):
            found |= {f"{split}/{name}": values for name, values in world_suite.outcomes(items, split).items()}
        return found


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
