"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), their test images, as zero-shot classification (see classification.py).

    FOLDER/cifar-10-batches-bin/test_batch.bin, batches.meta.txt     10,000 records of <label><3072 bytes>
    FOLDER/cifar-100-binary/test.bin, fine_label_names.txt           10,000 records of <coarse><fine><3072 bytes>
    FOLDER/cifar-10-batches-py/test_batch, batches.meta              as torchvision leaves them: pickles
    FOLDER/cifar-100-python/test, meta

FOLDER may also be the inner folder. A pickle can run any code when it is read, so these go through an unpickler that knows
numpy's arrays and nothing else: one that asks for another name is an error before that is looked up.
"""

import pickle
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation.suite import Gallery, ImageRef, register
from fastsds.evaluation.suites.classification import class_names, gallery, read_templates
from fastsds.evaluation.suites.files import read_text

SIDE = 32
PIXELS = 3 * SIDE * SIDE
#     inner folder              images            names                     bytes before the pixels, or key of the labels
BINARY = {10: ("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", 1),
          100: ("cifar-100-binary", "test.bin", "fine_label_names.txt", 2)}  # fmt: skip
PICKLED = {10: ("cifar-10-batches-py", "test_batch", ("batches.meta", "label_names"), "labels"),
           100: ("cifar-100-python", "test", ("meta", "fine_label_names"), "fine_labels")}  # fmt: skip


@register("cifar10")
def load_10(path: Path, classes: str | None = None, templates: str | None = None) -> Gallery:
    """Args: classes: a file of names in the order of the labels; default: the data set's own. templates: a file."""
    return _load(10, path, classes, templates)


@register("cifar100")
def load_100(path: Path, classes: str | None = None, templates: str | None = None) -> Gallery:
    """Args: classes: a file of names in the order of the labels; default: the data set's own. templates: a file."""
    return _load(100, path, classes, templates)


def _load(kind: int, path: Path, classes: str | None, templates: str | None) -> Gallery:
    file, images, labels, own = _read(kind, path)
    if len(own) != kind:
        raise ConfigError(f"{file.parent}: {len(own)} class names, expected {kind}")
    if not len(labels):
        raise ConfigError(f"{file}: no images in it")
    if (wrong := np.flatnonzero((labels < 0) | (labels >= kind))).size:
        raise ConfigError(f"{file}: row {wrong[0]}: label {labels[wrong[0]]}, expected 0 to {kind - 1}")
    names = own if classes is None else class_names(Path(classes), own)
    refs = [
        (ImageRef(f"{file}[{k}]", f"{file}: row {k}", partial(_png, image)), label)
        for k, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]
    return gallery(f"cifar{kind}", refs, [name.replace("_", " ") for name in names], read_templates(templates))


def _read(kind: int, path: Path) -> tuple[Path, np.ndarray, np.ndarray, list[str]]:
    """The file that was found, pixels uint8 [N, 3072], labels int64 [N], and the classes' names."""
    for (inner, data, *rest), read in ((BINARY[kind], _binary), (PICKLED[kind], _pickled)):
        for file in (path / inner / data, path / data):
            if file.is_file():
                return file, *read(file, *rest)
    raise ConfigError(f"{path}: neither {BINARY[kind][0]}/{BINARY[kind][1]} nor {PICKLED[kind][0]}/{PICKLED[kind][1]} in it")


def _binary(file: Path, names: str, skip: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    content = np.fromfile(file, np.uint8)
    if content.size % (skip + PIXELS):
        raise ConfigError(f"{file}: {content.size:,} bytes are no whole number of records of {skip + PIXELS}")
    rows = content.reshape(-1, skip + PIXELS)
    own = [line.strip() for line in read_text(file.parent / names).splitlines() if line.strip()]
    return rows[:, skip:], rows[:, skip - 1].astype(np.int64), own


def _pickled(file: Path, names: tuple[str, str], key: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    content, meta = unpickle(file), unpickle(file.parent / names[0])
    images, labels, own = content.get("data"), content.get(key), meta.get(names[1])
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 2 and images.shape[1] == PIXELS):
        raise ConfigError(f"{file}: data: uint8 [N, {PIXELS}] expected")
    if not (isinstance(labels, list) and len(labels) == len(images) and all(type(x) is int for x in labels)):
        raise ConfigError(f"{file}: {key}: a list of {len(images)} whole numbers expected")
    if not (isinstance(own, list) and all(isinstance(name, str) for name in own)):
        raise ConfigError(f"{file.parent / names[0]}: {names[1]}: a list of texts expected")
    return images, np.array(labels, np.int64), own


class _Unpickler(pickle.Unpickler):
    """Knows numpy's arrays, as numpy 1 and 2 pickle them; numbers, texts, lists and dicts need no names."""

    _reconstruct = np.empty(0).__reduce__()[0]
    KNOWN = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
             ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
             ("numpy._core.multiarray", "_reconstruct"): _reconstruct}  # fmt: skip

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file holds")
        return self.KNOWN[module, name]


def unpickle(file: Path) -> dict:
    """Read a CIFAR pickle; bytes that Python 2 wrote as texts become texts. Raises: ConfigError for anything else in it."""
    try:
        with open(file, "rb") as opened:
            found = _Unpickler(opened, encoding="latin1").load()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except Exception as error:  # whatever a cut or foreign file makes of it
        raise ConfigError(f"{file}: not read as a CIFAR pickle: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: a dictionary expected")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}


def _png(image: np.ndarray) -> bytes:
    """Planes of red, green and blue as a file, without loss."""
    from PIL import Image

    with BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(image.reshape(3, SIDE, SIDE).transpose(1, 2, 0))).save(file, "PNG")
        return file.getvalue()
