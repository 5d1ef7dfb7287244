"""Distribution matching, forward and backward: ours, the lines that users write, and torch.compile of them."""

import pytest
import torch

from fastsds import ops, testing
from fastsds.kernels import score as kernels

ON_GPU = ((32, 4, 64, 64), (8, 4, 128, 128), (1, 21, 16, 60, 104), (64, 4, 512, 512))
SHAPES = ON_GPU if torch.cuda.is_available() else ((8, 4, 64, 64),)
PROVIDERS = ("ours", "eager", "compile")


def eager(x, real, fake):
    axes = tuple(range(1, x.ndim))
    grad = torch.nan_to_num((fake - real) / (x - real).abs().mean(dim=axes, keepdim=True))
    return 0.5 * torch.nn.functional.mse_loss(x.float(), (x - grad).detach().float())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_dmd_loss(shape, dtype, provider, device, measure, compile_baseline):
    x, real, fake = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    x.requires_grad_()
    baseline = compile_baseline(eager) if provider == "compile" else eager

    def ours(x, real, fake):
        return ops.dmd_loss(x, real, fake, nonfinite="zero")

    function = ours if provider == "ours" else baseline
    if dtype == torch.float32:
        found = [x.numel() * torch.autograd.grad(f(x, real, fake), x)[0] for f in (ours, eager)]
        testing.assert_close(*found)

    def run():
        x.grad = None
        function(x, real, fake).backward()

    # the mean reads x and real, the value real and fake, the backward pass both again
    size = 2 * kernels.bytes_moved(x, real, fake) + kernels.bytes_moved(x, real, fake, backward=True)
    measure(run, size)
