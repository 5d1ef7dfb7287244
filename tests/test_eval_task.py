"""`fastsds eval --task`: cross-modal students on a task, kept, reused and compared as suites' results are."""

import json
import subprocess
import sys

import pytest
import runs
import tiny

from fastsds.config import ConfigError
from fastsds.crossmodal import load_crossmodal, save_crossmodal
from fastsds.data.tasks import load_task
from fastsds.evaluation import command, task_command
from fastsds.evaluation.compare import compare
from fastsds.evaluation.results import load_result
from fastsds.evaluation.tasks import evaluate_task

SIZES = {"train": 4, "dev": 4, "test": 60, "dev_shift": 4, "shift": 40}
ASKED = (
    "--task", "world_entailment", "--split", "test", "--split", "shift",
    "--option", "sizes={train: 4, dev: 4, test: 60, dev_shift: 4, shift: 40}",
)  # fmt: skip
RECIPE = """
recipe: clip_td
steps: 1
student: {model: ./vilt}
data: {batch: 4, streams: 4, options: {sizes: {train: 8, dev: 4, test: 60, dev_shift: 4, shift: 40}}}
optimizer: {warmup: 0}
loss: {beta: 0}
eval: {splits: [], every: 0}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two students of three classes, one whose classes stand in another order, one of choices."""
    home = tmp_path_factory.mktemp("home")
    tiny.save_vilt(home / "vilt")
    turned = load_task("world_entailment", sizes=SIZES).classes[::-1]
    for name, classes, seed in (("a", 3, 0), ("b", 3, 1), ("turned", turned, 0), ("choice", 0, 0)):
        student = load_crossmodal(home / "vilt", classes=classes, seed=seed)
        save_crossmodal(student.state_dict(), student, home / name)
    tiny.save_student(home / "clip")
    return home


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> what is printed, in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert command.main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_a_student_is_asked_once(home, run, tmp_path, monkeypatch):
    printed = run("--model", home / "a", *ASKED)
    (kept,) = tmp_path.glob("evaluations/*/world_entailment")
    found = load_result(kept)
    expected = evaluate_task(
        load_crossmodal(home / "a").eval(), load_task("world_entailment", sizes=SIZES), ("test", "shift")
    )
    assert found.rows == expected.rows and found.metrics == expected.metrics and found.headline == expected.headline
    assert found.about["fingerprint"] == expected.about["fingerprint"]
    for metric in ("test/accuracy", "shift/accuracy"):
        assert f"{found.metrics[metric]:.2f}" in printed and metric in printed
    assert "label=neutral" not in printed and "label=neutral" in run("--model", home / "a", *ASKED, "--all")
    monkeypatch.setattr(task_command, "evaluate_task", lambda *_, **__: pytest.fail("it was asked again"))
    assert run("--model", home / "a", *ASKED) == printed
    for other, says in ((["--precision", "bf16"], '"bf16"'), (["--split", "dev"], r'"shift", "dev"\]')):
        with pytest.raises(ConfigError, match=f"of another scorer: .*{says}.*; name another folder, or delete it"):
            run("--model", home / "a", *ASKED, *other)
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        run("--model", home / "a", *ASKED, "--precision", "bf16", "--output", "half")


def test_two_are_paired(home, run, tmp_path):
    said = json.loads(run("--model", home / "a", "--baseline", home / "b", *ASKED, "--format", "json"))
    folders = [next(tmp_path.glob(f"evaluations/*_{name}")) for name in "ab"]
    results = [load_result(folder / "world_entailment") for folder in folders]
    assert results[0].metrics != results[1].metrics
    for d in compare([([results[0]], [results[1]])], every=True):
        assert said[0]["differences"][d.metric]["points"] == d.difference.points
    kept = json.loads(run("--compare", *folders, "--format", "json"))
    assert kept == said


def test_a_run_and_its_checkpoint_are_models(home, run, tmp_path):
    (home / "recipe.yaml").write_text(RECIPE)
    assert runs.train("--recipe", home / "recipe.yaml", "--output", tmp_path / "run") == 0
    run("--model", "run", "--baseline", next((tmp_path / "run" / "checkpoints").iterdir()), *ASKED)
    rows = [load_result(kept).rows for kept in tmp_path.glob("evaluations/*/world_entailment")]
    assert len(rows) == 2 and rows[0] == rows[1]


def test_bf16_and_the_batch(home, run, tmp_path):
    run("--model", home / "a", *ASKED, "--precision", "bf16", "--batch", 7, "--output", "half")
    (kept,) = tmp_path.glob("half/*/world_entailment")
    assert load_result(kept).about["scorer"]["settings"]["precision"] == "bf16" and len(load_result(kept).rows) == 100


@pytest.mark.parametrize("model, words, says", [
    ("a", ("--task", "world_entailment"), "--split: none; expected some of train, dev, test, dev_shift, shift"),
    ("a", ("--task", "world_entailment", "--split", "val"), "--split: val; expected some of train"),
    ("a", ("--task", "entailment", "--split", "test"), "task 'entailment': expected one of snli_ve.*nearest: world_entail"),
    ("a", ("--task", "snli_ve", "--split", "test"), "task snli_ve: expected the folder of its files"),
    ("a", ("--task", "snli_ve=nowhere", "--split", "test"), "folder nowhere does not exist"),
    ("a", (*ASKED, "--option", "size=3"), "task world_entailment: unknown option 'size', expected one of"),
    ("a", (*ASKED, "--option", "sizes"), "--option sizes: expected NAME=VALUE"),
    ("a", (*ASKED, "--suite", "world_dev"), "--suite: of suites; expected none beside --task"),
    ("a", (*ASKED, "--scorer", "diffusion", "--teacher", "world"), "--scorer: of suites"),
    ("a", (*ASKED, "--steps", "3"), "--steps: of --scorer diffusion alone"),
    ("a", (*ASKED, "--format", "clip_benchmark"), "--format clip_benchmark"),
    ("a", ("--suite", "world_dev", "--split", "test"), "--split: of --task alone"),
    ("choice", ASKED, "model .*choice, task world_entailment: its head has one score a choice, the task asks for 3 classes"),
    ("turned", ASKED, "model .*turned, task world_entailment: its head's class 0 is 'contradiction', the task's 'entailment'"),
    ("vilt", ASKED, "model .*vilt: .*no head.safetensors"),
    ("clip", ASKED, "model .*clip: "),
    ("nowhere", ASKED, "model .*nowhere: no such folder"),
])  # fmt: skip
def test_a_mistake_is_one_error(model, words, says, home, run, tmp_path):
    with pytest.raises(ConfigError, match=says):
        run("--model", home / model, *words)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_said_before_anything_is_asked(home, run, tmp_path, monkeypatch):
    monkeypatch.setattr(task_command, "evaluate_task", lambda *_, **__: pytest.fail("it was asked"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^file/.*/world_entailment: Not a directory"):
        run("--model", home / "a", *ASKED, "--output", "file")


@pytest.mark.slow
def test_two_ranks_are_one(home, run, root, tmp_path):
    run("--model", home / "a", *ASKED)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastsds.cli", "eval")
    argv = [sys.executable, *words, "--model", str(home / "a"), *ASKED, "--batch", "16", "--output", str(tmp_path / "two")]
    assert subprocess.run(argv, cwd=root, timeout=180).returncode == 0
    one, two = (load_result(next(tmp_path.glob(f"{of}/*/world_entailment"))) for of in ("evaluations", "two"))
    assert one.rows == two.rows and one.about["scorer"] == two.about["scorer"]
