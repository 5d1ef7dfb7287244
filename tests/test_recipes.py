"""The shipped recipes: complete, true in their comments, and every variant that they name loads, passes its checks and fits."""

import math
import re
import shlex

import pytest

from fastsds.config import CONFIGS, KINDS, AnyRecipe, Recipe, as_dict, check, load_deepspeed, load_recipe
from fastsds.schedule import timestep_range
from fastsds.student import make_student
from fastsds.testing import alphas_cumprod

REAL = ("recommended", "lclip_only", "paper_reading", "full_finetune_vitl14")
REAL_TASKS = {"clip_td_snli_ve": (529_527, 5), "clip_td_vqa": (443_757, 10), "clip_td_vcr": (2 * 212_923, 5)}  # epochs
TASKS = ("clip_td_world", *REAL_TASKS)
MODELS = {"_vitb16": "ViT-B-16", "_vitb32": "ViT-B-32", "_vitl14": "ViT-L-14", "_rn50": "RN50"}
LATENT, PAIRS, CAPTIONS = (4, 64, 64), 118_287, 591_753  # Stable Diffusion's latents; COCO 2017 train
GIB = 1 << 30


def text(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def comments(name: str) -> str:
    """All comment lines as one."""
    return " ".join(line.lstrip("# ") for line in text(name).splitlines() if line.startswith("#"))


def variants(name: str) -> dict[str, list[str]]:
    """What a recipe's comments say to add to the command, by variant."""
    found = re.findall(r"^#   (_\w+) +(--set .+)$", text(name), re.MULTILINE)
    sets = {key: shlex.split(line) for key, line in found}
    assert len(found) == len(sets) and all(words[::2] == ["--set"] * (len(words) // 2) for words in sets.values())
    return {key: words[1::2] for key, words in sets.items()}


CASES = [(name, key) for name in REAL for key in ("", *variants(name))]


@pytest.fixture
def tsv(tmp_path):
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n")
    return f"data.source={tmp_path / 'pairs.tsv'}"


def keys(values, prefix=""):
    for key, value in values.items():
        section = isinstance(value, dict) and key not in ("options", "lists")  # whose keys are the user's
        yield from keys(value, f"{prefix}{key}.") if section else [prefix + key]


def flat(recipe: AnyRecipe | dict, prefix="") -> dict:
    found = {}
    for key, value in (as_dict(recipe) if isinstance(recipe, AnyRecipe) else recipe).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def weights(recipe: Recipe) -> dict[str, int]:
    """Trained weights of the student, without storage."""
    student, trained = make_student(recipe.student, LATENT, "meta")
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters() if name in trained}
    head = sum(size for name, size in sizes.items() if name.startswith("head."))
    assert student.head.linear.in_features == student.width and student.latent_shape == LATENT
    return {"head": head, "clip": sum(sizes.values()) - head, "width": student.width}


def test_these_are_the_recipes():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"world", *REAL, *TASKS}


@pytest.mark.parametrize("name", ["world", *REAL, *TASKS])
def test_every_value_is_written(name):
    import yaml

    written = yaml.safe_load(text(name))
    known, found = set(keys(as_dict(KINDS[written["recipe"]]()))), set(keys(written))
    missing, unknown = known - found, found - known
    assert not missing and not unknown, f"configs/{name}.yaml: missing {sorted(missing)}, unknown {sorted(unknown)}"
    assert max(map(len, text(name).splitlines())) <= 128


@pytest.mark.parametrize("name", REAL)
def test_what_must_be_said_is_said(name):
    assert "NOT YET REPRODUCED ON REAL DATA" in comments(name)
    assert set(MODELS) <= set(variants(name))
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    assert not recipe.output.startswith((".", "/"))  # relative to the current folder, not to the file
    assert recipe.output.endswith(name)


@pytest.mark.parametrize(("name", "key"), CASES)
def test_every_variant_loads_passes_its_checks_and_fits_stable_diffusion(name, key, tsv):
    base = load_recipe(CONFIGS / f"{name}.yaml")
    sets = variants(name)[key] if key else []
    recipe = load_recipe(CONFIGS / f"{name}.yaml", [*sets, tsv])
    if key in MODELS:
        assert recipe.student.model == f"{MODELS[key]}-quickgelu" and recipe.output.endswith(key)
    changed = {k for k, v in flat(recipe).items() if v != flat(base)[k]}
    assert changed <= {"student.model", "output", "data.source", "loss.noised"}
    for file in re.findall(r"--config (configs/\w+\.json)", comments(name)):
        for world in (1, 2, 4, 8):
            if recipe.data.batch // world % (recipe.teacher.micro_batch or 1) == 0:
                check(recipe, world, load_deepspeed(CONFIGS.parent / file))
    timestep_range(alphas_cumprod(), recipe.loss.t, recipe.loss.log_snr, recipe.loss.shift)
    counted = weights(recipe)  # an architecture with the other GELU than its weights were trained with is refused here
    assert counted["head"] == (counted["width"] + 1) * math.prod(LATENT)
    if name in ("recommended", "paper_reading"):
        assert f"{counted['head']:,}" in comments(name) and f"{counted['clip']:,}" in comments(name)


@pytest.mark.parametrize("name", REAL)
def test_the_commands_are_of_this_recipe(name):
    from fastsds.cli import COMMANDS

    commands = re.findall(r"^#   (fastsds|deepspeed) (\S+) (.*?--recipe (\S+).*)$", text(name), re.MULTILINE)
    assert any(program == "deepspeed" for program, *_ in commands)
    for program, what, _, recipe in commands:
        assert recipe == f"configs/{name}.yaml"
        assert what in COMMANDS if program == "fastsds" else what == "fastsds/train.py"


def test_the_baseline_is_the_recommended_recipe_without_the_teacher():
    ours, theirs = (flat(load_recipe(CONFIGS / f"{name}.yaml")) for name in ("lclip_only", "recommended"))
    assert {key for key in ours if ours[key] != theirs[key]} == {"output", "loss.lambda"} and ours["loss.lambda"] == 0


def test_the_arithmetic_of_the_reading_of_the_paper():
    recipe, said = load_recipe(CONFIGS / "paper_reading.yaml"), text("paper_reading")
    assert recipe.loss.lambda_ == pytest.approx(1e-3 * math.prod(LATENT)) and "1e-3 x 4 x 64 x 64 = 16.384" in said
    assert recipe.steps == math.ceil(PAIRS / 32) and f"{32 * recipe.steps:,} = one epoch of {PAIRS:,}" in said
    loss, optimizer = recipe.loss, recipe.optimizer
    assert (loss.gradient, loss.weighting, loss.noised, recipe.data.batch) == ("full", "uniform", True, 32)
    assert timestep_range(alphas_cumprod(), loss.t) == (0, 1000) and optimizer.lr == optimizer.head_lr == 5e-5
    assert recipe.student.tune == "layernorm" and recipe.student.model == "ViT-B-16-quickgelu"
    assert not load_recipe(CONFIGS / "paper_reading.yaml", variants("paper_reading")["_literal"]).loss.noised
    assert "FROM SECONDARY SOURCES" in comments("paper_reading") and "not the paper's figures" in comments("paper_reading")


def test_the_arithmetic_of_the_recommended_recipe():
    recipe, said = load_recipe(CONFIGS / "recommended.yaml"), text("recommended")
    first, last = timestep_range(alphas_cumprod(), None, recipe.loss.log_snr, recipe.loss.shift)
    assert abs(first - 700) <= 1 and last == 1000  # what its comment says of the embedded world's range
    a_pair = [32, 77 * 768 * 2 / 1024, 32 * recipe.bank.draws]  # KiB: latent, text, target
    assert a_pair[1] == 115.5 and f"= {PAIRS * sum(a_pair) * 1024 / GIB:.1f} GiB" in said
    assert f"random: {CAPTIONS:,} pairs to ask about, a bank of {CAPTIONS * sum(a_pair) * 1024 / GIB:.0f} GiB" in said
    assert f"{64 * recipe.steps:,} = {64 * recipe.steps / PAIRS:.1f} epochs" in said and recipe.data.batch == 64
    assert recipe.head.samples == 16 * 512 == 8 * 1024


def test_the_arithmetic_of_full_fine_tuning():
    recipe, said = load_recipe(CONFIGS / "full_finetune_vitl14.yaml"), comments("full_finetune_vitl14")
    counted = weights(recipe)
    n = counted["clip"] + counted["head"]
    assert f"{n:,} weights train (CLIP {counted['clip']:,}, h_w {counted['head']:,})" in said
    half, wide, moments, small = 2 * n / GIB, 4 * n / GIB, 8 * n / GIB, 2 * n / GIB
    assert f"bf16 weights {half:.2f}, fp32 masters {wide:.2f}, gradients in bf16 {half:.2f}" in said
    assert f"two moments: AdamW {moments:.2f}, 8-bit {small:.2f}" in said
    for rest, sharded, ranks in ((half, (wide, half), 1), (half, (wide, half), 8)):
        for adam in (moments, small):
            assert f"{rest + (sum(sharded) + adam) / ranks:.2f}" in said
    assert recipe.optimizer.name == "adamw8bit" and recipe.student.tune == "all"
    assert f"{recipe.steps * 256:,} = {recipe.steps * 256 / PAIRS:.1f} epochs" in text("full_finetune_vitl14")
    same = ("teacher", "bank", "loss")
    assert all(getattr(recipe, key) == getattr(load_recipe(CONFIGS / "recommended.yaml"), key) for key in same)  # one bank


@pytest.mark.parametrize("name", REAL_TASKS)
def test_the_tasks_recipes_say_what_they_are(name, tmp_path):
    recipe, (n, epochs), said = load_recipe(CONFIGS / f"{name}.yaml"), REAL_TASKS[name], comments(name)
    assert "NOT YET REPRODUCED ON REAL DATA" in said and recipe.output == f"runs/{name}"
    assert recipe.data.task.startswith(name.removeprefix("clip_td_"))
    assert recipe.steps == math.ceil(epochs * n / recipe.data.batch) and f" epochs of {n:,}" in text(name)
    assert recipe.optimizer.warmup == round(recipe.steps / 10)
    few = int(re.search(r"--set data.fraction=0.01 --set steps=(\d+) --set optimizer.warmup=(\d+)", said)[1])
    assert few == math.ceil(epochs * round(0.01 * n) / recipe.data.batch)
    assert f"x {n:,} examples: {(40 + 144) * (512 * 2 + 8) * n / GIB:.0f} GiB at most" in text(name)
    arms = re.findall(r"^# (?:Arms: |      )\S.*?(--set .+)$", text(name), re.MULTILINE)
    assert len(arms) >= 3
    for sets in arms:
        check(load_recipe(CONFIGS / f"{name}.yaml", [*shlex.split(sets)[1::2], f"data.folder={tmp_path}"]), 4)
    released = {"snli_ve": {"dev", "test"}, "vqa_v2": {"val"}, "vqa_cp_v2": {"test"}, "vcr": {"val"}}  # but for train
    for sets in re.findall(r"^# Other \w+: (--set .+)$", text(name), re.MULTILINE):
        other = load_recipe(CONFIGS / f"{name}.yaml", shlex.split(sets)[1::2])
        there = released[other.data.task]
        asked = there & set(other.eval.splits)
        assert asked and set(other.eval.splits) == asked | {f"{split}_shift" for split in asked if other.data.shift.by}, sets


def test_the_arms_of_the_comments_are_those_of_the_experiment(tmp_path):
    from fastsds.reproduce.experiment import find
    from fastsds.reproduce.experiment import load as load_experiment

    said = re.findall(r"^# (?:Arms: |      )(?:\+ )?(\w+) +(--set .+|this recipe)$", text("clip_td_world"), re.MULTILINE)
    made = load_experiment(find("clip_td"), tmp_path)
    assert [name for name, _ in said] == list(made.said.arms)
    for name, words in said:
        sets = shlex.split(words)[1::2] if words.startswith("--set") else []
        ours = flat(load_recipe(CONFIGS / "clip_td_world.yaml", sets))
        theirs = flat(made.recipe("vilt", 1.0, name))
        assert {key for key in ours if ours[key] != theirs[key]} <= {"targets.path"}, name
