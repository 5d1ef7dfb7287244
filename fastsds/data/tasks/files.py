"""What the tasks' loaders do beside `data/rows.py`: their files, rows and images. Every error names file and row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.rows import ImageFolder, kind_of, parse_json, read_json, read_text
from fastsds.progress import watched


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


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON Lines file, each with where it stands. Raises: ConfigError."""
    for number, line in enumerate(watched(read_text(path).split("\n"), f"reading {path.name}"), 1):
        if line.strip():
            where = f"{path}: row {number}"
            yield where, parse_json(line, where)


def rows_of(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    """The rows of a JSON file, a list or an object that has it under `key`, each with where it stands. Raises: ConfigError."""
    found = read_json(path)
    rows = found.get(key) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: a list, or an object with the list {key!r} expected, found {kind_of(rows)}")
    for i, row in enumerate(watched(rows, f"reading {path.name}")):
        yield f"{path}: {key}[{i}]", row


def need(folder: Path, name: str) -> Path:
    """A file of a folder. Raises: ConfigError."""
    if not (folder / name).is_file():
        raise ConfigError(f"{folder}: expected the file {name} in this folder (docs/tasks.md)")
    return folder / name


class ImageFiles(ImageFolder):
    """The image files of a task's folder."""

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
