"""ARO's COCO-Order and Flickr30k-Order (Yuksekgonul et al., ICLR 2023): a caption among shuffles of its own words.

    FOLDER of save_to_disk or test-*.parquet     images, correct_caption, hard_text_1 .. hard_text_4 (the hub's mirrors)
    FILE.json                                    [{"image", "caption_options": [the true one, 4 shuffles]}]
    FILE.json                                    captions alone (see captions.py): shuffles are generated

A tie is right (their argmax over [true, ...]: a shuffle that changes nothing does not count against a model);
accuracy_strict has it wrong.

Published figures need released shuffles: two of the four permute by part of speech, which takes the tagger that they used.
From captions alone the other two are generated, under the name NAME_generated: one case a caption, with 3 options. Captions
are lower-cased, freed of . ! " ( ) * # : ; ~ and cut to 30 words, as theirs, but split at spaces, and cut before they are
shuffled. A shuffle depends on (seed, the caption's number in the file) alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.data.rows import field, read_json
from fastsds.evaluation.choice import choose
from fastsds.evaluation.measures import over_items
from fastsds.evaluation.suite import ImageRef, Item, Suite, register
from fastsds.evaluation.suites.captions import read_captions
from fastsds.evaluation.suites.files import Images, find
from fastsds.evaluation.suites.tables import Table, open_table
from fastsds.ops import Noise, Purpose, draw

COLUMNS = ("correct_caption", "hard_text_1", "hard_text_2", "hard_text_3", "hard_text_4")
PERTURBATIONS = ("within_trigrams", "trigrams")
TAGGED = ("nouns_and_adj", "allbut_nouns_and_adj")
WORDS = 30


@register("coco_order")
def load_coco(path: Path, images: str | None = None, split: str = "test", perturbations=PERTURBATIONS, seed: int = 0):
    """Args: images: the folder that names are relative to. split, perturbations, seed: of captions alone."""
    names = ("coco_karpathy_test.json", "dataset_coco.json")
    return _load("coco_order", path, names, images, split, perturbations, seed)


@register("flickr30k_order")
def load_flickr(path: Path, images: str | None = None, split: str = "test", perturbations=PERTURBATIONS, seed: int = 0):
    """Args: images: the folder that names are relative to. split, perturbations, seed: of captions alone."""
    names = ("flickr30k_test.json", "dataset_flickr30k.json")
    return _load("flickr30k_order", path, names, images, split, perturbations, seed)


def generate(captions: Sequence[str], perturbations: Sequence[str] = PERTURBATIONS, seed: int = 0) -> list[tuple[str, ...]]:
    """Shuffle the words of each caption: (the caption itself, one shuffle a perturbation), from (seed, its number) alone.

    within_trigrams: the words of each three in a row change places. trigrams: threes in a row change places, whole.
    Raises: ConfigError for a perturbation that is not known, or takes a part-of-speech tagger.
    """
    for name in perturbations:
        if name in TAGGED:
            raise ConfigError(f"perturbation {name}: takes a part-of-speech tagger; give the released shuffles instead")
        if name not in PERTURBATIONS:
            raise ConfigError(f"perturbation {name!r}: expected one of {', '.join(PERTURBATIONS)}")
    said = [normalise(caption).split(" ") for caption in captions]
    ids, columns = torch.arange(len(said)), [[" ".join(words) for words in said]]
    for visit, name in enumerate(PERTURBATIONS):
        if name in perturbations:
            keys = Noise(seed, draw(Purpose.ORDER, visit), ids).uniform(WORDS).tolist()
            columns.append([" ".join(_shuffled(words, key, name)) for words, key in zip(said, keys, strict=True)])
    return list(zip(*columns, strict=True))


def normalise(caption: str) -> str:
    """Lower case, without . ! " ( ) * # : ; ~, single spaces, at most 30 words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:WORDS])


def _shuffled(words: list[str], keys: list[float], perturbation: str) -> list[str]:
    threes = [words[k : k + 3] for k in range(0, len(words), 3)]
    if perturbation == "trigrams":
        return [word for k in sorted(range(len(threes)), key=keys.__getitem__) for word in threes[k]]
    return [three[k - at] for at, three in zip(range(0, len(words), 3), threes)
            for k in sorted(range(at, at + len(three)), key=keys.__getitem__)]  # fmt: skip


def _load(name: str, path: Path, names: tuple[str, ...], images, split: str, perturbations, seed: int) -> Suite:
    folder = None if images is None else Path(images)
    table, file = (found := open_table(path)), None if found is not None else find(path, *names)
    rows = None if file is None else read_json(file, once=True)
    if table is not None:
        items = _of_table(table)
    elif isinstance(rows, list) and rows and isinstance(rows[0], dict) and "caption_options" in rows[0]:
        items = _released(file, rows, folder)
    else:
        said = read_captions(file, folder, split)
        pairs = [(of, caption) for of in said for caption in of.captions]
        chosen = perturbations.split(",") if isinstance(perturbations, str) else perturbations
        options = generate([caption for _, caption in pairs], chosen, seed)
        items = [_item(k, of.image, option) for k, ((of, _), option) in enumerate(zip(pairs, options, strict=True))]
        name += "_generated"
    chance = 100 / len(items[0].captions)
    measures = over_items("accuracy", [True] * len(items), chance) | over_items("accuracy_strict", [True] * len(items), chance)
    suite = Suite(name=name, items=items, judge=_judge, measures=measures, headline=tuple(measures))
    same = sum(item.captions[0] in item.captions[1:] for item in items)
    if same:
        suite.notes.append(f"in {same} of {len(items)} cases a shuffle changes nothing: never right in accuracy_strict")
    if name.endswith("_generated"):
        suite.notes.append(f"shuffles generated here (seed {seed}); not comparable with published figures")
    return suite


def _of_table(table: Table) -> list[Item]:
    table.require(COLUMNS, ("images",))
    items = []
    for k in range(len(table)):
        options = tuple(field(table.where(k), table.row(k), column, str) for column in COLUMNS)
        items.append(_item(k, table.ref(k, "images"), options))
    return items


def _released(file: Path, rows: list, images: Path | None) -> list[Item]:
    folder, items = Images(file.parent if images is None else images), []
    for k, row in enumerate(rows):
        where = f"{file}: row {k}"
        options = field(where, row, "caption_options", list)
        if len(options) != len(COLUMNS) or not all(isinstance(text, str) and text.strip() for text in options):
            raise ConfigError(f"{where}: caption_options: the true caption and 4 shuffles expected, found {options!r:.80}")
        items.append(_item(k, folder.ref(field(where, row, "image", str), where, flat=True), tuple(options)))
    folder.check(file)
    return items


def _item(k: int, image: ImageRef, options: tuple[str, ...]) -> Item:
    return Item(str(k), (image,), options)


def _judge(scores) -> dict:
    right, tied = choose(scores)
    return {"accuracy": right | tied, "accuracy_strict": right, "tied": tied}
