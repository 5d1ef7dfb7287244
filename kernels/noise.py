"""Noise injection, with the noise made in registers when it is given by seed.

    x_t = alpha * x0 + sigma * eps                     dx0 = alpha * g,   deps = sigma * g (when eps is a tensor)

Shapes: x0, x_t, eps [B, ...] of any strides; alpha, sigma [R] fp32, R = B, or B * F for one value a frame of [B, F, ...].
eps is a tensor or the stream (seed, draw, ids) of `philox.py`, indexed by the row-major logical index within the sample,
whatever the layout. Arithmetic fp32, one rounding at the store.
Bytes an element: forward 2 s with a seed (s = bytes of x0's dtype), 2 s + s_eps with a tensor; backward 2 s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch
from fastsds.kernels.philox import normal_block


@triton.jit
def offsets(o_i, sizes, strides, CONTIGUOUS: tl.constexpr):
    """Offset of logical elements o_i within a sample; sizes (n0..nk), strides (row, s0..sk) as in launch.Layout."""
    if CONTIGUOUS:
        offset = o_i
    else:
        last: tl.constexpr = len(sizes) - 1
        rest = o_i.to(tl.int64)
        offset = rest * 0
        for k in tl.static_range(last):
            offset += rest % sizes[last - k] * strides[last - k + 1]
            rest = rest // sizes[last - k]
        offset += rest * strides[1]
    return offset


@triton.jit
def places(o_r, o_i, sizes, strides, step, SINGLE: tl.constexpr, UNIT: tl.constexpr):
    """Offset of columns o_i of rows o_r, as launch.Rows describes them: 64 bits, as columns may lie far apart."""
    return offsets(o_r, sizes, strides, SINGLE) * UNIT + o_i.to(tl.int64) * step


@triton.jit
def row_value(ptr, i_b, o_i, m_i, frames, frame, FRAMED: tl.constexpr):
    """The factor of sample i_b, or of the frame that each of its elements o_i lies in: `frame` elements each."""
    if FRAMED:
        value = tl.load(ptr + i_b * frames + o_i // frame, mask=m_i, other=0.0)
    else:
        value = tl.load(ptr + i_b)
    return value


@triton.jit(do_not_specialize=["seed"])
def _add_noise_kernel(
    x_ptr, eps_ptr, alpha_ptr, sigma_ptr, draw_ptr, id_ptr, out_ptr,
    seed, draw_stride, frames, frame, blocks, units, sizes, x_strides, eps_strides, out_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    o_i = start + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    x = tl.load(x_ptr + i_b * x_strides[0] * UNIT + offsets(o_i, sizes, x_strides, CONTIGUOUS), mask=m_i)
    if SEEDED:
        eps = normal_block(start, seed, tl.load(draw_ptr + i_b * draw_stride), tl.load(id_ptr + i_b), BLOCK)
    else:
        eps = tl.load(eps_ptr + i_b * eps_strides[0] * UNIT + offsets(o_i, sizes, eps_strides, CONTIGUOUS), mask=m_i)
    alpha = row_value(alpha_ptr, i_b, o_i, m_i, frames, frame, FRAMED)
    sigma = row_value(sigma_ptr, i_b, o_i, m_i, frames, frame, FRAMED)
    x_t = alpha * x.to(tl.float32) + sigma * eps.to(tl.float32)
    o_out = i_b * out_strides[0] * UNIT + offsets(o_i, sizes, out_strides, CONTIGUOUS)
    tl.store(out_ptr + o_out, x_t.to(out_ptr.dtype.element_ty), mask=m_i)


@triton.jit
def _scale_rows_kernel(
    x_ptr, scale_ptr, out_ptr, frames, frame, blocks, units, sizes, x_strides, out_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    x = tl.load(x_ptr + i_b * x_strides[0] * UNIT + offsets(o_i, sizes, x_strides, CONTIGUOUS), mask=m_i)
    y = row_value(scale_ptr, i_b, o_i, m_i, frames, frame, FRAMED) * x.to(tl.float32)
    o_out = i_b * out_strides[0] * UNIT + offsets(o_i, sizes, out_strides, CONTIGUOUS)
    tl.store(out_ptr + o_out, y.to(out_ptr.dtype.element_ty), mask=m_i)


def _add_noise_cuda(
    x0: Tensor, eps: Tensor | None, alpha: Tensor, sigma: Tensor, seed: int, draw: Tensor | None, ids: Tensor | None
) -> Tensor:
    if reference.compute_dtype(x0, eps) == torch.float64:
        return _add_noise_cpu(x0, eps, alpha, sigma, seed, draw, ids)
    out = torch.empty_like(x0, dtype=launch.output_dtype(x0.dtype))
    layout = launch.Layout(x0, out, x0 if eps is None else eps)
    block = launch.block_size(layout.n)
    blocks = triton.cdiv(layout.n, block)
    frames = len(alpha) // len(x0)
    launch.launch(
        _add_noise_kernel, len(x0) * blocks,
        x0, eps, alpha, sigma, draw, ids, out,
        seed, 0 if draw is None or len(draw) == 1 else 1, frames, layout.n // frames, blocks, layout.n // layout.unit,
        layout.sizes, layout.strides[0], layout.strides[2], layout.strides[1],
        UNIT=layout.unit, CONTIGUOUS=layout.contiguous, FRAMED=frames > 1, SEEDED=eps is None, block=block,
    )  # fmt: skip
    return out.to(x0.dtype)


def _add_noise_cpu(
    x0: Tensor, eps: Tensor | None, alpha: Tensor, sigma: Tensor, seed: int, draw: Tensor | None, ids: Tensor | None
) -> Tensor:
    out = reference.add_noise(x0, reference.resolve_noise(x0, eps, draw, ids, seed), alpha, sigma)
    return torch.empty_like(x0).copy_(out)


def _scale_rows_cuda(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if reference.compute_dtype(x, scale) == torch.float64:
        return _scale_rows_cpu(x, scale, dtype)
    out = torch.empty_like(x, dtype=launch.output_dtype(dtype))
    layout = launch.Layout(x, out)
    block = launch.block_size(layout.n)
    blocks = triton.cdiv(layout.n, block)
    frames = len(scale) // len(x)
    launch.launch(
        _scale_rows_kernel, len(x) * blocks,
        x, scale, out, frames, layout.n // frames, blocks, layout.n // layout.unit, layout.sizes, *layout.strides,
        UNIT=layout.unit, CONTIGUOUS=layout.contiguous, FRAMED=frames > 1, block=block,
    )  # fmt: skip
    return out.to(dtype)


def _scale_rows_cpu(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype).copy_(reference.scale_rows(x, scale, dtype))


add_noise = launch.define(
    "add_noise",
    _add_noise_cuda,
    _add_noise_cpu,
    lambda x0, eps, alpha, sigma, seed, draw, ids: torch.empty_like(x0),
)
scale_rows = launch.define(
    "scale_rows", _scale_rows_cuda, _scale_rows_cpu, lambda x, scale, dtype: torch.empty_like(x, dtype=dtype)
)


def _add_noise_context(ctx, inputs, output):
    _, eps, alpha, sigma, _, _, _ = inputs
    ctx.save_for_backward(alpha, sigma)
    ctx.eps_dtype = None if eps is None else eps.dtype


def _add_noise_backward(ctx, g):
    alpha, sigma = ctx.saved_tensors
    dx = scale_rows(g, alpha, g.dtype) if ctx.needs_input_grad[0] else None
    deps = scale_rows(g, sigma, ctx.eps_dtype) if ctx.needs_input_grad[1] else None
    return dx, deps, None, None, None, None, None


def _scale_rows_context(ctx, inputs, output):
    x, scale, _ = inputs
    ctx.save_for_backward(scale)
    ctx.dtype = x.dtype


def _scale_rows_backward(ctx, g):
    return scale_rows(g, ctx.saved_tensors[0], ctx.dtype), None, None


add_noise.register_autograd(_add_noise_backward, setup_context=_add_noise_context)
scale_rows.register_autograd(_scale_rows_backward, setup_context=_scale_rows_context)


def bytes_moved(x0, eps=None, backward=False):
    """Compulsory traffic of add_noise (or of its backward to x0), in bytes."""
    both = 2 * x0.numel() * x0.element_size()
    return both if backward or eps is None else both + eps.numel() * eps.element_size()
