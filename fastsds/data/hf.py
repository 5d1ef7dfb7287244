"""A Hugging Face data set as `save_to_disk` writes it: memory-mapped, an image's bytes read when they are asked for.

    FOLDER/dataset_info.json, state.json, data-*.arrow      a Dataset
    FOLDER/dataset_dict.json, train/, ...                   a DatasetDict; `data.split` names one, else "train" or the only one

The images are the first column of the type Image; the captions are the first of `caption`, `captions`, `text`, `sentences`,
`title`: a text, or a list of texts.
"""

from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.images import Listing, texts
from fastsds.progress import watched

CAPTIONS = ("caption", "captions", "text", "sentences", "title")
ROWS = 10_000  # read at a time: of images their length alone


def read_saved(folder: Path, split: str | None = None) -> Listing:
    """The rows, in order. Captions are held in memory; images are not. Raises: ConfigError that names the columns."""
    import datasets
    import pyarrow.compute as pc

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"data.source: {folder} is no whole data set of save_to_disk: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        split = split or ("train" if len(found) != 1 else next(iter(found)))
        if split not in found:
            raise ConfigError(f"data.source: {folder} has no split {split}; data.split may be {', '.join(found)}")
        found = found[split]
    elif split is not None:
        raise ConfigError(f"data.source: {folder} is one split, and data.split is {split!r}; expected null")
    image = next((name for name, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
    caption = next((name for name in CAPTIONS if name in found.features), None)
    if image is None or caption is None:
        wanted = "of the type Image" if image is None else f"named {', '.join(CAPTIONS)}"
        columns = ", ".join(f"{name} ({_kind(kind)})" for name, kind in found.features.items())
        raise ConfigError(f"data.source: {folder} has no column {wanted}; its columns: {columns}")
    rows = found.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    sizes, captions, damaged = [], [], {}
    for first in watched(range(0, len(rows), ROWS), f"reading captions in {folder}, {ROWS:,} rows at a time"):
        table = rows.with_format("arrow")[first : first + ROWS]
        lengths = pc.binary_length(pc.struct_field(table[image], "bytes"))  # from where each begins: no image is read
        for length, said in zip(lengths.to_pylist(), table[caption].to_pylist(), strict=True):
            if length is None:
                damaged[len(sizes)] = "no image in it"
            sizes.append(length or 0)
            try:
                captions.append(texts(said))
            except ValueError as error:
                raise ConfigError(f"data.source: {folder}: row {len(captions)}: {caption}: {error}") from None
    images = rows.select_columns([image])
    return Listing([f"row {i}" for i in range(len(rows))], captions, sizes, lambda i: images[i][image]["bytes"], damaged)


def _kind(feature) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__
