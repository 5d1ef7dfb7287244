"""The gated GELU of diffusers' feed-forward blocks: forward, and backward to the input.

    y = h gelu(q),   (h, q) = the halves of x's last axis,   gelu(q) = q Phi(q),   Phi(q) = (1 + erf(q / sqrt 2)) / 2
    dh = dy gelu(q),   dq = dy h (Phi(q) + q phi(q)),   phi(q) = exp(-q^2 / 2) / sqrt(2 pi)

Shapes: x [..., 2 n] of any strides, y [..., n] contiguous. Saves x alone. The error function is exact to fp32 rounding, not
the tanh form. Arithmetic fp32, one rounding at the store.
Bytes an element of y: forward 3 s (s = bytes of x's dtype), backward 5 s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch
from fastsds.kernels.noise import places

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _place(rows, units, blocks, UNIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row indices [R, 1], column indices [1, COLUMNS] and the mask of this program's tile."""
    o_r = tl.program_id(0) // blocks * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)[:, None]
    o_i = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return o_r, o_i, (o_r < rows) & (o_i < units * UNIT)


@triton.jit
def _geglu_kernel(
    h_ptr, q_ptr, y_ptr, rows, units, blocks, sizes, x_strides, y_strides, x_step, y_step,
    UNIT: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_r, o_i, m = _place(rows, units, blocks, UNIT, COLUMNS, BLOCK)
    o_x = places(o_r, o_i, sizes, x_strides, x_step, SINGLE, UNIT)
    h = tl.load(h_ptr + o_x, mask=m).to(tl.float32)
    q = tl.load(q_ptr + o_x, mask=m).to(tl.float32)
    y = h * (q * (0.5 * (1.0 + tl.math.erf(q * SQRT_HALF))))
    tl.store(y_ptr + places(o_r, o_i, sizes, y_strides, y_step, SINGLE, UNIT), y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _geglu_gradient_kernel(
    g_ptr, h_ptr, q_ptr, dh_ptr, dq_ptr,
    rows, units, blocks, sizes, g_strides, x_strides, dx_strides, g_step, x_step, dx_step,
    UNIT: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_r, o_i, m = _place(rows, units, blocks, UNIT, COLUMNS, BLOCK)
    o_x = places(o_r, o_i, sizes, x_strides, x_step, SINGLE, UNIT)
    g = tl.load(g_ptr + places(o_r, o_i, sizes, g_strides, g_step, SINGLE, UNIT), mask=m).to(tl.float32)
    h = tl.load(h_ptr + o_x, mask=m).to(tl.float32)
    q = tl.load(q_ptr + o_x, mask=m).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.math.erf(q * SQRT_HALF))
    dq = g * h * (cdf + q * (DENSITY * tl.exp(-0.5 * q * q)))
    o_dx = places(o_r, o_i, sizes, dx_strides, dx_step, SINGLE, UNIT)
    tl.store(dh_ptr + o_dx, (g * (q * cdf)).to(dh_ptr.dtype.element_ty), mask=m)
    tl.store(dq_ptr + o_dx, dq.to(dq_ptr.dtype.element_ty), mask=m)


def _launch(kernel, views, tensors):
    """`views`: one tensor [..., n] for each set of strides the kernel takes; `tensors`: all it reads and writes."""
    n = views[0].shape[-1]
    r = launch.Rows(n, *views)
    height, width = r.tile
    blocks = triton.cdiv(n, width)
    launch.launch(
        kernel, triton.cdiv(r.rows, height) * blocks, *tensors,
        r.rows, n // r.unit, blocks, r.sizes, *r.strides, *r.steps,
        UNIT=r.unit, SINGLE=r.single, COLUMNS=width, block=height * width,
    )  # fmt: skip


def _empty(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _geglu_cuda(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return _geglu_cpu(x)
    y = _empty(x).to(launch.output_dtype(x.dtype))
    h, q = x.chunk(2, -1)
    _launch(_geglu_kernel, (h, y), (h, q, y))
    return y.to(x.dtype)


def _geglu_cpu(x: Tensor) -> Tensor:
    return _empty(x).copy_(reference.geglu(x))


def _gradient_cuda(g: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return _gradient_cpu(g, x)
    dx = torch.empty_like(x, dtype=launch.output_dtype(x.dtype))
    (h, q), (dh, dq) = x.chunk(2, -1), dx.chunk(2, -1)
    _launch(_geglu_gradient_kernel, (g, h, dh), (g, h, q, dh, dq))
    return dx.to(x.dtype)


def _gradient_cpu(g: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(reference.geglu_gradient(g, x))


geglu = launch.define("geglu", _geglu_cuda, _geglu_cpu, _empty)
geglu_gradient = launch.define("geglu_gradient", _gradient_cuda, _gradient_cpu, lambda g, x: torch.empty_like(x))


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, g):
    return geglu_gradient(g, *ctx.saved_tensors)


geglu.register_autograd(_backward, setup_context=_context)


def bytes_moved(x, backward=False):
    """Compulsory traffic: x in, y out; or x and dy in, dx out."""
    return x.numel() * x.element_size() * (5 if backward else 3) // 2
