"""Disks and shared memory."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastsds.doctor.finding import GIB, NONE, OK, WARN, WRONG, Finding


def disks() -> Iterator[Finding]:
    from huggingface_hub import constants

    offline = "; HF_HUB_OFFLINE is set: nothing is fetched" if constants.HF_HUB_OFFLINE else ""
    yield folder("disk, this folder", Path.cwd(), 5 * GIB, "cd /a/larger/disk")
    yield folder("disk, temporary files", Path(tempfile.gettempdir()), GIB, "export TMPDIR=/a/larger/disk")
    hub = folder("disk, hub cache", Path(constants.HF_HUB_CACHE), 6 * GIB, "export HF_HOME=/a/larger/disk/huggingface")
    yield hub._replace(found=hub.found + offline)


def folder(name: str, path: Path, wanted: int, line: str) -> Finding:
    """Whether a folder, or the nearest that is there, can be written and has so many bytes free."""
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        return Finding(name, WRONG, f"{path} cannot be written: {error.strerror or error}", line)
    free = shutil.disk_usage(there).free
    found = f"{path}: {free / GIB:,.1f} GiB free"
    return Finding(name, OK, found) if free >= wanted else Finding(name, WARN, f"{found}, {wanted / GIB:,.0f} wanted", line)


def shared_memory(path: str = "/dev/shm", wanted: int = GIB, gpus: int | None = None) -> Iterator[Finding]:
    """NCCL passes what several GPUs of a machine exchange through it."""
    import torch

    gpus = torch.cuda.device_count() if gpus is None else gpus
    if gpus < 2:
        yield Finding("shared memory", NONE, f"{path}: needed by several GPUs, here {gpus}")
        return
    size = shutil.disk_usage(path).total if Path(path).is_dir() else 0
    found, line = f"{path}: {size / GIB:.1f} GiB", "docker run --shm-size=8g ...   # or: mount -o remount,size=8g " + path
    yield Finding("shared memory", OK if size >= wanted else WARN, found, "" if size >= wanted else line)
