"""The SDS-CLIP recipe: each gradient against its formula in float64, lambda, ranks, the frozen teacher, the head."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from fastsds import ops
from fastsds.config import BankConfig, ConfigError, LossConfig
from fastsds.data import Batch
from fastsds.recipes.sds_clip import SDSCLIP, teacher_parts
from fastsds.student import StudentOutput, apply_tuning, load_student, save_student
from fastsds.teacher import Teacher

SEED = 5
WEIGHTS = {
    "uniform": lambda abar: torch.ones_like(abar),
    "sigma2": lambda abar: 1 - abar,
    "alpha_sigma2": lambda abar: abar.sqrt() * (1 - abar),
    "inverse_snr_root": lambda abar: ((1 - abar) / abar).sqrt(),
}


def setting(**changes):
    """A `loss` section that owes nothing to the shipped recipe's values."""
    base = LossConfig(
        lambda_=30.0,
        rho=1.0,
        gradient="sds",
        reference="noise",
        noised=True,
        weighting="inverse_snr_root",
        t=(0.6, 1.0),
        log_snr=None,
        shift=0.0,
        sds_every=1,
        captions="own",
        negatives="none",
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Teachers of all three prediction types, and a student."""
    path = tmp_path_factory.mktemp("models")
    made = {kind: tiny.save_teacher(path / kind, kind) for kind in ("epsilon", "v_prediction", "sample")}
    return {**made, "student": tiny.save_student(path / "student")}


@pytest.fixture(scope="module")
def teachers(folders):
    kinds = ("epsilon", "v_prediction", "sample")
    return {kind: Teacher.load(folders[kind], dtype=torch.float64) for kind in kinds}


@pytest.fixture(scope="module")
def teacher(folders):
    return Teacher.load(folders["epsilon"])


def make_batch(n=4, tokenize=None, negatives=False, first=0, told=None):
    captions = tiny.captions(n + first)[first:]
    wrong = tiny.captions(n + first, seed=9)[first:]
    ids = torch.arange(first, first + n)
    return Batch(
        ids=ids + 100,
        visits=ids % 3,
        pixels=tiny.pixels(n + first)[first:],
        captions=captions,
        negatives=wrong if negatives else None,
        tokens=tokenize(captions) if tokenize else None,
        negative_tokens=tokenize(wrong) if negatives else None,
        teacher_captions=told or captions,
    )


def output(z, d=6):
    """A student's output around given latents."""
    f = torch.randn(len(z), d, dtype=z.dtype, generator=torch.Generator().manual_seed(2))
    return StudentOutput(f, F.normalize(f, dim=-1), F.normalize(f.flip(1), dim=-1), z, torch.tensor(10.0, dtype=z.dtype))


def latents(n=4, dtype=torch.float64, seed=0):
    return torch.randn(n, *tiny.LATENT, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def oracle(teacher, loss, z, batch, timesteps=(500, 900)):
    """t, w, eps, eps_hat by the page's formulas, with the UNet called directly; differentiable in z."""
    t = ops.Noise(SEED, ops.draw(ops.Purpose.TIMESTEP, batch.visits), batch.ids).randint(600, 1000)
    eps = ops.Noise(SEED, ops.draw(ops.Purpose.NOISE, batch.visits), batch.ids).normal(z.shape[1:]).to(z.dtype)
    abar = teacher.alphas_cumprod.to(z.dtype)[t].view(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    z_t = alpha * z + sigma * eps if loss.noised else z
    pred = teacher.unet(z_t, t, encoder_hidden_states=teacher.embed(batch.teacher_captions)).sample
    eps_hat = {
        "epsilon": lambda: pred,
        "v_prediction": lambda: alpha * pred + sigma * z_t,
        "sample": lambda: (z_t - alpha * pred) / sigma,
    }[teacher.prediction_type]()
    return t, WEIGHTS[loss.weighting](abar), eps, eps_hat, (z_t - sigma * eps_hat) / alpha


@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_sds_is_its_formula(teachers, kind, weighting, noised):
    loss = setting(weighting=weighting, noised=noised)
    teacher, batch, z = teachers[kind], make_batch(), latents()
    value = SDSCLIP(loss, teacher, SEED).distillation(z, batch)
    gradient = torch.autograd.grad(3.0 * value, z)[0] / 3.0  # the upstream gradient is honoured
    with torch.no_grad():
        _, w, eps, eps_hat, _ = oracle(teacher, loss, z, batch)
        residual = eps_hat - eps
        torch.testing.assert_close(value, (w * residual.square()).mean())
        torch.testing.assert_close(gradient, 2 * w * residual / z.numel())
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weighted_sds_is_regression_to_the_teachers_mean_with_constant_one(teachers, kind):
    loss, batch, z = setting(weighting="inverse_snr_root"), make_batch(), latents()
    value = SDSCLIP(loss, teachers[kind], SEED).distillation(z, batch)
    with torch.no_grad():
        x0hat = oracle(teachers[kind], loss, z, batch)[-1]
    expected = torch.autograd.grad((z - x0hat).square().mean(), z)[0]
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], expected)


@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("weighting", ["uniform", "inverse_snr_root"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_full_is_autograd_through_the_unet(teachers, kind, weighting, noised):
    loss = setting(gradient="full", weighting=weighting, noised=noised)
    teacher, batch, z = teachers[kind], make_batch(), latents()
    value = SDSCLIP(loss, teacher, SEED).distillation(z, batch)
    _, w, eps, eps_hat, _ = oracle(teacher, loss, z, batch)
    expected = (w * (eps_hat - eps).square()).mean()
    torch.testing.assert_close(value, expected)
    gradient = torch.autograd.grad(value, z)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])
    sds = SDSCLIP(replace(loss, gradient="sds"), teacher, SEED).distillation(z, batch)
    torch.testing.assert_close(sds, value)  # one value, two gradients
    assert not torch.allclose(torch.autograd.grad(sds, z)[0], gradient, rtol=0.1)


def test_full_agrees_with_finite_differences(teachers):
    recipe, batch, z = (
        SDSCLIP(setting(gradient="full"), teachers["epsilon"], SEED),
        make_batch(),
        latents(),
    )
    gradient = torch.autograd.grad(recipe.distillation(z, batch), z)[0]
    direction, h = latents(seed=8).detach(), 1e-6
    with torch.no_grad():
        slope = (recipe.distillation(z + h * direction, batch) - recipe.distillation(z - h * direction, batch)) / (2 * h)
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-12)


def test_sds_builds_no_graph_of_the_unet(teacher):
    seen = []
    hook = teacher.unet.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for gradient in ("sds", "full"):
        SDSCLIP(setting(gradient=gradient), teacher, SEED).distillation(latents(dtype=torch.float32), make_batch())
    hook.remove()
    assert seen == [False, True]


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_amortised_is_sds_with_the_teachers_answer_from_elsewhere(teachers, weighting):
    """Given targets of z itself, its gradient is that of `sds`: the same mathematics, other places asked about."""
    teacher, batch, z = teachers["epsilon"], make_batch(), latents()
    recipe = SDSCLIP(setting(weighting=weighting), teacher, SEED)
    expected = torch.autograd.grad(recipe.distillation(z, batch), z)[0]
    t, noise = (ops.Noise(SEED, ops.draw(of, batch.visits), batch.ids) for of in (ops.Purpose.TIMESTEP, ops.Purpose.NOISE))
    t = t.randint(*recipe.timesteps)
    targets = teacher.targets(z.detach(), t, noise, teacher.embed(batch.captions))
    banked = replace(batch, targets=targets, abar=teacher.alphas_cumprod[t])
    found = SDSCLIP(setting(gradient="amortised", weighting=weighting)).distillation(z, banked)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], expected, rtol=1e-5, atol=1e-9)  # abar is fp32
    if weighting == "inverse_snr_root":
        torch.testing.assert_close(found, (z - targets).square().mean(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="no targets from a bank"):
        SDSCLIP(setting(gradient="amortised")).distillation(z, batch)
    assert teacher_parts(setting(gradient="amortised"), BankConfig("b")) == ()
    assert teacher_parts(setting(gradient="amortised"), BankConfig("b", refresh_every=8)) == ("unet",)
    assert teacher_parts(setting(), BankConfig("b")) == ("unet",)


def test_amortised_at_a_level_without_signal():
    """abar 0, where a schedule of zero terminal SNR ends: v is 1 by its formula, and the other weightings leave nothing."""
    z, abar = latents(), torch.zeros(4)
    batch = replace(make_batch(), targets=torch.zeros(4, *tiny.LATENT).half(), abar=abar)
    for weighting, v in {"inverse_snr_root": 1.0, "uniform": 0.0, "sigma2": 0.0}.items():
        loss = SDSCLIP(setting(gradient="amortised", weighting=weighting)).distillation(z, batch)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], v * 2 * z.detach() / z.numel(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("gradient", ["sds", "full", "latents", "amortised"])
def test_micro_batches_give_the_gradient_of_the_whole(teachers, folders, gradient):
    """The UNet's graphs are freed one by one, and the gradient is the whole batch's."""
    student = load_student(folders["student"], latent_shape=tiny.LATENT).double()
    batch = make_batch(6, student.tokenize)
    generator = torch.Generator().manual_seed(1)
    batch.targets, batch.abar = torch.randn(6, *tiny.LATENT, generator=generator).half(), torch.rand(6, generator=generator)
    teacher, sizes = teachers["epsilon"], []
    hook = teacher.unet.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    found = {}
    for micro_batch in (0, 2, 3):
        recipe = SDSCLIP(setting(gradient=gradient), teacher, SEED, head=student.head, micro_batch=micro_batch)
        out = student(batch.pixels, batch.student_tokens)
        parts = recipe(out, batch, 0, diagnose=True)
        gradients = torch.autograd.grad(parts["loss"], [out.z, out.image_raw])
        found[micro_batch] = [parts["loss"], parts["sds"], parts["rho"], *gradients]
    hook.remove()
    assert sizes == {"sds": [6, 2, 2, 2, 3, 3], "full": [6, 2, 2, 2, 3, 3]}.get(gradient, [])
    for micro_batch in (2, 3):
        for ours, whole in zip(found[micro_batch], found[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-15)


def test_latents_is_plain_regression_and_asks_no_unet(folders):
    teacher = Teacher.load(folders["epsilon"], parts=teacher_parts(setting(gradient="latents"), BankConfig()))
    assert teacher.unet is None and teacher.text_encoder is None
    batch, z = make_batch(), latents(dtype=torch.float32)
    value = SDSCLIP(setting(gradient="latents"), teacher, SEED).distillation(z, batch)
    difference = z - teacher.encode(batch.pixels)
    torch.testing.assert_close(value, difference.square().mean())
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], 2 * difference / z.numel())
    other = replace(batch, pixels_teacher=tiny.pixels(4, seed=3))
    assert not torch.equal(SDSCLIP(setting(gradient="latents"), teacher, SEED).distillation(z, other), value)


def test_a_sample_does_not_depend_on_its_batch(teachers):
    recipe, z = SDSCLIP(setting(), teachers["epsilon"], SEED), latents()
    whole = torch.autograd.grad(recipe.distillation(z, make_batch(4)), z)[0]
    parts = [recipe.distillation(z[k : k + 2], make_batch(2, first=k)) for k in (0, 2)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts) / 2, z)[0], whole)


def test_noise_and_timestep_follow_seed_id_and_visit(teacher):
    batch, z = make_batch(), latents(dtype=torch.float32)

    def value(seed, batch):
        return SDSCLIP(setting(), teacher, seed).distillation(z, batch).item()

    first = value(SEED, batch)
    assert first == value(SEED, batch)
    changed = [
        value(SEED + 1, batch),
        value(SEED, replace(batch, ids=batch.ids + 1)),
        value(SEED, replace(batch, visits=batch.visits + 1)),
    ]
    assert len({first, *changed}) == 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"t": (0.2, 0.3)}, (200, 300)),
        ({"t": None, "log_snr": (-4.0, -2.0)}, None),
        ({"t": None, "log_snr": (-1.0, 1.0), "shift": -3.0}, None),
    ],
)
def test_range_of_noise_levels(teacher, config, expected):
    first, last = SDSCLIP(setting(**config), teacher, SEED).timesteps
    if expected:
        assert (first, last) == expected
    else:
        low, high = (v + config.get("shift", 0.0) for v in config["log_snr"])
        level = torch.logit(teacher.alphas_cumprod.double())
        inside = (level >= low) & (level <= high)
        assert torch.equal(inside.nonzero().flatten(), torch.arange(first, last))


# -- the loss as a whole -------------------------------------------------------------------------------------------------


@pytest.fixture
def student(folders):
    student = load_student(folders["student"], latent_shape=tiny.LATENT)
    apply_tuning(student, "all")
    return student


def run(student, recipe, batch, step=0, **options):
    return recipe(student(batch.pixels, batch.student_tokens), batch, step, **options)


def test_loss_is_clip_plus_lambda_sds(student, teacher):
    import open_clip

    batch = make_batch(4, student.tokenize)
    out = student(batch.pixels, batch.tokens)
    recipe = SDSCLIP(setting(lambda_=7.0), teacher, SEED)
    parts = recipe(out, batch, 0)
    expected = open_clip.ClipLoss()(out.image, out.text, out.logit_scale)
    torch.testing.assert_close(parts["clip"], expected)
    torch.testing.assert_close(parts["loss"], expected + 7.0 * recipe.distillation(out.z, batch))
    assert parts["lambda"].item() == 7.0 and "rho" not in parts
    assert not any(v.requires_grad for k, v in parts.items() if k != "loss")
    assert all(v.shape == () for v in parts.values())


def test_lambda_zero_asks_no_teacher(folders):
    student = load_student(folders["student"])  # without a head
    assert teacher_parts(setting(lambda_=0.0), BankConfig(), "ridge") == ()
    parts = run(student, SDSCLIP(setting(lambda_=0.0)), make_batch(4, student.tokenize), diagnose=True)
    assert torch.equal(parts["loss"], parts["clip"]) and "sds" not in parts
    assert parts["loss"].requires_grad
    with pytest.raises(ValueError, match="needs a teacher"):
        SDSCLIP(setting())


def test_diagnosis_is_the_ratio_and_the_angle_of_the_two_gradients(student, teacher):
    batch, recipe = (
        make_batch(4, student.tokenize),
        SDSCLIP(setting(lambda_=3.0), teacher, SEED, head=student.head),
    )
    out = student(batch.pixels, batch.tokens)
    parts = recipe(out, batch, 0, diagnose=True)
    clip = torch.autograd.grad(recipe.contrastive(out, batch), out.image_raw, retain_graph=True)[0]
    sds = torch.autograd.grad(recipe.distillation(out.z, batch), out.image_raw, retain_graph=True)[0]
    torch.testing.assert_close(parts["rho"], 3.0 * sds.norm() / clip.norm())
    torch.testing.assert_close(parts["cosine"], F.cosine_similarity(clip.flatten(), sds.flatten(), dim=0))
    parts["loss"].backward()  # the graph is still there
    assert all(p.grad is not None for p in student.parameters())


def test_diagnosis_changes_no_gradient(folders, teacher):
    gradients = []
    for diagnose in (False, True):
        student = load_student(folders["student"], latent_shape=tiny.LATENT)
        batch = make_batch(4, student.tokenize)
        run(student, SDSCLIP(setting(), teacher, SEED, head=student.head), batch, diagnose=diagnose)["loss"].backward()
        gradients.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sds_every_k_is_k_times_lambda_every_kth_step(student, teacher):
    batch, calls = make_batch(4, student.tokenize), []
    hook = teacher.unet.register_forward_hook(lambda *_: calls.append(1))
    each = SDSCLIP(setting(lambda_=2.0), teacher, SEED)
    third = SDSCLIP(setting(lambda_=2.0, sds_every=3), teacher, SEED, head=student.head)
    sds = (run(student, each, batch)["loss"] - run(student, each, batch)["clip"]).item()
    calls.clear()
    shares = []
    for step in range(7):
        parts = run(student, third, batch, step, diagnose=True)
        shares.append((parts["loss"] - parts["clip"]).item() / sds)
        assert ("sds" in parts) == ("rho" in parts) == (step % 3 == 2)
    hook.remove()
    assert shares == pytest.approx([0, 0, 3, 0, 0, 3, 0], rel=1e-4, abs=1e-6)
    assert len(calls) == 2
    run(student, third, batch, 1)["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.head.parameters())  # alike for every engine


@pytest.mark.parametrize("rho", [0.5, 4.0])
def test_lambda_auto_holds_rho(student, teacher, rho):
    recipe = SDSCLIP(setting(lambda_="auto", rho=rho), teacher, SEED, head=student.head)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    history = []
    for step in range(30):
        batch = make_batch(8, student.tokenize)
        batch = replace(batch, visits=batch.visits + 3 * step)
        parts = run(student, recipe, batch, step, diagnose=True)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        history.append(parts["rho"].item())
    assert history[0] == pytest.approx(rho, rel=1e-4)
    mean_square = math.sqrt(sum(v * v for v in history[10:]) / 20)
    assert mean_square == pytest.approx(rho, rel=0.25)
    assert not parts["lambda"].requires_grad


def test_lambda_auto_resumes_bit_for_bit(student, teacher):
    config = setting(lambda_="auto")
    one = SDSCLIP(config, teacher, SEED, head=student.head)
    batches = [make_batch(4, student.tokenize, first=k) for k in range(4)]
    whole = [run(student, one, b)["lambda"] for b in batches]
    first = SDSCLIP(config, teacher, SEED, head=student.head)
    for b in batches[:2]:
        run(student, first, b)
    second = SDSCLIP(config, teacher, SEED, head=student.head)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert [run(student, second, b)["lambda"] for b in batches[2:]] == whole[2:]
    assert SDSCLIP(setting(), teacher, SEED).state_dict() == {}


def test_negatives_widen_the_choice_of_each_image(student):
    batch = make_batch(4, student.tokenize, negatives=True)
    out = student(batch.pixels, batch.student_tokens)
    recipe = SDSCLIP(setting(lambda_=0.0, negatives="swapped"))
    logits = out.logit_scale * out.image @ out.text.T  # [4, 8]
    labels = torch.arange(4)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :4].T, labels)) / 2
    torch.testing.assert_close(recipe.contrastive(out, batch), expected)
    plain = SDSCLIP(setting(lambda_=0.0)).contrastive(out._replace(text=out.text[:4]), batch)
    assert recipe.contrastive(out, batch) > plain
    with pytest.raises(ValueError, match="expected 2 x 4"):
        recipe.contrastive(out._replace(text=out.text[:4]), batch)


def test_the_teacher_reads_the_captions_it_is_told(student, teacher):
    recipe, shuffled = (SDSCLIP(setting(captions=c), teacher, SEED) for c in ("own", "shuffled"))
    batch = make_batch(4, student.tokenize)
    told = replace(batch, teacher_captions=batch.captions[1:] + batch.captions[:1])
    parts = run(student, recipe, batch), run(student, shuffled, told)
    assert torch.equal(parts[0]["clip"], parts[1]["clip"])  # CLIP keeps its own captions
    assert not torch.equal(parts[0]["sds"], parts[1]["sds"])
    with pytest.raises(ValueError, match="no shuffled captions"):
        run(student, shuffled, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "uncond"}, "loss.reference"),
        ({"t": None, "log_snr": (90.0, 99.0)}, "log_snr"),
        ({"gradient": "vsd"}, "loss.gradient"),
    ],
)
def test_settings_that_cannot_be_met(teacher, change, message):
    with pytest.raises(ConfigError, match=message):
        SDSCLIP(setting(**change), teacher, SEED)


# -- the frozen teacher ---------------------------------------------------------------------------------------------------


def test_a_weight_without_bound_is_refused_before_it_makes_a_loss_nan(folders, tmp_path):
    """A schedule with zero terminal SNR: at its last timestep sigma / alpha has no bound."""
    shutil.copytree(folders["v_prediction"], tmp_path / "teacher")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    teacher = Teacher.load(tmp_path / "teacher", parts=("unet", "text"))
    with pytest.raises(ConfigError, match="'inverse_snr_root' has no bound at timestep 999.*loss.t"):
        SDSCLIP(setting(), teacher)
    for fits in ({"t": (0.6, 0.999)}, {"weighting": "sigma2"}, {"gradient": "latents"}):
        SDSCLIP(setting(**fits), teacher)


@pytest.mark.parametrize("gradient", ["sds", "full", "latents"])
def test_training_leaves_the_teacher_untouched_and_unsaved(student, folders, tmp_path, gradient):
    from safetensors import safe_open

    teacher = Teacher.load(folders["epsilon"])
    before = [p.clone() for p in teacher.parameters()]
    recipe = SDSCLIP(setting(lambda_="auto", gradient=gradient), teacher, SEED, head=student.head)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    start = [p.clone() for p in student.parameters()]
    for step in range(3):
        parts = run(student, recipe, make_batch(4, student.tokenize), step)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True) if a.numel() > 1)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    storages = {p.data_ptr() for p in teacher.parameters()}
    states = [student.state_dict(), recipe.state_dict(), optimizer.state_dict()["state"].get(0, {})]
    for state in states:
        assert not storages & {v.data_ptr() for v in state.values() if isinstance(v, torch.Tensor)}
    assert {name.split(".")[0] for name in student.state_dict()} == {"clip", "head"}
    assert set(recipe.state_dict()) == {"running"} | ({"bands"} if gradient != "latents" else set())
    save_student(student.state_dict(), student, tmp_path)
    saved = 0
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            saved += sum(f.get_tensor(k).numel() for k in f.keys())  # noqa: SIM118
    assert saved == sum(p.numel() for p in student.parameters())


# -- ranks ----------------------------------------------------------------------------------------------------------------

CASES = {
    "clip": setting(lambda_=0.0),
    "negatives": setting(lambda_=0.0, negatives="swapped"),
    "sds": setting(lambda_=3.0),
    "auto": setting(lambda_="auto"),
}


def gradients(folders, case, world, rank):
    """One rank's parts and gradients for its part of a contrastive batch of 8, in float64."""
    loss = CASES[case]
    teacher = Teacher.load(folders["epsilon"], dtype=torch.float64) if loss.lambda_ != 0 else None
    student = load_student(folders["student"], latent_shape=tiny.LATENT).double()
    batch = make_batch(8 // world, student.tokenize, loss.negatives != "none", first=rank * 8 // world)
    parts = run(student, SDSCLIP(loss, teacher, SEED, world, rank, student.head), batch, diagnose=True)
    parts["loss"].backward()
    names = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}
    return {k: v.detach() for k, v in parts.items()}, names


def rank_main(rank, folders, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.save({case: gradients(folders, case, 2, rank) for case in CASES}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(folders, tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(folders, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for case in CASES:
        parts, expected = gradients(folders, case, 1, 0)
        (a, grad_a), (b, grad_b) = (r[case] for r in ranks)
        for name, gradient in expected.items():
            mean = (grad_a[name] + grad_b[name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, at=(case, name): f"{at}: {m}")
        assert any(g.abs().max() > 1e-4 for g in expected.values())
        by_band = [key for key in parts if "/" in key]
        assert len(by_band) > 4 or CASES[case].lambda_ == 0
        for key in ("clip", "lambda", "rho", "cosine", *by_band):
            if key in parts:
                torch.testing.assert_close(a[key], parts[key], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(b[key], parts[key], rtol=1e-9, atol=1e-12)
        if "sds" in parts:
            torch.testing.assert_close((a["sds"] + b["sds"]) / 2, parts["sds"], rtol=1e-9, atol=1e-12)
