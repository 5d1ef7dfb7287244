"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), their test images, as zero-shot classification (see classification.py).

    FOLDER/cifar-10-batches-bin/test_batch.bin, batches.meta.txt     records of <label><3072 bytes>
    FOLDER/cifar-100-binary/test.bin, fine_label_names.txt           records of <coarse label><fine label><3072 bytes>

FOLDER may also be the inner folder. This is the binary version; the Python version (cifar-10-batches-py, cifar-100-python) can
run any code when it is read, and is refused.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsds.config import ConfigError
from fastsds.data.rows import read_text
from fastsds.evaluation.suite import Gallery, ImageRef, register
from fastsds.evaluation.suites.classification import class_names, first_of_each, gallery, read_templates
from fastsds.evaluation.suites.files import png

SIDE = 32
PIXELS = 3 * SIDE * SIDE


class Layout(NamedTuple):
    """skip: bytes before the pixels, of which the last is the label. refused: the Python version's folder."""

    folder: str
    images: str
    names: str
    skip: int
    refused: str


LAYOUTS = {
    10: Layout("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", 1, "cifar-10-batches-py"),
    100: Layout("cifar-100-binary", "test.bin", "fine_label_names.txt", 2, "cifar-100-python"),
}


@register("cifar10")
def load_10(path: Path, classes: str | None = None, templates: str | None = None, items: int | None = None) -> Gallery:
    """Args: classes: a file of names in the order of the labels; default: the data set's own. templates: a file."""
    return _load(10, path, classes, templates, items)


@register("cifar100")
def load_100(path: Path, classes: str | None = None, templates: str | None = None, items: int | None = None) -> Gallery:
    """Args: classes: a file of names in the order of the labels; default: the data set's own. templates: a file."""
    return _load(100, path, classes, templates, items)


def _load(count: int, path: Path, classes: str | None, templates: str | None, items: int | None) -> Gallery:
    layout = LAYOUTS[count]
    file = next((f / layout.images for f in (path / layout.folder, path) if (f / layout.images).is_file()), None)
    if file is None:
        python = path.name == layout.refused or (path / layout.refused).is_dir()
        hint = f"; {layout.refused}, which can run code when it is read, does not serve: unpack cifar-{count}-binary.tar.gz"
        raise ConfigError(f"{path}: no {layout.folder}/{layout.images} in it" + hint * python)
    content = np.fromfile(file, np.uint8)
    if not content.size or content.size % (layout.skip + PIXELS):
        raise ConfigError(f"{file}: {content.size:,} bytes are no whole number of records of {layout.skip + PIXELS}")
    records = content.reshape(-1, layout.skip + PIXELS)
    labels = records[:, layout.skip - 1].tolist()
    if wrong := [k for k, label in enumerate(labels) if label >= count]:
        raise ConfigError(f"{file}: row {wrong[0]}: label {labels[wrong[0]]}, expected 0 to {count - 1}")
    own = [line.strip() for line in read_text(file.parent / layout.names).splitlines() if line.strip()]
    if len(own) != count:
        raise ConfigError(f"{file.parent / layout.names}: {len(own)} names, expected {count}")
    names = own if classes is None else class_names(Path(classes), own)
    images = [
        (ImageRef(f"{file}[{k}]", f"{file}: row {k}", partial(png, record[layout.skip :].reshape(3, SIDE, SIDE))), label)
        for k, (record, label) in enumerate(zip(records, labels, strict=True))
    ]
    shown = [name.replace("_", " ") for name in names]
    return gallery(f"cifar{count}", first_of_each(images, items), shown, read_templates(templates))

