"""h_w: the linear map from an image embedding to a latent, and its file beside the CLIP's."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastsds.config import ConfigError

HEAD_FILE = "head.safetensors"


class LatentHead(nn.Module):
    """h_w: a linear map from the image embedding f to a latent, fed with f / |f| * sqrt(d).

    So its input has unit mean square whatever the backbone's scale. Shapes: [B, d] -> [B, C, h, w].
    """

    def __init__(self, width: int, latent_shape: tuple[int, int, int]):
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        self.linear = nn.Linear(width, math.prod(self.latent_shape))

    @staticmethod
    def features(f: torch.Tensor) -> torch.Tensor:
        """f / |f| * sqrt(d). Shapes: [B, d] -> [B, d]."""
        return nn.functional.normalize(f, dim=-1) * math.sqrt(f.shape[-1])

    def forward(self, f: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(f).to(self.linear.weight.dtype)).unflatten(1, self.latent_shape)

    def pull_back(self, f: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """dL/df from dL/dz, beside the graph: an engine's hooks forbid partial backward passes through its outputs.

        Shapes: f [B, d], gradient [B, C, h, w] -> [B, d]. Under ZeRO-3 collective (it gathers the weight).
        """
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            features = self.features(f)
        with _whole(self.linear.weight) as weight:
            inner = gradient.flatten(1) @ weight.detach().to(gradient.dtype)
        return torch.autograd.grad(features, f, inner.to(features.dtype))[0]


def read_head(folder: Path) -> tuple[tuple[int, ...], dict] | None:
    """The latent shape and state of a folder's head, or None. Raises: ConfigError that names the file."""
    from safetensors import SafetensorError, safe_open

    if not (path := Path(folder) / HEAD_FILE).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: truncated or damaged ({error}): copy it again") from error
    if "latent_shape" not in metadata or set(state) != {"linear.weight", "linear.bias"}:
        raise ConfigError(f"{path}: not a latent head (expected linear.weight, linear.bias and latent_shape)")
    return tuple(json.loads(metadata["latent_shape"])), state


@contextmanager
def _whole(parameter: nn.Parameter):
    """Give a parameter whole, wherever ZeRO-3 keeps its parts."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter
