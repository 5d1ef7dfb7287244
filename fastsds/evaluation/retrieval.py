"""Recall@1 among the images, and among the captions, of one gallery."""

import numpy as np
import torch

from fastsds.data import Samples
from fastsds.evaluation.winoground import Encode

CHUNK = 256


def recall_at_1(similarity) -> tuple[np.ndarray, np.ndarray]:
    """Return (image found by each caption, caption found by each image). A tie for the first place is wrong.

    Shapes: similarity [n captions, n images], pair k on the diagonal -> bool [n], bool [n].
    """
    s = np.array(similarity, np.float64)
    if s.ndim != 2 or s.shape[0] != s.shape[1] or len(s) < 2:
        raise ValueError(f"similarity: shape [n, n] with n >= 2 expected, got {s.shape}")
    own = np.diag(s).copy()
    np.fill_diagonal(s, -np.inf)
    return own > s.max(axis=1), own > s.max(axis=0)


@torch.no_grad()
def evaluate_retrieval(encode: Encode, samples: Samples, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """Return `recall_at_1` of a gallery of captioned images with distinct captions."""
    images, texts = [], []
    for first in range(0, len(samples), chunk):
        rows = slice(first, first + chunk)
        image, text = encode(samples.pixels[rows], samples.captions[rows])
        images.append(image.double())
        texts.append(text.double())
    return recall_at_1((torch.cat(texts) @ torch.cat(images).T).cpu().numpy())
