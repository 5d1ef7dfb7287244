"""Schedules: every form gives the same factors in fp32 or better, and ranges of noise levels become ranges of timesteps."""

import inspect
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from fastsds import ops, schedule, testing

ABAR = testing.alphas_cumprod()
LIKE = torch.zeros(3, 4, 8, 8)
T = torch.tensor([0, 500, 999])


def ddpm():
    return diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")


def test_factors():
    alpha, sigma = schedule.alpha_sigma(ABAR, T, LIKE)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1) and alpha.dtype == torch.float32
    abar = ABAR.double()[T]
    assert (alpha.flatten() - abar.sqrt()).abs().max() < 1e-7
    assert (sigma.flatten() - (1 - abar).sqrt()).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_arithmetic_follows_float64_and_never_half(dtype):
    alpha, sigma = schedule.alpha_sigma(ABAR, T, LIKE.to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert alpha.dtype == sigma.dtype == wide
    assert torch.equal(alpha.flatten(), ABAR.to(wide)[T].sqrt())


@pytest.mark.parametrize(
    "t, shape",
    (
        (500, (1, 1, 1, 1)),
        (torch.tensor(500), (1, 1, 1, 1)),
        (torch.tensor([500]), (1, 1, 1, 1)),
        (T, (3, 1, 1, 1)),
        (T.int(), (3, 1, 1, 1)),
        (T.view(3, 1), (3, 1, 1, 1)),
        (T.view(3, 1, 1, 1), (3, 1, 1, 1)),
        (T[:, None].expand(3, 4), (3, 4, 1, 1)),
    ),
)
def test_shapes_of_t(t, shape):
    """t is matched by leading axes, never broadcast from the right."""
    alpha, _ = schedule.alpha_sigma(ABAR, t, LIKE)
    assert alpha.shape == shape
    if shape != (3, 4, 1, 1):
        assert torch.equal(ops.add_noise(LIKE + 1, t, ABAR, LIKE)[0], (LIKE + 1) * alpha)


@pytest.mark.parametrize("kind", (diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.PNDMScheduler))
def test_diffusers_schedulers(kind):
    scheduler = kind(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, eps = torch.randn(2, 3, 4, 8, 8)
    expected = scheduler.add_noise(x, eps, T)
    torch.testing.assert_close(ops.add_noise(x, T, scheduler, eps)[0], expected, rtol=1e-6, atol=1e-6)
    by_table = ops.add_noise(x, T, scheduler.alphas_cumprod, eps)[0]
    assert torch.equal(ops.add_noise(x, T, scheduler, eps)[0], by_table)


def test_velocity_is_diffusers_velocity():
    """denoising_loss is zero, to rounding, at the scheduler's own target."""
    scheduler = ddpm()
    x, eps = torch.randn(2, 3, 4, 8, 8)
    v = scheduler.get_velocity(x, eps, T)
    assert ops.denoising_loss(v, eps, T, scheduler, x0=x, prediction_type="v_prediction") < 1e-12


def test_flow_matching_scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    x, eps = torch.randn(2, 3, 4, 8, 8)
    t = scheduler.timesteps[torch.tensor([10, 500, 990])]
    expected = scheduler.scale_noise(x, t, eps)
    torch.testing.assert_close(ops.add_noise(x, t, scheduler, eps)[0], expected, rtol=1e-6, atol=1e-6)
    alpha, sigma = schedule.alpha_sigma(scheduler, 250, x)
    assert float(alpha) == 0.75 and float(sigma) == 0.25


def test_pairs():
    x, eps = torch.randn(2, 3, 4, 8, 8)
    sigma = torch.tensor([0.5, 2.0, 80.0])
    variance_exploding = ops.add_noise(x, None, (1.0, sigma), eps)[0]
    testing.assert_close(variance_exploding, x + sigma.view(3, 1, 1, 1) * eps)
    factors = schedule.alpha_sigma(ABAR, T, x)
    assert torch.equal(ops.add_noise(x, None, factors, eps)[0], ops.add_noise(x, T, ABAR, eps)[0])


@pytest.mark.parametrize(
    "table, t, message",
    (
        (ABAR.bfloat16(), T, "half precision loses sigma"),
        (ABAR.half(), T, "half precision"),
        (ABAR[None], T, "1-D alpha-bar"),
        (ABAR.clone().requires_grad_(), T, "requires a gradient"),
        (ABAR, T.float(), "indexed by integers"),
        (ABAR, 500.0, "indexed by integers"),
        (ABAR, True, "t: an int, a float or a tensor"),
        (ABAR, "5", "t: an int, a float or a tensor"),
        (ABAR, T.cfloat(), "t: integers or floats expected, got torch.complex64"),
        (ABAR, T.to("meta"), "t: on meta, which has no values"),
        (ABAR.to("meta"), T, "schedule: on meta"),
        ("flow", T.bool(), "t: integers or floats expected, got torch.bool"),
        ("flow", torch.zeros(3).requires_grad_(), "t: a constant here"),
        (diffusers.EulerDiscreteScheduler(), torch.ones(3).requires_grad_(), "t: a constant here"),
        ("flow", torch.zeros(3, dtype=torch.int64), '"flow" takes sigma itself'),
        ("flow", 1, '"flow" takes sigma itself'),
        (("a", 1), T, "alpha of the schedule's pair: a finite number or a tensor expected, got 'a'"),
        ((1, math.inf), T, "sigma of the schedule's pair: a finite number"),
        ((torch.ones(3).requires_grad_(), 1), T, "alpha: a constant here"),
        (ABAR, -1, r"\[0, 999\] expected, got -1..-1"),
        (ABAR, torch.tensor([0, 1, 1000]), "got 0..1000"),
        (ABAR, T[:2], "leading axes"),
        ((1.0, 2.0, 3.0), T, "has 2 entries, this one has 3"),
        ((torch.ones(2), 1.0), T, "alpha: shape"),
        (ABAR.numpy(), T, "ndarray has neither"),
        (SimpleNamespace(alphas_cumprod=ABAR.numpy()), T, "alphas_cumprod must be a tensor, got ndarray"),
        (object(), T, "neither alphas_cumprod nor scale_noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), T.half(), "half precision moves timesteps"),
    ),
)
def test_errors(table, t, message):
    with pytest.raises(ValueError, match=message):
        schedule.alpha_sigma(table, t, LIKE)


def test_log_snr():
    level = schedule.log_snr(ABAR)
    assert level.dtype == torch.float64 and (level.diff() < 0).all()
    assert math.isclose(level[500].item(), math.log(float(ABAR[500]) / (1 - float(ABAR[500]))), rel_tol=1e-9)
    assert schedule.log_snr(torch.tensor([0.5, 0.0]))[1] == -math.inf


def test_timestep_range():
    assert schedule.timestep_range(ABAR, t=(0.6, 1.0)) == (600, 1000)
    assert schedule.timestep_range(ABAR, t=(0.02, 0.98)) == (20, 980)
    level = schedule.log_snr(ABAR)
    first, last = schedule.timestep_range(ABAR, log_snr=(-4.0, 0.0))
    inside = [i for i in range(1000) if -4 <= level[i] <= 0]
    assert (first, last) == (inside[0], inside[-1] + 1)
    # seen at 8x8, used at 16x16: SNR four times lower, so later timesteps
    shifted = schedule.timestep_range(ABAR, log_snr=(-2.0, 0.0), shift=-math.log(4))
    assert shifted == schedule.timestep_range(ABAR, log_snr=(-2.0 - math.log(4), -math.log(4)))
    assert shifted[0] > schedule.timestep_range(ABAR, log_snr=(-2.0, 0.0))[0]


@pytest.mark.parametrize(
    "options, message",
    (
        ({}, "give either"),
        ({"t": (0, 1), "log_snr": (0, 1)}, "give either"),
        ({"t": (0.5, 0.5)}, "lo < hi"),
        ({"t": (-0.1, 0.5)}, "lo < hi"),
        ({"t": (0.5, 1.1)}, "lo < hi"),
        ({"t": (0.5, 0.50001)}, "holds none"),
        ({"t": (0.5, 1.0), "shift": 1.0}, "shift"),
        ({"log_snr": (1.0, -1.0)}, "lo < hi"),
        ({"log_snr": (50.0, 60.0)}, "no timestep lies in"),
    ),
)
def test_timestep_range_errors(options, message):
    with pytest.raises(ValueError, match=message):
        schedule.timestep_range(ABAR, **options)


@pytest.mark.filterwarnings("ignore")  # the schedulers' own, of NumPy
@pytest.mark.parametrize("name", ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"))
def test_eulers_family_by_its_own_add_noise(name):
    """x_t = x0 + sigma eps, at integer timesteps and between them, as the scheduler's own tables have it."""
    settings = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    scheduler.set_timesteps(30)
    x, eps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = scheduler.timesteps[[2, 9, 20, 27]]
    alpha, sigma = schedule.alpha_sigma(scheduler, t, x)
    assert (alpha == 1).all()
    torch.testing.assert_close(x + sigma * eps, scheduler.add_noise(x, eps, t), rtol=1e-5, atol=1e-5)
    whole = schedule.alpha_sigma(scheduler, torch.tensor([500]), x)[1]
    exact = (((1 - ABAR.double()) / ABAR.double()) ** 0.5)[500:501]
    torch.testing.assert_close(whole.flatten().double(), exact, rtol=1e-5, atol=0)


SETTINGS = (
    *({name: True} for name in (*schedule.OWN_SIGMAS, "rescale_betas_zero_snr")),
    {"interpolation_type": "log_linear"},
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    {"shift": 3.0},
)
# no continuous x_t = alpha x0 + sigma eps of one tensor and its timesteps: tokens; a table that the caller brings
OTHER = ("AmusedScheduler", "BlockRefinementScheduler", "HeliosDMDScheduler", "RFD4ProteinaScheduler")


def noising_schedulers():
    """(class, settings) of every diffusers scheduler that adds noise, plain and with each setting it knows."""
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name)
        if not inspect.isclass(kind) or getattr(kind, "_backends", None) or name in OTHER:  # _backends: one not installed
            continue
        if hasattr(kind, "add_noise") or hasattr(kind, "scale_noise"):
            known = inspect.signature(kind.__init__).parameters
            for settings in ({}, *(s for s in SETTINGS if s.keys() <= known.keys())):
                yield pytest.param(kind, settings, id="-".join([name, *settings]))


def own_noise(scheduler, x, t, eps):
    if type(scheduler) is diffusers.RePaintScheduler:  # its own says: use DDPM's
        return diffusers.DDPMScheduler.add_noise(scheduler, x, eps, t)
    if type(scheduler) is diffusers.schedulers.FlowMatchHeunDiscreteScheduler:  # one timestep a call
        return scheduler.scale_noise(x, t[0], eps)
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x, eps, t)
    return scheduler.scale_noise(x, t, eps)


REFUSED = ("CMStochastic", "DDPMWuerstchen", "EDM", "KarrasVe", "KDPM2", "MiniMaxH3", "ScoreSdeVe")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, settings", list(noising_schedulers()))
def test_every_scheduler_of_diffusers_is_equalled_or_refused(kind, settings):
    scheduler = kind(**settings)
    scheduler.set_timesteps(20)
    x, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    refused = kind.__name__.startswith(REFUSED) or any(s in schedule.OWN_SIGMAS for s in settings)
    refused = refused or "interpolation_type" in settings or "timestep_type" in settings
    if kind.__name__.startswith("FlowMatch"):  # their timesteps are their sigmas, whichever these are
        refused = False
    n = len(scheduler.timesteps)
    for i in range(0, n - 1, max(1, n // 10)):
        scheduler._step_index = None
        t = scheduler.timesteps[i : i + 1].expand(3)
        if refused:
            with pytest.raises(ValueError, match="schedule: .* give|t: .* give"):
                ops.add_noise(x, t, scheduler, eps)
        else:
            expected = own_noise(scheduler, x, t, eps)
            torch.testing.assert_close(ops.add_noise(x, t, scheduler, eps)[0], expected, rtol=1e-5, atol=1e-5)


def test_tables_set_by_hand_are_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 100.0])  # shifts the sigmas, not the timesteps
    with pytest.raises(ValueError, match="sigmas are not its timesteps / 1000"):
        ops.add_noise(LIKE, 500, scheduler)


def test_numpy_numbers():
    for t in (np.int64(500), np.int32(500)):
        assert torch.equal(schedule.alpha_sigma(ABAR, t, LIKE)[0], schedule.alpha_sigma(ABAR, 500, LIKE)[0])
    pair = schedule.alpha_sigma((np.float32(0.5), np.int64(2)), None, LIKE)
    assert [float(v) for v in pair] == [0.5, 2.0]
    assert float(schedule.alpha_sigma("flow", np.float64(0.25), LIKE)[1]) == 0.25


def test_flow_by_sigma():
    sigma = torch.tensor([0.0, 0.25, 1.0])
    alpha, found = schedule.alpha_sigma("flow", sigma, torch.zeros(3, 4, 5))
    assert torch.equal(found.flatten(), sigma) and torch.equal(alpha.flatten(), 1 - sigma)
    with pytest.raises(ValueError, match=r"t: values in \[0, 1\] expected"):
        schedule.alpha_sigma("flow", torch.tensor([500.0]), torch.zeros(1, 4))


@pytest.mark.parametrize("levels", ((0.6, 0.8), (1.0, 3.0), (0.25, 0.75)), ids=("preserving", "exploding", "flow"))
@pytest.mark.parametrize("source", schedule.PREDICTION_TYPES)
@pytest.mark.parametrize("target", schedule.PREDICTION_TYPES)
def test_convert(source, target, levels):
    """Every prediction of the same x0 and eps converts to every other, differentiably."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, sigma = levels
    x_t, n = alpha * x0 + sigma * eps, (alpha**2 + sigma**2) ** 0.5
    known = {"epsilon": eps, "sample": x0, "v_prediction": (alpha * eps - sigma * x0) / n, "flow": eps - x0}
    found = ops.convert(known[source], x_t, 0, levels, source=source, target=target)
    torch.testing.assert_close(found, known[target], rtol=1e-12, atol=1e-12)
    leaves = (known[source][:1, :1, :2, :2].clone().requires_grad_(), x_t[:1, :1, :2, :2].clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda p, x: ops.convert(p, x, 0, levels, source=source, target=target), leaves)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # one rounding
        low = [v.to(dtype) for v in (known[source], x_t)]
        exact = ops.convert(*(v.double() for v in low), 0, levels, source=source, target=target)
        found = ops.convert(*low, 0, levels, source=source, target=target)
        assert found.dtype == dtype
        terms = exact.abs() + 4 * low[0].double().abs() + 8
        assert ((found.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * terms).all()


@pytest.mark.parametrize("zero_snr", (False, True))
def test_convert_is_diffusers_velocity(zero_snr):
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=zero_snr)
    x0, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999 - (not zero_snr)])
    x_t = scheduler.add_noise(x0, eps, t)
    v = scheduler.get_velocity(x0, eps, t)
    for target, expected in (("epsilon", eps), ("x0", x0)):
        found = ops.convert(v, x_t, t, scheduler, source="v_prediction", target=target)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
