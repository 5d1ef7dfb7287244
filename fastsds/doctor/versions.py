"""Versions, against the requirements in fastsds's own metadata."""

import importlib.metadata
import platform
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from fastsds import provenance
from fastsds.doctor.finding import NONE, OK, WRONG, Finding, pip

EXTRAS = {"data": "reads shards and Hugging Face data sets", "logs": "writes TensorBoard and Weights & Biases logs"}


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("fastsds").get("Requires-Python", "")
    found = f"{platform.python_version()}, {provenance.machine()}"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield Finding("python", OK, found)
    else:
        line = "make clean && make install PYTHON=/path/to/python3.12"
        yield Finding("python", WRONG, f"{platform.python_version()}, expected {wanted}", line)


def packages() -> Iterator[Finding]:
    """Every requirement of fastsds's metadata against what is installed."""
    from packaging.requirements import Requirement

    missing: dict[str, list[str]] = {}
    for text in importlib.metadata.requires("fastsds") or ():
        wanted = Requirement(text)
        extra = next((e for e in EXTRAS if wanted.marker and wanted.marker.evaluate({"extra": e})), None)
        needed = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if not needed and extra is None:
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if needed:
                yield Finding(wanted.name, WRONG, f"not installed, expected {wanted.specifier}", pip(wanted.name))
            else:
                missing.setdefault(extra, []).append(wanted.name)
            continue
        if wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, OK, version)
        else:
            yield Finding(wanted.name, WRONG, f"{version}, expected {wanted.specifier}", pip(wanted.name))
    for extra, names in missing.items():
        yield Finding(", ".join(names), NONE, f"not installed; {EXTRAS[extra]}: pip install 'fastsds[{extra}]'")


def kernels_folder() -> Iterator[Finding]:
    """The PyPI package `kernels`, which transformers, diffusers and bitsandbytes try to import, and our folder of that name."""
    spec = PathFinder.find_spec("kernels")  # what a first import would find
    try:
        installed = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    origin = Path(spec.origin) if spec and spec.origin else None
    if installed is None and origin is None:
        yield Finding("kernels", OK, "no package of that name hides or is hidden")
    elif installed is not None and origin is not None and origin.parent.parent == _site("kernels"):
        yield Finding("kernels", OK, f"PyPI's, {installed}")
    else:
        where = origin or ", ".join(spec.submodule_search_locations) if spec else "nowhere"
        found = f"`import kernels` finds {where}, " + (f"not PyPI's {installed}" if installed else "which is not PyPI's")
        yield Finding("kernels", WRONG, found, f"mv {where} {where}.away" if origin else pip("kernels", "--force-reinstall"))


def _site(name: str) -> Path | None:
    files = importlib.metadata.files(name) or ()
    return next((Path(f.locate()).resolve().parent.parent for f in files if f.as_posix() == f"{name}/__init__.py"), None)
