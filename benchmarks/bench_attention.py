"""Attention at the shapes of SD 1.x's UNet, forward alone and with the gradients of q, k and v: every backend beside ours.

Eight heads of 40, 80 and 160 at 64x64 latents, self and cross (77 tokens), a batch of 8, as the linears lay them out. A
backend is timed after it was found right (`fastsds.teacher.probe`); one that has no operator is skipped with the reason.
TFLOP/s count each product once, without padding or recomputation: 2 forward, 5 backward. On the CPU ours is the twin.
"""

import dataclasses

import pytest
import torch

from fastsds.kernels import attention
from fastsds.teacher.probe import BACKENDS, Shape, probe

GPU = torch.cuda.is_available()
LEVELS = ((40, 4096), (80, 1024), (160, 256), (160, 64)) if GPU else ((40, 64), (80, 16))
BATCH, HEADS = (8, 8) if GPU else (1, 2)
SHAPES = [(HEADS, d, queries, keys) for d, queries in LEVELS for keys in (queries, 77)]
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


@pytest.mark.parametrize("provider", BACKENDS)
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("passes", ("forward", "both"))
def test_attention(shape, passes, dtype, provider, device, measure, benchmark):
    backend, shape, backward = BACKENDS[provider], Shape(*shape), passes == "both"
    if provider == "fastsds":
        backend = dataclasses.replace(backend, devices=("cuda", "cpu"))
    found = probe(backend, shape, BATCH, torch.device(device), dtype)
    if found.reason is not None:
        (pytest.fail if found.reason.startswith("wrong") else pytest.skip)(found.reason)
    leaves = [
        torch.randn(BATCH, n, shape.heads * shape.head_dim, device=device).to(dtype).requires_grad_(backward)
        for n in (shape.queries, shape.keys, shape.keys)
    ]
    g = torch.randn_like(leaves[0])

    def heads():
        return [x.unflatten(2, (shape.heads, -1)).transpose(1, 2) for x in leaves]

    def forward():
        return backend.attend(*heads()).transpose(1, 2).flatten(2)

    q, k, _ = heads()
    counted = (False, True) if backward else (False,)
    measure(
        (lambda: torch.autograd.grad(forward(), leaves, g)) if backward else forward,
        sum(attention.bytes_moved(q, k, backward=b) for b in counted),
    )
    if not benchmark.disabled:
        info = benchmark.extra_info
        seconds = info["device_ms"]["median"] * 1e-3 if GPU else benchmark.stats.stats.median
        info["tflop_per_s"] = sum(attention.flops(q, k, backward=b) for b in counted) * 1e-12 / seconds
        info["saved_bytes"] = found.saved_bytes
