"""Targeted distillation: chosen tokens of a student against a teacher's, without a copy of the chosen.

    L = 1 / denominator sum_b 1 / count_b sum_j w_bj d(s, t)
    s = student[b, index_student[b, j]],   t = teacher[b, index_teacher[b, j]]
    l1      d = mean |s - t|                    ds = sign(s - t) / D
    l2      d = mean (s - t)^2                  ds = 2 (s - t) / D
    cosine  d = 1 - c,   c = u v                ds = (c u - v) / |s|,   u = s / |s|,   v = t / |t|, lengths at least NORM_FLOOR
    dstudent[b, n] = upstream / (denominator count_b) sum_(j: index_student[b, j] = n) w_bj ds         no gradient of all else

Shapes: student [B, N, D], teacher [B, M, D] of any strides; indices int64 [B, k], weight [B, k] or none, any strides. An index
of -1, in either, is no token; count_b is how many there are, at least 1. An index out of range makes L NaN, and the gradients
of its instance's chosen tokens.
Backward goes by the student's tokens, each of which looks itself up among the k indices: every token is written once, zero if
nobody chose it, in the order of j if several did, so that there is nothing to fill beforehand and nothing atomic. It takes s
and t again. Arithmetic fp32, sums in a fixed order, one rounding at the store.
Bytes, P pairs of D elements, N' tokens: forward P D (s + t); backward that, and N' D s written; both read the indices.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsds import reference
from fastsds.kernels import launch

MAX_ROW = 8192  # elements of a token, and indices of an instance
DISTANCES = {"l1": 0, "l2": 1, "cosine": 2}
L1, L2, COSINE = (tl.constexpr(i) for i in DISTANCES.values())
NORM_FLOOR = tl.constexpr(reference.NORM_FLOOR)


@triton.jit
def _pairs(s_ptr, t_ptr, i_b, o_j, k, s_tokens, t_tokens, s_strides, t_strides):
    """(student's token, teacher's token, chosen, out of range) of pairs o_j."""
    m = o_j < k
    n_s = tl.load(s_ptr + i_b * s_strides[0] + o_j.to(tl.int64) * s_strides[1], mask=m, other=-1)
    n_t = tl.load(t_ptr + i_b * t_strides[0] + o_j.to(tl.int64) * t_strides[1], mask=m, other=-1)
    wrong = (n_s < -1) | (n_s >= s_tokens) | (n_t < -1) | (n_t >= t_tokens)
    return n_s, n_t, (n_s >= 0) & (n_t >= 0) & (wrong == 0), wrong


@triton.jit
def _count(chosen, wrong):
    """How many are chosen, at least 1; NaN where one is out of range."""
    count = tl.maximum(tl.sum(chosen.to(tl.int32), 0), 1).to(tl.float32)
    return tl.where(tl.max(wrong.to(tl.int32), 0) > 0, float("nan"), count)


@triton.jit
def _tokens(ptr, i_b, o_n, o_i, m, strides, step, UNIT: tl.constexpr):
    """Tokens o_n of instance i_b, [R, C] fp32, zero where masked. strides (instance, token) in units of UNIT elements."""
    row = (i_b * strides[0] + o_n.to(tl.int64) * strides[1]) * UNIT
    return tl.load(ptr + row[:, None] + o_i.to(tl.int64)[None, :] * step, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _length(x):
    """The lengths of rows, at least NORM_FLOOR, [R, 1]; and where they are not less by themselves."""
    length = tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True))
    return tl.maximum(length, NORM_FLOOR), length >= NORM_FLOOR


@triton.jit
def _weights(ptr, i_b, o_j, m, strides, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        w = tl.load(ptr + i_b * strides[0] + o_j.to(tl.int64) * strides[1], mask=m, other=0.0).to(tl.float32)
    else:
        w = m.to(tl.float32)
    return w


@triton.jit
def _token_distill_kernel(
    student_ptr, teacher_ptr, index_s_ptr, index_t_ptr, weight_ptr, out_ptr,
    s_tokens, t_tokens, k, units, blocks, student_strides, teacher_strides, index_s_strides, index_t_strides, weight_strides,
    student_step, teacher_step, denominator: tl.float32,
    UNIT: tl.constexpr, DISTANCE: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_k, o_i = tl.arange(0, SLOTS), tl.arange(0, COLUMNS)
    _, _, chosen, wrong = _pairs(
        index_s_ptr, index_t_ptr, i_b, o_k, k, s_tokens, t_tokens, index_s_strides, index_t_strides
    )
    count = _count(chosen, wrong)
    o_j = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    n_s, n_t, chosen, _ = _pairs(
        index_s_ptr, index_t_ptr, i_b, o_j, k, s_tokens, t_tokens, index_s_strides, index_t_strides
    )  # fmt: skip
    m = chosen[:, None] & (o_i < units * UNIT)[None, :]
    s = _tokens(student_ptr, i_b, n_s, o_i, m, student_strides, student_step, UNIT)
    t = _tokens(teacher_ptr, i_b, n_t, o_i, m, teacher_strides, teacher_step, UNIT)
    if DISTANCE == COSINE:
        d = 1.0 - tl.sum(s * t, 1, keep_dims=True) / (_length(s)[0] * _length(t)[0])
    elif DISTANCE == L1:
        d = tl.sum(tl.abs(s - t), 1, keep_dims=True) / (units * UNIT)
    else:
        d = tl.sum((s - t) * (s - t), 1, keep_dims=True) / (units * UNIT)
    w = _weights(weight_ptr, i_b, o_j, chosen, weight_strides, WEIGHTED)
    terms = tl.where(chosen[:, None], w[:, None] * d, 0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(terms, 1), 0) / (count * denominator))


@triton.jit
def _token_distill_gradient_kernel(
    student_ptr, teacher_ptr, index_s_ptr, index_t_ptr, weight_ptr, scale_ptr, out_ptr,
    s_tokens, t_tokens, k, units, blocks, student_strides, teacher_strides, index_s_strides, index_t_strides, weight_strides,
    student_step, teacher_step, denominator: tl.float32, out_strides, out_step,
    UNIT: tl.constexpr, DISTANCE: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_k, o_i = tl.arange(0, SLOTS), tl.arange(0, COLUMNS)
    n_s, _, chosen, wrong = _pairs(
        index_s_ptr, index_t_ptr, i_b, o_k, k, s_tokens, t_tokens, index_s_strides, index_t_strides
    )  # fmt: skip
    upstream = tl.load(scale_ptr) / (_count(chosen, wrong) * denominator)
    o_n = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    m_n, m_i = o_n < s_tokens, (o_i < units * UNIT)[None, :]
    mine = chosen[None, :] & (n_s[None, :] == o_n[:, None])  # [R, SLOTS]
    j = tl.min(tl.where(mine, o_k[None, :], SLOTS), 1)  # the first that chose o_n, SLOTS if nobody did
    s = _tokens(student_ptr, i_b, o_n, o_i, (j < SLOTS)[:, None] & m_i, student_strides, student_step, UNIT)
    if DISTANCE == COSINE:
        length, turning = _length(s)
        u = s / length
    ds = tl.zeros([ROWS, COLUMNS], tl.float32)
    while tl.min(j, 0) < SLOTS:
        found = j < SLOTS
        n_t = tl.load(index_t_ptr + i_b * index_t_strides[0] + j.to(tl.int64) * index_t_strides[1], mask=found, other=0)
        t = _tokens(teacher_ptr, i_b, n_t, o_i, found[:, None] & m_i, teacher_strides, teacher_step, UNIT)
        if DISTANCE == COSINE:
            v = t / _length(t)[0]
            c = tl.where(turning, tl.sum(u * v, 1, keep_dims=True), 0.0)  # a length at the floor is a constant
            g = (c * u - v) / length
        elif DISTANCE == L1:
            e = s - t
            g = tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e)) / (units * UNIT)
        else:
            g = 2.0 * (s - t) / (units * UNIT)
        w = upstream * _weights(weight_ptr, i_b, j, found, weight_strides, WEIGHTED)
        ds += tl.where(found[:, None], w[:, None] * g, 0.0)
        j = tl.min(tl.where(mine & (o_k[None, :] > j[:, None]), o_k[None, :], SLOTS), 1)  # the next
    row = (i_b * out_strides[0] + o_n.to(tl.int64) * out_strides[1]) * UNIT
    o_out = row[:, None] + o_i.to(tl.int64)[None, :] * out_step
    tl.store(out_ptr + o_out, ds.to(out_ptr.dtype.element_ty), mask=m_n[:, None] & m_i)


def _tile(student, index_student, rows):
    """(rows a program, programs an instance, columns, slots); of `rows` there are that many in an instance."""
    check(student, index_student)
    columns, slots = (triton.next_power_of_2(v) for v in (student.shape[2], index_student.shape[1]))
    height = max(1, min(2 * launch.BLOCK // max(columns, slots), triton.next_power_of_2(rows)))
    return height, triton.cdiv(rows, height), columns, slots


def _launch(kernel, tile, tensors, out, student, teacher, index_s, index_t, weight, distance, denominator):
    """out: the gradient's tensor, or None for the value's kernel."""
    (batch, tokens, n), (height, blocks, columns, slots) = student.shape, tile
    unit, strides, steps = _strides(*(v for v in (student, teacher, out) if v is not None))
    launch.launch(
        kernel, batch * blocks, student, teacher, index_s, index_t, weight, *tensors,
        tokens, teacher.shape[1], index_s.shape[1], n // unit, blocks, *strides[:2], index_s.stride(), index_t.stride(),
        (0, 0) if weight is None else weight.stride(), *steps[:2], denominator, *strides[2:], *steps[2:],
        UNIT=unit, DISTANCE=DISTANCES[distance], WEIGHTED=weight is not None,
        ROWS=height, COLUMNS=columns, SLOTS=slots, block=height * max(columns, slots),
    )  # fmt: skip


def _strides(*tensors):
    """(unit, [(instance, token), ...], [element, ...]): strides, the first two in units of `unit` elements."""
    n = tensors[0].shape[2]
    rows = [[s if size > 1 else 0 for size, s in zip(x.shape[:2], x.stride()[:2])] for x in tensors]
    steps = [x.stride(2) if n > 1 else 1 for x in tensors]
    unit = math.gcd(16, n, *(s for row in rows for s in row)) if all(s == 1 for s in steps) else 1
    return unit, [tuple(s // unit for s in row) for row in rows], steps


def check(student, index_student):
    """What the kernels need and their twin does not: refused on every device alike."""
    for size, what in ((student.shape[2], "elements of a token"), (index_student.shape[1], "indices of an instance")):
        if size > MAX_ROW:
            raise ValueError(f"student, index_student: at most {MAX_ROW} {what} are supported, got {size}")


def _in_range(index, tokens, name):
    """Refuse what is no token, where looking waits for nothing."""
    wrong = ((index < -1) | (index >= tokens)).nonzero() if index.device.type == "cpu" else ()
    if len(wrong):
        b, j = wrong[0].tolist()
        raise ValueError(f"{name}: -1 or a token of 0 to {tokens - 1} expected, got {index[b, j].item()} at [{b}, {j}]")


def _distill_cuda(
    student: Tensor, teacher: Tensor, index_student: Tensor, index_teacher: Tensor, weight: Tensor | None,
    distance: str, denominator: float,
) -> Tensor:  # fmt: skip
    given = (student, teacher, index_student, index_teacher, weight, distance, denominator)
    if reference.compute_dtype(student, teacher, weight) == torch.float64:
        return _distill_cpu(*given)
    tile = _tile(student, index_student, index_student.shape[1])
    partial = torch.empty(len(student) * tile[1], dtype=torch.float32, device=student.device)
    _launch(_token_distill_kernel, tile, (partial,), None, *given)
    return partial.sum()


def _distill_cpu(
    student: Tensor, teacher: Tensor, index_student: Tensor, index_teacher: Tensor, weight: Tensor | None,
    distance: str, denominator: float,
) -> Tensor:  # fmt: skip
    _in_range(index_student, student.shape[1], "index_student")
    _in_range(index_teacher, teacher.shape[1], "index_teacher")
    return reference.token_distill(student, teacher, index_student, index_teacher, weight, distance, denominator)


def _gradient_cuda(
    student: Tensor, teacher: Tensor, index_student: Tensor, index_teacher: Tensor, weight: Tensor | None,
    distance: str, denominator: float, scale: Tensor,
) -> Tensor:  # fmt: skip
    given = (student, teacher, index_student, index_teacher, weight, distance, denominator)
    if reference.compute_dtype(student, teacher, weight) == torch.float64:
        return _gradient_cpu(*given, scale)
    out = torch.empty_like(student, dtype=launch.output_dtype(student.dtype))
    tile = _tile(student, index_student, student.shape[1])
    _launch(_token_distill_gradient_kernel, tile, (scale, out), out, *given)
    return out.to(student.dtype)


def _gradient_cpu(
    student: Tensor, teacher: Tensor, index_student: Tensor, index_teacher: Tensor, weight: Tensor | None,
    distance: str, denominator: float, scale: Tensor,
) -> Tensor:  # fmt: skip
    given = (student, teacher, index_student, index_teacher, weight, distance, denominator)
    return torch.empty_like(student).copy_(reference.token_distill_gradient(*given, scale))


def _fake(student, teacher, index_student, index_teacher, weight, distance, denominator):
    return student.new_empty((), dtype=reference.compute_dtype(student, teacher, weight))


token_distill = launch.define("token_distill", _distill_cuda, _distill_cpu, _fake)
token_distill_gradient = launch.define(
    "token_distill_gradient", _gradient_cuda, _gradient_cpu, lambda student, *others: torch.empty_like(student)
)


def _context(ctx, inputs, output):
    *tensors, ctx.distance, ctx.denominator = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, upstream):
    return token_distill_gradient(*ctx.saved_tensors, ctx.distance, ctx.denominator, upstream), *[None] * 6


token_distill.register_autograd(_backward, setup_context=_context)


def bytes_moved(student, teacher, index_student, *others, backward=False):
    """Compulsory traffic of the value, or of the gradient, in bytes, pairs counted in index_student; others: index_teacher
    where it is another one, weight."""
    pairs = (index_student >= 0).sum().item() * student.shape[2] * (student.element_size() + teacher.element_size())
    read = pairs + sum(v.numel() * v.element_size() for v in (index_student, *others) if v is not None)
    return read + student.numel() * student.element_size() if backward else read
