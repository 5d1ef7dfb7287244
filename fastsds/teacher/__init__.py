"""The frozen diffusion model."""

from fastsds.teacher.model import Teacher

__all__ = ["Teacher"]
