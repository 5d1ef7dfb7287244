"""MMVP-VLM (Tong et al., CVPR 2024): pairs of images that CLIP takes for alike, and a statement for each, in 9 visual patterns.

    FOLDER/Questions.csv                                             Question ID, Type, Statement; ids 2k-1 and 2k are a pair
    FOLDER/MLLM_VLM Images/TYPE/ID.jpg (or MMVP_VLM_Images/)          a folder a pattern

A pair is right if each statement, after "a photo of ", chooses its own image: Winoground's image score. pair/macro is the mean
over patterns, the figure that is published. The reference script says "image 2" where a statement's two scores are equal, so a
tie is wrong for the first statement and right for the second; pair_strict has both wrong.
"""

import csv
from io import StringIO
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.rows import read_text, unique
from fastsds.evaluation.measures import by_value, over_groups, over_items
from fastsds.evaluation.suite import Item, Suite, register
from fastsds.evaluation.suites.files import Images, find
from fastsds.evaluation.winoground import CHANCE, winoground

COLUMNS = ("Question ID", "Type", "Statement")
FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images")
PROMPT = "a photo of "


@register("mmvp")
def load(path: Path) -> Suite:
    """Pairs are read by id, whatever the order of the rows."""
    file = find(path, "Questions.csv")
    images = Images(next((p for p in (file.parent / name for name in FOLDERS) if p.is_dir()), file.parent / FOLDERS[0]))
    items, rows = [], _rows(file)
    for first in sorted(number for number in rows if number % 2):
        if first + 1 not in rows:
            raise ConfigError(f"{rows[first][0]}: question {first} has no partner {first + 1}")
        pair = [rows[first], rows.pop(first + 1)]
        (_, pattern, _), (where, other, _) = pair
        if other != pattern:
            raise ConfigError(f"{where}: Type is {other!r}, but {pattern!r} for question {first}, its partner")
        refs = [_image(images, kind, first + k, where) for k, (where, kind, _) in enumerate(pair)]
        captions = tuple(PROMPT + statement for _, _, statement in pair)
        items.append(Item(f"{first}-{first + 1}", tuple(refs), captions, {"pattern": pattern}, chosen=("images",)))
    if alone := [number for number in rows if number % 2 == 0]:
        raise ConfigError(f"{rows[alone[0]][0]}: question {alone[0]} has no partner {alone[0] - 1}")
    if not items:
        raise ConfigError(f"{file}: no questions in it")
    images.check(file)
    of, measures = [item.about["pattern"] for item in items], {}
    for name in ("pair", "pair_strict"):
        measures |= over_groups(name, of, CHANCE["image"]) | over_items(name, [True] * len(items), CHANCE["image"])
    measures |= by_value("pair", "pattern", [[pattern] for pattern in of], CHANCE["image"])
    return Suite(name="mmvp", items=items, judge=judge, measures=measures, headline=("pair/macro", "pair"), kind="pattern")


def judge(scores) -> dict:
    """Shapes: scores [N, 2 statements, 2 images] -> bool [N] each."""
    s = scores
    reference = (s[:, 0, 0] > s[:, 0, 1]) & ~(s[:, 1, 0] > s[:, 1, 1])
    return {"pair": reference, "pair_strict": winoground(s).image, "tied": (s[:, :, 0] == s[:, :, 1]).any(axis=1)}


def _rows(file: Path) -> dict[int, tuple[str, str, str]]:
    """Question id -> where it is, its pattern and its statement."""
    reader = csv.reader(StringIO(read_text(file), newline=""), strict=True)
    found, seen = {}, {}
    try:
        if tuple(cell.strip() for cell in next(reader, [])) != COLUMNS:
            raise ConfigError(f"{file}: line 1: the columns {', '.join(COLUMNS)} expected")
        for cells in reader:
            where = f"{file}: line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != 3 or not all(cell.strip() for cell in cells):
                raise ConfigError(f"{where}: {', '.join(COLUMNS)} expected, found {cells}")
            number, pattern, statement = (cell.strip() for cell in cells)
            if not number.isdecimal() or int(number) < 1:
                raise ConfigError(f"{where}: Question ID is {number!r}, expected a whole number from 1")
            unique(seen, int(number), where, "Question ID")
            found[int(number)] = (where, pattern, statement)
    except csv.Error as error:
        raise ConfigError(f"{file}: line {reader.line_num}: {error}") from error
    return found


def _image(images: Images, pattern: str, number: int, where: str):
    """Folders are named as patterns are, or with _ for a space."""
    folder = next((name for name in (pattern, pattern.replace(" ", "_")) if (images.folder / name).is_dir()), pattern)
    return images.ref(f"{folder}/{number}.jpg", where)
