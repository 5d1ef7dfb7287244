"""Layer norm of a frozen network over the last axis: forward, and backward to the input alone.

    y = xhat w + b,   xhat = (x - mean) rstd,   rstd = 1 / sqrt(var + eps)
    dx = rstd (h - mean(h) - xhat mean(h xhat)),   h = w dy                         no gradient of w and b

Shapes: x, y [..., n] of any strides; w, b [n] contiguous; eps a number. A row stays in registers: the mean twice (the second
takes off what the first lost to rounding), then the squares of what is left, so that a large mean costs no digits. Backward
saves x alone and takes its statistics again. Arithmetic fp32, one rounding at the store.
Bytes an element: forward 2 s (s = bytes of x's dtype), backward 3 s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch
from fastsds.kernels.noise import places

MAX_ROW = 8192  # elements of a row: 8 a thread at 1,024 threads


@triton.jit
def _centred(x, m, n):
    """x less its rows' means, zero where masked, and the rows' 1 / n * sum of squares, [R, 1]."""
    x = tl.where(m, x - tl.sum(x, 1, keep_dims=True) / n, 0.0)
    x = tl.where(m, x - tl.sum(x, 1, keep_dims=True) / n, 0.0)
    return x, tl.sum(x * x, 1, keep_dims=True) / n


@triton.jit
def _layer_norm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    rows, units, sizes, x_strides, y_strides, x_step, y_step, eps: tl.float32,
    UNIT: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)[:, None]
    o_i = tl.arange(0, COLUMNS)[None, :]
    m_i = o_i < units * UNIT
    m = (o_r < rows) & m_i
    x = tl.load(x_ptr + places(o_r, o_i, sizes, x_strides, x_step, SINGLE, UNIT), mask=m, other=0.0)
    d, var = _centred(x.to(tl.float32), m, units * UNIT)
    w = tl.load(w_ptr + o_i, mask=m_i, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + o_i, mask=m_i, other=0.0).to(tl.float32)
    y = d * tl.rsqrt(var + eps) * w + b
    tl.store(y_ptr + places(o_r, o_i, sizes, y_strides, y_step, SINGLE, UNIT), y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _layer_norm_gradient_kernel(
    g_ptr, x_ptr, w_ptr, dx_ptr,
    rows, units, sizes, g_strides, x_strides, dx_strides, g_step, x_step, dx_step, eps: tl.float32,
    UNIT: tl.constexpr, SINGLE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)[:, None]
    o_i = tl.arange(0, COLUMNS)[None, :]
    m_i = o_i < units * UNIT
    m = (o_r < rows) & m_i
    n = units * UNIT
    x = tl.load(x_ptr + places(o_r, o_i, sizes, x_strides, x_step, SINGLE, UNIT), mask=m, other=0.0)
    g = tl.load(g_ptr + places(o_r, o_i, sizes, g_strides, g_step, SINGLE, UNIT), mask=m, other=0.0)
    d, var = _centred(x.to(tl.float32), m, n)
    rstd = tl.rsqrt(var + eps)
    xhat = d * rstd
    h = g.to(tl.float32) * tl.load(w_ptr + o_i, mask=m_i, other=0.0).to(tl.float32)
    mean = tl.sum(h, 1, keep_dims=True) / n
    slope = tl.sum(h * xhat, 1, keep_dims=True) / n
    dx = rstd * (h - mean - xhat * slope)
    tl.store(dx_ptr + places(o_r, o_i, sizes, dx_strides, dx_step, SINGLE, UNIT), dx.to(dx_ptr.dtype.element_ty), mask=m)


def _launch(kernel, tensors, weights, eps):
    """`tensors`: inputs, then the output, all of one shape."""
    n = tensors[0].shape[-1]
    if n > MAX_ROW:
        raise ValueError(f"x: at most {MAX_ROW} elements on the last axis are supported, got shape {tuple(tensors[0].shape)}")
    r = launch.Rows(n, *tensors, columns=MAX_ROW)
    height, width = r.tile
    launch.launch(
        kernel, triton.cdiv(r.rows, height), *tensors[:-1], *weights, tensors[-1],
        r.rows, n // r.unit, r.sizes, *r.strides, *r.steps, eps,
        UNIT=r.unit, SINGLE=r.single, COLUMNS=width, block=height * width,
    )  # fmt: skip


def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float64:
        return _layer_norm_cpu(x, weight, bias, eps)
    y = torch.empty_like(x, dtype=launch.output_dtype(x.dtype))
    _launch(_layer_norm_kernel, (x, y), (weight, bias), eps)
    return y.to(x.dtype)


def _layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x).copy_(reference.layer_norm(x, weight, bias, eps))


def _gradient_cuda(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float64:
        return _gradient_cpu(g, x, weight, eps)
    dx = torch.empty_like(x, dtype=launch.output_dtype(x.dtype))
    _launch(_layer_norm_gradient_kernel, (g, x, dx), (weight,), eps)
    return dx.to(x.dtype)


def _gradient_cpu(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x).copy_(reference.layer_norm_gradient(g, x, weight, eps))


layer_norm = launch.define(
    "layer_norm", _layer_norm_cuda, _layer_norm_cpu, lambda x, weight, bias, eps: torch.empty_like(x)
)
layer_norm_gradient = launch.define(
    "layer_norm_gradient", _gradient_cuda, _gradient_cpu, lambda g, x, weight, eps: torch.empty_like(x)
)


def _context(ctx, inputs, output):
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, g):
    return layer_norm_gradient(g, *ctx.saved_tensors, ctx.eps), None, None, None


layer_norm.register_autograd(_backward, setup_context=_context)


def bytes_moved(x, backward=False):
    """Compulsory traffic: x in, y out; or x and dy in, dx out."""
    return (3 if backward else 2) * x.numel() * x.element_size()
