"""SiD's loss: value and three gradients against a float64 oracle."""

import pytest
import torch

from fastsds import ops, reference, testing
from fastsds.kernels import launch, sid

pytestmark = pytest.mark.usefixtures("poison", "few_programs")
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")


def sample(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]


def eager(x, real, fake, alpha, floor):
    """What a user writes, in the tensors' dtype."""
    axes = tuple(range(1, x.ndim))
    weight = (x - real).abs().mean(dim=axes, keepdim=True).clamp(min=floor).detach()
    return ((real - fake) * ((real - x) - alpha * (real - fake)) / weight).sum()


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape, layout", testing.CASES)
def test_against_float64(shape, layout, dtype, device):
    given = [testing.arrange(v, layout).requires_grad_() for v in sample(shape, dtype, device)]
    results = []
    for leaves in (given, *([v.detach().to(kind).requires_grad_() for v in given] for kind in (dtype, torch.float64))):
        loss = ops.sid_loss(*leaves, alpha=1.2) if leaves is given else eager(*leaves, 1.2, 1e-5)
        (0.7 * loss).backward()
        results.append((loss.detach(), [v.grad for v in leaves]))
    (ours, grads), (theirs, their_grads), (oracle, oracle_grads) = results
    scale = max(oracle.abs().item(), 1.0)
    testing.assert_twice_eager(ours / scale, theirs / scale, oracle / scale, dtype, "value")
    for name, *three in zip(("dx", "dreal", "dfake"), grads, their_grads, oracle_grads):
        testing.assert_twice_eager(*three, dtype, name)
        assert three[0].dtype == dtype


def test_reference_gradcheck():
    x, real, fake = (v.double().requires_grad_() for v in sample((2, 3, 2, 2)))
    w = torch.rand(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *v: reference.sid_energy(*v, w, 1.2), (x, real, fake))
    assert torch.autograd.gradcheck(lambda *v: sid.sid_energy(*v, w, 1.2), (x, real, fake))


@pytest.mark.parametrize("device", testing.devices())
def test_only_what_asks_gets_a_gradient(device):
    x, real, fake = sample((2, 3, 4, 5), device=device)
    x.requires_grad_()
    ops.sid_loss(x, real, fake, reduction="batch").backward()
    w = (x.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    testing.assert_close(x.grad, -(real - fake) / w / 2)


def test_the_floor_and_equal_predictions():
    x, real, fake = sample((2, 3, 4, 5))
    tight, loose = (ops.sid_loss(x, real, fake, floor=floor) for floor in (1e-5, 100.0))
    weights = 100.0 / (x - real).abs().mean(dim=(1, 2, 3))
    assert torch.allclose(tight, (weights.view(2, 1, 1, 1) * (real - fake) * (fake - x)).sum() / 100, rtol=1e-4)
    assert torch.allclose(loose, ((real - fake) * (fake - x)).sum() / 100, rtol=1e-4)
    x.requires_grad_()
    loss = ops.sid_loss(x, real, real)
    loss.backward()
    assert loss == 0 and not x.grad.any()


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda x: ops.sid_loss(x, x[:1], x), "x0_real: shape"),
        (lambda x: ops.sid_loss(x, x, x.to("meta")), "x0_fake: on meta"),
        (lambda x: ops.sid_loss(x, x, x, floor=-1), "floor: a finite number of at least 0"),
        (lambda x: ops.sid_loss(x, x, x, alpha=float("nan")), "alpha: a finite number"),
        (lambda x: ops.sid_loss(x, x, x, reduction="none"), "reduction: one of"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("device", testing.devices())
def test_opcheck(device):
    x, real, fake = sample((2, 3, 4, 5), device=device)
    w = torch.rand(2, device=device)
    torch.library.opcheck(sid.sid_energy, (x.requires_grad_(), real.half().requires_grad_(), fake, w, 1.2))
    torch.library.opcheck(sid.sid_gradients, (x.detach(), real, fake, w, 1.2, torch.ones((), device=device)))


@only_compiled
@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compiles_clean(dtype, arch):
    x, w = torch.zeros(3, 6, 6, 6, dtype=dtype), torch.ones(3)
    with testing.compile_only(arch) as kernels:
        sid._energy_cuda(x, x, x, w, 1.2)
        sid._gradients_cuda(x, x, x, w, 1.2, torch.ones(()))
    wide = 2 if dtype == torch.float32 else 1
    for kernel, outputs in zip(kernels, (0, 3), strict=True):
        testing.assert_clean(kernel, loads=3 * wide, stores=outputs * wide)


def test_bytes_moved():
    x, half = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float16)
    assert sid.bytes_moved(x, half, half) == 64
    assert sid.bytes_moved(x, x, x, backward=True) == 192
