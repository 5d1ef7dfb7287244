"""The random-number contract: Philox4x32-10 words and Box-Muller normals, computed where they are used.

    words = Philox(key = seed, counter = (i // 4, id low, id high, draw))            i: row-major index in the sample
    u     = ((word >> 8) + 1) * 2^-24                                                in (0, 1]
    eps   = (r cos 2 pi u1, r sin 2 pi u1),  r = sqrt(-2 log u0)                     for words (0, 1) and (2, 3)

So eps depends on (seed, draw, sample id, element) alone. All arithmetic is 32-bit integer or correctly rounded fp32 without
fused multiply-add: logarithm, sine and cosine are short polynomials after an exact reduction (integer quarter turns). There
is no slow path, no fp64, and the same bits come out on every device and in `fastsds/reference.py`.

Kernels here: the words and the normals themselves, [B, n] from ids [B]. Bytes written: 8 a word, 4 a normal; read: 16 a
    sample.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch

ANGLE = tl.constexpr(reference.ANGLE)
LN2 = tl.constexpr(reference.LN2)
SQRT_HALF_BITS = tl.constexpr(reference.SQRT_HALF_BITS)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(c) for c in reference.LOG)
S0, S1, S2 = (tl.constexpr(c) for c in reference.SIN)
C0, C1, C2 = (tl.constexpr(c) for c in reference.COS)


@triton.jit
def box_muller(w0, w1):
    """Two fp32 normals from two words."""
    u = ((w0 >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    log = e.to(tl.float32) * LN2 + (f + f * f * (p * f - 0.5))
    r = tl.sqrt_rn(log * -2.0)

    k = ((w1 >> 8) + 1).to(tl.int32)
    quarter = (k + 2097152) >> 22  # nearest quarter turn; the rest is an exact integer of at most an eighth
    x = (k - (quarter << 22)).to(tl.float32) * ANGLE
    z = x * x
    s = ((S2 * z + S1) * z + S0) * z * x + x
    c = ((C2 * z + C1) * z + C0) * z * z - z * 0.5 + 1.0
    swap = (quarter & 1) == 1
    cos = tl.where(swap, s, c)
    sin = tl.where(swap, c, s)
    cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = tl.where((quarter & 2) == 2, -sin, sin)
    return r * cos, r * sin


@triton.jit
def words_of(groups, seed, draw, sample_id):
    """Four uint32 words for each counter in `groups` (int32 [G]); draw and sample_id are int64 scalars."""
    low = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    last = (draw & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, groups.to(tl.uint32, bitcast=True), low, high, last)


@triton.jit
def normal_block(start, seed, draw, sample_id, BLOCK: tl.constexpr):
    """Normals of elements start .. start + BLOCK - 1 (start a multiple of 4), in order, in registers: fp32 [BLOCK]."""
    groups = start // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = words_of(groups, seed, draw, sample_id)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit(do_not_specialize=["seed"])
def _words_kernel(draw_ptr, id_ptr, out_ptr, seed, draw_stride, blocks, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    draw = tl.load(draw_ptr + i_b * draw_stride)
    w0, w1, w2, w3 = words_of(start // 4 + tl.arange(0, BLOCK // 4), seed, draw, tl.load(id_ptr + i_b))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    o_i = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + i_b * units * UNIT + o_i, words.to(tl.int64), mask=o_i < units * UNIT)


@triton.jit(do_not_specialize=["seed"])
def _normal_kernel(draw_ptr, id_ptr, out_ptr, seed, draw_stride, blocks, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    draw = tl.load(draw_ptr + i_b * draw_stride)
    eps = normal_block(start, seed, draw, tl.load(id_ptr + i_b), BLOCK)
    o_i = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + i_b * units * UNIT + o_i, eps, mask=o_i < units * UNIT)


def _launch(kernel, dtype, seed, draw, ids, n):
    out = torch.empty(len(ids), n, dtype=dtype, device=ids.device)
    block = launch.block_size(n)
    blocks = triton.cdiv(n, block)
    unit = math.gcd(16, n)
    scalars = (seed, 0 if len(draw) == 1 else 1, blocks, n // unit)
    launch.launch(kernel, len(ids) * blocks, draw, ids, out, *scalars, UNIT=unit, block=block)
    return out


def _words_cuda(seed: int, draw: Tensor, ids: Tensor, n: int) -> Tensor:
    return _launch(_words_kernel, torch.int64, seed, draw, ids, n)


def _normal_cuda(seed: int, draw: Tensor, ids: Tensor, n: int) -> Tensor:
    return _launch(_normal_kernel, torch.float32, seed, draw, ids, n)


def _words_cpu(seed: int, draw: Tensor, ids: Tensor, n: int) -> Tensor:
    return reference.words(seed, draw, ids, n).contiguous()


def _normal_cpu(seed: int, draw: Tensor, ids: Tensor, n: int) -> Tensor:
    return reference.normal(seed, draw, ids, n).contiguous()


def _words_fake(seed, draw, ids, n):
    return ids.new_empty(ids.shape[0], n)


def _normal_fake(seed, draw, ids, n):
    return ids.new_empty(ids.shape[0], n, dtype=torch.float32)


words = launch.define("philox_words", _words_cuda, _words_cpu, _words_fake)
normal = launch.define("philox_normal", _normal_cuda, _normal_cpu, _normal_fake)


def bytes_moved(batch, n, itemsize):
    """Compulsory traffic of `words` (itemsize 8) or `normal` (itemsize 4): ids and draws in, numbers out."""
    return 16 * batch + itemsize * batch * n
