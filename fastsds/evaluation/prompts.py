"""Several phrasings of one text, as in zero-shot classification: their features averaged, or their scores.

    g_k = unit(mean over the phrasings p of text k of unit(g(p)))        of a scorer that has text features (open_clip's rule)
    S_k = mean over the phrasings p of text k of S(p, image)             of any other
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize


def pool_features(features: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Average features of phrasings. Shapes: [sum of sizes, d] -> [len(sizes), d], of unit length. Raises: ValueError."""
    return normalize(_means(normalize(features, dim=1), sizes), dim=1)


def pool_scores(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Average scores of phrasings. Shapes: [sum of sizes, images] -> [len(sizes), images]. Raises: ValueError."""
    return _means(scores, sizes)


def _means(rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    if sum(sizes) != len(rows) or min(sizes, default=0) < 1:
        raise ValueError(f"sizes: {len(rows)} phrasings in groups of at least 1 expected, got {sum(sizes)} in {len(sizes)}")
    counts = torch.tensor(sizes, device=rows.device)
    of = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), counts)
    total = torch.zeros(len(sizes), rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, of, rows)
    return total / counts[:, None]
