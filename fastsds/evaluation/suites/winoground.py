"""Winoground (arXiv 2204.03162): two captions of the same words, two images, and which belongs to which.

    FOLDER of save_to_disk, or FOLDER/data/test-*.parquet                          see tables.py
    FOLDER/examples.jsonl (or FOLDER/data/), images/ beside it or in FOLDER        the older release; image_0 is "ex_0_img_0"

Outcomes text, image, group: see `evaluation/winoground.py`; all inequalities strict, so a tie is wrong. By collapsed_tag
(Object, Relation, Both), num_main_preds, and secondary_tag, of which an example may have several, or none.
"""

from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.rows import field, parse_json, read_text, unique
from fastsds.evaluation.measures import by_value, over_items
from fastsds.evaluation.suite import Export, Item, Suite, register
from fastsds.evaluation.suites.files import Images
from fastsds.evaluation.suites.tables import open_table
from fastsds.evaluation.winoground import CHANCE, tied, winoground

TEXTS = ("id", "caption_0", "caption_1", "tag", "secondary_tag", "num_main_preds", "collapsed_tag")
IMAGES = ("image_0", "image_1")
OUTCOMES = ("text", "image", "group")


@register("winoground")
def load(path: Path, images: str | None = None) -> Suite:
    """Args: images: the folder of the older release's images."""
    if (table := open_table(path)) is not None:
        table.require(TEXTS, IMAGES)
        rows = [(table.where(k), table.row(k)) for k in range(len(table))]
        refs = [tuple(table.ref(k, name) for name in IMAGES) for k in range(len(table))]
    else:
        file = _examples(path)
        lines = enumerate(read_text(file).splitlines(), 1)
        rows = [(f"{file}: line {n}", parse_json(line, f"{file}: line {n}", once=True)) for n, line in lines if line.strip()]
        folder = Images(_images(file) if images is None else Path(images), also=(".png", ".jpg", ".jpeg"))
        refs = [tuple(folder.ref(field(where, row, name, str), where) for name in IMAGES) for where, row in rows]
        folder.check(file)
    items, seen = [], {}
    for (where, row), pair in zip(rows, refs, strict=True):
        number = field(where, row, "id", int)
        unique(seen, number, where, "id")
        captions = tuple(field(where, row, name, str) for name in ("caption_0", "caption_1"))
        secondary = [tag.strip() for tag in field(where, row, "secondary_tag", str, blank=True).split(",") if tag.strip()]
        about = {
            "tag": field(where, row, "tag", str), "collapsed_tag": field(where, row, "collapsed_tag", str),
            "num_main_preds": field(where, row, "num_main_preds", int), "secondary_tag": secondary,
        }  # fmt: skip
        items.append(Item(str(number), pair, captions, about))
    if not items:
        raise ConfigError(f"{path}: no examples in it")
    measures = {}
    for name in OUTCOMES:
        measures |= over_items(name, [True] * len(items), CHANCE[name])
    for name in OUTCOMES:
        for key in ("collapsed_tag", "num_main_preds"):
            measures |= by_value(name, key, [[item.about[key]] for item in items], CHANCE[name])
        measures |= by_value(name, "secondary_tag", [item.about["secondary_tag"] for item in items], CHANCE[name])
    names = {"image_acc": "image", "text_acc": "text", "acc": "group"}
    return Suite(
        name="winoground", items=items, judge=_judge, measures=measures, headline=OUTCOMES,
        exports=[Export("winoground", "image_caption_selection", names)],
    )  # fmt: skip


def _judge(scores) -> dict:
    return winoground(scores)._asdict() | {"tied": tied(scores)}


def _examples(path: Path) -> Path:
    for file in (path, path / "examples.jsonl", path / "data" / "examples.jsonl"):
        if file.is_file():
            return file
    raise ConfigError(f"{path}: expected a data set of save_to_disk, data/test-*.parquet, or examples.jsonl with images/")


def _images(file: Path) -> Path:
    """images/ beside the file, or one folder further up."""
    return next((p for p in (file.parent / "images", file.parent.parent / "images") if p.is_dir()), file.parent / "images")
