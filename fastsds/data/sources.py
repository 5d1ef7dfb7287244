"""Where captioned images come from: the embedded world, or a tab-separated file of photographs."""

import csv
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.data import Samples, digest

COLUMNS = ("filepath", "title")


def open_source(data, image_size: int, seed: int = 0):
    """The source that a recipe's `data` section names.

    Args: data: with fields source ("world" or a .tsv file), images (folder or None), samples (the first N, or None: all)
        and workers. The first N scenes of the world are one data set, the same for every seed.
    Returns: an object with len() and load(ids, visits, size) -> Samples.
    Raises: ConfigError that names the file, row and column.
    """
    if data.source == "world":
        from fastsds.world.scenes import WorldSource

        return WorldSource("train", seed) if data.samples is None else WorldSource("train", 0, data.samples)
    path = Path(data.source)
    if path.suffix != ".tsv":
        raise ConfigError(f"data.source: {data.source!r}, expected world or a .tsv file")
    return TSVSource(path, image_size, images=data.images, workers=data.workers, samples=data.samples)


class TSVSource:
    """Photographs with captions: open_clip's tab-separated file with the header `filepath  title`.

    Paths are relative to `images`, or to the file's own folder. Every listed image must exist when the source is
    opened. An image is decoded to RGB, its shorter side resized to `size` (bicubic), and cut to the centre square,
    as open_clip's evaluation transform does. workers: threads that decode; 0 decodes in the caller's. samples: of the
    file, the first so many rows.
    """

    sequential = False

    def __init__(
        self, path: str | Path, size: int, images: str | Path | None = None, workers: int = 0, samples: int | None = None
    ):
        self.path, self.size = Path(path), size
        self.folder = Path(images) if images is not None else self.path.parent
        if images is not None and not self.folder.is_dir():
            raise ConfigError(f"data.images: folder {self.folder} does not exist")
        self.files, self.captions = (rows[:samples] for rows in self._read())
        if samples is not None and samples > len(self.files):
            raise ConfigError(f"data.samples is {samples}, but {self.path} has {len(self.files)} rows")
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> str:
        """A digest of what the pairs are: names, sizes in bytes and captions, in order."""
        rows = [
            (os.path.relpath(file, self.folder), str(file.stat().st_size), said)
            for file, said in zip(self.files, self.captions)
        ]
        return hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()

    def load(self, ids: torch.Tensor, visits: torch.Tensor | None = None, size: int | None = None) -> Samples:
        """Decode samples. Shapes: ids [N] -> pixels uint8 [N, 3, size, size]."""
        size, rows = size or self.size, ids.tolist()
        decode = self._pool.map if self._pool is not None else map

        def one(row: int) -> tuple[torch.Tensor, int]:
            content = read_image(self.files[row])
            return decode_image(self.files[row], size, content), digest(content, self.captions[row])

        pixels, digests = zip(*decode(one, rows), strict=True)
        return Samples(torch.stack(pixels), [self.captions[row] for row in rows], digests=torch.tensor(digests))

    def _read(self) -> tuple[list[Path], list[str]]:
        if not self.path.is_file():
            raise ConfigError(f"data.source: file {self.path} does not exist")
        files, captions = [], []
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter="\t", strict=True)
                header = next(reader, [])
                if missing := [c for c in COLUMNS if header.count(c) != 1]:
                    raise ConfigError(
                        f"{self.path}: row 1: column {missing[0]} expected once in a tab-separated header "
                        f"`filepath<TAB>title`, found {header}"
                    )
                at, said = (header.index(c) for c in COLUMNS)
                for cells in reader:
                    if not cells:
                        continue
                    row = f"{self.path}: row {reader.line_num}"
                    if len(cells) != len(header):
                        raise ConfigError(f"{row}: {len(cells)} columns, expected {len(header)} (tab-separated)")
                    name, caption = cells[at].strip(), cells[said].strip()
                    for column, value in zip(COLUMNS, (name, caption), strict=True):
                        if not value:
                            raise ConfigError(f"{row}: column {column} is empty")
                    if not (self.folder / name).is_file():
                        raise ConfigError(f"{row}: column filepath: {self.folder / name} does not exist")
                    files.append(self.folder / name)
                    captions.append(caption)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path}: not a tab-separated UTF-8 file: {error}") from error
        if not files:
            raise ConfigError(f"{self.path}: no rows under the header")
        return files, captions


def read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def decode_image(path: Path, size: int, content: bytes | None = None) -> torch.Tensor:
    """Decode an image file (from its content, where that was read). Returns uint8 [3, size, size]."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(BytesIO(read_image(path) if content is None else content)) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a readable image: {error}") from error
    width, height = image.size
    if width <= height:
        resized = (size, max(size, int(size * height / width)))
    else:
        resized = (max(size, int(size * width / height)), size)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
