"""A checkpoint is whole or absent, readable by others, and refused where it does not fit."""

import json
import os
import shutil

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

from fastsds import checkpoint
from fastsds.config import ConfigError, load_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ["--recipe", str(runs.write_recipe(tmp_path_factory.mktemp("tiny")))]


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "run"
    assert runs.train(*base, *runs.sets("steps=8", "checkpoint_every=2"), "--output", output) == 0
    return output


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def resume(base, output, *more, at="latest"):
    argv = [*base, *runs.sets("steps=8", "checkpoint_every=2", *more), "--output", output, "--resume", at]
    return runs.train(*argv)


def test_the_last_two_are_kept(done):
    assert checkpoint.steps(done) == [6, 8]
    assert sorted(os.listdir(checkpoint.folder(done))) == ["step_00000006", "step_00000008"]


def test_a_run_that_goes_back_leaves_its_later_checkpoints_behind(base, run, monkeypatch):
    """As it does their rows: else `--resume latest` would go on from steps that are in no row."""
    import test_resume

    test_resume.stop_at(monkeypatch, 7)
    assert resume(base, run, at=runs.at(run, 6)) == 130
    assert checkpoint.steps(run) == [6, 7]
    monkeypatch.undo()
    assert resume(base, run) == 0 and checkpoint.steps(run) == [7, 8]
    assert [row["step"] for row in runs.rows(run)] == list(range(1, 9))


def test_what_is_in_one(done):
    path = runs.at(done, 8)
    assert sorted(p.name for p in path.iterdir()) == ["optimizer.safetensors", "state.json", "student"]
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 8 and state["recipe"]["loss"]["lambda"] == 30.0 and state["versions"]["torch"]
    weights = load_file(path / "student" / "open_clip_model.safetensors")
    assert weights["logit_scale"].ndim == 0  # open_clip's own form
    slots = load_file(path / "optimizer.safetensors")
    names = {f"clip.{k}" for k in weights} | {"head.linear.weight", "head.linear.bias"}
    assert set(slots) == {f"{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq")} | {"clip.logit_scale"}
    assert not [p for p in path.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_the_moments_are_adams(base, tmp_path):
    """After one step exp_avg = (1 - beta1) g and exp_avg_sq = (1 - beta2) g^2 of one and the same gradient."""
    assert runs.train(*base, *runs.sets("steps=1"), "--output", tmp_path / "run") == 0
    slots = load_file(runs.at(tmp_path / "run", 1) / "optimizer.safetensors")
    for name in ("head.linear.weight", "clip.visual.conv1.weight"):
        g = slots[f"{name}.exp_avg"] / (1 - 0.9)
        torch.testing.assert_close(slots[f"{name}.exp_avg_sq"], (1 - 0.98) * g * g, rtol=1e-4, atol=1e-20)
        assert g.abs().max() > 0


def test_a_save_that_breaks_off_leaves_the_last_one(base, run, monkeypatch):
    """Whatever file it breaks at."""
    from fastsds import checkpoint as module

    shutil.rmtree(runs.at(run, 8))
    save_student, calls = module.save_student, []
    for broken in ("save_student", "_sync"):
        def fail(*args, broken=broken, **kwargs):
            calls.append(broken)
            if broken == "save_student":
                save_student(*args, **kwargs)
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module, broken, fail)
            with pytest.raises(OSError, match="no space"):
                resume(base, run)
        assert checkpoint.steps(run) == [6]
    assert calls == ["save_student", "_sync"]
    assert resume(base, run) == 0
    assert checkpoint.steps(run) == [6, 8]
    assert not [name for name in os.listdir(checkpoint.folder(run)) if name.startswith(".")]


def test_latest_is_the_highest_complete_step(run):
    (checkpoint.folder(run) / ".partial_step_00000099").mkdir()
    assert checkpoint.find("latest", run) == runs.at(run, 8)
    assert checkpoint.find(str(runs.at(run, 6)), run) == runs.at(run, 6)


@pytest.mark.parametrize(
    "change, key",
    [
        ("steps=9", "steps"),
        ("loss.lambda=3", "loss.lambda"),
        ("optimizer.betas=[0.9, 0.99]", "optimizer.betas"),
        ("seed=1", "seed"),
        ("loss.t=[0.5, 1.0]", "loss.t"),
        ("data.accumulation=1", "data.accumulation"),
        ("precision=bf16", "precision"),
    ],
)
def test_another_recipe_is_refused_by_its_key(base, run, capfd, change, key):
    before = sorted(run.rglob("*")), (run / "metrics.jsonl").read_text()
    assert resume(base, run, change) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and f" {key} is " in error[0] and "the checkpoint was made with" in error[0]
    assert (sorted(run.rglob("*")), (run / "metrics.jsonl").read_text()) == before


def test_what_changes_no_loss_may_change(base, run):
    shutil.rmtree(runs.at(run, 8))
    assert resume(base, run, "log_every=2", "checkpoint_every=0", "data.workers=1") == 0


def break_json(path):
    (path / "state.json").write_text("{")


def break_weights(path):
    file = path / "student" / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def drop_tensor(path):
    file = path / "student" / "open_clip_model.safetensors"
    weights = load_file(file)
    del weights["visual.proj"]
    save_file(weights, file)


def reshape_tensor(path):
    file = path / "student" / "open_clip_model.safetensors"
    save_file({**load_file(file), "visual.proj": torch.zeros(3)}, file)


def drop_moment(path):
    file = path / "optimizer.safetensors"
    slots = load_file(file)
    del slots["clip.visual.proj.exp_avg"]
    save_file(slots, file)


def newer_format(path):
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))


@pytest.mark.parametrize(
    "damage, word",
    [
        (break_json, "state.json"),
        (break_weights, "open_clip_model.safetensors"),
        (drop_tensor, "clip.visual.proj"),
        (reshape_tensor, "clip.visual.proj"),
        (drop_moment, "clip.visual.proj.exp_avg"),
        (newer_format, "format 99"),
    ],
)
def test_a_damaged_checkpoint_is_refused(base, run, capfd, damage, word):
    damage(runs.at(run, 8))
    assert resume(base, run) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and word in error[0] and str(runs.at(run, 8)) in error[0]


def test_other_data_is_refused(done):
    path = runs.at(done, 8)
    state = json.loads((path / "state.json").read_text())
    data, recipe = {key: state[key] for key in ("samples", "identity")}, load_recipe(done / "recipe.yaml")
    assert checkpoint.load(path, recipe, data).step == 8
    assert checkpoint.load(path, recipe, {"samples": None, "identity": None}).step == 8  # nobody knows
    with pytest.raises(ConfigError, match=f"data.source has 5 samples, the checkpoint saw {data['samples']}"):
        checkpoint.load(path, recipe, {**data, "samples": 5})
    with pytest.raises(ConfigError, match="data.source holds other images or captions"):
        checkpoint.load(path, recipe, {**data, "identity": "others"})


def test_nothing_is_unpickled(done):
    """Neither ours nor DeepSpeed's loader that unpickles is called anywhere."""
    for path in (runs.ROOT / "fastsds").rglob("*.py"):
        text = path.read_text()
        for word in ("torch.load(", "load_checkpoint(", "pickle"):
            assert word not in text or path.name == "sharding.py" and word == "pickle", (path, word)
