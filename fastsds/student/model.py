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

    def save(self, out: Path) -> None:
        """Write everything but the weights into a folder: configuration and tokenizer files."""
        raise NotImplementedError


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
        self._statistics: dict = {}
        if getattr(clip, "logit_bias", None) is not None:  # a constant bias does not change a softmax
            clip.logit_bias.requires_grad_(False)

    @property
    def latent_shape(self) -> tuple[int, int, int] | None:
        return self.head.latent_shape if self.head is not None else None

    def train(self, mode: bool = True) -> "Student":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
                module.eval()
        return self

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(pixels / 255 - mean) / std, in the dtype of the weights. Shapes: uint8 [B, 3, S, S] -> [B, 3, S, S]."""
        expected = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"pixels: {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [B, 3, {expected[1]}, {expected[2]}]"
            )
        dtype = self.clip.logit_scale.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if (key := (pixels.device, wide)) not in self._statistics:
            self._statistics[key] = tuple(
                torch.tensor(v, dtype=wide, device=pixels.device).view(1, 3, 1, 1)
                for v in (self.family.mean, self.family.std)
            )
        mean, std = self._statistics[key]
        return ((pixels.to(wide) / 255 - mean) / std).to(dtype)

    def forward(self, pixels: torch.Tensor | None = None, tokens: torch.Tensor | None = None) -> StudentOutput:
        """Shapes: pixels uint8 [B, 3, S, S] or None, tokens int64 [N, L] or None -> StudentOutput."""
        image = text = z = None
        images = None if pixels is None else self.normalise(pixels)
        raw, raw_text, scale = self.clip(images, tokens)
        if raw is not None:
            image = nn.functional.normalize(raw, dim=-1)
            if self.head is not None:
                z = _at_least_fp32(self.head(raw))
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
    image = None if images is None else _at_least_fp32(family.encode_image(clip, images))
    text = None if tokens is None else _at_least_fp32(family.encode_text(clip, tokens))
    scale = _at_least_fp32(clip.logit_scale).clamp(max=MAX_LOGIT_SCALE).exp().reshape(())
    return image, text, scale


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
