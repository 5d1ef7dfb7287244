"""The trainer on plain torch: the embedded world's golden losses, the frozen teacher, clear errors, what it writes."""

import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("FASTSDS_WRITE_GOLDEN") == "1"  # FASTSDS_WRITE_GOLDEN=1 pytest tests/test_train.py -k golden
WORLD = ("steps=20", "log_every=1", "data.batch=16", "eval.suite=none", "optimizer.warmup=5")
GOLDENS = {
    "losses_sds": (),
    "losses_clip": ("loss.lambda=0",),
    "losses_full": ("loss.gradient=full", "data.batch=8", "data.accumulation=1"),
    "losses_layernorm_auto": ("student.tune=layernorm", "loss.lambda=auto", "loss.weighting=uniform", "loss.sds_every=2"),
    "losses_negatives": ("loss.negatives=swapped", "loss.captions=shuffled", "loss.t=null", "loss.log_snr=[-4, 2]"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ["--recipe", str(runs.write_recipe(tmp_path_factory.mktemp("tiny")))]


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_losses_of_the_embedded_world(name, tmp_path):
    """The first 20 steps, in full, to 1e-4. A change that moves them on purpose writes them anew and says why."""
    argv = runs.sets(*WORLD, *GOLDENS[name])
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    keys = ("loss", "clip", "sds", "lambda")
    found = {key: [row[key] for row in runs.rows(tmp_path / "run") if key in row] for key in keys}
    path = GOLDEN / f"{name}.json"
    if WRITE:
        lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        path.write_text(f'{{"arguments": {json.dumps(argv)},\n {lines}}}\n')
    golden = json.loads(path.read_text())
    assert golden["arguments"] == argv
    for key in keys:
        if found[key] != golden[key]:
            assert runs.relative(found[key], golden[key]) < 1e-4, key


def test_the_same_command_gives_the_same_run(base, tmp_path):
    for name in ("a", "b"):
        assert runs.train(*base, *runs.sets("steps=5"), "--output", tmp_path / name) == 0
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")


def test_the_seed_matters(base, tmp_path):
    for seed in (0, 1):
        assert runs.train(*base, *runs.sets("steps=2", f"seed={seed}"), "--output", tmp_path / str(seed)) == 0
    assert runs.losses(tmp_path / "0") != runs.losses(tmp_path / "1")


def test_training_lowers_the_contrastive_loss(base, tmp_path):
    argv = runs.sets("steps=60", "loss.lambda=0", "optimizer.lr=1e-2")
    assert runs.train(*base, *argv, "--output", tmp_path / "run") == 0
    clip = runs.losses(tmp_path / "run", "clip")
    assert sum(clip[-5:]) / 5 < sum(clip[:5]) / 5 - 0.2


@pytest.mark.parametrize("how", ["warmup", "ridge"])
def test_a_head_that_starts_elsewhere(base, tmp_path, how):
    argv = runs.sets("steps=2", f"head.init={how}", "head.samples=64", "head.warmup_steps=3")
    assert runs.train(*base, *argv, "--output", tmp_path / "run") == 0
    assert runs.train(*base, *runs.sets("steps=2"), "--output", tmp_path / "default") == 0
    ours, theirs = runs.rows(tmp_path / "run")[0], runs.rows(tmp_path / "default")[0]
    assert ours["clip"] == theirs["clip"] and ours["sds"] != theirs["sds"]


def test_images_for_a_vae_that_only_the_head_asked_are_not_loaded_for_the_run(tmp_path, monkeypatch):
    from fastsds.world.scenes import WorldSource

    loaded, load = [], WorldSource.load
    monkeypatch.setattr(WorldSource, "load", lambda self, *args: loaded.append(args[2:]) or load(self, *args))
    tiny.save_teacher(tmp_path / "teacher")  # takes 16x16 images, the world's student 32x32
    argv = runs.sets("steps=2", "head.init=ridge", "head.samples=56", f"teacher.path={tmp_path / 'teacher'}", "eval.suite=none")
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    # two batches of 32 for the head (56 images and 7 to judge it), four for the run
    assert loaded == [(32, 16)] * 2 + [(32, None)] * 4


def test_photographs_train_with_the_embedded_teacher_and_student(tmp_path):
    """A folder of photographs, its .tsv, and a recipe that points at it: paths are the recipe's own."""
    import skimage

    there = Path(skimage.__path__[0]) / "data"
    titles = {"coffee.png": "a cup of coffee", "chelsea.png": "a cat", "astronaut.png": "an astronaut", "camera.png": "a man"}
    found = {name: title for name, title in titles.items() if (there / name).is_file()}
    assert len(found) >= 2
    (tmp_path / "images").mkdir()
    for name in found:
        shutil.copy(there / name, tmp_path / "images")
    rows = "".join(f"{name}\t{title}\n" for name, title in found.items())
    (tmp_path / "photographs.tsv").write_text("filepath\ttitle\n" + rows)
    (tmp_path / "recipe.yaml").write_text(
        "data: {source: photographs.tsv, images: images, batch: 2, accumulation: 2, workers: 2}\n"
        "steps: 5\nlog_every: 1\neval: {suite: none}\n"
    )
    assert runs.train("--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run") == 0
    losses = runs.losses(tmp_path / "run")
    assert len(losses) == 5 and all(math.isfinite(x) for x in losses) and len(set(losses)) == 5


@pytest.mark.parametrize("more", [("precision=bf16",), ("optimizer.name=adamw8bit",), ("data.workers=2",)])
def test_other_ways_of_the_plain_engine(base, tmp_path, more):
    assert runs.train(*base, *runs.sets("steps=4", *more), "--output", tmp_path / "run") == 0
    assert runs.train(*base, *runs.sets("steps=4"), "--output", tmp_path / "plain") == 0
    ours, theirs = runs.losses(tmp_path / "run"), runs.losses(tmp_path / "plain")
    assert runs.relative(ours, theirs) < 2e-2
    assert (ours == theirs) == (more == ("data.workers=2",))  # threads load ahead, and change nothing


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["sds", "full"])
def test_the_teacher_is_untouched_without_gradient_and_in_no_file(base, tmp_path, monkeypatch, gradient):
    from fastsds.teacher import Teacher

    held, load = [], Teacher.load.__func__

    def spy(cls, *args, **kwargs):
        teacher = load(cls, *args, **kwargs)
        held.append((teacher, [p.detach().clone() for p in teacher.parameters()]))
        return teacher

    monkeypatch.setattr(Teacher, "load", classmethod(spy))
    assert runs.train(*base, *runs.sets("steps=3", f"loss.gradient={gradient}"), "--output", tmp_path / "run") == 0
    (teacher, before), *others = held
    assert not others and len(before) > 20
    for parameter, was in zip(teacher.parameters(), before):
        assert not parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, was)
    written = list((tmp_path / "run").rglob("*.safetensors"))
    assert len(written) == 5  # checkpoint: student, head, optimizer; at the end: student, head
    shapes = {tuple(p.shape) for m in (teacher.unet, teacher.text_encoder) for p in m.parameters() if p.ndim == 4}
    for path in written:
        with safe_open(path, "pt") as file:
            for key in file.keys():
                assert not any(word in key for word in ("unet", "vae", "teacher", "down_blocks", "text_model")), (path, key)
                assert tuple(file.get_slice(key).get_shape()) not in shapes or "visual.conv1" in key


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_the_result_is_an_open_clip_folder(base, tmp_path):
    import open_clip

    assert runs.train(*base, *runs.sets("steps=2"), "--output", tmp_path / "run") == 0
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'run' / 'student'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'run' / 'student'}")(["a red ring"])
    assert torch.isfinite(model.encode_text(tokens)).all()
    assert (tmp_path / "run" / "student" / "head.safetensors").is_file()


def test_evaluation_at_the_start_at_intervals_and_at_the_end(tmp_path):
    argv = runs.sets("steps=4", "data.batch=4", "log_every=3", "eval.every=2", "eval.items=4")
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    evaluations = runs.rows(tmp_path / "run", "eval")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [3, 4]  # and the last step, whatever log_every
    assert all(row["suite"] == "world_dev" and 0 <= row["dev/text"] <= 100 for row in evaluations)
    for step in (0, 2, 4):
        result = runs.evaluation(tmp_path / "run", step)
        items = [row for row in result.rows if "scores" in row]
        assert len(items) == 2 * 3 * 4 and {item["about"]["split"] for item in items} == {"seen", "dev"}
        (row,) = (row for row in evaluations if row["step"] == step)
        assert result.suite == "world_dev" and result.metrics.items() <= row.items()


def test_rows_hold_what_the_readme_says(base, tmp_path):
    assert runs.train(*base, *runs.sets("steps=2"), "--output", tmp_path / "run") == 0
    keys = {"split", "step", "loss", "clip", "sds", "lambda", "rho", "cosine", "grad_norm", "lr", "images_per_s", "seconds"}
    for row in runs.rows(tmp_path / "run"):
        bands = {key for key in row if key.startswith(("residual/", "weighted/"))}
        assert set(row) - bands == keys and 2 <= len(bands) <= 16
        assert row["loss"] == pytest.approx(row["clip"] + row["lambda"] * row["sds"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(base, tmp_path, capfd):
    assert runs.train(*base, *runs.sets("optimizer.lr=1e30", "optimizer.clip=0"), "--output", tmp_path / "run") == 1
    assert "error: the loss is nan at step" in capfd.readouterr().err


def test_a_dry_run_tells_and_writes_nothing(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--config", str(runs.ROOT / "configs/zero3.json")]):
        assert runs.train(*base, "--dry-run", *more, "--output", "run") == 0
        told = capsys.readouterr().out
        assert "19,521 of 19,521 parameters train" in told and "optimizer step 64 images = 32 x accumulation 2" in told
        assert "20 steps = 1,280 images" in told and "lambda: 30.0" in told
        assert ("ZeRO 3" in told) == bool(more)
    assert list(tmp_path.iterdir()) == []


# -- errors ------------------------------------------------------------------------------------------------------------

BAD = {
    "unknown key": (["--set", "loss.lamda=3"], ["loss.lamda", "loss.lambda"]),
    "wrong type": (["--set", "steps=many"], ["steps", "whole number"]),
    "out of range": (["--set", "data.batch=0"], ["data.batch", "at least 1"]),
    "not key=value": (["--set", "steps"], ["steps", "key=value"]),
    "missing recipe": (["--recipe", "nowhere.yaml"], ["nowhere.yaml"]),
    "missing DeepSpeed file": (["--config", "nowhere.json"], ["nowhere.json"]),
    "missing teacher": (["--set", "teacher.path=./nowhere"], ["nowhere"]),
    "missing student": (["--set", "student.model=./nowhere"], ["nowhere"]),
    "missing data": (["--set", "data.source=nowhere.tsv"], ["nowhere.tsv"]),
    "unknown argument": (["--recipes", "x"], ["--recipes"]),
    "no value": (["--recipe"], ["--recipe", "expected one argument"]),
    "nothing to resume": (["--resume", "latest"], ["no complete checkpoint", "run"]),
    "not a checkpoint": (["--resume", "."], ["state.json"]),
    "batch larger than the data": (["--set", "data.source=one.tsv"], ["data.batch is 32", "1 samples"]),
    "unknown suite": (["--set", "eval.suite=winogrand"], ["eval.suite", "nearest: winoground"]),
    "suite without its data": (["--set", "eval.suite=winoground"], ["eval.data", "the path of its data"]),
    "suite of other data": (["--set", "eval.suite=mmvp", "--set", "eval.data=."], ["eval.data", "Questions.csv"]),
    "optimizer in the DeepSpeed file": (["--config", "optimizer.json"], ["optimizer"]),
    "batch in the DeepSpeed file": (["--config", "batch.json"], ["train_micro_batch_size_per_gpu", "7", "32"]),
    "unknown DeepSpeed stage": (["--config", "stage.json"], ["stage is 9"]),
    "no folder can be made": (["--output", "one.png/run"], ["output", "one.png"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_and_nothing_written(name, base, tmp_path, monkeypatch, capfd):
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    (tmp_path / "one.tsv").write_text("filepath\ttitle\none.png\ta red ring\n")
    (tmp_path / "optimizer.json").write_text('{"optimizer": {"type": "Adam"}}')
    (tmp_path / "batch.json").write_text('{"train_micro_batch_size_per_gpu": 7}')
    (tmp_path / "stage.json").write_text('{"zero_optimization": {"stage": 9}}')
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    argv, words = BAD[name]
    assert runs.train(*base, "--output", "run", *argv) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_holds_a_run_is_not_overwritten(base, tmp_path, capfd):
    assert runs.train(*base, *runs.sets("steps=2"), "--output", tmp_path / "run") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert runs.train(*base, *runs.sets("steps=2"), "--output", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert str(tmp_path / "run") in error and "--resume latest" in error
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


# -- the process -------------------------------------------------------------------------------------------------------


def test_plain_torch_needs_no_deepspeed_and_ends_with_130_on_ctrl_c(base, tmp_path):
    """`python -m fastsds.train` where DeepSpeed, xformers and bitsandbytes cannot be imported; then one Ctrl-C."""
    script = (
        "import sys, runpy\n"
        "for name in ('deepspeed', 'xformers', 'bitsandbytes'): sys.modules[name] = None\n"
        "sys.argv = ['train', *sys.argv[1:]]; runpy.run_module('fastsds.train', run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", script, *base, *runs.sets("steps=100000", "checkpoint_every=0")]
    argv += ["--output", str(tmp_path / "run")]
    process = subprocess.Popen(argv, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "step 1/" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "--resume latest" in said and "Traceback" not in said
    kept = list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 1 and int(kept[0].name.split("_")[1]) == runs.rows(tmp_path / "run")[-1]["step"]


def test_the_trainer_reads_top_to_bottom():
    """At most 300 lines; third-party imports that not every run needs are not at the top."""
    text = (runs.ROOT / "fastsds" / "train.py").read_text()
    assert len(text.splitlines()) <= 300
    top = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"deepspeed", "diffusers", "transformers", "open_clip"}


def test_schedule():
    from fastsds.optimizer import schedule

    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert schedule(0, 1, 0) == 1.0 and schedule(0, 5, 30) == pytest.approx(1 / 30)


def test_groups_decay_matrices_alone(base):
    from fastsds.config import OptimizerConfig
    from fastsds.optimizer import groups
    from fastsds.student import load_student

    student = load_student(str(Path(base[1]).parent / "student"), latent_shape=(4, 4, 4))
    names = {id(p): n for n, p in student.named_parameters()}
    found = groups(student, OptimizerConfig())
    grouped = {names[id(p)]: g for g in found for p in g["params"]}
    assert set(grouped) == set(names.values())
    for name, group in grouped.items():
        decays = not name.startswith("head.") and student.get_parameter(name).ndim > 1
        assert (group["weight_decay"] > 0) == decays, name
        assert group["base_lr"] == (2e-3 if name.startswith("head.") else 1e-3), name
