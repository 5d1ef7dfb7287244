"""A run that was stopped and resumed is the run that was not: the same losses, bit for bit, and the same files."""

import json
import os
import signal

import pytest
import runs
from safetensors.torch import load_file

from fastsds import checkpoint
from fastsds.metrics import Metrics

WAYS = {
    "sds": (),
    "auto": ("loss.lambda=auto", "loss.sds_every=2"),
    "full": ("loss.gradient=full", "loss.noised=false"),
    "layernorm": ("student.tune=layernorm",),
    "lora": ("student.tune=lora", "student.lora.rank=3"),
    "patterns": ("student.tune=[clip.visual.*attn*, clip.ln_final.*]",),
    "clip": ("loss.lambda=0",),
    "micro": ("loss.gradient=full", "teacher.micro_batch=4"),
    "bits": ("optimizer.name=adamw8bit",),
    "bf16": ("precision=bf16",),
    "ridge": ("head.init=ridge", "head.samples=64", "data.workers=1"),
}
STEPS = 9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ["--recipe", str(runs.write_recipe(tmp_path_factory.mktemp("tiny")))]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Uninterrupted runs, made when asked for."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def get(way: str):
        if way not in made:
            made[way] = folder / way
            assert runs.train(*arguments(base, way), "--output", made[way]) == 0
        return made[way]

    return get


def arguments(base, way: str) -> list[str]:
    return [*base, *runs.sets(f"steps={STEPS}", "checkpoint_every=0", "data.batch=16", *WAYS[way])]


def stop_at(monkeypatch, step: int, number=signal.SIGTERM) -> None:
    """Send this process a signal while it is in the given step."""
    train = Metrics.train

    def spy(self, done, *args, **kwargs):
        train(self, done, *args, **kwargs)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "train", spy)


def same_files(a, b) -> None:
    for file in ("student/open_clip_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors"):
        ours, theirs = load_file(a / file), load_file(b / file)
        assert set(ours) == set(theirs)
        assert all(ours[key].equal(theirs[key]) for key in ours), file


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_uninterrupted_bit_for_bit(base, whole, tmp_path, monkeypatch, way):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert runs.train(*arguments(base, way), "--output", run) == 130
    assert checkpoint.steps(run) == [4] and not (run / "student").exists()
    assert runs.train(*arguments(base, way), "--output", run, "--resume", "latest") == 0
    for key in ("loss", "clip", "lr"):
        assert runs.losses(run, key) == runs.losses(whole(way), key)
    same_files(run, whole(way))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_step_can_be_the_last(base, whole, tmp_path, monkeypatch, number, capfd):
    """Stopped after each step in turn, the run ends all the same."""
    run, resume = tmp_path / "run", []
    for step in range(1, STEPS):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            assert runs.train(*arguments(base, "auto"), "--output", run, *resume) == 130
        resume = ["--resume", "latest"]
    assert "stopped after step 8" in capfd.readouterr().err
    assert runs.train(*arguments(base, "auto"), "--output", run, *resume) == 0
    assert runs.losses(run) == runs.losses(whole("auto"))
    same_files(run, whole("auto"))


def test_rows_after_the_checkpoint_are_dropped(base, whole, tmp_path):
    """A run that was killed has logged steps that its checkpoint does not know, and half a line."""
    run = tmp_path / "run"
    argv = [*base, *runs.sets(f"steps={STEPS}", "checkpoint_every=5", "data.batch=16")]
    assert runs.train(*argv, "--output", run) == 0
    (checkpoint.path_of(run, STEPS) / "state.json").unlink()
    checkpoint.path_of(run, STEPS).rename(run / "checkpoints" / ".partial_step_00000009")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "step": 10, "lo')
    assert runs.train(*argv, "--output", run, "--resume", "latest") == 0
    assert [row["step"] for row in runs.rows(run)] == list(range(1, STEPS + 1))
    assert runs.losses(run) == runs.losses(whole("sds"))


def test_a_finished_run_has_nothing_to_do(base, whole, capfd):
    run = whole("sds")
    before = (run / "metrics.jsonl").read_text()
    assert runs.train(*arguments(base, "sds"), "--output", run, "--resume", "latest") == 0
    assert (run / "metrics.jsonl").read_text() == before
    assert f"steps {STEPS} to {STEPS}" in capfd.readouterr().err


def test_a_checkpoint_by_its_path_into_another_folder(base, whole, tmp_path):
    argv = [*base, *runs.sets(f"steps={STEPS}", "checkpoint_every=3", "data.batch=16")]
    assert runs.train(*argv, "--output", tmp_path / "first") == 0
    path = runs.at(tmp_path / "first", 6)
    assert runs.train(*argv, "--output", tmp_path / "second", "--resume", path) == 0
    assert runs.losses(tmp_path / "second") == runs.losses(whole("sds"))[6:]
    assert runs.train(*argv, "--output", tmp_path / "second", "--resume", path) == 2  # it holds a run of its own


@pytest.fixture
def photographs(base, tmp_path):
    """Arguments: 40 small images, of which one cannot be read, and a run of 8 of 16 a step."""
    import tiny
    from PIL import Image

    rows, folder = ["filepath\ttitle"], tmp_path / "photographs"
    folder.mkdir()
    for i, image in enumerate(tiny.pixels(40)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png\ta red ring, number {i}")
    (folder / "7.png").write_bytes(b"not an image")
    (folder / "data.tsv").write_text("\n".join(rows) + "\n")
    sets = ("steps=8", "checkpoint_every=3", "data.batch=16", "data.accumulation=1", "data.max_skipped=0.1")
    return [*base, *runs.sets(*sets, f"data.source={folder / 'data.tsv'}")], folder


def test_damaged_samples_are_listed_as_if_nothing_had_happened(photographs, tmp_path, capfd):
    argv, folder = photographs
    assert runs.train(*argv, "--output", tmp_path / "whole") == 0
    whole = (tmp_path / "whole" / "skipped.jsonl").read_text()
    assert {json.loads(line)["id"] for line in whole.splitlines()} == {7} and len(whole.splitlines()) > 2
    back = ["--output", tmp_path / "whole", "--resume", runs.at(tmp_path / "whole", 6)]
    before = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert runs.train(*argv, *back, "--dry-run") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()} == before
    assert runs.train(*argv, *back) == 0
    assert (tmp_path / "whole" / "skipped.jsonl").read_text() == whole
    other = ["--output", tmp_path / "other", "--resume", runs.at(tmp_path / "whole", 6)]
    assert runs.train(*argv, *other) == 0
    assert (tmp_path / "whole" / "skipped.jsonl").read_text() == whole  # another folder's own
    assert whole.endswith((tmp_path / "other" / "skipped.jsonl").read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_stop_a_run_that_can_go_on(photographs, tmp_path, capfd, workers):
    """Past the share allowed a run ends like one that is stopped: what it has learnt is kept."""
    argv, folder = photographs
    argv = [*argv, *runs.sets(f"data.workers={workers}", "checkpoint_every=0")]
    assert runs.train(*argv, "--output", tmp_path / "whole") == 0
    capfd.readouterr()
    assert runs.train(*argv, *runs.sets("data.max_skipped=0"), "--output", tmp_path / "run") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    (step,) = checkpoint.steps(tmp_path / "run")
    assert step < 4 and len(errors) == 1
    assert "data.max_skipped is 0.0" in errors[0] and f"{runs.at(tmp_path / 'run', step)} is complete" in errors[0]
    assert runs.train(*argv, "--output", tmp_path / "run", "--resume", "latest") == 0
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "whole")
    for i in range(40):
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:70])
    assert runs.train(*argv, "--output", tmp_path / "none") == 2  # the first batch finds not one
    assert "40 of 40 samples cannot be used" in capfd.readouterr().err


def test_data_that_lie_elsewhere_go_on_and_changed_ones_do_not(photographs, tmp_path, capfd):
    """A node's own disk has another name in each job."""
    argv, folder = photographs
    assert runs.train(*argv, "--output", tmp_path / "whole") == 0
    moved = folder.rename(tmp_path / "moved")
    argv = [*argv, *runs.sets(f"data.source={moved / 'data.tsv'}", f"data.images={moved}"), "--output", tmp_path / "run"]
    argv += ["--resume", runs.at(tmp_path / "whole", 6)]
    assert runs.train(*argv) == 0
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "whole")[6:]
    text = (moved / "data.tsv").read_text()
    (moved / "data.tsv").write_text(text.replace("number 3", "number three"))
    argv[argv.index("--output") + 1] = tmp_path / "again"
    assert runs.train(*argv) == 2
    assert "data.source holds other images or captions" in capfd.readouterr().err and not (tmp_path / "again").exists()


def test_evaluations_are_those_of_the_uninterrupted_run(tmp_path, monkeypatch):
    """In the embedded world: an evaluation due at the stop is there once."""
    argv = runs.sets("steps=4", "data.batch=4", "log_every=1", "eval.every=2", "eval.items=3")
    assert runs.train(*argv, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert runs.train(*argv, "--output", tmp_path / "run") == 130
    assert runs.train(*argv, "--output", tmp_path / "run", "--resume", "latest") == 0
    assert runs.rows(tmp_path / "run", "eval") == runs.rows(tmp_path / "whole", "eval")
    for step in (0, 2, 4):
        ours, theirs = (runs.evaluation(tmp_path / name, step) for name in ("run", "whole"))
        assert ours.rows == theirs.rows


def test_how_the_teacher_is_asked_may_change_half_way(base, tmp_path, monkeypatch):
    """A run that does not fit goes on in less memory: the gradient is the same, to rounding."""
    sets, output = arguments(base, "full"), tmp_path / "run"
    stop_at(monkeypatch, 4)
    assert runs.train(*sets, "--output", output) == 130
    monkeypatch.undo()
    leaner = runs.sets("teacher.accelerate=true", "teacher.checkpoint=true", "teacher.micro_batch=8")
    assert runs.train(*sets, *leaner, "--output", output, "--resume", "latest") == 0
    assert runs.train(*sets, "--output", tmp_path / "whole") == 0
    assert runs.relative(runs.losses(output), runs.losses(tmp_path / "whole")) < 1e-4
