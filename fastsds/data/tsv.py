"""open_clip's table: tab-separated, with the columns `filepath` and `title`, one image and one caption a row."""

import csv
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.images import Listing, of_files

COLUMNS = ("filepath", "title")


def read_tsv(path: Path, images: Path | None = None) -> Listing:
    """Rows that name one file are one image with several captions. Paths are relative to `images`, or to the table's folder.

    Raises: ConfigError that names file, row and column.
    """
    folder = path.parent if images is None else images
    said: dict[str, list[str]] = {}
    read = 0  # lines, of whole rows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            header = next(reader, [])
            if missing := [c for c in COLUMNS if header.count(c) != 1]:
                raise ConfigError(
                    f"{path}: row 1: column {missing[0]} expected once in a tab-separated header `filepath<TAB>title`, "
                    f"found {header}"
                )
            at, title = (header.index(c) for c in COLUMNS)
            read = reader.line_num
            for cells in reader:
                read = reader.line_num
                if not cells:
                    continue
                row = f"{path}: row {read}"
                if len(cells) != len(header):
                    raise ConfigError(f"{row}: {len(cells)} columns, expected {len(header)} (tab-separated)")
                if not (name := cells[at].strip()):
                    raise ConfigError(f"{row}: column filepath is empty")
                said.setdefault(name, [])
                if caption := cells[title].strip():
                    said[name].append(caption)
    except csv.Error as error:
        hint = 'a title that begins with a quotation mark is quoted whole, "" for each in it'
        raise ConfigError(f"{path}: row {read + 1}: not tab-separated: {error}; {hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return of_files(folder, said)
