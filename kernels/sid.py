"""Score identity distillation: value and three gradients.

    d = y_real - y_fake,   e = y_real - x                                  weight [R] fp32
    sid_energy = sum w d (e - alpha d)
    dx = -w d,   dy_real = w (e + (1 - 2 alpha) d),   dy_fake = w (2 alpha d - e)

Shapes: x, y_real, y_fake [B, ...] of any strides; R = B, or B * F for one weight a frame of [B, F, ...]. Backward
recomputes d and e and writes the three gradients in one pass. Arithmetic fp32, one rounding at each store.
Bytes an element: forward 3 s; backward 6 s (3 read, 3 written).
Source: Zhou et al. 2024 (SiD, arXiv 2404.04057).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch
from fastsds.kernels.noise import offsets, row_value


@triton.jit
def _differences(x_ptr, real_ptr, fake_ptr, i_b, o_i, m_i, sizes, x_strides, real_strides, fake_strides,
                 UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr):  # fmt: skip
    o_real = i_b * real_strides[0] * UNIT + offsets(o_i, sizes, real_strides, CONTIGUOUS)
    o_fake = i_b * fake_strides[0] * UNIT + offsets(o_i, sizes, fake_strides, CONTIGUOUS)
    x = tl.load(x_ptr + i_b * x_strides[0] * UNIT + offsets(o_i, sizes, x_strides, CONTIGUOUS), mask=m_i)
    real = tl.load(real_ptr + o_real, mask=m_i).to(tl.float32)
    fake = tl.load(fake_ptr + o_fake, mask=m_i).to(tl.float32)
    return real - fake, real - x.to(tl.float32)


@triton.jit
def _sid_energy_kernel(
    x_ptr, real_ptr, fake_ptr, weight_ptr, out_ptr, alpha, frames, frame, blocks, units,
    sizes, x_strides, real_strides, fake_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    d, e = _differences(x_ptr, real_ptr, fake_ptr, i_b, o_i, m_i, sizes, x_strides, real_strides, fake_strides,
                        UNIT, CONTIGUOUS)  # fmt: skip
    terms = row_value(weight_ptr, i_b, o_i, m_i, frames, frame, FRAMED) * d * (e - alpha * d)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(m_i, terms, 0.0)))


@triton.jit
def _sid_gradients_kernel(
    x_ptr, real_ptr, fake_ptr, weight_ptr, scale_ptr, dx_ptr, dreal_ptr, dfake_ptr, alpha, frames, frame, blocks, units,
    sizes, x_strides, real_strides, fake_strides, dx_strides, dreal_strides, dfake_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    d, e = _differences(x_ptr, real_ptr, fake_ptr, i_b, o_i, m_i, sizes, x_strides, real_strides, fake_strides,
                        UNIT, CONTIGUOUS)  # fmt: skip
    w = tl.load(scale_ptr) * row_value(weight_ptr, i_b, o_i, m_i, frames, frame, FRAMED)
    twice = 2.0 * alpha
    o_dx = i_b * dx_strides[0] * UNIT + offsets(o_i, sizes, dx_strides, CONTIGUOUS)
    o_real = i_b * dreal_strides[0] * UNIT + offsets(o_i, sizes, dreal_strides, CONTIGUOUS)
    o_fake = i_b * dfake_strides[0] * UNIT + offsets(o_i, sizes, dfake_strides, CONTIGUOUS)
    tl.store(dx_ptr + o_dx, (-w * d).to(dx_ptr.dtype.element_ty), mask=m_i)
    tl.store(dreal_ptr + o_real, (w * (e + (1.0 - twice) * d)).to(dreal_ptr.dtype.element_ty), mask=m_i)
    tl.store(dfake_ptr + o_fake, (w * (twice * d - e)).to(dfake_ptr.dtype.element_ty), mask=m_i)


def _launch(kernel, tensors, strided, weight, alpha):
    """strided: the tensors of `tensors` that are laid out like samples."""
    layout = launch.Layout(*strided)
    block = launch.block_size(layout.n)
    blocks, frames = triton.cdiv(layout.n, block), len(weight) // len(strided[0])
    launch.launch(
        kernel, len(strided[0]) * blocks, *tensors, alpha, frames, layout.n // frames, blocks, layout.n // layout.unit,
        layout.sizes, *layout.strides, UNIT=layout.unit, CONTIGUOUS=layout.contiguous, FRAMED=frames > 1, block=block,
    )  # fmt: skip


def _energy_cuda(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float) -> Tensor:
    if weight.dtype == torch.float64:
        return _energy_cpu(x, real, fake, weight, alpha)
    n = launch.row_length(x)
    partial = torch.empty(len(x) * triton.cdiv(n, launch.block_size(n)), dtype=torch.float32, device=x.device)
    _launch(_sid_energy_kernel, (x, real, fake, weight, partial), (x, real, fake), weight, alpha)
    return partial.sum()


def _energy_cpu(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float) -> Tensor:
    return reference.sid_energy(x, real, fake, weight, alpha)


def _gradients_cuda(
    x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype == torch.float64:
        return _gradients_cpu(x, real, fake, weight, alpha, scale)
    out = tuple(torch.empty_like(v, dtype=launch.output_dtype(v.dtype)) for v in (x, real, fake))
    _launch(_sid_gradients_kernel, (x, real, fake, weight, scale, *out), (x, real, fake, *out), weight, alpha)
    return tuple(g.to(v.dtype) for g, v in zip(out, (x, real, fake)))


def _gradients_cpu(
    x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found = reference.sid_gradients(x, real, fake, weight, alpha, scale)
    return tuple(torch.empty_like(v).copy_(g) for g, v in zip(found, (x, real, fake)))


sid_energy = launch.define(
    "sid_energy", _energy_cuda, _energy_cpu, lambda x, real, fake, weight, alpha: weight.new_empty(())
)
sid_gradients = launch.define(
    "sid_gradients", _gradients_cuda, _gradients_cpu,
    lambda x, real, fake, weight, alpha, scale: tuple(torch.empty_like(v) for v in (x, real, fake)),
)  # fmt: skip


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.alpha = inputs[4]


def _backward(ctx, upstream):
    grads = sid_gradients(*ctx.saved_tensors, ctx.alpha, upstream)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None


sid_energy.register_autograd(_backward, setup_context=_context)


def bytes_moved(x, real, fake, backward=False):
    """Compulsory traffic of the value, or of the three gradients, in bytes."""
    return (2 if backward else 1) * sum(v.numel() * v.element_size() for v in (x, real, fake))
