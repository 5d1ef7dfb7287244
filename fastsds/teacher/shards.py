"""Rows of tensors on disk: written once, shard by shard, by any number of processes; read by memory map.

    FOLDER/index.json                 what the rows are, how many there are, and how many a shard holds
    FOLDER/shard_00007.safetensors    rows 7 R .. 8 R - 1 of every tensor

A shard has its name only when it is whole: it is written as .shard_00007.partial, synced and renamed. Its writer holds a lock
on that file, which ends with the process, so a second writer takes other shards meanwhile, and a writer that was killed
leaves nothing that the next one cannot take over.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path

import torch

from fastsds.config import ConfigError

INDEX = "index.json"


class Shards:
    """A folder of shards. `about` is what its index says of the rows; rows: how many; size: rows a shard."""

    def __init__(self, folder: Path, about: dict, rows: int, size: int):
        self.folder, self.about, self.rows, self.size = Path(folder), about, rows, size
        self._open: dict[int, object] = {}

    @classmethod
    def create(cls, folder: Path, about: dict, rows: int, size: int) -> "Shards":
        """Start a folder, or go on with one that holds the same. Raises: ConfigError that names the first difference."""
        folder = Path(folder)
        about = json.loads(json.dumps(about))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / INDEX).exists():
                partial = folder / f".{INDEX}.{os.getpid()}"
                partial.write_text(json.dumps({"rows": rows, "size": size, "about": about}, indent=1) + "\n", encoding="utf-8")
                with contextlib.suppress(FileExistsError):  # another writer was first: its index is compared below
                    os.link(partial, folder / INDEX)
                partial.unlink()
        except OSError as error:
            raise ConfigError(f"{folder}: {error}") from error
        found = cls.open(folder)
        check_same(folder, {**found.about, "rows": found.rows, "size": found.size}, {**about, "rows": rows, "size": size})
        return found

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        """Open a folder. Raises: ConfigError if it has no index that can be read."""
        path = Path(folder) / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, index["about"], index["rows"], index["size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no index that can be read: {error}") from error

    def __len__(self) -> int:
        """How many shards."""
        return -(-self.rows // self.size)

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.size, min(self.rows, (shard + 1) * self.size))

    def missing(self) -> list[int]:
        """The shards that are not yet whole."""
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [shard for shard in range(len(self)) if self._path(shard).name not in there]

    @contextlib.contextmanager
    def claim(self, shard: int):
        """Yield a function that writes the shard's tensors, or None if the shard is there or another process has it."""
        path = self._path(shard)
        partial = path.with_name(f".{path.stem}.partial")
        with open(partial, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if path.exists():  # finished between the look and the lock
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
                yield None
                return

            def write(**tensors: torch.Tensor) -> None:
                from safetensors.torch import save

                file.truncate(0)
                file.write(save({name: v.cpu().contiguous() for name, v in tensors.items()}))
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
                sync(self.folder)

            yield write

    def read(self, name: str, rows: torch.Tensor, column: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of a tensor, in the order asked. Shapes: rows [b] -> [b, ...]; with column [b] the rows' entries there."""
        picked = []
        for i, row in enumerate(rows.tolist()):
            at = row % self.size if column is None else (row % self.size, int(column[i]))
            picked.append(self._shard(row // self.size).get_slice(name)[at])
        return torch.stack(picked)

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _shard(self, shard: int):
        if shard not in self._open:
            from safetensors import SafetensorError, safe_open

            path = self._path(shard)
            try:
                self._open[shard] = safe_open(path, "pt")
            except FileNotFoundError as error:
                raise ConfigError(f"{path} is missing") from error
            except SafetensorError as error:
                raise ConfigError(f"{path}: damaged: {error}; delete it, and the same build writes it anew") from error
        return self._open[shard]


def check_same(where: Path | str, found: dict, expected: dict) -> None:
    """Raise a ConfigError that names the first key in which a folder differs from what is asked for."""
    for key in dict.fromkeys([*expected, *found]):
        if found.get(key) != expected.get(key):
            said, asked = (_short(v.get(key)) for v in (found, expected))
            raise ConfigError(f"{where}: made with {key} {said}, expected {asked}; name another bank.path, or delete it")


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def sync(folder: Path) -> None:
    """Make a rename in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
