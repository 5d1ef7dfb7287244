"""Photographs with captions, whatever the format that lists them; and how an image becomes pixels."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.data import Samples, Source, digest, pair_digest
from fastsds.ops import Noise, Purpose, draw
from fastsds.progress import watched

SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass
class Listing:
    """What a format's file says: n images, and how to read one.

    names: what an error calls each image, and part of what the data are; captions: one tuple an image, empty where they are
    missing; sizes: bytes; read(i): the image's file as bytes (OSError where it cannot). damaged: i -> what is wrong with it.
    """

    names: list[str]
    captions: list[tuple[str, ...]]
    sizes: list[int]
    read: Callable[[int], bytes]
    damaged: dict[int, str] = field(default_factory=dict)

    def take(self, chosen: Sequence[int]) -> "Listing":
        """These of them, in this order."""
        columns = ([column[i] for i in chosen] for column in (self.names, self.captions, self.sizes))
        damaged = {k: self.damaged[i] for k, i in enumerate(chosen) if i in self.damaged}
        return Listing(*columns, lambda k: self.read(chosen[k]), damaged)


def of_files(folder: Path, said: dict[str, list[str]], flat: bool = False) -> Listing:
    """The listing of image files.

    Args: said: name, relative to the folder -> captions. flat: a file that is not there may lie in the folder itself.
    """
    names, paths, sizes, damaged = list(said), [], [], {}
    for i, name in enumerate(watched(names, f"looking for images in {folder}")):
        path = folder / name
        if flat and not path.exists() and (folder / path.name).exists():
            path = folder / path.name
        paths.append(path)
        try:
            sizes.append(path.stat().st_size)
        except (OSError, ValueError) as error:  # a name with a zero byte in it
            sizes.append(0)
            damaged[i] = f"{path}: {getattr(error, 'strerror', None) or error}"
    return Listing(names, [texts(found) for found in said.values()], sizes, lambda i: paths[i].read_bytes(), damaged)


def texts(value: str | list[str] | None) -> tuple[str, ...]:
    """Captions as a file gives them, without blank and repeated ones, half a surrogate pair a question mark.

    Raises: ValueError if they are anything else.
    """
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{value!r:.60} is no caption: expected a text or a list of texts")
    whole = (text.encode(errors="replace").decode() for text in found)
    return tuple(dict.fromkeys(text.strip() for text in whole if text.strip()))


class Images(Source):
    """The images of a listing, decoded to RGB: shorter side resized to `size` (bicubic), cut to the centre square, as
    open_clip's evaluation transform does.

    Args:
        caption: of an image with several, "random": one drawn for each visit from (seed, image, visit), or "first".
        workers: threads that decode; 0 decodes in the caller's. cache: a `cache.PixelCache`, or None.
    """

    def __init__(self, listing: Listing, caption: str = "random", seed: int = 0, workers: int = 0, cache=None):
        self.listing, self.seed, self.cache = listing, seed, cache
        self.captions = [said[:1] if caption == "first" else said for said in listing.captions]
        counts = torch.tensor([max(1, len(said)) for said in self.captions])  # an image without one has a row, too
        self.first_row = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def rows(self) -> int:
        return int(self.first_row[-1])

    def identity(self) -> str:
        """Names, sizes in bytes and captions, in order."""
        return _digest(zip(self.listing.names, self.listing.sizes, self.captions, strict=True))

    def images_identity(self) -> str:
        """Names and sizes alone: what a cache of pixels is of."""
        return _digest(zip(self.listing.names, self.listing.sizes, strict=True))

    def load(self, ids: torch.Tensor, visits: torch.Tensor, size: int, second: int | None = None) -> Samples:
        choices = choose(self.seed, ids, visits, self.first_row[ids + 1] - self.first_row[ids])
        return self._load(ids, choices, size, second)

    def load_rows(self, rows: torch.Tensor, size: int) -> Samples:
        ids = torch.searchsorted(self.first_row, rows, right=True) - 1
        return self._load(ids, rows - self.first_row[ids], size, None)

    def _load(self, ids: torch.Tensor, choices: torch.Tensor, size: int, second: int | None) -> Samples:
        sizes = [size] if second is None else [size, second]
        decode = self._pool.map if self._pool is not None else map
        rows = [int(i) for i in ids]
        said = [self.captions[i][k] if self.captions[i] else "" for i, k in zip(rows, choices.tolist(), strict=True)]
        return assemble(decode(lambda i: self._pixels(i, sizes), rows), said, self.first_row[ids] + choices, sizes)

    def _pixels(self, i: int, sizes: list[int]) -> tuple[int, list[torch.Tensor]] | str:
        """An image's digest, and its pixels at each size; or why there are none."""
        name = self.listing.names[i]
        if i in self.listing.damaged:
            return f"{name}: {self.listing.damaged[i]}"
        if not self.captions[i]:
            return f"{name}: no caption"
        if self.cache is not None and (kept := self.cache.get(i, sizes)) is not None:
            return kept
        try:
            found = decoded(name, self.listing.read(i), sizes)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if self.cache is not None and not isinstance(found, str):
            self.cache.put(i, sizes, *found)
        return found


def decoded(name: str, content: bytes, sizes: list[int]) -> tuple[int, list[torch.Tensor]] | str:
    """An image's digest, and its pixels at each size; or why there are none."""
    try:
        return digest(content), decode_image(content, sizes)
    except ValueError as error:
        return f"{name}: {error}"


def choose(seed: int, ids: torch.Tensor, visits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which caption each image has at each visit, of (seed, image, visit) alone. Shapes: int64 [N] -> [N] in [0, counts)."""
    u = Noise(seed, draw(Purpose.CAPTION, visits), ids).uniform(1)[:, 0].double()  # in (0, 1]
    return ((u * counts).ceil().long() - 1).clamp(min=0)


def assemble(
    answers: Iterable[tuple[int, list[torch.Tensor]] | str], said: list[str], rows: torch.Tensor, sizes: list[int]
) -> Samples:
    """Samples of decoded images. Args: answers: as `decoded` gives them, for one size or two. rows: the pairs' numbers."""
    found, damaged = [], {}
    for row, answer in enumerate(answers):
        if isinstance(answer, str):
            damaged[row] = answer
            answer = (0, [torch.zeros(3, size, size, dtype=torch.uint8) for size in sizes])
        found.append(answer)
    digests = torch.tensor([pair_digest(image, text) for (image, _), text in zip(found, said, strict=True)])
    pixels, *second = (torch.stack(column) for column in zip(*(pixels for _, pixels in found), strict=True))
    return Samples(pixels, said, digests=digests, rows=rows, damaged=damaged, second=second[0] if second else None)


def check_damage(listing: Listing, max_skipped: float, what: str) -> None:
    """Raise ConfigError where more is known to be damaged than may be skipped. what: the file that lists them."""
    if not listing.names:
        raise ConfigError(f"{what}: no images with captions in it")
    bad = {i: "no caption" for i, said in enumerate(listing.captions) if not said} | listing.damaged
    if len(bad) > max_skipped * len(listing.names):
        shown = "".join(f"\n  {listing.names[i]}: {why}" for i, why in sorted(bad.items())[:10])
        raise ConfigError(
            f"{what}: {len(bad)} of {len(listing.names):,} images cannot be used, more than data.max_skipped {max_skipped}:"
            f"{shown}" + "\n  ..." * (len(bad) > 10)
        )


def decode_image(content: bytes, sizes: list[int]) -> list[torch.Tensor]:
    """Decode an image file. Returns uint8 [3, size, size] for each size. Raises: ValueError if it is not a whole image."""
    return opened(content, lambda image: squares(image, sizes))


def opened(content: bytes, use: Callable):
    """What `use` makes of an image file as PIL opens it. Raises: ValueError if it is not a whole image."""
    from PIL import Image

    try:
        with Image.open(BytesIO(content)) as file:
            return use(file)
    except Exception as error:  # of whatever kind a decoder has
        raise ValueError(f"not a readable image ({str(error).partition(' <')[0]})") from error


def squares(image, sizes: list[int]) -> list[torch.Tensor]:
    """A PIL image's centre square at each size. Returns: uint8 [3, size, size] each."""
    import numpy as np

    return [torch.from_numpy(np.array(_square(image, size))).permute(2, 0, 1).contiguous() for size in sizes]


def _square(image, size: int):
    """Resized in its own mode and only then RGB, which is open_clip's order: a palette has no colours between its own."""
    from PIL import Image

    width, height = image.size
    if width <= height:
        resized = (size, max(size, int(size * height / width)))
    else:
        resized = (max(size, int(size * width / height)), size)
    if resized[0] * resized[1] > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # as many as Pillow decodes
        raise ValueError(f"{width}x{height} would be resized to {resized[0]}x{resized[1]}")
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return image.crop((left, top, left + size, top + size)).convert("RGB")


def _digest(rows) -> str:
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()
