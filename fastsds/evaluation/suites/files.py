"""What the suites' loaders do beside `data/rows.py`: find a file, find an image. Every error names file and row."""

from io import BytesIO
from pathlib import Path

import numpy as np

from fastsds.config import ConfigError
from fastsds.data.rows import ImageFolder
from fastsds.evaluation.suite import ImageRef

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")  # of image files, in any case


def find(path: Path, *names: str) -> Path:
    """The path itself where it is a file, else the one of these names that is in the folder. Raises: ConfigError."""
    if path.is_file():
        return path
    found = [path / name for name in names if (path / name).is_file()]
    if len(found) != 1:
        seen = "none" if not found else "more than one; name the file"
        raise ConfigError(f"{path}: expected {' or '.join(names)} in this folder, found {seen}")
    return found[0]


def png(pixels: np.ndarray) -> bytes:
    """Pixels as a file, without loss. Shapes: uint8 [3, H, W]."""
    from PIL import Image

    with BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG", compress_level=1)
        return file.getvalue()


class Images(ImageFolder):
    """The image files of a suite's folder. Args: also: suffixes that are tried after a name that lacks its own."""

    def __init__(self, folder: Path, also: tuple[str, ...] = ()):
        super().__init__(folder)
        self.also = also

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
