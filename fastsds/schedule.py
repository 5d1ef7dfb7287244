"""Noise schedules: how much signal (alpha) and how much noise (sigma) a timestep leaves.

Everything is computed in fp32 (float64 for float64 samples) from alpha-bar itself. A schedule in half precision is
refused: bf16 alone would move alpha by up to 0.6 %, and half of all timesteps between 0 and 999.
"""

import math
import numbers

import torch

HALF = (torch.float16, torch.bfloat16)
EULER_FAMILY = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")  # diffusers' schedulers with x_t = x0 + sigma eps
SECOND_ORDER = ("KDPM2", "DPMSolverSDE")  # those whose tables put the sigma of one timestep beside another
# settings that give a timestep another sigma than alphas_cumprod does, or round the timestep of a sigma
OWN_SIGMAS = ("use_flow_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# diffusers' names of what a network predicts, and the short names in use beside them
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
ALIASES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow_prediction": "flow"}


def alpha_sigma(schedule, t, like):
    """Return the two factors of `x_t = alpha * x0 + sigma * eps`.

        alpha-bar tensor, DDPM, DDIM, ...    alpha = sqrt(abar[t]),  sigma = sqrt(1 - abar[t])
        Euler, Heun, LMS, ...                alpha = 1,              sigma = sqrt((1 - abar[t]) / abar[t])
        flow-matching scheduler              alpha = 1 - sigma,      sigma = t / num_train_timesteps
        "flow"                               alpha = 1 - t,          sigma = t

    Args:
        schedule: a 1-D alpha-bar tensor (also called `alphas_cumprod`), a diffusers scheduler (each by its own `add_noise`:
            give an Euler scheduler's `alphas_cumprod` for the variance-preserving form), "flow", or a pair `(alpha, sigma)`
            of numbers or tensors, which are taken as the values themselves (t is then not read). A scheduler that samples
            by sigmas of its own (`use_karras_sigmas`, `use_flow_sigmas`, ...) is refused.
        t: int, or integer tensor [1], [B], [B, 1, 1, 1] or with more leading axes such as [B, F]; a constant. Float
            timesteps are accepted by flow matching ("flow" takes nothing else), and by Euler's family, which interpolates
            sigma.
        like: the sample x0 [B, ...]; gives device, rank and arithmetic (float64 if it is float64, else fp32).

    Returns: (alpha, sigma), each broadcastable to `like`: t's own axes first, then ones.
    Raises: ValueError for a half-precision or differentiable schedule, for t of a wrong type, shape or range (the range
        is checked where it costs no synchronisation: on the CPU, outside torch.compile), or that requires a gradient.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(schedule, (tuple, list)):
        if len(schedule) != 2:
            raise ValueError(f"schedule: an (alpha, sigma) pair has 2 entries, this one has {len(schedule)}")
        return tuple(_pair_entry(v, name, like, dtype) for v, name in zip(schedule, ("alpha", "sigma")))

    table = schedule if isinstance(schedule, torch.Tensor) else getattr(schedule, "alphas_cumprod", None)
    if table is None:
        return _flow(schedule, t, like, dtype)
    if not isinstance(table, torch.Tensor):
        raise ValueError(f"schedule: alphas_cumprod must be a tensor, got {type(table).__name__}")
    _check_factor(table, "schedule", like)
    if table.ndim != 1:
        raise ValueError(f"schedule: expected a 1-D alpha-bar tensor, got shape {tuple(table.shape)}")
    for name in OWN_SIGMAS:
        if getattr(getattr(schedule, "config", None), name, False):
            raise ValueError(
                f"schedule: {type(schedule).__name__} has {name}: its sigmas are not those of its timesteps; give its "
                'alphas_cumprod, the pair (alpha, sigma), or for use_flow_sigmas "flow" with t = sigma'
            )
    t = _timesteps(t, like)
    table = table.to(like.device, dtype, non_blocking=True)
    if _is_a(schedule, EULER_FAMILY):
        return _euler(schedule, table, t, like)
    if t.is_floating_point():
        raise ValueError(f"t: an alpha-bar schedule is indexed by integers, got dtype {t.dtype}")
    _check_range(t, 0, len(table) - 1)
    abar = table[t.to(like.device, torch.int64, non_blocking=True)]
    return abar.sqrt(), (1 - abar).sqrt()


def prediction_type(name, argument="prediction_type"):
    """Return the full name of a prediction type; ValueError if it is none."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in PREDICTION_TYPES:
        known = ", ".join(map(repr, (*PREDICTION_TYPES, *ALIASES)))
        raise ValueError(f"{argument}: one of {known} expected, got {name!r}")
    return name


def conversion(source, target, alpha, sigma):
    """Return the factors (p, q) of `target = p * source + q * x_t`, for x_t = alpha x0 + sigma eps.

        v = (alpha eps - sigma x0) / n,   flow = eps - x0,   n^2 = alpha^2 + sigma^2      (n = 1 if variance is preserved)

    source, target: full names. alpha, sigma: tensors of one shape; p and q have it too.
    Source: Salimans and Ho 2022, appendix D (v); Lipman et al. 2023 (flow).
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if source == target:
        return one, zero
    if source == "epsilon":
        eps, x0 = (one, zero), (-sigma / alpha, 1 / alpha)
    elif source == "v_prediction":
        square = alpha * alpha + sigma * sigma
        n = square.sqrt()
        eps, x0 = (alpha / n, sigma / square), (-sigma / n, alpha / square)
    elif source == "sample":
        eps, x0 = (-alpha / sigma, 1 / sigma), (one, zero)
    else:
        total = alpha + sigma
        eps, x0 = (alpha / total, 1 / total), (-sigma / total, 1 / total)
    e, x = target_factors(target, alpha, sigma)
    return tuple(e * of_eps + x * of_x0 for of_eps, of_x0 in zip(eps, x0))


def target_factors(target, alpha, sigma):
    """Return the factors (e, x) of `target = e * eps + x * x0`: see `conversion`."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if target == "v_prediction":
        n = (alpha * alpha + sigma * sigma).sqrt()
        return alpha / n, -sigma / n
    return {"epsilon": (one, zero), "sample": (zero, one), "flow": (one, -one)}[target]


def log_snr(alphas_cumprod):
    """Return log(abar / (1 - abar)) for every timestep: float64 [T], from large (clean) to small (noise)."""
    abar = alphas_cumprod.double()
    return torch.log(abar) - torch.log1p(-abar)


def level_range(alphas_cumprod, first, last):
    """Return (low, high), the log SNR that the timesteps first .. last - 1 span; a level without signal counts as the lowest
    that has some."""
    level = log_snr(alphas_cumprod)
    finite = level[level.isfinite()]
    part = level[first:last].clamp(finite.min(), finite.max())
    return float(part.min()), float(part.max())


def timestep_range(alphas_cumprod, t=None, log_snr=None, shift=0.0):
    """Turn a range of noise levels into a half-open range of timesteps.

    Args:
        alphas_cumprod: [T].
        t: (lo, hi) as fractions of T, 0 <= lo < hi <= 1; or None.
        log_snr: (lo, hi); the timesteps with lo + shift <= log SNR <= hi + shift; or None. Give exactly one of the two.
        shift: added to both ends of `log_snr`. For a range found at h x w and used at H x W: -log(H W / (h w)).

    Returns: (first, last_exclusive), two ints.
    Raises: ValueError if the range is malformed or holds no timestep.
    """
    steps = len(alphas_cumprod)
    if (t is None) == (log_snr is None):
        raise ValueError("timestep_range: give either t=(lo, hi) or log_snr=(lo, hi)")
    low, high = t if log_snr is None else log_snr
    if log_snr is None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"t: fractions of T with 0 <= lo < hi <= 1 expected, got ({low}, {high})")
        if shift:
            raise ValueError("shift: applies to log_snr only")
        first, last = round(low * steps), round(high * steps)
        if first >= last:
            raise ValueError(f"t: ({low}, {high}) of {steps} timesteps holds none")
        return first, last
    if not low < high:
        raise ValueError(f"log_snr: lo < hi expected, got ({low}, {high})")
    level = globals()["log_snr"](alphas_cumprod)
    inside = ((level >= low + shift) & (level <= high + shift)).nonzero().flatten()
    if not len(inside):
        raise ValueError(
            f"log_snr: no timestep lies in [{low + shift:g}, {high + shift:g}]; "
            f"this schedule covers [{float(level.min()):g}, {float(level.max()):g}]"
        )
    return int(inside[0]), int(inside[-1]) + 1


def _timesteps(t, like):
    """t as a tensor with like's rank: leading axes match like's (or are 1), trailing axes are 1."""
    if not isinstance(t, torch.Tensor):
        if isinstance(t, bool) or not isinstance(t, numbers.Real):
            raise ValueError(f"t: an int, a float or a tensor expected, got {type(t).__name__}")
        integer = isinstance(t, numbers.Integral)
        return _filled(t, like.ndim, torch.int64 if integer else torch.float64)
    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"t: integers or floats expected, got {t.dtype}")
    _check_constant(t, "t", like)
    return _leading(t, "t", like)


def _filled(v, rank, dtype, device="cpu"):
    """A number as a tensor [1, 1, ...]. Added, because torch.full pins a float to its value in a compiled graph."""
    if not isinstance(v, (int, float)):  # NumPy's
        v = int(v) if isinstance(v, numbers.Integral) else float(v)
    return torch.zeros((1,) * rank, dtype=dtype, device=device) + v


def _leading(v, name, like):
    ok = v.ndim <= like.ndim and all(a == 1 or a == b for a, b in zip(v.shape, like.shape))
    if not ok:
        raise ValueError(f"{name}: shape {tuple(v.shape)} does not match the leading axes of the sample {tuple(like.shape)}")
    return v.reshape(*v.shape, *(1,) * (like.ndim - v.ndim))


def _check_constant(v, name, like):
    if v.requires_grad:
        raise ValueError(f"{name}: a constant here, but this tensor requires a gradient; detach it")
    if v.is_meta and not like.is_meta:
        raise ValueError(f"{name}: on meta, which has no values, and the samples on {like.device}")


def _check_factor(v, name, like):
    if v.dtype in HALF or not v.is_floating_point():
        raise ValueError(f"{name}: fp32 or fp64 expected, got {v.dtype} (half precision loses sigma near t = 0)")
    _check_constant(v, name, like)


def _pair_entry(v, name, like, dtype):
    if not isinstance(v, torch.Tensor):
        if isinstance(v, bool) or not isinstance(v, numbers.Real) or not -math.inf < v < math.inf:
            raise ValueError(f"{name} of the schedule's pair: a finite number or a tensor expected, got {v!r}")
        return _filled(v, like.ndim, dtype, like.device)
    _check_factor(v, name, like)
    return _leading(v, name, like).to(like.device, dtype, non_blocking=True)


def _is_a(scheduler, prefixes):
    """Whether its class, or one that it derives from, has a name that begins like that."""
    return any(base.__name__.startswith(prefixes) for base in type(scheduler).__mro__)


def _check_range(t, low, high):
    """low <= t <= high, checked where it costs no synchronisation."""
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        found = tuple(v.item() for v in torch.aminmax(t))
        if not (found[0] >= low and found[1] <= high):  # NaN fails
            raise ValueError(f"t: values in [{low}, {high}] expected, got {found[0]}..{found[1]}")


def _euler(scheduler, table, t, like):
    """alpha = 1; sigma at t, between two timesteps linearly: what these schedulers' own tables hold."""
    for name, usual in (("interpolation_type", "linear"), ("timestep_type", "discrete")):
        found = getattr(scheduler.config, name, usual)
        if found != usual:
            raise ValueError(f"schedule: {type(scheduler).__name__} has {name} {found!r}; give the pair (1.0, sigma) instead")
    if t.is_floating_point() and _is_a(scheduler, SECOND_ORDER):
        raise ValueError(f"t: {type(scheduler).__name__} interpolates in its own way; give the pair (1.0, sigma) instead")
    if t.dtype in HALF:
        raise ValueError(f"t: half precision moves timesteps (999 becomes 1000 in bf16), got {t.dtype}")
    _check_range(t, 0, len(table) - 1)
    sigmas = ((1 - table) / table).sqrt()
    t = t.to(like.device, table.dtype if t.is_floating_point() else torch.int64, non_blocking=True)
    low = t.long()
    high = (low + 1).clamp(max=len(table) - 1)
    sigma = sigmas[low]
    if t.is_floating_point():
        sigma = sigma + (t - low) * (sigmas[high] - sigma)
    return torch.ones_like(sigma), sigma


def _flow(schedule, t, like, dtype):
    """sigma = t / num_train_timesteps, a flow-matching scheduler's own relation between the two; or t itself."""
    by_sigma = isinstance(schedule, str) and schedule == "flow"
    if by_sigma:
        steps = 1
    else:
        steps = getattr(getattr(schedule, "config", None), "num_train_timesteps", None)
        if steps is None or not hasattr(schedule, "scale_noise"):
            raise ValueError(
                f"schedule: {type(schedule).__name__} has neither alphas_cumprod nor scale_noise over num_train_timesteps; "
                'give an alpha-bar tensor, a diffusers scheduler, "flow" or an (alpha, sigma) pair'
            )
        _check_tables(schedule, steps)
    t = _timesteps(t, like)
    if by_sigma and not t.is_floating_point():
        raise ValueError(f't: "flow" takes sigma itself, a float, got {t.dtype}; a flow-matching scheduler takes timesteps')
    if t.dtype in HALF:
        raise ValueError(f"t: half precision moves timesteps (999 becomes 1000 in bf16), got {t.dtype}")
    _check_range(t, 0, steps)
    sigma = t.to(like.device, dtype, non_blocking=True) / steps
    return 1 - sigma, sigma


def _check_tables(scheduler, steps):
    """A flow-matching scheduler's sigmas are its timesteps / steps, unless both were set by hand; as `_check_range`."""
    timesteps, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if torch.compiler.is_compiling() or not all(isinstance(v, torch.Tensor) and v.is_cpu for v in (timesteps, sigmas)):
        return
    n = min(len(timesteps), len(sigmas))
    if n and (timesteps[:n] - steps * sigmas[:n]).abs().max() > 1e-5 * steps:
        raise ValueError(
            f"schedule: {type(scheduler).__name__}'s sigmas are not its timesteps / {steps}: they were set by hand; "
            'give "flow" with t = sigma'
        )
