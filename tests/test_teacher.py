"""The teacher: loads a diffusers folder, stays frozen, and says exactly what diffusers says."""

import json
import shutil

import pytest
import tiny
import torch

from fastsds.config import ConfigError
from fastsds.teacher import Teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder):
    return Teacher.load(folder)


def test_what_the_folder_says(teacher):
    from diffusers import DDPMScheduler

    assert teacher.latent_shape == tiny.LATENT and teacher.image_size == tiny.IMAGE
    assert teacher.prediction_type == "epsilon"
    expected = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    assert torch.equal(teacher.alphas_cumprod, expected)


def test_everything_is_frozen_and_in_evaluation_mode(teacher):
    parameters = list(teacher.parameters())
    assert parameters and not any(p.requires_grad for p in parameters)
    assert not any(m.training for part in teacher.modules() for m in part.modules())
    assert not isinstance(teacher, torch.nn.Module)  # so it can be nobody's submodule


def test_embedding_is_the_text_encoders_last_hidden_state(folder, teacher):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    captions = ["a red ring", "", "ünïcode ☃ and a text that is cut because it is long"]
    ids = tokenizer(
        captions, padding="max_length", max_length=tiny.CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        torch.testing.assert_close(teacher.embed(captions), model(ids).last_hidden_state)


def test_an_embedding_depends_on_no_neighbour_and_no_cache(folder):
    captions = tiny.captions(37)
    whole = Teacher.load(folder, parts=("text",)).embed(captions)
    alone = Teacher.load(folder, parts=("text",))
    assert torch.equal(whole, torch.cat([alone.embed([c]) for c in captions]))
    assert torch.equal(whole.flip(0), alone.embed(captions[::-1]))
    assert not torch.equal(whole[0], whole[1])


def test_the_cache_is_used_and_bounded(folder, monkeypatch):
    teacher, calls = Teacher.load(folder, parts=("text",)), []
    teacher.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = teacher.embed(["a", "b", "a"])
    assert torch.equal(teacher.embed(["b", "a"]), first[:2].flip(0)) and len(calls) == 1
    size = first[0].numel() * first[0].element_size()
    monkeypatch.setattr("fastsds.teacher.model.CACHE_BYTES", 3 * size)
    many = tiny.captions(9, seed=4)
    assert torch.equal(teacher.embed(many), Teacher.load(folder, parts=("text",)).embed(many))
    assert len(teacher._captions) == 3
    calls.clear()
    teacher.embed(many[-3:])
    assert not calls


def test_prediction_is_the_unets_and_its_gradient_flows_to_z_alone(teacher):
    z = torch.randn(2, *tiny.LATENT, generator=torch.Generator().manual_seed(0), requires_grad=True)
    t, text = torch.tensor([3, 900]), teacher.embed(["a red ring", "the blue cross"])
    pred = teacher.predict(z, t, text)
    assert torch.equal(pred, teacher.unet(z, t, encoder_hidden_states=text).sample)
    pred.square().sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.predict(z.detach(), t, text).requires_grad
    assert teacher.predict(z.detach().double(), t, text).dtype == torch.float64
    assert not torch.equal(pred, teacher.predict(z, t, text.flip(0)))  # it reads the caption


def test_encode_and_decode_are_the_vaes(teacher):
    pixels = tiny.pixels(3)
    images = pixels.float() / 127.5 - 1
    mean = teacher.vae.encode(images).latent_dist.mean
    latents = teacher.encode(pixels)
    assert torch.equal(latents, mean * 0.5) and latents.shape == (3, *tiny.LATENT)
    decoded = teacher.decode(latents)
    expected = ((teacher.vae.decode(latents / 0.5).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(decoded, expected) and decoded.dtype == torch.uint8


def test_a_shift_factor_is_undone_both_ways(folder, tmp_path):
    out = tmp_path / "shifted"
    shutil.copytree(folder, out)
    config = json.loads((out / "vae" / "config.json").read_text())
    (out / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.25}))
    plain, shifted = Teacher.load(folder), Teacher.load(out)
    pixels = tiny.pixels(2)
    torch.testing.assert_close(shifted.encode(pixels), plain.encode(pixels) - 0.25 * 0.5)
    latents = plain.encode(pixels)
    difference = shifted.decode(latents - 0.125).int() - plain.decode(latents).int()
    assert difference.abs().max() <= 1


def test_half_precision_weights_load_to_fp32(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "half"
    shutil.copytree(folder, out)
    for file in out.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    half, full = Teacher.load(out), Teacher.load(folder)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    for file in [f for f in out.rglob("*.safetensors") if f.parent.name != "text_encoder"]:
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    again = Teacher.load(out)  # the variant's file names
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))
    assert {p.dtype for p in Teacher.load(out, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_parts_that_are_left_out_are_not_needed(folder, tmp_path):
    out = tmp_path / "part"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "text_encoder")
    teacher = Teacher.load(out, parts=("vae",))
    assert teacher.latent_shape == tiny.LATENT and len(teacher.alphas_cumprod) == 1000
    with pytest.raises(ValueError, match="without its unet"):
        teacher.predict(torch.zeros(1, *tiny.LATENT), torch.tensor([1]), None)
    with pytest.raises(ValueError, match="without its text_encoder"):
        teacher.embed(["a"])


@pytest.mark.parametrize(
    "missing",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(folder, tmp_path, missing):
    out = tmp_path / "broken"
    shutil.copytree(folder, out)
    (out / missing).unlink()
    with pytest.raises(ConfigError, match=f"broken: {missing} is missing"):
        Teacher.load(out)


def test_a_missing_folder_is_named(folder, tmp_path):
    out = tmp_path / "broken"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "tokenizer")
    with pytest.raises(ConfigError, match="broken: tokenizer/tokenizer_config.json is missing"):
        Teacher.load(out)
    shutil.rmtree(out / "unet")
    with pytest.raises(ConfigError, match="broken: unet/config.json is missing"):
        Teacher.load(out)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        Teacher.load(tmp_path / "nowhere")


def test_damaged_files_are_named(folder, tmp_path):
    out = tmp_path / "broken"
    shutil.copytree(folder, out)
    (out / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ConfigError, match="broken/vae/diffusion_pytorch_model.safetensors: truncated or damaged"):
        Teacher.load(out)
    (out / "unet" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"unet/config.json: not JSON"):
        Teacher.load(out)


def test_wrong_shapes(teacher):
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, 16, 16\]"):
        teacher.encode(tiny.pixels(1, size=8))
    with pytest.raises(ValueError, match=r"expected \[B, 4, 4, 4\]"):
        teacher.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1]), teacher.embed(["a"]))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets_and_scores_are_the_prediction_converted(tmp_path, kind):
    from fastsds import ops

    teacher = Teacher.load(tiny.save_teacher(tmp_path, kind))
    generator = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(3, *tiny.LATENT, generator=generator) for _ in range(2))
    t, text = torch.tensor([5, 400, 990]), teacher.embed(tiny.captions(3))
    abar = teacher.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    z_t = a * z0.double() + s * eps.double()
    with torch.no_grad():
        pred = teacher.predict(z_t.float(), t, text).double()
    x0 = {"epsilon": (z_t - s * pred) / a, "v_prediction": a * z_t - s * pred, "sample": pred}[kind]
    torch.testing.assert_close(teacher.targets(z0, t, eps, text).double(), x0, rtol=1e-4, atol=1e-4)
    error = ((z_t - a * x0) / s - eps.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(teacher.score(z0, t, eps, text).double(), -error, rtol=1e-3, atol=1e-4)
    stream = ops.Noise(3, 0, torch.arange(3))
    assert torch.equal(
        teacher.targets(z0, t, stream, text), teacher.targets(z0, t, stream.normal(tiny.LATENT), text)
    )


# -- frozen, and the same for everyone who asks ------------------------------------------------------------------------


def parts_of(teacher) -> dict:
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "latent_shape", "image_size")
    return {name: getattr(teacher, name) for name in names}


def test_a_teacher_of_modules_that_require_grad_is_refused(folder):
    teacher = Teacher.load(folder)
    for part, name in (("unet", "conv_in.bias"), ("vae", "quant_conv.weight"), ("text_encoder", "final_layer_norm.bias")):
        parameter = getattr(teacher, part).get_parameter(name).requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{part}.{name} requires grad: a teacher is frozen; call requires_grad_"):
            Teacher(**parts_of(teacher))
        parameter.requires_grad_(False)
    assert Teacher(**parts_of(teacher)).unet is teacher.unet


@pytest.mark.parametrize("grad", [True, False])
def test_a_teacher_that_requires_grad_later_is_refused(folder, grad):
    teacher = Teacher.load(folder)
    z, t, text = torch.randn(1, *tiny.LATENT), torch.tensor([5]), teacher.embed(["a"])
    questions = {
        "predict": lambda: teacher.predict(z.requires_grad_(grad), t, text),
        "targets": lambda: teacher.targets(z, t, z.detach(), text),
        "score": lambda: teacher.score(z, t, z.detach(), text),
    }
    for parameter in (teacher.unet.conv_out.weight, teacher.text_encoder.final_layer_norm.bias):
        for ask in questions.values():
            ask()
            parameter.requires_grad_(True)
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"(conv_out.weight|norm.bias) requires grad"):
                ask()
            parameter.requires_grad_(False)


def test_autocast_around_it_changes_no_embedding_and_no_latent(folder):
    plain, inside = Teacher.load(folder), Teacher.load(folder)
    pixels, captions = tiny.pixels(2), tiny.captions(3)
    with torch.autocast("cpu", torch.bfloat16):
        text, latents = inside.embed(captions), inside.encode(pixels)
        decoded = inside.decode(latents)
    assert torch.equal(text, plain.embed(captions)) and torch.equal(latents, plain.encode(pixels))
    assert torch.equal(decoded, plain.decode(latents)) and latents.dtype == torch.float32


def test_latents_that_are_not_finite_are_refused(folder):
    teacher = Teacher.load(folder, parts=("vae",))
    teacher.vae.encoder.conv_in.weight.data[0] = 1e38
    with pytest.raises(FloatingPointError, match="vae's latents of the first images are not finite in torch.float32"):
        teacher.encode(tiny.pixels(2))


def test_the_cache_holds_no_more_than_its_bound(folder, monkeypatch):
    """Rows are kept apart: one that stays does not keep the chunk alive that it was computed in."""
    teacher, captions = Teacher.load(folder, parts=("text",)), tiny.captions(64)
    size = teacher.embed(["a"]).numel() * 4
    monkeypatch.setattr("fastsds.teacher.model.CACHE_BYTES", 20 * size)
    for start in range(0, 64, 16):
        teacher.embed([*captions[:3], *captions[start : start + 16]])
        held = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in teacher._captions.values()}
        assert sum(held.values()) <= 20 * size
    assert set(captions[:3]) < set(teacher._captions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_an_embedding_depends_on_no_neighbour(folder, dtype):
    captions, load = tiny.captions(37), lambda: Teacher.load(folder, "cuda", dtype)
    teacher, alone = load(), load()
    whole = teacher.embed(captions)
    assert whole.is_cuda and torch.equal(whole, torch.cat([alone.embed([c]) for c in captions]))
    expected = Teacher.load(folder).embed(captions)
    torch.testing.assert_close(whole.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    latents = teacher.encode(tiny.pixels(2))
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(teacher.encode(tiny.pixels(2)), latents) and latents.is_cuda


def test_a_recipe_says_how_the_unet_is_accelerated(folder):
    from fastsds.config import load_recipe

    made = {}
    for name, sets in (
        ("plain", ()), ("off", ("teacher.accelerate=false",)), ("on", ("teacher.accelerate=true",)),
        ("kept", ("teacher.accelerate=true", "teacher.attention=keep", "teacher.checkpoint=true")),
    ):  # fmt: skip
        recipe = load_recipe(None, [f"teacher.path={folder}", *sets])
        made[name] = Teacher.of(recipe, torch.device("cpu"))
    assert made["plain"].acceleration is None and made["off"].acceleration is None  # auto: not on the CPU
    z, t, text = torch.randn(2, *tiny.LATENT), torch.tensor([3, 900]), made["plain"].embed(["a red ring", "the blue cross"])
    expected = made["plain"].predict(z, t, text)
    for name in ("on", "kept"):
        torch.testing.assert_close(made[name].predict(z, t, text), expected, rtol=1e-4, atol=1e-5)
        assert "replaced:" in str(made[name].acceleration)
    assert "checkpoints" in str(made["kept"].acceleration) and not made["kept"].acceleration.attention
    assert made["on"].acceleration.attention
    with pytest.raises(ValueError, match="attention"):
        Teacher.of(load_recipe(None, ["teacher.accelerate=true", "teacher.attention=flashiest"]), torch.device("cpu"))
