"""The public functional surface: noise injection, guidance, conversions, losses on a score residual, and norms to fuse.

    x_t, _ = ops.add_noise(x0, t, schedule, noise)                  # noise = ops.Noise(seed, draw, sample_ids), or a tensor
    pred = unet(x_t, t, text)
    loss = ops.sds_loss(x0, pred, noise, t, schedule)               # no UNet backward
    loss = ops.denoising_loss(pred, noise, t, schedule)             # through the UNet

Each is a torch op (`torch.ops.fastsds.*`): torch.compile sees it without a graph break. On CUDA it runs its Triton kernel,
on the CPU its twin in `fastsds.reference`; TRITON_INTERPRET=1, set before the first import, runs the kernels on the CPU.
"""

import math
import numbers
import operator

import torch

from fastsds import arguments, reference
from fastsds.arguments import FORMS, ORDERS, REDUCTIONS, WEIGHTINGS
from fastsds.counter import Noise, Purpose, draw
from fastsds.kernels import attention as _attention
from fastsds.kernels import geglu as _geglu
from fastsds.kernels import group_norm_silu as _group_norm_silu
from fastsds.kernels import layer_norm as _layer_norm
from fastsds.kernels import noise as _noise
from fastsds.kernels import score, sid, token_distill
from fastsds.schedule import PREDICTION_TYPES, conversion, target_factors
from fastsds.schedule import prediction_type as _type

VALUES = ("energy", "target", "dot")
NONFINITE = ("propagate", "clamp", "zero", "drop_sample", "raise")
NORMS = ("sample", "batch", None)
DISTANCES = tuple(token_distill.DISTANCES)

__all__ = [
    "DISTANCES", "FORMS", "NONFINITE", "NORMS", "ORDERS", "PREDICTION_TYPES", "REDUCTIONS", "VALUES", "WEIGHTINGS",
    "Noise", "Purpose", "add_noise", "attention", "convert", "denoising_loss", "dmd_loss", "draw", "geglu", "group_norm_silu",
    "guide", "inject_grad", "layer_norm", "min_snr", "power", "sds_loss", "sid_loss", "token_distill_loss",
]  # fmt: skip


@arguments.reverse_only
def add_noise(x0, t, schedule, noise=None, *, generator=None):
    """Noise samples to timestep t.

        x_t = alpha_t * x0 + sigma_t * eps

    Shapes: x0, x_t and a noise tensor [B, ...], any strides; t int, [1], [B], [B, 1, ...], or [B, F] for one timestep a frame
        of [B, F, C, H, W].
    Args:
        schedule: alpha-bar tensor, diffusers scheduler, "flow" (t is sigma) or (alpha, sigma) pair: `schedule.alpha_sigma`.
        noise: a tensor, or a `Noise` (made in registers). None draws `torch.randn_like(x0)` from the global stream, or from
            `generator`, so that swapping this call in changes no run.
    Returns: (x_t, noise): x_t in x0's dtype and layout; the noise tensor used, or None if it came from a `Noise`.
        Differentiable in x0 and in a noise tensor.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic on fp32 alpha-bar (diffusers casts alpha-bar to x0's dtype first), one rounding; float64 stays
        float64 (the normals of a `Noise` are fp32 values).
    Cost: reads x0 (and a noise tensor), writes x_t.
    Source: Ho et al. 2020, equation 4.
    """
    arguments.sample(x0, "x0")
    if noise is None:
        if generator is None:
            noise = torch.randn_like(x0)
        else:
            arguments.generator(generator, x0)
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
    elif generator is not None:
        raise ValueError("generator: used only when noise is None")
    eps, seed, draws, ids = arguments.split(noise, x0, "noise")
    alpha, sigma, _ = arguments.levels(t, schedule, x0, reference.compute_dtype(x0, eps))
    return _noise.add_noise(x0, eps, alpha, sigma, seed, draws, ids), None if eps is None else noise


def guide(pred, scale, order="uncond_first", form="uncond"):
    """Guide a conditional prediction away from the unconditional one.

        "uncond"  u + s (c - u)        "cond"  c + s (c - u)        "cond_minus_one"  c + (s - 1)(c - u), the same as "uncond"

    Shapes: pred [2B, ...] or a pair of [B, ...]; returns [B, ...].
    Args:
        order: which half comes first, "uncond_first" or "cond_first".
    Returns: the guided prediction in pred's dtype (in that of both, promoted, where a pair's differ), differentiable; terms
        beyond the two are the caller's to add.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic from the nearer end, one rounding: scale 0 is u and 1 is c exactly ("cond": -1 and 0).
    Source: Ho and Salimans 2022, equation 6.
    """
    base, other, weight = arguments.guidance(pred, scale, order, form)
    dtype = pred.dtype if isinstance(pred, torch.Tensor) else torch.promote_types(*(v.dtype for v in pred))
    return reference.guide(base, other, weight, reference.compute_dtype(base, other)).to(dtype)


def convert(pred, x_t, t, schedule, *, source, target):
    """Convert a prediction of one type to another.

        target = p * pred + q * x_t                  for x_t = alpha x0 + sigma eps: see `schedule.conversion`

    Shapes: pred, x_t [B, ...]; t as in `add_noise`.
    Args:
        source, target: "epsilon" ("eps"), "v_prediction" ("v"), "sample" ("x0") or "flow".
    Returns: the prediction in pred's dtype, differentiable in pred and x_t.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic (float64 if a tensor is), one rounding.
    Source: Salimans and Ho 2022, appendix D.
    """
    arguments.sample(pred, "pred")
    arguments.matching(x_t, pred, "x_t")
    source, target = _type(source, "source"), _type(target, "target")
    if source == target:
        return pred
    dtype = reference.compute_dtype(pred, x_t)
    alpha, sigma, _ = arguments.levels(t, schedule, pred, dtype)
    p, q = (reference.rows(v, pred) for v in conversion(source, target, alpha, sigma))
    return (p * pred.to(dtype) + q * x_t.to(dtype)).to(pred.dtype)


def power(p, q):
    """Return the weighting w = alpha^p sigma^q."""
    return lambda alpha, sigma: alpha**p * sigma**q


def min_snr(gamma, prediction_type):
    """Return the weighting min(SNR, gamma) of the squared error of x0 (Hang et al. 2023).

    Args:
        prediction_type: the space of the residual it weighs: that of pred in `denoising_loss`, "epsilon" in `sds_loss`.
    """
    gamma, kind = arguments.number(gamma, "gamma", 0, above=True), _type(prediction_type)
    return lambda alpha, sigma: arguments.min_snr(alpha, sigma, gamma, kind)


@arguments.reverse_only
def denoising_loss(
    pred,
    noise,
    t,
    schedule,
    *,
    x0=None,
    x_t=None,
    prediction_type="epsilon",
    weighting="uniform",
    reduction="mean",
):
    """Return the weighted squared error of a prediction, with the true gradient.

        L = sum_b w_b * sum_i (pred - target)_bi^2 / denominator
        target = eps | (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2) (v_prediction) | x0 (sample) | eps - x0 (flow)

    Shapes: pred, x0, x_t and a noise tensor [B, ...], any strides; t as in `add_noise`; L scalar.
    Args:
        noise: the tensor or `Noise` given to `add_noise`; may be None for "sample" with x0.
        x0, x_t: give one of them for every prediction type but "epsilon"; from x_t, x0 is (x_t - sigma eps) / alpha.
        weighting: w_b: "uniform" 1, "sigma2" sigma^2, "alpha_sigma2" alpha sigma^2, "inverse_snr_root" sigma / alpha, "snr"
            alpha^2 / sigma^2, "min_snr" (gamma 5, in pred's space), a callable (alpha, sigma) -> w such as `power(p, q)` and
            `min_snr(gamma, kind)`, or a tensor [B], or of t's shape. The arguments of a callable are [R], one value a timestep.
        reduction: the denominator: "mean" the number of elements, "batch" B, "sum" 1, "spatial" H W, or a number.
    Returns: L, fp32 (float64 for float64 inputs). Differentiable in pred, x0, x_t and a noise tensor, not in w.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic; each gradient is rounded once, to its tensor's dtype. Zero residual gives exactly zero.
    Cost: forward reads pred; backward reads pred and writes its gradient; plus the tensors given. eps of a `Noise` costs
        nothing.
    Source: Ho et al. 2020, equation 14; Salimans and Ho 2022 (v).
    """
    arguments.sample(pred, "pred")
    prediction_type = _type(prediction_type)
    y, from_x0 = None, x0 is not None
    if prediction_type != "epsilon":
        if (x0 is None) == (x_t is None):
            raise ValueError(f"x0, x_t: give one of them: the target of {prediction_type!r} is not a function of noise alone")
        y = x0 if from_x0 else x_t
        arguments.matching(y, pred, "x0" if from_x0 else "x_t")
    if noise is None:
        if prediction_type != "sample" or not from_x0:
            raise ValueError(f"noise: required for prediction_type {prediction_type!r}")
        noise = x0.detach()  # its factor is zero
    if isinstance(weighting, str) and weighting in ("x0_error", "x0_error_batch"):
        raise ValueError(f"weighting: {weighting!r} normalises an injected gradient (sds_loss, dmd_loss), not a true loss")
    eps, seed, draws, ids = arguments.split(noise, pred, "noise")
    dtype = reference.compute_dtype(pred, y, eps)
    alpha, sigma, lead = arguments.levels(t, schedule, pred, dtype, weighting)
    e, x = target_factors(prediction_type, alpha, sigma)  # target = e eps + x x0
    if y is not None and not from_x0:  # x0 = (x_t - sigma eps) / alpha
        e, x = e - x * sigma / alpha, x / alpha
    k = arguments.weights(weighting, alpha, sigma, pred, lead, prediction_type) / arguments.denominator(reduction, pred)
    factors = torch.stack([torch.ones_like(alpha), -x, e, k])
    return score.denoising_energy(arguments.savable(pred), arguments.savable(y), eps, factors, seed, draws, ids)


@arguments.reverse_only
def sds_loss(
    x0, pred, ref, t, schedule, *, x_t=None, guidance_scale=None, order="uncond_first", form="uncond",
    prediction_type="epsilon", ref_prediction_type="epsilon", weighting="uniform", clip=None, nonfinite="propagate",
    reduction="batch", value="energy", return_grad=False,
):  # fmt: skip
    """Score distillation: inject a residual of scores as the gradient of x0, without a network's Jacobian.

        g = clip(w_b (eps_hat - ref)),      dL/dx0 = g / denominator

    Shapes: x0, pred, x_t and a ref tensor [B, ...], any strides; t as in `add_noise`; L scalar.
    Args:
        pred: the teacher's prediction at x_t; no gradient flows into it. It is converted to eps_hat first.
        ref: what is subtracted: the noise itself, a tensor or `Noise` (SDS); another prediction: an adapter's (VSD), the
            unconditional one (CSD), the reference branch's (DDS), of type `ref_prediction_type`.
        x_t: required for every prediction type but "epsilon", whose conversion reads it, and for "x0_error" weightings.
        guidance_scale, order, form: pred is [2B, ...] or a pair of predictions and is guided first: see `guide`.
        weighting: w_b, as in `denoising_loss` ("min_snr" in the space of epsilon); or "x0_error" 1 / mean|x0 - x0_hat|,
            the mean over each sample, or over the batch ("x0_error_batch").
        clip: bound of |g|. nonfinite: of w (eps_hat - ref), "propagate"; "clamp" NaN to 0 and infinities to the largest
            number of x0's dtype, which L leaves out; "zero" both to 0; "drop_sample" the whole sample to 0; "raise"
            FloatingPointError (this one reads the result back from the device, and so cannot be part of a compiled graph).
        reduction: the denominator: "batch" B, "mean" the number of elements, "sum" 1, "spatial" H W, or a number.
        value: what L reports: "energy" 1/2 sum g (eps_hat - ref), "target" 1/2 sum g^2, "dot" sum g x0, each over the
            denominator. The value is not what is minimised: the gradient is.
        return_grad: also return dL/dx0 (for an upstream gradient of 1).
    Returns: L, or (L, gradient in x0's dtype). L is fp32 (float64 for float64 inputs); the upstream gradient is honoured.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic, one rounding to x0's dtype, upstream gradient included: nothing is lost to x - (x - g).
    Cost: forward reads pred (both halves), backward reads it again and writes the gradient; plus the tensors given. eps of a
        `Noise` is regenerated, never stored. "x0_error" and "drop_sample" read once more. Tensors made under
        inference_mode are cloned, as autograd cannot save them (not inputs of a compiled graph: clone those before it).
    Source: Poole et al. 2022 (DreamFusion), equation 3; Wang et al. 2023 (VSD, arXiv 2305.16213); Yu et al.
        2023 (CSD, arXiv 2310.19415); Hertz et al. 2023 (DDS, arXiv 2304.07090).
    """
    arguments.sample(x0, "x0")
    kind, ref_kind = _type(prediction_type), _type(ref_prediction_type, "ref_prediction_type")
    arguments.choice(value, VALUES, "value")
    arguments.choice(nonfinite, NONFINITE, "nonfinite")
    clip = math.inf if clip is None else arguments.number(clip, "clip", 0)
    other, guidance = None, 0.0
    if guidance_scale is not None:
        if isinstance(pred, torch.Tensor) and pred.shape == x0.shape:
            raise ValueError(f"pred: both halves expected with guidance_scale, [2B, ...] or a pair, got {tuple(pred.shape)}")
        pred, other, guidance = arguments.guidance(pred, guidance_scale, order, form)
    arguments.matching(pred, x0, "pred")
    normalised = isinstance(weighting, str) and weighting in ("x0_error", "x0_error_batch")
    y = None
    if kind != "epsilon" or ref_kind != "epsilon" or normalised:
        if x_t is None:
            why = f"weighting {weighting!r} compares x0 with x0_hat" if normalised else "only epsilon is compared as it is"
            raise ValueError(f"x_t: required to convert a prediction of type {kind!r} (ref: {ref_kind!r}): {why}")
        arguments.matching(x_t, x0, "x_t")
        y = arguments.savable(x_t.detach())
    eps, seed, draws, ids = arguments.split(ref, x0, "ref")
    if eps is None and ref_kind != "epsilon":
        raise ValueError(f"ref_prediction_type: a Noise is epsilon, got {ref_kind!r}")
    pred, other, eps = (None if v is None else arguments.savable(v.detach()) for v in (pred, other, eps))
    dtype = reference.compute_dtype(x0, pred, other, y, eps)
    alpha, sigma, lead = arguments.levels(t, schedule, x0, dtype, None if normalised else weighting)
    (p, q), (a, b) = (conversion(source, "epsilon", alpha, sigma) for source in (kind, ref_kind))
    if normalised:
        to_x0 = torch.stack([*conversion(kind, "sample", alpha, sigma), *torch.ones_like(alpha).expand(2, -1)])
        clean = arguments.savable(x0.detach())
        sums = score.sample_sums(pred, other, y, clean, to_x0, 0, None, None, guidance, True)
        w = _inverse_mean(sums, x0, "sample" if weighting == "x0_error" else "batch").expand(len(x0))
        w = w[:, None].expand(-1, len(alpha) // len(x0)).reshape(-1)
    else:
        w = arguments.weights(weighting, alpha, sigma, x0, lead)
    factors = torch.stack([p, q - b, a, w])
    if kind == ref_kind == "epsilon":
        y = None
    stream = (seed, draws, ids)
    if nonfinite in ("drop_sample", "raise"):
        finite = score.sample_sums(pred, other, y, eps, factors, *stream, guidance, False).isfinite()
        if nonfinite == "raise" and not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise FloatingPointError(f"sds_loss: w (eps_hat - ref) is not finite in samples {bad} of the batch")
        kept = torch.where(finite[:, None], w.view(len(x0), -1), 0.0).reshape(-1)
        factors = torch.stack([p, q - b, a, kept])
    return _inject(
        x0, pred, other, y, eps, factors, stream, guidance, clip, nonfinite, value, arguments.denominator(reduction, x0),
        return_grad,
    )  # fmt: skip


@arguments.reverse_only
def dmd_loss(
    x, x0_real, x0_fake, *, norm="sample", eps=0.0, floor=None, scale=None, mask=None, nonfinite="propagate",
    reduction="mean", value="target", return_grad=False,
):  # fmt: skip
    """Distribution matching distillation: push x from what the fake score sees to what the real one sees.

        g = scale_b (x0_fake - x0_real) / n_b,   n_b = max(mean|x - x0_real| + eps, floor),   dL/dx = g / denominator

    Shapes: x, x0_real, x0_fake [B, ...], any strides; L scalar.
    Args:
        norm: the mean over each sample ("sample"), over the batch ("batch"), or n = 1 (None).
        scale: a number, or a tensor [B] or [B, F]. mask: bool, [B], [B, F] or any shape that broadcasts from the left: False
            takes no gradient, and "mean" divides by the elements kept. The norm is over all elements, as Self-Forcing has it;
            a masked element that is not finite counts as |x - x0_real| = 0 there. So what is not finite and masked is harmless.
        nonfinite: "propagate", "clamp" or "zero", as in `sds_loss`.
        reduction: the denominator, as in `sds_loss`. value: "target" 1/2 sum g^2, "dot" sum g x, each over the denominator.
    Returns: L, or (L, gradient in x's dtype). No gradient flows into x0_real and x0_fake.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic, float64 for float64 inputs; one rounding. Where x equals x0_real, n is the smallest normal
        number rather than 0.
    Cost: reads x0_real twice, x and x0_fake once; backward reads both again and writes the gradient. A mask copies all three.
    Source: Yin et al. 2024 (DMD, arXiv 2311.18828), equations 7 and 8.
    """
    arguments.sample(x, "x")
    for v, name in ((x0_real, "x0_real"), (x0_fake, "x0_fake")):
        arguments.matching(v, x, name)
    if norm not in NORMS:
        raise ValueError(f"norm: one of {', '.join(map(repr, NORMS))} expected, got {norm!r}")
    arguments.choice(nonfinite, ("propagate", "clamp", "zero"), "nonfinite")
    arguments.choice(value, ("target", "dot"), "value")
    clean, real, fake = (arguments.savable(v.detach()) for v in (x, x0_real, x0_fake))
    dtype, count = reference.compute_dtype(x, real, fake), arguments.denominator(reduction, x)
    against = real
    if mask is not None:
        kept = _mask(mask, x)
        seen = kept | (clean.isfinite() & real.isfinite())
        clean, against = (torch.where(seen, v, 0.0) for v in (clean, real))
        real, fake = (torch.where(kept, v, 0.0) for v in (real, fake))
        x, count = _kept(x, kept, value, count, reduction)
    w = torch.ones(len(x), dtype=dtype, device=x.device)
    if norm is not None:
        one = torch.ones_like(w)
        factors = torch.stack([one, torch.zeros_like(w), one, one])
        sums = score.sample_sums(clean, None, None, against, factors, 0, None, None, 0.0, True)
        floor = 0.0 if floor is None else arguments.number(floor, "floor", 0)
        w = _inverse_mean(sums, x, norm, arguments.number(eps, "eps", 0), floor).expand(len(x))
    if scale is not None:
        if isinstance(scale, torch.Tensor):
            if not scale.is_floating_point():
                raise ValueError(f"scale: a number or a float tensor expected, got {scale.dtype}")
            scale = arguments.left_aligned(scale.detach().to(dtype), x, "scale")
            lead = arguments.lead_axes(scale)
            w = arguments.rows(arguments.left_aligned(w, x, "w"), x, lead) * arguments.rows(scale, x, lead)
        else:
            w = w * arguments.number(scale, "scale")
    factors = torch.stack([torch.ones_like(w), torch.zeros_like(w), torch.ones_like(w), w])
    return _inject(
        x, fake, None, None, real, factors, (0, None, None), 0.0, math.inf, nonfinite, value, count, return_grad
    )  # fmt: skip


@arguments.reverse_only
def sid_loss(x, x0_real, x0_fake, *, alpha=1.0, floor=1e-5, reduction="sum"):
    """Score identity distillation, with the true gradient into all three.

        L = sum_b w_b sum_i d (e - alpha d) / denominator,   d = x0_real - x0_fake,   e = x0_real - x,
        w_b = 1 / max(mean|x - x0_real|, floor), without gradient

    Shapes: x, x0_real, x0_fake [B, ...], any strides; L scalar.
    Args:
        reduction: the denominator: "sum" 1, "batch" B, "mean" the number of elements, "spatial" H W, or a number.
    Returns: L, fp32 (float64 for float64 inputs), differentiable in x, x0_real and x0_fake.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic, one rounding of each gradient.
    Cost: forward reads x and x0_real twice, x0_fake once; backward reads all three and writes three gradients.
    Source: Zhou et al. 2024 (SiD, arXiv 2404.04057).
    """
    arguments.sample(x, "x")
    for v, name in ((x0_real, "x0_real"), (x0_fake, "x0_fake")):
        arguments.matching(v, x, name)
    x, x0_real, x0_fake = (arguments.savable(v) for v in (x, x0_real, x0_fake))
    dtype = reference.compute_dtype(x, x0_real, x0_fake)
    one = torch.ones(len(x), dtype=dtype, device=x.device)
    factors = torch.stack([one, torch.zeros_like(one), one, one])
    sums = score.sample_sums(x.detach(), None, None, x0_real.detach(), factors, 0, None, None, 0.0, True)
    w = _inverse_mean(sums, x, "sample", 0.0, arguments.number(floor, "floor", 0))
    return sid.sid_energy(x, x0_real, x0_fake, w / arguments.denominator(reduction, x), arguments.number(alpha, "alpha"))


@arguments.reverse_only
def inject_grad(x, grad, *, reduction="sum", mask=None, value="dot"):
    """Give x a gradient that is already known.

        dL/dx = grad / denominator,   L = sum grad x / denominator ("dot"), or 1/2 sum grad^2 / denominator ("target")

    Shapes: x, grad [B, ...], any strides; L scalar.
    Args:
        reduction: the denominator, as in `sds_loss`. mask: as in `dmd_loss`.
    Returns: L, fp32 (float64 for float64 inputs); the upstream gradient is honoured, no gradient flows into grad.
    Raises: ValueError naming the argument.
    Numerics: one rounding to x's dtype, upstream gradient and denominator included.
    Cost: forward reads grad (and x for "dot"), backward reads grad and writes the gradient. A mask copies what is read.
    """
    arguments.sample(x, "x")
    arguments.matching(grad, x, "grad")
    arguments.choice(value, ("dot", "target"), "value")
    grad, count = arguments.savable(grad.detach()), arguments.denominator(reduction, x)
    dtype = reference.compute_dtype(x, grad)
    if mask is not None:
        kept = _mask(mask, x)
        grad = torch.where(kept, grad, 0.0)
        x, count = _kept(x, kept, value, count, reduction)
    factors = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=dtype, device=x.device)[:, None].expand(4, len(x)).contiguous()
    return _inject(x, grad, None, None, None, factors, (0, None, None), 0.0, math.inf, "propagate", value, count, False)


@arguments.reverse_only
def group_norm_silu(x, weight, bias, groups, eps=1e-5, *, silu=True):
    """Normalise groups of channels in a frozen network, and apply SiLU: a gradient to x alone.

        n = (x - mean) / sqrt(var + eps) * weight + bias,   y = n sigmoid(n), or n without silu

    Shapes: x, y [B, C, ...], contiguous or channels_last; weight, bias [C].
    Args:
        groups: how many, a divisor of C.
    Returns: y in x's dtype and layout, differentiable in x.
    Raises: ValueError naming the argument; also for a weight that asks for a gradient.
    Numerics: fp32 arithmetic, mean before variance, one rounding.
    Cost: forward reads x and writes y; backward reads x and dy and writes dx. Only x is saved, and [B groups] statistics.
    Source: Wu and He 2018; Hendrycks and Gimpel 2016 (SiLU).
    """
    arguments.sample(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x: shape [B, C, ...] expected, got {tuple(x.shape)}")
    if _group_norm_silu.is_channels_last(x) is None:
        raise ValueError(f"x: contiguous or channels_last expected, got strides {x.stride()} of shape {tuple(x.shape)}")
    if isinstance(groups, bool) or not isinstance(groups, numbers.Integral) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: a divisor of the {x.shape[1]} channels expected, got {groups!r}")
    weight, bias = (arguments.frozen(v, name, x.shape[1], x) for v, name in ((weight, "weight"), (bias, "bias")))
    x, eps = arguments.savable(x), arguments.number(eps, "eps", 0)
    return _group_norm_silu.group_norm_silu(x, weight, bias, operator.index(groups), eps, bool(silu))[0]


@arguments.reverse_only
def layer_norm(x, weight, bias, eps=1e-5):
    """Normalise the last axis in a frozen network: a gradient to x alone.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Shapes: x, y [..., n], any strides, n at most 8,192; weight, bias [n].
    Returns: y in x's dtype, differentiable in x.
    Raises: ValueError naming the argument; also for a weight that asks for a gradient.
    Numerics: fp32 arithmetic, mean before variance, one rounding.
    Cost: forward reads x and writes y; backward reads x and dy and writes dx. Only x is saved.
    Source: Ba et al. 2016.
    """
    arguments.sample(x, "x")
    if x.shape[-1] > _layer_norm.MAX_ROW:
        raise ValueError(f"x: at most {_layer_norm.MAX_ROW} elements on the last axis are supported, got {tuple(x.shape)}")
    weight, bias = (arguments.frozen(v, name, x.shape[-1], x) for v, name in ((weight, "weight"), (bias, "bias")))
    return _layer_norm.layer_norm(arguments.savable(x), weight, bias, arguments.number(eps, "eps", 0))


@arguments.reverse_only
def geglu(x):
    """Gate one half of the last axis by the other, as diffusers' feed-forward blocks do: a gradient to x.

        y = h gelu(q),   (h, q) = halves of x,   gelu(q) = q Phi(q), exact

    Shapes: x [..., 2 n], any strides; y [..., n].
    Returns: y in x's dtype, differentiable in x.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic, one rounding.
    Cost: forward reads x and writes half of it; backward reads x and dy and writes dx. Only x is saved.
    Source: Shazeer 2020.
    """
    arguments.sample(x, "x")
    if x.shape[-1] % 2:
        raise ValueError(f"x: an even last axis expected (two halves), got {tuple(x.shape)}")
    return _geglu.geglu(arguments.savable(x))


@arguments.reverse_only
def attention(q, k, v, scale=None):
    """Attend, without mask or dropout.

        y = softmax(scale q k^T) v

    Shapes: q, y [B, H, L, 40]; k, v [B, H, S, 40]; any strides with the last 1, such as a view of [B, L, H * 40]. 40 is the
        head dimension of SD 1.x at its finest level, which torch's kernels pad to 64; for others, use those.
    Args:
        scale: 40^-1/2 if None.
    Returns: y in q's dtype, laid out as [B, L, H, 40] is; differentiable in q, k and v.
    Raises: ValueError naming the argument.
    Numerics: fp32 sums and softmax; fp16 and bf16 products take probabilities and their gradients rounded to that dtype;
        float64 stays float64. Deterministic.
    Cost: forward 88 B H L S multiply-adds, backward 312. Saves q, k, v, y and one fp32 number a query. The twin (fp64, and
        the CPU) holds B H L S scores. Not yet measured on a GPU.
    Source: Vaswani et al. 2017; Dao 2023 (arXiv 2307.08691) for the order of summation.
    """
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        arguments.sample(x, name)
        if x.ndim != 4:
            raise ValueError(f"{name}: shape [B, H, L, {_attention.HEAD_DIM}] expected, got {tuple(x.shape)}")
    arguments.matching(v, k, "v")
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(f"k: [B, H, S, 40] with q's B and H expected, got {tuple(k.shape)} beside {tuple(q.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device):
        raise ValueError(f"q, k, v: one dtype and device expected, got {[(x.dtype, str(x.device)) for x in (q, k, v)]}")
    _attention.check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else arguments.number(scale, "scale", 0, above=True)
    return _attention.attention(*(arguments.savable(x) for x in (q, k, v)), scale)[0]


@arguments.reverse_only
def token_distill_loss(
    student, teacher, index_student, index_teacher=None, *, weight=None, distance="l1", reduction="batch"
):  # fmt: skip
    """Pull chosen tokens of a student towards those of a frozen teacher, without a copy of the chosen.

        L = sum_b 1 / count_b sum_j w_bj d(student[b, index_student[b, j]], teacher[b, index_teacher[b, j]]) / denominator
        d(s, t) = mean |s - t| ("l1") | mean (s - t)^2 ("l2") | 1 - s.t / (max(|s|, 1e-8) max(|t|, 1e-8)) ("cosine")

    Shapes: student [B, N, D], teacher [B, M, D], any strides, of any two dtypes; index_student, index_teacher int64 [B, k]; L
        scalar. D and k at most 8,192.
    Args:
        index_student: which tokens, -1 for none: count_b is how many there are, and an instance without any adds 0. Distinct
            ones, as a rule: a token chosen twice counts twice, and its gradient has both terms.
        index_teacher: what each is compared with (-1 for none as well); index_student itself if None.
        weight: w, a float tensor: [B], one an instance, or [B, k], one a pair, which does not change count_b.
        reduction: the denominator: "batch" B, "sum" 1, or a number.
    Returns: L, fp32 (float64 for float64 inputs), differentiable in student alone: teacher and weight are detached.
    Raises: ValueError naming the argument. An index below -1 or beyond the tokens is one on the CPU; on a GPU, where looking
        would wait for it, L is NaN, and so are the gradients of the tokens that its instance chose.
    Numerics: fp32 arithmetic, one rounding of the gradient. Deterministic. Tokens that nobody chose get exactly 0, whatever
        they hold.
    Cost: forward reads the chosen tokens of both; backward reads them again and writes the gradient, zeros included. Nothing
        of size [B, k, D] is stored (by the twin, on the CPU, it is). Not yet measured on a GPU.
    Source: the targeted distillation of CLIP-TD (Wang et al. 2022, arXiv 2201.05729). The formula is ours: beyond the
        abstract, the paper's could not be verified.
    """
    for x, name in ((student, "student"), (teacher, "teacher")):
        arguments.sample(x, name)
        if x.ndim != 3:
            raise ValueError(f"{name}: shape [B, tokens, D] expected, got {tuple(x.shape)}")
    if teacher.shape[::2] != student.shape[::2] or teacher.device != student.device:
        raise ValueError(
            f"teacher: [B, M, D] with student's B and D and on its device expected, got {tuple(teacher.shape)} on "
            f"{teacher.device} beside {tuple(student.shape)} on {student.device}"
        )
    index_student = arguments.index(index_student, "index_student", student)
    index_teacher = index_student if index_teacher is None else arguments.index(index_teacher, "index_teacher", student)
    if index_teacher.shape != index_student.shape:
        raise ValueError(f"index_teacher: shape {tuple(index_student.shape)} expected, got {tuple(index_teacher.shape)}")
    token_distill.check(student, index_student)
    arguments.choice(distance, DISTANCES, "distance")
    if isinstance(reduction, str):
        arguments.choice(reduction, ("batch", "sum"), "reduction")
    if weight is not None:
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise ValueError(f"weight: a float tensor expected, got {getattr(weight, 'dtype', type(weight).__name__)}")
        weight = arguments.left_aligned(weight.detach(), index_student, "weight")
        dtype = reference.compute_dtype(student, teacher)
        weight = arguments.savable(weight.to(dtype)).view(*weight.shape, *(1,) * (2 - weight.ndim)).expand(index_student.shape)
    return token_distill.token_distill(
        arguments.savable(student), arguments.savable(teacher.detach()), index_student, index_teacher, weight, distance,
        torch.sym_float(arguments.denominator(reduction, student)),
    )  # fmt: skip


def _inject(x, pred, other, y, eps, factors, stream, guidance, clip, nonfinite, value, count, return_grad):
    """The value over `count` with its injected gradient; and the gradient itself, if asked."""
    if nonfinite == "clamp":
        clip = min(clip, torch.finfo(x.dtype).max)
    policy = {"drop_sample": "zero", "raise": "propagate"}.get(nonfinite, nonfinite)
    args = (pred, other, y, eps, factors, *stream, guidance, clip, policy)
    loss = score.sds_value(x, *args, value) / count
    if not return_grad:
        return loss
    scale = torch.ones_like(loss.detach()) / count
    return loss, score.residual_gradient(*args, scale, x.dtype, score.is_channels_last(x))


def _inverse_mean(sums, x, norm, eps=0.0, floor=0.0):
    """1 / max(mean + eps, floor) from each sample's sum, one a sample [B] or one for the batch [1]."""
    mean = sums / (x.numel() // len(x)) if norm == "sample" else sums.sum()[None] / x.numel()
    return 1.0 / (mean + eps).clamp(min=max(floor, arguments.TINY))


def _kept(x, kept, value, count, reduction):
    """x as the value may read it, and the denominator, under a mask."""
    return (
        torch.where(kept, x, 0.0) if value == "dot" else x,
        kept.sum().clamp(min=1) if reduction == "mean" else count,
    )


def _mask(mask, x):
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"mask: a bool tensor expected, got {getattr(mask, 'dtype', type(mask).__name__)}")
    mask = arguments.savable(arguments.left_aligned(mask, x, "mask"))
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)).expand(x.shape)
