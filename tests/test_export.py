"""What leaves the house: plain open_clip and plain transformers give the trained student's features, or nothing is left."""

import copy
import json
import shutil
import socket

import numpy as np
import pytest
import runs
import tiny
import torch
from PIL import Image
from reload import CAPTIONS, agree, open_clip_says, transformers_says
from safetensors.torch import load_file, save_file

from fastsds import cli, export
from fastsds.config import ConfigError
from fastsds.export import card, check, hf, origin
from fastsds.student import load_student

KINDS = {
    "gelu": {},
    "quick_gelu": {"model_cfg.quick_gelu": True},
    "tanh": {f"model_cfg.{section}.act_kwargs": {"approximate": "tanh"} for section in ("vision_cfg", "text_cfg")},
    "custom_text": {"model_cfg.custom_text": True, "model_cfg.text_cfg.pool_type": "eos", "model_cfg.text_cfg.eos_id": 513},
    "odd": {
        "model_cfg.vision_cfg.mlp_ratio": 2.6, "model_cfg.vision_cfg.norm_kwargs": {"eps": 1e-3},
        "model_cfg.vision_cfg.layers": 2, "model_cfg.vision_cfg.pos_embed_type": "sin_cos_2d",
        "model_cfg.vision_cfg.patch_dropout": 0.5,
        "model_cfg.vision_cfg.final_ln_after_pool": True, "preprocess_cfg.resize_mode": "squash",
        "preprocess_cfg.interpolation": "bilinear",
    },
    "openai": {
        "model_cfg.text_cfg.hf_tokenizer_name": None, "model_cfg.text_cfg.vocab_size": 49408,
        "model_cfg.text_cfg.context_length": 77, "model_cfg.text_cfg.layers": 2,
    },
}  # fmt: skip


def changed(config: dict, changes: dict) -> dict:
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *sections, key = path.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[key] = value
        if value is None:
            del node[key]
    return config


def make(folder, changes):
    """An open_clip folder with random weights, norms and biases included: no two tensors could be exchanged unseen."""
    from open_clip.model import CLIP, CustomTextCLIP

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = changed(tiny.student_config(tiny.save_tokenizer(folder)), changes)
        of = dict(config["model_cfg"])
        clip = (CustomTextCLIP if of.pop("custom_text", False) else CLIP)(**of)
        for parameter in clip.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    if "hf_tokenizer_name" not in config["model_cfg"]["text_cfg"]:
        for file in folder.glob("token*"):
            file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("students"), {}

    def get(kind):
        if kind not in made:
            made[kind] = make(folder / kind, KINDS[kind])
        return made[kind]

    return get


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in the embedded world's own terms: tiny, evaluated by nobody, with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("tiny")
    argv = ["--recipe", runs.write_recipe(folder), *runs.sets("steps=4", "checkpoint_every=2", "log_every=2")]
    assert runs.train(*argv, "--output", folder / "run") == 0
    return folder / "run"


def command(source, to, out, *more) -> int:
    return cli.main(["export", str(source), "--to", to, "--out", str(out), *more])


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_plain_open_clip_and_transformers_reload_what_was_exported(students, tmp_path, kind):
    source = students(kind)
    for to, says in (("open_clip", open_clip_says), ("hf", transformers_says)):
        assert command(source, to, tmp_path / to) == 0
        agree(open_clip_says(source), says(tmp_path / to))
    assert {path.name for path in tmp_path.iterdir()} == {"open_clip", "hf"}  # no partial folder


@pytest.mark.parametrize("kind", ["gelu", "odd", "openai", "tanh"])
def test_from_transformers_to_open_clip(students, tmp_path, kind):
    assert command(students(kind), "hf", tmp_path / "hf") == 0
    (tmp_path / "back").mkdir()
    export._to_open_clip(tmp_path / "hf", None, tmp_path / "back")
    agree(transformers_says(tmp_path / "hf"), open_clip_says(tmp_path / "back"))


def test_a_siglip_is_refused_for_open_clip(tmp_path):
    from transformers import SiglipConfig

    SiglipConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a siglip: .* expected --to hf"):
        hf.to_open_clip(tmp_path)


@pytest.mark.parametrize(
    ("kind", "shape"), [("gelu", (40, 31)), ("gelu", (17, 90)), ("odd", (40, 31)), ("odd", (16, 50)), ("gelu", (16, 16))]
)
def test_images_are_resized_and_cut_as_open_clip_does(students, tmp_path, kind, shape):
    """To two levels of 255: transformers rounds the resized image from other arithmetic."""
    import open_clip
    from transformers import AutoProcessor

    assert command(students(kind), "hf", tmp_path / "hf") == 0
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{students(kind)}")
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize(shape, Image.Resampling.BICUBIC)
    ours = preprocess(image)
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf").image_processor(image, return_tensors="pt").pixel_values[0]
    std = torch.tensor(json.loads((students(kind) / "open_clip_config.json").read_text())["preprocess_cfg"]["std"])
    levels = (ours - theirs).abs() * std.view(3, 1, 1) * 255
    assert ours.shape == theirs.shape == (3, 16, 16) and levels.max() < 2.01 and ours.std() > 0.3


def test_open_clips_own_tokenizer_in_transformers(students, tmp_path):
    from open_clip import SimpleTokenizer
    from transformers import AutoTokenizer

    assert command(students("openai"), "hf", tmp_path / "hf") == 0
    ours, theirs = SimpleTokenizer(), AutoTokenizer.from_pretrained(tmp_path / "hf")
    captions = [*CAPTIONS, *check.CAPTIONS, "a_b-c/d 12345 ½", "👩‍👩‍👧 family", "CAFÉ's don't I'LL", "…—–", "\tan\n old  man "]
    a, b = ours(captions), theirs(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ends = (a == 49407).int().argmax(dim=1)
    assert torch.equal(ends, (b == 49407).int().argmax(dim=1)) and ends.max() == 76
    for row, other, end in zip(a, b, ends, strict=True):
        assert torch.equal(row[: end + 1], other[: end + 1])


def test_a_folder_loads_elsewhere_and_without_a_network(students, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    for to, says in (("open_clip", open_clip_says), ("hf", transformers_says)):
        assert command(students("gelu"), to, f"made_{to}") == 0
        shutil.move(tmp_path / f"made_{to}", tmp_path / "elsewhere" / to)
        agree(open_clip_says(students("gelu")), says(tmp_path / "elsewhere" / to))


# -- from a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", export.FORMATS)
def test_train_export_reload(run, tmp_path, to):
    """From the run, its checkpoint, its student's folder; the head only where it was asked for."""
    says = {"open_clip": open_clip_says, "hf": transformers_says}[to]
    for name, source in (("run", run), ("checkpoint", runs.at(run, 2)), ("student", run / "student")):
        assert command(source, to, tmp_path / name) == 0
        agree(open_clip_says(source if name == "student" else source / "student"), says(tmp_path / name))
        assert not (tmp_path / name / "head.safetensors").exists()
    assert not torch.allclose(says(tmp_path / "run")[0], says(tmp_path / "checkpoint")[0], atol=1e-3)  # training went on
    assert command(run, to, tmp_path / "with_head", "--head") == 0
    ours, theirs = (load_file(folder / "head.safetensors") for folder in (tmp_path / "with_head", run / "student"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if to == "open_clip":
        assert load_student(tmp_path / "with_head").latent_shape == tiny.LATENT


def test_the_card_says_where_it_comes_from(run, tmp_path):
    from huggingface_hub import ModelCard

    assert command(run, "hf", tmp_path / "mine", "--head") == 0
    loaded = ModelCard.load(tmp_path / "mine" / "README.md")
    assert loaded.data.library_name == "transformers" and "sds-clip" in loaded.data.tags and loaded.data.license is None
    text, state = loaded.text, json.loads((runs.at(run, 4) / "state.json").read_text())
    last = runs.rows(run)[-1]
    for wanted in (
        "# mine\n", 'CLIPModel.from_pretrained("mine")', "lambda: 30.0", "steps: 4", "caption | random", "head.safetensors",
        f"| identity | {state['identity']} |", f"| samples | {state['samples']} |", "trained to step 4, plain torch on 1",
        state["commit"], f"torch {state['versions']['torch']}", f"step 4: loss {last['loss']:.4g}", "made no evaluation",
        "not reproduced on real data",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert str(run) not in text and str(run.parent) not in text  # no folder of this machine
    assert command(run / "student", "open_clip", tmp_path / "bare") == 0
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "create_model_from_pretrained" in bare and bare.count("Not known.") == 3 and "hf_tokenizer_name" in bare


def test_the_card_has_the_runs_results_with_their_n_and_intervals(tmp_path):
    from fastsds.evaluation.statistics import paired_bootstrap

    argv = runs.sets("steps=2", "data.batch=8", "eval.every=1", "eval.items=7", "checkpoint_every=1", "log_every=1")
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    assert command(tmp_path / "run", "hf", tmp_path / "end") == 0
    assert command(runs.at(tmp_path / "run", 1), "hf", tmp_path / "middle") == 0
    first, middle, last = runs.rows(tmp_path / "run", "eval")
    rows = [row for row in runs.evaluation(tmp_path / "run", 2).rows if row["about"]["split"] == "dev"]
    scores = [row["scores"] for row in rows if "scores" in row]
    right = [100.0 * (s[0][0] > s[1][0] and s[1][1] > s[0][1]) for s in scores]
    interval = paired_bootstrap(right, [0.0] * 21)
    text = (tmp_path / "end" / "README.md").read_text()
    said = f"| dev/text | {first['dev/text']:.1f} | {last['dev/text']:.1f} | [{interval.low:.1f}, {interval.high:.1f}] |"
    assert said in text and "| step 0 | step 2 |" in text and "Suite `world_dev`" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| dev/swap_object |")]
    assert line.endswith("| 7 |")
    (line,) = [line for line in text.splitlines() if line.startswith("| seen/retrieval |")]
    assert line.endswith("] | 300 |")
    text = (tmp_path / "middle" / "README.md").read_text()  # a checkpoint's card ends where it was made
    assert "| step 1 |" in text and "step 2 |" not in text and f"{middle['dev/image']:.1f}" in text


@pytest.mark.parametrize(
    ("model", "pretrained", "repo", "words"),
    [
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hf-hub:laion"),
        ("ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "`ViT-B-32`, `laion2b_s34b_b79k`"),
        ("ViT-B/32", "openai", "timm/vit_base_patch32_clip_224.openai", "`ViT-B/32`, `openai`"),
        ("ViT-B-32", "/home/someone/mine.pt", None, "`ViT-B-32`, `mine.pt`"),
        ("/home/someone/clip", None, None, "`clip`"),
        ("local-dir:/home/someone/clip", None, None, "`local-dir:clip`"),
        ("world", None, None, "embedded world"),
    ],
)
def test_what_training_started_from(model, pretrained, repo, words):
    found, said = card.base_model({"student": {"model": model, "pretrained": pretrained}})
    assert found == repo and words in said and "someone" not in said


def test_no_folder_and_no_command_of_the_machine_is_in_a_card(run, tmp_path):
    state = origin.find(run)
    state.recipe["student"]["model"] = "local-dir:/home/someone/clip"
    state.recipe["data"]["source"] = "pipe:/opt/secret/curl -H 'key: 1234' https://example.org/{000..999}.tar"
    state.recipe["output"] = "../../someone/run"
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    card.write(tmp_path, "mine", "hf", state, 0.0, converted=False)
    text = (tmp_path / "README.md").read_text()
    assert "local-dir:clip" in text and text.count("pipe:curl ...") == 2 and "output: run\n" in text
    assert not [word for word in ("someone", "secret", "1234", "example.org") if word in text]


def test_a_run_that_went_back_has_the_state_of_the_student_that_it_finished(run, tmp_path):
    """A run that is done, gone back and stopped: student/ is still what it was at its end."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(runs.at(tmp_path / "run", 4))
    found = origin.find(tmp_path / "run")
    assert found.state is None and found.recipe["steps"] == 4
    assert origin.find(run).state["step"] == 4


def test_an_earlier_suite_is_not_compared_with_a_later_one(tmp_path):
    argv = runs.sets("data.batch=8", "steps=2", "eval.every=0", "eval.items=4", "checkpoint_every=1", "log_every=1")
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    how = [*argv, *runs.sets("eval.suite=world_test"), "--output", tmp_path / "run", "--resume", runs.at(tmp_path / "run", 1)]
    assert runs.train(*how) == 0
    assert [row["suite"] for row in runs.rows(tmp_path / "run", "eval")] == ["world_dev", "world_test"]
    assert command(tmp_path / "run", "open_clip", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| step 2 | step 2 |" in text and "step 0" not in text


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "vision_cfg.layers is [1, 1, 1, 1], a ResNet": {"model_cfg.vision_cfg.layers": [1, 1, 1, 1]},
    "vision_cfg.timm_model_name is 'vit_tiny'": {"model_cfg.vision_cfg.timm_model_name": "vit_tiny"},
    "vision_cfg.attentional_pool is True": {"model_cfg.vision_cfg.attentional_pool": True},
    "vision_cfg.no_ln_pre is True": {"model_cfg.vision_cfg.no_ln_pre": True},
    "vision_cfg.pool_type is 'avg'": {"model_cfg.vision_cfg.pool_type": "avg"},
    "vision_cfg.ls_init_value is 0.1": {"model_cfg.vision_cfg.ls_init_value": 0.1},
    "vision_cfg.qk_norm is True": {"model_cfg.vision_cfg.qk_norm": True},
    "vision_cfg.patch_size is [8, 4], not square": {"model_cfg.vision_cfg.patch_size": [8, 4]},
    "text_cfg.hf_model_name is 'roberta-base'": {"model_cfg.text_cfg.hf_model_name": "roberta-base"},
    "text_cfg.embed_cls is True": {"model_cfg.text_cfg.embed_cls": True},
    "text_cfg.no_causal_mask is True": {"model_cfg.text_cfg.no_causal_mask": True},
    "text_cfg.pool_type is 'last'": {"model_cfg.text_cfg.pool_type": "last"},
    "text_cfg.proj_bias is True": {"model_cfg.text_cfg.proj_bias": True},
    "text_cfg.proj_type is 'none'": {"model_cfg.text_cfg.proj_type": "none"},
    "text_cfg.tokenizer_kwargs is {'clean': 'lower'}": {"model_cfg.text_cfg.tokenizer_kwargs": {"clean": "lower"}},
    "init_logit_bias (a SigLIP loss)": {"model_cfg.init_logit_bias": -10.0},
    "preprocess_cfg.resize_mode is 'longest'": {"preprocess_cfg.resize_mode": "longest"},
}


@pytest.mark.parametrize("feature", REFUSED)
def test_what_transformers_does_not_have_is_refused_by_its_name(feature):
    config = changed(tiny.student_config(514), REFUSED[feature])
    with pytest.raises(ConfigError) as error:
        hf.refuse(config["model_cfg"], config["preprocess_cfg"], "student X")
    assert str(error.value).startswith(f"student X: {feature}") and "--to open_clip" in str(error.value)


def test_a_resnet_goes_to_open_clip_alone(tmp_path, capfd):
    tiny.save_student(tmp_path / "rn", resnet=True)
    assert command(tmp_path / "rn", "hf", tmp_path / "hf") == 2
    assert "a ResNet" in capfd.readouterr().err
    assert command(tmp_path / "rn", "open_clip", tmp_path / "oc") == 0
    agree(open_clip_says(tmp_path / "rn"), open_clip_says(tmp_path / "oc"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["oc", "rn"]


def test_an_activation_and_an_end_token_that_transformers_would_read_otherwise(students, tmp_path):
    import open_clip

    clip = open_clip.create_model(f"local-dir:{students('gelu')}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{students('gelu')}")
    clip.text_pool_type, clip.text_eos_id = "eos", 2
    with pytest.raises(ConfigError, match="eos_id is 2"):
        hf.to_transformers(clip, tokenizer, "student X")
    clip.text_eos_id = 513
    clip.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
    with pytest.raises(ConfigError, match=r"student X: activation ReLU\(\)"):
        hf.to_transformers(clip, tokenizer, "student X")


def tamper(state: dict, name: str) -> None:
    state[name] = state[name].clone()
    state[name].view(-1)[0] += 1e-2


@pytest.mark.parametrize("name", ["vision_model.pre_layrnorm.bias", "text_model.encoder.layers.0.self_attn.k_proj.weight"])
def test_a_wrong_weight_fails_the_export_and_nothing_is_left(students, tmp_path, monkeypatch, capfd, name):
    convert = hf.to_transformers

    def wrong(*args):
        model, processor = convert(*args)
        state = model.state_dict()
        tamper(state, name)
        model.load_state_dict(state)
        return model, processor

    monkeypatch.setattr(hf, "to_transformers", wrong)
    assert command(students("quick_gelu"), "hf", tmp_path / "folders" / "of its" / "out") == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "differs from the student's by" in error[0]
    assert not list(tmp_path.iterdir())


def test_a_wrong_weight_for_open_clip(students, tmp_path, monkeypatch, capfd):
    save = export.save_student

    def wrong(state, *args):
        tamper(state, "clip.visual.proj")
        save(state, *args)

    monkeypatch.setattr(export, "save_student", wrong)
    assert command(students("gelu"), "open_clip", tmp_path / "out") == 2
    assert "image differs from the student's by" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_a_text_tower_that_lies_elsewhere_is_refused(students, tmp_path):
    source = shutil.copytree(students("gelu"), tmp_path / "hf_text")
    file = source / "open_clip_config.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), {"model_cfg.text_cfg.hf_model_name": "roberta-base"})))
    with pytest.raises(ConfigError, match="text_cfg.hf_model_name is 'roberta-base'"):
        export._open_clip(source, None, tmp_path / "out")


def test_bad_input_gets_one_error_and_touches_nothing(run, students, tmp_path, monkeypatch, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "empty").mkdir()
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "student")
    broken = shutil.copytree(runs.at(run, 4), tmp_path / "broken")
    (broken / "state.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "empty")
    recipes = {"yaml": "a: [1", "nothing": "", "other": "steps: 4\n"}
    for name, text in recipes.items():
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "recipe.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    for argv, word in (
        ([tmp_path / "yaml", "hf", tmp_path / "out"], "yaml/recipe.yaml: while parsing"),
        *(([tmp_path / name, "hf", tmp_path / "out"], "recipe.yaml: not a run's recipe") for name in ("nothing", "other")),
        ([students("gelu"), "hf", "."], "has no name"),
        ([students("gelu"), "hf", tmp_path / "full"], "is there and not empty"),
        ([students("gelu"), "hf", tmp_path / "full" / "note"], "is there and not empty"),
        ([students("gelu"), "hf", tmp_path / "out", "--head"], "has no head.safetensors"),
        ([unfinished, "hf", tmp_path / "out"], "no student/ yet"),
        ([broken, "hf", tmp_path / "out"], "state.json: not a checkpoint's"),
        ([tmp_path / "empty", "hf", tmp_path / "out"], "expected a run"),
        ([tmp_path / "nowhere", "hf", tmp_path / "out"], "no such folder"),
    ):
        assert command(*argv) == 2
        error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and word in error[0], (argv, error)
    assert sorted(tmp_path.rglob("*")) == before
    assert command(students("gelu"), "hf", tmp_path / "empty") == 0  # an empty folder is as good as none


def test_a_checkpoint_away_from_its_run(run, tmp_path):
    shutil.copytree(runs.at(run, 2), tmp_path / "moved")
    found = origin.find(tmp_path / "moved")
    assert found.run is None and found.state["step"] == 2 and found.recipe["steps"] == 4
    assert origin.find(runs.at(run, 2)).run.train[-1]["step"] == 2
