"""Images with several captions in JSON: what retrieval and the Order suites read. Every caption is kept, also a repeated one.

    coco_karpathy_test.json, flickr30k_test.json      [{"image": "val2014/x.jpg", "caption": [texts]}]
    dataset_coco.json, dataset_flickr30k.json         {"images": [{"filepath" (may be absent), "filename", "split",
                                                      "sentences": [{"raw": text}]}]}: the images of one split
    captions_val2017.json, coco_test_karpathy.json    {"images": [{"id", "file_name"}],
                                                      "annotations": [{"image_id", "caption"}]}
"""

from pathlib import Path
from typing import NamedTuple

from fastsds.config import ConfigError
from fastsds.data.rows import field, read_json, unique
from fastsds.evaluation.suite import ImageRef
from fastsds.evaluation.suites.files import Images


class Captioned(NamedTuple):
    name: str
    where: str
    image: ImageRef
    captions: tuple[str, ...]


def read_captions(file: Path, images: Path | None, split: str = "test") -> list[Captioned]:
    """Images in the order of the file, with their captions.

    Args: images: the folder that names are relative to, None: the file's own; a name with folders in it is also looked for
        without them. split: of a dataset_*.json.
    Raises: ConfigError that names file and row.
    """
    found = read_json(file, once=True)
    if isinstance(found, list):
        said = _lists(file, found)
    elif isinstance(found, dict) and isinstance(found.get("images"), list) and "annotations" in found:
        said = _annotations(file, found)
    elif isinstance(found, dict) and isinstance(found.get("images"), list):
        said = _sentences(file, found["images"], split)
    else:
        raise ConfigError(f"{file}: a list of images with captions, Karpathy's dataset_*.json or COCO's annotations expected")
    if not said:
        raise ConfigError(f"{file}: no images in it")
    folder, result = Images(file.parent if images is None else images), []
    for name, (where, captions) in said.items():
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise ConfigError(f"{where}: a list of captions expected, none of them empty, found {captions!r:.80}")
        result.append(Captioned(name, where, folder.ref(name, where, flat=True), tuple(captions)))
    folder.check(file)
    return result


def _lists(file: Path, rows: list) -> dict[str, tuple[str, list]]:
    said, seen = {}, {}
    for k, row in enumerate(rows):
        where = f"{file}: row {k}"
        name = field(where, row, "image", str)
        unique(seen, name, where, "image")
        said[name] = (where, field(where, row, "caption", list))
    return said


def _sentences(file: Path, rows: list, split: str) -> dict[str, tuple[str, list]]:
    said, seen, splits = {}, {}, set()
    for k, row in enumerate(rows):
        where = f"{file}: images[{k}]"
        splits.add(of := field(where, row, "split", str))
        if of != split:
            continue
        name = field(where, row, "filename", str)
        if row.get("filepath"):
            name = f"{field(where, row, 'filepath', str)}/{name}"
        unique(seen, name, where, "image")
        said[name] = (where, [field(where, sentence, "raw", str) for sentence in field(where, row, "sentences", list)])
    if splits and split not in splits:
        raise ConfigError(f"{file}: no split {split!r}; its splits: {', '.join(sorted(splits))}")
    return said


def _annotations(file: Path, found: dict) -> dict[str, tuple[str, list]]:
    said, seen, ids, names = {}, {}, {}, {}
    for k, row in enumerate(found["images"]):
        where = f"{file}: images[{k}]"
        number, name = field(where, row, "id", int), field(where, row, "file_name", str)
        unique(seen, name, where, "image")
        unique(ids, number, where, "id")
        names[number] = name
        said[name] = (where, [])
    for k, row in enumerate(field(str(file), found, "annotations", list)):
        where = f"{file}: annotations[{k}]"
        if (number := field(where, row, "image_id", int)) not in names:
            raise ConfigError(f"{where}: image_id {number} is none of images")
        said[names[number]][1].append(field(where, row, "caption", str))
    return said
