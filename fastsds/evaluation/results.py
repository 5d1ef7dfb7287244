"""What an evaluation gives, and how it lies on disk: one format for every suite and scorer.

    FOLDER/items.jsonl    `suite.rows`: a JSON object an item (of a gallery, a query): id, about, scores or places, outcomes
    FOLDER/result.json    suite, scorer, metrics with chance, n and standard error, which items each counts, ties, notes, source

Both are read back without the data: `load_result(folder)`.
"""

import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation.measures import Metric
from fastsds.evaluation.suite import Suite
from fastsds.provenance import provenance

ITEMS, RESULT, STARTED, WORK = "items.jsonl", "result.json", "started.json", "work"


@dataclass(eq=False)
class Result:
    """A suite's outcomes and metrics of one scorer.

    rows: see `Suite.rows`. measures: what each metric counts. headline: the metrics of a short table.
    about: {"suite", "fingerprint", "scorer": {"name", "settings"}, "notes"}, and of one that was read its source.
    """

    suite: str
    rows: list[dict]
    measures: dict[str, Metric]
    headline: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def outcomes(self) -> dict[str, np.ndarray]:
        """Each outcome, one value an item that has it, in the order of the rows."""
        names = dict.fromkeys(name for row in self.rows for name in row["outcomes"])
        return {name: np.array([row["outcomes"][name] for row in self.rows if name in row["outcomes"]]) for name in names}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """All metrics, in percent."""
        return {name: metric.value(self.outcomes[metric.outcome]) for name, metric in self.measures.items()}

    @cached_property
    def errors(self) -> dict[str, float | None]:
        """Their standard errors over items, in points."""
        return {name: metric.error(self.outcomes[metric.outcome]) for name, metric in self.measures.items()}

    @property
    def ties(self) -> int:
        """How often a comparison that decides an outcome was of equal scores."""
        return sum(int(values.sum()) for name, values in self.outcomes.items() if name.startswith("tied"))

    def values(self, metric: str) -> np.ndarray:
        """One number a counted item whose mean is the metric, in percent: see `Metric.values`."""
        return self.measures[metric].values(self.outcomes[self.measures[metric].outcome])

    def save(self, folder: Path | str) -> None:
        """Write both files; `result.json` last, in one piece."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).unlink(missing_ok=True)  # of other rows
        (folder / ITEMS).write_text(_lines(self.rows), encoding="utf-8")
        self._write(folder)

    def _write(self, folder: Path) -> None:
        metrics = {
            name: {
                "value": self.metrics[name], "standard_error": self.errors[name], "n": metric.n, "chance": metric.chance,
                "outcome": metric.outcome, **_places(metric),
            }
            for name, metric in self.measures.items()
        }  # fmt: skip
        whole = {**self.about, "headline": list(self.headline), "ties": self.ties, "metrics": metrics, **provenance()}
        _put(folder / RESULT, whole)


def load_result(folder: Path | str) -> Result:
    """Read an evaluation. Raises: ConfigError that names the file and what is missing."""
    folder = Path(folder)
    if not (folder / RESULT).is_file():
        why = "an evaluation that is not finished" if (folder / STARTED).is_file() else "no evaluation"
        raise ConfigError(f"{folder}: {why}: no {RESULT} in it")
    try:
        about = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / ITEMS).read_text(encoding="utf-8").splitlines()]
        kept, headline = about.pop("metrics"), tuple(about.pop("headline"))
        result = Result(about["suite"], rows, {}, headline, about)
        sizes = {name: len(values) for name, values in result.outcomes.items()}
        result.measures |= {name: _metric(of, sizes[of["outcome"]]) for name, of in kept.items()}
        told = {name: (float(of["value"]), of["n"]) for name, of in kept.items()}
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{folder}: {RESULT} and {ITEMS} are not an evaluation's: {type(error).__name__} {error}") from error
    for name, value in result.metrics.items():
        (before, counted), n = told[name], result.measures[name].n
        if abs(value - before) > 1e-9 or n != counted:
            raise ConfigError(f"{folder}: {name} is {before} of {counted} items in {RESULT}, and {value} of {n} by {ITEMS}")
    return result


def about(suite: Suite, scorer) -> dict[str, Any]:
    """What results depend on. Raises: ConfigError for a scorer's name or settings that JSON does not hold."""
    if not isinstance(scorer.name, str):
        raise ConfigError(f"scorer {scorer.name!r}: its name is to be text")
    try:
        settings = json.loads(json.dumps(scorer.settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scorer {scorer.name}: its settings are {scorer.settings!r}; expected texts, finite numbers, true, false, null, "
            f"and lists and dicts of these: {error}"
        ) from error
    return {"suite": suite.name, "fingerprint": suite.fingerprint(), "scorer": {"name": scorer.name, "settings": settings}}


class Growing:
    """An evaluation's folder while it is being filled; without a folder nothing is written.

    rows: those that are there already. kept: arrays of `keep`, by name. Raises: ConfigError if it holds another evaluation.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], size: int, rows=(), kept=None):
        self.folder, self.rows, self.kept, self.finished = folder, list(rows), kept or {}, False
        if folder is None:
            return
        known = next((folder / name for name in (RESULT, STARTED) if (folder / name).is_file()), None)
        if known is None and (folder / ITEMS).exists():
            raise ConfigError(f"{folder}: {ITEMS} in it is of no known evaluation; name another folder")
        if known is not None:
            check_same(known, about)
            self.rows = _whole_lines(folder / ITEMS)
            self.finished = known.name == RESULT and len(self.rows) == size
            self.kept = {path.stem: np.load(path) for path in sorted((folder / WORK).glob("*.npy"))}
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _put(folder / STARTED, about)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error

    def append(self, rows: list[dict]) -> None:
        """Add rows, on disk at once."""
        self.rows += rows
        if self.folder is not None and rows:
            with open(self.folder / ITEMS, "a", encoding="utf-8") as file:
                file.write(_lines(rows))

    def keep(self, name: str, values: np.ndarray) -> None:
        """Keep an array until the evaluation is finished."""
        if self.folder is not None:
            (self.folder / WORK).mkdir(exist_ok=True)
            partial = self.folder / WORK / f"{name}.partial"
            with open(partial, "wb") as file:
                np.save(file, values)
            partial.replace(partial.with_suffix(".npy"))

    def finish(self, result: Result) -> None:
        """Write the result and drop what was kept for going on."""
        if self.folder is not None and not self.finished:
            result._write(self.folder)
            (self.folder / STARTED).unlink(missing_ok=True)
            shutil.rmtree(self.folder / WORK, ignore_errors=True)


def check_same(file: Path, wanted: dict[str, Any]) -> None:
    """Raise a ConfigError unless a kept evaluation is of what is wanted: suite, fingerprint, scorer."""
    found = _read(file, file.read_bytes())
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigError(
                f"{file} is of another {'suite' if key == 'fingerprint' else key}: {json.dumps(found.get(key))}, "
                f"this one's is {json.dumps(value)}; name another folder, or delete it"
            )


def _put(path: Path, value: dict[str, Any]) -> None:
    """Write JSON in one piece."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _whole_lines(path: Path) -> list[dict]:
    """The rows of a file; a last line that was cut is taken off it."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [_read(path, line) for line in whole.splitlines()]


def _read(path: Path, text: bytes) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not an evaluation's: {error}; name another folder, or delete it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not an evaluation's: an object expected; name another folder, or delete it")
    return found


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _places(metric: Metric) -> dict[str, list[list[int]]]:
    """Which items each group has; nothing where there is one group of all."""
    if not metric.groups.any():
        return {}
    return {"groups": [np.flatnonzero(metric.groups == g).tolist() for g in range(metric.groups.max() + 1)]}


def _metric(kept: dict, size: int) -> Metric:
    groups = np.zeros(size, np.int64) if "groups" not in kept else np.full(size, -1)
    for number, places in enumerate(kept.get("groups", ())):
        groups[places] = number
    return Metric(kept["outcome"], groups, kept["chance"])
