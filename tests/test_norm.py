"""Norms and gates of frozen networks: values and input gradients against float64, where the statistics are safe, and peers."""

import pytest
import torch
import torch.nn.functional as F

from fastsds import ops, reference, testing
from fastsds.kernels import geglu, group_norm_silu, launch, layer_norm

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
def test_columns_that_lie_far_apart(device):
    """The last column is 2^31 elements behind the first. (Storage that nobody writes takes no memory on the CPU.)"""
    step = -(-(2**31) // 7)
    storage = torch.UntypedStorage(2 * (7 * step + 4), device=device)
    x, w, b, g = sample((4, 8), torch.float16, device)
    far = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (4, 8), (1, step))
    far.copy_(x.detach()).requires_grad_()
    for function in (lambda x: ops.layer_norm(x, w, b), ops.geglu):
        y, near = function(far), function(x)
        assert torch.equal(y, near)
        upstream = g[:, : y.shape[1]]
        assert torch.equal(*(torch.autograd.grad(v, leaf, upstream)[0] for v, leaf in ((y, far), (near, x))))


def channels(shape, dtype, device, layout):
    """x [B, C, ...], weight and bias [C], upstream gradient."""
    x, _, _, g = sample(shape, dtype, device)
    w, b = (torch.randn(shape[1], generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in (1, 2))
    return testing.arrange(x.detach(), layout).requires_grad_(), w, b, g


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("silu", (True, False))
@pytest.mark.parametrize(
    "shape, groups, layout",
    (
        ((2, 20, 16, 24), 2, "contiguous"),  # 3,840 elements a group
        ((2, 20, 16, 32), 2, "channels_last"),  # 5,120: more than a block
        ((3, 6, 5, 7), 3, "contiguous"),
        ((3, 6, 5, 7), 2, "channels_last"),
        ((1, 4, 1, 1), 1, "contiguous"),
        ((2, 8, 5), 4, "contiguous"),
        ((2, 4, 3, 5, 2), 2, "contiguous"),
    ),
)
def test_group_norm_silu_against_float64(shape, groups, layout, silu, dtype, device):
    x, w, b, g = channels(shape, dtype, device, layout)

    def eager(x, w, b):
        n = F.group_norm(x, groups, w, b, 1e-5)
        return F.silu(n) if silu else n

    check(lambda x, w, b: ops.group_norm_silu(x, w, b, groups, silu=silu), eager, x, g, dtype, w, b)
    assert ops.group_norm_silu(x, w, b, groups, silu=silu).stride() == x.stride()


@pytest.mark.parametrize("device", testing.devices())
def test_a_large_mean_costs_no_digits_of_a_group(device):
    x, w, b, g = channels((2, 8, 16, 16), torch.float32, device, "contiguous")
    x = (x.detach() + 1e3).requires_grad_()
    check(lambda x, w, b: ops.group_norm_silu(x, w, b, 2), lambda x, w, b: F.silu(F.group_norm(x, 2, w, b)),
          x, g, torch.float32, w, b)  # fmt: skip
    exact = F.silu(F.group_norm(x.double(), 2, w.double(), b.double()))
    wanted = torch.autograd.grad(exact, x, g.double())[0]
    y = ops.group_norm_silu(x, w, b, 2)
    for ours, oracle in ((y, exact), (torch.autograd.grad(y, x, g)[0], wanted)):
        assert (ours.double() - oracle).abs().max() < 2e-6  # one fp32 for the mean would be 2e-5 off


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
    w, b = w[:3].contiguous(), b[:3].contiguous()
    for silu in (True, False):
        wide = x.detach().view(1, 3, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda v, silu=silu: reference.group_norm_silu(v, w, b, 3, 1e-5, silu)[0], wide)
        assert torch.autograd.gradcheck(lambda v, silu=silu: ops.group_norm_silu(v, w, b, 3, silu=silu), wide)


@pytest.mark.parametrize("device", testing.devices())
def test_opcheck_and_compile(device):
    x, w, b, _ = sample((3, 4, 6), torch.float32, device)
    torch.library.opcheck(layer_norm.layer_norm, (x, w, b, 1e-5))
    torch.library.opcheck(layer_norm.layer_norm_gradient, (x.detach(), x.detach(), w, 1e-5))
    torch.library.opcheck(geglu.geglu, (x,))
    torch.library.opcheck(geglu.geglu_gradient, (x.detach()[..., :3], x.detach()))
    weights = w[:4].clone(), b[:4].clone()
    torch.library.opcheck(group_norm_silu.group_norm_silu, (x, *weights, 2, 1e-5, True))
    _, *statistics = group_norm_silu.group_norm_silu(x.detach(), *weights, 2, 1e-5, True)
    torch.library.opcheck(group_norm_silu.group_norm_silu_gradient, (x.detach(), x.detach(), *weights, *statistics, 2, True))
    torch._dynamo.reset()

    def all_three(v):
        return ops.geglu(ops.layer_norm(ops.group_norm_silu(v, w[:4].contiguous(), b[:4].contiguous(), 2), w, b))

    ours, plain = torch.compile(all_three, fullgraph=True, backend="aot_eager")(x), all_three(x)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, plain)))


def test_only_the_input_is_saved():
    x, w, b, _ = sample((4, 8, 64), torch.float32, "cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        ops.layer_norm(x, w, b), ops.geglu(x), ops.group_norm_silu(x, w[:8].contiguous(), b[:8].contiguous(), 4)
    assert {v.data_ptr() for v in saved if v.numel() > 64} == {x.data_ptr()}


def test_weights_made_in_inference_mode():
    """Autograd refuses to save such tensors; a frozen network may have been loaded there."""
    with torch.inference_mode():
        w, b = torch.randn(8), torch.randn(8)
    x = torch.randn(2, 8, 8, requires_grad=True)
    for function in (lambda w, b: ops.layer_norm(x, w, b), lambda w, b: ops.group_norm_silu(x, w, b, 2)):
        ours, plain = (torch.autograd.grad(function(*v).square().sum(), x)[0] for v in ((w, b), (w.clone(), b.clone())))
        assert torch.equal(ours, plain)


def test_diffusers_blocks_own_parts():
    """The parts of the UNet's two kinds of block, with the block's own weights."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    block = BasicTransformerBlock(32, 4, 8, cross_attention_dim=16).requires_grad_(False)
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    for norm in (block.norm1, block.norm2, block.norm3):
        testing.assert_close(ops.layer_norm(x, norm.weight, norm.bias, norm.eps), norm(x))
    gate, image = block.ff.net[0], torch.randn(2, 32, 5, 6, generator=torch.Generator().manual_seed(1))
    resnet = ResnetBlock2D(in_channels=32, temb_channels=None, groups=8).requires_grad_(False)
    for norm in (resnet.norm1, resnet.norm2):
        ours = ops.group_norm_silu(image, norm.weight, norm.bias, norm.num_groups, norm.eps)
        testing.assert_close(ours, resnet.nonlinearity(norm(image)))
    testing.assert_close(ops.geglu(gate.proj(x)), gate(x))


X, W = torch.zeros(2, 4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.layer_norm([1.0], W, W), "x: a tensor"),
        (lambda: ops.layer_norm(torch.zeros(1, 8193), W, W), "x: at most 8192 elements on the last axis"),
        (lambda: ops.layer_norm(X, W[:4], W), r"weight: a contiguous tensor \[8\] expected, got \(4,\)"),
        (lambda: ops.layer_norm(X, W, None), "bias: a tensor"),
        (lambda: ops.layer_norm(X, W, W.to("meta")), "bias: on meta"),
        (lambda: ops.layer_norm(X, W.clone().requires_grad_(), W), "weight: requires a gradient"),
        (lambda: ops.layer_norm(X, W, W, eps=-1.0), "eps: a finite number of at least 0"),
        (lambda: ops.group_norm_silu(W, W, W, 2), r"x: shape \[B, C, ...\] expected"),
        (lambda: ops.group_norm_silu(X, W[:4], W[:4], 3), "groups: a divisor of the 4 channels expected, got 3"),
        (lambda: ops.group_norm_silu(X, W, W, 2), r"weight: a contiguous tensor \[4\]"),
        (lambda: ops.group_norm_silu(X.transpose(1, 2), W, W, 2), "x: contiguous or channels_last"),
        (lambda: ops.group_norm_silu(X, W[:4], W[:4], True), "groups: a divisor of the 4 channels expected, got True"),
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
    image, w, rstd = torch.zeros(2, 320, 32, 32, dtype=dtype), torch.ones(320, dtype=dtype), torch.zeros(64)
    mean = torch.zeros(2, 64)
    for x, wide in ((image, True), (image.to(memory_format=torch.channels_last), False)):
        with testing.compile_only(arch) as kernels:
            group_norm_silu._forward_cuda(x, w, w, 32, 1e-5, True)
            group_norm_silu._gradient_cuda(x, x, w, w, mean, rstd, 32, True)
        for kernel, loads in zip(kernels, (3, 4), strict=True):  # x thrice; x and dy twice
            testing.assert_clean(kernel, loads=wide * loads, stores=int(wide))


def test_bytes_moved():
    x = torch.zeros(2, 4, dtype=torch.float16)
    assert layer_norm.bytes_moved(x) == 32 and layer_norm.bytes_moved(x, backward=True) == 48
    assert group_norm_silu.bytes_moved(x) == 32 and group_norm_silu.bytes_moved(x, backward=True) == 48
    assert geglu.bytes_moved(x) == 24 and geglu.bytes_moved(x, backward=True) == 40
