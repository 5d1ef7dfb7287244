"""Shards that come out of commands, `pipe:curl -sf https://host/{00..99}.tar`: read in their own order, as they come.

The shards, in an order of the epoch's own, are dealt out: stream s of S has those at s, s + S, ... and reads one after another,
so that in each epoch a shard is in one stream, and a stream has as many as in any other. It counts its epochs itself.

    id = shard << 32 | place in it      cursor = shards that the stream is done with << 32 | samples taken of the next
"""

import contextlib
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fastsds.config import ConfigError
from fastsds.data import Samples, Source
from fastsds.data.images import assemble, choose, decoded
from fastsds.data.sampler import permutation
from fastsds.data.shards import BLOCK, Item, expand, items, rest

PLACES = 1 << 32
BUFFER = 1 << 16  # bytes that a pipe is asked for at a time
PATIENCE = 10.0  # seconds that a command has to end after its output did


class Pipe(Source):
    """Captioned images out of commands, one a shard.

    Args: command: "pipe:...", as webdataset's `gopen` takes it; braces make it several. caption, seed, workers: as of `Images`.
    """

    def __init__(self, command: str, caption: str = "random", seed: int = 0, workers: int = 0):
        self.command, self.shards = command, expand(command)
        self.caption, self.seed = caption, seed
        self.held: dict[tuple[int, int], tuple[str, Item]] = {}  # (id, visit) -> what a walk has read and not loaded yet
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None

    def walk(self, streams: int, seed: int) -> "PipeWalk":
        """The walk through the shards. Raises: ConfigError if there are more streams than shards."""
        return PipeWalk(self, streams, seed)

    def identity(self) -> str:
        raise ConfigError(f"data.source: what {self.command} gives is not known before it is read; expected data on a disk")

    def load(self, ids: torch.Tensor, visits: torch.Tensor, size: int, second: int | None = None) -> Samples:
        sizes = [size] if second is None else [size, second]
        read = [self.held.pop(key) for key in zip(ids.tolist(), visits.tolist(), strict=True)]
        captions = [item.captions[:1] if self.caption == "first" else item.captions for _, item in read]
        choices = choose(self.seed, ids, visits, torch.tensor([max(1, len(found)) for found in captions]))
        said = [found[k] if found else "" for found, k in zip(captions, choices.tolist(), strict=True)]
        decode = self._pool.map if self._pool is not None else map
        return assemble(decode(lambda one: _pixels(*one, sizes), read), said, ids, sizes)


def _pixels(command: str, item: Item, sizes: list[int]) -> tuple[int, list[torch.Tensor]] | str:
    name = f"{item.key} of {command}"
    return f"{name}: {item.wrong}" if item.wrong else decoded(name, item.image, sizes)


@dataclass
class _Reading:
    """A stream's shard. cursor: of the item that is next. useless: why nothing of it could be used so far."""

    cursor: int
    items: Iterator[Item]
    useless: str


class PipeWalk:
    """The walk through a pipe's shards, as `sampler.Walk`: each stream that is asked for has one command at work."""

    def __init__(self, pipe: Pipe, streams: int, seed: int):
        count = len(pipe.shards)
        if streams > count:
            raise ConfigError(
                f"data.streams is {streams}, and {pipe.command} is {count} shard(s), each read by one stream; expected at most "
                f"{count}, a multiple of the ranks (--set data.streams={1 << count.bit_length() - 1})"
            )
        self.pipe, self.streams, self.seed = pipe, streams, seed
        self.readings: dict[int, _Reading] = {}
        self.useless: dict[int, list[str]] = {}  # stream -> its last shards in a row of which nothing could be used

    def advance(self, stream: int, cursor: int) -> tuple[int, int, int]:
        """The next sample of a stream, read: (id, visit, the cursor after it). cursor: 0 where a stream begins.

        Raises: ConfigError if nothing can be used of any shard that the stream has in an epoch.
        """
        count = len(self.pipe.shards)
        own = len(range(stream, count, self.streams))
        while True:
            behind, taken = divmod(cursor, PLACES)
            epoch, turn = divmod(behind, own)
            shard = int(permutation(count, self.seed, epoch)[stream + turn * self.streams])
            reading = self.readings.get(stream)
            if reading is None or reading.cursor != cursor:
                found = _read_from(self.pipe.shards[shard], taken)
                reading = self.readings[stream] = _Reading(cursor, found, "" if taken else "no samples")
            if (item := next(reading.items, None)) is not None:
                break
            self._done(stream, own, self.pipe.shards[shard], reading.useless)
            cursor = (behind + 1) * PLACES
        reading.cursor = cursor + 1
        reading.useless = reading.useless and item.wrong
        sample = shard * PLACES + taken
        self.pipe.held[sample, epoch] = self.pipe.shards[shard], item
        return sample, epoch, reading.cursor

    def _done(self, stream: int, own: int, command: str, useless: str) -> None:
        so_far = self.useless.setdefault(stream, [])
        if not useless:
            so_far.clear()
            return
        so_far.append(f"{command}: {useless}")
        if len(so_far) >= own:
            shown = "".join(f"\n  {why}" for why in so_far[-10:])
            raise ConfigError(f"data.source: stream {stream} of {self.streams} has no shard that can be used:{shown}")


def _read_from(command: str, taken: int) -> Iterator[Item]:
    """The items of a shard after those that were taken before."""
    found = _read(command)
    for place in range(taken):
        item = next(found, None)
        if item is None or (item.is_rest and place < taken - 1):
            yield rest(f"it gave {taken:,} samples before, and now {place:,}")
            return
    yield from found


def _read(command: str) -> Iterator[Item]:
    """The items of a shard. A command that fails puts out an archive that is not whole."""
    from webdataset.gopen import gopen, set_options

    pipe = gopen(command)
    # Else it raises as soon as the command has failed, however much of the output is still to be read
    set_options(pipe, ignore_errors=True, timeout=PATIENCE)
    stream = _Recent(pipe)
    try:
        why = yield from items(
            lambda: tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER),
            lambda archive, member: archive.extractfile(member).read(),
            stream.block,
        )
        while not why and stream.read(BUFFER):  # what pads the archive
            pass
        if stream.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if status := pipe.proc.wait(PATIENCE):
                    why = f"exit status {status}" + f", {why}" * bool(why)
        if why:
            yield rest(why)
    finally:
        if pipe.proc.poll() is None:
            pipe.proc.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            pipe.close()


class _Recent:
    """A stream of which the last bytes can be looked at again. ended: it has no more."""

    def __init__(self, stream):
        self.stream, self.kept, self.at, self.ended = stream, b"", 0, False

    def read(self, n: int) -> bytes:
        found = self.stream.read(n)
        self.kept, self.at, self.ended = (self.kept + found)[-2 * BUFFER :], self.at + len(found), len(found) < n
        return found

    def block(self, offset: int) -> bytes:
        first = offset - self.at + len(self.kept)
        return self.kept[first : first + BLOCK]
