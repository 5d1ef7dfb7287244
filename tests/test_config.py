import dataclasses
import json

import pytest

from fastsds import config, strict
from fastsds.config import (
    CONFIGS,
    CLIPTDRecipe,
    ConfigError,
    Recipe,
    as_dict,
    check,
    dump_recipe,
    load_deepspeed,
    load_recipe,
)

WORLD = CONFIGS / "world.yaml"


def fails(*overrides, path=None) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides)
    return str(error.value)


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path
    return write


# the shipped recipe

def test_world_recipe_writes_every_value_and_equals_the_defaults():
    import yaml
    assert yaml.safe_load(WORLD.read_text()).keys() == as_dict(Recipe()).keys()
    assert load_recipe(WORLD) == load_recipe() == Recipe()
    written = strict.parse(WORLD.read_text(), "world.yaml")
    assert written == as_dict(Recipe()), "a key is missing in configs/world.yaml or its value differs"


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().loss.rho = 3.0


def test_dump_and_load_give_the_same_recipe(recipe_file):
    recipe = load_recipe(None, ["loss.lambda=auto", "loss.t=null", "loss.log_snr=[-6, -1.5]", "optimizer.eps=1e-12",
                                "student.pretrained=\"yes: #\"", "output=runs/ü", "seed=-9223372036854775808",
                                "optimizer.lr=0.1234567890123456"])
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


def test_partial_file_takes_defaults(recipe_file):
    recipe = load_recipe(recipe_file("steps: 3\nloss: {lambda: 2}\n"))
    assert recipe == dataclasses.replace(Recipe(), steps=3, loss=dataclasses.replace(Recipe().loss, lambda_=2.0))
    assert load_recipe(recipe_file("")) == Recipe()


# overrides

@pytest.mark.parametrize("override, value", [
    ("optimizer.lr=1e-3", 1e-3), ("optimizer.lr=1.E+2", 100.0), ("optimizer.lr=.5", 0.5), ("optimizer.lr=2", 2.0),
    ("loss.lambda=auto", "auto"), ("loss.lambda=0", 0.0), ("loss.t=[0.3, 1]", (0.3, 1.0)), ("loss.noised=false", False),
    ("data.images=null", None), ("eval.suite=none", "none"), ("steps = 7", 7), ("student.model=ViT-B-32", "ViT-B-32"),
])
def test_override(override, value):
    key = override.partition("=")[0].strip()
    assert config.loading._get(load_recipe(None, [override]), key) == value


def test_later_override_wins_and_pairs_are_checked_together(recipe_file):
    recipe = load_recipe(recipe_file("steps: 5"), ["steps=6", "steps=7", "loss.log_snr=[-3, 1]", "loss.t=null"])
    assert recipe.steps == 7 and recipe.loss.log_snr == (-3.0, 1.0)


# errors: each names where, what, and what was expected

@pytest.mark.parametrize("key, nearest", [
    ("loss.lamda", "loss.lambda"), ("loss.lambda_", "loss.lambda"), ("lr", "optimizer.lr"), ("los.rho", "loss"),
    ("batch", "data.batch"), ("optimizer.weight_dekay", "optimizer.weight_decay"), ("evel", "eval"),
    ("loss.tune", "student.tune"), ("Seed", "seed"), ("data.batchsize", "data.batch"), ("optimiser", "optimizer"),
])
def test_unknown_key_names_the_nearest(key, nearest, recipe_file):
    message = fails(f"{key}=1")
    assert message.startswith(f"--set {key}=1: unknown key ") and nearest in message
    if "." not in key:
        path = recipe_file(f"steps: 3\n{key}: 1\n")
        message = fails(path=path)
        assert str(path) in message and repr(key) in message and nearest in message


@pytest.mark.parametrize("override, expected", [
    ("steps=many", "a whole number"), ("steps=2.5", "a whole number"), ("steps=true", "a whole number"),
    ("steps=null", "a whole number"), ("optimizer.lr=fast", "a number"), ("optimizer.lr=.nan", "a number"),
    ("optimizer.lr=.inf", "a number"), ("optimizer.lr=false", "a number"), ("loss.noised=1", "true or false"),
    ("loss.t=0.5", "a list of 2 numbers or null"), ("loss.t=[0.1, 0.2, 0.3]", "a list of 2 numbers or null"),
    ("loss.t=[a, b]", "a list of 2 numbers or null"), ("output=3", "text"), ("loss.lambda=soon", "a number or auto"),
    ("loss.gradient=sd", "one of sds, amortised, full, latents"),
    ("precision=fp16", "one of fp32, bf16"), ("data=3", "a section"),
    ("student.model=[a]", "text"), ("optimizer.name=sgd", "one of adamw, adamw8bit"),
])
def test_wrong_type_or_choice(override, expected):
    key = override.partition("=")[0]
    message = fails(override)
    assert message.startswith(f"--set {override}: ") and key in message and expected in message


@pytest.mark.parametrize("override, expected", [
    ("data.batch=0", "at least 1"), ("data.accumulation=0", "at least 1"), ("steps=-1", "at least 0"),
    ("loss.lambda=-1", "at least 0"), ("loss.rho=0", "greater than 0"), ("optimizer.lr=0", "greater than 0"),
    ("optimizer.betas=[0.9, 1.0]", "beta < 1"), ("loss.t=[0.6, 0.6]", "lo < hi"), ("loss.t=[0.6, 1.1]", "hi <= 1"),
    ("loss.t=[-0.1, 0.5]", "0 <= lo"), ("seed=9223372036854775808", "64-bit"), ("output=''", "not empty"),
    ("loss.t=null", "exactly one"), ("loss.log_snr=[-1, 1]", "exactly one"), ("loss.shift=1.0", "log_snr only"),
    ("log_every=0", "at least 1"), ("loss.sds_every=0", "at least 1"),
])
def test_out_of_range(override, expected, recipe_file):
    assert expected in fails(override)
    key, _, value = override.partition("=")
    section, _, name = key.rpartition(".")
    path = recipe_file(f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}")
    message = fails(path=path)
    assert expected in message
    if expected not in ("exactly one",):
        assert message.startswith(str(path))


@pytest.mark.parametrize("text, expected", [
    ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is written twice"),
    ("loss: {rho: 1, rho: 2}", "the key 'rho' is written twice"),
    ("seed: [1", "line 1"), ("- a\n- b\n", "a recipe is a section"), ("loss: 3", "loss is a section"),
    ("1: 2", "unknown key '1'"), ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ("loss:\n", "loss is a section"), ("{[a, b]: 1}", "line 1: a key is a list or a section"),
    ("loss: {{x}: 1}", "a key is a list or a section; a text that begins with {"),
    ("seed: {2026-01-01: 1}", "seed is {datetime.date"), ("seed: &a [*a]", "seed is [[...]]; expected a whole number"),
])
def test_malformed_file(text, expected, recipe_file):
    path = recipe_file(text)
    message = fails(path=path)
    assert str(path) in message and expected in message


def test_missing_and_unreadable_files(tmp_path):
    assert "no such recipe file" in fails(path=tmp_path / "none.yaml")
    assert "cannot be read" in fails(path=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in fails(path=tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["seed", "=3", "", "seed 3"])
def test_override_needs_key_and_value(override):
    assert "expected key=value" in fails(override)


# paths

def test_paths_follow_the_recipe_and_overrides_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "clip").mkdir(parents=True)
    (tmp_path / "here" / "ViT-B-32").mkdir(parents=True)
    path = tmp_path / "recipes" / "mine.yaml"
    path.write_text("data: {source: pairs.tsv, images: ../photos}\nteacher: {path: sd}\nstudent: {model: clip}\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(path)
    assert recipe.data.source == str(tmp_path / "recipes" / "pairs.tsv")
    assert recipe.data.images == str(tmp_path / "photos")
    assert recipe.teacher.path == str(tmp_path / "recipes" / "sd")
    assert recipe.student.model == str(tmp_path / "recipes" / "clip")
    assert load_recipe("../recipes/mine.yaml") == recipe

    recipe = load_recipe(path, ["data.source=other.tsv", "teacher.path=world"])
    assert recipe.data.source == str(tmp_path / "here" / "other.tsv") and recipe.teacher.path == "world"
    assert recipe.data.images == str(tmp_path / "photos")
    assert load_recipe(path, ["student.model=ViT-B-16"]).student.model == "ViT-B-16"
    assert load_recipe(path, ["student.model=ViT-B-32"]).student.model == str(tmp_path / "here" / "ViT-B-32")
    assert load_recipe(path, ["student.model=./ViT-B-16"]).student.model == str(tmp_path / "here" / "ViT-B-16")
    assert load_recipe(None, ["student.model=hf-hub:a/b"]).student.model == "hf-hub:a/b"
    assert load_recipe(None).output == "runs/world", "the run folder stays relative to the current folder"


# the ranks and the DeepSpeed file

def test_batch_must_divide_by_the_ranks():
    check(Recipe(), 4)
    with pytest.raises(ConfigError, match="data.batch is 32.*a multiple of 3"):
        check(Recipe(), 3)


@pytest.mark.parametrize("stage", range(4))
def test_shipped_deepspeed_files(stage):
    values = load_deepspeed(CONFIGS / f"zero{stage}.json")
    assert values["zero_optimization"]["stage"] == stage and values["zero_allow_untested_optimizer"] is True
    assert not {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & values.keys()
    for precision in ("fp32", "bf16"):
        check(load_recipe(None, [f"precision={precision}"]), 2, values)


@pytest.mark.parametrize("values, expected", [
    ({"train_batch_size": 128}, "train_batch_size is 128, the recipe says 64"),
    ({"train_micro_batch_size_per_gpu": 32}, "train_micro_batch_size_per_gpu is 32, the recipe says 16"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, the recipe says 2"),
    ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, the recipe says 1.0"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is true, the recipe's precision is fp32"),
    ({"fp16": {"enabled": True}}, "fp16.enabled is true"),
    ({"optimizer": {"type": "Adam"}}, "'optimizer' belongs to the recipe"),
    ({"scheduler": {}}, "'scheduler' belongs to the recipe"),
])
def test_deepspeed_file_must_agree(values, expected):
    with pytest.raises(ConfigError, match=expected):
        check(Recipe(), 2, values)


def test_deepspeed_file_may_agree():
    check(Recipe(), 2, {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2,
                        "gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False}})
    check(load_recipe(None, ["precision=bf16"]), 1, {"bf16": {"enabled": True}})
    with pytest.raises(ConfigError, match="bf16.enabled is false, the recipe's precision is bf16"):
        check(load_recipe(None, ["precision=bf16"]), 1, {"bf16": {"enabled": False}})


def test_deepspeed_file_errors(tmp_path):
    path = tmp_path / "zero.json"
    for text, expected in ((None, "no such DeepSpeed file"), ("{", "not a JSON file"), ("[]", "expected a JSON object")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            load_deepspeed(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert load_deepspeed(path) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("key", ["data.source", "data.images", "teacher.path"])
def test_missing_files_are_named(key, tmp_path):
    recipe = load_recipe(None, [f"{key}={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError, match=f"{key}: no such file or folder: .*nowhere"):
        check(recipe)


def test_swapped_negatives_need_the_world(tmp_path):
    (tmp_path / "a.tsv").write_text("filepath\ttitle\n")
    with pytest.raises(ConfigError, match="loss.negatives"):
        check(load_recipe(None, ["loss.negatives=swapped", f"data.source={tmp_path / 'a.tsv'}"]))


def test_config_is_light(python):
    done = python("-c", "import sys, fastsds.config; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


# the other kind of recipe

TASK_WORLD = CONFIGS / "clip_td_world.yaml"


def test_clip_td_world_writes_every_value_and_equals_the_defaults():
    recipe = load_recipe(TASK_WORLD)
    assert recipe == CLIPTDRecipe() and strict.parse(TASK_WORLD.read_text(), "") == as_dict(recipe)


def test_the_kind_is_the_file_s(recipe_file):
    assert type(load_recipe(recipe_file("recipe: clip_td\nsteps: 3"))) is CLIPTDRecipe
    assert type(load_recipe(recipe_file("recipe: sds_clip\nsteps: 3"))) is Recipe is type(load_recipe(recipe_file("steps: 3")))
    path = recipe_file("recipe: clip_dt")
    assert fails(path=path) == f"{path}: recipe is the text 'clip_dt'; expected one of sds_clip, clip_td"
    assert fails("recipe=clip_td").endswith("recipe is the text 'clip_td'; expected sds_clip")
    with pytest.raises(ConfigError, match="recipe is clip_td; expected sds_clip: this command"):
        load_recipe(TASK_WORLD, only=Recipe)


def test_clip_td_dump_and_load(recipe_file):
    recipe = load_recipe(TASK_WORLD, ["data.options={min_count: 3}", "data.shift.lists={train: a.txt, test: b.json}", "seed=4"])
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe
    recipe = load_recipe(TASK_WORLD, ["data.shift.by=change", "data.shift.train=[colour]", "eval.splits=[dev, dev_shift]"])
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


def test_clip_td_paths_are_relative_to_the_file(recipe_file, tmp_path, monkeypatch):
    path = recipe_file("recipe: clip_td\ntargets: {path: t}\ndata: {folder: d, options: {images: i, min_count: 2}, "
                       "shift: {lists: {train: a.txt}}}")
    recipe = load_recipe(path)
    assert recipe.targets.path == str(tmp_path / "t") and recipe.data.folder == str(tmp_path / "d")
    assert recipe.data.options == {"images": str(tmp_path / "i"), "min_count": 2}
    assert recipe.data.shift.lists == {"train": str(tmp_path / "a.txt")}
    monkeypatch.chdir(tmp_path.parent)
    moved = load_recipe(path, ["data.options={answers: x}", "data.shift.lists={test: y}"])
    assert moved.data.options == {"answers": str(tmp_path.parent / "x")}
    assert moved.data.shift.lists == {"test": str(tmp_path.parent / "y")} and moved.targets.path == str(tmp_path / "t")


@pytest.mark.parametrize("override, expected", [
    ("targets.k=null", "targets.k is null and targets.mass null; expected one of targets.k and targets.mass"),
    ("targets.mass=0.5", "targets.k is 4 and targets.mass 0.5; expected one"), ("targets.select=all", "expected null for both"),
    ("targets.k=0", "targets.k is 0; expected at least 1"), ("targets.mass=0", "targets.mass is 0.0; expected greater than 0"),
    ("data.fraction=0", "data.fraction is 0.0; expected greater than 0 and at most 1"), ("data.fraction=1.5", "at most 1"),
    ("loss.beta=-1", "at least 0"), ("loss.weight=all", "one of none, teacher, relative"), ("loss.lambda=3", "unknown key"),
    ("data.shift.train=[a]", "expected null without data.shift.by"), ("eval.splits=[a, a]", "each once"),
    ("data.shift.share=1", "below 1"), ("data.folder=''", "not empty"), ("data.options=3", "keys with values"),
    ("data.shift.lists={train: 3}", "is not a split with a file's name"), ("head.init=ridge", "unknown key 'head'"),
])
def test_clip_td_values(override, expected):
    message = fails(override, path=TASK_WORLD)
    assert message.startswith(f"--set {override}: ") and expected in message
    assert "with loss.beta 0" in fails("adaptation.steps=3", "loss.beta=0", path=TASK_WORLD)
    with pytest.raises(ConfigError, match="adaptation.batch is 9; expected a multiple of 2"):
        check(load_recipe(TASK_WORLD, ["adaptation.batch=9", "adaptation.steps=2"]), world_size=2)
    with pytest.raises(ConfigError, match="data.folder: no such folder: /nowhere"):
        check(load_recipe(TASK_WORLD, ["data.folder=/nowhere"]))
