"""What loads as a student, with its library's own features; what is saved loads there again; what does not is one error."""

import json
import shutil
import socket
import time

import open_clip
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastsds import hub
from fastsds.config import ConfigError, StudentConfig
from fastsds.student import HEAD_FILE, WEIGHTS_FILE, load_student, make_student, read_student, save_student

MAKERS = {
    "vit": tiny.save_student,
    "resnet": lambda folder: tiny.save_student(folder, resnet=True),
    "openclip_siglip": tiny.save_siglip,
    "clip": lambda folder: tiny.save_hf(folder, "clip"),
    "siglip": lambda folder: tiny.save_hf(folder, "siglip"),
}
FAMILIES = tuple(MAKERS)
CAPTIONS = [*tiny.captions(3), "", "word " * 200, "naïve 雪 \N{SNOWMAN}", "It's 2 o'clock", "A  RED\tring\n!"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make(root / name) for name, make in MAKERS.items()}


def plain(folder, size):
    """(image, text, logit scale, its shape) as the folder's own library gives them, raw."""
    from torchvision.transforms.functional import to_pil_image

    images = [to_pil_image(p) for p in tiny.pixels(3, size=size)]
    if (folder / "open_clip_config.json").is_file():
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
        with torch.no_grad():
            pixels = torch.stack([preprocess(image) for image in images])
            features = model.eval().encode_image(pixels), model.encode_text(tokens)
    else:
        from transformers import AutoModel, AutoProcessor

        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding="max_length", truncation=True)
        with torch.no_grad():
            image = model.get_image_features(inputs["pixel_values"]).pooler_output
            features = image, model.get_text_features(inputs["input_ids"]).pooler_output
    return *features, model.logit_scale.detach().exp().reshape(()), model.logit_scale.shape


def raw_text(student):
    with torch.no_grad():
        return student.family.encode_text(student.clip, student.tokenize(CAPTIONS))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_librarys_own(folders, name):
    student = load_student(folders[name]).eval()
    image, text, scale, _ = plain(folders[name], student.image_size)
    with torch.no_grad():
        out = student(tiny.pixels(3, size=student.image_size), student.tokenize(CAPTIONS))
    for ours, theirs in ((out.image_raw, image), (raw_text(student), text), (out.logit_scale, scale)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.unique(out.text, dim=0).shape[0] == len(CAPTIONS), "captions that differ have features that differ"


def test_an_old_clip_configuration_pools_the_highest_token(folders, tmp_path):
    """eos_token_id 2, as OpenAI's folders have it."""
    folder = shutil.copytree(folders["clip"], tmp_path / "old")
    edit("config.json", text_config={"eos_token_id": 2})(folder)
    torch.testing.assert_close(raw_text(load_student(folder).eval()), raw_text(load_student(folders["clip"]).eval()))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_loads_in_its_library_and_again_here(folders, tmp_path, name):
    student = load_student(folders[name], latent_shape=tiny.LATENT)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    student.eval()
    pixels = tiny.pixels(3, size=student.image_size)
    for like, out in ((student, tmp_path / "a"), (tmp_path / "a", tmp_path / "b")):
        save_student(student.state_dict(), like, out)
        image, text, scale, shape = plain(out, student.image_size)
        assert shape == ((1,) if name == "siglip" else ())  # as that library writes it
        with torch.no_grad():
            ours, again = student(pixels), load_student(out).eval()(pixels)
        torch.testing.assert_close(ours.image_raw, image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw_text(student), text, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.logit_scale, scale)
        assert torch.equal(ours.z, again.z) and torch.equal(ours.image_raw, again.image_raw)
        state = read_student(out)
        assert set(state) == set(student.state_dict())
        assert all(torch.equal(state[key], value.reshape(state[key].shape)) for key, value in student.state_dict().items())
        assert not list(out.glob("*.partial"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_does_not_depend_on_chance_or_on_how_a_batch_is_cut(folders, tmp_path, name):
    """Whatever dropout the configuration has."""
    folder = shutil.copytree(folders[name], tmp_path / name)
    path = next(folder / file for file in ("open_clip_config.json", "config.json") if (folder / file).is_file())
    config = json.loads(path.read_text())
    if "model_cfg" in config:
        config["model_cfg"]["vision_cfg"] |= {"patch_dropout": 0.5} if name == "vit" else {}
        config["model_cfg"]["vision_cfg"] |= {"timm_drop_path": 0.5} if name == "openclip_siglip" else {}
    else:
        config["vision_config"]["attention_dropout"] = config["text_config"]["attention_dropout"] = 0.5
    path.write_text(json.dumps(config))
    student = load_student(folder).train()
    pixels, tokens = tiny.pixels(4, size=student.image_size), student.tokenize(CAPTIONS)
    whole, again = student(pixels, tokens), student(pixels, tokens)
    assert torch.equal(whole.image, again.image) and torch.equal(whole.text, again.text)
    torch.testing.assert_close(torch.cat([student(part).image_raw for part in pixels.split(2)]), whole.image_raw)
    save_student(student.state_dict(), student, tmp_path / "out")
    if "model_cfg" not in config:  # what is saved is the library's own
        assert json.loads((tmp_path / "out" / path.name).read_text())["vision_config"]["attention_dropout"] == 0.5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tune", ["layernorm", "all", "lora"])
def test_on_the_meta_device_names_shapes_and_what_trains_are_the_same(folders, tmp_path, name, tune):
    """No weights are read: there need be none, nor a tokenizer."""
    source, bare = folders[name], tmp_path / name
    bare.mkdir()
    for file in ("open_clip_config.json", "config.json", "preprocessor_config.json"):
        if (source / file).is_file():
            shutil.copy(source / file, bare)
    real, trained = make_student(StudentConfig(model=str(source), tune=tune), tiny.LATENT)
    meta, same = make_student(StudentConfig(model=str(bare), tune=tune), tiny.LATENT, "meta")
    assert same == trained
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    kinds = [
        {key: (t.shape, t.dtype, t.requires_grad) for key, t in student.state_dict(keep_vars=True).items()}
        for student in (real, meta)
    ]
    assert kinds[0] == kinds[1]
    size, length = meta.image_size, meta.context_length
    pixels = torch.empty(2, 3, size, size, dtype=torch.uint8, device="meta")
    out = meta(pixels, torch.empty(3, length, dtype=torch.int64, device="meta"))
    assert out.z.shape == (2, *tiny.LATENT) and out.text.shape == (3, meta.width)
    assert out.z.requires_grad and out.text.requires_grad


def test_siglips_bias_is_constant(folders):
    for name in ("openclip_siglip", "siglip"):
        for tune in ("all", ("clip.*",)):
            student, trained = make_student(StudentConfig(model=str(folders[name]), tune=tune), tiny.LATENT)
            assert "clip.logit_bias" not in trained and not student.clip.logit_bias.requires_grad
            assert "clip.logit_scale" in trained


# -- a named architecture and its weights ------------------------------------------------------------------------------


@pytest.fixture
def named(folders, monkeypatch):
    """open_clip knows the tiny ViT by a name, with its own tokenizer."""
    config = json.loads((folders["vit"] / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"] |= {"hf_tokenizer_name": str(folders["vit"])}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", config)
    return "tiny-vit"


@pytest.fixture
def state(folders):
    return load_file(folders["vit"] / WEIGHTS_FILE)


def write(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_local_checkpoint_of_a_named_architecture(folders, named, state, tmp_path, suffix):
    ours = load_student(named, write(state, tmp_path / f"w{suffix}")).eval()
    torch.testing.assert_close(raw_text(ours), raw_text(load_student(folders["vit"]).eval()), rtol=0, atol=1e-6)
    half = load_student(named, write({k: v.half() for k, v in state.items()}, tmp_path / f"half{suffix}"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_a_checkpoint_of_open_clips_training(named, state, tmp_path):
    saved = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    student = load_student(named, write(saved | {"optimizer": {"state": {}}}, tmp_path / "epoch_3.pt"))
    assert all(torch.equal(student.clip.state_dict()[k].reshape(v.shape), v) for k, v in state.items())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRONG = {
    "shape": (lambda s: s | {"visual.proj": torch.zeros(16, 13)}, r"tensor visual.proj is \(16, 13\), .* \(16, 12\)"),
    "missing": (lambda s: {k: v for k, v in s.items() if k[:8] != "ln_final"}, "tensor ln_final.bias is missing, as are 1"),
    "foreign": (lambda s: s | {"teacher.unet": torch.zeros(1)}, "tensor teacher.unet is not this model's"),
    "bias": (lambda s: s | {"logit_bias": torch.zeros(())}, "tensor logit_bias is not this model's"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("how", [*WRONG, "truncated"])
def test_a_checkpoint_that_does_not_fit_is_one_error(named, state, tmp_path, how, suffix):
    change, message = WRONG.get(how, (dict, "truncated or damaged"))
    path = write(change(state), tmp_path / f"w{suffix}")
    if how == "truncated":
        truncate(tmp_path / f"w{suffix}")
    with pytest.raises(ConfigError, match=message) as caught:
        load_student(named, path)
    assert path in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_is_no_file_of_weights(named, tmp_path):
    write({"epoch": 1}, tmp_path / "no.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "jit.pt"))
    (tmp_path / "w.npz").write_bytes(b"")
    wrong = {"no.pt": "no.pt: ", "jit.pt": "TorchScript", "w.npz": "no weights file", "nowhere.pt": "no tag of tiny-vit"}
    for file, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            load_student(named, str(tmp_path / file))
    with pytest.raises(ConfigError, match="laion2b_s34b_b79k"):  # the tags that there are
        load_student("ViT-B-32", "laion2b")


def test_a_file_takes_the_preprocessing_that_all_tags_of_its_name_agree_on(named, state, tmp_path, monkeypatch):
    path = write(state, tmp_path / "w.safetensors")
    default = list(load_student(named, path).family.mean)
    tags = {"one": {"mean": (0.5, 0.5, 0.5), "std": (0.1,) * 3}, "two": {"mean": (0.5, 0.5, 0.5), "std": (0.2,) * 3}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, named, tags)
    family = load_student(named, path).family
    assert list(family.mean) == [0.5] * 3 != default and list(family.std) != [0.1] * 3 != [0.2] * 3


def test_weights_that_come_with_the_model_take_no_others(folders):
    for model in (str(folders["vit"]), "hf-hub:org/clip"):
        with pytest.raises(ConfigError, match="student.pretrained: 'openai', but .* has its own weights"):
            load_student(model, "openai")


def test_the_gelu_that_the_weights_were_trained_with():
    with pytest.raises(ConfigError, match="the other GELU: expected ViT-B-32-quickgelu"):
        load_student("ViT-B-32", "openai")
    with pytest.raises(ConfigError, match="'clip_vit' is neither a folder nor an open_clip model"):
        load_student("clip_vit")


@pytest.mark.parametrize(("name", "why"), [("coca_ViT-B-32", "a CoCa"), ("coca_roberta-ViT-B-32", "a CoCa")])
def test_what_cannot_be_served_is_refused_by_name(name, why):
    with pytest.raises(ConfigError, match=f"student {name}: {why}"):
        load_student(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["text_cfg"].update(output_tokens=True), "text_cfg.output_tokens is true"),
        (lambda c: c["vision_cfg"].update(image_size=[16, 24]), "images of 16x24, expected square"),
        (lambda c: c["vision_cfg"].update(no_such=1), "no_such"),
    ],
)
def test_a_configuration_that_cannot_be_served(folders, tmp_path, change, message):
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    config = json.loads((folder / "open_clip_config.json").read_text())
    change(config["model_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for device in ("cpu", "meta"):
        with pytest.raises(ConfigError, match=message):
            load_student(folder, device=device)


# -- transformers' folders that do not load ----------------------------------------------------------------------------


def edit(file, **values):
    def change(folder):
        config = json.loads((folder / file).read_text())
        for key, value in values.items():
            nested = isinstance(value, dict) and isinstance(config.get(key), dict)
            config[key] = config[key] | value if nested else value
        (folder / file).write_text(json.dumps(config))

    return change


def without(*names):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in state.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})

    return change


def wider(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"visual_projection.weight": torch.zeros(13, 16)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("config.json", model_type="blip"), "config.json: model_type is 'blip'; expected clip .* or siglip"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: "),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors: truncated or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (without("visual_projection.weight"), "tensor visual_projection.weight is missing"),
        (wider, r"tensor visual_projection.weight is \(13, 16\), by its config.json \(12, 16\)"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (edit("preprocessor_config.json", crop_size={"height": 24, "width": 24}), r"makes images of \[24\], .* expects 16"),
        (edit("preprocessor_config.json", rescale_factor=1.0), "rescales by 1.0, expected 1/255"),
        (edit("config.json", text_config={"eos_token_id": 5}), "does not pool the tokenizer's end token"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (edit("tokenizer_config.json", tokenizer_class="SiglipTokenizer"), "not installed: sentencepiece|tokenizer"),
    ],
)
def test_a_broken_transformers_folder_is_one_error(folders, tmp_path, change, message):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    change(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_student(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_siglip_tower_without_its_head_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["siglip"], tmp_path / "siglip")
    edit("config.json", vision_config={"vision_use_head": False})(folder)
    with pytest.raises(ConfigError, match="vision_use_head is false"):
        load_student(folder)


def test_a_head_for_other_latents_is_an_error(folders, tmp_path):
    student = load_student(folders["clip"], latent_shape=tiny.LATENT)
    save_student(student.state_dict(), student, tmp_path)
    assert load_student(tmp_path).latent_shape == tiny.LATENT
    with pytest.raises(ConfigError, match=HEAD_FILE):
        load_student(tmp_path, latent_shape=(4, 8, 8))


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(monkeypatch):
    """A machine on which every attempt to reach another one is an error."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_local_never_asks_the_network(folders, cut, name):
    load_student(folders[name])


def test_a_local_checkpoint_never_asks_the_network(named, state, tmp_path, cut, monkeypatch):
    path = write(state, tmp_path / "w.pt")
    load_student(named, path)
    elsewhere = open_clip.get_model_config(named)
    elsewhere["text_cfg"]["hf_tokenizer_name"] = "org/its-tokenizer"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", elsewhere)
    with pytest.raises(ConfigError, match=r"org/its-tokenizer is not on this disk .*hf download org/its-tokenizer"):
        load_student(named, path)


def snapshot(cache, repo, folder):
    """A repository in the hub's cache, as huggingface_hub lays it out."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    return shutil.copytree(folder, place / "snapshots" / "c0ffee")


def test_a_hub_id_a_tag_and_hub_weights_are_read_from_the_cache(folders, named, tmp_path, monkeypatch, cut):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    config = json.loads((folders["vit"] / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(folders["vit"])
    place = snapshot(tmp_path, "org/clip", folders["vit"])
    (place / "open_clip_config.json").write_text(json.dumps(config))
    tag = {"hf_hub": "org/clip/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, named, {"mine": tag})
    expected, first = load_student(folders["vit"]), config["preprocess_cfg"]["mean"]
    cases = (("hf-hub:org/clip", None, first), (named, "mine", [0.1, 0.2, 0.3]), (named, "hf-hub:org/clip", first))
    for model, pretrained, mean in cases:
        student = load_student(model, pretrained)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))
        assert list(student.family.mean) == mean
    config["model_cfg"]["quick_gelu"] = True
    (place / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit-quickgelu", config["model_cfg"])
    with pytest.raises(ConfigError, match="the other GELU: expected tiny-vit-quickgelu"):
        load_student(named, "hf-hub:org/clip")
    (place / WEIGHTS_FILE).unlink()  # weights that lack are no random start
    with pytest.raises(ConfigError, match=f"{WEIGHTS_FILE} of hf-hub:org/clip is not on this disk"):
        load_student("hf-hub:org/clip")


ABSENT = {
    "hub": ("hf-hub:org/clip", None, "open_clip_config.json of hf-hub:org/clip"),
    "tag": ("ViT-B-32-quickgelu", "openai", "open_clip_model.safetensors of hf-hub:timm/vit_base_patch32_clip_224.openai"),
    "weights": ("ViT-B-32", "hf-hub:org/clip", "open_clip_config.json of hf-hub:org/clip"),
}


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def refused(model, pretrained, message, seconds):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        load_student(model, pretrained)
    assert time.perf_counter() - began < seconds
    assert "(hf download " in str(caught.value) and "name a local folder" in str(caught.value)


@pytest.mark.parametrize("case", ABSENT)
def test_offline_a_hub_name_fails_at_once_with_what_is_missing(nothing, monkeypatch, case):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(*ABSENT[case][:2], f"{ABSENT[case][2]} is not on this disk, and the hub is not to be asked", 5)


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_that_does_not_answer_is_given_up_within_seconds(nothing, monkeypatch, silent):
    """A port that nobody listens on, and one that takes the call and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PATIENCE", 1.0)
        for model, pretrained, name in ABSENT.values():
            why = "timed out" if silent else ".*refused"
            refused(model, pretrained, rf"{name} is not on this disk, and the hub cannot be reached \({why}", 3)
