"""Loading a teacher: SD 1.x and 2.x folders and single files, only what is asked for, clear refusals, fingerprints."""

import itertools
import json
import logging
import os
import random
import shutil
import struct

import pytest
import runs
import sd
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastsds import ops
from fastsds.config import ConfigError, load_recipe
from fastsds.teacher import Teacher, files, fingerprint, loading, single_file
from fastsds.teacher.single_file import SingleFile
from fastsds.teacher.vocabulary import END, clip_tokenizer

CAPTIONS = ["a man's hat", "two dogs, 3 cats & a horse", "", "naïve 雪 café " * 40]
NAMES = {"unet": "unet", "vae": "vae", "text": "text_encoder"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{version: (folder, the same models in one file)}."""
    path = tmp_path_factory.mktemp("sd")
    folders = {version: sd.save(path / f"sd{version}", version) for version in (1, 2)}
    return {v: (folder, sd.save_ldm(folder, path / f"sd{v}.safetensors", v)) for v, folder in folders.items()}


@pytest.fixture(scope="module")
def teachers(made):
    """{version: (from the folder, from the file)}."""
    return {v: (Teacher.load(folder), Teacher.load(file, prediction_type=sd.PREDICTION[v]))
            for v, (folder, file) in made.items()}  # fmt: skip


@pytest.fixture
def changed(made, tmp_path):
    """A copy of SD 1.x's folder whose JSON files can be changed: changed({"unet/config.json": {...}})."""

    def change(values: dict):
        out = tmp_path / "changed"
        shutil.copytree(made[1][0], out)
        for name, change in values.items():
            (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **change}))
        return out

    return change


def edited(file, out, change):
    """A copy of a single file with its tensors changed."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, out)
    return out


# -- one file of the original layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_is_the_folder_it_was_made_from(teachers, version):
    folder, file = teachers[version]
    told = {"_use_default_values", "_diffusers_version", "_name_or_path", "architectures", "upcast_attention"}
    for ours, theirs in zip(file.modules(), folder.modules(), strict=True):
        state, expected = ours.state_dict(), theirs.state_dict()
        assert list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in expected)
        configs = [{k: v for k, v in dict(m.config if isinstance(m.config, dict) else m.config.to_dict()).items()
                    if k not in told} for m in (ours, theirs)]  # fmt: skip
        assert configs[0] == configs[1]
    assert torch.equal(file.alphas_cumprod, folder.alphas_cumprod)
    assert (file.prediction_type, file.latent_shape, file.image_size) == (
        sd.PREDICTION[version], sd.LATENT, sd.PIXELS,
    )  # fmt: skip
    text = folder.embed(CAPTIONS)
    assert torch.equal(file.embed(CAPTIONS), text) and not torch.equal(text[0], text[1])
    z = torch.randn(4, *sd.LATENT, generator=torch.Generator().manual_seed(0))
    t, pixels = torch.tensor([1, 300, 600, 999]), tiny.pixels(2, sd.PIXELS)
    assert torch.equal(file.predict(z, t, text), folder.predict(z, t, text))
    assert torch.equal(file.encode(pixels), folder.encode(pixels)) and torch.equal(file.decode(z), folder.decode(z))


def test_sd2s_text_is_the_penultimate_block_of_openclip(made, teachers):
    """The file's tensors in open_clip's own text tower: the state before the 24th block, through ln_final."""
    from open_clip.transformer import TextTransformer

    tensors = load_file(made[2][1])
    prefix = "cond_stage_model.model."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) and "logit_scale" not in k}
    tower = TextTransformer(width=sd.WIDTH, heads=1, layers=24, output_dim=sd.WIDTH, mlp_ratio=2).eval()
    tower.load_state_dict(state)
    ids = torch.tensor(clip_tokenizer("!")(CAPTIONS[:2], padding="max_length", truncation=True).input_ids)
    with torch.no_grad():
        x = tower.token_embedding(ids) + tower.positional_embedding
        for block in tower.transformer.resblocks[:23]:
            x = block(x, attn_mask=tower.attn_mask)
        torch.testing.assert_close(teachers[2][1].embed(CAPTIONS[:2]), tower.ln_final(x), rtol=1e-4, atol=1e-4)


TEXT_MODEL = "cond_stage_model.transformer.text_model."
VARIANTS = {
    "without text_model.": lambda t: [
        t.update({k.replace("text_model.", ""): t.pop(k)}) for k in list(t) if k.startswith(TEXT_MODEL)
    ],
    "with CLIP's projection": lambda t: t.update({"cond_stage_model.transformer.text_projection.weight": torch.eye(64)}),
    "pruned": lambda t: [t.pop(k) for k in list(t) if "model_ema." in k or "position_ids" in k],
    "unpruned": lambda t: t.update({k: torch.zeros(2) for k in ("betas", "model_ema.decay", "first_stage_model.loss.logvar")}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_of_a_file(made, teachers, tmp_path, case):
    teacher = Teacher.load(edited(made[1][1], tmp_path / "variant.safetensors", VARIANTS[case]))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), teachers[1][1].parameters(), strict=True))


def captions(n: int) -> list[str]:
    """Words, numbers, punctuation, contractions, other scripts: anything but what ftfy repairs."""
    draw = random.Random(0)
    words = ["a", "the", "dog", "Umbrella", "don't", "it's", "WE'LL", "3", "1999", "3.14", "e-mail", "co-op", "x2", "!", "...",
             "'s", "hello!!", "(red)", "50%", "#1", "naïve", "café", "雪", "собака", "مرحبا", "한국어", "🎉", "👩‍🚀", "a_b",
             "antidisestablishmentarianism", "\t", "zzzzqqq", "half-eaten", "100,000", "'tis", "rock'n'roll"]  # fmt: skip
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(n)]


@pytest.mark.parametrize("pad", ["!", END])
def test_the_tokenizer_is_open_clips(pad):
    from open_clip.tokenizer import SimpleTokenizer

    ours, theirs = clip_tokenizer(pad), SimpleTokenizer()
    texts = [*captions(2000), "", "word " * 200, *tiny.captions(50)]
    expected = theirs(texts)
    for row, ids in zip(expected, ours(texts, padding="max_length", truncation=True).input_ids, strict=True):
        end = (row == theirs.eot_token_id).nonzero()[0, 0]
        row[end + 1 :] = 0 if pad == "!" else theirs.eot_token_id  # open_clip pads with 0
        assert ids == row.tolist()
    assert len(ours) == theirs.vocab_size == 49408


def write_header(path, shapes: dict) -> None:
    """A safetensors file of fp16 tensors that takes no room: its data is a hole."""
    ends = list(itertools.accumulate(2 * torch.Size(shape).numel() for shape in shapes.values()))
    entries = {
        name: {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + ends[-1])


@pytest.mark.parametrize("version", [1, 2])
def test_the_published_sizes_are_read_from_shapes(tmp_path, version):
    models = {part: sd.full_size(part, version) for part in NAMES}
    states = {part: model.state_dict() for part, model in models.items()}
    assert {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()} == sd.PARAMETERS[version]
    tensors = sd.ldm_tensors(states["unet"], states["vae"], states["text"], version)
    write_header(tmp_path / "sd.safetensors", {name: tuple(t.shape) for name, t in tensors.items()})
    file = SingleFile(tmp_path / "sd.safetensors", sd.PREDICTION[version])
    for part in NAMES:
        config, expected = file.config(part), sd.size(part, version)
        assert {key: config[key] for key in expected} == expected
    base = SingleFile(tmp_path / "sd.safetensors", "epsilon")  # SD 2.x base is of 512 pixels
    assert base.config("unet")["sample_size"] == 64 and base.config("vae")["sample_size"] == 512


# -- what the UNet predicts --------------------------------------------------------------------------------------------


def test_what_a_file_predicts(made, tmp_path):
    (folder1, file1), (folder2, file2) = made[1], made[2]
    vae = {"parts": ("vae",)}
    assert Teacher.load(file1, **vae).prediction_type == "epsilon"
    assert Teacher.load(file1, **vae, prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"sd2.safetensors: .*write teacher.prediction_type: v_prediction .*or epsilon"):
        Teacher.load(file2, **vae)
    for said, meant in {"v": "v_prediction", "epsilon": "epsilon"}.items():  # Stability's model metadata
        file = sd.save_ldm(folder2, tmp_path / f"{said}.safetensors", 2, {"modelspec.prediction_type": said})
        assert Teacher.load(file, **vae).prediction_type == meant
    assert Teacher.load(folder2, **vae).prediction_type == "v_prediction"
    assert Teacher.load(folder2, **vae, prediction_type="epsilon").prediction_type == "epsilon"
    with pytest.raises(ConfigError, match="prediction_type is 'velocity', expected one of epsilon, v_prediction"):
        Teacher.load(folder1, **vae, prediction_type="velocity")


def test_a_recipe_says_what_the_teacher_predicts(tmp_path, monkeypatch):
    recipe, asked, load = runs.write_recipe(tmp_path), [], Teacher.load.__func__

    def spy(cls, *args):
        asked.append(load(cls, *args))
        return asked[-1]

    monkeypatch.setattr(Teacher, "load", classmethod(spy))
    for value, expected in {"null": "epsilon", "v_prediction": "v_prediction"}.items():
        values = runs.sets(f"teacher.prediction_type={value}")
        assert runs.train("--recipe", recipe, *values, "--output", tmp_path / "run", "--dry-run") == 0
        assert asked.pop().prediction_type == expected
    with pytest.raises(ConfigError, match="teacher.prediction_type is the text 'sample'; expected one of epsilon, v_pred"):
        load_recipe(recipe, ["teacher.prediction_type=sample"])


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_predict_targets_and_scores_by_the_formulas(teachers, version):
    """In float64, with diffusers' UNet called directly."""
    teacher = teachers[version][0]
    generator = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(3, *sd.LATENT, generator=generator) for _ in range(2))
    t, text = torch.tensor([5, 400, 990]), teacher.embed(CAPTIONS[:3])
    abar = teacher.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    z_t, _ = ops.add_noise(z0, t, teacher.alphas_cumprod, eps)
    torch.testing.assert_close(z_t.double(), a * z0 + s * eps, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        pred = teacher.unet(z_t, t, encoder_hidden_states=text).sample
    assert torch.equal(teacher.predict(z_t, t, text), pred)
    pred, z_t = pred.double(), z_t.double()
    x0, eps_hat = {"epsilon": ((z_t - s * pred) / a, pred), "v_prediction": (a * z_t - s * pred, a * pred + s * z_t)}[
        sd.PREDICTION[version]
    ]
    torch.testing.assert_close(teacher.targets(z0, t, eps, text).double(), x0, rtol=1e-4, atol=1e-4)
    score = -(eps_hat - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(teacher.score(z0, t, eps, text).double(), score, rtol=1e-4, atol=1e-5)


# -- only what is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_a_folders_other_parts_are_not_read(made, tmp_path, part):
    out = tmp_path / "part"
    shutil.copytree(made[1][0], out)
    for other in {"unet", "vae", "text"} - {part}:
        next((out / NAMES[other]).glob("*.safetensors")).write_bytes(b"")
        if other == "text":
            shutil.rmtree(out / "tokenizer")
            shutil.rmtree(out / "text_encoder")
    teacher = Teacher.load(out, parts=(part,))
    assert [m is not None for m in (teacher.unet, teacher.vae, teacher.text_encoder)] == [part == p for p in NAMES]
    assert (teacher.tokenizer is not None) == (part == "text")
    assert teacher.latent_shape == sd.LATENT and len(teacher.alphas_cumprod) == 1000


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_a_files_other_tensors_are_not_read(made, monkeypatch, part, version):
    read, really = [], single_file.open_safetensors

    class Recorder:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(single_file, "open_safetensors", lambda path: Recorder(really(path)))
    Teacher.load(made[version][1], parts=(part,), prediction_type="v_prediction")
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model."}[part]
    assert read and all(name.startswith(prefix) for name in read) and len(read) == len(set(read))
    assert not any(".resblocks.23." in name for name in read)


def test_a_loaded_teacher_does_not_change_with_its_file(made, tmp_path):
    """Its weights are copies, aligned, not views of the mapped file."""
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        (shutil.copytree if path.name == "folder" else shutil.copy)(made[1][path.name != "folder"], path)
        teacher = Teacher.load(path)
        before = [p.clone() for p in teacher.parameters()]
        for file in [path] if path.is_file() else path.rglob("*.safetensors"):
            with file.open("r+b") as stream:
                stream.seek(-4096, os.SEEK_END)
                stream.write(bytes(4096))
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))
        assert all(p.data_ptr() % 64 == 0 for p in teacher.parameters())


@pytest.mark.parametrize("version", [1, 2])
def test_in_half_precision_the_vae_is_single(made, teachers, version):
    folder, file = made[version]
    for path in (folder, file):
        half = Teacher.load(path, dtype=torch.float16, prediction_type=sd.PREDICTION[version])
        assert [{p.dtype for p in m.parameters()} for m in half.modules()] == [
            {torch.float16}, {torch.float32}, {torch.float16},
        ]  # fmt: skip
        pixels = tiny.pixels(2, sd.PIXELS)
        assert torch.equal(half.encode(pixels), teachers[version][0].encode(pixels))
    z = torch.randn(1, *sd.LATENT, generator=torch.Generator().manual_seed(0))
    pred = half.predict(z, torch.tensor([500]), half.embed(["a dog"]))  # torch computes float16 on the CPU
    expected = teachers[version][0].predict(z, torch.tensor([500]), teachers[version][0].embed(["a dog"]))
    torch.testing.assert_close(pred, expected, rtol=2e-2, atol=2e-2)
    single = Teacher.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in single.parameters()} == {torch.bfloat16} and single.encode(pixels).isfinite().all()


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "SDXL": ({"unet/config.json": {"addition_embed_type": "text_time"}}, "unet: an SDXL UNet.*Diffusion 1.x and 2.x"),
    "another class": ({"unet/config.json": {"_class_name": "UNet2DModel"}}, "unet: it is UNet2DModel, expected UNet2DCond"),
    "labels": ({"unet/config.json": {"num_class_embeds": 1000}}, "unet: num_class_embeds is 1000"),
    "inpainting": ({"unet/config.json": {"in_channels": 9}}, "unet: it takes 9 channels and gives 4, an inpainting UNet"),
    "depth": ({"unet/config.json": {"in_channels": 5}}, "unet: it takes 5 channels and gives 4; expected"),
    "a rectangle": ({"unet/config.json": {"sample_size": [8, 4]}}, r"unet: sample_size is \[8, 4\], expected an integer"),
    "another VAE": ({"vae/config.json": {"_class_name": "VQModel"}}, "vae: it is VQModel, expected AutoencoderKL"),
    "channels": ({"vae/config.json": {"latent_channels": 16}}, "the unet takes 4 latent channels, the vae gives 16"),
    "another text model": ({"text_encoder/config.json": {"model_type": "t5"}}, "text_encoder: it is t5, expected clip"),
    "text width": ({"text_encoder/config.json": {"hidden_size": 96}}, "the text_encoder is 96 wide, the unet expects 64"),
    "vocabulary": ({"text_encoder/config.json": {"vocab_size": 100}}, "has 49408 tokens, its text encoder 100"),
    "captions": ({"text_encoder/config.json": {"max_position_embeddings": 70}}, "has 77 tokens a caption, .* encoder 70"),
    "sizes": ({"unet/config.json": {"block_out_channels": [32, 32, 96]}}, r"unet: tensor .* by its config.json \("),
    "text sizes": ({"text_encoder/config.json": {"intermediate_size": 96}}, r"text_encoder: tensor .* by its config.json \("),
    "a flow": ({"scheduler/scheduler_config.json": {"prediction_type": "flow"}}, "prediction_type is 'flow', expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sd_is_refused(changed, case, capfd):
    values, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"changed: (the tokenizer )?{message}") as caught:
        Teacher.load(changed(values))
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_pipeline_without_a_unet_is_named(changed):
    folder = changed({})
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline", "vae": [], "transformer": []}')
    with pytest.raises(ConfigError, match="changed: it holds a FluxPipeline, which has no unet; expected Stable Diffusion 1"):
        Teacher.load(folder)


def test_a_schedule_that_is_none_is_refused(changed):
    folder = changed({})
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(ConfigError, match="scheduler_config.json has no num_train_timesteps"):
        Teacher.load(folder, parts=("vae",))


@pytest.mark.parametrize("prefix, name", [("model.diff", "UNet"), ("first_", "VAE"), ("cond_", "text encoder")])
def test_a_file_that_lacks_a_part_names_it(made, tmp_path, prefix, name):
    file = sd.save_ldm(made[1][0], tmp_path / "part.safetensors", 1, without=prefix)
    with pytest.raises(ConfigError, match=f"part.safetensors: it has no {name} .no tensor {prefix}"):
        Teacher.load(file)
    if name == "text encoder":
        assert Teacher.load(file, parts=("unet", "vae")).latent_shape == sd.LATENT


UNET = "model.diffusion_model."
OTHER_FILES = {
    "inpainting": (lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}), "an inpainting UNet"),
    "SDXL": (lambda t: t.update({UNET + "label_emb.0.0.weight": torch.zeros(8, 8)}), "unet: an SDXL UNet"),
    "labels": (lambda t: t.update({UNET + "label_emb.weight": torch.zeros(10, 8)}), "num_class_embeds is 10"),
    "a tensor less": (lambda t: t.pop(UNET + "middle_block.0.in_layers.2.bias"), "UNet.*resnets.0.conv1.bias.*missing"),
    "another shape": (lambda t: t.update({"first_stage_model.quant_conv.bias": torch.zeros(3)}), r"VAE.*conv.bias.*\(3,\)"),
    "no levels": (lambda t: [t.pop(k) for k in list(t) if "input_blocks." in k], "input_blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_FILES)
def test_a_file_of_another_model_is_refused(made, tmp_path, case):
    change, message = OTHER_FILES[case]
    with pytest.raises(ConfigError, match=f"teacher file .*other.safetensors: .*{message}"):
        Teacher.load(edited(made[1][1], tmp_path / "other.safetensors", change))


def test_an_sdxl_file_is_named_as_one(made, tmp_path):
    """Its projections are SD 2.x's, its text encoders are elsewhere."""

    def change(tensors):
        for key in [k for k in tensors if k.startswith("cond_stage_model.")]:
            tensors[key.replace("cond_stage_model", "conditioner.embedders.1")] = tensors.pop(key)
        tensors[UNET + "label_emb.0.0.weight"] = torch.zeros(8, 8)

    with pytest.raises(ConfigError, match="xl.safetensors: unet: an SDXL UNet"):
        Teacher.load(edited(made[2][1], tmp_path / "xl.safetensors", change))


def test_truncated_files_are_named(made, changed, tmp_path):
    file = tmp_path / "short.safetensors"
    file.write_bytes(made[1][1].read_bytes()[:-100])
    with pytest.raises(ConfigError, match="short.safetensors: truncated or damaged .*again"):
        Teacher.load(file)
    folder = changed({})
    for part in NAMES.values():
        weights = next((folder / part).glob("*.safetensors"))
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        with pytest.raises(ConfigError, match=f"{part}/{weights.name}: truncated or damaged"):
            Teacher.load(folder)
        weights.write_bytes(whole)


def sharded(folder, variant=None):
    """A folder with each part's weights in several files and an index."""
    for part, module in zip(("unet", "vae", "text_encoder"), Teacher.load(folder).modules(), strict=True):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        module.save_pretrained(folder / part, max_shard_size="1MB" if part == "unet" else "300KB", variant=variant)
    return folder


@pytest.mark.parametrize("variant", (None, "fp16"))
def test_sharded_weights(changed, teachers, variant, capfd):
    folder = sharded(changed({}), variant)
    assert all(len(list((folder / part).glob("*.safetensors"))) > 1 for part in NAMES.values())
    capfd.readouterr()
    teacher = Teacher.load(folder)
    assert capfd.readouterr().err == ""  # no bar
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), teachers[1][0].parameters(), strict=True))
    lost = sorted((folder / "unet").glob("*.safetensors"))[1]
    lost.unlink()  # as of a download that was interrupted
    with pytest.raises(ConfigError, match=f"changed: unet/{lost.name} is missing"):
        Teacher.load(folder)
    assert not loading._holds(loading.Folder(folder), ("unet",)) and loading._holds(loading.Folder(folder), ("vae",))


def test_weights_in_pickles_are_read_without_a_word(changed, teachers, caplog):
    folder = changed({})
    for part, stem in zip(NAMES.values(), ("diffusion_pytorch_model", "diffusion_pytorch_model", "pytorch_model")):
        weights = next((folder / part).glob("*.safetensors"))
        torch.save(load_file(weights), folder / part / f"{stem}.bin")
        weights.unlink()
    logging.getLogger("diffusers").addHandler(caplog.handler)  # it does not propagate
    try:
        teacher = Teacher.load(folder)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), teachers[1][0].parameters(), strict=True))


def test_a_tokenizer_without_its_configuration_is_not_guessed(changed):
    folder = changed({})
    (folder / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="changed: tokenizer/tokenizer_config.json is missing"):
        Teacher.load(folder, parts=("text",))


@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_older_versions(made, teachers, tmp_path, version):
    """As SD's own repositories hold them: transformers 4's names and tokenizer files, diffusers 0.6's VAE and scheduler."""
    folder = shutil.copytree(made[version][0], tmp_path / "old")

    def renamed(part, change):
        weights = next((folder / part).glob("*.safetensors"))
        save_file({change(k): v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})

    def attention(name):
        for now, then in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(now, then) if "attentions" in name else name
        return name

    renamed("text_encoder", lambda name: f"text_model.{name}")
    renamed("vae", attention)
    assert any("proj_attn" in name for name in load_file(next((folder / "vae").glob("*.safetensors"))))
    model = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "tokenizer/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    special = {key: dict(content=word, lstrip=False, normalized=True, rstrip=False, single_word=False)
               for key, word in (("bos_token", "<|startoftext|>"), ("eos_token", END), ("unk_token", END))}  # fmt: skip
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": END if version == 1 else "!"}
    typed = {key: {"__type": "AddedToken", **word} for key, word in special.items()}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({**about, **typed}))
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps({**special, "pad_token": about["pad_token"]}))
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    kept = {k: scheduler[k] for k in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")}
    old = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "skip_prk_steps": True, "set_alpha_to_one": False}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**kept, **old}))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"not read")
    teacher, expected = Teacher.load(folder), teachers[version][0]
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), expected.parameters(), strict=True))
    assert torch.equal(teacher.embed(CAPTIONS), expected.embed(CAPTIONS))
    assert torch.equal(teacher.alphas_cumprod, expected.alphas_cumprod)
    assert fingerprint(folder).keys() >= {"tokenizer/vocab.json", "tokenizer/merges.txt"}


@pytest.mark.parametrize("part", NAMES.values())
def test_a_missing_tensor_is_not_made_up(changed, part):
    folder = changed({})
    weights = next((folder / part).glob("*.safetensors"))
    tensors = load_file(weights)
    lost = sorted(tensors)[5]
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"changed: {part}: tensor {lost} is missing"):
        Teacher.load(folder)


def test_other_files_and_paths(made, tmp_path):
    (tmp_path / "sd.ckpt").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="sd.ckpt is not a .safetensors file"):
        Teacher.load(tmp_path / "sd.ckpt")
    with pytest.raises(ConfigError, match=r"stabilityai/sd does not exist \(expected .*hf-hub:ORG/NAME"):
        Teacher.load("stabilityai/sd")  # nothing is fetched unasked
    part = next((made[1][0] / "unet").glob("*.safetensors"))
    with pytest.raises(ConfigError, match="it has no VAE|it has no UNet.*a diffusers model is named by its folder"):
        Teacher.load(part)
    with pytest.raises(ValueError, match="parts: .*expected some of"):
        Teacher.load(made[1][0], parts=("unet", "tokenizer"))


def test_a_dtype_or_device_that_is_not_there(made, monkeypatch):
    with pytest.raises(ConfigError, match="dtype torch.int8, expected one of torch.float16, torch.bfloat16"):
        Teacher.load(made[1][0], dtype=torch.int8)
    with pytest.raises(ConfigError, match="torch.float32 on cuda:77: "):
        Teacher.load(made[1][0], device="cuda:77")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match="cuda has no bfloat16; expected float16 or float32"):
        Teacher.load(made[1][0], device="cuda", dtype=torch.bfloat16)


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_a_hub_id_on_disk_is_not_fetched(made, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "_fetch", lambda *_: pytest.fail("fetched"))
    repository = tmp_path / "models--org--sd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    shutil.copytree(made[1][0], repository / "snapshots" / "c0ffee")
    teacher = Teacher.load("hf-hub:org/sd", parts=("vae",))
    assert teacher.latent_shape == sd.LATENT and fingerprint("hf-hub:org/sd") == fingerprint(made[1][0])
    snapshot, fetched = repository / "snapshots" / "c0ffee", []
    next((snapshot / "unet").glob("*.safetensors")).unlink()
    (snapshot / "tokenizer/tokenizer.json").unlink()
    monkeypatch.setattr(loading, "_fetch", lambda name, parts: fetched.append(parts) or made[1][0])  # what is not there
    for part in ("unet", "text"):
        assert len(Teacher.load("hf-hub:org/sd", parts=(part,)).modules()) == 1
    assert fetched == [("unet",), ("text",)]


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("hf-hub:org/nothing-of-this-name", "hf-hub:not a name"):
        with pytest.raises(ConfigError, match=f"^teacher.path {name}: .+$") as caught:
            Teacher.load(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="teacher.path hf-hub:org/nothing: not on disk"):
        fingerprint("hf-hub:org/nothing")


def test_what_is_fetched_of_a_hub_id():
    """Of the files as SD 1.5's repository lists them."""
    from huggingface_hub.utils import filter_repo_objects

    stem = "diffusion_pytorch_model"
    weights = [f"{p}/{stem}{v}.{s}" for p in ("unet", "vae") for v in ("", ".fp16", ".non_ema") for s in ("safetensors", "bin")]
    weights += ["text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "safety_checker/model.safetensors",
                "v1-5-pruned.safetensors", "v1-5-pruned.ckpt"]  # fmt: skip
    configs = ["model_index.json", *(f"{n}/config.json" for n in NAMES.values()), "scheduler/scheduler_config.json"]
    tokenizer = ["tokenizer/vocab.json", "tokenizer/merges.txt"]

    def fetched(*parts):
        wanted, unwanted = loading._patterns(parts)
        return set(filter_repo_objects([*weights, *configs, *tokenizer], allow_patterns=wanted, ignore_patterns=unwanted))

    assert fetched("unet") == {*configs, f"unet/{stem}.safetensors"}
    assert fetched("vae", "text") == {*configs, *tokenizer, f"vae/{stem}.safetensors", "text_encoder/model.safetensors"}


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_contents_alone(made, tmp_path):
    folder, file = made[1]
    found = fingerprint(folder)
    assert set(found) == {
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
    }  # fmt: skip
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("not read")
    assert fingerprint(tmp_path / "copy") == found
    assert fingerprint(str(file)) == {file.name: files.digest(file)}
    assert fingerprint("world").keys() >= {"unet/diffusion_pytorch_model.safetensors", "vae/config.json"}
    for name in found:
        path = tmp_path / "copy" / name
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
        now = fingerprint(tmp_path / "copy")
        assert {key for key in found if found[key] != now[key]} == {name}
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    (tmp_path / "abc").write_bytes(b"abc" * 1000)
    assert files.digest(tmp_path / "abc") == "1f4eedc808f726f7f77e090bc603382f"  # of every machine


def test_a_large_file_is_sampled(tmp_path):
    """Here a file of 96 MiB that is mostly a hole; a real one is read as little."""
    path, size = tmp_path / "large", 96 << 20
    path.touch()
    os.truncate(path, size)
    empty, found = files.digest(path), set()
    for place in (0, files.MIB - 1, size - 1, size - files.MIB, 21 * (size - files.BLOCK) // 63 + 7):
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        found.add(files.digest(path))
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"\0")
    assert len(found) == 5 and empty not in found and files.digest(path) == empty
    os.truncate(path, size + 1)
    assert files.digest(path) != empty
