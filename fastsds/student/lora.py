"""LoRA (arXiv 2106.09685): a frozen matrix W is used as W + alpha / r * B A, and B, A train.

A parametrization of torch: it sits in front of whatever reads the weight, so it serves Linear, convolutions, attention's
in_proj_weight and bare matrices alike, and the gradient of a matrix is made whole before it becomes those of B and A: the
optimizer's state is LoRA's, the time of a step is full fine-tuning's.
"""

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastsds.config import ConfigError, LoRAConfig

MARK = ".parametrizations."
FACTORS = (".0.A", ".0.B")
CLOSE = 1e-5  # relative: a product of two matrices on another machine


class LowRank(nn.Module):
    """W + scale * B A, where W's first dimension is kept and the others are one.

    Shapes: W [o, ...] of n * o elements; A [r, n], B [o, r]. B starts at zero, A uniform in +-1 / sqrt(n).
    """

    def __init__(self, weight: torch.Tensor, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        rows, columns, bound = weight.shape[0], weight[0].numel(), 1 / math.sqrt(weight[0].numel())
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(a.to(weight))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return merged(weight, self.A, self.B, self.scale)


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B A in at least fp32, rounded once. Shapes: weight [o, ...], a [r, n], b [o, r] -> [o, ...]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
        return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide)).view(weight.shape)).to(weight.dtype)


def insert(clip: nn.Module, names: list[str], config: LoRAConfig, seed: int) -> None:
    """Put a low-rank term in front of each named parameter of a module."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        path, _, tensor = name.rpartition(".")
        module = clip.get_submodule(path)
        term = LowRank(getattr(module, tensor), config.rank, config.alpha / config.rank, generator)
        parametrize.register_parametrization(module, tensor, term)


def is_factor(name: str) -> bool:
    return MARK in name and name.endswith(FACTORS)


def merge(student: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A student's state under the names that it has without LoRA, every product added to its matrix."""
    state = dict(state)
    for path, plain, term in _terms(student):
        a, b = (state.pop(path + factor) for factor in FACTORS)
        state[plain] = merged(state.pop(f"{path}.original"), a, b, term.scale)
    return state


def split(student: nn.Module, state: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The inverse of `merge` for a state that has the factors, too: the matrices are the student's own, bit for bit.

    Raises: ConfigError that begins with `where`, unless they are what the saved ones were made of.
    """
    state, own = dict(state), student.state_dict()
    for path, plain, term in _terms(student):
        if lacking := [name for name in (plain, *(path + factor for factor in FACTORS)) if name not in state]:
            raise ConfigError(f"{where}: tensor {lacking[0]} is missing")
        whole, original = state.pop(plain), own[f"{path}.original"]
        again = merged(original.cpu(), *(state[path + factor] for factor in FACTORS), term.scale)
        if whole.shape != again.shape or not torch.allclose(whole, again, rtol=CLOSE, atol=CLOSE * float(again.abs().max())):
            raise ConfigError(f"{where}: {plain} did not start from the weights that student.model has now")
        state[f"{path}.original"] = original
    return state


def _terms(student: nn.Module):
    """(the path of a parametrization, the parameter's name without it, its LowRank)."""
    for path, module in student.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            yield path, path.replace(MARK, "."), module[0]
