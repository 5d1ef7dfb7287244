"""What the tasks' loaders do: read JSON, check a row's fields, find its image. Every error names file and row."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsds.config import ConfigError
from fastsds.progress import watched

SHOWN = 10  # rows that an error lists
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of which two make a character
_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class ImageRef:
    """An image that is read when it is asked for: equal for equal pixels, so that each may be encoded once.

    name: the file, relative to its folder. where: file and row that name it, for errors. read: its bytes (OSError where there
    are none). size: in bytes.
    """

    name: str
    where: str = field(compare=False)
    read: Callable[[], bytes] = field(compare=False, repr=False)
    size: int = 0


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte order mark. Raises: ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises: ConfigError."""
    return _parsed(read_text(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON Lines file, each with where it stands. Raises: ConfigError."""
    for number, line in enumerate(watched(read_text(path).split("\n"), f"reading {path.name}"), 1):
        if line.strip():
            where = f"{path}: row {number}"
            yield where, _parsed(line, where)


def rows_of(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    """The rows of a JSON file, a list or an object that has it under `key`, each with where it stands. Raises: ConfigError."""
    found = read_json(path)
    rows = found.get(key) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: a list, or an object with the list {key!r} expected, found {_kind(rows)}")
    for i, row in enumerate(watched(rows, f"reading {path.name}")):
        yield f"{path}: {key}[{i}]", row


def value(where: str, row, key: str, kind: type):
    """A field of a row, checked. Args: kind: str (not empty), int, list or dict. Raises: ConfigError."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: an object expected, found {_kind(row)}")
    if key not in row:
        raise ConfigError(f"{where}: no field {key!r}; found {', '.join(map(str, row)) or 'none'}")
    found = row[key]
    if not isinstance(found, kind) or isinstance(found, bool) or (kind is str and not found.strip()):
        raise ConfigError(f"{where}: {key} is {found!r:.60}, expected {_KINDS[kind]}" + " that is not empty" * (kind is str))
    return found


def unique(seen: dict, key, where: str, what: str) -> None:
    """Raise ConfigError if `key` was met before, naming both rows."""
    if key in seen:
        raise ConfigError(f"{where}: {what} {key!r} was there before, in {seen[key]}")
    seen[key] = where


def need(folder: Path, name: str) -> Path:
    """A file of a folder. Raises: ConfigError."""
    if not (folder / name).is_file():
        raise ConfigError(f"{folder}: expected the file {name} in this folder (docs/tasks.md)")
    return folder / name


class ImageFiles:
    """The image files of a folder: refers to them, and remembers which are not there."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ConfigError(f"image folder {folder} does not exist (docs/tasks.md)")
        self.folder = folder
        self.missing: dict[str, str] = {}
        self._found: dict[str, ImageRef] = {}

    def ref(self, name: str, where: str) -> ImageRef:
        """Refer to a file, by its name in the folder."""
        if name not in self._found:
            path, size = self.folder / name, 0
            try:
                size = path.stat().st_size
            except (OSError, ValueError):  # ValueError: a name that no file can have
                self.missing[name] = where
            self._found[name] = ImageRef(name, where, path.read_bytes, size)
        return self._found[name]

    def check(self, file: Path) -> None:
        """Raise one ConfigError for all images that are missing. file: what names them."""
        if self.missing:
            shown = "".join(f"\n  {where}: {name}" for name, where in list(self.missing.items())[:SHOWN])
            raise ConfigError(
                f"{file}: {len(self.missing)} of {len(self._found)} images are not in {self.folder}:{shown}"
                + "\n  ..." * (len(self.missing) > SHOWN)
            )


def _parsed(text: str, where: str):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if _HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[max(0, error.start - 20) : error.start + 1]
            raise ConfigError(f"{where}: not Unicode: half a character in {half!r}") from error
    return found


def _kind(found) -> str:
    return next((name for kind, name in _KINDS.items() if isinstance(found, kind)), repr(found))
