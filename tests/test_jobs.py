"""The queue of jobs, with small commands: order, what is kept, what goes on, what a failure and an interrupt leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastsds import jobs
from fastsds.config import ConfigError
from fastsds.jobs import Job


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
    assert json.loads((tmp_path / "late" / "done.json").read_text())["value"] == marks


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
    (tmp_path / "a" / "done.json").unlink()  # as if it had been cut off
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
    assert not (tmp_path / "bad" / "done.json").exists() and not (tmp_path / "sleeper" / "done.json").exists()


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


def test_progress_line_where_there_is_no_terminal(capsys, monkeypatch):
    line, now = jobs.Line(), [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    for now[0] in np.arange(0, 20, 0.1):
        line.say("working")
    assert capsys.readouterr().out.count("working\n") == 4


def test_a_failure_leaves_the_others_running_where_that_is_asked_for(tmp_path, capsys):
    """All but what needs it; the logs of all that failed come at the end, and the rest is not run again."""
    bad = [small(tmp_path, f"bad{code}", f"print('why {code}'); raise SystemExit({code})") for code in (2, 3)]
    lame = small(tmp_path, "lame", "", measure=lambda: {}["missing"])
    needs = small(tmp_path, "needs", "", needs=[bad[0]])
    late = small(tmp_path, "late", "", needs=[needs])
    good = [small(tmp_path, f"good{k}", "") for k in range(3)]
    with pytest.raises(jobs.Failed) as error:
        jobs.run([*bad, needs, late, lame, *good], keep_going=True)
    assert error.value.code == 3
    for words in ("bad2 ended with exit code 2", "why 2", "bad3", "why 3", "lame: KeyError: 'missing'", "Traceback"):
        assert words in str(error.value)
    assert all(job.results is not None for job in good)
    assert not (needs.folder / "done.json").exists() and not late.folder.exists()
    out = capsys.readouterr().out
    assert "needs: left out" in out and "late: left out" in out and "bad2: FAILED" in out


def test_a_mistake_while_measuring_is_one_clear_line(tmp_path):
    def measure():
        raise ConfigError("a.json, row 3: no caption")

    with pytest.raises(jobs.Failed, match="^a: a.json, row 3: no caption$") as error:
        jobs.run([small(tmp_path, "a", "", measure=measure)])
    assert error.value.code == 2


def test_what_was_cut_off_goes_on_with_what_it_kept(tmp_path, capsys):
    """Only if it says so, and only with the settings that it was started with."""
    code = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '|')"

    def job(key=1, go_on=lambda: ["--on"]):
        out = tmp_path / "a" / "out"
        return Job("a", tmp_path / "a", lambda: [sys.executable, "-c", code, str(out)], key={"k": key}, go_on=go_on)

    def run(*args, fresh=False, **how) -> str:
        made = job(*args, **how)
        jobs.run([made], fresh=fresh)
        (tmp_path / "a" / "done.json").unlink()  # as if it had been killed
        assert made.fingerprint()["command"][-1] != "--on"
        return (tmp_path / "a" / "out").read_text()

    assert run() == "|"
    assert run() == "|--on|"
    assert run(go_on=lambda: None) == "|" == run(fresh=True)
    assert "begun anew" not in capsys.readouterr().out
    assert run(2) == "|"
    assert "a: what was cut off is of other settings or weights, and is begun anew" in capsys.readouterr().out


def test_what_needs_a_job_that_changed_is_not_taken_for_finished(tmp_path):
    def pair(key):
        first = small(tmp_path, "first", "", key={"k": key})
        return [first, small(tmp_path, "second", "", needs=[first])]

    jobs.run(pair(1))
    jobs.run(pair(1))
    (tmp_path / "first" / "done.json").unlink()
    with pytest.raises(ConfigError, match="second.* is of other settings"):
        jobs.run(pair(2))


def test_each_place_has_its_own_environment_and_one_command_at_a_time(tmp_path):
    code = "import os, time; time.sleep(0.2); print(os.environ['PLACE'])"
    made = [small(tmp_path, f"{k}", code) for k in range(6)]
    free = Job("free", tmp_path / "free", lambda: None, lambda: {"busy": sum(job.process is not None for job in made)})
    jobs.run([*made, free], [{"PLACE": name} for name in "abc"])
    assert sorted(job.log.read_text().strip() for job in made) == sorted("abcabc")
    assert free.results["busy"] == 3  # what has no command waits for no place


KILLED = """
import pathlib, sys
from fastsds import jobs
root = pathlib.Path(sys.argv[1])
code = "import os, sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
with jobs.claim(root, "a test") as lock:
    jobs.run([jobs.Job("a", root / "a", lambda: [sys.executable, "-c", code, str(root / "pid")])], lock=lock)
"""


def test_a_folder_is_in_use_as_long_as_anything_runs_there(tmp_path):
    """Also what a command left behind that was killed: its run still writes."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = int((tmp_path / "pid").read_text())
    assert alive(left)
    with pytest.raises(ConfigError, match="is in use"), jobs.claim(tmp_path, "a test"):
        pass
    os.kill(left, signal.SIGKILL)
    while alive(left):
        time.sleep(0.05)
    with jobs.claim(tmp_path, "a test"):
        with pytest.raises(ConfigError, match="is in use"), jobs.claim(tmp_path, "a test"):
            pass
    with jobs.claim(tmp_path, "a test"):
        pass


def test_what_begins_anew_deletes_its_own_alone(tmp_path):
    for by, fresh in (("demo", True), ("demo", True), ("reproduce", False), ("demo", False), ("reproduce", False)):
        with jobs.claim(tmp_path, by, fresh):
            pass
    with pytest.raises(ConfigError, match="has the runs of `reproduce`.*name another --output"):
        with jobs.claim(tmp_path, "demo", fresh=True):
            pass


def test_a_place_that_is_no_folder_is_one_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file.*; expected a folder that can be written"), jobs.claim(folder, "a test"):
            pass


def test_ctrl_c_while_an_earlier_run_is_deleted_leaves_what_is_known(tmp_path, monkeypatch):
    def job():
        return small(tmp_path, "a", "")

    def cut(folder):  # in whatever order
        (Path(folder) / "job.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    jobs.run([job()])
    (tmp_path / "a" / "done.json").unlink()
    (tmp_path / "a" / "run").mkdir()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jobs.shutil, "rmtree", cut)
        jobs.run([job()])
    jobs.run([job()])
    assert not (tmp_path / "a" / "run").exists()


def test_what_a_full_disk_cut_starts_anew(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "job.json").write_text('{"name": "a", "comm')
    made = Job("a", tmp_path / "a", lambda: [sys.executable, "-c", ""], go_on=lambda: ["--on"])
    jobs.run([made])
    assert made.results is not None and json.loads((tmp_path / "a" / "job.json").read_text())["name"] == "a"


def test_seconds_are_a_job_s_own_not_its_wait(tmp_path):
    """Measuring is done one after the other: the last one waits for the first two."""

    def slow() -> dict:
        time.sleep(0.6)
        return {}

    made = [jobs.Job(name, tmp_path / name, lambda: None, slow) for name in ("a", "b", "c")]
    began = time.monotonic()
    jobs.run(made)
    assert time.monotonic() - began >= 1.8
    assert all(0.6 <= job.results["seconds_in_all"] < 1.2 for job in made)
