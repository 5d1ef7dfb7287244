"""What a check says, and the line that would mend it."""

import importlib.metadata
import sys
from pathlib import Path
from typing import NamedTuple

OK, NONE, WARN, WRONG = "ok", "-", "warn", "wrong"
GIB = 1 << 30


class Finding(NamedTuple):
    """run: the line to run, where something is wrong or may be."""

    name: str
    state: str
    found: str
    run: str = ""


def requirement(name: str):
    """fastsds's own requirement of a package, as its metadata has it."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("fastsds") or ()
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        texts = ()
    for found in map(Requirement, texts):
        if found.name.lower().replace("_", "-") == name.lower().replace("_", "-"):
            return found
    return None


def pip(name: str, *options: str) -> str:
    """The line that installs what fastsds asks for of a package."""
    if name == "fastsds":
        return f"{sys.executable} -m pip install -e {Path(__file__).resolve().parents[2]}"
    found = requirement(name)
    wanted = f"{found.name}{found.specifier}" if found else name
    return " ".join([f"{sys.executable} -m pip install", *options, f"'{wanted}'"])


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
