"""The demo: its tables and picture from canned figures, its job queue with small commands, and the whole of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsds import comparison, demo, figures, jobs, report
from fastsds.config import ConfigError, load_recipe
from fastsds.jobs import Job
from fastsds.provenance import provenance

# Tables and words.


def metrics(offset=0.0, **extra):
    names = ("text", "image", "group", "swap_object", "swap_colour", "swap_shape", "retrieval")
    values = {f"{split}/{name}": 10.0 * k + offset for split in ("seen", "test") for k, name in enumerate(names)}
    return values | extra


def test_scores_table():
    arms = {"pretrained": [metrics()], "L_CLIP": [metrics(1)], "L_CLIP + L_SDS": [metrics(2, **{"seen/reading": 88.8})]}
    header, rows = report.scores_table(arms, ("seen", "test"))
    assert len(rows) == 7 and all(len(row) == len(header) for row in rows)
    cell = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
    assert cell["seen", "L_CLIP + L_SDS"]["teacher's reading of h_w(f(x))"] == "88.8"
    assert cell["held out", "L_CLIP + L_SDS"]["teacher's reading of h_w(f(x))"] == "-"
    assert cell["held out", "L_CLIP"]["object swap"] == "31.0"
    assert rows[-1] == ["chance", "", "25.0", "25.0", "16.7", "50.0", "50.0", "50.0", "1.0", "25.0"]
    text = report.as_text(header, rows).split("\n")
    assert max(map(len, text)) <= 140 and sum("L_CLIP + L_SDS" in line for line in text) == 2
    body = [line for line in text if "L_CLIP" in line or "pretrained" in line]
    assert len({line.index("0.0" if "pretrained" in line else ".0") for line in body}) <= 3
    markdown = report.as_markdown(header, rows).split("\n")
    assert len(markdown) == 9 and {line.count("|") for line in markdown} == {len(header) + 1}


def test_mean_and_deviation():
    assert report.mean_and_deviation([61.0]) == "61.0"
    assert report.mean_and_deviation([60.0, 62.0, 64.0]) == "62.0 +- 2.0"
    assert report.mean_and_deviation([None]) == "-"
    assert "62.0 ± 2.0" in report.as_markdown(["a"], [["62.0 +- 2.0"]])


def test_first_line_says_what_differs():
    line = report.settings_line(load_recipe(), (4, 8, 8), 32, "world")
    assert "\n" not in line and "arXiv 2307.09233" in line
    for words in ("all parameters", "without the UNet's Jacobian", "inverse_snr_root", "of the summed norm", " T (all t)",
                  "2 x 32", "32x32", "teacher world"):  # fmt: skip
        assert words in line
    line = report.settings_line(load_recipe(None, ["loss.lambda=30", "loss.t=[0.6, 1]"]), (4, 8, 8), 32, "world")
    assert "lambda 30 of the element mean = 0.117" in line and "t in [0.6, 1] T" in line
    sets = ["student.tune=layernorm", "loss.gradient=full", "loss.weighting=uniform", "loss.t=[0, 1]"]
    line = report.settings_line(load_recipe(None, sets), (4, 8, 8), 32, "world")
    for words in ("all parameters", "gradient", "all t"):
        assert words not in line
    assert "log SNR" in report.settings_line(load_recipe(None, ["loss.t=null", "loss.log_snr=[-3, 1]"]), (4, 8, 8), 32, "x")


def test_a_tag_takes_no_commits_place(tmp_path, monkeypatch):
    """`git describe` names the nearest annotated tag, and a release has one."""
    import fastsds
    from fastsds.provenance import commit

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "fastsds").mkdir()
    (tmp_path / "fastsds" / "__init__.py").touch()
    for words in (("init",), ("add", "."), ("commit", "-m", "one"), ("tag", "-a", "v1", "-m", "one")):
        git(*words)
    monkeypatch.setattr(fastsds, "__file__", str(tmp_path / "fastsds" / "__init__.py"))
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "fastsds" / "__init__.py").write_text("changed")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_provenance():
    source = provenance()
    assert set(source) == {"commit", "versions", "machine"} and "cores" in source["machine"]
    assert source["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def canned(generator, right):
    names = demo.METRICS
    return {(split, name): 100.0 * (generator.random(90) < right) for split in ("seen", "test") for name in names}


def test_differences_are_paired_and_corrected():
    generator = np.random.default_rng(0)
    a, b = canned(generator, 0.8), canned(generator, 0.5)
    rows = comparison.compare("a - b", [a], [b], demo.METRICS, demo.TESTED)
    assert len(rows) == 2 * len(demo.METRICS)
    for row in rows:
        key = row["split"], row["metric"]
        assert row["difference"] == pytest.approx(a[key].mean() - b[key].mean()) == row["seeds"][0]
        assert row["low"] < row["difference"] < row["high"] and row["low"] > 0
        assert ("p" in row) == (row["metric"] in demo.TESTED)
        if "p" in row:
            assert row["only_first"] == ((a[key] > 0) & (b[key] == 0)).sum()
            assert row["p"] <= row["p_holm"] <= 6 * row["p"] + 1e-15
    header, cells = report.differences_table(rows)
    assert len(header) == 7 and all(len(row) == 7 for row in cells)
    assert report.verdict(rows[0]).startswith("a - b above 0 on text, seen: yes, +")
    reverse = comparison.compare("b - a", [b], [a], ("text",))
    assert reverse[0]["high"] < 0 and ": no, -" in report.verdict(reverse[0])
    assert len(report.differences_table(reverse)[0]) == 5


def test_picture(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    shown = [
        {
            "kind": kind, "captions": ("a red ring left of a blue square", "a blue square left of a red ring"),
            "images": generator.integers(0, 255, (2, 3, 32, 32), dtype=np.uint8),
            "decoded": generator.integers(0, 255, (2, 3, 32, 32), dtype=np.uint8),
            "choices": {"L_CLIP": (True, False), "L_CLIP + L_SDS": (True, True)},
        }
        for kind in ("object", "colour", "shape")
    ]  # fmt: skip
    curves = {
        arm: {"loss": [(20, 2.0), (40, 1.0)], "held out": [(0, 50.0), (40, 70.0)], "seen": []}
        for arm in ("L_CLIP", "L_CLIP + L_SDS")
    }
    figures.picture(tmp_path / "demo.png", shown, curves, "title")
    image = np.asarray(Image.open(tmp_path / "demo.png").convert("RGB"))
    assert min(image.shape[:2]) > 400 and image.std() > 20
    for item in shown:
        item["decoded"] = None
    figures.picture(tmp_path / "other.png", shown, curves, "title")
    assert Image.open(tmp_path / "other.png").height < image.shape[0]


# The queue.


def python(code):
    return lambda: [sys.executable, "-c", code]


def small(tmp_path, name, code, **rest):
    return Job(name, tmp_path / name, python(code), **rest)


def test_queue_runs_two_at_a_time_in_order_of_needs(tmp_path):
    log = tmp_path / "log"
    code = f"""
import time
def say(mark):
    with open({str(log)!r}, "a") as file:
        file.write(mark)
say("+")
while open({str(log)!r}).read().count("+") < 2:
    time.sleep(0.02)
time.sleep(0.3)
say("-")
"""
    one, two, three = (small(tmp_path, n, code) for n in "abc")
    late = small(tmp_path, "late", "print('x')", needs=[three], measure=lambda: {"value": log.read_text()})
    seen = []
    later = Job("later", tmp_path / "later", lambda: seen.append(late.results["value"]), needs=[late])
    jobs.run([later, late, one, two, three])
    marks = log.read_text()
    assert marks.count("+") == 3 and "+++" not in marks and marks.startswith("++-")
    assert seen == [marks] and late.results["value"] == marks
    assert json.loads((tmp_path / "late" / "results.json").read_text())["value"] == marks


def test_children_have_one_thread_and_a_port_of_their_own(tmp_path):
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MASTER_PORT'])"
    pair = [small(tmp_path, n, code) for n in "ab"]
    jobs.run(pair)
    threads, ports = zip(*(job.log.read_text().split() for job in pair), strict=True)
    assert threads == ("1", "1") and len(set(ports)) == 2


def test_finished_jobs_are_not_run_again(tmp_path, capsys):
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x')"
    for _ in range(2):
        job = small(tmp_path, "a", code, measure=lambda: {"value": 3}, key={"weights": 1})
        jobs.run([job])
        assert job.results["value"] == 3
    assert count.read_text() == "x" and job.reused and "finished before" in capsys.readouterr().out
    (tmp_path / "a" / "results.json").unlink()  # as if it had been cut off
    jobs.run([small(tmp_path, "a", code, measure=lambda: {"value": 3})])
    assert count.read_text() == "xx"
    with pytest.raises(ConfigError, match="other settings"):
        jobs.run([small(tmp_path, "a", code, key={"weights": 2})])
    jobs.run([small(tmp_path, "a", code, key={"weights": 2})], fresh=True)
    assert count.read_text() == "xxx"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        jobs.run([small(tmp_path, "a", "")], fresh=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path(f"/proc/{pid}/stat").exists() else False


def test_a_failed_job_shows_its_log_and_stops_the_other(tmp_path):
    pid = tmp_path / "pid"
    sleeper = small(tmp_path, "sleeper", f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    bad = "import os, sys, time\nwhile not (os.path.exists(P) and open(P).read()): time.sleep(0.05)\n"
    failing = small(tmp_path, "bad", bad.replace("P", repr(str(pid))) + "print('what went wrong'); sys.exit(3)")
    began = time.monotonic()
    with pytest.raises(jobs.Failed, match="bad ended with exit code 3") as error:
        jobs.run([sleeper, failing])
    assert "what went wrong" in str(error.value) and error.value.code == 3
    assert time.monotonic() - began < 50 and not alive(int(pid.read_text()))
    assert not (tmp_path / "bad" / "results.json").exists() and not (tmp_path / "sleeper" / "results.json").exists()


INTERRUPTED = """
import pathlib, signal, sys
from fastsds import jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
root = pathlib.Path(sys.argv[1])
code = "import os, sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
def job(n):
    return jobs.Job(n, root / n, lambda: [sys.executable, "-c", code, str(root / (n + ".pid"))])
try:
    jobs.run([job("a"), job("b")])
except KeyboardInterrupt:
    print("stopped"); sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_both_children(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pids = [tmp_path / "a.pid", tmp_path / "b.pid"]
    deadline = time.monotonic() + 120
    while not all(p.exists() and p.read_text() for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in out
    assert not any(alive(int(p.read_text())) for p in pids)


def test_progress_names_steps_loss_and_time_left(tmp_path):
    job = Job("arm", tmp_path / "arm", lambda: None)
    job.argv = ["python", "--set", "steps=400"]
    assert job.status() == "arm: starting"
    (tmp_path / "arm" / "run").mkdir(parents=True)
    row = {"split": "train", "step": 100, "loss": 2.5, "seconds": 40.0}
    rows = [{"split": "eval", "step": 0}, row | {"step": 50, "seconds": 30.0}, row, {"split": "eval"}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"split": "train", "st'
    (tmp_path / "arm" / "run" / "metrics.jsonl").write_text(text)
    assert job.status() == "arm: step 100/400, loss 2.500, left 1:00"


def test_arms_from_a_bank_share_it_and_wait_for_it(tmp_path):
    settings = demo.parse(["--seeds", "2", "--controls", "bank", "--set", "data.samples=64", "--output", str(tmp_path)])
    plan = demo.plan_seeds(settings)
    arms, banks = {arm.name: arm for arm in demo.BANKED}, {arm.bank for arm in demo.BANKED}
    assert {key for key in plan if key[0] == "bank"} == {("bank", name) for name in banks}
    for name, arm in arms.items():
        for seed in (0, 1):
            bank, sets = plan["bank", arm.bank], plan[name, seed].command()
            assert bank in plan[name, seed].needs and list(plan).index(("bank", arm.bank)) < list(plan).index((name, seed))
            path = f"bank.path={bank.folder / 'bank'}"
            assert path in sets and path in bank.command() and "loss.gradient=amortised" in sets
            load_recipe(None, [value for value in sets if "=" in value])
    for key, job in plan.items():  # what training from a bank does not show, the tables' notes do
        job.results = {"seconds_in_all": 7.0 if key[0] == "bank" else 100.0}
    assert demo.building(plan) == dict.fromkeys(banks, 7.0)
    with pytest.raises(ConfigError, match="a bank needs a data set that ends"):
        demo.parse(["--controls", "bank", "--output", str(tmp_path)])


def test_progress_line_where_there_is_no_terminal(capsys, monkeypatch):
    line, now = jobs.Line(), [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    for now[0] in np.arange(0, 20, 0.1):
        line.say("working")
    assert capsys.readouterr().out.count("working\n") == 4


# The command line and the plan.


def test_bad_arguments(tmp_path):
    for argv, words in (
        (["--seeds", "0"], "--seeds is 0"), (["--controls", "shufled"], "shufled"), (["--items", "0"], "--items"),
        (["--set", "stepz=4"], "steps"), (["--set", "steps"], "key=value"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            demo.main([*argv, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--what"])
    assert stopped.value.code == 2


def value(argv, key):
    return [word.removeprefix(f"{key}=") for word in argv if word.startswith(f"{key}=")][-1]


def test_plan_of_seeds_and_controls(tmp_path):
    argv = ["--seeds", "2", "--controls", "--control-seeds", "1", "--output", str(tmp_path), "--set", "steps=50"]
    settings = demo.parse(argv)
    plan = demo.plan_seeds(settings)
    assert len(settings.controls) == len(demo.CONTROLS)
    assert len(plan) == 2 * 4 + len(demo.CONTROLS) + 1  # a seed: pretraining, two arms, the start; one control pretrains
    at = {name: plan[name, 0] for name, seed in plan if seed == 0}
    at["clip"].results, at["sds"].results = {"seconds": 10.0}, {"seconds": 23.0}
    argv = {name: job.command() for name, job in at.items() if name != "pretrained"}
    assert plan["pretrained", 0].command() is None
    for arm in demo.CONTROLS:
        load_recipe(None, [word for word in argv[arm.name] if "=" in word])
        assert all(f"{word}" in argv[arm.name] for word in arm.sets)
    assert value(argv["clip"], "loss.lambda") == "0" and not any("loss.lambda" in a for a in argv["sds"])
    assert value(argv["clip_same_wall_time"], "steps") == "115" and value(argv["clip"], "steps") == "50"
    assert at["clip_same_wall_time"].needs[1:] == [at["clip"], at["sds"]]
    assert "--parsing" in argv["pretraining_parsing_student"] and "--parsing" not in argv["pretraining"]
    assert value(argv["parsing_student"], "student.model") == str(tmp_path / "seed_0/pretraining_parsing_student/student")
    assert value(argv["clip"], "student.model") == str(tmp_path / "seed_0/pretraining/student")
    again = plan["pretraining", 1].command()
    assert again[again.index("--seed") + 1] == value(plan["sds", 1].command(), "seed") == "1"
    folders = [job.folder for job in plan.values()]
    assert len(set(folders)) == len(folders)
    position = {id(job): k for k, job in enumerate(plan.values())}
    assert all(position[id(need)] < position[id(job)] for job in plan.values() for need in job.needs)


# The whole of it, from models that know nothing.


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The embedded world's models before any training, in their real formats."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    from fastsds.world import models
    from fastsds.world.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("untrained")
    teacher, student = root / "teacher", root / "student"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = train_tokenizer(teacher / "tokenizer", samples=256)
        models.autoencoder().save_pretrained(teacher / "vae")
        models.unet().save_pretrained(teacher / "unet")
        models.text_encoder(size).save_pretrained(teacher / "text_encoder")
        models.scheduler().save_pretrained(teacher / "scheduler")
        config = models.student_config(size, ".")
        state = CLIP(**config).state_dict()
    shutil.copytree(teacher / "tokenizer", student)
    save_file({k: v.contiguous() for k, v in state.items()}, student / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (student / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return root


def test_the_whole_demo(untrained, tmp_path, capsys):
    out = tmp_path / "out"
    sets = ["steps=4", "log_every=2", "eval.items=4", "eval.every=2", f"student.model={untrained / 'student'}",
            f"teacher.path={untrained / 'teacher'}", "data.batch=4"]  # fmt: skip
    argv = ["--output", str(out), "--items", "6", *(word for s in sets for word in ("--set", s))]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].startswith("Not the paper's settings")
    assert "all parameters train" in printed[0] and "2 x 4 pairs" in printed[0]
    progress = [line for line in printed if line.startswith("[0:") and "L_CLIP + L_SDS: " in line]
    assert progress
    table = (out / "table.md").read_text()
    for label in ("pretrained", "L_CLIP", "L_CLIP + L_SDS"):
        assert table.count(f"| {label} |") == 2
        assert sum(f"  {label} " in line for line in printed) >= 2
    results = json.loads((out / "results.json").read_text())
    assert {"commit", "versions", "machine", "command", "recipe", "arms", "differences"} <= set(results)
    for label, arm in results["arms"].items():
        assert set(arm["metrics"]) >= {f"{s}/{m}" for s in ("seen", "test") for m in (*demo.METRICS, "swap")}
        assert ("test/reading" in arm["metrics"]) == (label == "L_CLIP + L_SDS")
        assert label == "pretrained" or arm["seconds"] > 0
    assert (out / "demo.png").stat().st_size > 20_000
    assert [line.strip() for line in printed if line.startswith("  /")] == [
        str(out / name) for name in ("table.md", "results.json", "demo.png", "sds", "clip")
    ]
    # both arms: the same batches and the same start, so the same first contrastive loss until the teacher speaks
    first = [json.loads((out / arm / "run" / "metrics.jsonl").read_text().split("\n")[0]) for arm in ("clip", "sds")]
    assert first[0] == first[1] and first[0]["step"] == 0 and first[0]["suite"] == "world_dev"


TRAINER = """
import json, pathlib, shutil, sys
run, argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
run.mkdir(parents=True)
shutil.copytree([a.partition("=")[2] for a in argv if a.startswith("student.model=")][-1], run / "student")
row = {"split": "train", "step": 4, "loss": 1.0, "clip": 1.0, "images_per_s": 64.0 if "loss.lambda=0" in argv else 32.0}
(run / "metrics.jsonl").write_text(json.dumps(row | {"seconds": 1.0}) + "\\n")
(run / "argv.json").write_text(json.dumps(argv))
"""


def test_seeds_and_a_control_with_a_stand_in_for_the_trainer(untrained, tmp_path, capsys, monkeypatch):
    real = demo.training

    def training(*args, **kwargs):
        job = real(*args, **kwargs)
        command = job.command
        job.command = lambda: [sys.executable, "-c", TRAINER, *command()[4:]]
        return job

    def pretraining(seed, folder, flags=()):
        code = f"import shutil; shutil.copytree({str(untrained / 'student')!r}, {str(folder / 'student')!r})"
        return Job(f"pretraining {seed}", folder, lambda: [sys.executable, "-c", code])

    monkeypatch.setattr(demo, "training", training)
    monkeypatch.setattr(demo, "pretraining", pretraining)
    argv = ["--seeds", "2", "--controls", "clip_same_wall_time", "--control-seeds", "1", "--items", "4",
            "--output", str(tmp_path), "--set", "steps=10"]  # fmt: skip
    assert demo.main(argv) == 0
    out = capsys.readouterr().out
    assert "2 seed(s) (1 for the controls)" in out and "above 0 on object swap, held out: no" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {k: len(v) for k, v in results["arms"].items()} == {
        "pretrained": 2, "L_CLIP": 2, "L_CLIP + L_SDS": 2, "L_CLIP, same wall time": 1
    }  # fmt: skip
    # the stand-in trains nothing: everything is equal, and the statistics say so
    assert {d["difference"] for d in results["differences"]} == {0.0}
    assert "20" == value(json.loads((tmp_path / "seed_0/clip_same_wall_time/run/argv.json").read_text()), "steps")
    assert demo.main(argv) == 0
    assert capsys.readouterr().out.count("finished before") == 2 * 4 + 1
