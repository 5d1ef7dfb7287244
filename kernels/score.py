"""Score residuals: the energy that denoising_loss and sds_loss report, and the gradient they inject.

    r = p_b * pred + q_b * y - a_b * eps                                   factors [4, B] = rows p, q, a, k (fp32)
    denoising_energy = sum_b k_b sum_i r_bi^2                              dpred = 2 k p r, dy = 2 k q r, deps = -2 k a r
    sds_energy       = 1/2 sum_b k_b sum_i r_bi^2                          dx0 = k r, and nothing else: injected

Shapes: pred, y (optional), eps [B, ...] of any strides. eps is a tensor or the stream (seed, draw, ids), regenerated in
registers in forward and in backward and never stored. Backward recomputes r from what already exists instead of saving it:
one rounding, upstream gradient included, and no buffer between the two. Arithmetic fp32; partial sums in a fixed order.
Bytes an element, by seed, without y: forward s_pred; backward s_pred + s_x0. A tensor y or eps adds its own bytes to both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch
from fastsds.kernels.noise import offsets
from fastsds.kernels.philox import normal_block


@triton.jit
def _residual(
    pred_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr,
    seed, draw_stride, batch, i_b, start, m_i, sizes, pred_strides, y_strides, eps_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, HAS_Y: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_i = start + tl.arange(0, BLOCK)
    pred = tl.load(pred_ptr + i_b * pred_strides[0] * UNIT + offsets(o_i, sizes, pred_strides, CONTIGUOUS), mask=m_i)
    r = tl.load(factors_ptr + i_b) * pred.to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + i_b * y_strides[0] * UNIT + offsets(o_i, sizes, y_strides, CONTIGUOUS), mask=m_i)
        r = r + tl.load(factors_ptr + batch + i_b) * y.to(tl.float32)
    if SEEDED:
        eps = normal_block(start, seed, tl.load(draw_ptr + i_b * draw_stride), tl.load(id_ptr + i_b), BLOCK)
    else:
        eps = tl.load(eps_ptr + i_b * eps_strides[0] * UNIT + offsets(o_i, sizes, eps_strides, CONTIGUOUS), mask=m_i)
    return r - tl.load(factors_ptr + 2 * batch + i_b) * eps.to(tl.float32)


@triton.jit(do_not_specialize=["seed", "batch"])
def _energy_kernel(
    pred_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, out_ptr,
    seed, draw_stride, batch, blocks, units, sizes, pred_strides, y_strides, eps_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, HAS_Y: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    m_i = start + tl.arange(0, BLOCK) < units * UNIT
    r = _residual(
        pred_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr,
        seed, draw_stride, batch, i_b, start, m_i, sizes, pred_strides, y_strides, eps_strides,
        UNIT, CONTIGUOUS, HAS_Y, SEEDED, BLOCK,
    )  # fmt: skip
    square = tl.sum(tl.where(m_i, r * r, 0.0))
    tl.store(out_ptr + tl.program_id(0), square * tl.load(factors_ptr + 3 * batch + i_b))


@triton.jit(do_not_specialize=["seed", "batch"])
def _residual_gradient_kernel(
    pred_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, scale_ptr, out_ptr,
    seed, draw_stride, batch, blocks, units, sizes, pred_strides, y_strides, eps_strides, out_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, HAS_Y: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    o_i = start + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    r = _residual(
        pred_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr,
        seed, draw_stride, batch, i_b, start, m_i, sizes, pred_strides, y_strides, eps_strides,
        UNIT, CONTIGUOUS, HAS_Y, SEEDED, BLOCK,
    )  # fmt: skip
    g = tl.load(scale_ptr) * tl.load(factors_ptr + 3 * batch + i_b) * r
    o_out = i_b * out_strides[0] * UNIT + offsets(o_i, sizes, out_strides, CONTIGUOUS)
    tl.store(out_ptr + o_out, g.to(out_ptr.dtype.element_ty), mask=m_i)


def _arguments(pred, y, eps, factors, seed, draw, layout):
    """The arguments both kernels share: scalars and strides, then constants. Absent tensors borrow pred's strides."""
    s_pred, *rest = layout.strides
    s_y = rest.pop(0) if y is not None else s_pred
    s_eps = rest.pop(0) if eps is not None else s_pred
    block = launch.block_size(layout.n)
    blocks = triton.cdiv(layout.n, block)
    draw_stride = 0 if draw is None or len(draw) == 1 else 1
    scalars = (
        seed,
        draw_stride,
        len(pred),
        blocks,
        layout.n // layout.unit,
        layout.sizes,
        s_pred,
        s_y,
        s_eps,
    )
    constants = dict(UNIT=layout.unit, CONTIGUOUS=layout.contiguous, HAS_Y=y is not None, SEEDED=eps is None, block=block)
    return len(pred) * blocks, scalars, constants, rest


def _present(*tensors):
    return [v for v in tensors if v is not None]


def _energy(pred, y, eps, factors, seed, draw, ids):
    programs, scalars, constants, _ = _arguments(pred, y, eps, factors, seed, draw, launch.Layout(*_present(pred, y, eps)))
    partial = torch.empty(programs, dtype=torch.float32, device=pred.device)
    tensors = (pred, y, eps, factors, draw, ids, partial)
    launch.launch(_energy_kernel, programs, *tensors, *scalars, **constants)
    return partial.sum()


def _denoising_cuda(
    pred: Tensor,
    y: Tensor | None,
    eps: Tensor | None,
    factors: Tensor,
    seed: int,
    draw: Tensor | None,
    ids: Tensor | None,
) -> Tensor:
    if factors.dtype == torch.float64:
        return _denoising_cpu(pred, y, eps, factors, seed, draw, ids)
    return _energy(pred, y, eps, factors, seed, draw, ids)


def _denoising_cpu(
    pred: Tensor,
    y: Tensor | None,
    eps: Tensor | None,
    factors: Tensor,
    seed: int,
    draw: Tensor | None,
    ids: Tensor | None,
) -> Tensor:
    return reference.energy(pred, y, reference.resolve_noise(pred, eps, draw, ids, seed), factors)


def _sds_cuda(
    x0: Tensor, pred: Tensor, y: Tensor | None, eps: Tensor | None, factors: Tensor,
    seed: int, draw: Tensor | None, ids: Tensor | None,
) -> Tensor:  # fmt: skip
    return 0.5 * _denoising_cuda(pred, y, eps, factors, seed, draw, ids)


def _sds_cpu(
    x0: Tensor, pred: Tensor, y: Tensor | None, eps: Tensor | None, factors: Tensor,
    seed: int, draw: Tensor | None, ids: Tensor | None,
) -> Tensor:  # fmt: skip
    return 0.5 * _denoising_cpu(pred, y, eps, factors, seed, draw, ids)


def _gradient_cuda(
    pred: Tensor, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int, draw: Tensor | None, ids: Tensor | None,
    scale: Tensor, dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    if factors.dtype == torch.float64:
        return _gradient_cpu(pred, y, eps, factors, seed, draw, ids, scale, dtype, channels_last)
    out = _empty(pred, launch.output_dtype(dtype), channels_last)
    layout = launch.Layout(*_present(pred, y, eps), out)
    programs, scalars, constants, rest = _arguments(pred, y, eps, factors, seed, draw, layout)
    tensors = (pred, y, eps, factors, draw, ids, scale, out)
    launch.launch(_residual_gradient_kernel, programs, *tensors, *scalars, *rest, **constants)
    return out.to(dtype)


def _gradient_cpu(
    pred: Tensor, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int, draw: Tensor | None, ids: Tensor | None,
    scale: Tensor, dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    eps = reference.resolve_noise(pred, eps, draw, ids, seed)
    g = reference.residual_gradient(pred, y, eps, factors, scale, dtype)
    return _empty(pred, dtype, channels_last).copy_(g)


def _empty(pred, dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(pred.shape, dtype=dtype, device=pred.device, memory_format=memory_format)


def _scalar_fake(factors):
    return factors.new_empty(())


denoising_energy = launch.define(
    "denoising_energy", _denoising_cuda, _denoising_cpu,
    lambda pred, y, eps, factors, seed, draw, ids: _scalar_fake(factors),
)  # fmt: skip
sds_energy = launch.define(
    "sds_energy", _sds_cuda, _sds_cpu,
    lambda x0, pred, y, eps, factors, seed, draw, ids: _scalar_fake(factors),
)  # fmt: skip
residual_gradient = launch.define(
    "residual_gradient", _gradient_cuda, _gradient_cpu,
    lambda pred, y, eps, factors, seed, draw, ids, scale, dtype, channels_last: _empty(pred, dtype, channels_last),
)  # fmt: skip


def is_channels_last(x):
    """True if a 4-D tensor is laid out channels_last and not also row-major: its gradient then is, too."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _denoising_context(ctx, inputs, output):
    pred, y, eps, factors, seed, draw, ids = inputs
    ctx.save_for_backward(pred, y, eps, factors, draw, ids)
    ctx.seed = seed


def _denoising_backward(ctx, upstream):
    pred, y, eps, factors, draw, ids = ctx.saved_tensors
    grads = [None] * 7
    for i, (v, row, sign) in enumerate(((pred, 0, 2), (y, 1, 2), (eps, 2, -2))):
        if ctx.needs_input_grad[i]:
            scaled = torch.cat([factors[:3], (sign * factors[3] * factors[row])[None]])
            grads[i] = residual_gradient(pred, y, eps, scaled, ctx.seed, draw, ids, upstream, v.dtype, is_channels_last(v))
    return tuple(grads)


def _sds_context(ctx, inputs, output):
    x0, pred, y, eps, factors, seed, draw, ids = inputs
    ctx.save_for_backward(pred, y, eps, factors, draw, ids)
    ctx.seed, ctx.dtype, ctx.channels_last = seed, x0.dtype, is_channels_last(x0)


def _sds_backward(ctx, upstream):
    pred, y, eps, factors, draw, ids = ctx.saved_tensors
    args = (pred, y, eps, factors, ctx.seed, draw, ids, upstream, ctx.dtype, ctx.channels_last)
    return residual_gradient(*args), *[None] * 7


denoising_energy.register_autograd(_denoising_backward, setup_context=_denoising_context)
sds_energy.register_autograd(_sds_backward, setup_context=_sds_context)


def bytes_moved(x0, pred, y=None, eps=None, backward=False):
    """Compulsory traffic of the energy (forward) or of the injected gradient (backward), in bytes."""
    read = sum(v.numel() * v.element_size() for v in (pred, y, eps) if v is not None)
    return read + x0.numel() * x0.element_size() if backward else read
