"""Score residuals: what the losses report, and the gradient they inject.

    r = p * (pred + guide * (pred - other)) + q * y - a * eps              factors [4, R] = rows p, q, a, k (fp32)
    g = clip(k r)
    denoising_energy = sum k r^2                 dpred = 2 k p r, dy = 2 k q r, deps = -2 k a r
    sds_value        = sum g r / 2 | sum g^2 / 2 | sum g x0                dx0 = g, and nothing else: injected
    sample_sums      = each sample's sum of |r|, or of k r - k r           not differentiable: weights, and what to drop

Shapes: x0, pred, other, y, eps [B, ...] of any strides; other, y, eps may be absent. eps is a tensor or the stream (seed,
draw, ids), regenerated in registers in forward and in backward and never stored. R = B, or B * F for one value a frame of
[B, F, ...]. Backward recomputes r from what already exists instead of saving it: one rounding, upstream gradient included,
and no buffer between the two. Arithmetic fp32; partial sums in a fixed order.
Bytes an element, by seed, with pred alone: forward s_pred (and s_x0 for sum g x0); backward s_pred + s_x0. Each of other, y
and a tensor eps adds its own bytes to both.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch
from fastsds.kernels.noise import offsets, row_value
from fastsds.kernels.philox import normal_block

SUMS = {"energy": 0, "target": 1, "dot": 2, "absolute": 3, "finite": 4}
ENERGY, TARGET, DOT, ABSOLUTE, FINITE = (tl.constexpr(i) for i in SUMS.values())
POLICIES = {"propagate": 0, "zero": 1, "clamp": 2}
PROPAGATE, ZERO, CLAMP = (tl.constexpr(i) for i in POLICIES.values())
NO_NOISE, TENSOR, STREAM = (tl.constexpr(i) for i in range(3))


@triton.jit
def _residual(
    pred_ptr, other_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, guide, seed, draw_stride, rows, frames, frame,
    i_b, start, o_i, m_i, sizes, pred_strides, other_strides, y_strides, eps_strides, UNIT: tl.constexpr,
    CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, GUIDED: tl.constexpr, HAS_Y: tl.constexpr, NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o_pred = i_b * pred_strides[0] * UNIT + offsets(o_i, sizes, pred_strides, CONTIGUOUS)
    pred = tl.load(pred_ptr + o_pred, mask=m_i).to(tl.float32)
    if GUIDED:
        o_other = i_b * other_strides[0] * UNIT + offsets(o_i, sizes, other_strides, CONTIGUOUS)
        pred = pred + guide * (pred - tl.load(other_ptr + o_other, mask=m_i).to(tl.float32))
    r = row_value(factors_ptr, i_b, o_i, m_i, frames, frame, FRAMED) * pred
    if HAS_Y:
        y = tl.load(y_ptr + i_b * y_strides[0] * UNIT + offsets(o_i, sizes, y_strides, CONTIGUOUS), mask=m_i)
        r = r + row_value(factors_ptr + rows, i_b, o_i, m_i, frames, frame, FRAMED) * y.to(tl.float32)
    if NOISE == STREAM:
        eps = normal_block(start, seed, tl.load(draw_ptr + i_b * draw_stride), tl.load(id_ptr + i_b), BLOCK)
        r = r - row_value(factors_ptr + 2 * rows, i_b, o_i, m_i, frames, frame, FRAMED) * eps
    elif NOISE == TENSOR:
        eps = tl.load(eps_ptr + i_b * eps_strides[0] * UNIT + offsets(o_i, sizes, eps_strides, CONTIGUOUS), mask=m_i)
        r = r - row_value(factors_ptr + 2 * rows, i_b, o_i, m_i, frames, frame, FRAMED) * eps.to(tl.float32)
    return r


@triton.jit
def _clipped(r, k, clip, POLICY: tl.constexpr, CLIPPED: tl.constexpr):
    """(g, r): g = clip(k r), both 0 where k r is not finite and the policy says so."""
    g = k * r
    if POLICY != PROPAGATE:
        if POLICY == ZERO:
            bad = (g - g) != 0.0  # NaN and both infinities: their difference is NaN
        else:
            bad = g != g
        g = tl.where(bad, 0.0, g)
        r = tl.where(bad, 0.0, r)
    if CLIPPED:
        g = tl.where(g > clip, clip, tl.where(g < -clip, -clip, g))
    return g, r


@triton.jit(do_not_specialize=["seed", "rows"])
def _residual_sum_kernel(
    pred_ptr, other_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, x_ptr, out_ptr,
    guide, clip, seed, draw_stride, rows, frames, frame, blocks, units,
    sizes, pred_strides, other_strides, y_strides, eps_strides, x_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, GUIDED: tl.constexpr, HAS_Y: tl.constexpr,
    NOISE: tl.constexpr, POLICY: tl.constexpr, CLIPPED: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    o_i = start + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    r = _residual(
        pred_ptr, other_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, guide, seed, draw_stride, rows, frames, frame,
        i_b, start, o_i, m_i, sizes, pred_strides, other_strides, y_strides, eps_strides,
        UNIT, CONTIGUOUS, FRAMED, GUIDED, HAS_Y, NOISE, BLOCK,
    )  # fmt: skip
    if SUM == ABSOLUTE:
        terms = tl.abs(r)
    else:
        k = row_value(factors_ptr + 3 * rows, i_b, o_i, m_i, frames, frame, FRAMED)
        g, r = _clipped(r, k, clip, POLICY, CLIPPED)
        if SUM == ENERGY:
            terms = g * r
        elif SUM == TARGET:
            terms = g * g
        elif SUM == FINITE:
            terms = g - g  # NaN where g is NaN or infinite
        else:
            x = tl.load(x_ptr + i_b * x_strides[0] * UNIT + offsets(o_i, sizes, x_strides, CONTIGUOUS), mask=m_i)
            terms = g * x.to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(m_i, terms, 0.0)))


@triton.jit(do_not_specialize=["seed", "rows"])
def _residual_gradient_kernel(
    pred_ptr, other_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, scale_ptr, out_ptr,
    guide, clip, seed, draw_stride, rows, frames, frame, blocks, units,
    sizes, pred_strides, other_strides, y_strides, eps_strides, out_strides,
    UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FRAMED: tl.constexpr, GUIDED: tl.constexpr, HAS_Y: tl.constexpr,
    NOISE: tl.constexpr, POLICY: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    o_i = start + tl.arange(0, BLOCK)
    m_i = o_i < units * UNIT
    r = _residual(
        pred_ptr, other_ptr, y_ptr, eps_ptr, factors_ptr, draw_ptr, id_ptr, guide, seed, draw_stride, rows, frames, frame,
        i_b, start, o_i, m_i, sizes, pred_strides, other_strides, y_strides, eps_strides,
        UNIT, CONTIGUOUS, FRAMED, GUIDED, HAS_Y, NOISE, BLOCK,
    )  # fmt: skip
    k = row_value(factors_ptr + 3 * rows, i_b, o_i, m_i, frames, frame, FRAMED)
    g, _ = _clipped(r, k, clip, POLICY, CLIPPED)
    g = tl.load(scale_ptr) * g
    o_out = i_b * out_strides[0] * UNIT + offsets(o_i, sizes, out_strides, CONTIGUOUS)
    tl.store(out_ptr + o_out, g.to(out_ptr.dtype.element_ty), mask=m_i)


def _launch(
    kernel, extra, out, strided, pred, other, y, eps, factors, seed, draw, ids, guide=0.0, clip=math.inf,
    nonfinite="propagate", **constants,
):  # fmt: skip
    """Launch one of the two. extra: x0, or the scale; strided: the one of extra and out that is laid out like a sample."""
    given = {"pred": pred, "other": other, "y": y, "eps": eps, "strided": strided}
    present = {name: v for name, v in given.items() if v is not None}
    layout = launch.Layout(*present.values())
    strides = dict(zip(present, layout.strides))
    block, blocks = _blocks(layout.n)
    frames = factors.shape[1] // len(pred)
    launch.launch(
        kernel, len(pred) * blocks, pred, other, y, eps, factors, draw, ids, extra, out,
        guide, clip, seed, 0 if draw is None or len(draw) == 1 else 1, factors.shape[1], frames, layout.n // frames,
        blocks, layout.n // layout.unit, layout.sizes, *(strides.get(name, strides["pred"]) for name in given),
        UNIT=layout.unit, CONTIGUOUS=layout.contiguous, FRAMED=frames > 1, GUIDED=other is not None, HAS_Y=y is not None,
        NOISE=(TENSOR if eps is not None else NO_NOISE if ids is None else STREAM).value, POLICY=POLICIES[nonfinite],
        CLIPPED=clip < math.inf, block=block, **constants,
    )  # fmt: skip
    return out


def _blocks(n):
    """(elements a program, programs a sample)."""
    block = launch.block_size(n)
    return block, triton.cdiv(n, block)


def _sums(of, x, pred, *args):
    """[B, programs] partial sums, fp32. x: x0 for "dot", else None."""
    blocks = _blocks(launch.row_length(pred))[1]
    partial = torch.empty(len(pred), blocks, dtype=torch.float32, device=pred.device)
    return _launch(_residual_sum_kernel, x, partial, x, pred, *args, SUM=SUMS[of])


# -- denoising_energy --------------------------------------------------------------------------------------------------


def _denoising_cuda(
    pred: Tensor, y: Tensor | None, eps: Tensor | None, factors: Tensor,
    seed: int, draw: Tensor | None, ids: Tensor | None,
) -> Tensor:  # fmt: skip
    if factors.dtype == torch.float64:
        return _denoising_cpu(pred, y, eps, factors, seed, draw, ids)
    return _sums("energy", None, pred, None, y, eps, factors, seed, draw, ids).sum()


def _denoising_cpu(
    pred: Tensor, y: Tensor | None, eps: Tensor | None, factors: Tensor,
    seed: int, draw: Tensor | None, ids: Tensor | None,
) -> Tensor:  # fmt: skip
    return reference.energy(pred, y, reference.resolve_noise(pred, eps, draw, ids, seed), factors)


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
            args = (pred, None, y, eps, scaled, ctx.seed, draw, ids, 0.0, math.inf, "propagate", upstream)
            grads[i] = residual_gradient(*args, v.dtype, is_channels_last(v))
    return tuple(grads)


# -- sds_value and the gradient it injects -----------------------------------------------------------------------------


def _sds_cuda(
    x0: Tensor, pred: Tensor, other: Tensor | None, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int,
    draw: Tensor | None, ids: Tensor | None, guide: float, clip: float, nonfinite: str, value: str,
) -> Tensor:  # fmt: skip
    if factors.dtype == torch.float64:
        return _sds_cpu(x0, pred, other, y, eps, factors, seed, draw, ids, guide, clip, nonfinite, value)
    x = x0 if value == "dot" else None
    nonfinite = "zero" if nonfinite == "clamp" else nonfinite  # no infinity in what is reported
    total = _sums(value, x, pred, other, y, eps, factors, seed, draw, ids, guide, clip, nonfinite).sum()
    return total if value == "dot" else 0.5 * total


def _sds_cpu(
    x0: Tensor, pred: Tensor, other: Tensor | None, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int,
    draw: Tensor | None, ids: Tensor | None, guide: float, clip: float, nonfinite: str, value: str,
) -> Tensor:  # fmt: skip
    eps = reference.resolve_noise(pred, eps, draw, ids, seed)
    nonfinite = "zero" if nonfinite == "clamp" else nonfinite
    how = dict(other=other, weight=guide, clip=clip, nonfinite=nonfinite)
    return reference.sds_value(x0, pred, y, eps, factors, value, **how)


def _sds_context(ctx, inputs, output):
    x0, pred, other, y, eps, factors, seed, draw, ids, guide, clip, nonfinite, _ = inputs
    ctx.save_for_backward(pred, other, y, eps, factors, draw, ids)
    ctx.seed, ctx.how = seed, (guide, clip, nonfinite)
    ctx.dtype, ctx.channels_last = x0.dtype, is_channels_last(x0)


def _sds_backward(ctx, upstream):
    pred, other, y, eps, factors, draw, ids = ctx.saved_tensors
    args = (pred, other, y, eps, factors, ctx.seed, draw, ids, *ctx.how, upstream)
    return residual_gradient(*args, ctx.dtype, ctx.channels_last), *[None] * 12


def _gradient_cuda(
    pred: Tensor, other: Tensor | None, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int,
    draw: Tensor | None, ids: Tensor | None, guide: float, clip: float, nonfinite: str, scale: Tensor,
    dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    args = (pred, other, y, eps, factors, seed, draw, ids, guide, clip, nonfinite)
    if factors.dtype == torch.float64:
        return _gradient_cpu(*args, scale, dtype, channels_last)
    out = _empty(pred, launch.output_dtype(dtype), channels_last)
    return _launch(_residual_gradient_kernel, scale, out, out, *args).to(dtype)


def _gradient_cpu(
    pred: Tensor, other: Tensor | None, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int,
    draw: Tensor | None, ids: Tensor | None, guide: float, clip: float, nonfinite: str, scale: Tensor,
    dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    eps = reference.resolve_noise(pred, eps, draw, ids, seed)
    how = dict(other=other, weight=guide, clip=clip, nonfinite=nonfinite)
    g = reference.residual_gradient(pred, y, eps, factors, scale, dtype, **how)
    return _empty(pred, dtype, channels_last).copy_(g)


# -- sample_sums -------------------------------------------------------------------------------------------------------


def _sample_sums_cuda(
    pred: Tensor, other: Tensor | None, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int,
    draw: Tensor | None, ids: Tensor | None, guide: float, absolute: bool,
) -> Tensor:  # fmt: skip
    if factors.dtype == torch.float64:
        return _sample_sums_cpu(pred, other, y, eps, factors, seed, draw, ids, guide, absolute)
    of = "absolute" if absolute else "finite"
    return _sums(of, None, pred, other, y, eps, factors, seed, draw, ids, guide).sum(1)


def _sample_sums_cpu(
    pred: Tensor, other: Tensor | None, y: Tensor | None, eps: Tensor | None, factors: Tensor, seed: int,
    draw: Tensor | None, ids: Tensor | None, guide: float, absolute: bool,
) -> Tensor:  # fmt: skip
    eps = reference.resolve_noise(pred, eps, draw, ids, seed)
    return reference.sample_sums(pred, y, eps, factors, other, guide, absolute)


def is_channels_last(x):
    """True if a 4-D tensor is laid out channels_last and not also row-major: its gradient then is, too."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _empty(pred, dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(pred.shape, dtype=dtype, device=pred.device, memory_format=memory_format)


denoising_energy = launch.define(
    "denoising_energy", _denoising_cuda, _denoising_cpu,
    lambda pred, y, eps, factors, seed, draw, ids: factors.new_empty(()),
)  # fmt: skip
sds_value = launch.define(
    "sds_value", _sds_cuda, _sds_cpu,
    lambda x0, pred, other, y, eps, factors, seed, draw, ids, guide, clip, nonfinite, value: factors.new_empty(()),
)  # fmt: skip
residual_gradient = launch.define(
    "residual_gradient", _gradient_cuda, _gradient_cpu,
    lambda pred, other, y, eps, factors, seed, draw, ids, guide, clip, nonfinite, scale, dtype, channels_last: _empty(
        pred, dtype, channels_last
    ),
)  # fmt: skip
sample_sums = launch.define(
    "sample_sums", _sample_sums_cuda, _sample_sums_cpu,
    lambda pred, other, y, eps, factors, seed, draw, ids, guide, absolute: factors.new_empty(pred.shape[0]),
)  # fmt: skip
denoising_energy.register_autograd(_denoising_backward, setup_context=_denoising_context)
sds_value.register_autograd(_sds_backward, setup_context=_sds_context)


def bytes_moved(x0, pred, *others, backward=False):
    """Compulsory traffic of a value (forward) or of the injected gradient (backward), in bytes; others: every further
    tensor read (other, y, eps, x0 for "dot")."""
    read = sum(v.numel() * v.element_size() for v in (pred, *others) if v is not None)
    return read + x0.numel() * x0.element_size() if backward else read
