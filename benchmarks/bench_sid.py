"""Score identity distillation, forward and backward: ours, the lines that users write, and torch.compile of them."""

import pytest
import torch

from fastsds import ops, testing
from fastsds.kernels import sid as kernels

ON_GPU = ((32, 4, 64, 64), (8, 4, 128, 128), (1, 21, 16, 60, 104), (64, 4, 512, 512))
SHAPES = ON_GPU if torch.cuda.is_available() else ((8, 4, 64, 64),)
PROVIDERS = ("ours", "eager", "compile")


def eager(x, real, fake):
    axes = tuple(range(1, x.ndim))
    weight = (x - real).abs().mean(dim=axes, keepdim=True).clamp(min=1e-5).detach()
    return ((real - fake) * ((real - x) - (real - fake)) / weight).sum()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_sid_loss(shape, dtype, provider, device, measure, compile_baseline):
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
    baseline = compile_baseline(eager) if provider == "compile" else eager
    function = ops.sid_loss if provider == "ours" else baseline
    if dtype == torch.float32:
        for ours, theirs in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (ops.sid_loss, eager))):
            testing.assert_close(ours, theirs)

    def run():
        for leaf in leaves:
            leaf.grad = None
        function(*leaves).backward()

    itemsize = leaves[0].element_size()
    weight = 2 * leaves[0].numel() * itemsize  # x and real, once more, for the mean
    measure(run, weight + kernels.bytes_moved(*leaves) + kernels.bytes_moved(*leaves, backward=True))
