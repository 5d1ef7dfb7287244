"""Least squares from samples that come batch by batch: sums in float64 that are kept on disk, and their solution."""

import contextlib
import json
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.durable import sync

NAMES = ("xx", "xy", "yy")


class Singular(ValueError):
    """The samples do not determine the solution."""


class Sums:
    """The normal equations of y ~ [x 1] B.

    Shapes: xx [d + 1, d + 1] and xy [d + 1, m] are sums of [x 1]^T [x 1] and [x 1]^T y, yy [m] of y^2; all float64.
    Numerics: the order of the samples and the cut into batches are the order of summation, and that is all they change.
    """

    def __init__(self, width: int, outputs: int, device: torch.device | str = "cpu"):
        for name, shape in zip(NAMES, ((width + 1, width + 1), (width + 1, outputs), (outputs,)), strict=True):
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=device))

    @property
    def count(self) -> int:
        """How many samples."""
        return round(self.xx[-1, -1].item())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add samples. Shapes: x [b, d], y [b, m]."""
        x, y = torch.nn.functional.pad(x.double(), (0, 1), value=1.0), y.double()
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy.add_((y * y).sum(dim=0))

    def solve(self, ridge: float) -> torch.Tensor:
        """The B that minimises 1/N sum |[x 1] B - y|^2 + ridge |B without its last row|^2. Shapes: -> [d + 1, m].

        Raises: Singular.
        """
        a = self.xx / self.count
        a.diagonal()[:-1] += ridge
        values = torch.linalg.eigvalsh(a)
        if values[0] <= values[-1] * len(a) * torch.finfo(a.dtype).eps:
            raise Singular
        return torch.linalg.solve(a, self.xy / self.count)

    def r2(self, solution: torch.Tensor) -> float:
        """1 - (sum of squared residuals) / (sum of squares about these samples' own mean), over all outputs."""
        residual = self.yy.sum() - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        return float(1 - residual / (self.yy - self.xy[-1] ** 2 / self.count).sum())


def write(path: Path, about: dict, sums: dict[str, Sums], cursors: torch.Tensor) -> None:
    """Write sums, what they are of, and where the data go on, whole or not at all. Raises: ConfigError that names the file."""
    from safetensors.torch import save

    tensors = {f"{part}.{name}": getattr(of, name).cpu() for part, of in sums.items() for name in NAMES} | {"cursors": cursors}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(tensors, {"about": json.dumps(about)}))
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(f"{path}: cannot be written: {error}") from error


def take_up(path: Path, about: dict, sums: dict[str, Sums]) -> tuple[str | None, torch.Tensor | None]:
    """Put what was written into `sums`, if it is of the same. Returns: (why not, None), or (None, where the data go on)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said, asked = json.loads((file.metadata() or {})["about"]), json.loads(json.dumps(about))
            for key in {**asked, **said}:
                if said.get(key) != asked.get(key):
                    return f"it is of another {key}", None
            cursors = file.get_tensor("cursors")
            found = {(part, name): file.get_tensor(f"{part}.{name}") for part in sums for name in NAMES}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return f"it cannot be read: {error}", None
    for (part, name), tensor in found.items():
        getattr(sums[part], name).copy_(tensor)
    return None, cursors
