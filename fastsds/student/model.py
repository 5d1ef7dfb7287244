"""The student: a CLIP and the latent head h_w behind one forward.

The CLIP has a one-element `logit_scale` (DeepSpeed cannot shard a 0-dim one); what is saved has the form that its
library writes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastsds.student.head import LatentHead

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own limit


class StudentOutput(NamedTuple):
    """What one forward returns, in fp32 unless the student is fp64. Fields of an absent input are None.

    Shapes: image_raw [B, d] as the image tower gives it, image [B, d] and text [N, d] of unit length,
    z [B, C, h, w] = h_w(image_raw) or None without a head, logit_scale 0-dim (already exponentiated).
    """

    image_raw: torch.Tensor | None
    image: torch.Tensor | None
    text: torch.Tensor | None
    z: torch.Tensor | None
    logit_scale: torch.Tensor


@dataclass
class Family:
    """What differs between the libraries that a CLIP may come from. One for each: openclip.py, hf.py.

    where: how an error calls this student. config: the configuration file of its folder. tokenizer: captions -> int64
    [N, context_length], the end token kept; None on the meta device. scalar: the shape of `logit_scale` in its files.
    """

    where: str
    config: dict
    tokenizer: Callable[[list[str]], torch.Tensor] | None
    image_size: int
    width: int
    context_length: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scalar: tuple[int, ...] = ()
    loads = "open_clip local-dir:"  # how the library itself reads what is saved

    def encode_image(self, clip: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Shapes: normalised [B, 3, S, S] -> [B, d], of any length."""
        raise NotImplementedError

    def encode_text(self, clip: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Shapes: [N, L] -> [N, d], of any length."""
        raise NotImplementedError

    def pooling(self, clip: nn.Module) -> tuple[int | None, int | None, Callable | None]:
        """(entries of the token embedding, the tokenizer's end token, tokens [N, L] -> the position [N] that is pooled).

        None for what this text tower does not have.
        """
        raise NotImplementedError

    def checkpoint(self, clip: nn.Module) -> None:
        """Keep the inputs of the towers' blocks alone, and run each again in the backward pass. Raises: ConfigError."""
        raise NotImplementedError

    def save(self, out: Path) -> None:
        """Write everything but the weights into a folder: configuration and tokenizer files."""
        raise NotImplementedError


class Normalise:
    """(pixels / 255 - mean) / std of uint8 pixels, in at least fp32, rounded once to the dtype asked for."""

    def __init__(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]):
        self.size, self.mean, self.std = size, mean, std
        self._statistics: dict = {}

    def __call__(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Shapes: uint8 [B, 3, S, S] -> [B, 3, S, S]. Raises: ValueError for another shape or dtype."""
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (3, self.size, self.size):
            found = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"pixels: {found}, expected uint8 [B, 3, {self.size}, {self.size}]")
        wide = torch.promote_types(dtype, torch.float32)
        if (key := (pixels.device, wide)) not in self._statistics:
            self._statistics[key] = tuple(
                torch.tensor(v, dtype=wide, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
            )
        mean, std = self._statistics[key]
        return ((pixels.to(wide) / 255 - mean) / std).to(dtype)


class Student(nn.Module):
    """CLIP and head behind one forward, so that a sharding engine can call them: `engine(pixels, tokens)`.

    BatchNorm statistics and dropout stay frozen: a step must not depend on how a batch is cut.
    """

    def __init__(self, clip: nn.Module, family: Family, latent_shape: tuple[int, int, int] | None = None):
        super().__init__()
        self.clip, self.family = clip, family
        clip.forward = partial(_towers, clip, family)
        self.image_size, self.width, self.context_length = family.image_size, family.width, family.context_length
        self.head = LatentHead(self.width, latent_shape) if latent_shape is not None else None
        self._normalise = Normalise(family.image_size, family.mean, family.std)
        if getattr(clip, "logit_bias", None) is not None:  # a constant bias does not change a softmax
            clip.logit_bias.requires_grad_(False)
        for module in clip.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _freeze_statistics(module)
        drop_dropout(clip)

    @property
    def latent_shape(self) -> tuple[int, int, int] | None:
        return self.head.latent_shape if self.head is not None else None

    def train(self, mode: bool = True) -> "Student":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(pixels / 255 - mean) / std, in the dtype of the weights. Shapes: uint8 [B, 3, S, S] -> [B, 3, S, S]."""
        return self._normalise(pixels, self.clip.logit_scale.dtype)

    def forward(self, pixels: torch.Tensor | None = None, tokens: torch.Tensor | None = None) -> StudentOutput:
        """Shapes: pixels uint8 [B, 3, S, S] or None, tokens int64 [N, L] or None -> StudentOutput."""
        image = text = z = None
        images = None if pixels is None else self.normalise(pixels)
        raw, raw_text, scale = self.clip(images, tokens)
        if raw is not None:
            image = nn.functional.normalize(raw, dim=-1)
            if self.head is not None:
                z = at_least_fp32(self.head(raw))
        if raw_text is not None:
            text = nn.functional.normalize(raw_text, dim=-1)
        return StudentOutput(raw, image, text, z, scale)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids, cut to the context length with the end token kept. Shapes: [N] strings -> int64 [N, L]."""
        return self.family.tokenizer(list(captions))


def _towers(clip: nn.Module, family: Family, images: torch.Tensor | None, tokens: torch.Tensor | None):
    """What the student's `clip(images, tokens)` does: raw features of both towers, and the logit scale.

    It goes through the module's own call, for ZeRO-3 gathers a module's parameters around that and nothing else.
    """
    image = None if images is None else at_least_fp32(family.encode_image(clip, images))
    text = None if tokens is None else at_least_fp32(family.encode_text(clip, tokens))
    scale = at_least_fp32(clip.logit_scale).clamp(max=MAX_LOGIT_SCALE).exp().reshape(())
    return image, text, scale


def drop_dropout(model: nn.Module) -> None:
    """Make every dropout of a model keep everything: in a module, in a function that attention calls, of a whole block."""
    for module in model.modules():
        for name in ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _freeze_statistics(norm: nn.Module) -> None:
    """Let a BatchNorm of frozen statistics run where an engine made its affine parameters bf16 and left these in fp32."""
    if type(norm).forward is nn.modules.batchnorm._BatchNorm.forward:
        norm.forward = partial(_frozen_norm, norm)
    else:  # a class with more in its forward: its statistics are rounded, too
        norm.register_forward_pre_hook(_round_statistics)


def _frozen_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, var = norm.running_mean, norm.running_var
    affine = (None if p is None else p.to(mean.dtype) for p in (norm.weight, norm.bias))
    return nn.functional.batch_norm(x, mean, var, *affine, training=False, eps=norm.eps)


def _round_statistics(norm: nn.Module, _) -> None:
    for statistic in (norm.running_mean, norm.running_var) if norm.affine else ():
        statistic.data = statistic.data.to(norm.weight.dtype)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
