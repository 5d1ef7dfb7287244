"""Noise injection: forward and gradients against a float64 oracle, and what the counter-based noise promises."""

import pytest
import torch

from fastsds import ops, reference, testing
from fastsds.kernels import launch
from fastsds.kernels import noise as noise_kernels

ABAR = testing.alphas_cumprod()
pytestmark = pytest.mark.usefixtures("poison", "few_programs")
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")


def sample(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, eps, g = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    t = torch.randint(0, 1000, shape[:1], generator=generator).to(device)
    return x, eps, g, t


def stream(batch, device="cpu", seed=7):
    return ops.Noise(seed, ops.draw(ops.Purpose.NOISE, 3), torch.arange(batch) * 1000 + 2**33).to(device)


def eager(x0, eps, t, upstream):
    """What a user writes, in x0's dtype: x_t and the gradients of x0 and eps."""
    abar = ABAR.to(x0.device, x0.dtype)[t]
    alpha, sigma = (v.view(-1, *[1] * (x0.ndim - 1)) for v in (abar.sqrt(), (1 - abar).sqrt()))
    return alpha * x0 + sigma * eps, alpha * upstream, sigma * upstream


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape, layout", testing.CASES)
@pytest.mark.parametrize("seeded", (True, False))
def test_against_float64(shape, layout, dtype, seeded, device):
    x, eps, g, t = sample(shape, dtype, device)
    noise = stream(shape[0], device) if seeded else testing.arrange(eps, layout).requires_grad_()
    eps = noise.normal(shape[1:]) if seeded else eps
    x0 = testing.arrange(x, layout).requires_grad_()
    x_t, returned = ops.add_noise(x0, t, ABAR.to(device), noise)
    assert x_t.dtype == dtype and x_t.stride() == torch.empty_like(x0).stride()
    assert returned is None if seeded else returned is noise
    x_t.backward(g)
    oracle = eager(x.double(), eps.double(), t, g.double())
    theirs = eager(x, eps.to(dtype), t, g)
    testing.assert_twice_eager(x_t, theirs[0], oracle[0], dtype, "x_t")
    testing.assert_twice_eager(x0.grad, theirs[1], oracle[1], dtype, "dx0")
    if not seeded:
        testing.assert_twice_eager(noise.grad, theirs[2], oracle[2], dtype, "deps")


def test_reference_gradcheck():
    x, eps, _, t = (v.double() if v.is_floating_point() else v for v in sample((2, 3, 2, 2)))
    alpha, sigma = ABAR.double()[t].sqrt(), (1 - ABAR.double()[t]).sqrt()
    inputs = (x.requires_grad_(), eps.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: reference.add_noise(a, b, alpha, sigma), inputs)
    assert torch.autograd.gradcheck(lambda a, b: ops.add_noise(a, t, ABAR, b)[0], inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: ops.add_noise(a, t, ABAR, b)[0], inputs)


@pytest.mark.parametrize("device", testing.devices())
def test_layout_batch_and_block_do_not_matter(device, monkeypatch):
    shape = (3, 5, 7, 11)
    x, _, _, t = sample(shape, device=device)
    abar, noise = ABAR.to(device), stream(3, device)
    whole = ops.add_noise(x, t, abar, noise)[0]
    for layout in testing.LAYOUTS:
        assert torch.equal(ops.add_noise(testing.arrange(x, layout), t, abar, noise)[0], whole)
    permuted = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(ops.add_noise(permuted, t, abar, noise)[0], whole)
    order = torch.tensor([2, 0, 1], device=device)
    shuffled = ops.Noise(noise.seed, noise.draw, noise.sample_ids[order])
    assert torch.equal(ops.add_noise(x[order], t[order], abar, shuffled)[0], whole[order])
    for i in range(3):
        alone = ops.Noise(noise.seed, noise.draw, noise.sample_ids[i : i + 1])
        assert torch.equal(ops.add_noise(x[i : i + 1], t[i : i + 1], abar, alone)[0], whole[i : i + 1])
    for block in (128, 512):
        monkeypatch.setattr(launch, "block_size", lambda n, block=block: block)
        assert torch.equal(ops.add_noise(x, t, abar, noise)[0], whole)


@pytest.mark.parametrize("device", testing.devices())
def test_noise_is_recovered(device):
    """At alpha 0, sigma 1, x_t is the stream itself; a visit a sample is a draw a sample."""
    x, _, _, t = sample((3, 5, 7, 11), device=device)
    noise = stream(3, device)
    assert torch.equal(ops.add_noise(x, t, (0.0, 1.0), noise)[0], noise.normal((5, 7, 11)))
    visits = torch.tensor([4, 0, 9], device=device)
    mixed = ops.Noise(1, ops.draw(ops.Purpose.NOISE, visits), noise.sample_ids)
    x_t = ops.add_noise(x, t, (0.0, 1.0), mixed)[0]
    for i, visit in enumerate(visits.tolist()):
        alone = ops.Noise(1, ops.draw(ops.Purpose.NOISE, visit), noise.sample_ids[i : i + 1])
        assert torch.equal(x_t[i], alone.normal((5, 7, 11))[0])


def test_default_is_randn_like():
    x, _, _, t = sample((2, 4, 8, 8))
    torch.manual_seed(5)
    x_t, eps = ops.add_noise(x, t, ABAR)
    torch.manual_seed(5)
    assert torch.equal(eps, torch.randn_like(x))
    testing.assert_close(x_t, eager(x, eps, t, x)[0])
    drawn = [ops.add_noise(x, t, ABAR, generator=torch.Generator().manual_seed(1))[1] for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("noise_dtype", (*testing.DTYPES, torch.float64))
def test_each_gradient_in_its_own_dtype(noise_dtype, dtype, device):
    """The gradient of the noise is rounded to the noise's dtype alone, whatever x0's is."""
    x, eps, g, t = sample((3, 5, 7, 11), device=device)
    x0, noise, g = x.to(dtype).requires_grad_(), eps.to(noise_dtype).requires_grad_(), g.to(dtype)
    x_t = ops.add_noise(x0, t, ABAR.to(device), noise)[0]
    x_t.backward(g)
    assert x_t.dtype == x0.grad.dtype == dtype and noise.grad.dtype == noise_dtype
    oracle = eager(x0.detach().double(), noise.detach().double(), t, g.double())
    for ours, exact in zip((x_t.detach(), x0.grad, noise.grad), oracle):
        limit = torch.finfo(ours.dtype).eps * exact.abs() + 1e-6
        assert ((ours.double() - exact).abs() <= limit).all()


def test_levels_made_in_inference_mode():
    x, eps, g, t = sample((2, 3, 4, 4))
    with torch.inference_mode():
        abar, levels = ABAR.clone(), (torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))
    for schedule in (abar, levels):
        x0, noise = x.clone().requires_grad_(), eps.clone().requires_grad_()
        ops.add_noise(x0, t, schedule, noise)[0].backward(g)
        ops.denoising_loss(noise, stream(2), t, schedule).backward()
    assert torch.equal(x0.grad, levels[0].view(2, 1, 1, 1) * g)
    with torch.inference_mode():
        made = eps.clone()
    assert ops.add_noise(x0, t, ABAR, made)[1] is made


def test_float64_stays_float64():
    x, eps, _, t = sample((2, 4, 8, 8), torch.float64)
    oracle = eager(x, eps, t, x)[0]
    x_t = ops.add_noise(x, t, ABAR, eps)[0]
    assert x_t.dtype == torch.float64 and (x_t - oracle).abs().max() < 1e-7
    noise = stream(2)
    x_t = ops.add_noise(x, t, ABAR.double(), noise)[0]
    abar = ABAR.double()[t].view(-1, 1, 1, 1)
    assert (x_t - (abar.sqrt() * x + (1 - abar).sqrt() * noise.normal((4, 8, 8)))).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_keeps_the_schedule(dtype):
    """sigma(0) and neighbouring timesteps survive: alpha-bar never passes through half precision."""
    zero, one = torch.zeros(1, 4, dtype=dtype), torch.ones(1, 4, dtype=dtype)
    sigma = [ops.add_noise(zero, t, ABAR, one)[0][0, 0].item() for t in (0, 1)]
    for t in (0, 1):
        expected = (1 - ABAR[t].double()).sqrt().to(dtype).item()
        assert sigma[t] == expected > 0
    assert sigma[0] != sigma[1]


@pytest.mark.parametrize("shape", ((2, 3, 4, 5, 6), (4,), (3, 17), (3, 16), (2, 2, 3, 2, 3, 2)))
@pytest.mark.parametrize("layout", ("contiguous", "strided", "rows"))
def test_video_and_vectors(shape, layout):
    """Samples of any number of axes; "rows": contiguous samples, a gap between them."""
    x, eps, _, t = sample(shape)
    expected = eager(x, eps, t, x)[0]
    expected_by_seed = eager(x, stream(shape[0]).normal(shape[1:]), t, x)[0]
    if layout == "rows":
        x = torch.cat([x.view(len(x), -1), torch.zeros(len(x), 1)], 1)[:, :-1].view(shape)
    elif layout == "strided" and 2 <= len(shape):
        x = testing.arrange(x, layout)
    testing.assert_close(ops.add_noise(x, t, ABAR, eps)[0], expected)
    testing.assert_close(ops.add_noise(x, t, ABAR, stream(shape[0]))[0], expected_by_seed)


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.add_noise([1.0], 0, ABAR), "x0: a tensor"),
        (lambda: ops.add_noise(X.long(), 0, ABAR), "x0: a tensor of fp16"),
        (lambda: ops.add_noise(X[:0], 0, ABAR), "x0: shape"),
        (lambda: ops.add_noise(X, 0, ABAR, X[:1]), "noise: shape"),
        (lambda: ops.add_noise(X, 0, ABAR, "x"), "noise: a tensor or a Noise"),
        (lambda: ops.add_noise(X, 0, ABAR, stream(3)), "3 sample_ids for a batch of 2"),
        (lambda: ops.add_noise(X, 0, ABAR, X, generator=torch.Generator()), "generator"),
        (lambda: ops.add_noise(X, 0, ABAR, generator=[0]), "generator: a torch.Generator on cpu expected, got list"),
        (lambda: ops.add_noise(X.to("meta"), 0, ABAR, generator=torch.Generator()), "generator: .* on meta expected"),
        (lambda: ops.add_noise(X, torch.zeros(2, 3, dtype=torch.int64), ABAR), r"t: shape \(2, 3\)"),
        (lambda: ops.add_noise(X, torch.zeros(2, 4, 8, 8, dtype=torch.int64), ABAR), "one a sample or frame"),
        (lambda: ops.add_noise(X, 1000, ABAR), r"t: values in \[0, 999\] expected"),
        (lambda: ops.add_noise(X.to("meta"), 0, ABAR, stream(2)), "use noise.to"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_any_number_of_axes():
    """A sample of six axes with a gap behind each, and noise in another order of axes."""
    x, eps, _, t = sample((2, 2, 3, 2, 3, 2, 2))
    expected = eager(x, eps, t, x)[0]
    turned = eps.permute(0, 6, 5, 4, 3, 2, 1).contiguous().permute(0, 6, 5, 4, 3, 2, 1)
    testing.assert_close(ops.add_noise(testing.arrange(x, "strided"), t, ABAR, turned)[0], expected)


@pytest.mark.parametrize("device", testing.devices())
def test_opcheck(device):
    x, eps, _, _ = sample((2, 3, 4, 5), device=device)
    alpha, sigma = torch.tensor([0.6, 0.8], device=device), torch.tensor([0.8, 0.6], device=device)
    noise = stream(2, device)
    for x0 in (x, testing.arrange(x, "channels_last"), x.half()):
        x0 = x0.requires_grad_()
        torch.library.opcheck(noise_kernels.add_noise, (x0, None, alpha, sigma, 1, noise.draw, noise.sample_ids))
    arguments = (x, eps.clone().requires_grad_(), alpha, sigma, 0, None, None)
    torch.library.opcheck(noise_kernels.add_noise, arguments)
    torch.library.opcheck(noise_kernels.scale_rows, (x, alpha, torch.bfloat16))


@only_compiled
@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compiles_clean(dtype, arch):
    """216 elements are no multiple of 16, yet a sample's bytes divide by 16: that must be enough for 16-byte accesses."""
    x, rows = torch.zeros(3, 6, 6, 6, dtype=dtype), torch.ones(3)
    noise = stream(3)
    with testing.compile_only(arch) as kernels:
        noise_kernels._add_noise_cuda(x, None, rows, rows, 1, noise.draw, noise.sample_ids)
        noise_kernels._scale_rows_cuda(x, rows, dtype)
        noise_kernels._add_noise_cuda(x, x, rows, rows, 0, None, None)
    wide = 2 if dtype == torch.float32 else 1  # accesses a tensor, at eight elements a thread
    for kernel, inputs in zip(kernels, (1, 1, 2), strict=True):
        testing.assert_clean(kernel, loads=wide * inputs, stores=wide)


@only_compiled
def test_views_compile_clean():
    """Strided views, and storage that is not aligned: no wide accesses, and still no local memory."""
    wide, rows, noise = torch.zeros(2, 4, 8, 9), torch.ones(2), stream(2)
    unaligned = torch.zeros(2 * 4 * 8 * 8 + 1)[1:].view(2, 4, 8, 8)
    with testing.compile_only(90) as kernels:
        many = testing.arrange(torch.zeros(2, 2, 3, 2, 3, 2, 2), "strided")
        for x in (wide[..., ::2], testing.arrange(wide, "channels_last"), wide[:, 1:], unaligned, many):
            noise_kernels._add_noise_cuda(x, None, rows, rows, 1, noise.draw, noise.sample_ids)
    for kernel in kernels:
        testing.assert_clean(kernel, loads=0, stores=0)


def test_bytes_moved():
    x = torch.zeros(2, 4, dtype=torch.float16)
    assert noise_kernels.bytes_moved(x) == 32
    assert noise_kernels.bytes_moved(x, torch.zeros(2, 4)) == 64
    assert noise_kernels.bytes_moved(x, torch.zeros(2, 4), backward=True) == 32
