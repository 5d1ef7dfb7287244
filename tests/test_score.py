"""Score losses: value and injected gradients against a float64 oracle, and what gradient injection promises."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastsds import ops, reference, testing
from fastsds.kernels import launch, score

ABAR = testing.alphas_cumprod()
PLAIN = (0.0, math.inf, "propagate")  # no guidance, no clip, nothing sanitised
pytestmark = pytest.mark.usefixtures("poison", "few_programs")
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")


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


BY_LEVEL = [name for name in ops.WEIGHTINGS if not name.startswith("x0_error")]


def weight(weighting, alpha, sigma, kind="epsilon"):
    snr = alpha**2 / sigma**2
    return {
        "uniform": torch.ones_like(alpha),
        "sigma2": sigma**2,
        "alpha_sigma2": alpha * sigma**2,
        "inverse_snr_root": sigma / alpha,
        "snr": snr,
        "min_snr": snr.clamp(max=5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}.get(kind, snr),
    }[weighting]


def denominator(reduction, x):
    return {"mean": x.numel(), "batch": len(x), "sum": 1, "spatial": x.shape[-1] * x.shape[-2], 7.5: 7.5}[reduction]


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
    + [("epsilon", weighting, "batch") for weighting in BY_LEVEL]
    + [("v_prediction", "sigma2", reduction) for reduction in (*ops.REDUCTIONS, 7.5)],
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
        lambda x0: score.sds_value(x0, pred, None, y, eps, rows, 0, None, None, *PLAIN, "energy"),
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


def test_inference_tensors_under_compile():
    """A compiled graph cannot ask what its input is: autograd's error says to clone it, and a clone serves."""
    x, *_, t = sample((2, 3, 4, 4))
    x.requires_grad_()
    with torch.inference_mode():
        pred = torch.randn(2, 3, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, pred: ops.sds_loss(x, pred, stream(2), t, ABAR), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward.*clone"):
        compiled(x, pred)
    graph, plain = (torch.autograd.grad(f(x, pred.clone()), x)[0] for f in (compiled, compiled._torchdynamo_orig_callable))
    assert torch.equal(plain, graph)


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


# -- guidance, references, weights, clipping, frames -------------------------------------------------------------------


def guided(uncond, cond, scale, form):
    """The three spellings in use, as users write them."""
    base = {"uncond": uncond, "cond": cond, "cond_minus_one": cond}[form]
    return base + (scale - 1 if form == "cond_minus_one" else scale) * (cond - uncond)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("form", ops.FORMS)
@pytest.mark.parametrize("order", ops.ORDERS)
def test_guidance_against_float64(order, form, dtype, device):
    x, uncond, cond, eps, t = sample((3, 5, 7, 11), dtype, device)
    pair = (uncond, cond) if order == "uncond_first" else (cond, uncond)
    for scale in (0.3, 7.5, 100.0):
        oracle, theirs = (guided(u, c, scale, form) for u, c in ((uncond.double(), cond.double()), (uncond, cond)))
        ours = ops.guide(torch.cat(pair), scale, order, form)
        testing.assert_twice_eager(ours, theirs, oracle, dtype, "guided")
        assert torch.equal(ours, ops.guide(pair, scale, order, form))
        x0 = x.clone().requires_grad_()
        how = dict(guidance_scale=scale, order=order, form=form, reduction="sum")
        ops.sds_loss(x0, torch.cat(pair), eps, t, ABAR.to(device), **how).backward()
        testing.assert_twice_eager(x0.grad, theirs - eps, oracle - eps.double(), dtype, "dx0")


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_guidance_ends_are_exact(dtype, device):
    x, uncond, cond, eps, t = sample((2, 3, 4, 5), dtype, device)
    for form, at_uncond, at_cond in (("uncond", 0, 1), ("cond_minus_one", 0.0, 1.0), ("cond", -1, 0)):
        for scale, expected in ((at_uncond, uncond), (at_cond, cond)):
            assert torch.equal(ops.guide((uncond, cond), scale, form=form), expected)
            how = dict(reduction="sum", return_grad=True)
            found = ops.sds_loss(x, (uncond, cond), eps, t, ABAR.to(device), guidance_scale=scale, form=form, **how)
            plain = ops.sds_loss(x, expected, eps, t, ABAR.to(device), **how)
            assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


def test_guidance_of_two_dtypes():
    """The result's dtype is the promoted one, at every scale."""
    _, uncond, cond, _, _ = sample((2, 3, 4, 5))
    for low, wide in ((torch.float16, torch.float32), (torch.bfloat16, torch.float64)):
        for scale in (0, 0.2, 1, 7.5):
            for pair in ((uncond.to(low), cond.to(wide)), (uncond.to(wide), cond.to(low))):
                assert ops.guide(pair, scale).dtype == wide


def test_guide_is_differentiable():
    _, uncond, cond, _, _ = sample((2, 3, 2, 2), torch.float64)
    leaves = (uncond.requires_grad_(), cond.requires_grad_())
    for scale in (0.2, 3.0):
        assert torch.autograd.gradcheck(lambda u, c, scale=scale: ops.guide((u, c), scale), leaves)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
def test_a_reference_of_another_type(kind, device):
    """VSD with an adapter that predicts v, CSD and DDS with two predictions of one type."""
    x, pred, ref, eps, t = sample((3, 2, 3, 5), torch.float64, device)
    abar = ABAR.to(device)
    x_t = ops.add_noise(x, t, abar, eps)[0]
    hats = [ops.convert(v, x_t, t, abar, source=kind, target="epsilon") for v in (pred, ref)]
    how = dict(x_t=x_t, weighting="sigma2", return_grad=True)
    for own, hat in (("epsilon", pred), (kind, hats[0])):
        found = ops.sds_loss(x, pred, ref, t, abar, prediction_type=own, ref_prediction_type=kind, **how)
        plain = ops.sds_loss(x, hat, hats[1], t, abar, **how)
        for ours, expected in zip(found, plain):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    short = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow": "flow"}[kind]
    same = ops.sds_loss(x, pred, ref, t, abar, prediction_type=short, ref_prediction_type=short, **how)
    assert torch.equal(same[1], ops.sds_loss(x, pred, ref, t, abar, prediction_type=kind, ref_prediction_type=kind, **how)[1])


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ("x0_error", "x0_error_batch"))
def test_weight_by_the_error_of_x0(weighting, kind, dtype, device):
    x, uncond, cond, eps, t = sample((3, 5, 7, 11), dtype, device)
    abar = ABAR.to(device)
    x_t = ops.add_noise(x, t, abar, eps)[0]

    def eager(x, uncond, cond, eps, x_t):
        alpha, sigma = factors(t, x)
        pred = guided(uncond, cond, 4.0, "uncond")
        x0, eps_hat = {
            "epsilon": lambda: ((x_t - sigma * pred) / alpha, pred),
            "v_prediction": lambda: (alpha * x_t - sigma * pred, alpha * pred + sigma * x_t),
            "sample": lambda: (pred, (x_t - alpha * pred) / sigma),
            "flow": lambda: ((x_t - sigma * pred) / (alpha + sigma), (x_t + alpha * pred) / (alpha + sigma)),
        }[kind]()
        error = (x - x0).abs()
        norm = error.mean() if weighting.endswith("batch") else error.mean(dim=(1, 2, 3), keepdim=True)
        return (eps_hat - eps) / norm

    given = (x, uncond, cond, eps, x_t)
    how = dict(prediction_type=kind, weighting=weighting, guidance_scale=4.0, reduction="sum", return_grad=True)
    grad = ops.sds_loss(x, (uncond, cond), eps, t, abar, x_t=x_t, **how)[1]
    testing.assert_twice_eager(grad, eager(*given), eager(*(v.double() for v in given)), dtype, "gradient")


def test_zero_error_of_x0_gives_zero():
    x, _, _, eps, t = sample((2, 3, 4, 5))
    loss, grad = ops.sds_loss(x, x, eps, t, ABAR, x_t=x, prediction_type="sample", weighting="x0_error", return_grad=True)
    assert loss.isfinite() or not grad.isnan().any()
    same = ops.sds_loss(x, eps, eps, t, (1.0, 0.0), x_t=x, weighting="x0_error", return_grad=True)
    assert same[0] == 0 and not same[1].any()


@pytest.mark.parametrize("device", testing.devices())
def test_values(device):
    x, pred, _, eps, t = sample((3, 5, 7, 11), device=device)
    abar, w = ABAR.to(device), torch.tensor([0.5, 2.0, 1.0], device=device)
    r, g = (pred - eps).double(), ((pred - eps).double() * w.view(3, 1, 1, 1)).clamp(-0.8, 0.8)
    for value, expected in (("energy", 0.5 * g * r), ("target", 0.5 * g * g), ("dot", g * x.double())):
        x0 = x.clone().requires_grad_()
        loss = ops.sds_loss(x0, pred, eps, t, abar, weighting=w, clip=0.8, value=value)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected.sum() / 3, rtol=2e-6, atol=1e-4)
        torch.testing.assert_close(x0.grad.double(), g / 3, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_what_is_not_finite(dtype, device):
    x, pred, _, eps, t = sample((3, 4, 4, 4), dtype, device)
    pred[0, 0, 0, 0], pred[0, 0, 0, 1], pred[2, 1, 1, 1] = float("nan"), float("inf"), -float("inf")
    abar, top = ABAR.to(device), torch.finfo(dtype).max

    def gradient(nonfinite, clip=None):
        how = dict(nonfinite=nonfinite, clip=clip, reduction="sum", value="target", return_grad=True)
        return ops.sds_loss(x, pred, eps, t, abar, **how)

    clean = pred - eps
    rest = clean.isfinite()
    for policy, nan, inf in (("clamp", 0.0, top), ("zero", 0.0, 0.0)):
        loss, grad = gradient(policy)
        assert torch.equal(grad[rest], gradient("propagate")[1][rest])
        assert grad[0, 0, 0, 0] == nan and grad[0, 0, 0, 1] == inf and grad[2, 1, 1, 1] == -inf
        assert loss.isfinite() or dtype == torch.float32
    for value in ops.VALUES:  # what is not finite is left out of the value
        how = dict(reduction="sum", value=value)
        kept = ops.sds_loss(x, torch.where(rest, pred, eps), eps, t, abar, **how)
        for policy in ("clamp", "zero"):
            assert torch.equal(ops.sds_loss(x, pred, eps, t, abar, nonfinite=policy, **how), kept)
    clipped = gradient("clamp", 0.5)[1]
    assert clipped.abs().max() == 0.5 and clipped[0, 0, 0, 1] == 0.5 and gradient("clamp", 0.5)[0].isfinite()
    loss, grad = gradient("drop_sample")
    assert not grad[0].any() and not grad[2].any() and torch.equal(grad[1], gradient("propagate")[1][1]) and loss.isfinite()
    with pytest.raises(FloatingPointError, match=r"samples \[0, 2\]"):
        gradient("raise")
    assert gradient("propagate")[1].isnan().sum() == 1


@pytest.mark.parametrize("device", testing.devices())
def test_what_is_not_finite_once_weighted(device):
    """The policies judge w (eps_hat - ref): a product that overflows, a weight that is none; not a sum that would."""
    x = torch.zeros(3, 4, device=device)
    pred = torch.ones(3, 4, device=device)
    pred[0, 0], pred[2] = 1e20, 2e38
    for w in ((1e30, 1.0, 1.0), (float("nan"), 1.0, 1.0), (float("inf"), 1.0, 1.0)):
        how = dict(weighting=torch.tensor(w, device=device), value="dot", reduction="sum", return_grad=True)
        grad = ops.sds_loss(x, pred, x, 500, ABAR, nonfinite="drop_sample", **how)[1]
        assert not grad[0].any() and torch.equal(grad[1:], pred[1:])
        with pytest.raises(FloatingPointError, match=r"samples \[0\]"):
            ops.sds_loss(x, pred, x, 500, ABAR, nonfinite="raise", **how)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", (*testing.DTYPES, torch.float64))
def test_one_timestep_a_frame(dtype, device):
    """[B, F] timesteps on video: the gradient of each frame is that of the frame alone, noise by seed included."""
    x, pred, x_t, eps, _ = sample((2, 3, 5, 7, 3), dtype, device)
    t = torch.randint(200, 800, (2, 3), device=device)
    abar, noise = ABAR.to(device), stream(2, device)
    flat = [v.flatten(0, 1) for v in (x, pred, x_t, noise.normal((3, 5, 7, 3)).to(dtype))]
    how = dict(weighting="sigma2", reduction="sum", prediction_type="v_prediction")
    x0 = x.clone().requires_grad_()
    (2 * ops.sds_loss(x0, pred, noise, t, abar, x_t=x_t, **how)).backward()
    alone = ops.sds_loss(flat[0], flat[1], flat[3], t.flatten(), abar, x_t=flat[2], return_grad=True, **how)
    testing.assert_close(x0.grad.flatten(0, 1), 2 * alone[1])
    leaf, one = pred.clone().requires_grad_(), flat[1].clone().requires_grad_()
    ops.denoising_loss(leaf, noise, t, abar, x0=x, **how).backward()
    ops.denoising_loss(one, flat[3], t.flatten(), abar, x0=flat[0], **how).backward()
    testing.assert_close(leaf.grad.flatten(0, 1), one.grad)
    # a weight a frame over one timestep a sample is the same thing
    w = torch.rand(2, 3, device=device, dtype=torch.float32)
    how = dict(reduction="sum", return_grad=True)
    ours = ops.sds_loss(x, pred, eps, t[:, 0], abar, weighting=w, **how)[1]
    alone = ops.sds_loss(flat[0], flat[1], eps.flatten(0, 1), 500, abar, weighting=w.flatten(), **how)[1]
    assert torch.equal(ours.flatten(0, 1), alone)
    # a weight by the error of x0 is still one a sample, over its frames' own levels
    how = dict(x_t=x_t, prediction_type="v_prediction", reduction="sum", return_grad=True)
    plain, ours = (ops.sds_loss(x, pred, eps, t, abar, weighting=w, **how)[1].double() for w in ("uniform", "x0_error"))
    clean = ops.convert(pred.double(), x_t.double(), t, abar, source="v", target="x0")
    testing.assert_close(ours, plain / (x.double() - clean).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1), dtype)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_the_gradient_is_laid_out_as_x0(memory_format):
    x, pred, _, eps, t = sample((2, 3, 4, 5))
    x = x.to(memory_format=memory_format).requires_grad_()
    for ref in (eps, eps.to(memory_format=torch.channels_last)):
        for loss in (lambda ref: ops.sds_loss(x, pred, ref, t, ABAR), lambda ref: ops.denoising_loss(x, ref, t, ABAR)):
            assert torch.autograd.grad(loss(ref), x)[0].is_contiguous(memory_format=memory_format)


def test_weights_by_rank_and_by_function():
    """A weight [B] is one a sample even where B is also the last axis; a callable sees alpha and sigma."""
    x, pred, _, eps, t = sample((4, 3, 4, 4))
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    how = dict(reduction="sum", return_grad=True)
    assert torch.equal(ops.sds_loss(x, pred, eps, t, ABAR, weighting=w, **how)[1], w.view(4, 1, 1, 1) * (pred - eps))
    alpha, sigma = ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()
    for weighting, expected in (
        (ops.power(2, -1), alpha**2 / sigma),
        (ops.min_snr(3.0, "eps"), (alpha / sigma).square().clamp(max=3) / (alpha / sigma).square()),
        (ops.min_snr(3.0, "v"), (alpha / sigma).square().clamp(max=3) / ((alpha / sigma).square() + 1)),
        (ops.min_snr(3.0, "flow"), (alpha / sigma).square().clamp(max=3) * sigma**2 / (alpha + sigma) ** 2),
        (lambda a, s: torch.full_like(a, 2.0), torch.full((4,), 2.0)),
    ):
        grad = ops.sds_loss(x, pred, eps, t, ABAR, weighting=weighting, **how)[1]
        torch.testing.assert_close(grad, expected.view(4, 1, 1, 1) * (pred - eps), rtol=1e-5, atol=1e-6)


def test_min_snr_by_name_is_min_snr_of_preds_space():
    x, pred, _, eps, t = sample((4, 3, 4, 4))
    for kind in ops.PREDICTION_TYPES:
        by_name, by_call = (
            ops.denoising_loss(pred, eps, t, ABAR, x0=x, prediction_type=kind, weighting=w)
            for w in ("min_snr", ops.min_snr(5, kind))
        )
        assert torch.equal(by_name, by_call)
    with pytest.raises(TypeError, match="prediction_type"):
        ops.min_snr(5)


def test_min_snr_without_signal():
    assert ops.min_snr(5, "epsilon")(torch.zeros(1), torch.ones(1)) == 1


def test_samples_of_one_number():
    """[B] is the same as [B, 1], weights and dropped samples included."""
    x, pred, x_t, eps, t = sample((3, 1))
    for how in (dict(weighting="x0_error"), dict(nonfinite="drop_sample")):
        flat = ops.sds_loss(*(v[:, 0] for v in (x, pred, eps)), t, ABAR, x_t=x_t[:, 0], return_grad=True, **how)[1]
        assert torch.equal(flat[:, None], ops.sds_loss(x, pred, eps, t, ABAR, x_t=x_t, return_grad=True, **how)[1])


def test_one_compiled_graph_for_many_numbers():
    """Two graphs: the first number's, and every other's."""
    x, pred, *_ = sample((2, 3, 4, 4))

    def seeded(k):
        stream = ops.Noise(k, ops.draw(ops.Purpose.NOISE, k), [0, 1])
        return ops.sds_loss(x, pred, stream, k, ABAR) + stream.normal(k).sum() + stream.randint(0, k).sum()

    def levelled(k):
        noised = ops.add_noise(x, 0.01 * k, "flow", pred)[0]
        return ops.denoising_loss(pred, noised, 0, (1.0, 0.1 * k)) + ops.guide((x, pred), 1.5 * k).sum()

    for function in (seeded, levelled):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for k in range(2, 13):
            torch.testing.assert_close(compiled(k), function(k))
        assert counter.frame_count <= 2


def test_one_compiled_graph_for_many_scales():
    torch._dynamo.reset()
    x, pred, other, eps, t = sample((2, 3, 4, 4))

    def loss(scale, clip):
        return ops.sds_loss(x, (pred, other), eps, t, ABAR, guidance_scale=scale, clip=clip)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale, clip in ((7.5, 0.5), (3.0, 0.7), (100.0, 0.2)):
        torch.testing.assert_close(compiled(scale, clip), loss(scale, clip))


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.sds_loss(X, X[:1], X, 0, ABAR), "pred: shape"),
        (lambda: ops.sds_loss(X, X.to("meta"), X, 0, ABAR), "pred: on meta"),
        (lambda: ops.sds_loss(X, X, X[:, :1], 0, ABAR), "ref: shape"),
        (lambda: ops.sds_loss(X, X, None, 0, ABAR), "ref: a tensor or a Noise"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, prediction_type="noise"), "prediction_type: one of 'epsilon'"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, prediction_type=["v"]), "prediction_type: one of 'epsilon'"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, prediction_type="sample"), "x_t: required"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, x_t=5, prediction_type="sample"), "x_t: a tensor .* got int"),
        (lambda: ops.denoising_loss(X, X, 0.5 * torch.ones(2).requires_grad_(), "flow"), "t: a constant here"),
        (lambda: ops.convert(X, X, 0.5 * torch.ones(2).requires_grad_(), "flow", source="v", target="x0"), "t: a constant"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting="one"), "weighting: one of"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, x_t=X, weighting="x0_error_sample"), "weighting: one of"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting=torch.ones(3)), r"weighting: shape \(3,\)"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting=torch.ones(2).long()), "weighting: a float tensor"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting=lambda a, s: 1.0), "weighting: must return"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, weighting="x0_error"), "x_t: required .* x0_hat"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, ref_prediction_type="v"), "x_t: required"),
        (lambda: ops.sds_loss(X, X, stream(2), 0, ABAR, x_t=X, ref_prediction_type="v"), "ref_prediction_type: a Noise"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, clip=-1.0), "clip: a finite number of at least 0 expected, got -1.0"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, nonfinite="drop"), "nonfinite: one of"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, reduction=0.0), "reduction: a finite number above 0"),
        (lambda: ops.sds_loss(X[:, :, 0, 0], X[:, :, 0, 0], X[:, :, 0, 0], 0, ABAR, reduction="spatial"), "'spatial' divides"),
        (lambda: ops.sds_loss(X, X, X, 0, ABAR, guidance_scale=2.0), "pred: both halves expected"),
        (lambda: ops.sds_loss(X, (X,), X, 0, ABAR, guidance_scale=2.0), "a pair .* got 1"),
        (lambda: ops.guide(X[:1], 2.0), r"pred: \[2B, ...\] or a pair"),
        (lambda: ops.guide(X, 2.0, order="first"), "order: one of"),
        (lambda: ops.guide(X, 2.0, form="x0"), "form: one of"),
        (lambda: ops.guide(X, float("nan")), "guidance scale: a finite number"),
        (lambda: ops.guide((X, X[:1]), 2.0), r"pred\[1\]: shape"),
        (lambda: ops.denoising_loss(X, X, 0, ABAR, weighting="x0_error"), "normalises an injected gradient"),
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
    rows, frames = torch.rand(4, 2, device=device), torch.rand(4, 6, device=device)
    noise = stream(2, device)
    by_seed, by_tensor = (None, rows, 1, noise.draw, noise.sample_ids), (eps, frames, 0, None, None)
    leaf = pred.clone().requires_grad_()
    channels_last = testing.arrange(x, "channels_last").half().requires_grad_()
    torch.library.opcheck(score.denoising_energy, (leaf, None, *by_seed))
    torch.library.opcheck(score.denoising_energy, (leaf, y.clone().requires_grad_(), *by_tensor))
    torch.library.opcheck(score.sds_value, (channels_last, pred, None, None, *by_seed, *PLAIN, "energy"))
    guided = (2.5, 0.3, "zero")
    torch.library.opcheck(score.sds_value, (x.requires_grad_(), pred, y, y, *by_tensor, *guided, "dot"))
    one = torch.ones((), device=device)
    torch.library.opcheck(score.residual_gradient, (pred, None, None, *by_seed, *PLAIN, one, torch.bfloat16, True))
    torch.library.opcheck(score.sample_sums, (pred, y, None, *by_seed, 1.5, True))
    torch.library.opcheck(score.sample_sums, (pred, y, None, *by_seed, 1.5, False))


@only_compiled
@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compiles_clean(dtype, arch):
    """216 elements are no multiple of 16, yet a sample's bytes divide by 16: that must be enough for 16-byte accesses."""
    x, rows, frames, one = torch.zeros(3, 6, 6, 6, dtype=dtype), torch.ones(4, 3), torch.ones(4, 18), torch.ones(())
    noise = stream(3)
    by_seed, by_tensor = (None, rows, 1, noise.draw, noise.sample_ids), (x, rows, 0, None, None)
    by_frame = (None, frames, 1, noise.draw, noise.sample_ids)
    guided = (2.5, 0.3, "clamp")
    with testing.compile_only(arch) as kernels:
        score._denoising_cuda(x, None, *by_seed)
        score._denoising_cuda(x, x, *by_tensor)
        score._sds_cuda(x, x, x, x, *by_tensor, *guided, "dot")
        score._sample_sums_cuda(x, x, x, *by_tensor, 1.5, True)
        score._sample_sums_cuda(x, x, x, *by_tensor, 1.5, False)
        score._gradient_cuda(x, None, None, *by_seed, *PLAIN, one, dtype, False)
        score._gradient_cuda(x, None, x, *by_frame, *PLAIN, one, dtype, False)
        score._gradient_cuda(x, x, x, *by_tensor, *guided, one, dtype, False)
    wide = 2 if dtype == torch.float32 else 1  # accesses a tensor, at eight elements a thread
    for kernel, inputs, outputs in zip(kernels, (1, 3, 5, 4, 4, 1, 2, 4), (0, 0, 0, 0, 0, 1, 1, 1), strict=True):
        testing.assert_clean(kernel, loads=wide * inputs, stores=wide * outputs)


@only_compiled
def test_views_compile_clean():
    x, rows, noise = torch.zeros(2, 4, 8, 9), torch.ones(4, 2), stream(2)
    stream_of = (None, rows, 1, noise.draw, noise.sample_ids)
    with testing.compile_only(90) as kernels:
        score._denoising_cuda(x[..., ::2], None, *stream_of)
        view = testing.arrange(x, "channels_last")
        score._gradient_cuda(view, None, x, *stream_of, *PLAIN, torch.ones(()), torch.bfloat16, True)
    for kernel in kernels:
        testing.assert_clean(kernel, loads=0, stores=0)


def test_bytes_moved():
    x, pred = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float16)
    assert score.bytes_moved(x, pred) == 16
    assert score.bytes_moved(x, pred, backward=True) == 48
    assert score.bytes_moved(x, pred, x, pred, None) == 64
