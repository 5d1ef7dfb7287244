"""CLIP-TD under the trainer: one rank and two, any stage, resumed, adapted; what a user gets wrong."""

import json
import shutil
from pathlib import Path

import pytest
import runs
import tiny
import torch

from fastsds.config import CLIPTDRecipe, as_dict, load_recipe
from fastsds.crossmodal import load_crossmodal, read_crossmodal
from fastsds.evaluation.tasks import evaluate_task
from fastsds.student import load_student
from fastsds.training import prepare
from fastsds.training.clip_td import CLIPTDTraining

EQUAL = 1e-5  # over 8 steps: the order of summation is all that differs
RECIPE = """
recipe: clip_td
steps: 8
student: {model: ./student}
teacher: {model: ./clip}
targets: {k: 2}
data: {batch: 8, accumulation: 2, streams: 4, options: {sizes: {train: 48, dev: 20, test: 10, dev_shift: 10, shift: 10}}}
adaptation: {batch: 8, lr: 1.0e-3, warmup: 1}
optimizer: {warmup: 2}
log_every: 1
checkpoint_every: 4
eval: {splits: [], every: 0}
"""
ADAPTED = ("adaptation.steps=4",)
VARIANTS = {
    "base": ("eval.splits=[dev, shift]", "eval.every=4"),
    "choice": ("data.task=world_choice", "targets.select=all", "targets.k=null", "loss.weight=teacher"),
    "pooled": ("targets.select=pooled", "targets.k=null", "loss.distance=cosine"),
    "questions": ("data.task=world_questions", "targets.k=null", "targets.mass=0.4", "loss.distance=l2", "student.tune=lora"),
    "plain": ("loss.beta=0",),
    "adapted": ADAPTED,
    "few": ("data.fraction=0.2", "data.batch=4"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_vilt(folder / "student")
    tiny.save_student(folder / "clip")
    (folder / "recipe.yaml").write_text(RECIPE)
    return ["--recipe", str(folder / "recipe.yaml")]


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """Plain torch: one rank with the whole batch."""
    folder = tmp_path_factory.mktemp("plain")
    for name, sets in VARIANTS.items():
        assert runs.train(*base, *runs.sets(*sets), "--output", folder / name) == 0
    return {name: folder / name for name in VARIANTS}


@pytest.fixture(scope="module")
def two(base, plain, tight, tmp_path_factory):
    """Two ranks, half the micro-batch each: everything in one launch."""
    folder = tmp_path_factory.mktemp("two")
    first = [*base, *runs.sets(*VARIANTS["base"])]
    plan = {f"base at {n}": [*first, "--config", f"configs/zero{n}.json"] for n in (0, 1, 2)}
    plan |= {f"{name} at 3": [*base, "--config", tight, *runs.sets(*sets)] for name, sets in VARIANTS.items()}
    plan["base resumed"] = [*first, "--config", "configs/zero2.json", "--resume", runs.at(plain["base"], 4)]
    return runs.launch(2, plan, folder)


def weights(output, name="student") -> dict[str, torch.Tensor]:
    return read_crossmodal(output / name)


def same(a, b, rel=2e-5):
    """A key's bias moves no softmax: its gradient is rounding alone, which Adam makes a step of."""
    assert a.keys() == b.keys()
    for name in (name for name in a if not name.endswith(("key.bias", "in_proj_bias"))):
        torch.testing.assert_close(a[name], b[name], rtol=rel, atol=rel, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_is_the_task_s_and_beta_times_the_others(plain):
    for name, output in plain.items():
        for row in runs.rows(output):
            if name == "plain":
                assert row["loss"] == row["task"] and "text" not in row
            else:
                assert row["loss"] == pytest.approx(row["task"] + row["text"] + row["visual"], rel=1e-5)
                assert 0 <= row["weight"] <= 1 and 0 < row["share_text"] <= 1 and 0 < row["share_visual"] <= 1
    assert runs.rows(plain["choice"])[0]["share_visual"] == 1 and runs.rows(plain["base"])[0]["share_visual"] == 2 / 16


@pytest.mark.slow
def test_two_ranks_are_one(plain, two):
    for name, output in two.items():
        variant, _, how = name.partition(" ")
        expected = runs.losses(plain[variant])[4 if how == "resumed" else 0 :]
        assert runs.relative(runs.losses(output), expected) < EQUAL, name
        same(read_crossmodal(output / "student"), read_crossmodal(plain[variant] / "student"))
        for step in {"base": (0, 4, 8)}.get(variant, ())[2 if how == "resumed" else 0 :]:
            assert runs.evaluation(output, step).rows == runs.evaluation(plain["base"], step).rows, (name, step)
    clips = [load_student(of / "adaptation" / "student").state_dict() for of in (two["adapted at 3"], plain["adapted"])]
    same(*clips)
    for shard in sorted((plain["base"] / "targets").glob("shard*")):
        assert (two["base at 2"] / "targets" / shard.name).read_bytes() == shard.read_bytes()


def test_a_run_that_goes_on_is_the_run(base, plain, tmp_path):
    shutil.copytree(plain["adapted"], tmp_path / "run")
    shutil.rmtree(runs.at(tmp_path / "run", 8))
    shutil.rmtree(tmp_path / "run" / "student")
    asked = (tmp_path / "run" / "adaptation" / "metrics.jsonl").stat().st_mtime_ns
    assert runs.train(*base, *runs.sets(*ADAPTED), "--output", tmp_path / "run", "--resume", "latest") == 0
    assert runs.losses(tmp_path / "run") == runs.losses(plain["adapted"])
    assert (tmp_path / "run" / "adaptation" / "metrics.jsonl").stat().st_mtime_ns == asked  # not begun again
    ends = [read_crossmodal(of / "student") for of in (tmp_path / "run", plain["adapted"])]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_an_adaptation_that_was_stopped_goes_on(base, plain, tmp_path, capfd):
    """As Ctrl-C after its second step leaves it: nothing of the run itself is there."""
    early = (*ADAPTED, "checkpoint_every=2")
    assert runs.train(*base, *runs.sets(*early), "--output", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole" / "adaptation", tmp_path / "run" / "adaptation")
    shutil.rmtree(runs.at(tmp_path / "run" / "adaptation", 4))
    shutil.rmtree(tmp_path / "run" / "adaptation" / "student")
    capfd.readouterr()
    assert runs.train(*base, *runs.sets(*early), "--output", tmp_path / "run", "--resume", "latest") == 0
    assert "steps 2 to 4 on plain torch" in capfd.readouterr().err
    for part in ("adaptation", "."):
        assert runs.losses(tmp_path / "run" / part) == runs.losses(tmp_path / "whole" / part)
    assert runs.losses(tmp_path / "whole") == runs.losses(plain["adapted"])
    assert runs.train(*base, *runs.sets(*early, "adaptation.lr=1"), "--output", tmp_path / "run", "--resume", "latest") == 2
    assert "adaptation.lr is 1.0, the checkpoint was made with 0.001" in capfd.readouterr().err


def test_a_run_that_was_killed_early_keeps_its_targets(base, plain, tmp_path, capfd):
    """As SIGKILL before the first checkpoint leaves it."""
    shutil.copytree(plain["adapted"], tmp_path / "run")
    again = [*base, *runs.sets(*ADAPTED), "--output", tmp_path / "run"]
    for name in ("checkpoints", "student"):
        shutil.rmtree(tmp_path / "run" / name)
    assert runs.train(*again) == 2
    assert "it has no checkpoint: remove all in it but adaptation and targets, or name another" in capfd.readouterr().err
    for name in ("metrics.jsonl", "recipe.yaml"):
        (tmp_path / "run" / name).unlink()
    files = [tmp_path / "run" / name for name in ("adaptation/checkpoints", "targets/shard_00000.safetensors")]
    made = [file.stat().st_mtime_ns for file in files]
    assert runs.train(*again) == 0
    assert runs.losses(tmp_path / "run") == runs.losses(plain["adapted"])
    assert made == [file.stat().st_mtime_ns for file in files]


def test_the_adapted_clip_teaches(plain, base):
    folders = Path(base[1]).parent / "clip", plain["adapted"] / "adaptation" / "student"
    clip, adapted = (load_student(folder).state_dict() for folder in folders)
    assert any(not torch.equal(clip[name], adapted[name]) for name in clip)
    assert runs.losses(plain["adapted"]) != runs.losses(plain["base"])
    assert (plain["adapted"] / "adaptation" / "recipe.yaml").read_text().count("lambda: 0.0") == 1
    assert runs.losses(plain["adapted"] / "adaptation", "clip") == runs.losses(plain["adapted"] / "adaptation")


def test_the_student_leaves_with_its_projections(plain):
    from transformers import ViltModel

    state, model = read_crossmodal(plain["base"] / "student"), ViltModel.from_pretrained(plain["base"] / "student")
    assert {name.partition(".")[0] for name in state} == {"model", "head", "projections"}
    assert torch.equal(state["model.pooler.dense.weight"], model.pooler.dense.weight)
    assert not any(name.startswith("projections") for name in read_crossmodal(plain["plain"] / "student"))
    student = load_crossmodal(plain["base"] / "student").eval()  # costs nothing more at inference
    out = student(tiny.pixels(2, 32), student.tokenize(["a red ring is left", "a cross"]))
    assert out._fields == ("text", "visual", "pooled", "logits") and not hasattr(student, "projections")


def test_evaluation_during_training_is_evaluation_of_the_saved_student(base, plain):
    task = prepare(load_recipe(base[1]), torch.device("cpu"), 0, 1, dry=True).task
    student = load_crossmodal(plain["base"] / "student").eval()
    found, kept = evaluate_task(student, task, ("dev", "shift")), runs.evaluation(plain["base"], 8)
    assert found.rows == kept.rows and found.metrics == kept.metrics
    (row,) = [row for row in runs.rows(plain["base"], "eval") if row["step"] == 8]
    assert row["dev/accuracy"] == kept.metrics["dev/accuracy"] and row["suite"] == "world_entailment"


def test_batches_are_the_examples_own(base):
    """Every epoch has each example once, with its own label and text."""
    recipe = load_recipe(base[1], ["data.task=world_choice", "loss.beta=0", "data.options={sizes: {train: 8}}"])
    training = prepare(recipe, torch.device("cpu"), 0, 1)
    assert isinstance(training, CLIPTDTraining) and training.samples == 16
    loader = training.batches(first=0, cursors=None)
    batches = [next(loader)[0] for _ in range(2)]
    assert sorted(k for b in batches for k in b.ids.tolist()) == list(range(16))
    for batch in batches:
        for row, k in enumerate(batch.ids.tolist()):
            example = training.examples[k]
            assert batch.labels[row] == example.target
            said = [f"{example.text} {choice}" for choice in example.choices]
            own = training.student.tokenize([said])[0]
            assert torch.equal(batch.tokens[row, :, : own.shape[1]], own) and (batch.tokens[row, :, own.shape[1] :] == -1).all()
        assert batch.inputs[2] is batch.labels


def test_dry_run_says_it_all_and_writes_nothing(base, tmp_path, capsys):
    sets = runs.sets(*ADAPTED)
    assert runs.train(*base, *sets, "--output", tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "projections.text.weight" in said and "8 steps = 128 images = 2.67 epochs of 48" in said and "frozen" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sets, says", [
    (["targets.k=500"], "world_entailment/train/0, text: k is 500, but "),
    (["eval.splits=[nothing]"], "eval.splits: 'nothing', expected some of train, dev, test, dev_shift, shift"),
    (["data.fraction=0.1"], "data.batch is 8, larger than the data: world_entailment, train, has 5 samples"),
    (["adaptation.steps=2", "adaptation.batch=64"], "adaptation.batch is 64, larger than the data: world_entailment, texts"),
    (["adaptation.steps=2", "adaptation.tune=[nothing*]"], "adaptation.tune: 'nothing*' matches no parameter"),
    (["data.task=world_entailmen"], "data: task 'world_entailmen': expected one of"),
    (["teacher.model=./nothing"], "teacher: "),
    (["student.model=world", "student.pretrained=openai"], "student.pretrained: 'openai', expected null"),
    (["data.options={size: 3}"], "data: task world_entailment: unknown option 'size', expected one of seed, sizes"),
    (["data.shift.by=label", "data.shift.train=[odd]"], "data.shift: shift by label: no example has 'odd'"),
])  # fmt: skip
def test_one_error_names_the_row_or_the_key(base, sets, says, tmp_path, capfd):
    assert runs.train(*base, *runs.sets(*sets), "--output", tmp_path / "run") == 2
    errors = capfd.readouterr().err
    assert says in errors and errors.count("error: ") == 1, errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mistake_is_said_before_the_adaptation(base, plain, tmp_path, capfd):
    assert runs.train(*base, *runs.sets(*ADAPTED, "eval.splits=[nothing]"), "--output", tmp_path / "run") == 2
    assert "eval.splits: 'nothing', expected some of" in capfd.readouterr().err and not (tmp_path / "run").exists()
    again = [*base, *runs.sets(*ADAPTED), "--output", plain["adapted"]]  # whose targets are the adapted CLIP's
    assert runs.train(*again, "--dry-run", "--resume", "latest") == 0


def test_a_clip_without_words_in_the_joint_space_cannot_teach(base, tmp_path, capfd):
    tiny.save_student(tmp_path / "resnet", resnet=True)
    sets = runs.sets(f"teacher.model={tmp_path / 'resnet'}")
    assert runs.train(*base, *sets, "--output", tmp_path / "run") == 2
    assert "a teacher of CLIP-TD needs features of every word and patch" in capfd.readouterr().err


def test_targets_and_checkpoints_of_others_are_refused(base, plain, tmp_path, capfd):
    targets = f"targets.path={plain['base'] / 'targets'}"
    assert runs.train(*base, *runs.sets(targets, "targets.k=1"), "--output", tmp_path / "run") == 2
    assert "made with k 2, expected 1; name another folder" in capfd.readouterr().err
    assert runs.train(*base, *runs.sets(targets, "seed=5"), "--output", tmp_path / "run") == 0  # serve every seed
    for changed, says in (
        ("data.options={sizes: {train: 40}}", "data.options.sizes.train is 40, the checkpoint was made with 48"),
        ("loss.weight=none", 'loss.weight is "none", the checkpoint was made with "relative"'),
    ):
        capfd.readouterr()
        assert runs.train(*base, *runs.sets(changed), "--output", tmp_path / "on", "--resume", runs.at(plain["base"], 8)) == 2
        assert says in capfd.readouterr().err


def test_other_commands_name_the_kind(base, plain, tmp_path, capsys):
    from fastsds import cli

    for words in (["plan"], ["check-teacher"], ["bank", "build"]):
        assert cli.main([*words, "--recipe", base[1]]) == 2
        assert "recipe is clip_td; expected sds_clip: this command knows no other" in capsys.readouterr().err
    assert cli.main(["export", str(plain["base"]), "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    assert "a cross-modal student, which transformers loads as it is" in capsys.readouterr().err
    assert cli.main(["report", str(plain["base"]), "--out", str(tmp_path / "report")]) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"curves.png", "evaluations.png"}


def test_the_recipe_is_written_whole(plain):
    recipe = load_recipe(plain["questions"] / "recipe.yaml")
    assert isinstance(recipe, CLIPTDRecipe) and recipe.targets.mass == 0.4 and "adaptation" in as_dict(recipe)


BASE = """
import json, resource, sys
from pathlib import Path
import photos, runs, tiny, torch, transformers
from PIL import Image

folder = Path(sys.argv[1])
torch.manual_seed(0)
transformers.ViltModel(transformers.ViltConfig(vocab_size=30522)).save_pretrained(folder / "vilt")
tiny.save_words(folder / "vilt")
transformers.ViltImageProcessor().save_pretrained(folder / "vilt")
(folder / "flickr30k_images").mkdir()
for k, photo in enumerate(photos.whole()):
    photo.save(folder / "flickr30k_images" / f"{k}.jpg")
labels = ("entailment", "neutral", "contradiction", "entailment")
rows = [{"gold_label": x, "pairID": str(k), "sentence2": f"a red cup {k} on the left.", "Flickr30K_ID": str(k)}
        for k, x in enumerate(labels)]
for split in ("train", "dev", "test"):
    named = [{**row, "pairID": split + row["pairID"]} for row in rows]
    (folder / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in named))
sets = (f"student.model={folder / 'vilt'}", "teacher.model=ViT-B-32-quickgelu", "data.task=snli_ve", f"data.folder={folder}",
        "data.batch=4", "data.streams=4", "targets.k=5", "optimizer.lr=1e-5", "optimizer.head_lr=1e-5", "optimizer.warmup=0",
        "eval.splits=[]", "eval.every=0", "log_every=1", "steps=2")
code = runs.train("--recipe", "configs/clip_td_world.yaml", *runs.sets(*sets), "--output", folder / "run")
print(json.dumps({"code": code, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


@pytest.mark.slow
def test_steps_of_vilt_base_taught_by_a_vit_b_32_on_photographs(tmp_path, python, root):
    """Both at their real sizes, of random weights: 4 photographs, SNLI-VE's own format, two steps of the trainer."""
    done = python("-c", BASE, tmp_path, env={"PYTHONPATH": f"{root}:{root / 'tests'}"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    rows = runs.rows(tmp_path / "run")
    print(found, rows)
    assert rows[1]["loss"] < rows[0]["loss"] and rows[0]["grad_norm"] > 0 and found["gib"] < 8
    assert rows[0]["share_visual"] == pytest.approx(5 / 144) and 0 < rows[0]["weight"] < 1
    state = read_crossmodal(tmp_path / "run" / "student")
    assert state["projections.visual.weight"].shape == (512, 768)
    assert 110e6 < sum(x.numel() for name, x in state.items() if name.startswith("model.")) < 115e6
