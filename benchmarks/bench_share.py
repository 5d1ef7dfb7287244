"""What share of an SDS step the noise and loss ops are: the UNet's forward pass, and the ops around it, side by side.

On a GPU: a UNet of Stable Diffusion v1's shape with random weights, bf16, 8 guided latents of 4x64x64. On the CPU: the embedded
world's UNet. The share is the second time over the sum of both.
"""

import pytest
import torch

from fastsds import ops, testing

SHAPE = (8, 4, 64, 64) if torch.cuda.is_available() else (32, 4, 8, 8)


@pytest.mark.parametrize("provider", ("unet_forward", "ours", "eager"))
def test_share_of_a_step(provider, device, measure, network):
    dtype = network.dtype
    x0 = torch.randn(SHAPE, device=device, requires_grad=True)
    both = torch.randn(2 * SHAPE[0], *SHAPE[1:], device=device, dtype=dtype)
    t, abar = torch.randint(100, 900, SHAPE[:1], device=device), testing.alphas_cumprod().to(device)
    stream = ops.Noise(0, 0, torch.arange(SHAPE[0], device=device))

    def forward():
        with torch.no_grad():
            model(both, t.repeat(2), text)

    def ours():
        x0.grad = None
        ops.add_noise(x0.detach(), t, abar, stream)
        ops.sds_loss(x0, both, stream, t, abar, guidance_scale=7.5, weighting="sigma2").backward()

    def eager():
        x0.grad = None
        a, eps = abar[t].view(-1, 1, 1, 1), torch.randn_like(x0)
        a.sqrt() * x0.detach() + (1 - a).sqrt() * eps
        uncond, cond = both.chunk(2)
        grad = (1 - a) * (uncond + 7.5 * (cond - uncond) - eps)
        (0.5 * torch.nn.functional.mse_loss(x0, (x0 - grad).detach(), reduction="sum") / len(x0)).backward()

    if provider == "unet_forward":
        model, text = network.make(), torch.randn(2 * SHAPE[0], *network.text, device=device, dtype=dtype)
    measure({"unet_forward": forward, "ours": ours, "eager": eager}[provider], 0)
