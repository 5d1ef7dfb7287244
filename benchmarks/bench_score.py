"""Score losses, forward and backward: ours by seed and by tensor, the eager reference, and torch.compile of it.

The baselines are handed a stored noise tensor, which user code keeps from the noising step; its bytes count for them and
for "ours_tensor", not for "ours_seed".
"""

import pytest
import torch

from fastsds import ops, reference, testing
from fastsds.kernels import score as kernels

ON_GPU = ((32, 4, 64, 64), (8, 4, 128, 128), (1, 21, 16, 60, 104), (64, 4, 512, 512))
SHAPES = ON_GPU if torch.cuda.is_available() else ((8, 4, 64, 64),)
PROVIDERS = ("ours_seed", "ours_tensor", "eager", "compile")
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
CASES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def factors(abar, t, count):
    alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
    one = torch.ones_like(alpha)
    return torch.stack([one, torch.zeros_like(alpha), one, sigma / alpha / count])


def eager_sds(x0, pred, eps, t, abar):
    return reference.sds_loss(x0, pred, None, eps, factors(abar, t, x0.shape[0]))


def eager_denoising(pred, eps, t, abar):
    return reference.energy(pred, None, eps, factors(abar, t, pred.shape[0]))


def inputs(shape, dtype, device):
    leaf, pred = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    t = torch.randint(100, 900, shape[:1], device=device)
    stream = ops.Noise(0, 0, torch.arange(shape[0], device=device))
    return (
        leaf.requires_grad_(),
        pred,
        t,
        testing.alphas_cumprod().to(device),
        stream,
        stream.normal(shape[1:]).to(dtype),
    )


def forward_backward(leaf, loss):
    def run():
        leaf.grad = None
        loss().backward()

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
@DTYPES
@CASES
def test_sds_loss(shape, dtype, provider, device, measure, compile_baseline):
    x0, pred, t, abar, stream, eps = inputs(shape, dtype, device)
    options = dict(weighting="inverse_snr_root")
    baseline = compile_baseline(eager_sds) if provider == "compile" else eager_sds
    losses = {
        "ours_seed": lambda: ops.sds_loss(x0, pred, stream, t, abar, **options),
        "ours_tensor": lambda: ops.sds_loss(x0, pred, eps, t, abar, **options),
        "eager": lambda: baseline(x0, pred, eps, t, abar),
        "compile": lambda: baseline(x0, pred, eps, t, abar),
    }
    gradients = []
    for name in ("ours_tensor", "eager"):
        forward_backward(x0, losses[name])()
        gradients.append(x0.grad)
    testing.assert_close(*gradients)
    stored = None if provider == "ours_seed" else eps
    size = kernels.bytes_moved(x0, pred, stored) + kernels.bytes_moved(x0, pred, stored, backward=True)
    measure(forward_backward(x0, losses[provider]), size)


@pytest.mark.parametrize("provider", PROVIDERS)
@DTYPES
@CASES
def test_denoising_loss(shape, dtype, provider, device, measure, compile_baseline):
    pred, _, t, abar, stream, eps = inputs(shape, dtype, device)
    options = dict(weighting="inverse_snr_root", reduction="batch")
    baseline = compile_baseline(eager_denoising) if provider == "compile" else eager_denoising
    losses = {
        "ours_seed": lambda: ops.denoising_loss(pred, stream, t, abar, **options),
        "ours_tensor": lambda: ops.denoising_loss(pred, eps, t, abar, **options),
        "eager": lambda: baseline(pred, eps, t, abar),
        "compile": lambda: baseline(pred, eps, t, abar),
    }
    gradients = []
    for name in ("ours_tensor", "eager"):
        forward_backward(pred, losses[name])()
        gradients.append(pred.grad)
    testing.assert_close(*gradients)
    stored = None if provider == "ours_seed" else eps
    size = kernels.bytes_moved(pred, pred, stored) + kernels.bytes_moved(pred, pred, stored, backward=True)
    measure(forward_backward(pred, losses[provider]), size)


def eager_guided(x0, both, eps, t, abar, scale):
    """As published code writes it: chunk, guide, weigh, and the detached-target trick."""
    uncond, cond = both.chunk(2)
    pred = uncond + scale * (cond - uncond)
    w = (1 - abar[t]).view(-1, *[1] * (x0.ndim - 1))
    grad = torch.nan_to_num(w * (pred - eps))
    return 0.5 * torch.nn.functional.mse_loss(x0.float(), (x0 - grad).detach().float(), reduction="sum") / len(x0)


@pytest.mark.parametrize("provider", PROVIDERS)
@DTYPES
@CASES
def test_guided_sds_loss(shape, dtype, provider, device, measure, compile_baseline):
    """The gradients are compared in fp32 alone: in half precision the baseline's trick loses most of its own."""
    x0, pred, t, abar, stream, eps = inputs(shape, dtype, device)
    both = torch.cat([pred, torch.randn_like(pred)])
    options = dict(guidance_scale=7.5, weighting="sigma2", nonfinite="clamp", value="target")
    baseline = compile_baseline(eager_guided) if provider == "compile" else eager_guided
    losses = {
        "ours_seed": lambda: ops.sds_loss(x0, both, stream, t, abar, **options),
        "ours_tensor": lambda: ops.sds_loss(x0, both, eps, t, abar, **options),
        "eager": lambda: baseline(x0, both, eps, t, abar, 7.5),
        "compile": lambda: baseline(x0, both, eps, t, abar, 7.5),
    }
    if dtype == torch.float32:
        gradients = []
        for name in ("ours_tensor", "eager"):
            forward_backward(x0, losses[name])()
            gradients.append(x0.grad)
        testing.assert_close(*gradients)
    stored = None if provider == "ours_seed" else eps
    size = kernels.bytes_moved(x0, pred, pred, stored) + kernels.bytes_moved(x0, pred, pred, stored, backward=True)
    measure(forward_backward(x0, losses[provider]), size)
