"""Score losses: value and injected gradients against a float64 oracle, and what gradient injection promises."""

import pytest
import torch

from fastsds import ops, reference, testing
from fastsds.kernels import launch, score

ABAR = testing.alphas_cumprod()
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN, so an element that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes by programs, not by elements: give large samples larger blocks there."""
    if launch.INTERPRETED:
        chosen = launch.block_size
        monkeypatch.setattr(launch, "block_size", lambda n: 8192 if n > 8192 else chosen(n))


def sample(shape, dtype=torch.float32, device="cpu", seed=0):
    """x0, pred, a second tensor, eps, t. Timesteps away from the ends, so that every conversion is well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    return *tensors, torch.randint(200, 800, shape[:1], generator=generator).to(device)


def stream(batch, device="cpu", seed=7):
    return ops.Noise(seed, ops.draw(ops.Purpose.NOISE, 3), torch.arange(batch) * 1000 + 2**33).to(device)


def factors(t, like):
    abar = ABAR.to(like.device, like.dtype)[t].view(-1, *[1] * (like.ndim - 1))
    return abar.sqrt(), (1 - abar).sqrt()


def weight(weighting, alpha, sigma):
    return {
        "uniform": torch.ones_like(alpha),
        "sigma2": sigma**2,
        "alpha_sigma2": alpha * sigma**2,
        "inverse_snr_root": sigma / alpha,
    }[weighting]


def denominator(reduction, x):
    return {"mean": x.numel(), "batch": len(x), "sum": 1}[reduction]


def eager_sds(pred, ref, x_t, t, kind, weighting, reduction):
    """What a user writes, in pred's dtype: (value, gradient)."""
    alpha, sigma = factors(t, pred)
    eps_hat = {
        "epsilon": lambda: pred,
        "v_prediction": lambda: alpha * pred + sigma * x_t,
        "sample": lambda: (x_t - alpha * pred) / sigma,
        "flow": lambda: (x_t + alpha * pred) / (alpha + sigma),
    }[kind]()
    w, r = weight(weighting, alpha, sigma), eps_hat - ref
    count = denominator(reduction, pred)
    return 0.5 * (w * r * r).sum() / count, w * r / count


def eager_denoising(pred, eps, x0, t, kind, weighting, reduction):
    """What a user writes, in pred's dtype: the value, differentiable."""
    alpha, sigma = factors(t, pred)
    target = {
        "epsilon": lambda: eps,
        "v_prediction": lambda: alpha * eps - sigma * x0,
        "sample": lambda: x0,
        "flow": lambda: eps - x0,
    }[kind]()
    return (weight(weighting, alpha, sigma) * (pred - target) ** 2).sum() / denominator(reduction, pred)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape, layout", testing.CASES)
@pytest.mark.parametrize("seeded", (True, False))
def test_sds_against_float64(shape, layout, dtype, seeded, device):
    x, pred, _, eps, t = sample(shape, dtype, device)
    ref = stream(shape[0], device) if seeded else testing.arrange(eps, layout)
    eps = ref.normal(shape[1:]) if seeded else eps
    x0 = testing.arrange(x, layout).requires_grad_()
    arguments = (x0, testing.arrange(pred, layout), ref, t, ABAR.to(device))
    loss = ops.sds_loss(*arguments, weighting="sigma2", reduction="mean")
    assert loss.dtype == torch.float32 and loss.shape == ()
    common = (None, t, "epsilon", "sigma2")
    oracle = eager_sds(pred.double(), eps.double(), *common, "mean")
    theirs = eager_sds(pred, eps.to(dtype), *common, "mean")
    testing.assert_twice_eager(loss, theirs[0], oracle[0], dtype, "value")
    # the sum keeps the gradient of order one: the table's atol is no excuse
    loss, grad = ops.sds_loss(*arguments, weighting="sigma2", reduction="sum", return_grad=True)
    (loss * 0.7).backward()
    oracle = eager_sds(pred.double(), eps.double(), *common, "sum")[1]
    theirs = eager_sds(pred, eps.to(dtype), *common, "sum")[1]
    testing.assert_twice_eager(grad, theirs, oracle, dtype, "returned gradient")
    testing.assert_twice_eager(x0.grad, 0.7 * theirs, 0.7 * oracle, dtype, "dx0")
    assert grad.dtype == x0.grad.dtype == dtype
    if layout == "channels_last" and len(shape) == 4:
        assert grad.stride() == x0.stride()


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape, layout", testing.CASES)
@pytest.mark.parametrize("seeded", (True, False))
def test_denoising_against_float64(shape, layout, dtype, seeded, device):
    x, pred, _, eps, t = sample(shape, dtype, device)
    noise = stream(shape[0], device) if seeded else testing.arrange(eps, layout).requires_grad_()
    eps = noise.normal(shape[1:]) if seeded else eps
    leaf = testing.arrange(pred, layout).requires_grad_()
    loss = ops.denoising_loss(leaf, noise, t, ABAR.to(device), weighting="inverse_snr_root")
    tail = (None, t, "epsilon", "inverse_snr_root", "mean")
    oracle, theirs = (
        eager_denoising(pred.double(), eps.double(), *tail),
        eager_denoising(pred, eps.to(dtype), *tail),
    )
    testing.assert_twice_eager(loss, theirs, oracle, dtype, "value")
    (0.7 * ops.denoising_loss(leaf, noise, t, ABAR.to(device), reduction="sum")).backward()
    oracle = 1.4 * (pred.double() - eps.double())
    theirs = 1.4 * (pred - eps.to(dtype))
    testing.assert_twice_eager(leaf.grad, theirs, oracle, dtype, "dpred")
    if not seeded:
        testing.assert_twice_eager(noise.grad, -theirs, -oracle, dtype, "deps")


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize(
    "kind, weighting, reduction",
    [(kind, "inverse_snr_root", "sum") for kind in ops.PREDICTION_TYPES]
    + [("epsilon", weighting, "batch") for weighting in ops.WEIGHTINGS]
    + [("v_prediction", "sigma2", reduction) for reduction in ops.REDUCTIONS],
)
def test_predictions_weightings_reductions(kind, weighting, reduction, device):
    x, pred, _, eps, t = sample((3, 2, 3, 5), device=device)
    abar = ABAR.to(device)
    x_t = ops.add_noise(x, t, abar, eps)[0]
    options = dict(prediction_type=kind, weighting=weighting, reduction=reduction)
    x0 = x.clone().requires_grad_()
    loss = ops.sds_loss(x0, pred, eps, t, abar, x_t=x_t, **options)
    loss.backward()
    doubles = [v.double() for v in (pred, eps, x_t)]
    value, grad = eager_sds(*doubles, t, kind, weighting, reduction)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(x0.grad.double(), grad, rtol=2e-5, atol=2e-6 * grad.abs().max().item())

    # the true squared error: gradients into pred, the second tensor and the noise, by x0 and by x_t
    for given in ("x0", "x_t"):
        leaves = [v.clone().requires_grad_() for v in (pred, eps, x if given == "x0" else x_t)]
        extra = {} if kind == "epsilon" else {given: leaves[2]}
        loss = ops.denoising_loss(*leaves[:2], t, abar, **extra, **options)
        loss.backward()
        twins = [v.detach().double().requires_grad_() for v in leaves]
        alpha, sigma = factors(t, twins[0])
        clean = twins[2] if given == "x0" else (twins[2] - sigma * twins[1]) / alpha
        expected = eager_denoising(twins[0], twins[1], clean, t, kind, weighting, reduction)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=0)
        for ours, twin in zip(leaves, twins):
            zero = torch.zeros_like(ours)
            actual, wanted = (v.grad if v.grad is not None else zero for v in (ours, twin))
            limit = 5e-5 * wanted.abs().max().item()
            torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=limit)


def test_reference_gradcheck():
    _, pred, y, eps, _ = sample((2, 3, 2, 2), torch.float64)
    rows = torch.rand(4, 2, dtype=torch.float64)
    leaves = tuple(v.requires_grad_() for v in (pred, y, eps))
    assert torch.autograd.gradcheck(lambda p, y, e: reference.energy(p, y, e, rows), leaves)
    noise = stream(2)
    stream_of = (7, noise.draw, noise.sample_ids)
    assert torch.autograd.gradcheck(lambda p, y, e: score.denoising_energy(p, y, e, rows, 0, None, None), leaves)
    assert torch.autograd.gradcheck(lambda p, y: score.denoising_energy(p, y, None, rows, *stream_of), leaves[:2])


def test_reference_sds_is_the_op():
    x, pred, y, eps, _ = sample((2, 3, 2, 2), torch.float64)
    rows = torch.rand(4, 2, dtype=torch.float64)
    results = []
    for loss in (
        lambda x0: reference.sds_loss(x0, pred, y, eps, rows),
        lambda x0: score.sds_energy(x0, pred, y, eps, rows, 0, None, None),
    ):
        x0 = x.clone().requires_grad_()
        value = loss(x0)
        (3 * value).backward()
        results.append((value.detach(), x0.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("device", testing.devices())
def test_noise_inside_the_losses_is_the_noise_added(device):
    """The loss of the stream's own normals is exactly zero, gradient too; and the stream equals its tensor."""
    shape = (3, 5, 7, 11)
    x, pred, _, _, t = sample(shape, device=device)
    abar, noise = ABAR.to(device), stream(3, device)
    eps = ops.add_noise(torch.zeros_like(x), t, (0.0, 1.0), noise)[0]
    x0, leaf = x.clone().requires_grad_(), eps.clone().requires_grad_()
    loss = ops.sds_loss(x0, eps, noise, t, abar, weighting="inverse_snr_root") + ops.denoising_loss(leaf, noise, t, abar)
    loss.backward()
    assert loss.item() == 0 and not x0.grad.any() and not leaf.grad.any()
    for reduction in ops.REDUCTIONS:
        losses = [ops.sds_loss(x, pred, ref, t, abar, reduction=reduction) for ref in (noise, eps)]
        assert torch.equal(*losses)


@pytest.mark.parametrize("device", testing.devices())
def test_layout_batch_and_block_do_not_matter(device, monkeypatch):
    x, pred, _, _, t = sample((3, 5, 7, 11), device=device)
    abar, noise = ABAR.to(device), stream(3, device)
    grad = ops.sds_loss(x, pred, noise, t, abar, reduction="sum", return_grad=True)[1]
    for layout in testing.LAYOUTS:
        other = ops.sds_loss(x, testing.arrange(pred, layout), noise, t, abar, reduction="sum", return_grad=True)[1]
        assert torch.equal(other, grad)
    order = torch.tensor([2, 0, 1], device=device)
    shuffled = ops.Noise(noise.seed, noise.draw, noise.sample_ids[order])
    other = ops.sds_loss(x[order], pred[order], shuffled, t[order], abar, reduction="sum", return_grad=True)[1]
    assert torch.equal(other, grad[order])
    for i in range(3):
        alone = ops.Noise(noise.seed, noise.draw, noise.sample_ids[i : i + 1])
        rows = slice(i, i + 1)
        other = ops.sds_loss(x[rows], pred[rows], alone, t[rows], abar, reduction="sum", return_grad=True)[1]
        assert torch.equal(other, grad[rows])
    monkeypatch.setattr(launch, "block_size", lambda n: 128)
    assert torch.equal(ops.sds_loss(x, pred, noise, t, abar, reduction="sum", return_grad=True)[1], grad)


def test_linear_in_the_weight_and_in_the_upstream_gradient():
    x, pred, _, eps, t = sample((4, 3, 5, 7))
    w = torch.tensor([0.5, 1.0, 2.0, 0.0])

    def grad(weighting, scale=1.0):
        x0 = x.clone().requires_grad_()
        loss = ops.sds_loss(x0, pred, eps, t, ABAR, weighting=weighting)
        (scale * loss).backward()
        return loss.item(), x0.grad

    value, base = grad(w)
    assert grad(4 * w)[0] == 4 * value and torch.equal(grad(4 * w)[1], 4 * base)
    assert torch.equal(grad(w, 1024.0)[1], 1024 * base)
    assert not base[3].any() and base[2].any()
    assert torch.equal(grad(w.view(4, 1, 1, 1))[1], base)


def test_half_precision_gradient_survives():
    """At |x| about 3 and |g| about 1e-3 the detached-target trick zeroes most of the gradient in bf16; injection none."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 4, 32, 32, generator=generator).sign().to(torch.bfloat16)
    pred, eps = (torch.randn(x.shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    w = torch.full((2,), 2e-3)
    x0 = x.clone().requires_grad_()
    ops.sds_loss(x0, pred, eps, 500, ABAR, weighting=w).backward()
    exact = 1e-3 * (pred.double() - eps.double())
    assert ((x0.grad == 0) == (exact == 0)).all()
    assert ((x0.grad.double() - exact).abs() <= 2**-8 * exact.abs()).all()
    trick = x.clone().requires_grad_()
    (0.5 * (trick - (trick - exact.to(torch.bfloat16)).detach()) ** 2).sum().backward()
    lost = (trick.grad == 0).double().mean().item()
    assert lost > 0.9


def test_only_x0_gets_the_gradient_of_sds():
    x, pred, x_t, eps, t = (v.requires_grad_() if v.is_floating_point() else v for v in sample((2, 3, 4, 4)))
    ops.sds_loss(x, pred, eps, t, ABAR, x_t=x_t, prediction_type="v_prediction").backward()
    assert x.grad is not None and pred.grad is None and x_t.grad is None and eps.grad is None


def test_mixed_dtypes_and_float64():
    x, pred, _, _, t = sample((2, 3, 4, 4))
    noise = stream(2)
    x0 = x.clone().requires_grad_()
    ops.sds_loss(x0, pred.half(), noise, t, ABAR, reduction="sum").backward()
    assert x0.grad.dtype == torch.float32
    assert torch.equal(x0.grad, pred.half().float() - noise.normal((3, 4, 4)))
    x0 = x.double().requires_grad_()
    loss = ops.sds_loss(x0, pred, noise, t, ABAR, reduction="sum")
    loss.backward()
    assert loss.dtype == x0.grad.dtype == torch.float64
    assert torch.equal(x0.grad, pred.double() - noise.normal((3, 4, 4)).double())


def test_predictions_made_under_inference_mode():
    x, *_, t = sample((2, 3, 4, 4))
    with torch.inference_mode():
        pred, eps, x_t = (torch.randn(2, 3, 4, 4) for _ in range(3))
        noise = stream(2)
    for ref in (eps, noise):
        x0 = x.clone().requires_grad_()
        ops.sds_loss(x0, pred, ref, t, ABAR, x_t=x_t, prediction_type="v_prediction").backward()
        assert x0.grad.any()


def test_the_noise_is_never_stored():
    """What forward keeps for backward is pred and vectors over the batch; no tensor of noise, no residual, no gradient."""
    x, pred, _, _, t = sample((2, 4, 16, 16))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v)
    with hooks:
        ops.sds_loss(x.requires_grad_(), pred, stream(2), t, ABAR)
        leaf = pred.clone().requires_grad_()
        ops.denoising_loss(leaf, stream(2), t, ABAR)
    large = {v.data_ptr() for v in saved if v.numel() > 16}
    assert large == {pred.data_ptr(), leaf.data_ptr()}


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.sds_loss(X, X[:1], X, 0, ABAR), "pred: shape"),
        (lambda: ops.sds_loss(X, X.to("meta"), X, 0, ABAR), "pred: on meta"),
        (lambda: ops.sds_loss(X, X, X[:, :1], 0, ABAR), "ref: shape"),
        (lambda: ops.sds_loss(X, X, None, 0, ABAR), "ref: a tensor or a Noise"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, prediction_type="eps"), "prediction_type: one of 'epsilon'"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, prediction_type="sample"), "x_t: required"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting="snr"), "weighting: one of"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting=torch.ones(3)), r"weighting: a float tensor \[2\]"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, reduction="none"), "reduction: one of"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, value="one"), "value: one of"),
        (lambda: ops.denoising_loss(X, None, 0, ABAR), "noise: required"),
        (lambda: ops.denoising_loss(X, X, 0, ABAR, prediction_type="v_prediction"), "x0, x_t: give one"),
        (lambda: ops.denoising_loss(X, X, 0, ABAR, x0=X[:1], prediction_type="flow"), "x0: shape"),
        (lambda: ops.denoising_loss(X, stream(1), 0, ABAR), "1 sample_ids for a batch of 2"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", testing.devices())
def test_opcheck(device):
    x, pred, y, eps, _ = sample((2, 3, 4, 5), device=device)
    rows = torch.rand(4, 2, device=device)
    noise = stream(2, device)
    by_seed, by_tensor = (None, rows, 1, noise.draw, noise.sample_ids), (eps, rows, 0, None, None)
    leaf = pred.clone().requires_grad_()
    channels_last = testing.arrange(x, "channels_last").half().requires_grad_()
    torch.library.opcheck(score.denoising_energy, (leaf, None, *by_seed))
    torch.library.opcheck(score.denoising_energy, (leaf, y.clone().requires_grad_(), *by_tensor))
    torch.library.opcheck(score.sds_energy, (channels_last, pred, None, *by_seed))
    torch.library.opcheck(score.sds_energy, (x.requires_grad_(), pred, y, *by_tensor))
    one = torch.ones((), device=device)
    torch.library.opcheck(score.residual_gradient, (pred, None, *by_seed, one, torch.bfloat16, True))


@only_compiled
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compiles_clean(dtype, arch):
    """216 elements are no multiple of 16, yet a sample's bytes divide by 16: that must be enough for 16-byte accesses."""
    x, rows, one = torch.zeros(3, 6, 6, 6, dtype=dtype), torch.ones(4, 3), torch.ones(())
    noise = stream(3)
    by_seed, by_tensor = (None, rows, 1, noise.draw, noise.sample_ids), (x, rows, 0, None, None)
    with testing.compile_only(arch) as kernels:
        score._denoising_cuda(x, None, *by_seed)
        score._denoising_cuda(x, x, *by_tensor)
        score._gradient_cuda(x, None, *by_seed, one, dtype, False)
        score._gradient_cuda(x, x, *by_seed, one, dtype, False)
        score._gradient_cuda(x, x, *by_tensor, one, dtype, False)
    wide = 2 if dtype == torch.float32 else 1  # accesses a tensor, at eight elements a thread
    for kernel, inputs, outputs in zip(kernels, (1, 3, 1, 2, 3), (0, 0, 1, 1, 1), strict=True):
        testing.assert_clean(kernel, loads=wide * inputs, stores=wide * outputs)


@only_compiled
def test_views_compile_clean():
    x, rows, noise = torch.zeros(2, 4, 8, 9), torch.ones(4, 2), stream(2)
    stream_of = (None, rows, 1, noise.draw, noise.sample_ids)
    with testing.compile_only(90) as kernels:
        score._denoising_cuda(x[..., ::2], None, *stream_of)
        score._gradient_cuda(testing.arrange(x, "channels_last"), x, *stream_of, torch.ones(()), torch.bfloat16, True)
    for kernel in kernels:
        testing.assert_clean(kernel, loads=0, stores=0)


def test_bytes_moved():
    x, pred = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float16)
    assert score.bytes_moved(x, pred) == 16
    assert score.bytes_moved(x, pred, backward=True) == 48
    assert score.bytes_moved(x, pred, y=x, eps=pred) == 64
