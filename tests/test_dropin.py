"""The ops in other people's programs (programs.py), against the programs themselves; against installed peers; and the traps.

A program runs twice on a tiny UNet, from one seed. The network's predictions are recorded on the first run and replayed on
the others, rounded to that run's dtype: what is compared is the arithmetic around the network, on identical predictions,
never the network's own rounding. Compared are the loss, the gradient of x0, of every prediction and of the text, and what
the network was shown (x_t).
"""

import ast
import inspect
import re
import textwrap
from types import SimpleNamespace
from unittest import mock

import diffusers
import pytest
import torch
from programs import IMAGE, PROGRAMS, VIDEO, Dummy, guided, rows

from fastsds import ops, testing

WIDTH = 8
T = torch.tensor([35, 480, 910])
HALF = (torch.float16, torch.bfloat16)


def tiny_unet(seed):
    """13,604 random parameters in diffusers' own class; a prediction of order one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=IMAGE[-1],
            in_channels=IMAGE[1],
            out_channels=IMAGE[1],
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(4, 8),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
        )
    with torch.no_grad():
        unet.conv_out.weight.mul_(3.0)
    return unet.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unets():
    return tiny_unet(0), tiny_unet(1)


def evaluate(unet, x, t, text):
    """The network on images, or on the frames of a video with a timestep each; t may be [1]."""
    if x.ndim == 5:
        return evaluate(unet, x.flatten(0, 1), t.flatten(), text.repeat_interleave(x.shape[1], 0)).view_as(x)
    return unet(x, t.flatten(), text).sample


def ddim(dtype=torch.float32, device="cpu"):
    scheduler = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device, dtype)
    return scheduler


def normals(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function, shape, unets, dtype, like=None, base=None, device="cpu"):
    """Run one side in `dtype`, from inputs rounded to `base`.

    like: an earlier run, whose predictions are replayed; its noise is, too, where the dtype differs (the global stream
        gives other numbers there).
    Returns: named results, and the run to give as `like`.
    """
    shown, predictions, noises = [], [], []

    def network(unet):
        """float64 inside, so that its Jacobian, where gradients pass through it, is the same in every run."""

        def call(x, t, text):
            live = evaluate(unet, x.double(), t, text)
            pred = like.predictions[len(predictions)] if like else live.detach()
            pred = pred.to(x.dtype, copy=True)
            if live.requires_grad:  # the recorded value, the network's own Jacobian
                pred = pred + (live - live.detach()).to(x.dtype)
                pred.retain_grad()
            predictions.append(pred)
            shown.append(x.detach())
            return pred

        return call

    randn_like = torch.randn_like

    def noise_like(x):
        replay = like is not None and like.dtype != dtype
        noises.append(like.noises[len(noises)].to(x.dtype) if replay else randn_like(x))
        return noises[-1]

    def tensor(seed):
        return normals(*shape, seed=seed).to(base or dtype).to(device, dtype)

    wide = torch.promote_types(dtype, torch.float32)
    text = normals(2 * IMAGE[0], 5, WIDTH, seed=5).to(device, torch.float64).requires_grad_()
    frames = torch.tensor([[35.0, 481.25, 910.0], [20.0, 500.0, 980.0]]).to(device, wide)
    s = SimpleNamespace(
        unet=network(unets[0]),
        adapter=network(unets[1]),
        t=T.to(device),
        text=text,
        uncond=text[: shape[0]],
        cond=text[IMAGE[0] :][: shape[0]],
        scheduler=ddim(wide, device),
        source=tensor(2),
        noise=tensor(3),
        weight=rows(torch.tensor([0.25, 1.0, 3.0])).to(device, dtype),
        frames=frames,
        sigma=frames / 1000,
        flow=diffusers.FlowMatchEulerDiscreteScheduler(1000),
        mask=(normals(*shape, seed=4) > 0).to(device),
    )
    x0 = tensor(1).requires_grad_()
    torch.manual_seed(0)
    with mock.patch.object(torch, "randn_like", noise_like):
        loss = function(x0, s)
    (0.7 * loss).backward()
    results = {"loss": loss.detach(), "dx0": x0.grad}
    for i, (x, pred) in enumerate(zip(shown, predictions)):
        results[f"x_t {i}"] = x
        if pred.requires_grad:
            results[f"dprediction {i}"] = pred.grad
    if text.grad is not None:
        results["dtext"] = text.grad
    return results, SimpleNamespace(dtype=dtype, predictions=[v.detach() for v in predictions], noises=noises)


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300)).item()


def names(case, results):
    return [name for name in results if case.value or name != "loss"]


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype, limit", ((torch.float32, 1e-6), (torch.float64, 1e-12)))
@pytest.mark.parametrize("name", PROGRAMS)
def test_same_loss_and_gradients(name, dtype, limit, device, unets):
    case = PROGRAMS[name]
    unets = [unet.to(device) for unet in unets]
    before, first = run(case.before, case.shape, unets, dtype, device=device)
    after, _ = run(case.after, case.shape, unets, dtype, like=first, device=device)
    assert before.keys() == after.keys() and before["dx0"].any()
    assert after["dx0"].dtype == dtype
    for key in names(case, before):
        assert after[key].shape == before[key].shape
        assert relative(after[key], before[key]) <= limit, f"{key}: {relative(after[key], before[key]):.2g}"


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PROGRAMS)
def test_twice_eager_in_half_precision(name, dtype, device, unets):
    """Against the program itself in float64. The table's atol says nothing of a gradient divided by the number of elements:
    beside it, half an ulp of the largest element."""
    case = PROGRAMS[name]
    unets = [unet.to(device) for unet in unets]
    eager, first = run(case.before, case.shape, unets, dtype, device=device)
    ours, _ = run(case.after, case.shape, unets, dtype, like=first, device=device)
    oracle, _ = run(case.before, case.shape, unets, torch.float64, like=first, base=dtype, device=device)
    for key in names(case, oracle):
        testing.assert_twice_eager(ours[key], eager[key], oracle[key], dtype, key)
        limit = 2 * relative(eager[key], oracle[key]) + torch.finfo(dtype).eps / 2
        assert relative(ours[key], oracle[key]) <= limit, f"{key}: {relative(ours[key], oracle[key]):.2g}, limit {limit:.2g}"


def statements(function):
    """A function's statements as text, nested ones by themselves."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            found += [ast.unparse(item) for item in node.items]
        elif isinstance(node, ast.stmt) and node is not tree:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_or_two_statements_change(name):
    case = PROGRAMS[name]
    new = [line for line in statements(case.after) if line not in statements(case.before)]
    assert 1 <= len(new) <= 2 and all("ops." in line for line in new), new


# traps


def case_of(shape=IMAGE, dtype=torch.float32):
    """x0, two predictions and the noise, outside any program."""
    return [normals(*shape, seed=seed).to(dtype) for seed in (1, 2, 3, 4)]


def gradient(loss, x0, scale=1.0):
    """The gradient of scale * loss(x0)."""
    x0 = x0.clone().requires_grad_()
    (scale * loss(x0)).backward()
    return x0.grad


@pytest.mark.parametrize("shape", ((), (1,), (3,), (3, 1, 1, 1)))
def test_any_shape_of_t(shape):
    """An int, [1] for the batch, [B] and [B, 1, 1, 1] say the same."""
    x, pred, _, noise = case_of()
    t = torch.full(shape, 480) if shape else 480
    x_t = ops.add_noise(x, t, ddim(), noise)[0]
    grad = gradient(lambda x0: ops.sds_loss(x0, pred, noise, t, ddim(), weighting="sigma2", value="target"), x)
    abar = ddim().alphas_cumprod[480]
    assert relative(x_t, ddim().add_noise(x, noise, torch.tensor([480]))) <= 1e-6
    assert relative(grad, (1 - abar) * (pred - noise) / 3) <= 1e-6


def test_weights_follow_samples_not_the_last_axis():
    """A weight [B] on [B, B, B, B] would broadcast from the right without a word."""
    x, pred, _, noise = case_of((4, 4, 4, 4))
    w, t = torch.tensor([0.25, 1.0, 2.0, 4.0]), torch.tensor([100, 300, 500, 700])
    grad = gradient(lambda x0: ops.sds_loss(x0, pred, noise, t, ddim(), weighting=w, reduction="sum"), x)
    assert torch.equal(grad, rows(w) * (pred - noise))
    grad = gradient(lambda x0: ops.dmd_loss(x0, pred, noise, scale=w, norm=None, reduction="sum"), x)
    assert torch.equal(grad, rows(w) * (noise - pred))
    x_t = ops.add_noise(x, t, ddim(), noise)[0]
    for i in range(4):
        assert torch.equal(x_t[i : i + 1], ops.add_noise(x[i : i + 1], t[i : i + 1], ddim(), noise[i : i + 1])[0])


def test_three_spellings_of_guidance():
    """c + s (c - u) is the first form at s + 1; c + (s - 1)(c - u) is it at s; swapped halves need the other order."""
    _, cond, uncond, _ = case_of()
    expected = uncond.double() + 7.5 * (cond.double() - uncond.double())
    pair, stacked = (uncond, cond), torch.cat([cond, uncond])
    for pred, scale, order, form in (
        (pair, 7.5, "uncond_first", "uncond"),
        (pair, 6.5, "uncond_first", "cond"),
        (pair, 7.5, "uncond_first", "cond_minus_one"),
        (stacked, 7.5, "cond_first", "uncond"),
        (stacked, 6.5, "cond_first", "cond"),
    ):
        assert relative(ops.guide(pred, scale, order, form), expected) <= 1e-6
    assert relative(ops.guide(stacked, 7.5), expected) > 0.1


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_timesteps_are_refused(dtype):
    """`t.to(bfloat16)` changes 494 of 1,000 timesteps: none gets through unnoticed, in any kind of schedule."""
    x, pred, _, noise = case_of()
    changed = (torch.arange(1000).to(dtype).long() != torch.arange(1000)).sum()
    assert changed == (494 if dtype == torch.bfloat16 else 0)
    for schedule in (ddim(), diffusers.EulerDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(), "flow"):
        with pytest.raises(ValueError, match="^t: "):
            ops.add_noise(x, T.to(dtype), schedule, noise)
        with pytest.raises(ValueError, match="^t: "):
            ops.sds_loss(x, pred, noise, T.to(dtype), schedule)


LOSSES = {
    "sds": lambda x0, pred, ref: ops.sds_loss(x0, pred, ref, T, ddim(), weighting="sigma2"),
    "dmd": ops.dmd_loss,
    "inject": lambda x0, pred, ref: ops.inject_grad(x0, pred - ref, reduction="batch"),
    "inject at x_t": lambda x0, pred, ref: ops.inject_grad(ops.add_noise(x0, T, ddim(), ref)[0], pred),
    "sid": ops.sid_loss,
    "denoising": lambda x0, pred, ref: ops.denoising_loss(x0 * pred, ref, T, ddim()),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_scaling_is_honoured(loss):
    """Weights, accumulation and GradScaler act on the upstream gradient. A function that drops it, as one in use does, turns
    half of a loss under a scale of 1024 into 1/1024 of it once unscaled."""
    x, pred, ref, _ = case_of()
    base = gradient(lambda x0: loss(x0, pred, ref), x)

    class Drops(Dummy):
        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0], None

    for function, factor in ((lambda x0: loss(x0, pred, ref), 0.5), (lambda x0: Drops.apply(x0, base), 1 / 1024)):
        x0 = torch.nn.Parameter(x.clone())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD([x0], lr=1.0)
        scaler.scale(0.5 * function(x0)).backward()
        scaler.unscale_(optimizer)
        assert torch.equal(x0.grad, factor * base)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("clip", (None, 0.5))
@pytest.mark.parametrize("policy", ("clamp", "zero", "drop_sample"))
def test_sanitising(policy, clip, dtype):
    """nan_to_num, with the infinities to the largest number (most programs) or to 0 (DDS), before or after a clamp; a whole
    sample dropped (SiD). What is not finite reaches neither the gradient nor, with the infinities at 0, the value."""
    x, pred, _, noise = case_of(dtype=dtype)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        pred[0, 0, i, i] = value
    w = rows(1 - ddim().alphas_cumprod[T])
    g = w * (pred - noise)
    top = torch.finfo(dtype).max
    g = {
        "clamp": lambda: torch.nan_to_num(g, 0.0, top, -top),
        "zero": lambda: torch.nan_to_num(g, 0.0, 0.0, 0.0),
        "drop_sample": lambda: torch.where(rows(g.isfinite().flatten(1).all(1)), g, 0.0),
    }[policy]()
    g = g if clip is None else g.clamp(-clip, clip)
    options = {"weighting": "sigma2", "nonfinite": policy, "clip": clip, "reduction": "sum"}
    grad = gradient(lambda x0: ops.sds_loss(x0, pred, noise, T, ddim(), **options), x)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), g.double(), rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)
    if policy != "clamp":
        for value in ops.VALUES:
            assert ops.sds_loss(x, pred, noise, T, ddim(), value=value, **options).isfinite()


@pytest.mark.parametrize("policy", ("clamp", "zero"))
@pytest.mark.parametrize("broken", ("real", "fake"))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_sanitising_of_dmd(policy, broken, value):
    """nan_to_num after the norm: one bad number of x0_real takes its whole sample with it, one of x0_fake only itself."""
    x, real, fake, _ = case_of()
    {"real": real, "fake": fake}[broken][1, 2, 3, 4] = value
    g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    g = torch.nan_to_num(g, 0.0, *((None, None) if policy == "clamp" else (0.0, 0.0)))
    grad = gradient(lambda x0: ops.dmd_loss(x0, real, fake, nonfinite=policy, reduction="sum"), x)
    assert (grad[1] != 0).sum() == {"real": 0, "fake": grad[1].numel() - (value != torch.inf or policy == "zero")}[broken]
    torch.testing.assert_close(grad, g, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_predictions_made_under_inference_mode(dtype):
    """Latents that train, fp32 or float64; everything else an inference tensor, which autograd refuses to save."""
    x, *_ = case_of(dtype=dtype)
    with torch.inference_mode():
        noise, pred, other = (normals(*IMAGE, seed=seed) for seed in (4, 2, 3))
        x_t, same = ops.add_noise(x, T, ddim(torch.float64), noise)
        assert same is noise and pred.is_inference()
    abar = rows(ddim(torch.float64).alphas_cumprod[T])
    eps = abar.sqrt() * pred.double() + (1 - abar).sqrt() * x_t.double()
    norm = (x.double() - pred).abs().mean((1, 2, 3), keepdim=True)
    schedule, kinds = ddim(torch.float64), {"prediction_type": "v_prediction", "x_t": x_t}
    for loss, expected in (
        (lambda x0: ops.sds_loss(x0, pred, noise, T, schedule, reduction="sum", **kinds), eps - noise),
        (lambda x0: ops.dmd_loss(x0, pred, other, reduction="sum"), (other.double() - pred) / norm),
        (lambda x0: ops.inject_grad(x0, pred), pred),
        (lambda x0: ops.sid_loss(x0, pred, other), (other.double() - pred) / norm),
    ):
        grad = gradient(loss, x)
        assert grad.dtype == dtype
        assert relative(grad, expected) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_predictions_beside_fp32_latents(dtype):
    """Predictions go in as the network gave them: the casts to fp32 fall away, the gradient stays fp32."""
    x, uncond, cond, noise = case_of()
    pred = torch.cat([uncond, cond]).to(dtype)
    expected = rows(1 - ddim().alphas_cumprod[T]) * (guided(pred.float(), 100.0) - noise)
    options = {"guidance_scale": 100.0, "weighting": "sigma2", "reduction": "sum"}
    grad = gradient(lambda x0: ops.sds_loss(x0, pred, noise, T, ddim(), **options), x)
    assert grad.dtype == torch.float32 and relative(grad, expected) <= 1e-6


def test_values_differ_where_gradients_do_not():
    """A loss value says how it was written, not how well the run goes; one of them is below zero."""
    x, pred, _, noise = case_of()
    losses = {v: ops.sds_loss(x, pred, noise, T, ddim(), weighting="sigma2", value=v, return_grad=True) for v in ops.VALUES}
    values = [loss.item() for loss, _ in losses.values()]
    assert len(set(values)) == 3 and ops.sds_loss(-pred, pred, 0 * noise, T, ddim(), value="dot") < 0
    for _, grad in losses.values():
        assert torch.equal(grad, losses["energy"][1])


def test_a_swapped_call_draws_what_the_program_drew():
    """The default noise is the global stream's: a run keeps its random numbers, before, at and after the call."""
    x = case_of()[0]
    drawn = []
    for add_noise in (lambda: (torch.randn_like(x), 0)[0], lambda: ops.add_noise(x, T, ddim())[1]):
        torch.manual_seed(7)
        drawn.append((torch.rand(3), add_noise(), torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*drawn))


# installed peers

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PEERS = {
    "DDPM": lambda: diffusers.DDPMScheduler(**SD),
    "DDIM": lambda: diffusers.DDIMScheduler(**SD),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
    "EulerAncestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(**SD),
    "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(1000),
    "FlowMatchEuler shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=3.0),
}


def peer(name, steps=None):
    """The scheduler, and every timestep it knows."""
    scheduler = PEERS[name]()
    if name in ("DDPM", "DDIM"):
        return scheduler, torch.arange(1000)
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps


def noised(scheduler, x, noise, t):
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, t, noise)
    return scheduler.add_noise(x, noise, t)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("steps", (None, 50))
def test_add_noise_of_diffusers(name, steps):
    """Every timestep of training and of a sampler of 50 steps; each row in units of its own largest element."""
    scheduler, t = peer(name, steps)
    x, noise = (normals(len(t), 32, seed=seed) for seed in (1, 2))
    theirs = noised(scheduler, x, noise, t)
    ours, same = ops.add_noise(x, t, scheduler, noise)
    assert same is noise
    assert ((ours - theirs).abs().amax(1) <= 1e-6 * theirs.abs().amax(1)).all()


def test_scale_noise_with_a_timestep_a_frame():
    scheduler = PEERS["FlowMatchEuler shifted"]()
    t = scheduler.timesteps[torch.tensor([[10, 500, 990], [0, 250, 999]])]
    x, noise = (normals(*VIDEO, seed=seed) for seed in (1, 2))
    theirs = scheduler.scale_noise(x.flatten(0, 1), t.flatten(), noise.flatten(0, 1)).view(VIDEO)
    assert relative(ops.add_noise(x, t, scheduler, noise)[0], theirs) <= 1e-6
    assert relative(ops.add_noise(x, t / 1000, "flow", noise)[0], theirs) <= 1e-6


@pytest.mark.parametrize("name", ("DDPM", "DDIM"))
def test_get_velocity_of_diffusers(name):
    """The target of denoising_loss, read off its gradient at pred = 0; and what `convert` makes of the noise."""
    scheduler, t = peer(name)
    x, noise = (normals(len(t), 32, seed=seed) for seed in (1, 2))
    theirs = scheduler.get_velocity(x, noise, t)
    zero = torch.zeros_like(x)
    kind = {"x0": x, "prediction_type": "v_prediction", "reduction": "sum"}
    ours = gradient(lambda pred: ops.denoising_loss(pred, noise, t, scheduler, **kind), zero) / -2
    assert relative(ours, theirs) <= 1e-6
    x, noise, t = x.double(), noise.double(), t[:, None]
    x_t = ops.add_noise(x, t, ddim(torch.float64), noise)[0]
    converted = ops.convert(noise, x_t, t, ddim(torch.float64), source="epsilon", target="v_prediction")
    assert relative(converted, theirs) <= 1e-6


# how far diffusers' alpha and sigma are from float64 at the worst timestep, relative: fp16, bf16
HALF_PRECISION_SCHEDULES = {
    "DDPM": {"alpha": (6.2e-4, 5.7e-3), "sigma": (7.3e-2, 1.0)},  # sigma(1) in fp16; sigma(0) = 0 in bf16
    "DDIM": {"alpha": (6.2e-4, 5.7e-3), "sigma": (7.3e-2, 1.0)},
    "FlowMatchEuler": {"alpha": (2.3e-2, 1.0), "sigma": (4.6e-4, 3.8e-3)},  # alpha(999) = 0 in bf16
}


@pytest.mark.parametrize("name", HALF_PRECISION_SCHEDULES)
@pytest.mark.parametrize("factor", ("alpha", "sigma"))
def test_half_precision_schedules(name, factor):
    """diffusers rounds its table before the roots and 1 - sigma; here both are fp32 and x_t is rounded once: half an ulp.
    So equality with diffusers is not bitwise in half precision."""
    scheduler, t = peer(name)
    inside = t < 1000  # where alpha is not zero
    for dtype, stated in zip(HALF, HALF_PRECISION_SCHEDULES[name][factor]):

        def worst(values):
            exact = factors(torch.float64)[inside]
            return ((values.double() - exact).abs() / exact).max().item()

        def factors(dtype, ours=True):
            x, noise = (torch.full((len(t), 1), v, dtype=dtype) for v in ((1, 0) if factor == "alpha" else (0, 1)))
            return (ops.add_noise(x, t, scheduler, noise)[0] if ours else noised(scheduler, x, noise, t)).flatten()

        theirs, ours = worst(factors(dtype, ours=False)[inside]), worst(factors(dtype)[inside])
        assert theirs == pytest.approx(stated, rel=0.02)
        assert ours <= torch.finfo(dtype).eps / 2 and ours <= theirs


# the page


def page(root):
    """(what it is, code, line) of every fenced block of docs/dropin.md: "" shared lines, "before", "after"."""
    text = (root / "docs" / "dropin.md").read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python ?(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(block[1], block[2], text[: block.start()].count("\n") + 1) for block in blocks]


def test_the_page_runs_and_both_sides_agree(root):
    """Its blocks in order, on the tiny UNet in fp32; before and after on the same names, each on a copy of them."""
    unet, critic = (tiny_unet(seed).float() for seed in (0, 1))
    text = normals(2 * IMAGE[0], 5, WIDTH, seed=5)
    x0 = normals(*IMAGE, seed=1).requires_grad_()
    with torch.inference_mode():
        source = normals(2 * IMAGE[0], *IMAGE[1:], seed=6)
    names = {
        "torch": torch, "F": torch.nn.functional, "unet": unet, "critic": critic, "scheduler": ddim(), "x0": x0, "t": T,
        "text": text, "cond_text": text[IMAGE[0] :], "source": source, "phi": normals(*IMAGE, seed=7), "step": 3,
        "ids": [10, 20, 30],
    }  # fmt: skip

    def results(code, line):
        torch.manual_seed(0)
        local = dict(names)
        exec(compile("\n" * line + code, "docs/dropin.md", "exec"), local)
        if "loss" not in code:
            return local["noise"], local["x_t"].detach()
        return local["loss"].detach(), torch.autograd.grad(local["loss"], x0, retain_graph=True)[0]

    pairs, waiting = 0, None
    for kind, code, line in page(root):
        assert kind in ("", "before", "after")
        if kind == "":
            exec(compile("\n" * line + code, "docs/dropin.md", "exec"), names)
            continue
        assert code.count("\n") <= 5, f"docs/dropin.md:{line}: more than five lines"
        if kind == "before":
            assert waiting is None and "ops." not in code
            waiting = results(code, line)
            continue
        for ours, theirs in zip(results(code, line), waiting, strict=True):
            assert theirs.any() and relative(ours, theirs) <= 1e-6, f"docs/dropin.md:{line}"
        pairs, waiting = pairs + 1, None
    assert pairs == 8 and waiting is None
    assert torch.autograd.grad(names["loss"], x0)[0].any()
    noise = names["stream"].normal(IMAGE[1:])
    assert relative(names["seeded"], ddim().add_noise(x0.detach(), noise, T)) <= 1e-6


def test_the_page_names_real_keywords(root):
    text = (root / "docs" / "dropin.md").read_text(encoding="utf-8")
    allowed = {
        "order": ops.ORDERS, "form": ops.FORMS, "weighting": ops.WEIGHTINGS, "reduction": ops.REDUCTIONS,
        "value": ops.VALUES, "nonfinite": ops.NONFINITE, "norm": ops.NORMS, "ref_prediction_type": ops.PREDICTION_TYPES,
    }  # fmt: skip
    found = re.findall(r'\b(\w+)="(\w+)"', text)
    assert len(found) > 80
    for name, value in found:
        assert value in allowed[name], f"{name}={value!r}"
