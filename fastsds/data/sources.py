"""Where captioned images come from: `open_source` knows each kind by what `data.source` names."""

from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data import Source
from fastsds.data.images import Images, Listing, check_damage


def open_source(data, seed: int = 0) -> Source:
    """The source that a recipe's `data` section names.

    Args: data: a `config.DataConfig`. seed: of the captions that are drawn, and of the endless world's scenes. The first N
        scenes of the world are one data set, the same for every seed.
    Raises: ConfigError that names the file and what is wrong in it.
    """
    if data.source == "world":
        from fastsds.world.scenes import WorldSource

        return WorldSource("train", seed) if data.samples is None else WorldSource("train", 0, data.samples)
    listing = list_images(data)
    if data.samples is not None and data.samples > len(listing.names):
        raise ConfigError(f"data.samples is {data.samples}, but {data.source} has {len(listing.names)} images")
    listing = listing.first(data.samples)
    check_damage(listing, data.max_skipped, data.source)
    source = Images(listing, data.caption, seed, data.workers)
    if data.cache is not None:
        from fastsds.data.cache import PixelCache

        source.cache = PixelCache(data.cache, source.images_identity(), len(source))
    return source


def list_images(data) -> Listing:
    """The images of a file or folder. Raises: ConfigError."""
    path = Path(data.source)
    images = None if data.images is None else Path(data.images)
    if images is not None and not images.is_dir():
        raise ConfigError(f"data.images: folder {images} does not exist")
    if not path.exists():
        raise ConfigError(f"data.source: {path} does not exist")
    if path.suffix == ".tsv":
        from fastsds.data.tsv import read_tsv

        return read_tsv(path, images)
    raise ConfigError(f"data.source: {data.source!r}, expected world or a .tsv file")
