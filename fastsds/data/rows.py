"""What released files hold: JSON read, a row's fields checked, its image found. Every error names file and row."""

import json
import re
from pathlib import Path
from typing import Any

from fastsds.config import ConfigError

SHOWN = 10  # rows that an error lists
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of which two make a character
_KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte order mark. Raises: ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def read_json(path: Path, once: bool = False) -> Any:
    """A JSON file's content. Args: once: a key that is twice in an object is an error. Raises: ConfigError."""
    return parse_json(read_text(path), str(path), once)


def parse_json(text: str, where: str, once: bool = False) -> Any:
    """What a JSON text says. Args: where: how errors name it. once: as `read_json`. Raises: ConfigError."""

    def each_once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ConfigError(f"{where}: {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=each_once if once else None)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if _HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[max(0, error.start - 20) : error.start + 1]
            raise ConfigError(f"{where}: not Unicode: half a character in {half!r}") from error
    return found


def field(where: str, row, key: str, kind: type, blank: bool = False):
    """A field of a row, checked. Args: kind: str, int, float, list or dict. blank: a text may be empty. Raises: ConfigError."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: an object expected, found {row!r:.60}")
    if key not in row:
        raise ConfigError(f"{where}: no field {key!r}; found {', '.join(map(str, row)) or 'none'}")
    value = row[key]
    right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not right or (kind is str and not blank and not value.strip()):
        said = _KINDS[kind] + " that is not empty" * (kind is str and not blank)
        raise ConfigError(f"{where}: {key} is {value!r:.60}, expected {said}")
    return value


def kind_of(value) -> str:
    """A JSON value's kind, for errors."""
    return next((name for kind, name in _KINDS.items() if isinstance(value, kind)), repr(value))


def unique(seen: dict, key, where: str, what: str) -> None:
    """Raise ConfigError if `key` was met before, naming both rows."""
    if key in seen:
        raise ConfigError(f"{where}: {what} {key!r} was there before, in {seen[key]}")
    seen[key] = where


class ImageFolder:
    """The image files of a folder: a subclass refers to them, and notes those that are not there in `missing`, with the row.

    Raises: ConfigError if the folder does not exist.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            packed = next((p for p in (folder.with_suffix(".zip"), folder.with_suffix(".tar.gz")) if p.exists()), None)
            raise ConfigError(f"image folder {folder} does not exist" + (f"; unpack {packed}" if packed else ""))
        self.folder = folder
        self.missing: dict[str, str] = {}
        self._found: dict[str, Any] = {}

    def check(self, file: Path) -> None:
        """Raise one ConfigError for all images that are missing. file: what names them."""
        if self.missing:
            shown = "".join(f"\n  {where}: {name}" for name, where in list(self.missing.items())[:SHOWN])
            raise ConfigError(
                f"{file}: {len(self.missing)} of {len(self._found)} images are not in {self.folder}:{shown}"
                + "\n  ..." * (len(self.missing) > SHOWN)
            )
