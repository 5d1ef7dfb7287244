"""Where an exported student comes from: a run, one of its checkpoints, or a folder of which nothing more is known."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from fastsds.config import ConfigError
from fastsds.history import Run, read_run
from fastsds.student import CONFIG_FILE

RECIPE = {"data", "output", "steps", "student"}  # keys that a card reads
STATE = {"engine", "recipe", "step", "versions"}
STUDENT_FILES = (CONFIG_FILE, "config.json")


@dataclass
class Origin:
    """student: its folder. recipe: as YAML has it; state: a checkpoint's state.json; run: up to the student's step."""

    student: Path
    recipe: dict | None = None
    state: dict | None = None
    run: Run | None = None


def find(path: Path) -> Origin:
    """What a path holds. Raises: ConfigError that names what was expected in it."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; expected a run, a checkpoint or a student's folder")
    if (path / "state.json").is_file():
        state, output = _state(path), path.resolve().parent.parent
        beside = path.resolve().parent.name == "checkpoints" and (output / "metrics.jsonl").is_file()
        return Origin(_student(path), state["recipe"], state, read_run(output, until=state["step"]) if beside else None)
    if (path / "recipe.yaml").is_file():
        if not (path / "student").is_dir():
            raise ConfigError(f"{path}: the run has no student/ yet; name one of {path / 'checkpoints'}/step_*")
        recipe = _recipe(path / "recipe.yaml")
        last = path / "checkpoints" / f"step_{recipe['steps']:08d}"  # a run writes student/ at its end, beside it
        state = _state(last) if (last / "state.json").is_file() else None
        return Origin(_student(path), recipe, state, read_run(path, until=recipe["steps"]))
    if any((path / name).is_file() for name in STUDENT_FILES):
        return Origin(path)
    raise ConfigError(
        f"{path}: expected a run (recipe.yaml and student/ in it), a checkpoint (state.json) or a student's folder "
        f"({' or '.join(STUDENT_FILES)})"
    )


def _student(path: Path) -> Path:
    if not any((path / "student" / name).is_file() for name in STUDENT_FILES):
        raise ConfigError(f"{path / 'student'}: no {' and no '.join(STUDENT_FILES)}: not a student's folder")
    return path / "student"


def _recipe(path: Path) -> dict:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not RECIPE <= recipe.keys():
        raise ConfigError(f"{path}: not a run's recipe (expected {', '.join(sorted(RECIPE))} in it)")
    return recipe


def _state(path: Path) -> dict:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / 'state.json'}: {error}") from error
    if not isinstance(state, dict) or not STATE <= state.keys() or not RECIPE <= state["recipe"].keys():
        raise ConfigError(f"{path / 'state.json'}: not a checkpoint's (expected {', '.join(sorted(STATE))} in it)")
    return state
