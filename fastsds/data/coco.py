"""Captions in JSON, the images in a folder: COCO's own file, and the two that Karpathy's split comes in.

    captions_train2017.json     {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}
    dataset_coco.json           {"images": [{"filepath" (may be absent), "filename", "split", "sentences": [{"raw"}]}]}
    coco_karpathy_train.json    [{"image", "caption": a text, or a list of texts}]
"""

import json
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data import rows
from fastsds.data.images import Listing, of_files, texts

TRAINED = ("train", "restval")  # what Karpathy's split trains on


def read_json(path: Path, images: Path | None = None, split: str | None = None) -> Listing:
    """Entries that name one file are one image with several captions, in the order of the file (COCO's: of annotation ids).

    Args: images: the folder that names are relative to, None: the file's own. A name with folders in it is also looked for
        without them. split: of a dataset_*.json; None: train and restval.
    Raises: ConfigError that names the file and the entry.
    """
    found, said = rows.read_json(path), None
    if isinstance(found, list):
        said = _pairs(path, found)
    elif isinstance(found, dict) and isinstance(entries := found.get("images"), list):
        if "annotations" in found:
            said = _annotations(path, entries, found["annotations"])
        elif all(isinstance(entry, dict) and "sentences" in entry for entry in entries):
            said, split = _sentences(path, entries, split), None
    if said is None:
        raise ConfigError(
            f"{path}: expected COCO captions (images, annotations), Karpathy's dataset_*.json (images with sentences), or a "
            "list of objects with image and caption"
        )
    if split is not None:
        raise ConfigError(f"{path} has no splits, and data.split is {split!r}; expected null")
    return of_files(path.parent if images is None else images, said, flat=True)


def _annotations(path: Path, entries: list, annotations) -> dict[str, list[str]]:
    if not isinstance(annotations, list):
        raise ConfigError(f"{path}: annotations: expected a list")
    said, names = {}, {}
    for i, entry in enumerate(entries):
        number, name = _get(path, "images", i, entry, "id", int), _get(path, "images", i, entry, "file_name", str)
        if number in names:
            raise ConfigError(f"{path}: images[{i}]: id {number} is there twice")
        names[number] = name
        said.setdefault(name, [])
    found = []
    for i, entry in enumerate(annotations):
        number, image = (_get(path, "annotations", i, entry, key, int) for key in ("id", "image_id"))
        if image not in names:
            raise ConfigError(f"{path}: annotations[{i}]: image_id {image} is none of images")
        found.append((number, image, _get(path, "annotations", i, entry, "caption", str)))
    for _, image, caption in sorted(found, key=lambda row: row[0]):
        said[names[image]].append(caption)
    return said


def _sentences(path: Path, entries: list, split: str | None) -> dict[str, list[str]]:
    splits = [_get(path, "images", i, entry, "split", str) for i, entry in enumerate(entries)]
    wanted = TRAINED if split is None else (split,)
    if entries and not set(wanted) & set(splits):
        raise ConfigError(f"{path}: no split {' or '.join(wanted)}; data.split may be {', '.join(sorted(set(splits)))}")
    said: dict[str, list[str]] = {}
    for i, entry in enumerate(entries):
        if splits[i] in wanted:
            name = _get(path, "images", i, entry, "filename", str)
            if entry.get("filepath"):
                name = f"{_get(path, 'images', i, entry, 'filepath', str)}/{name}"
            sentences = said.setdefault(name, [])
            for k, sentence in enumerate(_get(path, "images", i, entry, "sentences", list)):
                sentences.append(_get(path, f"images[{i}].sentences", k, sentence, "raw", str))
    return said


def _pairs(path: Path, entries: list) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {}
    for i, entry in enumerate(entries):
        name, caption = _get(path, "", i, entry, "image", str), _get(path, "", i, entry, "caption", (str, list))
        try:
            said.setdefault(name, []).extend(texts(caption))
        except ValueError as error:
            raise ConfigError(f"{path}: [{i}].caption: {error}") from None
    return said


def _get(path: Path, list_name: str, i: int, entry, key: str, kind):
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or value == "" and key != "caption":
        expected = {int: "a whole number", str: "a text", list: "a list"}.get(kind, "a text or a list of texts")
        shown = "is missing" if value is None else f"is {json.dumps(value):.60}, expected {expected}"
        raise ConfigError(f"{path}: {list_name}[{i}]: {key} {shown}")
    return value
