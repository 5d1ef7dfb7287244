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
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.durable import sync
from fastsds.progress import Line, clock

INDEX = "index.json"
SHARD_BYTES = 256 << 20
SHARDS = 16  # at least, where there are as many chunks: the steps in which several processes share the work


class Shards:
    """A folder of shards. `about` is what its index says of the rows; rows: how many; size: rows a shard."""

    def __init__(self, folder: Path, about: dict, rows: int, size: int):
        self.folder, self.about, self.rows, self.size = Path(folder), about, rows, size
        self._open: dict[int, object] = {}

    @classmethod
    def plan(cls, folder: Path, about: dict, rows: int, size: int) -> "Shards":
        """What `create` gives, with nothing written. Raises: as `create`."""
        planned = cls(folder, json.loads(json.dumps(about)), rows, size)
        orphans = len(planned.missing()) < len(planned)  # looked for first: another process writes its index before any shard
        if not (planned.folder / INDEX).exists():
            if orphans:
                said = f"shards, but no {INDEX} that says what they are of"
                raise ConfigError(f"{folder}: {said}; name another folder, or delete it")
            return planned
        found = cls.open(folder)
        found.check(planned)
        return found

    @classmethod
    def create(cls, folder: Path, about: dict, rows: int, size: int) -> "Shards":
        """Start a folder, or go on with one that holds the same. Raises: ConfigError that names the first difference."""
        folder = Path(folder)
        cls.plan(folder, about, rows, size)
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
        return cls.plan(folder, about, rows, size)

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        """Open a folder. Raises: ConfigError if it has no index that can be read."""
        path = Path(folder) / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, {**index["about"]}, index["rows"], index["size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no index that can be read: {error}") from error

    def check(self, expected: "Shards") -> None:
        """Raise a ConfigError that names the first difference from what is expected."""
        said, asked = ({**of.about, "rows": of.rows, "size": of.size} for of in (self, expected))
        check_same(self.folder, said, asked)

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
        """Yield a function that writes the shard's tensors, or None if the shard is there or another process has it.

        Raises: ConfigError where the folder cannot be written or the disk is full; nothing of the shard is kept.
        """
        path = self._path(shard)
        partial = path.with_name(f".{path.stem}.partial")
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open(partial, "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            except OSError as error:
                raise ConfigError(f"{path}: cannot be written: {error}") from error
            if path.exists():  # finished between the look and the lock
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
                yield None
                return

            def write(**tensors: torch.Tensor) -> None:
                from safetensors.torch import save

                content = save({name: v.cpu().contiguous() for name, v in tensors.items()})
                try:
                    with open(partial, "wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(partial, path)
                    sync(self.folder)
                except OSError as error:
                    partial.unlink(missing_ok=True)
                    raise ConfigError(f"{path}: cannot be written: {error}; the shards before it are kept") from error

            yield write

    def read(self, name: str, rows: torch.Tensor, column: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of a tensor, in the order asked. Shapes: rows [b] -> [b, ...]; with column [b] the rows' entries there."""
        shards, inside, found = rows // self.size, rows % self.size, None
        if len(of := set(shards.tolist())) == 1:
            return self._part(*of, name, inside if column is None else (inside, column))
        for shard in sorted(of):
            mine = shards == shard
            part = self._part(shard, name, inside[mine] if column is None else (inside[mine], column[mine]))
            found = part.new_empty(len(rows), *part.shape[1:]) if found is None else found
            found[mine] = part
        return found

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _part(self, shard: int, name: str, at) -> torch.Tensor:
        """Entries of a shard's tensor. Mapped from the file: what is not indexed is not read."""
        from safetensors import SafetensorError, safe_open

        path = self._path(shard)
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(path, "pt")
            return self._open[shard].get_tensor(name)[at]
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing") from error
        except (SafetensorError, IndexError, OSError) as error:
            raise ConfigError(f"{path}: damaged: {error}; delete it, and the same build writes it anew") from error


def rows_a_shard(a_row: int, chunk: int, rows: int) -> int:
    """How many rows a shard should hold, a multiple of `chunk`. Args: a_row: bytes; rows: of all shards."""
    return max(1, min(SHARD_BYTES // (a_row * chunk), rows // (SHARDS * chunk))) * chunk


def fill(
    shards: Shards,
    ask: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    chunk: int,
    what: str,
    rank: int = 0,
    world: int = 1,
    join: Callable[[list[torch.Tensor]], torch.Tensor] = torch.cat,
) -> None:
    """Write every missing shard, ask(rows) -> tensors a chunk at a time; own shards first, then whatever nobody has.

    Args: what: the progress line's beginning. join: of chunks into a shard.
    """
    line, began, made = Line(), time.monotonic(), 0
    wanted = sum(len(shards.span(shard)) for shard in shards.missing())
    while missing := shards.missing():
        waiting = True
        for shard in sorted(missing, key=lambda shard: (shard % world != rank, shard)):
            with shards.claim(shard) as write:
                if write is None:
                    continue
                waiting, parts, span = False, [], shards.span(shard)
                for first in range(span.start, span.stop, chunk):
                    parts.append(ask(torch.arange(first, min(first + chunk, span.stop))))
                    made += len(next(iter(parts[-1].values())))
                    if rank == 0:
                        left = max(0, wanted / world - made) * (time.monotonic() - began) / made
                        line.say(f"{what} of {wanted:,} samples, {made:,} done here, left {clock(left)}")
                write(**{name: join([part[name] for part in parts]) for name in parts[0]})
        if waiting:
            time.sleep(0.2)  # others are at work on the last ones
    line.end()


def check_same(where: Path | str, found: dict, expected: dict, of: str = "") -> None:
    """Raise a ConfigError that names the first key, of a key's own keys too, in which a folder differs from what is asked."""
    for key in dict.fromkeys([*expected, *found]):
        said, asked = found.get(key), expected.get(key)
        if isinstance(said, dict) and isinstance(asked, dict):
            check_same(where, said, asked, f"{of}{key} ")
        elif said != asked:
            raise ConfigError(
                f"{where}: made with {of}{key} {_short(said)}, expected {_short(asked)}; name another folder, or delete it"
            )


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
