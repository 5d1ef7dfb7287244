"""SugarCrepe (Hsieh et al., NeurIPS 2023): which of two fluent captions fits a COCO image.

    FOLDER/add_att.json, add_obj.json, ... (or in FOLDER/data/)     {"0": {"filename", "caption", "negative_caption"}, ...}
    FOLDER/val2017/, FOLDER/images/, or the folder `images`         COCO val2017

A tie is wrong. The paper has each category's accuracy; accuracy is the micro mean of all items, accuracy/macro the mean of the
seven categories.
"""

from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.rows import field, read_json, unique
from fastsds.evaluation.choice import choose
from fastsds.evaluation.measures import by_value, over_groups, over_items
from fastsds.evaluation.suite import Export, Item, Suite, register
from fastsds.evaluation.suites.files import Images, find

CATEGORIES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@register("sugarcrepe")
def load(path: Path, images: str | None = None) -> Suite:
    """Args: images: the folder of COCO's val2017 images."""
    folder = path / "data" if (path / "data").is_dir() else path
    if images is None:
        found = [path / name for name in ("val2017", "images") if (path / name).is_dir()]
        images = found[0] if found else path / "val2017"
    pictures, items = Images(Path(images)), []
    for category in CATEGORIES:
        file = find(folder, f"{category}.json")
        rows = read_json(file, once=True)
        if not isinstance(rows, dict) or not rows:
            raise ConfigError(f"{file}: an object of items expected")
        seen: dict = {}
        for key, row in rows.items():
            where = f"{file}: row {key}"
            name, *captions = (field(where, row, of, str) for of in ("filename", "caption", "negative_caption"))
            unique(seen, (name, *captions), where, "item")
            items.append(Item(f"{category}/{key}", (pictures.ref(name, where),), tuple(captions), {"category": category}))
        pictures.check(file)
    of = [item.about["category"] for item in items]
    measures = over_items("accuracy", [True] * len(items), 50.0) | over_groups("accuracy", of, 50.0)
    measures |= by_value("accuracy", "category", [[category] for category in of], 50.0)
    exports = []
    for category in CATEGORIES:
        ours = f"accuracy/category={category}"
        exports.append(Export(f"sugar_crepe/{category}", "image_caption_selection", {"text_acc": ours, "acc": ours}))
    return Suite(
        name="sugarcrepe", items=items, judge=_judge, measures=measures, headline=tuple(measures), exports=exports,
        kind="category",
    )  # fmt: skip


def _judge(scores) -> dict:
    return {"accuracy": (chosen := choose(scores)).right, "tied": chosen.tied}
