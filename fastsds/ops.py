"""The public functional surface: counter-based noise, noise injection, and two losses on a score residual.

    x_t, _ = ops.add_noise(x0, t, schedule, noise)                  # noise = ops.Noise(seed, draw, sample_ids), or a tensor
    pred = unet(x_t, t, text)
    loss = ops.sds_loss(x0, pred, noise, t, schedule)               # no UNet backward
    loss = ops.denoising_loss(pred, noise, t, schedule)             # through the UNet

Each is a torch op (`torch.ops.fastsds.*`): torch.compile sees it without a graph break. On CUDA it runs its Triton kernel,
on the CPU its twin in `fastsds.reference`; TRITON_INTERPRET=1, set before the first import, runs the kernels on the CPU.
"""

import dataclasses
import enum
import math

import torch

from fastsds import reference
from fastsds.kernels import launch, philox, score
from fastsds.kernels import noise as _noise
from fastsds.schedule import alpha_sigma

REDUCTIONS = ("batch", "mean", "sum")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS = ("uniform", "sigma2", "alpha_sigma2", "inverse_snr_root")
VALUES = ("energy",)


class Purpose(enum.IntEnum):
    """What a random number is for: the top 4 bits of `draw`, so that no two uses share a word."""

    NOISE = 0
    TIMESTEP = 1
    CAPTION = 2
    CROP = 3
    ORDER = 4
    DROPOUT = 5
    RENDER = 6


def draw(purpose, visit):
    """Return `purpose * 2^28 + visit`, the last word of the counter.

    Args:
        purpose: a `Purpose`, or an int in [0, 16).
        visit: how often this sample was visited before (epoch * K + k), in [0, 2^28): an int, or an int64 tensor [B] with
            one visit a sample (then a tensor comes back).
    Raises: ValueError if either is out of range.
    """
    purpose = int(purpose)
    if not 0 <= purpose < 16:
        raise ValueError(f"purpose: an int in [0, 16) expected, got {purpose}")
    if isinstance(visit, torch.Tensor):
        _integers(visit, "visit")
        _check_range(visit, "visit", 1 << 28)
        return visit.to(torch.int64) + (purpose << 28)
    visit = int(visit)
    if not 0 <= visit < 1 << 28:
        raise ValueError(f"visit: an int in [0, 2^28) expected, got {visit}")
    return purpose << 28 | visit


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """A counter-based stream of random numbers, one a sample: accepted wherever a noise tensor is, and never stored.

        word = Philox4x32-10(key = seed, counter = (i // 4, id low, id high, draw))[i % 4]

    A sample's numbers depend on (seed, draw, its id, element i in row-major order) alone: not on batch size, batch split,
    rank, world size, memory layout or device. The same normals come out of `.normal`, `add_noise` and the losses, bit for
    bit.

    Args:
        seed: int64 bit pattern, -2^63 <= seed < 2^64.
        draw: int in [0, 2^32), see `draw()`; or an int64 tensor [B] with one a sample.
        sample_ids: [B] integers (tensor, list or tuple), any int64 bit pattern. Its device is the stream's.
    Raises: ValueError for a wrong type, shape, range or device.
    Source: Salmon et al. 2011 (Philox); Box and Muller 1958.
    """

    seed: int
    draw: "int | torch.Tensor"
    sample_ids: "torch.Tensor | list[int]"

    def __post_init__(self):
        seed, ids = self.seed, self.sample_ids
        if not isinstance(seed, int) or isinstance(seed, bool) or not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seed: an int in [-2^63, 2^64) expected, got {seed!r}")
        object.__setattr__(self, "seed", seed - (1 << 64) if seed >= 1 << 63 else seed)
        if not isinstance(ids, torch.Tensor):
            ids = torch.tensor(ids, dtype=torch.int64)
        _integers(ids, "sample_ids")
        if ids.ndim != 1:
            raise ValueError(f"sample_ids: shape [B] expected, got {tuple(ids.shape)}")
        object.__setattr__(self, "sample_ids", ids.to(torch.int64).contiguous())
        value = self.draw
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
                raise ValueError(f"draw: an int in [0, 2^32) or a tensor [B] expected, got {value!r}")
            value = torch.full((1,), int(value), dtype=torch.int64, device=ids.device)
        _integers(value, "draw")
        if value.shape not in ((1,), ids.shape):
            raise ValueError(f"draw: shape [1] or [{len(ids)}] expected to match sample_ids, got {tuple(value.shape)}")
        if value.device != ids.device:
            raise ValueError(f"draw: on {value.device}, sample_ids on {ids.device}")
        _check_range(value, "draw", 1 << 32)
        object.__setattr__(self, "draw", value.to(torch.int64).contiguous())

    def __len__(self):
        return len(self.sample_ids)

    def to(self, device):
        """Return the same stream on another device."""
        return Noise(self.seed, self.draw.to(device), self.sample_ids.to(device))

    def normal(self, shape):
        """Return standard normals, fp32 [B, *shape]: the noise of samples of that shape. Writes 4 bytes an element."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        flat = philox.normal(self.seed, self.draw, self.sample_ids, math.prod(shape))
        return flat.view(len(self), *shape)

    def words(self, n):
        """Return the first n raw words of each sample, int64 [B, n] in [0, 2^32)."""
        return philox.words(self.seed, self.draw, self.sample_ids, n)

    def uniform(self, n):
        """Return n uniforms a sample, fp32 [B, n] in (0, 1]: ((word >> 8) + 1) * 2^-24."""
        return ((self.words(n) >> 8) + 1).float() * 2.0**-24

    def randint(self, low, high):
        """Return one integer a sample, int64 [B] in [low, high): low + (word * (high - low) >> 32)."""
        if not 0 < high - low <= 1 << 31:
            raise ValueError(f"randint: low < high <= low + 2^31 expected, got low={low}, high={high}")
        return low + (self.words(1)[:, 0] * (high - low) >> 32)


def add_noise(x0, t, schedule, noise=None, *, generator=None):
    """Noise samples to timestep t.

        x_t = alpha_t * x0 + sigma_t * eps

    Shapes: x0, x_t and a noise tensor [B, ...], any strides; t int, [1], [B] or [B, 1, ...].
    Args:
        schedule: alpha-bar tensor, diffusers scheduler, or (alpha, sigma) pair: see `schedule.alpha_sigma`.
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
    _sample(x0, "x0")
    if noise is None:
        if generator is None:
            noise = torch.randn_like(x0)
        else:
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
    elif generator is not None:
        raise ValueError("generator: used only when noise is None")
    eps, seed, draws, ids = _split(noise, x0, "noise")
    alpha, sigma = _rows(t, schedule, x0, reference.compute_dtype(x0, eps))
    return _noise.add_noise(x0, eps, alpha, sigma, seed, draws, ids), eps


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
        target = eps | alpha eps - sigma x0 (v_prediction) | x0 (sample) | eps - x0 (flow)

    Shapes: pred, x0, x_t and a noise tensor [B, ...], any strides; t as in `add_noise`; L scalar.
    Args:
        noise: the tensor or `Noise` given to `add_noise`; may be None for "sample" with x0.
        x0, x_t: give one of them for every prediction type but "epsilon"; from x_t, x0 is (x_t - sigma eps) / alpha.
        weighting: w_b: "uniform" 1, "sigma2" sigma^2, "alpha_sigma2" alpha sigma^2, "inverse_snr_root" sigma / alpha, or a
            tensor [B].
        reduction: the denominator: "mean" the number of elements, "batch" B, "sum" 1.
    Returns: L, fp32 (float64 for float64 inputs). Differentiable in pred, x0, x_t and a noise tensor, not in w.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic; each gradient is rounded once, to its tensor's dtype. Zero residual gives exactly zero.
    Cost: forward reads pred; backward reads pred and writes its gradient; plus the tensors given. eps of a `Noise` costs
        nothing.
    Source: Ho et al. 2020, equation 14; Salimans and Ho 2022 (v).
    """
    _sample(pred, "pred")
    _choice(prediction_type, PREDICTION_TYPES, "prediction_type")
    y, from_x0 = None, x0 is not None
    if prediction_type != "epsilon":
        if (x0 is None) == (x_t is None):
            raise ValueError(f"x0, x_t: give one of them: the target of {prediction_type!r} is not a function of noise alone")
        y = x0 if from_x0 else x_t
        _matching(y, pred, "x0" if from_x0 else "x_t")
    if noise is None:
        if prediction_type != "sample" or not from_x0:
            raise ValueError(f"noise: required for prediction_type {prediction_type!r}")
        noise = x0.detach()  # its factor is zero
    eps, seed, draws, ids = _split(noise, pred, "noise")
    dtype = reference.compute_dtype(pred, y, eps)
    alpha, sigma = _rows(t, schedule, pred, dtype)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    # target = a * eps - q * y
    if prediction_type == "epsilon":
        a, q = one, zero
    elif prediction_type == "v_prediction":
        a, q = (alpha, sigma) if from_x0 else (alpha + sigma * sigma / alpha, sigma / alpha)
    elif prediction_type == "sample":
        a, q = (zero, -one) if from_x0 else (-sigma / alpha, -1 / alpha)
    else:
        a, q = (one, one) if from_x0 else (1 + sigma / alpha, 1 / alpha)
    k = _weights(weighting, alpha, sigma) / _denominator(reduction, pred)
    factors = torch.stack([one, q, a, k])
    return score.denoising_energy(_savable(pred), _savable(y), eps, factors, seed, draws, ids)


def sds_loss(
    x0, pred, ref, t, schedule, *, x_t=None, prediction_type="epsilon", weighting="uniform", reduction="batch",
    value="energy", return_grad=False,
):  # fmt: skip
    """Score distillation: inject a residual of scores as the gradient of x0, without a network's Jacobian.

        dL/dx0 = w_b * (eps_hat - ref) / denominator,     L = 1/2 * sum_b w_b * sum_i (eps_hat - ref)_bi^2 / denominator

    Shapes: x0, pred, x_t and a ref tensor [B, ...], any strides; t as in `add_noise`; L scalar.
    Args:
        pred: the teacher's (guided) prediction at x_t; no gradient flows into it. It is converted to eps_hat first.
        ref: what is subtracted: the noise itself, a tensor or `Noise` (SDS); another prediction of epsilon (VSD, CSD, DDS).
        x_t: required for every prediction type but "epsilon", whose conversion reads it.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        weighting: w_b, as in `denoising_loss`.
        reduction: the denominator: "batch" B, "mean" the number of elements, "sum" 1.
        value: what L reports; "energy" as above. The value is not what is minimised: the gradient is.
        return_grad: also return dL/dx0 (for an upstream gradient of 1).
    Returns: L, or (L, gradient in x0's dtype). L is fp32 (float64 for float64 inputs); the upstream gradient is honoured.
    Raises: ValueError naming the argument.
    Numerics: fp32 arithmetic, one rounding to x0's dtype, upstream gradient included: nothing is lost to x - (x - g).
    Cost: forward reads pred, backward reads pred and writes the gradient; plus the tensors given. eps of a `Noise` is
        regenerated, never stored. Tensors made under inference_mode are cloned, as autograd cannot save them.
    Source: Poole et al. 2022 (DreamFusion), equation 3.
    """
    _sample(x0, "x0")
    _matching(pred, x0, "pred")
    _choice(prediction_type, PREDICTION_TYPES, "prediction_type")
    _choice(value, VALUES, "value")
    y = None
    if prediction_type != "epsilon":
        if x_t is None:
            raise ValueError(f"x_t: required to convert a prediction of type {prediction_type!r} to epsilon")
        y = x_t.detach()
        _matching(y, x0, "x_t")
    eps, seed, draws, ids = _split(ref, x0, "ref")
    eps = None if eps is None else eps.detach()
    pred = pred.detach()
    alpha, sigma = _rows(t, schedule, x0, reference.compute_dtype(x0, pred, y, eps))
    one = torch.ones_like(alpha)
    # eps_hat = p * pred + q * x_t
    if prediction_type == "epsilon":
        p, q = one, torch.zeros_like(alpha)
    elif prediction_type == "v_prediction":
        norm = alpha * alpha + sigma * sigma
        p, q = alpha / norm, sigma / norm
    elif prediction_type == "sample":
        p, q = -alpha / sigma, 1 / sigma
    else:
        p, q = alpha / (alpha + sigma), 1 / (alpha + sigma)
    k = _weights(weighting, alpha, sigma) / _denominator(reduction, x0)
    factors = torch.stack([p, q, one, k])
    pred, y = _savable(pred), _savable(y)
    loss = score.sds_energy(x0, pred, y, eps, factors, seed, draws, ids)
    if not return_grad:
        return loss
    scale = torch.ones_like(loss.detach())
    layout = score.is_channels_last(x0)
    return loss, score.residual_gradient(pred, y, eps, factors, seed, draws, ids, scale, x0.dtype, layout)


def _rows(t, schedule, x, dtype):
    """alpha, sigma as [B] in the arithmetic's dtype."""
    like = x if dtype == x.dtype else x.new_empty((), dtype=dtype).expand(x.shape)
    factors = alpha_sigma(schedule, t, like)
    for v in factors:
        if v.numel() != v.shape[0]:
            raise ValueError(f"t: one timestep a sample expected, [B] or [B, 1, ...], got factors of shape {tuple(v.shape)}")
    return tuple(v.reshape(-1).expand(x.shape[0]).contiguous() for v in factors)


def _weights(weighting, alpha, sigma):
    if isinstance(weighting, torch.Tensor):
        if weighting.numel() not in (1, len(alpha)) or not weighting.is_floating_point():
            raise ValueError(
                f"weighting: a float tensor [{len(alpha)}] expected, got {weighting.dtype} {tuple(weighting.shape)}"
            )
        if weighting.device != alpha.device:
            raise ValueError(f"weighting: on {weighting.device}, the samples on {alpha.device}")
        return weighting.detach().to(alpha.dtype).reshape(-1).expand(len(alpha))
    _choice(weighting, WEIGHTINGS, "weighting")
    if weighting == "uniform":
        return torch.ones_like(alpha)
    if weighting == "sigma2":
        return sigma * sigma
    if weighting == "alpha_sigma2":
        return alpha * sigma * sigma
    return sigma / alpha


def _denominator(reduction, x):
    _choice(reduction, REDUCTIONS, "reduction")
    return {"batch": x.shape[0], "mean": x.numel(), "sum": 1}[reduction]


def _choice(value, allowed, name):
    if value not in allowed:
        raise ValueError(f"{name}: one of {', '.join(map(repr, allowed))} expected, got {value!r}")


def _sample(x, name):
    if not isinstance(x, torch.Tensor) or x.dtype not in launch.DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: a tensor of fp16, bf16, fp32 or fp64 expected, got {got}")
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"{name}: shape [B, ...] without empty axes expected, got {tuple(x.shape)}")


def _matching(v, x, name):
    _sample(v, name)
    if v.shape != x.shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)} expected, got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: on {v.device}, expected on {x.device}")


def _split(noise, x, name):
    """(eps, seed, draw, ids): a noise tensor, or the arguments of a stream."""
    if not isinstance(noise, Noise):
        if not isinstance(noise, torch.Tensor):
            raise ValueError(f"{name}: a tensor or a Noise expected, got {type(noise).__name__}")
        _matching(noise, x, name)
        return _savable(noise), 0, None, None
    if len(noise) != x.shape[0]:
        raise ValueError(f"{name}: {len(noise)} sample_ids for a batch of {x.shape[0]}")
    if noise.sample_ids.device != x.device:
        raise ValueError(f"{name}: stream on {noise.sample_ids.device}, samples on {x.device}; use noise.to({str(x.device)!r})")
    return None, noise.seed, _savable(noise.draw), _savable(noise.sample_ids)


def _savable(v):
    """Autograd refuses to save inference tensors: clone those, and only those."""
    if v is None or torch.compiler.is_compiling() or not v.is_inference() or torch.is_inference_mode_enabled():
        return v
    return v.clone()


def _integers(v, name):
    if v.is_floating_point() or v.is_complex() or v.dtype == torch.bool:
        raise ValueError(f"{name}: integers expected, got {v.dtype}")


def _check_range(v, name, high):
    """0 <= v < high, checked where it costs no synchronisation."""
    if v.device.type != "cpu" or torch.compiler.is_compiling() or v.numel() == 0:
        return
    low, top = (int(e) for e in torch.aminmax(v))
    if low < 0 or top >= high:
        raise ValueError(f"{name}: values in [0, {high}) expected, got {low}..{top}")
