"""What all loaders do: find a file, read JSON, check a row's fields, find its image. Every error names file and row."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation.suite import ImageRef

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")  # of image files, in any case
SHOWN = 10  # rows that an error lists
_KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def find(path: Path, *names: str) -> Path:
    """The path itself where it is a file, else the one of these names that is in the folder. Raises: ConfigError."""
    if path.is_file():
        return path
    found = [path / name for name in names if (path / name).is_file()]
    if len(found) != 1:
        seen = "none" if not found else "more than one; name the file"
        raise ConfigError(f"{path}: expected {' or '.join(names)} in this folder, found {seen}")
    return found[0]


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte order mark. Raises: ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def read_json(path: Path, text: str | None = None, where: str | None = None) -> Any:
    """A JSON file's content; a key that is twice in an object is an error. Raises: ConfigError.

    text: this in place of the file's. where: how errors name it.
    """
    where = where or str(path)

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ConfigError(f"{where}: {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
        return found

    try:
        return json.loads(read_text(path) if text is None else text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error


def field(where: str, row, key: str, kind: type, blank: bool = False):
    """A field of a row, checked. Args: kind: str, int, float, list or dict. blank: a text may be empty. Raises: ConfigError."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: an object expected, found {row!r:.60}")
    if key not in row:
        raise ConfigError(f"{where}: no field {key!r}; found {', '.join(map(str, row))}")
    value = row[key]
    right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not right or (kind is str and not blank and not value.strip()):
        raise ConfigError(f"{where}: {key} is {value!r:.60}, expected {_KINDS[kind]}" + " that is not empty" * (kind is str))
    return value


def png(pixels: np.ndarray) -> bytes:
    """Pixels as a file, without loss. Shapes: uint8 [3, H, W]."""
    from PIL import Image

    with BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG", compress_level=1)
        return file.getvalue()


def unique(seen: dict, key, where: str, what: str) -> None:
    """Raise ConfigError if `key` was met before, naming both rows."""
    if key in seen:
        raise ConfigError(f"{where}: {what} {key!r} was there before, in {seen[key]}")
    seen[key] = where


class Images:
    """The image files of a folder: refers to them, and remembers which are not there.

    Args: folder: must exist. also: suffixes that are tried after a name that lacks its own.
    """

    def __init__(self, folder: Path, also: tuple[str, ...] = ()):
        if not folder.is_dir():
            packed = next((p for p in (folder.with_suffix(".zip"), folder.with_suffix(".tar.gz")) if p.exists()), None)
            raise ConfigError(f"image folder {folder} does not exist" + (f"; unpack {packed}" if packed else ""))
        self.folder, self.also = folder, also
        self.missing: dict[str, str] = {}
        self._found: dict[str, Path | None] = {}

    def ref(self, name: str, where: str, box=None, flat: bool = False) -> ImageRef:
        """Refer to a file. flat: it may lie in the folder itself, without the folders in its name."""
        if name not in self._found:
            tried = [self.folder / (name + suffix) for suffix in ("", *self.also)]
            tried += [self.folder / Path(name).name] * flat
            self._found[name] = next((path for path in tried if path.is_file()), None)
        path = self._found[name]
        if path is None:
            self.missing.setdefault(name, where)
            path = self.folder / name
        return ImageRef(str(path), where, path.read_bytes, box)

    def check(self, file: Path) -> None:
        """Raise one ConfigError for all images that are missing. file: what names them."""
        if self.missing:
            shown = "".join(f"\n  {where}: {name}" for name, where in list(self.missing.items())[:SHOWN])
            raise ConfigError(
                f"{file}: {len(self.missing)} of {len(self._found)} images are not in {self.folder}:{shown}"
                + "\n  ..." * (len(self.missing) > SHOWN)
            )
