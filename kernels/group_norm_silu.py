"""Group norm, with SiLU after it or without, of a frozen network: forward, and backward to the input alone.

    xhat = (x - mean) rstd,   n = xhat w + b,   y = n sigmoid(n)  (or n)
    h = w dy silu'(n)  (or w dy),   dx = rstd (h - mean(h) - xhat mean(h xhat))     means over a group; none for w and b

Shapes: x, y [B, C, ...], contiguous or channels_last; w, b [C]. One program a sample and group, in blocks: the sum; then, about
that mean, the sums of what is left and of its squares, so that a large mean costs no digits; then the result, less both means.
A group of SD 1.x at 64x64 is 2,560 to 122,880 elements (960
channels); whether the second and third reading come from the cache is not yet measured. Backward saves x and the statistics
[B groups], the mean as two numbers; n is made again. Arithmetic fp32, one rounding at the store; sums in a fixed order.
Bytes an element: forward 2 s (s = bytes of x's dtype), backward 3 s.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch

MAX_BLOCK = 2048  # elements in flight: 8 warps. By arithmetic, not yet measured on a GPU


@triton.jit
def _place(o_i, space, channels, width, CHANNELS_LAST: tl.constexpr):
    """(offset from the group's first element, channel within the group) of elements o_i; `width` channels in a group."""
    if CHANNELS_LAST:
        c = o_i % width
        offset = o_i // width * channels + c
    else:
        c = o_i // space
        offset = o_i
    return offset, c


@triton.jit
def _start(i, groups, space, channels, width, units, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offset of the first element of program i's group, int64."""
    if CHANNELS_LAST:
        first = i // groups * space * channels + i % groups * width
    else:
        first = i * units * UNIT
    return first


@triton.jit
def _group_norm_silu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, more_ptr, rstd_ptr, eps: tl.float32, groups, space, channels, width, units,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    first = _start(i, groups, space, channels, width, units, UNIT, CHANNELS_LAST)
    n = units * UNIT
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(BLOCKS):
        o_i = k * BLOCK + tl.arange(0, BLOCK)
        offset, _ = _place(o_i, space, channels, width, CHANNELS_LAST)
        total += tl.load(x_ptr + first + offset, mask=o_i < n, other=0.0).to(tl.float32)
    mean = tl.sum(total) / n
    left, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(BLOCKS):
        o_i = k * BLOCK + tl.arange(0, BLOCK)
        offset, _ = _place(o_i, space, channels, width, CHANNELS_LAST)
        x = tl.load(x_ptr + first + offset, mask=o_i < n, other=0.0).to(tl.float32)
        d = tl.where(o_i < n, x - mean, 0.0)
        left += d
        squares += d * d
    more = tl.sum(left) / n
    rstd = tl.rsqrt(tl.sum(squares) / n - more * more + eps)
    tl.store(mean_ptr + i, mean)
    tl.store(more_ptr + i, more)
    tl.store(rstd_ptr + i, rstd)
    channel = i % groups * width
    for k in range(BLOCKS):
        o_i = k * BLOCK + tl.arange(0, BLOCK)
        m_i = o_i < n
        offset, c = _place(o_i, space, channels, width, CHANNELS_LAST)
        x = tl.load(x_ptr + first + offset, mask=m_i, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + channel + c, mask=m_i, other=0.0).to(tl.float32)
        y = (x - mean - more) * rstd * w + tl.load(b_ptr + channel + c, mask=m_i, other=0.0).to(tl.float32)
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(y_ptr + first + offset, y.to(y_ptr.dtype.element_ty), mask=m_i)


@triton.jit
def _pulled_back(g_ptr, x_ptr, w_ptr, b_ptr, first, offset, o_c, m_i, mean, more, rstd, SILU: tl.constexpr):
    """(h, xhat) of some elements."""
    x = tl.load(x_ptr + first + offset, mask=m_i, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + o_c, mask=m_i, other=0.0).to(tl.float32)
    h = tl.load(g_ptr + first + offset, mask=m_i, other=0.0).to(tl.float32) * w
    xhat = (x - mean - more) * rstd
    if SILU:
        y = xhat * w + tl.load(b_ptr + o_c, mask=m_i, other=0.0).to(tl.float32)
        s = tl.sigmoid(y)
        h = h * (s * (1.0 + y * (1.0 - s)))
    return h, tl.where(m_i, xhat, 0.0)


@triton.jit
def _group_norm_silu_gradient_kernel(
    g_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, more_ptr, rstd_ptr, dx_ptr, groups, space, channels, width, units,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    first = _start(i, groups, space, channels, width, units, UNIT, CHANNELS_LAST)
    n = units * UNIT
    mean, more, rstd = tl.load(mean_ptr + i), tl.load(more_ptr + i), tl.load(rstd_ptr + i)
    channel = i % groups * width
    sums, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(BLOCKS):
        o_i = k * BLOCK + tl.arange(0, BLOCK)
        offset, c = _place(o_i, space, channels, width, CHANNELS_LAST)
        h, xhat = _pulled_back(g_ptr, x_ptr, w_ptr, b_ptr, first, offset, channel + c, o_i < n, mean, more, rstd, SILU)
        sums += h
        slopes += h * xhat
    h_mean, slope = tl.sum(sums) / n, tl.sum(slopes) / n
    for k in range(BLOCKS):
        o_i = k * BLOCK + tl.arange(0, BLOCK)
        offset, c = _place(o_i, space, channels, width, CHANNELS_LAST)
        h, xhat = _pulled_back(g_ptr, x_ptr, w_ptr, b_ptr, first, offset, channel + c, o_i < n, mean, more, rstd, SILU)
        dx = rstd * (h - h_mean - xhat * slope)
        tl.store(dx_ptr + first + offset, dx.to(dx_ptr.dtype.element_ty), mask=o_i < n)


def is_channels_last(x):
    """How the kernels read x; None where they cannot."""
    if x.is_contiguous():
        return False
    return True if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def _launch(kernel, tensors, x, groups, silu, *numbers):
    batch, channels = x.shape[:2]
    space, width = math.prod(x.shape[2:]), channels // groups
    n = launch.row_length(x) // groups
    unit, block = math.gcd(16, n), min(MAX_BLOCK, max(launch.PER_WARP, triton.next_power_of_2(n)))
    launch.launch(
        kernel, batch * groups, *tensors, *numbers, groups, space, channels, width, n // unit,
        UNIT=unit, CHANNELS_LAST=is_channels_last(x), SILU=silu, BLOCKS=triton.cdiv(n, block), block=block,
    )  # fmt: skip


def _forward_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _forward_cpu(x, weight, bias, groups, eps, silu)
    y = torch.empty_like(x, dtype=launch.output_dtype(x.dtype))
    mean, rstd = (torch.empty(k, len(x) * groups, dtype=torch.float32, device=x.device) for k in (2, 1))
    _launch(_group_norm_silu_kernel, (x, weight, bias, y, *mean, *rstd), x, groups, silu, eps)
    return y.to(x.dtype), mean, rstd[0]


def _forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = reference.group_norm_silu(x, weight, bias, groups, eps, silu)
    return torch.empty_like(x).copy_(y), mean, rstd


def _gradient_cuda(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> Tensor:
    if x.dtype == torch.float64:
        return _gradient_cpu(g, x, weight, bias, mean, rstd, groups, silu)
    if g.stride() != x.stride():  # an upstream gradient in another layout is brought to x's
        g = torch.empty_like(x, dtype=g.dtype).copy_(g)
    dx = torch.empty_like(x, dtype=launch.output_dtype(x.dtype))
    _launch(_group_norm_silu_gradient_kernel, (g, x, weight, bias, *mean, rstd, dx), x, groups, silu)
    return dx.to(x.dtype)


def _gradient_cpu(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> Tensor:
    return torch.empty_like(x).copy_(reference.group_norm_silu_gradient(g, x, weight, bias, mean, rstd, groups, silu))


def _forward_fake(x, weight, bias, groups, eps, silu):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.shape[0] * groups
    return torch.empty_like(x), x.new_empty(2, n, dtype=dtype), x.new_empty(n, dtype=dtype)


group_norm_silu = launch.define("group_norm_silu", _forward_cuda, _forward_cpu, _forward_fake)
group_norm_silu_gradient = launch.define(
    "group_norm_silu_gradient", _gradient_cuda, _gradient_cpu,
    lambda g, x, weight, bias, mean, rstd, groups, silu: torch.empty_like(x),
)  # fmt: skip


def _context(ctx, inputs, output):
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx, g, *_):
    return group_norm_silu_gradient(g, *ctx.saved_tensors, ctx.groups, ctx.silu), *[None] * 5


group_norm_silu.register_autograd(_backward, setup_context=_context)


def bytes_moved(x, backward=False):
    """Compulsory traffic: x in, y out; or x and dy in, dx out."""
    return (3 if backward else 2) * x.numel() * x.element_size()
