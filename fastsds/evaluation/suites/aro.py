"""ARO's VG-Relation and VG-Attribution (Yuksekgonul et al., ICLR 2023): which of two captions fits a region of an image.

    FOLDER/visual_genome_relation.json, visual_genome_attribution.json     lists of cases, see FIELDS
    FOLDER/images/                                                         image_path names a file in it

The image is cut to the case's box first. A tie is wrong (their argmax over [false, true]).

    vg_relation      accuracy/macro   mean over relations without the 157 of symmetric_relations.txt, rare ones included,
                                      as their notebook has it
                     accuracy         over the cases that this counts;  accuracy/all: over all cases of the file
    vg_attribution   accuracy/macro   mean over ordered pairs of attributes with at least 25 cases
                     accuracy         over the cases that this counts;  accuracy/all: over all cases of the file
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fastsds.config import ConfigError
from fastsds.data.rows import field, read_json, read_text
from fastsds.evaluation.choice import choose
from fastsds.evaluation.measures import Metric, by_value, over_groups, over_items
from fastsds.evaluation.suite import Item, Suite, register
from fastsds.evaluation.suites.files import Images, find

FIELDS = ("image_path", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "true_caption", "false_caption")
SYMMETRIC = Path(__file__).with_name("symmetric_relations.txt")
RARE = 25  # cases: attribute pairs with fewer do not count


@register("vg_relation")
def load_relation(path: Path, images: str | None = None) -> Suite:
    """Args: images: the folder of the images."""
    lines = read_text(SYMMETRIC).splitlines()
    left_out = {line for line in lines if not line.startswith("#")}
    return _load(
        "vg_relation", find(path, "visual_genome_relation.json"), images, "relation",
        lambda where, row: field(where, row, "relation_name", str), lambda relation, cases: relation not in left_out,
    )  # fmt: skip


@register("vg_attribution")
def load_attribution(path: Path, images: str | None = None) -> Suite:
    """Args: images: the folder of the images."""
    return _load(
        "vg_attribution", find(path, "visual_genome_attribution.json"), images, "attributes",
        _attributes, lambda pair, cases: cases >= RARE,
    )  # fmt: skip


def _attributes(where: str, row: dict) -> str:
    pair = field(where, row, "attributes", list)
    if len(pair) != 2 or not all(isinstance(name, str) and name for name in pair):
        raise ConfigError(f"{where}: attributes is {pair!r:.60}, expected two texts")
    return "_".join(pair)


def _load(
    name: str, file: Path, images: str | None, kind: str,
    label: Callable[[str, dict], str], counts: Callable[[str, int], bool],
) -> Suite:  # fmt: skip
    """Args: label: (where, row) -> what the macro mean groups by. counts: (label, its number of cases) -> is it in the mean?"""
    rows = read_json(file, once=True)
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{file}: a list of cases expected")
    folder = Images(file.parent / "images" if images is None else Path(images))
    items = []
    for k, row in enumerate(rows):
        where = f"{file}: row {k}"
        of = partial(field, where, row)
        x, y, w, h = (of(edge, float) for edge in ("bbox_x", "bbox_y", "bbox_w", "bbox_h"))
        if w <= 0 or h <= 0:
            raise ConfigError(f"{where}: box of {w} x {h} pixels is empty")
        ref = folder.ref(of("image_path", str), where, (x, y, x + w, y + h))
        captions = (of("true_caption", str), of("false_caption", str))
        items.append(Item(str(k), (ref,), captions, {kind: label(where, row)}))
    folder.check(file)
    labels = [item.about[kind] for item in items]
    cases = Counter(labels)
    counted = {value for value, n in cases.items() if counts(value, n)}
    measures: dict[str, Metric] = {}
    if counted:
        measures |= over_groups("accuracy", [value if value in counted else None for value in labels], 50.0)
        measures |= over_items("accuracy", [value in counted for value in labels], 50.0)
    measures["accuracy/all"] = Metric("accuracy", np.zeros(len(items), np.int64), 50.0)
    measures |= by_value("accuracy", kind, [[value] if value in counted else [] for value in labels], 50.0)
    headline = tuple(metric for metric in ("accuracy/macro", "accuracy", "accuracy/all") if metric in measures)
    suite = Suite(name=name, items=items, judge=_judge, measures=measures, headline=headline, kind=kind)
    repeated = len(items) - len({(item.images, item.captions) for item in items})
    if repeated:
        suite.notes.append(f"{repeated} of {len(items)} cases repeat an earlier one; they count, as in published figures")
    left = sum(n for value, n in cases.items() if value not in counted)
    suite.notes.append(f"macro mean over {len(counted)} of {len(cases)} kinds; {left} of {len(items)} cases are left out of it")
    return suite


def _judge(scores) -> dict:
    return {"accuracy": (chosen := choose(scores)).right, "tied": chosen.tied}
