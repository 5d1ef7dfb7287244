"""Attention with a head dimension of 40, the finest level of SD 1.x, without padding to 64: forward and all gradients.

    y = softmax(scale q k^T) v,   lse = log2 sum exp(scale q k^T)
    p = exp2(scale log2(e) q k^T - lse),   delta = sum(dy y),   ds = p (dy v^T - delta)
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T dy

Shapes: q, y, dy, dq [B, H, L, 40]; k, v, dk, dv [B, H, S, 40]; lse, delta [B, H, L] fp32. Any strides with the last 1; what a
kernel writes is laid out as [B, L, H, 40], as the linears around attention have it. Non-causal, no mask, no dropout.

A matrix product wants powers of two: a row is loaded as 32 columns and a tail of 8. Where the head dimension is summed over
(q k^T, dy v^T) the tail is 16 wide, its last 8 zero: 48 columns. Where it is the result's width (p v, ds k, ds^T q, p^T dy)
the tail is 8 wide: 40. Padded to 64 both, forward would be 128 columns instead of 88. What Triton 3.6 makes of it: the tail
of 8 is one m16n8k16 tile of mma.sync on every generation; all else is mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100.
Scores never leave the chip; backward makes them twice, once for dq and once for dk and dv, so that no sum is atomic and the
bits are the same every time. fp32 sums and softmax; p and ds are rounded to the inputs' dtype for the tensor cores. fp32
inputs are multiplied in fp32 (no TF32), without tensor cores. Not yet measured on a GPU.
Bytes, s of the dtype: forward reads q, k, v and writes y; backward reads q, k, v, y, dy and writes dq, dk, dv.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch

HEAD_DIM = 40
LOG2E = math.log2(math.e)
INTERPRETED = tl.constexpr(launch.INTERPRETED)
# Bytes of the dtype -> (rows a program keeps, rows it goes through at a time, warps, stages). Not yet measured on a GPU: the
# largest without spills on sm_80, sm_90 and sm_100 that leave three blocks a multiprocessor (at most 168 registers).
FORWARD = {2: (128, 32, 4, 3), 4: (32, 32, 4, 2)}
BACKWARD = {2: (64, 32, 4, 3), 4: (32, 32, 4, 2)}


@triton.jit
def _start(i_bh, heads, strides, UNIT: tl.constexpr):
    """Offset of the first row of head i_bh of [B, H, ., 40]; strides (batch, head, row) in units of UNIT elements."""
    return ((i_bh // heads).to(tl.int64) * strides[0] + (i_bh % heads).to(tl.int64) * strides[1]) * UNIT


@triton.jit
def _load(ptr, o_r, step, m_r, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH of rows o_r: [R, WIDTH], zero beyond column 40 and where m_r is false."""
    o_d = FIRST + tl.arange(0, WIDTH)
    return tl.load(ptr + o_r[:, None] * step + o_d[None, :], mask=m_r[:, None] & (o_d < 40)[None, :], other=0.0)


@triton.jit
def _store(ptr, x_a, x_b, o_r, step, m_r):
    """32 and 8 columns of rows o_r, rounded to what ptr points to."""
    o_a, o_b = tl.arange(0, 32), 32 + tl.arange(0, 8)
    tl.store(ptr + o_r[:, None] * step + o_a[None, :], x_a.to(ptr.dtype.element_ty), mask=m_r[:, None])
    tl.store(ptr + o_r[:, None] * step + o_b[None, :], x_b.to(ptr.dtype.element_ty), mask=m_r[:, None])


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """x in DTYPE, to the nearest. The interpreter truncates to bf16: there the bits are rounded first."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _dot(x, y, sum):
    """x y + sum in fp32; fp32 factors are not rounded to TF32. The interpreter takes bf16 factors for integers."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, sum, input_precision="ieee")


@triton.jit
def _inner(x_a, x_b, y_a, y_b):
    """x y^T over 32 + 16 columns: [R, C] fp32."""
    return _dot(x_b, tl.trans(y_b), _dot(x_a, tl.trans(y_a), None))


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr,
    q_strides, k_strides, v_strides, y_strides, queries, keys, scale: tl.float32, heads, blocks,
    UNIT: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0) // blocks
    o_q = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_q = o_q < queries
    q_ptr += _start(i_bh, heads, q_strides, UNIT)
    k_ptr += _start(i_bh, heads, k_strides, UNIT)
    v_ptr += _start(i_bh, heads, v_strides, UNIT)
    q_step, k_step, v_step = q_strides[2] * UNIT, k_strides[2] * UNIT, v_strides[2] * UNIT
    q_a, q_b = _load(q_ptr, o_q, q_step, m_q, 0, 32), _load(q_ptr, o_q, q_step, m_q, 32, 16)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    y_a, y_b = tl.zeros([BLOCK, 32], tl.float32), tl.zeros([BLOCK, 8], tl.float32)
    for i in range(STEPS):
        o_k = i * STEP + tl.arange(0, STEP)
        m_k = o_k < keys
        k_a, k_b = _load(k_ptr, o_k, k_step, m_k, 0, 32), _load(k_ptr, o_k, k_step, m_k, 32, 16)
        s = _inner(q_a, q_b, k_a, k_b)
        if not EVEN:
            s = tl.where(m_k[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        v_a, v_b = _load(v_ptr, o_k, v_step, m_k, 0, 32), _load(v_ptr, o_k, v_step, m_k, 32, 8)
        p = _round(p, v_a.dtype)
        y_a = _dot(p, v_a, y_a * fade[:, None])
        y_b = _dot(p, v_b, y_b * fade[:, None])
        top = new
    y_ptr += _start(i_bh, heads, y_strides, UNIT)
    _store(y_ptr, y_a / total[:, None], y_b / total[:, None], o_q, y_strides[2] * UNIT, m_q)
    tl.store(lse_ptr + i_bh.to(tl.int64) * queries + o_q, top + tl.log2(total), mask=m_q)


@triton.jit
def _attention_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dq_ptr, delta_ptr,
    g_strides, q_strides, k_strides, v_strides, y_strides, dq_strides,
    queries, keys, scale: tl.float32, factor: tl.float32, heads, blocks,
    UNIT: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0) // blocks
    o_q = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_q = o_q < queries
    g_ptr += _start(i_bh, heads, g_strides, UNIT)
    q_ptr += _start(i_bh, heads, q_strides, UNIT)
    k_ptr += _start(i_bh, heads, k_strides, UNIT)
    v_ptr += _start(i_bh, heads, v_strides, UNIT)
    y_ptr += _start(i_bh, heads, y_strides, UNIT)
    g_step, q_step, y_step = g_strides[2] * UNIT, q_strides[2] * UNIT, y_strides[2] * UNIT
    k_step, v_step = k_strides[2] * UNIT, v_strides[2] * UNIT
    q_a, q_b = _load(q_ptr, o_q, q_step, m_q, 0, 32), _load(q_ptr, o_q, q_step, m_q, 32, 16)
    g_a, g_b = _load(g_ptr, o_q, g_step, m_q, 0, 32), _load(g_ptr, o_q, g_step, m_q, 32, 16)
    y_a, y_b = _load(y_ptr, o_q, y_step, m_q, 0, 32), _load(y_ptr, o_q, y_step, m_q, 32, 16)
    delta = tl.sum(g_a.to(tl.float32) * y_a.to(tl.float32), 1) + tl.sum(g_b.to(tl.float32) * y_b.to(tl.float32), 1)
    row = i_bh.to(tl.int64) * queries
    tl.store(delta_ptr + row + o_q, delta, mask=m_q)
    lse = tl.load(lse_ptr + row + o_q, mask=m_q, other=0.0)
    dq_a, dq_b = tl.zeros([BLOCK, 32], tl.float32), tl.zeros([BLOCK, 8], tl.float32)
    for i in range(STEPS):
        o_k = i * STEP + tl.arange(0, STEP)
        m_k = o_k < keys
        k_a, k_b = _load(k_ptr, o_k, k_step, m_k, 0, 32), _load(k_ptr, o_k, k_step, m_k, 32, 16)
        p = tl.exp2(_inner(q_a, q_b, k_a, k_b) * scale - lse[:, None])
        if not EVEN:
            p = tl.where(m_k[None, :], p, 0.0)
        v_a, v_b = _load(v_ptr, o_k, v_step, m_k, 0, 32), _load(v_ptr, o_k, v_step, m_k, 32, 16)
        ds = _round(p * (_inner(g_a, g_b, v_a, v_b) - delta[:, None]), k_a.dtype)
        dq_a = _dot(ds, k_a, dq_a)
        dq_b = _dot(ds, _load(k_ptr, o_k, k_step, m_k, 32, 8), dq_b)
    dq_ptr += _start(i_bh, heads, dq_strides, UNIT)
    _store(dq_ptr, dq_a * factor, dq_b * factor, o_q, dq_strides[2] * UNIT, m_q)


@triton.jit
def _attention_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    g_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    queries, keys, scale: tl.float32, factor: tl.float32, heads, blocks,
    UNIT: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0) // blocks
    o_k = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < keys
    g_ptr += _start(i_bh, heads, g_strides, UNIT)
    q_ptr += _start(i_bh, heads, q_strides, UNIT)
    k_ptr += _start(i_bh, heads, k_strides, UNIT)
    v_ptr += _start(i_bh, heads, v_strides, UNIT)
    g_step, q_step = g_strides[2] * UNIT, q_strides[2] * UNIT
    k_step, v_step = k_strides[2] * UNIT, v_strides[2] * UNIT
    k_a, k_b = _load(k_ptr, o_k, k_step, m_k, 0, 32), _load(k_ptr, o_k, k_step, m_k, 32, 16)
    v_a, v_b = _load(v_ptr, o_k, v_step, m_k, 0, 32), _load(v_ptr, o_k, v_step, m_k, 32, 16)
    row = i_bh.to(tl.int64) * queries
    dk_a, dk_b = tl.zeros([BLOCK, 32], tl.float32), tl.zeros([BLOCK, 8], tl.float32)
    dv_a, dv_b = tl.zeros([BLOCK, 32], tl.float32), tl.zeros([BLOCK, 8], tl.float32)
    for i in range(STEPS):  # a query beyond the last has dy = 0 and delta = 0: it adds nothing
        o_q = i * STEP + tl.arange(0, STEP)
        m_q = o_q < queries
        q_a, q_b = _load(q_ptr, o_q, q_step, m_q, 0, 32), _load(q_ptr, o_q, q_step, m_q, 32, 16)
        g_a, g_b = _load(g_ptr, o_q, g_step, m_q, 0, 32), _load(g_ptr, o_q, g_step, m_q, 32, 16)
        lse = tl.load(lse_ptr + row + o_q, mask=m_q, other=0.0)
        delta = tl.load(delta_ptr + row + o_q, mask=m_q, other=0.0)
        p = tl.exp2(_inner(k_a, k_b, q_a, q_b) * scale - lse[None, :])  # transposed: [keys, queries]
        ds = _round(p * (_inner(v_a, v_b, g_a, g_b) - delta[None, :]), q_a.dtype)
        p = _round(p, g_a.dtype)
        dv_a = _dot(p, g_a, dv_a)
        dv_b = _dot(p, _load(g_ptr, o_q, g_step, m_q, 32, 8), dv_b)
        dk_a = _dot(ds, q_a, dk_a)
        dk_b = _dot(ds, _load(q_ptr, o_q, q_step, m_q, 32, 8), dk_b)
    dk_ptr += _start(i_bh, heads, dk_strides, UNIT)
    dv_ptr += _start(i_bh, heads, dv_strides, UNIT)
    _store(dk_ptr, dk_a * factor, dk_b * factor, o_k, dk_strides[2] * UNIT, m_k)
    _store(dv_ptr, dv_a, dv_b, o_k, dv_strides[2] * UNIT, m_k)


def check(q, k, v):
    """What the kernels need and their twin does not: refused on every device alike."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        if x.shape[-1] != HEAD_DIM:
            raise ValueError(f"{name}: a head dimension of {HEAD_DIM} expected, got shape {tuple(x.shape)}; use torch's own")
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: a last stride of 1 expected, got strides {x.stride()} of shape {tuple(x.shape)}")
        if x.shape[2] * x.stride(2) >= 2**31:
            raise ValueError(f"{name}: rows within 2^31 elements expected, got strides {x.stride()} of shape {tuple(x.shape)}")


def _empty(x, dtype):
    """[B, H, L, 40] laid out as [B, L, H, 40]."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype=dtype).transpose(1, 2)


def _strides(*tensors):
    """(unit, [(batch, head, row), ...]): in units of the largest power of two, at most 16, that divides them all."""
    strides = [[s if n > 1 else 0 for n, s in zip(x.shape[:3], x.stride()[:3])] for x in tensors]
    unit = math.gcd(16, *(s for row in strides for s in row))
    return unit, [tuple(s // unit for s in row) for row in strides]


def _launch(kernel, x, other, tile, tensors, views, *scalars, **constants):
    """One program a head and block of x's rows, which goes through the rows of `other` (compiled once for each number of
    steps). `views` [B, H, ., 40] are told to the kernel by their strides.

    enable_fp_fusion: tensor cores round sums in an order of their own on each generation, so there are no bits to keep, and
    a score's exponent costs one instruction.
    """
    block, step, warps, stages = tile
    unit, strides = _strides(*views)
    blocks = triton.cdiv(x.shape[2], block)
    launch.launch(
        kernel, blocks * x.shape[1] * x.shape[0], *tensors, *strides, *scalars, x.shape[1], blocks,
        UNIT=unit, STEPS=triton.cdiv(other.shape[2], step), STEP=step, block=block,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants,
    )  # fmt: skip


def _attention_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check(q, k, v)
    if q.dtype == torch.float64:
        return _attention_cpu(q, k, v, scale)
    y = _empty(q, launch.output_dtype(q.dtype))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    queries, keys, tile = q.shape[2], k.shape[2], FORWARD[q.element_size()]
    views = (q, k, v, y)
    even = keys % tile[1] == 0
    _launch(_attention_kernel, q, k, tile, (*views, lse), views, queries, keys, scale * LOG2E, EVEN=even)
    return y.to(q.dtype), lse


@torch.autocast("cpu", enabled=False)  # whose products would be bf16
def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check(q, k, v)
    y, lse = reference.attention(q, k, v, scale)
    return _empty(q, q.dtype).copy_(y), lse


def _gradient_cuda(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.dtype == torch.float64:
        return _gradient_cpu(g, q, k, v, y, lse, scale)
    if g.stride(-1) != 1:  # an upstream gradient without rows, such as that of a sum, is brought to y's layout
        g = _empty(q, g.dtype).copy_(g)
    dtype = launch.output_dtype(q.dtype)
    dq, dk, dv = (_empty(x, dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    queries, keys, tile = q.shape[2], k.shape[2], BACKWARD[q.element_size()]
    scalars = (queries, keys, scale * LOG2E, scale)
    views = (g, q, k, v, y, dq)
    tensors = (g, q, k, v, y, lse, dq, delta)
    _launch(_attention_dq_kernel, q, k, tile, tensors, views, *scalars, EVEN=keys % tile[1] == 0)
    views = (g, q, k, v, dk, dv)
    _launch(_attention_dkv_kernel, k, q, tile, (g, q, k, v, lse, delta, dk, dv), views, *scalars)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@torch.autocast("cpu", enabled=False)
def _gradient_cpu(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = reference.attention_gradient(g, q, k, v, y, lse, scale)
    return tuple(_empty(x, x.dtype).copy_(dx) for x, dx in zip((q, k, v), found))


def _attention_fake(q, k, v, scale):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty(q, q.dtype), q.new_empty(q.shape[:3], dtype=dtype)


attention = launch.define("attention", _attention_cuda, _attention_cpu, _attention_fake)
attention_gradient = launch.define(
    "attention_gradient", _gradient_cuda, _gradient_cpu,
    lambda g, q, k, v, y, lse, scale: tuple(_empty(x, x.dtype) for x in (q, k, v)),
)  # fmt: skip


def _context(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, g, _):
    return *attention_gradient(g, *ctx.saved_tensors, ctx.scale), None


attention.register_autograd(_backward, setup_context=_context)


def bytes_moved(q, k, backward=False):
    """Compulsory traffic: q, k, v in, y out; or q, k, v, y and dy in, dq, dk, dv out."""
    return (4 if backward else 2) * (q.numel() + k.numel()) * q.element_size()


def flops(q, k, backward=False):
    """Multiply-adds counted as two, without padding or recomputation: 2 products forward, 5 backward."""
    return (10 if backward else 4) * q.numel() * k.shape[2]
