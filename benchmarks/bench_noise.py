"""Noise injection: ours by seed and by tensor, the eager reference, and torch.compile of it.

The baselines draw `torch.randn_like`, as user code does. Their compulsory bytes are those of the work asked for, x0 in and
x_t out, so that GB/s compare; the noise tensor they write and read back is their own cost.
"""

import pytest
import torch

from fastsds import ops, reference, testing
from fastsds.kernels import noise as kernels

ON_GPU = ((32, 4, 64, 64), (8, 4, 128, 128), (1, 21, 16, 60, 104), (64, 4, 512, 512))
SHAPES = ON_GPU if torch.cuda.is_available() else ((8, 4, 64, 64),)
PROVIDERS = ("ours_seed", "ours_tensor", "eager", "compile")


def eager(x0, t, abar):
    eps = torch.randn_like(x0)
    return reference.add_noise(x0, eps, abar[t].sqrt(), (1 - abar[t]).sqrt()), eps


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_add_noise(shape, dtype, provider, device, measure, compile_baseline):
    x0 = torch.randn(shape, device=device).to(dtype)
    t = torch.randint(0, 1000, shape[:1], device=device)
    abar = testing.alphas_cumprod().to(device)
    stream = ops.Noise(0, 0, torch.arange(shape[0], device=device))
    eps = stream.normal(shape[1:])
    expected = reference.add_noise(x0, eps, abar[t].sqrt(), (1 - abar[t]).sqrt())
    testing.assert_close(ops.add_noise(x0, t, abar, stream)[0], expected)
    eps = eps.to(dtype)
    baseline = compile_baseline(eager) if provider == "compile" else eager
    function = {
        "ours_seed": lambda: ops.add_noise(x0, t, abar, stream),
        "ours_tensor": lambda: ops.add_noise(x0, t, abar, eps),
        "eager": lambda: baseline(x0, t, abar),
        "compile": lambda: baseline(x0, t, abar),
    }[provider]
    measure(function, kernels.bytes_moved(x0, eps if provider == "ours_tensor" else None))


@pytest.mark.parametrize("provider", ("ours", "randn"))
def test_normal(provider, device, measure):
    """The stream alone, beside torch's own generator."""
    shape = (4, 64, 64)
    stream = ops.Noise(0, 0, torch.arange(32, device=device))
    out = torch.empty(32, *shape, device=device)
    function = {"ours": lambda: stream.normal(shape), "randn": lambda: out.normal_()}[provider]
    measure(function, out.numel() * 4)
