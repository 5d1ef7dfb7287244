"""A Hugging Face data set on disk, its images left where they are: what `save_to_disk` wrote, or the hub's parquet files.

    FOLDER/dataset_info.json, state.json, data-*.arrow       a Dataset
    FOLDER/dataset_dict.json, test/, ...                     a DatasetDict: its split `test`
    FOLDER/data/test-*.parquet, or FOLDER/test-*.parquet     as downloaded; or one .parquet file
"""

import bisect
import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock

from fastsds.config import ConfigError
from fastsds.evaluation.suite import ImageRef


class Table:
    """Rows, and their images on request. columns: name -> values, of all columns that are no images."""

    def __init__(self, path: Path, columns: dict[str, list], images: set[str], read: Callable[[int, str], dict | None]):
        self.path, self.columns, self.images, self._read = path, columns, images, read

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def require(self, texts: tuple[str, ...], images: tuple[str, ...]) -> None:
        """Raise ConfigError if a column is missing."""
        missing = [c for c in texts if c not in self.columns] + [f"{c} (images)" for c in images if c not in self.images]
        if missing:
            there = ", ".join([*self.columns, *(f"{c} (images)" for c in sorted(self.images))])
            raise ConfigError(f"{self.path}: no column {missing[0]}; its columns: {there}")

    def row(self, k: int) -> dict:
        return {name: values[k] for name, values in self.columns.items()}

    def where(self, k: int) -> str:
        return f"{self.path}: row {k}"

    def ref(self, k: int, column: str) -> ImageRef:
        """Refer to the image in row k."""
        return ImageRef(f"{self.path}[{k}].{column}", self.where(k), partial(self._content, k, column))

    def _content(self, k: int, column: str) -> bytes:
        cell = self._read(k, column) or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if cell.get("path"):
            return Path(cell["path"]).read_bytes()
        raise OSError("no image")


def open_table(path: Path, split: str = "test") -> Table | None:
    """The table that a path holds, or None if it is none of the layouts above. Raises: ConfigError."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    if path.suffix == ".parquet":
        return _parquet(path, [path])
    files = sorted([*path.glob(f"data/{split}-*.parquet"), *path.glob(f"{split}-*.parquet")])
    return _parquet(path, files) if files else None


def _saved(path: Path, split: str) -> Table:
    datasets = _package("datasets", path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a cut file makes of it
        raise ConfigError(f"{path}: no whole data set of save_to_disk: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(f"{path}: no split {split}; its splits: {', '.join(found)}")
        found = found[split]
    images = {name for name, kind in found.features.items() if isinstance(kind, datasets.Image)}
    for name in images:
        found = found.cast_column(name, datasets.Image(decode=False))
    others = found.select_columns([name for name in found.column_names if name not in images]).with_format("arrow")[:]
    return Table(path, others.to_pydict(), images, lambda k, column: found[k][column])


def _parquet(path: Path, files: list[Path]) -> Table:
    pa, pq = _package("pyarrow", path), _package("pyarrow.parquet", path)
    try:
        opened = [pq.ParquetFile(file) for file in files]
        cells_of = {f.name: f.type for f in opened[0].schema_arrow if pa.types.is_struct(f.type)}
        images = {name for name, kind in cells_of.items() if {f.name for f in kind.fields} == {"bytes", "path"}}
        names = [name for name in opened[0].schema_arrow.names if name not in images]
        columns: dict[str, list] = {name: [] for name in names}
        for file in opened:
            for name, values in file.read(columns=names).to_pydict().items():
                columns[name] += values
    except Exception as error:  # whatever a cut file makes of it
        raise ConfigError(f"{path}: not readable as parquet: {error}") from error
    groups = [(file, g) for file in opened for g in range(file.num_row_groups)]
    ends = list(accumulate(file.metadata.row_group(g).num_rows for file, g in groups))
    lock = Lock()

    @lru_cache(maxsize=1)  # images are asked for in order
    def cells(group: int):
        file, number = groups[group]
        return file.read_row_group(number, columns=sorted(images))

    def read(k: int, column: str):
        group = bisect.bisect_right(ends, k)
        with lock:
            return cells(group)[column][k - (ends[group - 1] if group else 0)].as_py()

    return Table(path, columns, images, read)


def _package(name: str, path: Path):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{path}: reading it takes the package {name}: pip install 'fastsds[data]'") from error
