"""Norms and gates of a frozen UNet, forward and backward to the input: ours, eager torch, and torch.compile of it.

SD 1.x at 64x64 latents: group norms of each level, NCHW and channels_last; the tokens of the first level in and out of a
transformer block. The percentage is of the compulsory bytes; eager's second activation is its own cost.
"""

import pytest
import torch
import torch.nn.functional as F

from fastsds import ops, testing
from fastsds.kernels import geglu, group_norm_silu, layer_norm

GPU = torch.cuda.is_available()
IMAGES = ((8, 320, 64, 64), (8, 960, 64, 64), (8, 640, 32, 32), (8, 1280, 16, 16)) if GPU else ((2, 32, 8, 8),)
TOKENS = ((8 * 4096, 320), (8 * 1024, 640)) if GPU else ((64, 32),)
PROVIDERS = pytest.mark.parametrize("provider", ("ours", "eager", "compile"))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def name(shape):
    return "x".join(map(str, shape))


def run(ours, eager, x, provider, compile_baseline, measure, size):
    """Check value and gradient, then time one forward and backward pass."""
    g = torch.randn_like(ours(x))
    found = []
    for f in (ours, eager):
        y = f(x)
        found.append((y, torch.autograd.grad(y, x, g)[0]))
    for one, other in zip(*found):
        if x.dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            testing.assert_close(one, other)
    function = {"ours": ours, "eager": eager, "compile": compile_baseline(eager) if provider == "compile" else None}[provider]
    measure(lambda: torch.autograd.grad(function(x), x, g), size)


@PROVIDERS
@DTYPES
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", IMAGES, ids=name)
def test_group_norm_silu(shape, layout, dtype, provider, device, measure, compile_baseline):
    x = testing.arrange(torch.randn(shape, device=device).to(dtype), layout).requires_grad_()
    w, b = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
    groups = 32 if GPU else 4
    size = group_norm_silu.bytes_moved(x) + group_norm_silu.bytes_moved(x, backward=True)
    run(lambda x: ops.group_norm_silu(x, w, b, groups), lambda x: F.silu(F.group_norm(x, groups, w, b)),
        x, provider, compile_baseline, measure, size)  # fmt: skip


@PROVIDERS
@DTYPES
@pytest.mark.parametrize("shape", TOKENS, ids=name)
def test_layer_norm(shape, dtype, provider, device, measure, compile_baseline):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    w, b = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
    size = layer_norm.bytes_moved(x) + layer_norm.bytes_moved(x, backward=True)
    run(lambda x: ops.layer_norm(x, w, b), lambda x: F.layer_norm(x, x.shape[-1:], w, b),
        x, provider, compile_baseline, measure, size)  # fmt: skip


@PROVIDERS
@DTYPES
@pytest.mark.parametrize("shape", TOKENS, ids=name)
def test_geglu(shape, dtype, provider, device, measure, compile_baseline):
    x = torch.randn(shape[0], 8 * shape[1], device=device).to(dtype).requires_grad_()

    def eager(x):
        h, q = x.chunk(2, -1)
        return h * F.gelu(q)

    size = geglu.bytes_moved(x) + geglu.bytes_moved(x, backward=True)
    run(ops.geglu, eager, x, provider, compile_baseline, measure, size)
