"""Norms and gates of frozen networks: values and input gradients against float64, where the statistics are safe, and peers."""

import pytest
import torch
import torch.nn.functional as F

from fastsds import ops, reference, testing
from fastsds.kernels import geglu, launch, layer_norm

pytestmark = pytest.mark.usefixtures("poison")
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")
SHAPES = ((2, 16, 320), (3, 5, 7, 12), (1, 2), (4, 1026), (2, 3, 1280))


def sample(shape, dtype, device, layout="contiguous", shift=0.0):
    """x, weight, bias, and an upstream gradient (of x's shape) that is not 1."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    w, b = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    x, w, b, g = ((v + shift * (v is x)).to(device, dtype) for v in (x, w, b, g))
    return testing.arrange(x, layout).requires_grad_(), w, b, testing.arrange(g, layout)


def check(function, eager, x, g, dtype, *rest):
    """Value and input gradient by the twice-eager rule, beside eager torch in x's dtype and in float64."""
    found = []
    for f, as_ in ((function, dtype), (eager, dtype), (eager, torch.float64)):
        leaf = x if f is function else x.detach().to(as_).requires_grad_()
        y = f(leaf, *(v.to(as_) for v in rest))
        found.append((y.detach(), torch.autograd.grad(y, leaf, g.to(as_))[0]))
    for name, ours, theirs, oracle in zip(("value", "dx"), *found):
        assert ours.dtype == dtype
        testing.assert_twice_eager(ours, theirs, oracle, dtype, name)


def eager_geglu(x):
    h, q = x.chunk(2, -1)
    return h * F.gelu(q)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("layout", ("contiguous", "strided"))
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_against_float64(shape, layout, dtype, device):
    x, w, b, g = sample(shape, dtype, device, layout)
    check(ops.layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), x, g, dtype, w, b)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("layout", ("contiguous", "strided"))
@pytest.mark.parametrize("shape", SHAPES)
def test_geglu_against_float64(shape, layout, dtype, device):
    x, _, _, g = sample(shape, dtype, device, layout)
    check(ops.geglu, eager_geglu, x, g[..., : shape[-1] // 2], dtype)


@pytest.mark.parametrize("device", testing.devices())
def test_a_large_mean_costs_no_digits(device):
    """Mean 1,000, deviation 1: E[x^2] - E[x]^2 would be wrong in the first digit."""
    x, w, b, g = sample((4, 1280), torch.float32, device, shift=1e3)
    check(ops.layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), x, g, torch.float32, w, b)


def test_the_tails_of_geglu():
    """Far below zero gelu is small, not zero or NaN; far above it is the identity."""
    q = torch.tensor([-30.0, -6.0, -4.0, 0.0, 6.0, 30.0])
    x = torch.stack([torch.ones(6), q], -1).requires_grad_()
    y = ops.geglu(x)[:, 0]
    y.sum().backward()
    testing.assert_close(y, F.gelu(q))
    assert x.grad.isfinite().all()


def test_reference_gradcheck():
    x, w, b, _ = (v.double() for v in sample((3, 4), torch.float32, "cpu"))
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: reference.layer_norm(v, w, b, 1e-5), x)
    assert torch.autograd.gradcheck(lambda v: ops.layer_norm(v, w, b), x)
    assert torch.autograd.gradcheck(reference.geglu, x) and torch.autograd.gradcheck(ops.geglu, x)


@pytest.mark.parametrize("device", testing.devices())
def test_opcheck_and_compile(device):
    x, w, b, _ = sample((3, 4, 6), torch.float32, device)
    torch.library.opcheck(layer_norm.layer_norm, (x, w, b, 1e-5))
    torch.library.opcheck(layer_norm.layer_norm_gradient, (x.detach(), x.detach(), w, 1e-5))
    torch.library.opcheck(geglu.geglu, (x,))
    torch.library.opcheck(geglu.geglu_gradient, (x.detach()[..., :3], x.detach()))
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: ops.geglu(ops.layer_norm(v, w, b)), fullgraph=True, backend="aot_eager")
    ours, plain = compiled(x), ops.geglu(ops.layer_norm(x, w, b))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, plain)))


def test_only_the_input_is_saved():
    x, w, b, _ = sample((4, 8, 64), torch.float32, "cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        ops.layer_norm(x, w, b), ops.geglu(x)
    assert {v.data_ptr() for v in saved if v.numel() > 64} == {x.data_ptr()}


def test_diffusers_blocks_own_parts():
    """The parts of a transformer block of the UNet, with the block's own weights."""
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(32, 4, 8, cross_attention_dim=16).requires_grad_(False)
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    for norm in (block.norm1, block.norm2, block.norm3):
        testing.assert_close(ops.layer_norm(x, norm.weight, norm.bias, norm.eps), norm(x))
    gate = block.ff.net[0]
    testing.assert_close(ops.geglu(gate.proj(x)), gate(x))


X, W = torch.zeros(2, 4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.layer_norm([1.0], W, W), "x: a tensor"),
        (lambda: ops.layer_norm(X, W[:4], W), r"weight: a contiguous tensor \[8\] expected, got \(4,\)"),
        (lambda: ops.layer_norm(X, W, None), "bias: a tensor"),
        (lambda: ops.layer_norm(X, W, W.to("meta")), "bias: on meta"),
        (lambda: ops.layer_norm(X, W.clone().requires_grad_(), W), "weight: requires a gradient"),
        (lambda: ops.layer_norm(X, W, W, eps=-1.0), "eps: a finite number of at least 0"),
        (lambda: ops.geglu(X[..., :7]), "x: an even last axis"),
        (lambda: ops.geglu(X.long()), "x: a tensor of fp16"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@only_compiled
@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compiles_clean(dtype, arch):
    """320 and 1,280 columns, the narrowest and widest of SD 1.x: wide accesses, no call into a library, no spills."""
    for n in (320, 1280):
        x, w = torch.zeros(64, n, dtype=dtype), torch.ones(n, dtype=dtype)
        with testing.compile_only(arch) as kernels:
            layer_norm._layer_norm_cuda(x, w, w, 1e-5)
            layer_norm._gradient_cuda(x, x, w, 1e-5)
            geglu._geglu_cuda(x)
            geglu._gradient_cuda(x[:, : n // 2].contiguous(), x)
        for kernel, loads, stores in zip(kernels, (1, 2, 2, 3), (1, 1, 1, 2), strict=True):
            testing.assert_clean(kernel, loads=loads, stores=stores)


def test_bytes_moved():
    x = torch.zeros(2, 4, dtype=torch.float16)
    assert layer_norm.bytes_moved(x) == 32 and layer_norm.bytes_moved(x, backward=True) == 48
    assert geglu.bytes_moved(x) == 24 and geglu.bytes_moved(x, backward=True) == 40
