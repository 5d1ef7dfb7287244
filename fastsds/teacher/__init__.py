"""The frozen diffusion model."""

from fastsds.teacher.accelerate import accelerate_unet
from fastsds.teacher.loading import fingerprint
from fastsds.teacher.model import Teacher

__all__ = ["Teacher", "accelerate_unet", "fingerprint"]
