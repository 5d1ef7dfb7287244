"""Zero-shot classification: an image among the names of all classes, each put into every template.

    FOLDER/CLASS/*.jpg              one folder a class, images at any depth (ImageNet's validation set: FOLDER/n01440764/*.JPEG)
    classes     a file of names, one a line: in the order of the sorted folders, or FOLDER<TAB>NAME; default: the folders' own
                names, _ read as a space
    templates   a file of templates, one a line, with {} (or {c}) for the name; default "a photo of a {}."

A class is its prompts: a scorer averages the unit features of the texts and makes the mean a unit vector (one without
features averages its scores). top1 and top5 are over images; top1/macro, the mean over classes, is CLIP_benchmark's
mean_per_class_recall.
Of equal scores the class that comes first wins, as with argmax; the metrics with _strict have a tie wrong.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from fastsds.config import ConfigError
from fastsds.data.rows import read_text, unique
from fastsds.evaluation.measures import Metric, over_groups, over_items
from fastsds.evaluation.retrieval import Places
from fastsds.evaluation.suite import Export, Gallery, ImageRef, Item, Query, register
from fastsds.evaluation.suites.files import SUFFIXES

TEMPLATES = ("a photo of a {}.",)


@register("zeroshot")
def load(path: Path, classes: str | None = None, templates: str | None = None, items: int | None = None) -> Gallery:
    """Args: classes, templates: files, see above. items: the first images of each class alone."""
    folders = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")) if path.is_dir() else []
    if not folders:
        raise ConfigError(f"{path}: one folder a class expected")
    images = first_of_each([(ref, k) for k, folder in enumerate(folders) for ref in _images(path / folder)], items)
    names = [folder.replace("_", " ") for folder in folders] if classes is None else class_names(Path(classes), folders)
    return gallery("zeroshot", images, names, read_templates(templates), root=path)


def gallery(
    name: str, images: list[tuple[ImageRef, int]], names: list[str], templates: tuple[str, ...], root: Path | None = None
) -> Gallery:
    """The suite of images with their classes. Args: root: ids are names relative to it; None: ids are numbers."""
    ids = [str(k) if root is None else Path(ref.name).relative_to(root).as_posix() for k, (ref, _) in enumerate(images)]
    items = [
        Item(i, (ref,), (names[label],), {"class": names[label], "label": label})
        for i, (ref, label) in zip(ids, images, strict=True)
    ]
    labels, everything = np.array([label for _, label in images]), [True] * len(images)
    at = [k for k in (1, 5) if k <= len(names)]
    measures: dict[str, Metric] = {}
    for rule in ("", "_strict"):
        for k in at:
            measures |= over_items(f"top{k}{rule}", everything, 100 * k / len(names))
        measures |= over_groups(f"top1{rule}", labels.tolist(), 100 / len(names))

    def judge(places: Places) -> dict:
        found = {f"top{k}": places.found(k) for k in at} | {f"top{k}_strict": places.found_strictly(k) for k in at}
        return found | {"tied": places.level > 0}

    theirs = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "top1/macro"}
    return Gallery(
        name=name, items=items, measures=measures, headline=tuple(m for m in measures if "_strict" not in m),
        texts=[tuple(t.replace("{c}", "{}").replace("{}", of) for t in templates) for of in names],
        queries=[Query("image", labels, np.arange(len(names)), ids, judge)],
        exports=[Export(name, "zeroshot_classification", {a: b for a, b in theirs.items() if b in measures})],
    )  # fmt: skip


def first_of_each(images: list[tuple[ImageRef, int]], n: int | None) -> list[tuple[ImageRef, int]]:
    """The first n images of each class; None: all."""
    seen, found = Counter(), []
    for ref, label in images:
        seen[label] += 1
        if n is None or seen[label] <= n:
            found.append((ref, label))
    return found


def class_names(file: Path, folders: list[str]) -> list[str]:
    """The names in a file, in the order of the folders. Two classes may share one. Raises: ConfigError."""
    lines = [(n, line.strip()) for n, line in enumerate(read_text(file).splitlines(), 1) if line.strip()]
    if not any("\t" in line for _, line in lines):
        if len(lines) != len(folders):
            raise ConfigError(f"{file}: {len(lines)} names, expected one for each of {len(folders)} classes")
        return [line for _, line in lines]
    named, seen = {}, {}
    for n, line in lines:
        folder, tab, name = (part.strip() for part in line.partition("\t"))
        if not (folder and name):
            raise ConfigError(f"{file}: line {n}: FOLDER<TAB>NAME expected, found {line!r:.60}")
        unique(seen, folder, f"{file}: line {n}", "folder")
        named[folder] = name
    if missing := [folder for folder in folders if folder not in named]:
        raise ConfigError(f"{file}: no name for {len(missing)} of {len(folders)} classes: {', '.join(missing[:10])}")
    return [named[folder] for folder in folders]


def read_templates(file: str | None) -> tuple[str, ...]:
    """The templates in a file. Raises: ConfigError for one without a place for the name, or with two, or a repeated one."""
    if file is None:
        return TEMPLATES
    found: dict[str, str] = {}
    for n, line in enumerate(read_text(Path(file)).splitlines(), 1):
        if text := line.strip():
            where = f"{file}: line {n}"
            if text.count("{}") + text.count("{c}") != 1 or text.count("{") != 1 or text.count("}") != 1:
                raise ConfigError(f"{where}: one {{}} for the class name expected, found {text!r:.80}")
            unique(found, text, where, "template")
    if not found:
        raise ConfigError(f"{file}: no templates in it")
    return tuple(found)


def _images(folder: Path) -> list[ImageRef]:
    names = []
    for where, inside, files in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".")]
        names += [Path(where) / name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not names:
        raise ConfigError(f"{folder}: no images in it ({', '.join(SUFFIXES)})")
    return [ImageRef(str(name), str(folder), name.read_bytes) for name in sorted(names)]
