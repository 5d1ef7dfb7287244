"""Attention of head dimension 40: output and all three gradients against float64, on the layouts a UNet has."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsds import ops, reference, testing
from fastsds.kernels import attention, launch
from fastsds.teacher.attention import Processor

pytestmark = pytest.mark.usefixtures("poison")
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")
only_kernels = pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs the twin")
D = attention.HEAD_DIM
LENGTHS = ((1, 1), (130, 77), (64, 32))  # queries, keys: blocks are 128, 64 or 32 by 32
LAYOUTS = ("tokens", "heads", "fused")


def sample(queries, keys, dtype=torch.float32, device="cpu", layout="tokens", batch=1, heads=2):
    """q, k, v [B, H, L, 40] (q twice as large, so that the softmax is peaked) and an upstream gradient that is not 1.

    tokens: views of [B, L, H * 40], as linears give them. heads: [B, H, L, 40], contiguous. fused: k and v views of one
    [B, S, 2, H, 40], q of every second row of a wider tensor.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(batch, n, heads, D, generator=generator) for n in (queries, keys, keys, queries))
    q, k, v, g = (x.to(device, dtype) for x in (2 * q, k, v, g))
    if layout == "fused":
        k, v = torch.stack([k, v], 2).unbind(2)
        q = torch.stack([q, torch.full_like(q, torch.nan)], 2).flatten(1, 2)[:, ::2]
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
    if layout == "heads":
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    return [*(x.detach().requires_grad_() for x in (q, k, v)), g]


def both(function, q, k, v, g, scale=None):
    """(output, dq, dk, dv)."""
    y = function(q, k, v, scale=scale)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), g)]


def eager(q, k, v, scale=None):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def check(q, k, v, g, dtype, scale=None):
    """By the twice-eager rule: SDPA's math in the same dtype, and in float64."""
    ours, theirs = both(ops.attention, q, k, v, g, scale), both(eager, q, k, v, g, scale)
    oracle = both(eager, *(x.detach().double().requires_grad_() for x in (q, k, v)), g.double(), scale)
    for name, one, other, exact in zip(("output", "dq", "dk", "dv"), ours, theirs, oracle):
        assert one.dtype == dtype
        testing.assert_twice_eager(one, other, exact, dtype, name)
    return ours


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("queries, keys", LENGTHS)
def test_against_float64(queries, keys, dtype, device):
    ours = check(*sample(queries, keys, dtype, device), dtype)
    assert all(x.transpose(1, 2).is_contiguous() for x in ours)  # [B, L, H * 40] is a view


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check(*sample(40, 33, torch.float32, device, layout, batch=2), torch.float32)
    check(*sample(40, 33, torch.bfloat16, device, layout, batch=2, heads=1), torch.bfloat16, scale=0.3)


@pytest.mark.parametrize("device", testing.devices())
def test_peaked_softmax(device):
    """Scores that exp would overflow on without the running maximum; most queries attend to one key.

    Backward takes the probabilities from the scores and their log-sum-exp, as every flash kernel does: relative to the
    largest value their error is that of a score of 100 in fp32, 100 / 2^24.
    """
    q, k, v, g = sample(16, 70, torch.float32, device)
    q = (12 * q.detach()).requires_grad_()
    assert (q @ k.mT).max() * D**-0.5 > 89
    ours = both(ops.attention, q, k, v, g)
    oracle = both(eager, *(x.detach().double().requires_grad_() for x in (q, k, v)), g.double())
    for one, exact in zip(ours, oracle):
        assert (one - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("device", testing.devices())
def test_properties(device):
    q, k, v, g = sample(17, 33, torch.float32, device, batch=2)
    y, *gradients = both(ops.attention, q, k, v, g)
    again = both(ops.attention, q, k, v, g)
    assert all(torch.equal(one, other) for one, other in zip((y, *gradients), again))  # no atomics
    swapped = both(ops.attention, *(x.detach().flip(0, 1).requires_grad_() for x in (q, k, v)), g.flip(0, 1))
    for one, other in zip((y, *gradients), swapped):  # samples and heads are apart
        torch.testing.assert_close(one.flip(0, 1), other)
    tripled = both(ops.attention, q, k, v, 3 * g)
    for one, other in zip(gradients, tripled[1:]):
        torch.testing.assert_close(3 * one, other)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(ops.attention(q, k[:, :, order], v[:, :, order]), y)  # keys are a set
    torch.testing.assert_close(ops.attention(q, k, torch.ones_like(v)), torch.ones_like(q))  # weights sum to one
    constant = torch.autograd.grad(ops.attention(q, k, torch.ones_like(v)), (q, k), g)
    assert all(x.abs().max() < 1e-5 for x in constant)


@pytest.mark.parametrize("device", testing.devices())
def test_upstream_gradients_without_rows(device):
    """A sum's gradient is one number, expanded: brought to rows, not read beyond."""
    q, k, v, g = sample(20, 9, torch.float32, device)
    plain = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), torch.ones_like(g).contiguous())
    summed = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(one, other) for one, other in zip(plain, summed))


def test_inputs_made_in_inference_mode():
    with torch.inference_mode():
        k, v = torch.randn(2, 1, 2, 7, D)
    q = torch.randn(1, 2, 5, D, requires_grad=True)
    ours, plain = (torch.autograd.grad(ops.attention(q, *x).square().sum(), q)[0] for x in ((k, v), (k.clone(), v.clone())))
    assert torch.equal(ours, plain)


def test_the_twin_is_sdpa():
    """Any head dimension, any layout; and its own gradients are those of autograd."""
    for shape in ((2, 3, 5, 7), (1, 2, 4, D)):
        q, v, g = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
        k = torch.randn(shape, dtype=torch.float64).mT.contiguous().mT.requires_grad_()
        y, lse = reference.attention(q, k, v, 0.7)
        torch.testing.assert_close(y, eager(q, k, v, 0.7))
        torch.testing.assert_close(torch.exp2(lse), (0.7 * q @ k.mT).exp().sum(-1))
        for ours, auto in zip(reference.attention_gradient(g, q, k, v, y, lse, 0.7), torch.autograd.grad(y, (q, k, v), g)):
            torch.testing.assert_close(ours, auto)


def test_gradcheck():
    q, k, v = (torch.randn(1, 1, n, D, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))
    small = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: reference.attention(q, k, v, 0.4)[0], small)


@pytest.mark.parametrize("device", testing.devices())
def test_opcheck_and_compile(device):
    q, k, v, g = sample(6, 5, torch.float32, device)
    torch.library.opcheck(attention.attention, (q, k, v, 0.2))
    y, lse = attention.attention(q, k, v, 0.2)
    inputs = [x.detach() for x in (g, q, k, v, y, lse)]
    torch.library.opcheck(attention.attention_gradient, (*inputs, 0.2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v), fullgraph=True, backend="aot_eager")
    for ours, plain in zip(both(lambda *x, scale: compiled(*x), q, k, v, g), both(ops.attention, q, k, v, g)):
        torch.testing.assert_close(ours, plain)


def test_what_is_saved():
    q, k, v, _ = sample(64, 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = ops.attention(q, k, v)
    pointers = {x.data_ptr(): x.numel() for x in saved}
    assert {x.data_ptr() for x in (q, k, v, y)} < pointers.keys()
    assert sorted(pointers.values())[0] == 2 * 64 and len(pointers) == 5  # log-sum-exp: a number a query


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_processor_on_it(dtype):
    """diffusers' own attention with SD 1.x's head dimension, self and cross: output and gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attention(query_dim=16, heads=2, dim_head=D, cross_attention_dim=12).requires_grad_(False)
        tokens, text, g = torch.randn(2, 30, 16), torch.randn(2, 7, 12), torch.randn(2, 30, 16)
    found = []
    for processor, as_ in ((Processor("fastsds"), dtype), (Processor("math"), dtype), (Processor("math"), torch.float64)):
        module.to(dtype).to(as_).set_processor(processor)
        x = tokens.to(dtype).to(as_).requires_grad_()
        y = module(x, encoder_hidden_states=text.to(dtype).to(as_))
        found.append([y.detach(), torch.autograd.grad(y, x, g.to(dtype).to(as_))[0]])
    for name, ours, theirs, exact in zip(("output", "gradient"), *found):
        testing.assert_twice_eager(ours, theirs, exact, dtype, name)


@only_kernels
def test_launches():
    q, k, v, g = sample(6, 5)
    launch.launches.clear()
    y = ops.attention(q, k, v)
    assert dict(launch.launches) == {"_attention_kernel": 1}
    y.backward(g)
    names = ("_attention_kernel", "_attention_dq_kernel", "_attention_dkv_kernel")
    assert dict(launch.launches) == dict.fromkeys(names, 1)


X = torch.zeros(1, 2, 4, D)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.attention([1.0], X, X), "q: a tensor"),
        (lambda: ops.attention(X[0], X, X), r"q: shape \[B, H, L, 40\] expected, got \(2, 4, 40\)"),
        (lambda: ops.attention(X, X, X[:, :, :3]), r"v: shape \(1, 2, 4, 40\) expected"),
        (lambda: ops.attention(X, X[:, :1], X[:, :1]), r"k: \[B, H, S, 40\] with q's B and H expected, got \(1, 1, 4, 40\)"),
        (lambda: ops.attention(X, X.half(), X.half()), "q, k, v: one dtype and device expected"),
        (lambda: ops.attention(X.to("meta"), X, X), "q, k, v: one dtype and device expected"),
        (lambda: ops.attention(*[X[..., :8]] * 3), "q: a head dimension of 40 expected"),
        (lambda: ops.attention(X, X.mT.contiguous().mT, X), r"k: a last stride of 1 expected, got strides \(320, 160, 1, 4\)"),
        (lambda: ops.attention(X, X, X, scale=0.0), "scale: a finite number above 0 expected"),
        (lambda: ops.attention(X[:, :, :0], X, X), "q: shape .* without empty axes"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@only_compiled
@pytest.mark.parametrize(
    "dtype, arch, keys, products",
    (
        (torch.bfloat16, 80, 4096, ("mma.sync",)),
        (torch.bfloat16, 90, 4096, ("mma.sync", "wgmma")),
        (torch.bfloat16, 100, 4096, ("mma.sync", "tcgen05")),
        (torch.float16, 90, 77, ("mma.sync", "wgmma")),
        (torch.float32, 90, 4096, ()),
    ),
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_compiles_clean(dtype, arch, keys, products):
    """SD 1.x's finest level, self and cross: wide accesses, tensor cores (but for fp32), no spills, no call, no fp64."""
    q, k, g = (torch.zeros(1, n, 8 * D, dtype=dtype).view(1, n, 8, D).transpose(1, 2) for n in (4096, keys, 4096))
    with testing.compile_only(arch) as kernels:
        y, lse = attention._attention_cuda(q, k, k, 0.1)
        attention._gradient_cuda(g, q, k, k, y, lse, 0.1)
    for kernel, loads, stores in zip(kernels, (3, 9, 6), (2, 2, 4), strict=True):
        testing.assert_clean(kernel, loads=loads, stores=stores)
        ptx = kernel.asm["ptx"]
        assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx), "no 16-byte copies in the loop"
        used = set(re.findall(r"\b(mma\.sync|wgmma|tcgen05)\.(?:aligned\.m16n8k16|mma)", ptx))
        assert used == set(products)


def test_bytes_and_flops():
    q, k = torch.zeros(2, 3, 5, D, dtype=torch.float16), torch.zeros(2, 3, 7, D, dtype=torch.float16)
    assert attention.bytes_moved(q, k) == 2 * 2 * 2 * 3 * D * (5 + 7)
    assert attention.bytes_moved(q, k, backward=True) == 2 * attention.bytes_moved(q, k)
    assert attention.flops(q, k) == 2 * 2 * 2 * 3 * 5 * 7 * D
    assert attention.flops(q, k, backward=True) == 2.5 * attention.flops(q, k)
