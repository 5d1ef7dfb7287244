"""Where captioned images come from: `open_source` knows each kind by what `data.source` names."""

import importlib.util
import re
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data import Source
from fastsds.data.images import Images, Listing, check_damage
from fastsds.data.sampler import subset

EXPECTED = (
    "expected world; a .tsv or .json file; a folder of images with their .txt; a folder of save_to_disk (datasets); shards: a "
    ".tar, a folder of .tar, folder/{00..99}.tar; or pipe:COMMAND (docs/data.md)"
)
COMPRESSED = re.compile(r"\.(?:tar\.|t)(gz|bz2|xz|zst)$")
UNPACK = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}
TAKEN = {"tsv": ("images",), "json": ("images", "split"), "saved": ("split",), "shards": (), "folder": ()}  # keys of `data`
PIPE = "pipe:"


def open_source(data, seed: int = 0) -> Source:
    """The source that a recipe's `data` section names.

    Args: data: a `config.DataConfig`. seed: of the captions that are drawn, and of the endless world's scenes. N scenes of
        the world are one data set, the same for every seed: scenes of another world for another `subset`.
    Raises: ConfigError that names the file and what is wrong in it.
    """
    if data.source == "world":
        from fastsds.world.scenes import WorldSource

        return WorldSource("train", seed) if data.samples is None else WorldSource("train", data.subset or 0, data.samples)
    if data.source.startswith(PIPE):
        _no_use_for(data, ("images", "split", "samples", "cache"), "a pipe, read in its own order,")
        _need("webdataset", data.source)
        from fastsds.data.pipe import Pipe

        source = Pipe(data.source, data.caption, seed, data.workers)
        source.walk(data.streams, seed)  # raises where there are too many streams
        return source
    listing = list_images(data)
    if data.samples is not None and data.samples > len(listing.names):
        raise ConfigError(f"data.samples is {data.samples}, but {data.source} has {len(listing.names)} images")
    if data.samples is not None:
        n = data.samples
        listing = listing.take(range(n) if data.subset is None else subset(len(listing.names), n, data.subset))
    check_damage(listing, data.max_skipped, data.source)
    source = Images(listing, data.caption, seed, data.workers)
    if data.cache is not None:
        from fastsds.data.cache import PixelCache

        source.cache = PixelCache(data.cache, source.images_identity(), len(source))
    return source


def on_disk(source: str) -> bool:
    """Whether the file, the folder or every shard that a `data.source` names is there."""
    if source.startswith(PIPE):
        return False
    if "{" not in source:
        return Path(source).exists()
    _need("webdataset", source)
    from fastsds.data.shards import expand

    return all(Path(name).exists() for name in expand(source))


def list_images(data) -> Listing:
    """The images of a file, a folder or shards. Raises: ConfigError."""
    path, images, kind = Path(data.source), None if data.images is None else Path(data.images), _kind(data.source)
    if images is not None and not images.is_dir():
        raise ConfigError(f"data.images: folder {images} does not exist")
    _no_use_for(data, [key for key in ("images", "split") if key not in TAKEN[kind]], data.source)
    if kind == "tsv":
        from fastsds.data.tsv import read_tsv

        return read_tsv(path, images)
    if kind == "json":
        from fastsds.data.coco import read_json

        return read_json(path, images, data.split)
    if kind == "saved":
        _need("datasets", data.source)
        from fastsds.data.hf import read_saved

        return read_saved(path, data.split)
    if kind == "shards":
        _need("webdataset", data.source)
        from fastsds.data.shards import expand, read_shards

        return read_shards(sorted(path.glob("*.tar")) if path.is_dir() else [Path(name) for name in expand(data.source)])
    from fastsds.data.folder import read_folder

    return read_folder(path)


def _kind(source: str) -> str:
    """Which of TAKEN a source is. Raises: ConfigError where it is none."""
    path = Path(source)
    if "://" in source:
        raise ConfigError(f"data.source: {source} is not fetched by itself; name a command that does: pipe:curl -sSf {source}")
    if found := COMPRESSED.search(source):
        raise ConfigError(
            f"data.source: {source} is compressed; expected a .tar, or a command that unpacks it: "
            f"pipe:{UNPACK[found[1]]} -dc {source}"
        )
    if path.suffix == ".tar" and "{" in source:
        return "shards"
    if not path.exists():
        raise ConfigError(f"data.source: {source} does not exist; {EXPECTED}")
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "saved"
        return "shards" if any(path.glob("*.tar")) else "folder"
    if path.suffix == ".tar":
        return "shards"
    if path.suffix in (".tsv", ".json"):
        return path.suffix[1:]
    if path.suffix == ".parquet":
        raise ConfigError(
            f"data.source: {source}: expected it as save_to_disk writes it, which can be read in any order: python -c \"import "
            f"datasets; datasets.load_dataset('parquet', data_files={source!r}, split='train').save_to_disk('FOLDER')\""
        )
    raise ConfigError(f"data.source: {source!r}; {EXPECTED}")


def _no_use_for(data, keys, what: str) -> None:
    for key in keys:
        if (value := getattr(data, key)) is not None:
            raise ConfigError(f"data.{key} is {value!r}, and {what} has no use for it; expected null")


def _need(package: str, source: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"data.source: {source} needs the package {package}: pip install 'fastsds[data]'")
