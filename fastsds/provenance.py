"""Commit, versions and machine: what a number needs beside it."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import fastsds

PACKAGES = ("torch", "open_clip_torch", "diffusers", "transformers", "deepspeed", "bitsandbytes", "numpy")


def provenance() -> dict:
    return {"commit": commit(), "versions": versions(), "machine": machine()}


def commit() -> str:
    """The commit of the source tree, "-dirty" where it was changed; "unknown" of an installed package."""
    root = Path(fastsds.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (root / ".git").exists():  # not whatever repository an installed package happens to lie in
        return "unknown"
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """fastsds's, Python's, and those of the packages that are installed."""
    found = {"fastsds": fastsds.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def machine() -> str:
    """One line: processor, cores this process may use, memory, system."""
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory = f", {gib:.0f} GiB"
    except (OSError, ValueError):
        name, memory = None, ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name[1].strip() if name else platform.machine()}, {cores} cores{memory}, {platform.system()}"
