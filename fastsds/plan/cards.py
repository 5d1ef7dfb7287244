"""Cards by name: memory and peak as the vendor publishes them."""

from typing import NamedTuple

FILLED = 0.92  # of a card's memory; the rest is for CUDA's context, the libraries' workspaces and what fragments. An assumption


class Card(NamedTuple):
    """memory: bytes, its GB as decimal ones; tflops: dense bf16 products with fp32 sums, no sparsity."""

    memory: float
    tflops: float


# NVIDIA's data sheets and architecture papers; where one gives the rate with sparsity, half of it
CARDS = {
    "3090": Card(24e9, 71.0),
    "4090": Card(24e9, 165.2),
    "a10": Card(24e9, 125.0),
    "l4": Card(24e9, 121.0),
    "a100-40": Card(40e9, 312.0),
    "a6000": Card(48e9, 154.8),
    "l40s": Card(48e9, 362.0),
    "a100-80": Card(80e9, 312.0),
    "h100": Card(80e9, 989.4),  # SXM
    "h200": Card(141e9, 989.4),
}
