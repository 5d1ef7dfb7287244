"""A cache of decoded images on a local disk: what was decoded once is read as it lies, uint8, from then on.

    CACHE/index.json           which data, how many images
    CACHE/pixels_S.u8          [n, 3, S, S] uint8, a sparse file: an image takes space when it is put
    CACHE/marks_S.i64          [n, 2] int64: the image's digest, and a checksum of its pixels (0: not put yet)

A row counts only if its checksum holds, so a run that was killed leaves nothing wrong, and several processes may fill one
cache: they write the same bytes. 224 x 224 takes 147 KiB an image, 17.8 GB for the 118,287 of COCO.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from fastsds.config import ConfigError

INDEX = "index.json"


class PixelCache:
    """Decoded images of one data set.

    Args: folder: made where it is missing. identity: of the source. n: its images.
    Raises: ConfigError if the folder holds another data set, or cannot be written.
    """

    def __init__(self, folder: str | Path, identity: str, n: int):
        self.folder, self.n, about = Path(folder), n, {"data": identity, "images": n}
        self._files: dict[int, tuple[np.memmap, np.memmap]] = {}
        index = self.folder / INDEX
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not index.is_file():
                if any(not file.name.startswith(INDEX) for file in self.folder.iterdir()):
                    raise ConfigError(f"data.cache: {self.folder} is no cache and not empty; expected a folder of its own")
                partial = index.with_name(f"{INDEX}.{os.getpid()}")
                partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
                partial.replace(index)
            found = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"data.cache: {index}: {error}") from error
        if found != about:
            raise ConfigError(f"data.cache: {self.folder} is of other data; name another folder, or remove it")

    def get(self, i: int, sizes: list[int]) -> tuple[int, list[torch.Tensor]] | None:
        """An image's digest and its pixels at each size, or None. Shapes: uint8 [3, S, S] each."""
        kept = []
        for size in sizes:
            pixels, marks = self._open(size)
            mark = int(marks[i, 1])
            if not mark:
                return None
            image = np.array(pixels[i])
            if mark != _checksum(image):
                return None
            kept.append(torch.from_numpy(image))
        return int(marks[i, 0]), kept

    def put(self, i: int, sizes: list[int], digest: int, images: list[torch.Tensor]) -> None:
        """Keep an image."""
        for size, image in zip(sizes, images, strict=True):
            pixels, marks = self._open(size)
            pixels[i] = image.numpy()
            marks[i] = digest, _checksum(image.numpy())

    def _open(self, size: int) -> tuple[np.memmap, np.memmap]:
        if size not in self._files:
            shapes = {f"pixels_{size}.u8": (np.uint8, (self.n, 3, size, size)), f"marks_{size}.i64": (np.int64, (self.n, 2))}
            opened = []
            for name, (kind, shape) in shapes.items():
                path, wanted = self.folder / name, int(np.prod(shape)) * np.dtype(kind).itemsize
                try:
                    with open(path, "ab") as file:
                        if file.tell() != wanted:
                            file.truncate(wanted)
                        free, missing = shutil.disk_usage(self.folder).free, wanted - 512 * os.fstat(file.fileno()).st_blocks
                except OSError as error:
                    raise ConfigError(f"data.cache: {path}: {error.strerror}") from error
                if missing > free:
                    raise ConfigError(f"data.cache: {path} needs {missing / 2**30:.1f} GiB more, {free / 2**30:.1f} are free")
                opened.append(np.memmap(path, kind, "r+", shape=shape))
            self._files[size] = tuple(opened)
        return self._files[size]


def _checksum(image: np.ndarray) -> int:
    return 1 << 32 | zlib.crc32(np.ascontiguousarray(image))
