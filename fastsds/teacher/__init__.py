"""The frozen diffusion model."""

from fastsds.teacher.loading import Teacher

__all__ = ["Teacher"]
