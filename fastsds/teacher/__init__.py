"""The frozen diffusion model."""

from fastsds.teacher.accelerate import accelerate_unet
from fastsds.teacher.loading import Teacher

__all__ = ["Teacher", "accelerate_unet"]
