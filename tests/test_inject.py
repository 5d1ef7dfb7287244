"""Known gradients put on a tensor: inject_grad and dmd_loss, against float64."""

import pytest
import torch

from fastsds import ops, testing

pytestmark = pytest.mark.usefixtures("poison", "few_programs")


def sample(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]


def eager_dmd(x, real, fake, norm, mask=None, eps=0.0, floor=0.0):
    """What a user writes: the gradient before any reduction."""
    axes = tuple(range(1, x.ndim)) if norm == "sample" else None
    n = 1.0 if norm is None else ((x - real).abs().mean(dim=axes, keepdim=True) + eps).clamp(min=floor)
    return (fake - real) / n if mask is None else ((fake - real) / n)[mask]


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape, layout", testing.CASES)
@pytest.mark.parametrize("norm", ops.NORMS)
def test_dmd_against_float64(norm, shape, layout, dtype, device):
    given = [testing.arrange(v, layout) for v in sample(shape, dtype, device)]
    x = given[0].clone(memory_format=torch.preserve_format).requires_grad_()
    loss, grad = ops.dmd_loss(x, *given[1:], norm=norm, reduction="sum", return_grad=True)
    (0.7 * loss).backward()
    oracle, theirs = eager_dmd(*(v.double() for v in given), norm), eager_dmd(*given, norm)
    testing.assert_twice_eager(grad, theirs, oracle, dtype, "returned gradient")
    testing.assert_twice_eager(x.grad, 0.7 * theirs, 0.7 * oracle, dtype, "dx")
    mean = ops.dmd_loss(x, *given[1:], norm=norm)
    testing.assert_twice_eager(mean, 0.5 * theirs.square().mean(), 0.5 * oracle.square().mean(), dtype, "value")
    assert grad.dtype == dtype


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_dmd_on_video_with_a_mask(dtype, device):
    """A mean over the elements kept; nothing that is masked out matters, NaN included."""
    x, real, fake = sample((2, 3, 4, 5, 6), dtype, device)
    for mask in (torch.tensor([[1, 0, 1], [0, 1, 1]], device=device).bool(), torch.rand(x.shape, device=device) > 0.3):
        whole = mask.view(*mask.shape, *[1] * (5 - mask.ndim)).expand(x.shape)
        g = eager_dmd(x, real, fake, "sample", whole)
        fake_nan = torch.where(whole, fake, float("nan"))
        leaf = x.clone().requires_grad_()
        loss = ops.dmd_loss(leaf, real, fake_nan, mask=mask)
        loss.backward()
        expected = torch.zeros_like(x).masked_scatter(whole, g / whole.sum())
        testing.assert_close(leaf.grad / expected.abs().max(), expected / expected.abs().max())
        assert leaf.grad.dtype == loss.dtype == dtype and not leaf.grad[~whole].any()
        testing.assert_close(loss, 0.5 * g.square().mean())


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("norm", ops.NORMS)
@pytest.mark.parametrize("value", ("target", "dot"))
def test_what_is_masked_and_not_finite_is_harmless(value, norm, device):
    """The norm is over all elements, masked ones too; of these, what is not finite counts as no distance."""
    x, real, fake = sample((2, 3, 4, 5), device=device)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(device) > 0.3
    first = (~mask).nonzero()[0].tolist()
    how = dict(norm=norm, mask=mask, value=value, return_grad=True)
    at = tuple(first)
    for i, bad in ((0, float("nan")), (1, float("inf")), (2, float("nan"))):
        given = [v.clone() for v in (x, real, fake)]
        given[i][at] = bad
        # the same with no distance at that element, and anything finite in fake
        same = [v.clone() for v in (x, real, fake)]
        if i < 2:
            same[i][at] = same[1 - i][at]
        for ours, expected in zip(ops.dmd_loss(*given, **how), ops.dmd_loss(*same, **how)):
            assert ours.isfinite().all() and torch.equal(ours, expected)
        leaf = given[0].clone().requires_grad_()
        ops.dmd_loss(leaf, *given[1:], **how)[0].backward()
        assert torch.equal(leaf.grad, ops.dmd_loss(*given, **how)[1])
    x[at] = fake[at] = float("nan")
    loss = ops.inject_grad(x, fake, mask=mask, value=value)
    assert loss.isfinite()
    far = real.clone()  # finite and masked: part of the norm, as in Self-Forcing
    far[at] += 100.0
    x[at], fake[at] = 0.0, 0.0
    assert torch.equal(ops.dmd_loss(x, far, fake, **how)[1], ops.dmd_loss(x, real, fake, **how)[1]) == (norm is None)


@pytest.mark.parametrize("device", testing.devices())
def test_dmd_options(device):
    x, real, fake = sample((2, 3, 4, 5), device=device)
    for how in (dict(eps=0.5), dict(floor=10.0)):
        grad = ops.dmd_loss(x, real, fake, reduction="sum", return_grad=True, **how)[1]
        testing.assert_close(grad, eager_dmd(x, real, fake, "sample", **how))
    plain = ops.dmd_loss(x, real, fake, norm=None, return_grad=True, reduction="sum")[1]
    assert torch.equal(plain, fake - real)
    scale = torch.tensor([2.0, 0.5], device=device)
    for given in (scale, scale.view(2, 1, 1, 1)):
        scaled = ops.dmd_loss(x, real, fake, norm=None, scale=given, return_grad=True, reduction="sum")[1]
        assert torch.equal(scaled, scale.view(2, 1, 1, 1) * plain)
    dot, grad = ops.dmd_loss(x, real, fake, value="dot", return_grad=True, reduction="batch")
    testing.assert_close(dot, (grad * x).sum())
    same = ops.dmd_loss(real, real, real, return_grad=True)
    assert same[0] == 0 and not same[1].any()
    none = ops.dmd_loss(x, real, fake, mask=torch.zeros(2, device=device).bool(), return_grad=True)
    assert none[0] == 0 and not none[1].any()
    fake[0, 0, 0, 0] = float("nan")
    grad = ops.dmd_loss(x, real, fake, nonfinite="zero", return_grad=True)[1]
    assert grad.isfinite().all() and grad[0, 0, 0, 0] == 0


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", (*testing.DTYPES, torch.float64))
def test_inject_grad(dtype, device):
    """The gradient arrives as given, at a scale, and where |x| is a thousand times larger."""
    x, grad, _ = sample((3, 5, 7, 11), dtype, device)
    x, grad = 3 * x.sign(), 1e-3 * grad
    leaf = x.clone().requires_grad_()
    loss = ops.inject_grad(leaf, grad)
    (1024 * loss).backward()
    assert torch.equal(leaf.grad, 1024 * grad)
    for value, expected in (("dot", (grad.double() * x.double()).sum()), ("target", 0.5 * grad.double().square().sum())):
        loss = ops.inject_grad(leaf, grad, value=value, reduction="batch")
        torch.testing.assert_close(loss.double(), expected / 3, rtol=1e-4, atol=1e-6)
    mask = torch.tensor([True, False, True], device=device)
    leaf = x.clone().requires_grad_()
    ops.inject_grad(leaf, grad, mask=mask, reduction="mean").backward()
    kept = grad.double() / (2 * 5 * 7 * 11) * mask.view(3, 1, 1, 1)
    assert not leaf.grad[1].any()
    info = torch.finfo(dtype)  # one rounding, also where fp16 is subnormal
    torch.testing.assert_close(leaf.grad.double(), kept, rtol=2 * max(info.eps, 1e-7), atol=info.smallest_normal * info.eps)


@pytest.mark.parametrize("loss", (ops.inject_grad, lambda x, g, **how: ops.dmd_loss(x, g, 2 * g, **how)))
def test_a_mask_made_under_inference_mode(loss):
    x, grad, _ = sample((2, 3))
    with torch.inference_mode():
        mask = torch.tensor([True, False])
    x.requires_grad_()
    loss(x, grad, mask=mask, value="dot").backward()
    assert x.grad[0].all() and not x.grad[1].any()


def test_inject_grad_of_an_inference_tensor():
    x, grad, _ = sample((2, 3))
    with torch.inference_mode():
        made = grad * 2
    x.requires_grad_()
    ops.inject_grad(x, made).backward()
    assert torch.equal(x.grad, grad * 2)


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.dmd_loss(X, X[:1], X), "x0_real: shape"),
        (lambda: ops.dmd_loss(X, X, X, norm="none"), "norm: one of 'sample', 'batch', None"),
        (lambda: ops.dmd_loss(X, X, X, eps=-1.0), "eps: a finite number of at least 0"),
        (lambda: ops.dmd_loss(X, X, X, mask=torch.ones(2)), "mask: a bool tensor expected, got torch.float32"),
        (lambda: ops.dmd_loss(X, X, X, mask=torch.ones(3).bool()), r"mask: shape \(3,\)"),
        (lambda: ops.dmd_loss(X, X, X, scale=torch.ones(3)), r"scale: shape \(3,\)"),
        (lambda: ops.dmd_loss(X, X, X, scale=torch.ones(2).cfloat()), "scale: a number or a float tensor expected"),
        (lambda: ops.dmd_loss(X, X, X, value="energy"), "value: one of 'target', 'dot'"),
        (lambda: ops.inject_grad(X, X[0]), "grad: shape"),
        (lambda: ops.inject_grad(X, X, value="zero"), "value: one of"),
        (lambda: ops.inject_grad(X, X, reduction=-1), "reduction: a finite number above 0"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
