"""A cache of decoded images on a local disk: what was decoded once is read as it lies, uint8, from then on.

    CACHE/index.json           which data, how many images
    CACHE/pixels_S.u8          [n, 3, S, S] uint8, a sparse file: an image takes space when it is put
    CACHE/marks_S.i64          [n, 2] int64: the image's digest, and a checksum of its pixels (0: not put yet)

A row counts only if its checksum holds, so a run that was killed leaves nothing wrong, and several processes may fill one
cache: they write the same bytes. 224 x 224 takes 147 KiB an image, 17.8 GB for the 118,287 of COCO.
"""

import contextlib
import errno
import json
import os
import shutil
import warnings
import zlib
from io import FileIO
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
        self._files: dict[int, tuple[FileIO, FileIO]] = {}
        self._full = False
        index = self.folder / INDEX
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            others = [file for file in self.folder.iterdir() if not file.name.startswith(INDEX)]
            if not index.is_file():  # asked after the others, which a process that was first makes after it
                if others:
                    raise ConfigError(f"data.cache: {self.folder} is no cache and not empty; expected a folder of its own")
                partial = index.with_name(f"{INDEX}.{os.getpid()}")
                partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
                with contextlib.suppress(FileExistsError):  # another was first: its index is compared below
                    os.link(partial, index)
                partial.unlink()
            found = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"data.cache: {index}: {error}") from error
        if found != about:
            raise ConfigError(f"data.cache: {self.folder} is of other data; name another folder, or remove it")

    def get(self, i: int, sizes: list[int]) -> tuple[int, list[torch.Tensor]] | None:
        """An image's digest and its pixels at each size, or None. Shapes: uint8 [3, S, S] each."""
        kept, mark = [], np.zeros(2, dtype=np.int64)
        for size in sizes:
            pixels, marks = self._open(size)
            os.preadv(marks.fileno(), [mark], i * mark.nbytes)
            if not mark[1]:
                return None
            image = np.zeros((3, size, size), dtype=np.uint8)
            os.preadv(pixels.fileno(), [image], i * image.nbytes)
            if mark[1] != _checksum(image):
                return None
            kept.append(torch.from_numpy(image))
        return int(mark[0]), kept

    def put(self, i: int, sizes: list[int], digest: int, images: list[torch.Tensor]) -> None:
        """Keep an image; none once the disk is full."""
        if self._full:
            return
        try:  # not through a memory map: on a full disk, that ends the process
            for size, image in zip(sizes, images, strict=True):
                rows = image.numpy(), np.array([digest, _checksum(image.numpy())])
                for file, row in zip(self._open(size), rows, strict=True):
                    if os.pwrite(file.fileno(), row, i * row.nbytes) < row.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._full = True
            warnings.warn(f"data.cache: {self.folder}: {error.strerror}: no more images are kept", stacklevel=2)

    def _open(self, size: int) -> tuple[FileIO, FileIO]:
        if size not in self._files:
            wanted, opened = {f"pixels_{size}.u8": self.n * 3 * size * size, f"marks_{size}.i64": self.n * 16}, []
            for name, count in wanted.items():
                path = self.folder / name
                try:
                    path.touch()
                    file = open(path, "r+b", buffering=0)  # noqa: SIM115
                    if os.fstat(file.fileno()).st_size != count:
                        file.truncate(count)
                    free, missing = shutil.disk_usage(self.folder).free, count - 512 * os.fstat(file.fileno()).st_blocks
                except OSError as error:
                    raise ConfigError(f"data.cache: {path}: {error.strerror}") from error
                if missing > free:
                    raise ConfigError(f"data.cache: {path} needs {missing / 2**30:.1f} GiB more, {free / 2**30:.1f} are free")
                opened.append(file)
            self._files[size] = tuple(opened)
        return self._files[size]


def _checksum(image: np.ndarray) -> int:
    return 1 << 32 | zlib.crc32(np.ascontiguousarray(image))
