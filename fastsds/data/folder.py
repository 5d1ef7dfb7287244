"""A folder of images, at any depth, each with its captions in a file of the same name: a.jpg and a.txt, one caption a line."""

import os
from pathlib import Path

from fastsds.data.images import SUFFIXES, Listing, of_files
from fastsds.progress import watched


def read_folder(folder: Path) -> Listing:
    """The images in sorted order. Hidden files and folders are left out; links to folders are not followed."""
    names = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(where).relative_to(folder)
        names += [
            (inside / name).as_posix()
            for name in files
            if name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith(".")
        ]
    said, wrong = {}, {}
    for i, name in enumerate(watched(sorted(names), f"reading captions in {folder}")):
        sidecar = (folder / name).with_suffix(".txt")
        try:
            said[name] = sidecar.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            said[name] = []
        except UnicodeDecodeError:
            said[name], wrong[i] = [], f"{sidecar.name} is not UTF-8"
        except OSError as error:
            said[name], wrong[i] = [], f"{sidecar.name}: {error.strerror}"
    listing = of_files(folder, said)
    listing.damaged |= wrong
    return listing
