"""The cross-modal student: one transformer that reads a text and a picture together, and the head that answers."""

from fastsds.crossmodal.loading import load_crossmodal, make_crossmodal
from fastsds.crossmodal.model import CrossModal, CrossModalOutput, Family
from fastsds.crossmodal.saving import read_crossmodal, save_crossmodal

__all__ = [
    "CrossModal", "CrossModalOutput", "Family", "load_crossmodal", "make_crossmodal", "read_crossmodal", "save_crossmodal",
]  # fmt: skip
