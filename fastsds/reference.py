"""Plain-torch twins of the kernels: specification, test oracle, CPU path and benchmark baseline at once.

Arithmetic is fp32, or float64 as soon as one of the tensors is float64, with one rounding at the end. The normals are
always computed in fp32 and then widened, by the same operations in the same order as in `kernels/philox.py`: no fused
multiply-add, no library logarithm or cosine, so the two agree bit for bit.

Row arguments, shared by all twins: alpha, sigma, scale: [R]; `factors`: [4, R] with rows p, q, a, k of

    r = p * (pred + guide * (pred - other)) + q * y - a * eps

R is the number of samples B, or of more leading axes: frames of a video [B, F, C, H, W] with R = B * F. `other`, y and eps
may be None; eps of a stream (seed, draw, ids) is made by `resolve_noise`.
"""

import math

import torch

M32 = 0xFFFFFFFF
PHILOX_A, PHILOX_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85

# Minimax fits, own; relative error of log 6e-9 on [sqrt(1/2), sqrt(2)], of sine 4e-9 and cosine 1e-10 on an eighth turn.
LOG = (
    0.3333333134651184, -0.2500081956386566, 0.20001226663589478, -0.16623356938362122,
    0.14201757311820984, -0.13160184025764465, 0.127615824341774, -0.07634497433900833,
)  # fmt: skip
SIN = (-0.16666655242443085, 0.00833216030150652, -0.00019515282474458218)
COS = (0.04166664555668831, -0.001388736767694354, 2.443845005473122e-05)
LN2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3
ANGLE = 3.7450702829238027e-07  # 2 pi / 2^24 in fp32


def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al. 2011): four words [..] in [0, 2^32) as int64, from int64 counters in [0, 2^32)."""
    k0, k1 = seed & M32, (seed >> 32) & M32
    for _ in range(10):
        a, b = c0 * PHILOX_A, c2 * PHILOX_B  # the product wraps mod 2^64: its bits are the unsigned product's
        c0, c2 = ((b >> 32) ^ (c1 ^ k0)) & M32, ((a >> 32) ^ (c3 ^ k1)) & M32
        c1, c3 = b & M32, a & M32
        k0, k1 = (k0 + WEYL_A) & M32, (k1 + WEYL_B) & M32
    return c0, c1, c2, c3


def _counters(draw, ids, n):
    groups = torch.arange((n + 3) // 4, device=ids.device)
    ids = ids[:, None]
    return groups[None], ids & M32, (ids >> 32) & M32, draw.expand(len(ids))[:, None] & M32


def words(seed, draw, ids, n):
    """The first n words of each sample: int64 [B, n] in [0, 2^32)."""
    return torch.stack(philox(seed, *_counters(draw, ids, n)), dim=-1).flatten(1)[:, :n]


def uniform(seed, draw, ids, n):
    """u = ((word >> 8) + 1) * 2^-24, in (0, 1]: fp32 [B, n]."""
    return ((words(seed, draw, ids, n) >> 8) + 1).float() * 2.0**-24


def _horner(x, coefficients):
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def box_muller(w0, w1):
    """(r cos 2 pi u1, r sin 2 pi u1) with r = sqrt(-2 log u0): two fp32 normals from two words."""
    u = ((w0 >> 8) + 1).float() * 2.0**-24
    bits = u.view(torch.int32)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    log = e.float() * LN2 + (f + f * f * (_horner(f, LOG) * f - 0.5))
    r = (log * -2.0).double().sqrt().float()  # = IEEE fp32 square root; torch's own on the CPU is not always

    k = ((w1 >> 8) + 1).to(torch.int32)
    quarter = (k + (1 << 21)) >> 22
    x = (k - (quarter << 22)).float() * ANGLE
    z = x * x
    s = _horner(z, SIN) * z * x + x
    c = _horner(z, COS) * z * z - z * 0.5 + 1.0
    swap = (quarter & 1) == 1
    cos, sin = torch.where(swap, s, c), torch.where(swap, c, s)
    cos = torch.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = torch.where((quarter & 2) == 2, -sin, sin)
    return r * cos, r * sin


def normal(seed, draw, ids, n):
    """The first n normals of each sample: fp32 [B, n]; words (0, 1) and (2, 3) of a counter give two normals each."""
    w0, w1, w2, w3 = philox(seed, *_counters(draw, ids, n))
    first = torch.stack([w0, w2], dim=-1)
    second = torch.stack([w1, w3], dim=-1)
    return torch.stack(box_muller(first, second), dim=-1).flatten(1)[:, :n]


def compute_dtype(*tensors):
    """float64 if any tensor is float64, else fp32."""
    return torch.float64 if any(v is not None and v.dtype == torch.float64 for v in tensors) else torch.float32


def rows(v, like):
    """[R] -> one value for each of like's first axes that together have R elements: [B, 1, ...], [B, F, 1, ...]."""
    lead = 1
    while math.prod(like.shape[:lead]) < v.numel():
        lead += 1
    return v.reshape(*like.shape[:lead], *(1,) * (like.ndim - lead))


def resolve_noise(like, eps, draw, ids, seed):
    """eps itself, or the stream's normals in like's shape (fp32), or None where there is neither."""
    if eps is not None or ids is None:
        return eps
    return normal(seed, draw, ids, math.prod(like.shape[1:])).view(like.shape)


def add_noise(x0, eps, alpha, sigma):
    """x_t = alpha * x0 + sigma * eps, in x0's dtype; differentiable in x0 and eps."""
    dtype = compute_dtype(x0, eps)
    return (rows(alpha, x0).to(dtype) * x0.to(dtype) + rows(sigma, x0).to(dtype) * eps.to(dtype)).to(x0.dtype)


def scale_rows(x, scale, dtype):
    """scale * x with one factor a row, in the given dtype."""
    wide = compute_dtype(x, scale)
    return (rows(scale, x).to(wide) * x.to(wide)).to(dtype)


def guide(pred, other, weight, dtype):
    """pred + weight * (pred - other), unrounded; pred itself where there is no other."""
    pred = pred.to(dtype)
    return pred if other is None else pred + weight * (pred - other.to(dtype))


def residual(pred, y, eps, factors, other=None, weight=0.0):
    """r = p * guided pred + q * y - a * eps, unrounded; differentiable in pred, y and eps."""
    dtype = compute_dtype(pred, other, y, eps, factors)
    p, q, a, _ = (rows(v, pred) for v in factors.to(dtype))
    r = p * guide(pred, other, weight, dtype)
    if y is not None:
        r = r + q * y.to(dtype)
    return r if eps is None else r - a * eps.to(dtype)


def energy(pred, y, eps, factors):
    """sum k r^2, a scalar; differentiable in pred, y and eps. What denoising_loss returns."""
    r = residual(pred, y, eps, factors)
    return (r * r * rows(factors[3].to(r.dtype), r)).sum()


def sample_sums(pred, y, eps, factors, other=None, weight=0.0, absolute=True):
    """[B]: each sample's sum of |r|; or 0 where k r is finite throughout, NaN where it is not."""
    r = residual(pred, y, eps, factors, other, weight)
    if not absolute:
        r = rows(factors[3].to(r.dtype), r) * r
    return (r.abs() if absolute else r - r).reshape(len(r), -1).sum(1)


def score(pred, y, eps, factors, other=None, weight=0.0, clip=math.inf, nonfinite="propagate"):
    """(g, r) with g = clip(k r), unrounded.

    nonfinite: "propagate"; "zero" puts 0 where k r is NaN or infinite, in both; "clamp" where it is NaN, and leaves
    infinities to clip.
    """
    r = residual(pred, y, eps, factors, other, weight)
    g = rows(factors[3].to(r.dtype), r) * r
    if nonfinite != "propagate":
        bad = g.isnan() if nonfinite == "clamp" else ~g.isfinite()
        g, r = (v.masked_fill(bad, 0.0) for v in (g, r))
    return g.clamp(-clip, clip), r


def residual_gradient(pred, y, eps, factors, scale, dtype, **how):
    """scale * g in the given dtype: what sds_loss puts on x0, for the upstream gradient that `scale` holds."""
    g, _ = score(pred, y, eps, factors, **how)
    return (scale.to(g.dtype) * g).to(dtype)


def sds_value(x0, pred, y, eps, factors, value="energy", **how):
    """sum g r / 2 ("energy"), sum g^2 / 2 ("target") or sum g x0 ("dot"): what sds_loss reports."""
    g, r = score(pred, y, eps, factors, **how)
    return {"energy": lambda: 0.5 * g * r, "target": lambda: 0.5 * g * g, "dot": lambda: g * x0.to(g.dtype)}[value]().sum()


def sds_loss(x0, pred, y, eps, factors):
    """The energy as the value, k * r as the gradient in x0 and in nothing else."""
    return _Inject.apply(x0, pred.detach(), y, eps, factors)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, pred, y, eps, factors):
        ctx.save_for_backward(pred, y, eps, factors)
        ctx.dtype = x0.dtype
        return sds_value(x0, pred, y, eps, factors)

    @staticmethod
    def backward(ctx, upstream):
        return residual_gradient(*ctx.saved_tensors, upstream, ctx.dtype), None, None, None, None


def sid_energy(x, real, fake, weight, alpha):
    """sum_b w_b sum_i d (e - alpha d) with d = real - fake, e = real - x: a scalar, differentiable in all three."""
    dtype = compute_dtype(x, real, fake, weight)
    x, real, fake = (v.to(dtype) for v in (x, real, fake))
    d = real - fake
    return (rows(weight.to(dtype), x) * d * (real - x - alpha * d)).sum()


def sid_gradients(x, real, fake, weight, alpha, scale):
    """The three gradients of `scale * sid_energy`, each in its tensor's dtype."""
    dtype = compute_dtype(x, real, fake, weight)
    d, e = real.to(dtype) - fake.to(dtype), real.to(dtype) - x.to(dtype)
    w = scale.to(dtype) * rows(weight.to(dtype), x)
    found = (-w * d, w * (e + (1 - 2 * alpha) * d), w * (2 * alpha * d - e))
    return tuple(g.to(v.dtype) for g, v in zip(found, (x, real, fake)))


# -- norms and gates of frozen networks: gradients of the input alone --------------------------------------------------


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in x's dtype."""
    dtype = compute_dtype(x)
    xhat = _normalised(x.to(dtype), -1, eps)[0]
    return (xhat * weight.to(dtype) + bias.to(dtype)).to(x.dtype)


def layer_norm_gradient(g, x, weight, eps):
    """The gradient of x for the upstream gradient g, in x's dtype."""
    dtype = compute_dtype(x)
    xhat, rstd = _normalised(x.to(dtype), -1, eps)
    h = g.to(dtype) * weight.to(dtype)
    return (rstd * (h - h.mean(-1, keepdim=True) - xhat * (h * xhat).mean(-1, keepdim=True))).to(x.dtype)


def _normalised(x, axes, eps):
    """(xhat, rstd): the mean twice, then the squares of what is left, so that a large mean costs no digits."""
    d = x - x.mean(axes, keepdim=True)
    d = d - d.mean(axes, keepdim=True)
    rstd = (d.square().mean(axes, keepdim=True) + eps).rsqrt()
    return d * rstd, rstd


def group_norm_silu(x, weight, bias, groups, eps, silu):
    """(y, mean, rstd): group norm of [B, C, ...], with SiLU if asked, in x's dtype; the statistics unrounded: rstd [B groups],
    mean [2, B groups], whose sum is the mean."""
    dtype = compute_dtype(x)
    grouped = x.to(dtype).reshape(x.shape[0], groups, -1)
    xhat, rstd = _normalised(grouped, -1, eps)
    n = xhat.reshape(x.shape) * _channels(weight, x, dtype) + _channels(bias, x, dtype)
    mean = grouped.mean(-1)
    mean = torch.stack([mean, (grouped - mean[..., None]).mean(-1)]).flatten(1)
    return (n * n.sigmoid() if silu else n).to(x.dtype), mean, rstd.flatten()


def group_norm_silu_gradient(g, x, weight, bias, mean, rstd, groups, silu):
    """The gradient of x for the upstream gradient g, in x's dtype."""
    dtype = compute_dtype(x)
    w, b = _channels(weight, x, dtype), _channels(bias, x, dtype)
    mean, more, rstd = (v.to(dtype).view(x.shape[0], groups, 1) for v in (*mean, rstd))
    xhat = (x.to(dtype).reshape(x.shape[0], groups, -1) - mean - more) * rstd
    h = g.to(dtype) * w
    if silu:
        n = xhat.reshape(x.shape) * w + b
        s = n.sigmoid()
        h = h * (s * (1 + n * (1 - s)))
    h = h.reshape(xhat.shape)
    dx = rstd * (h - h.mean(-1, keepdim=True) - xhat * (h * xhat).mean(-1, keepdim=True))
    return dx.reshape(x.shape).to(x.dtype)


def _channels(v, x, dtype):
    return v.to(dtype).view(1, -1, *(1,) * (x.ndim - 2))


def geglu(x):
    """h * gelu(q), h and q the halves of x's last axis, in x's dtype."""
    h, q = x.to(compute_dtype(x)).chunk(2, -1)
    return (h * q * _phi(q)).to(x.dtype)


def geglu_gradient(g, x):
    """The gradient of x for the upstream gradient g, in x's dtype."""
    dtype = compute_dtype(x)
    g, (h, q) = g.to(dtype), x.to(dtype).chunk(2, -1)
    density = torch.exp(-0.5 * q * q) / math.sqrt(2 * math.pi)
    return torch.cat([g * q * _phi(q), g * h * (_phi(q) + q * density)], -1).to(x.dtype)


def _phi(q):
    return 0.5 * torch.special.erfc(-q * math.sqrt(0.5))


# -- attention: gradients of all three inputs --------------------------------------------------------------------------


def attention(q, k, v, scale):
    """(softmax(scale q k^T) v, log2 of the sum of exp(scale q k^T)): [B, H, L, D] in q's dtype, [B, H, L] unrounded."""
    dtype = compute_dtype(q, k, v)
    scores = scale * (q.to(dtype) @ k.to(dtype).mT)
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse[..., None]) @ v.to(dtype)).to(q.dtype), lse * math.log2(math.e)


def attention_gradient(g, q, k, v, out, lse, scale):
    """The gradients of q, k and v for the upstream gradient g, each in its tensor's dtype."""
    dtype = compute_dtype(q, k, v)
    g, q_, k_, v_ = (x.to(dtype) for x in (g, q, k, v))
    p = torch.exp2(scale * math.log2(math.e) * (q_ @ k_.mT) - lse[..., None])
    ds = scale * p * (g @ v_.mT - (g * out.to(dtype)).sum(-1, keepdim=True))
    return (ds @ k_).to(q.dtype), (ds.mT @ q_).to(k.dtype), (p.mT @ g).to(v.dtype)


# -- targeted distillation: chosen tokens of a student against a teacher's ---------------------------------------------

NORM_FLOOR = 1e-8  # of a token's length, in the cosine: that of torch.nn.functional.cosine_similarity


def token_distill(student, teacher, index_student, index_teacher, weight, distance, denominator):
    """sum_b 1 / count_b sum_j w_bj d_bj / denominator, a scalar; differentiable in student, teacher and weight."""
    s, t, w, chosen, count = _pairs(student, teacher, index_student, index_teacher, weight)
    if distance == "cosine":
        d = 1 - (s * t).sum(-1) / (_length(s) * _length(t)).squeeze(-1)
    else:
        d = (s - t).abs().mean(-1) if distance == "l1" else (s - t).square().mean(-1)
    return (torch.where(chosen, w * d, 0.0).sum(1) / count).sum() / denominator


def token_distill_gradient(student, teacher, index_student, index_teacher, weight, distance, denominator, scale):
    """The gradient of student for the upstream gradient `scale`, in its dtype; a token chosen twice has two terms."""
    s, t, w, chosen, count = _pairs(student, teacher, index_student, index_teacher, weight)
    if distance == "cosine":
        length_s, length_t = _length(s), _length(t)
        cosine = (s * t).sum(-1, keepdim=True) / (length_s * length_t)
        turning = s.norm(dim=-1, keepdim=True) >= NORM_FLOOR  # below, the length is a constant
        g = (torch.where(turning, cosine, 0.0) * (s / length_s) - t / length_t) / length_s
    else:
        e = s - t
        g = (torch.where(e > 0, 1.0, torch.where(e < 0, -1.0, e)) if distance == "l1" else 2 * e) / s.shape[-1]
    g = torch.where(chosen[..., None], (scale.to(s.dtype) * w / (count[:, None] * denominator))[..., None] * g, 0.0)
    rows = index_student.where(chosen, 0)[..., None].expand(g.shape)
    return g.new_zeros(student.shape).scatter_add_(1, rows, g).to(student.dtype)


def _pairs(student, teacher, index_student, index_teacher, weight):
    """(s, t [B, k, D], weight, chosen [B, k], count [B]): s and t are 0 where nothing is chosen; count is at least 1, and NaN
    where an index is out of range."""
    dtype = compute_dtype(student, teacher, weight)
    sizes = student.shape[1], teacher.shape[1]
    indices = index_student, index_teacher
    wrong = torch.stack([(i < -1) | (i >= n) for i, n in zip(indices, sizes)]).any(0)
    chosen = (index_student >= 0) & (index_teacher >= 0) & ~wrong
    rows = (i.where(chosen, 0)[..., None].expand(-1, -1, student.shape[2]) for i in indices)
    s, t = (torch.where(chosen[..., None], x.gather(1, r).to(dtype), 0.0) for x, r in zip((student, teacher), rows))
    count = chosen.sum(1).clamp(min=1).to(dtype).masked_fill(wrong.any(1), math.nan)
    return s, t, s.new_ones(chosen.shape) if weight is None else weight.to(dtype), chosen, count


def _length(x):
    return x.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
