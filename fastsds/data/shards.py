"""Shards as webdataset writes them: tar archives in which neighbours of one name make a sample.

    00000.tar:  a/000017.jpg  a/000017.txt  a/000017.json  ...

The image is the `jpg`, `jpeg`, `png` or `webp`; the caption is the `txt`, as a whole, or else the json's `caption` or `text`: a
text, or a list of texts. A shard on a disk is read through once, header by header, and then in any order. Of a shard that was
cut what is whole is used; the rest is one damaged sample. `pipe.py` reads shards that come out of a command.
"""

import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsds.config import ConfigError
from fastsds.data.images import SUFFIXES, Listing, texts
from fastsds.progress import watched

BLOCK = 512
META = re.compile(r"__[^/]*__($|/)")  # what webdataset leaves out


@dataclass
class Item:
    """A sample as it lies in a shard, or what stands for the rest of one that is cut. image: what was kept of it, or None."""

    key: str
    image: Any
    captions: tuple[str, ...]
    why: str = ""  # it cannot be used
    is_rest: bool = False

    @property
    def wrong(self) -> str:
        """Why it cannot be used, as far as is known before it is decoded; or ""."""
        return self.why or ("" if self.captions else "no caption")


def rest(why: str) -> Item:
    """What is missing of a shard."""
    return Item("the rest", None, (), why, is_rest=True)


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces means, a/{00..99}.tar. Raises: ConfigError."""
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError as error:
        raise ConfigError(f"data.source: {pattern}: {error}") from None


def read_shards(paths: list[Path]) -> Listing:
    """The samples of shards on a disk, in order. Raises: ConfigError for a shard that is not there."""
    if missing := [str(path) for path in paths if not (path.is_file() and os.access(path, os.R_OK))]:
        shown = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise ConfigError(f"data.source: {len(missing)} of {len(paths)} shards are not there or cannot be read: {shown}")
    root = os.path.commonpath([path.parent for path in paths])
    names, captions, sizes, damaged = [], [], array("q"), {}
    shards, offsets = array("q"), array("q")  # where an image lies
    every = ((k, item) for k, path in enumerate(paths) for item in _indexed(path))
    for k, item in watched(every, f"reading the headers of {len(paths)} shards, images"):
        if item.why:
            damaged[len(names)] = item.why
        names.append(f"{item.key} of {paths[k].relative_to(root)}")
        captions.append(item.captions)
        for column, value in zip((shards, offsets, sizes), (k, *(item.image or (0, 0))), strict=True):
            column.append(value)

    def read(i: int) -> bytes:
        with open(paths[shards[i]], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), sizes[i], offsets[i])
        if len(content) != sizes[i]:
            raise OSError(f"{paths[shards[i]]} was cut since its headers were read")
        return content

    return Listing(names, captions, sizes, read, damaged)


def _indexed(path: Path) -> Iterator[Item]:
    """The items of a shard on a disk; of an image its offset and length are kept."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size

        def place(archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, int]:
            if member.offset_data + member.size > length:
                raise tarfile.ReadError("unexpected end of data")
            return member.offset_data, member.size

        def content(where: tuple[int, int]) -> bytes:
            return os.pread(file.fileno(), where[1], where[0])

        why = yield from items(
            lambda: tarfile.open(fileobj=file, mode="r:"), place, lambda offset: content((offset, BLOCK)), content
        )
        if why:
            yield rest(why)


def items(
    opened: Callable[[], tarfile.TarFile], keep: Callable, block: Callable[[int], bytes], content: Callable = bytes
) -> Generator[Item, None, str]:
    """The whole samples of an archive, grouped by webdataset's own rule.

    Args: keep: (archive, member) -> what stands for its content; content: that -> bytes. block: offset -> the header there.
    Returns: why and where the archive is cut, or "".
    """
    from webdataset.tariterators import group_by_keys

    ended, twice = [], []

    def members() -> Iterator[dict]:
        at = 0
        try:
            archive = opened()
            for member in iter(archive.next, None):
                if member.isreg() and not META.match(member.name):
                    yield {"fname": member.name, "data": keep(archive, member), "__url__": ""}
                at, archive.members = archive.offset, []
            if (header := block(at)).strip(b"\0"):
                ended.append(f"no header of tar at byte {at:,}")
            elif len(header) < BLOCK:
                ended.append(f"unexpected end at byte {at:,}")
        except (tarfile.TarError, OSError, EOFError) as error:
            ended.append(f"{error} at byte {at:,}")

    for sample in group_by_keys(members(), handler=lambda error: not twice.append(error)):
        image = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), None)
        if ended and (image is None or not {"txt", "json"} & set(sample)):
            continue  # cut in its midst: of the rest
        said, why = (), "two files of one name" if twice else "" if image is not None else f"no image ({', '.join(SUFFIXES)})"
        try:
            said = _said(sample, content)
        except ValueError as error:
            why = why or str(error)
        twice.clear()
        yield Item(sample["__key__"], image, said, why)
    return ended[0] if ended else ""


def _said(sample: dict, content: Callable) -> tuple[str, ...]:
    """A sample's captions. Raises: ValueError for what is neither text nor JSON."""
    for suffix in ("txt", "json"):
        if suffix not in sample:
            continue
        try:
            found = content(sample[suffix]).decode("utf-8-sig")
            if suffix == "json":
                found = json.loads(found)
                found = next((found[key] for key in ("caption", "text") if key in found), None)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{suffix}: {error}") from None
        if said := texts(found):
            return said
    return ()
