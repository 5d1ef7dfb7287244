"""What all tests share: one thread, so that results do not depend on the machine's load; no downloads; a clean slate."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported, and for every process a test starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def python():
    """python(*arguments, cwd=..., env={...}) runs this interpreter in a process of its own and returns what it did."""
    def run(*arguments, cwd=ROOT, env=None, timeout=900, executable=sys.executable):
        return subprocess.run([str(executable), *map(str, arguments)], cwd=cwd, env={**os.environ, **(env or {})},
                              timeout=timeout, capture_output=True, text=True)
    return run


@pytest.fixture
def poison():
    """torch.empty is filled with NaN, so an element that no kernel wrote is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """The interpreter's time goes by programs, not by elements: give large samples larger blocks there."""
    from fastsds.kernels import launch

    if launch.INTERPRETED:
        chosen = launch.block_size
        monkeypatch.setattr(launch, "block_size", lambda n: 8192 if n > 8192 else chosen(n))


@pytest.fixture(scope="session")
def tight(tmp_path_factory):
    """A DeepSpeed file with which every parameter is really partitioned, and gathered where it is used."""
    file = tmp_path_factory.mktemp("tight") / "tight.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    file.write_text(json.dumps({"zero_optimization": zero, "steps_per_print": 10**9}))
    return file
