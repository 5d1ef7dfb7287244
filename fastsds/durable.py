"""What is on disk stays there."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file, or a folder, which makes a rename in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
