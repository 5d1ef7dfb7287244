"""What only a CUDA device can show: the CPU's words, graphs, and no access out of bounds. `make test-gpu` runs it."""

import shutil
import sys

import pytest
import torch

from fastsds import ops, testing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ABAR = testing.alphas_cumprod()

# one call of every kernel, odd sizes, for compute-sanitizer
EVERY_KERNEL = """
import torch
from fastsds import ops, testing
abar = testing.alphas_cumprod().cuda()
x, u, c = (torch.randn(3, 5, 7, 11, device="cuda").to(torch.bfloat16).requires_grad_() for _ in range(3))
t, noise = torch.tensor([1, 500, 998]).cuda(), ops.Noise(1, 2, [3, 4, 5]).to("cuda")
x_t, _ = ops.add_noise(x, t, abar, noise)
loss = ops.sds_loss(x, (u, c), noise, t, abar, x_t=x_t, guidance_scale=3.0, prediction_type="v", nonfinite="drop_sample")
loss = loss + ops.denoising_loss(c, noise, t, abar) + ops.dmd_loss(x, u, c) + ops.sid_loss(x, u, c)
loss = loss + ops.inject_grad(x.transpose(1, 2), u.transpose(1, 2)) + x_t.float().sum() + noise.normal(9).sum()
w = torch.randn(12, device="cuda").to(torch.bfloat16)
image = torch.randn(2, 12, 9, 7, device="cuda").to(torch.bfloat16).requires_grad_()
for v in (image, image.to(memory_format=torch.channels_last)):
    loss = loss + ops.group_norm_silu(v, w, w, 3).float().sum()
tokens = ops.layer_norm(image.flatten(2).mT, w, w)
q, k = (torch.randn(1, 2, n, 40, device="cuda").to(torch.bfloat16).requires_grad_() for n in (67, 33))
loss = loss + ops.attention(q, k, k).float().sum()
index = torch.tensor([[0, 62, -1, 5], [5, 5, 1, 2]], device="cuda")
for distance in ops.DISTANCES:
    loss = loss + ops.token_distill_loss(tokens, torch.randn(2, 63, 12, device="cuda"), index, distance=distance)
(loss + noise.uniform(9).sum() + ops.geglu(tokens).float().sum()).backward()
torch.cuda.synchronize()
"""


def step(x0, pred, ids, t, abar):
    noise = ops.Noise(3, ops.draw(ops.Purpose.NOISE, 5), ids)
    x_t, _ = ops.add_noise(x0, t, abar, noise)
    loss = ops.sds_loss(x0, pred, noise, t, abar, weighting="inverse_snr_root") + ops.dmd_loss(x0, x_t.detach(), pred)
    return loss, torch.autograd.grad(loss, x0)[0]


def inputs():
    generator = torch.Generator().manual_seed(0)
    x0, pred = (torch.randn(4, 4, 64, 64, generator=generator).cuda() for _ in range(2))
    return x0.requires_grad_(), pred, torch.arange(4).cuda(), torch.tensor([20, 300, 700, 980]).cuda(), ABAR.cuda()


@pytest.mark.parametrize("n", (1, 7, 4096, 100_003))
def test_the_stream_is_the_cpus(n):
    """Words bit for bit; normals too, because no operation in them is left to a library."""
    for seed, draw, ids in ((0, 0, [0]), (-(1 << 63), (1 << 32) - 1, [2**62, -1, 7]), (123, 1 << 28, list(range(5)))):
        noise = ops.Noise(seed, draw, ids)
        assert torch.equal(noise.to("cuda").words(n).cpu(), noise.words(n))
        assert torch.equal(noise.to("cuda").uniform(n).cpu(), noise.uniform(n))
        assert torch.equal(noise.to("cuda").normal(n).cpu(), noise.normal(n))


def test_losses_are_the_cpus():
    for ours, expected in zip(step(*inputs()), step(*(v.detach().cpu().requires_grad_(v.requires_grad) for v in inputs()))):
        testing.assert_close(ours.cpu() / expected.abs().max(), expected / expected.abs().max())


def test_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=False)  # autograd.grad inside a graph is its own break
    for ours, expected in zip(compiled(*inputs()), step(*inputs())):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_cuda_graph():
    """The whole step is captured, so nothing in it waits for the device; replayed on new data it gives new results."""
    arguments = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    for shift in (0, 1):
        with torch.no_grad():
            arguments[0].add_(shift)
            arguments[2].add_(shift)
        graph.replay()
        for ours, expected in zip(captured, step(*arguments)):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_token_distillation_in_a_graph(distance):
    """Nothing waits for the indices, and those of a replay are looked at anew; the values are the CPU's."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, n, 768, generator=generator) for n in (240, 197))
    index = torch.rand(4, 240, generator=generator).argsort(1)[:, :32] % 197
    index[:, 20:] = -1

    def distil(s, t, index):
        loss = ops.token_distill_loss(s, t, index, distance=distance)
        return loss, torch.autograd.grad(loss, s)[0]

    given = s.cuda().requires_grad_(), t.cuda(), index.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        distil(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = distil(*given)
    for _ in range(2):
        graph.replay()
        for ours, plain, expected in zip(captured, distil(*given), distil(s.requires_grad_(), t, index)):
            assert torch.equal(ours, plain)
            testing.assert_close(ours.cpu() / expected.abs().max(), expected / expected.abs().max())
        index = index.flip(1).roll(1, 0)
        given[2].copy_(index)


def test_no_access_out_of_bounds(python, root):
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    flags = ("--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
    done = python(*flags, sys.executable, "-c", EVERY_KERNEL, executable=tool, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
