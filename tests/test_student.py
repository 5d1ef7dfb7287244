"""The student: shapes, plain open_clip's own features, round trips, what trains, and clear errors."""

import json
import shutil

import open_clip
import pytest
import tiny
import torch

from fastsds.config import ConfigError, StudentConfig
from fastsds.student import HEAD_FILE, WEIGHTS_FILE, LatentHead, apply_tuning, load_student, make_student, save_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("resnet"), resnet=True)


def plain(folder):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def test_output_shapes_and_dtypes(folder):
    student = load_student(folder, latent_shape=tiny.LATENT)
    out = student(tiny.pixels(3), student.tokenize(tiny.captions(5)))
    assert out.image_raw.shape == out.image.shape == (3, 12)
    assert out.text.shape == (5, 12)
    assert out.z.shape == (3, *tiny.LATENT)
    assert out.logit_scale.shape == ()
    assert {v.dtype for v in out} == {torch.float32}
    assert student(None, student.tokenize(["a"])).image_raw is None
    assert student(tiny.pixels(1)).text is None
    assert load_student(folder)(tiny.pixels(1)).z is None


def test_features_are_plain_open_clips(folder):
    from torchvision.transforms.functional import to_pil_image

    student, (model, preprocess, tokenizer) = load_student(folder).eval(), plain(folder)
    pixels, captions = tiny.pixels(4), tiny.captions(4)
    with torch.no_grad():
        out = student(pixels, student.tokenize(captions))
        image = model.encode_image(torch.stack([preprocess(to_pil_image(p)) for p in pixels]))
        text = model.encode_text(tokenizer(captions), normalize=True)
    torch.testing.assert_close(out.image_raw, image)
    assert torch.equal(out.text, text)
    assert torch.equal(out.logit_scale, model.logit_scale.exp())


def test_round_trip_through_plain_open_clip_is_bit_equal(folder, tmp_path):
    student = load_student(folder, latent_shape=tiny.LATENT)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    pixels, captions = tiny.pixels(4), tiny.captions(4)
    student.eval()
    with torch.no_grad():  # in training, attention takes another path with other roundings
        before = student(pixels, student.tokenize(captions))
    for name, like in (("student", student), ("folder", tmp_path / "student")):
        save_student(student.state_dict(), like, tmp_path / name)
        model, _, tokenizer = plain(tmp_path / name)
        assert model.logit_scale.shape == ()
        assert model.visual.preprocess_cfg["mean"] == [0.5, 0.4, 0.3]
        with torch.no_grad():
            assert torch.equal(before.image_raw, model.encode_image(student.normalise(pixels)))
            assert torch.equal(before.text, model.encode_text(tokenizer(captions), normalize=True))
        again = load_student(tmp_path / name).eval()  # the head comes back with its own latent shape
        with torch.no_grad():
            after = again(pixels, again.tokenize(captions))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not list((tmp_path / name).glob("*.partial"))


def test_save_refuses_a_foreign_tensor(folder, tmp_path):
    student = load_student(folder)
    with pytest.raises(ValueError, match="teacher.unet.x"):
        save_student({**student.state_dict(), "teacher.unet.x": torch.zeros(1)}, student, tmp_path)


def test_named_architecture_saves_a_folder_that_open_clip_loads(tmp_path, folder, monkeypatch):
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name")
    config["text_cfg"]["vocab_size"] = 49408
    (tmp_path / "tiny-named.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path / "tiny-named.json")
    student = load_student("tiny-named", latent_shape=tiny.LATENT).eval()
    save_student(student.state_dict(), student, tmp_path / "out")
    model, _, tokenizer = plain(tmp_path / "out")
    with torch.no_grad():
        text = model.encode_text(tokenizer(["a red ring"]), normalize=True)
        assert torch.equal(text, student(None, student.tokenize(["a red ring"])).text)
    open_clip.factory._MODEL_CONFIGS.pop("tiny-named")


def test_head_reads_the_normalised_embedding():
    head = LatentHead(8, (2, 3, 3)).double()
    f = torch.randn(5, 8, dtype=torch.float64)
    assert torch.allclose(head(f), head(7.5 * f))
    assert torch.allclose(LatentHead.features(f).square().mean(dim=1), torch.ones(5, dtype=torch.float64))


def test_head_and_towers_follow_the_seed(folder):
    heads = [load_student(folder, latent_shape=tiny.LATENT, seed=s).head.linear.weight for s in (0, 0, 1)]
    state = torch.random.get_rng_state()
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    load_student(folder, latent_shape=tiny.LATENT)
    assert torch.equal(state, torch.random.get_rng_state())


def test_any_caption_ends_in_the_end_token_and_has_no_unknown(folder):
    student = load_student(folder)
    odd = ["", "a red ring", "x " * 300, "naïve 雪\U0001f600 ☃", "tab\tnew\nline", "A RED RING"]
    tokens, end = student.tokenize(odd), student.clip.vocab_size - 1
    assert tokens.shape == (6, tiny.CONTEXT)
    assert torch.equal(tokens.argmax(dim=1), (tokens == end).int().argmax(dim=1))
    assert bool((tokens == end).any(dim=1).all())
    assert int(tokens[2, -1]) == end and int((tokens[2] == end).sum()) == 1  # cut, the end kept
    assert torch.equal(tokens[1], tokens[5])
    assert int((tokens[3] != end).sum()) > 8  # bytes, not the unknown token


def test_layernorm_tuning_trains_norms_and_head_alone(folder):
    student = load_student(folder, latent_shape=tiny.LATENT)
    names = apply_tuning(student, "layernorm")
    assert names == [n for n, p in student.named_parameters() if p.requires_grad]
    assert set(names) == {
        f"{norm}.{part}"
        for norm in (
            "clip.visual.ln_pre",
            "clip.visual.ln_post",
            "clip.visual.transformer.resblocks.0.ln_1",
            "clip.visual.transformer.resblocks.0.ln_2",
            "clip.transformer.resblocks.0.ln_1",
            "clip.transformer.resblocks.0.ln_2",
            "clip.ln_final",
            "head.linear",
        )
        for part in ("weight", "bias")
    }
    assert not [n for n in apply_tuning(student, "layernorm", head=False) if n.startswith("head.")]
    assert apply_tuning(student, "all") == [n for n, _ in student.named_parameters()]
    with pytest.raises(ConfigError, match="student.tune: 'norms', expected layernorm, all, lora or a list"):
        apply_tuning(student, "norms")


def test_batchnorm_trains_its_affine_part_and_freezes_statistics(resnet):
    student = load_student(resnet, latent_shape=tiny.LATENT).train()
    names = apply_tuning(student, "layernorm")
    assert "clip.visual.bn1.weight" in names and "clip.visual.conv1.weight" not in names
    before = {k: v.clone() for k, v in student.state_dict().items() if "running" in k}
    whole = student(tiny.pixels(4, size=32)).image_raw
    parts = torch.cat([student(p).image_raw for p in tiny.pixels(4, size=32).split(2)])
    torch.testing.assert_close(whole, parts)  # no statistics of the batch
    whole.sum().backward()
    assert before and all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())
    assert student.clip.visual.bn1.weight.grad is not None
    assert student.clip.visual.conv1.weight.grad is None


def test_logit_scale_stays_within_clips_limit(folder, tmp_path):
    student = load_student(folder)
    student.clip.logit_scale.data.fill_(9.0)
    assert student().logit_scale.item() == pytest.approx(100.0)
    save_student(student.state_dict(), student, tmp_path)
    assert plain(tmp_path)[0].logit_scale.exp().item() == pytest.approx(100.0)


def test_pixels_of_a_wrong_kind(folder):
    student = load_student(folder)
    for wrong in (tiny.pixels(2).float(), tiny.pixels(2, size=24)):
        with pytest.raises(ValueError, match=r"uint8 \[B, 3, 16, 16\]"):
            student(wrong)


def broken(folder, tmp_path, change):
    out = tmp_path / "broken"
    shutil.copytree(folder, out)
    config = json.loads((out / "open_clip_config.json").read_text())
    change(out, config)
    (out / "open_clip_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, c: (out / WEIGHTS_FILE).unlink(), "no weights"),
        (lambda out, c: c["model_cfg"]["text_cfg"].update(hf_tokenizer_name=""), "past the text tower"),
        (lambda out, c: c["model_cfg"]["text_cfg"].update(pool_type="eos", eos_id=5), "end token"),
        (lambda out, c: c["model_cfg"].update(embed_dim=13), "open_clip_model.safetensors: tensor text_projection is"),
        (lambda out, c: c.pop("model_cfg"), "model_cfg"),
    ],
)
def test_a_broken_folder_is_one_clear_error(folder, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_student(broken(folder, tmp_path, change))


def test_a_head_for_other_latents_is_an_error(folder, tmp_path):
    student = load_student(folder, latent_shape=tiny.LATENT)
    save_student(student.state_dict(), student, tmp_path)
    with pytest.raises(ConfigError, match=HEAD_FILE):
        load_student(tmp_path, latent_shape=(4, 8, 8))


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "local-dir:nowhere"])
def test_an_unknown_model_is_an_error(name):
    with pytest.raises(ConfigError, match="student.model"):
        load_student(name)


def test_a_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="open_clip_config.json is missing"):
        load_student(tmp_path)


def test_a_named_architecture_on_the_meta_device_fetches_nothing():
    config = StudentConfig(model="ViT-L-14-quickgelu", pretrained="openai", tune="layernorm")
    student, trained = make_student(config, device="meta")
    assert student.width == 768 and student.image_size == 224 and student.context_length == 77
    assert sum(p.numel() for p in student.parameters()) == 427_616_513
    assert len(trained) == 2 * (24 * 2 + 2 + 12 * 2 + 1)
