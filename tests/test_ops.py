"""The ops as torch ops: compiled without a graph break, each on the path it promises, and every kernel really launched."""

import re

import pytest
import torch

from fastsds import ops, testing
from fastsds.kernels import launch

ABAR = testing.alphas_cumprod()
KERNELS = ("philox", "noise", "score", "inject", "sid", "norm", "attention", "token_distill", "ops")
KERNEL_TESTS = [f"test_{name}.py" for name in KERNELS]


def step(x0, pred, ids, t, abar, w):
    """A whole use of the ops: stream, noise, every loss. Returns what a caller keeps."""
    noise = ops.Noise(3, ops.draw(ops.Purpose.NOISE, 5), ids)
    x_t, _ = ops.add_noise(x0, t, abar, noise)
    loss = ops.sds_loss(x0, pred, noise, t, abar, weighting="inverse_snr_root", reduction="mean")
    loss = loss + ops.denoising_loss(x_t * pred, noise, t, abar, weighting=w)
    v = ops.convert(ops.guide((pred, x0), 3.0), x_t, t, abar, source="epsilon", target="v_prediction")
    how = dict(x_t=x_t, prediction_type="v", weighting="x0_error", clip=0.5, nonfinite="drop_sample", value="dot")
    loss = loss + 1e-2 * ops.sds_loss(x0, (v, pred), pred, t, abar, guidance_scale=2.0, **how)
    loss = loss + ops.dmd_loss(x0, v, pred, mask=w > 1) + ops.sid_loss(x0, v, pred, reduction="mean")
    loss = loss + ops.inject_grad(pred, v.detach(), reduction="mean")
    return loss + noise.uniform(2).sum() * 0, x_t, noise.randint(0, 10)


def inputs():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    pred = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    return x0, pred, torch.tensor([5, 2**40]), torch.tensor([300, 900]), ABAR, torch.tensor([0.5, 2.0])


def results(function):
    arguments = inputs()
    loss, x_t, k = function(*arguments)
    (0.3 * loss).backward()
    return loss.detach(), x_t.detach(), k, arguments[0].grad, arguments[1].grad


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(results(compiled), results(step)):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_compiles_with_a_timestep_a_frame_and_sizes_unknown():
    def loss(x, pred, t, keep):
        noise = ops.Noise(3, 5, [7, 8])
        loss = ops.sds_loss(x, pred, noise, t, ABAR, weighting=lambda alpha, sigma: sigma)
        return loss + ops.dmd_loss(x, pred, 2 * x, mask=keep)

    torch._dynamo.reset()
    x, pred = torch.randn(2, 2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[0, 500, 999], [1, 2, 3]])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, pred, t, t > 1), loss(x, pred, t, t > 1))


SLOTS = torch.tensor([[0, 3], [1, 2]])
LOSSES_AND_NORMS = {
    "add_noise": lambda x: ops.add_noise(x, 500, ABAR, torch.ones_like(x))[0].square().sum(),
    "sds_loss": lambda x: ops.sds_loss(x, x.detach(), ops.Noise(0, 0, [0, 1]), 500, ABAR).square(),
    "denoising_loss": lambda x: ops.denoising_loss(x, ops.Noise(0, 0, [0, 1]), 500, ABAR),
    "dmd_loss": lambda x: ops.dmd_loss(x, torch.ones_like(x), torch.zeros_like(x)).square(),
    "sid_loss": lambda x: ops.sid_loss(x, 2 * x, torch.ones_like(x), alpha=0.5),
    "inject_grad": lambda x: ops.inject_grad(x, torch.ones_like(x)).square(),
    "group_norm_silu": lambda x: ops.group_norm_silu(x, torch.ones(4), torch.ones(4), 2).square().sum(),
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones(3), torch.ones(3)).square().sum(),
    "geglu": lambda x: ops.geglu(x[..., :2]).square().sum(),
    "attention": lambda x: ops.attention(*[x[..., :1] + torch.arange(40.0)] * 3).square().sum(),
    "token_distill_loss": lambda x: ops.token_distill_loss(x.flatten(2), torch.ones(2, 1, 9), SLOTS, 0 * SLOTS, distance="l2"),
}


def test_no_op_is_left_out_of_what_all_are_asked(root):
    """An op that no list has would be untested without a word."""
    reverse = {name for name in ops.__all__ if hasattr(getattr(ops, name), "__wrapped__")}
    assert reverse == LOSSES_AND_NORMS.keys()
    texts = {path.name: path.read_text() for path in (root / "tests").glob("test_*.py")}
    assert {name for name, text in texts.items() if "launch.INTERPRETED" in text} <= {*KERNEL_TESTS}
    interpreted = "".join(texts[name] for name in KERNEL_TESTS)
    for path in (root / "kernels").glob("*.py"):
        for kernel in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M):
            assert f'"{kernel}"' in interpreted, f"{path.name}: no test counts the launches of {kernel}"
    sanitized = re.search(r'^EVERY_KERNEL = """(.*?)"""', texts["test_gpu.py"], re.M | re.S)[1]
    assert not [name for name in reverse if f"ops.{name}(" not in sanitized]


@pytest.mark.parametrize("name", LOSSES_AND_NORMS)
def test_forward_mode_is_refused(name):
    """torch's custom ops drop tangents: without the refusal, every one of these is zero."""
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotImplementedError, match=f"{name}: reverse mode only"):
        torch.func.jvp(LOSSES_AND_NORMS[name], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        LOSSES_AND_NORMS[name](x)  # no tangent, nothing to refuse
        with pytest.raises(NotImplementedError, match=f"{name}: reverse mode only"):
            LOSSES_AND_NORMS[name](torch.autograd.forward_ad.make_dual(x, x))


def test_forward_mode_of_guide_and_convert():
    pred, x_t, tangent = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for linear in (
        lambda v: ops.guide((v, torch.zeros_like(v)), 3.0),
        lambda v: ops.convert(v, torch.zeros_like(v), 500, ABAR, source="epsilon", target="x0"),
    ):
        torch.testing.assert_close(torch.func.jvp(linear, (pred,), (tangent,))[1], linear(tangent))


@pytest.mark.parametrize("name", LOSSES_AND_NORMS)
def test_second_derivatives_are_right_or_refused(name):
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.autograd.grad(LOSSES_AND_NORMS[name](x), x, create_graph=True)[0]
    if name == "add_noise":  # linear: 2 alpha^2
        second = torch.autograd.grad(grad.sum(), x)[0]
        torch.testing.assert_close(second, (2 * ABAR[500]).expand(x.shape))
    else:
        with pytest.raises(RuntimeError, match="Trying to backward through fastsds.* no autograd formula"):
            torch.autograd.grad(grad.sum(), x)


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for ours, plain in zip(results(compiled), results(step)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(launch.INTERPRETED, reason="counts the twin's path")
def test_the_cpu_runs_the_twin():
    before = dict(launch.launches)
    results(step)
    assert dict(launch.launches) == before


def on_device(v):
    return v if launch.INTERPRETED else v.cuda()


@pytest.mark.skipif(
    not (launch.INTERPRETED or torch.cuda.is_available()),
    reason="runs in test_kernels_in_the_interpreter's session",
)
@pytest.mark.parametrize(
    "call, expected",
    (
        (lambda n, x, t, a: n.normal(5), {"_normal_kernel": 1}),
        (lambda n, x, t, a: n.words(5), {"_words_kernel": 1}),
        (lambda n, x, t, a: n.uniform(5), {"_words_kernel": 1}),
        (lambda n, x, t, a: n.randint(0, 5), {"_words_kernel": 1}),
        (
            lambda n, x, t, a: ops.add_noise(x, t, a, n)[0].sum().backward(),
            {"_add_noise_kernel": 1, "_scale_rows_kernel": 1},
        ),
        (lambda n, x, t, a: ops.add_noise(x, t, a), {"_add_noise_kernel": 1}),
        (
            lambda n, x, t, a: ops.sds_loss(x, x.detach(), n, t, a).backward(),
            {"_residual_sum_kernel": 1, "_residual_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.sds_loss(x, x.detach(), n, t, a, return_grad=True),
            {"_residual_sum_kernel": 1, "_residual_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.denoising_loss(x, n, t, a).backward(),
            {"_residual_sum_kernel": 1, "_residual_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.sds_loss(
                x, torch.cat([x, x]), n, t, a, x_t=x, guidance_scale=2.0, weighting="x0_error", nonfinite="drop_sample"
            ).backward(),
            {"_residual_sum_kernel": 3, "_residual_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.dmd_loss(x, 2 * x, 3 * x).backward(),
            {"_residual_sum_kernel": 2, "_residual_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.sid_loss(x, 2 * x, 3 * x).backward(),
            {"_residual_sum_kernel": 1, "_sid_energy_kernel": 1, "_sid_gradients_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.layer_norm(x, a[:8], a[:8]).sum().backward(),
            {"_layer_norm_kernel": 1, "_layer_norm_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.group_norm_silu(x, a[:4], a[:4], 2).sum().backward(),
            {"_group_norm_silu_kernel": 1, "_group_norm_silu_gradient_kernel": 1},
        ),
        (lambda n, x, t, a: ops.geglu(x).sum().backward(), {"_geglu_kernel": 1, "_geglu_gradient_kernel": 1}),
        (
            lambda n, x, t, a: ops.inject_grad(x, x.detach()).backward(),
            {"_residual_sum_kernel": 1, "_residual_gradient_kernel": 1},
        ),
        (
            lambda n, x, t, a: ops.token_distill_loss(x[0], x[1].detach(), t.expand(4, 2), weight=a[:4]).backward(),
            {"_token_distill_kernel": 1, "_token_distill_gradient_kernel": 1},
        ),
    ),
)
def test_every_op_launches_its_kernel(call, expected):
    x = on_device(torch.randn(2, 4, 8, 8)).requires_grad_()
    noise = ops.Noise(1, 2, on_device(torch.arange(2)))
    launch.launches.clear()
    call(noise, x, on_device(torch.tensor([1, 2])), on_device(ABAR))
    assert dict(launch.launches) == expected


@pytest.mark.skipif(launch.INTERPRETED, reason="is that session")
def test_kernels_in_the_interpreter(python, root):
    """The kernels' tests once more, in a process where the CPU runs the Triton kernels themselves."""
    files = [root / "tests" / name for name in KERNEL_TESTS]
    done = python(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *files,
        env={"TRITON_INTERPRET": "1"},
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 150, done.stdout[-500:]


def test_unknown_devices_are_refused(root):
    """No fallback: a device without an implementation is an error (meta has one: shapes only)."""
    x = torch.empty(2, 4, device="meta")
    noise = ops.Noise(0, 0, torch.arange(2)).to("meta")
    assert ops.add_noise(x, 5, ABAR, noise)[0].device.type == "meta"
    texts = [path.read_text() for path in (root / "kernels").glob("*.py")]
    names = [name for text in texts for name in re.findall(r'launch\.define\(\s*"(\w+)"', text)]
    assert len(names) == "".join(texts).count("launch.define(") >= 20
    for name in names:
        kernels = torch._C._dispatch_dump(f"fastsds::{name}")
        assert re.search(r"^CPU:", kernels, re.M) and re.search(r"^CUDA:", kernels, re.M)
        assert not re.search(r"^CompositeExplicitAutograd:", kernels, re.M)


def test_public_names_are_light(python):
    """fastsds.ops needs torch and triton, and none of the heavy packages."""
    code = "import sys; import fastsds.ops; print([m for m in ('diffusers', 'transformers', 'deepspeed', 'xformers', "
    code += "'bitsandbytes', 'open_clip') if m in sys.modules])"
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def attend(x, other, *_):
    q, k = (v.reshape(2, 1, 4, 64)[..., :40].contiguous() for v in (x, other))
    y = ops.attention(q, k, k)
    return y.square().sum(), y, y.detach()


@pytest.mark.parametrize("step", (step, attend))
def test_autocast_changes_nothing(step):
    plain = results(step)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(step)
    for ours, other in zip(cast, plain):
        assert torch.equal(ours, other)
