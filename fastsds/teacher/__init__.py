"""The frozen diffusion model."""

from fastsds.teacher.loading import fingerprint
from fastsds.teacher.model import Teacher

__all__ = ["Teacher", "fingerprint"]
