"""Image-text retrieval on COCO and Flickr30k (Karpathy's splits): recall at 1, 5 and 10, both ways, over the whole gallery.

    FOLDER/coco_karpathy_test.json, dataset_coco.json, coco_test_karpathy.json;  flickr30k_test.json, dataset_flickr30k.json
    images, by the names in the file, in FOLDER or the folder `images`

What is in the files: see captions.py. All captions of an image that the file has are its own (COCO's test split: 25,010 of
5,000 images).

    image_retrieval_recall@k      a caption finds its image among the first k
    text_retrieval_recall@k       an image finds one of its captions among the first k

These are CLIP_benchmark's names and rule; of equal scores it takes the one that torch.topk happens to give, here the one that
comes first in the file. The metrics ending in _strict have a tie wrong.
"""

from math import comb
from pathlib import Path

import numpy as np

from fastsds.evaluation.measures import Metric, over_items
from fastsds.evaluation.retrieval import Places
from fastsds.evaluation.suite import Export, Gallery, Item, Query, register
from fastsds.evaluation.suites.captions import read_captions
from fastsds.evaluation.suites.files import find

AT = (1, 5, 10)


@register("coco_retrieval")
def load_coco(path: Path, images: str | None = None, split: str = "test", items: int | None = None) -> Gallery:
    """Args: images: the folder that names are relative to. split: of a dataset_*.json. items: the first images alone."""
    names = ("coco_karpathy_test.json", "dataset_coco.json", "coco_test_karpathy.json")
    return _load("coco_retrieval", "mscoco_captions", find(path, *names), images, split, items)


@register("flickr30k_retrieval")
def load_flickr(path: Path, images: str | None = None, split: str = "test", items: int | None = None) -> Gallery:
    """Args: images: the folder that names are relative to. split: of a dataset_*.json. items: the first images alone."""
    names = ("flickr30k_test.json", "dataset_flickr30k.json")
    return _load("flickr30k_retrieval", "flickr30k", find(path, *names), images, split, items)


def _load(name: str, dataset: str, file: Path, images: str | None, split: str, first: int | None) -> Gallery:
    said = read_captions(file, None if images is None else Path(images), split)[:first]
    items = [Item(of.name, (of.image,), of.captions) for of in said]
    owner = np.array([k for k, of in enumerate(said) for _ in of.captions])
    number, sizes, total = np.arange(len(said)), [len(of.captions) for of in said], len(owner)
    text_ids = [f"{of.name}#{k}" for of in said for k in range(len(of.captions))]
    queries = [
        Query("text", owner, number, text_ids, lambda places: _judge("image_retrieval", places)),
        Query("image", number, owner, [of.name for of in said], lambda places: _judge("text_retrieval", places)),
    ]
    measures: dict[str, Metric] = {}
    for k in AT:
        by_text = 100 * min(1.0, k / len(said))
        by_image = 100 * float(np.mean([1 - comb(total - own, k) / comb(total, k) if k <= total else 1.0 for own in sizes]))
        for kind, n, chance in (("image_retrieval", total, by_text), ("text_retrieval", len(said), by_image)):
            for rule in ("", "_strict"):
                measures |= over_items(f"{kind}_recall@{k}{rule}", [True] * n, chance)
    headline = tuple(metric for metric in measures if not metric.endswith("_strict"))
    return Gallery(
        name=name, items=items, texts=[(text,) for of in said for text in of.captions], queries=queries, measures=measures,
        headline=headline, exports=[Export(dataset, "zeroshot_retrieval", {metric: metric for metric in headline})],
    )  # fmt: skip


def _judge(kind: str, places: Places) -> dict:
    found = {f"{kind}_recall@{k}": places.found(k) for k in AT}
    strict = {f"{kind}_recall@{k}_strict": places.found_strictly(k) for k in AT}
    return found | strict | {f"tied_{kind}": places.level > 0}
