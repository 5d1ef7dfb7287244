"""What the public functions do with their arguments before a kernel sees them: checks, and rows.

A row is a sample, or a frame of one where timesteps, weights or a mask say so: lead axes of the sample, R rows in all.
"""

import functools
import math
import numbers

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fastsds.counter import Noise
from fastsds.kernels import launch
from fastsds.schedule import alpha_sigma

REDUCTIONS = ("batch", "mean", "sum", "spatial")
WEIGHTINGS = ("uniform", "sigma2", "alpha_sigma2", "inverse_snr_root", "snr", "min_snr", "x0_error", "x0_error_batch")
ORDERS = ("uncond_first", "cond_first")
FORMS = ("uncond", "cond", "cond_minus_one")
TINY = torch.finfo(torch.float32).tiny


def reverse_only(function):
    """Refuse tangents: torch's custom ops would drop them, and forward mode be zero without a word."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if forward_ad._current_level >= 0:
            for v in pytree.tree_leaves((args, kwargs)):
                if isinstance(v, torch.Tensor) and forward_ad.unpack_dual(v).tangent is not None:
                    raise NotImplementedError(f"{function.__name__}: reverse mode only; forward-mode AD (jvp) is not supported")
        return function(*args, **kwargs)

    return checked


def choice(value, allowed, name):
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: one of {', '.join(map(repr, allowed))} expected, got {value!r}")


def sample(x, name):
    if not isinstance(x, torch.Tensor) or x.dtype not in launch.DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: a tensor of fp16, bf16, fp32 or fp64 expected, got {got}")
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"{name}: shape [B, ...] without empty axes expected, got {tuple(x.shape)}")


def matching(v, x, name):
    sample(v, name)
    if v.shape != x.shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)} expected, got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: on {v.device}, expected on {x.device}")


def number(value, name, low=-math.inf, above=False):
    """A finite real number, at least `low` (or above it), as a float."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and -math.inf < value < math.inf
    if not ok or value < low or (above and value == low):
        bound = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
        raise ValueError(f"{name}: a finite number{bound} expected, got {value!r}")
    return float(value)


def generator(v, x):
    if not isinstance(v, torch.Generator) or v.device.type != x.device.type:
        got = f"one on {v.device}" if isinstance(v, torch.Generator) else type(v).__name__
        raise ValueError(f"generator: a torch.Generator on {x.device} expected, got {got}")


def split(noise, x, name):
    """(eps, seed, draw, ids): a noise tensor, or the arguments of a stream."""
    if not isinstance(noise, Noise):
        if not isinstance(noise, torch.Tensor):
            raise ValueError(f"{name}: a tensor or a Noise expected, got {type(noise).__name__}")
        matching(noise, x, name)
        return savable(noise), 0, None, None
    if len(noise) != x.shape[0]:
        raise ValueError(f"{name}: {len(noise)} sample_ids for a batch of {x.shape[0]}")
    if noise.sample_ids.device != x.device:
        raise ValueError(f"{name}: stream on {noise.sample_ids.device}, samples on {x.device}; use noise.to({str(x.device)!r})")
    return None, noise.seed, savable(noise.draw), savable(noise.sample_ids)


def savable(v):
    """Autograd refuses to save inference tensors: clone those, and only those. A compiled graph cannot ask whether an input
    is one; autograd's own error then says so."""
    if v is None or torch.compiler.is_compiling() or not v.is_inference() or torch.is_inference_mode_enabled():
        return v
    return v.clone()


def halves(pred, order, name="pred"):
    """(unconditional, conditional): the two halves of [2B, ...], or of a pair, in that order."""
    choice(order, ORDERS, "order")
    if isinstance(pred, (tuple, list)):
        if len(pred) != 2:
            raise ValueError(f"{name}: a pair (two predictions) expected, got {len(pred)}")
        first, second = pred
        sample(first, f"{name}[0]")
        matching(second, first, f"{name}[1]")
    else:
        sample(pred, name)
        if len(pred) % 2:
            raise ValueError(f"{name}: [2B, ...] or a pair expected (both halves of the guidance), got {tuple(pred.shape)}")
        first, second = pred.chunk(2)
    return (first, second) if order == "uncond_first" else (second, first)


def guidance(pred, scale, order, form):
    """(base, other, weight): the guided prediction is base + weight * (base - other), other None where it is base itself.

    Like torch.lerp it starts from the nearer end, so that scale 0 and 1 are exact and little is lost between.
    """
    choice(form, FORMS, "form")
    scale = number(scale, "guidance scale")
    uncond, cond = halves(pred, order)
    if form == "cond":
        scale += 1.0
    base, other, weight = (uncond, cond, -scale) if scale < 0.5 else (cond, uncond, scale - 1.0)
    return base, (None if weight == 0 else other), weight


def lead_axes(*tensors):
    """How many leading axes of a sample these left-aligned tensors vary over; at least one."""
    return max([1, *(axis + 1 for v in tensors for axis, size in enumerate(v.shape) if size != 1)])


def rows(v, x, lead):
    """A left-aligned tensor as one value for each of x's first `lead` axes: [R], contiguous."""
    v = v.reshape(*v.shape[:lead], *(1,) * (lead - min(v.ndim, lead)))
    return v.expand(x.shape[:lead]).reshape(-1).contiguous()


def left_aligned(v, x, name):
    """v [B], [B, 1, 1, 1], [B, F], ... or a scalar: each axis 1 or x's."""
    if v.ndim > x.ndim or any(a != 1 and a != b for a, b in zip(v.shape, x.shape)):
        raise ValueError(f"{name}: shape {tuple(v.shape)} does not match the leading axes of the sample {tuple(x.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: on {v.device}, the samples on {x.device}")
    return v


def levels(t, schedule, x, dtype, weighting=None):
    """(alpha [R], sigma [R], lead), in the arithmetic's dtype; lead covers t and a weighting that is a tensor."""
    like = x if dtype == x.dtype else x.new_empty((), dtype=dtype).expand(x.shape)
    alpha, sigma = alpha_sigma(schedule, t, like)
    varying = [alpha, sigma]
    if isinstance(weighting, torch.Tensor):
        varying.append(left_aligned(weighting, x, "weighting"))
    lead = lead_axes(*varying)
    if lead == x.ndim > 1:
        raise ValueError(f"t, weighting: one a sample or frame expected, got one for every element of {tuple(x.shape)}")
    return savable(rows(alpha, x, lead)), savable(rows(sigma, x, lead)), lead


def weights(weighting, alpha, sigma, x, lead, prediction_type="epsilon"):
    """w [R] of every weighting that is a function of the noise level; `min_snr` in the space of prediction_type."""
    if isinstance(weighting, torch.Tensor):
        if not weighting.is_floating_point():
            raise ValueError(f"weighting: a float tensor expected, got {weighting.dtype}")
        return rows(weighting.detach().to(alpha.dtype), x, lead)
    if callable(weighting):
        w = weighting(alpha, sigma)
        if not isinstance(w, torch.Tensor) or (w.numel() != 1 and w.numel() != alpha.numel()) or not w.is_floating_point():
            raise ValueError(f"weighting: must return a float tensor [{alpha.numel()}] like alpha, got {w!r}")
        return w.detach().to(alpha.dtype).reshape(-1).expand(alpha.shape)
    choice(weighting, WEIGHTINGS, "weighting")
    return {
        "uniform": lambda: torch.ones_like(alpha),
        "sigma2": lambda: sigma * sigma,
        "alpha_sigma2": lambda: alpha * sigma * sigma,
        "inverse_snr_root": lambda: sigma / alpha,
        "snr": lambda: (alpha / sigma) ** 2,
        "min_snr": lambda: min_snr(alpha, sigma, 5.0, prediction_type),
    }[weighting]()


def min_snr(alpha, sigma, gamma, prediction_type):
    """min(SNR, gamma) on the squared error of x0, in the space of a prediction (Hang et al. 2023)."""
    snr = (alpha / sigma) ** 2
    if prediction_type == "epsilon":  # the quotient, which is 1 where SNR is 0
        return (gamma / snr).clamp(max=1.0)
    per_x0 = {"sample": 1.0, "v_prediction": snr + 1.0, "flow": (alpha + sigma) ** 2 / sigma**2}
    return snr.clamp(max=gamma) / per_x0[prediction_type]


def denominator(reduction, x):
    """What a sum is divided by."""
    if isinstance(reduction, str):
        choice(reduction, REDUCTIONS, "reduction")
        if reduction == "spatial" and x.ndim < 3:
            raise ValueError(f"reduction: 'spatial' divides by the last two axes of [B, ..., H, W], got {tuple(x.shape)}")
        return {"batch": x.shape[0], "mean": x.numel(), "sum": 1, "spatial": math.prod(x.shape[-2:])}[reduction]
    return number(reduction, "reduction", 0, above=True)


def index(v, name, x):
    """int64 [B, k] for a batch x, on its device; such that autograd can save it."""
    if not isinstance(v, torch.Tensor) or v.dtype != torch.int64:
        raise ValueError(f"{name}: an int64 tensor expected, got {getattr(v, 'dtype', type(v).__name__)}")
    if v.ndim != 2 or len(v) != len(x) or v.shape[1] < 1:
        raise ValueError(f"{name}: shape [{len(x)}, k] with at least one index expected, got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: on {v.device}, expected on {x.device}")
    return savable(v)


def frozen(v, name, n, x):
    """A weight [n] of a frozen network, on x's device; such that autograd can save it."""
    if not isinstance(v, torch.Tensor) or v.dtype not in launch.DTYPES:
        got = getattr(v, "dtype", type(v).__name__)
        raise ValueError(f"{name}: a tensor of fp16, bf16, fp32 or fp64 expected, got {got}")
    if v.shape != (n,) or not v.is_contiguous():
        raise ValueError(f"{name}: a contiguous tensor [{n}] expected, got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: on {v.device}, expected on {x.device}")
    if v.requires_grad:
        raise ValueError(f"{name}: requires a gradient, but this op is for frozen networks; detach it")
    return savable(v)
