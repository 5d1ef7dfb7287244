"""The noise of third-party packages is silenced, comes back on request, and nothing else is lost."""
import io
import logging
import re
import sys

import pytest

from fastsds import quiet

NOISY = "xformers.ops, bitsandbytes, deepspeed"


def said(done) -> str:
    """What a process printed, without times."""
    assert done.returncode == 0, done.stderr
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+", "", done.stdout + done.stderr)


def test_imports_are_silent_unless_verbose(python, tmp_path, root):
    path = {"PYTHONPATH": str(root), "FASTSDS_VERBOSE": ""}
    assert said(python("-c", f"import fastsds, {NOISY}, open_clip, diffusers", cwd=tmp_path, env=path)) == ""
    bare = said(python("-c", f"import {NOISY}", cwd=tmp_path, env=path))
    verbose = said(python("-c", f"import fastsds, {NOISY}", cwd=tmp_path, env={**path, "FASTSDS_VERBOSE": "1"}))
    assert verbose == bare


def test_import_is_light(python, root):
    code = ("import sys, time; before = set(sys.modules); t = time.perf_counter(); import fastsds; "
            "t = time.perf_counter() - t; new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
            "print(t, *sorted(new - set(sys.stdlib_module_names)))")
    seconds, *modules = said(python("-c", code)).split()
    assert modules == ["fastsds"]
    assert float(seconds) < 0.5, "0.02 s when measured alone; the limit leaves room for a busy machine"


@pytest.fixture
def heard():
    """The records that reach a handler of the root logger, or of a logger's own."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    names = {name for name, _ in quiet.NOISE}
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield lambda: [r.getMessage() for r in records]
    for name in names:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("name, beginning", quiet.NOISE)
def test_each_noise_is_dropped_and_nothing_else(name, beginning, heard):
    logger = logging.getLogger(name)
    logger.warning(beginning + " and the rest of the line")
    assert heard() == []
    logger.warning("the loss is not finite")
    logger.error("out of memory: %d bytes", 3)
    assert heard() == ["the loss is not finite", "out of memory: 3 bytes"]


def test_install_twice_is_once():
    quiet.install()
    quiet.install()
    for name, _ in quiet.NOISE:
        assert len([f for f in logging.getLogger(name).filters if isinstance(f, quiet._Drop)]) == 1


def test_printed_drops_only_its_lines(monkeypatch):
    monkeypatch.delenv("FASTSDS_VERBOSE", raising=False)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with quiet.printed():
        print("step 1")
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
        print("\rprogress", end="", flush=True)
        assert out.getvalue() == "step 1\n\rprogress"
        print()
        print("DeepSpeed", end="", flush=True)
        print(" says something else")
        print("no newline at the end", end="")
    assert sys.stdout is out
    assert out.getvalue() == "step 1\n\rprogress\nDeepSpeed says something else\nno newline at the end"


def test_printed_lets_errors_through_and_restores(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(RuntimeError), quiet.printed():
        print("before")
        raise RuntimeError
    assert sys.stdout is out and out.getvalue() == "before\n"


def test_printed_is_transparent_when_verbose(monkeypatch):
    monkeypatch.setenv("FASTSDS_VERBOSE", "1")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with quiet.printed():
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
    assert "built successfully" in out.getvalue()


@pytest.mark.parametrize("value, expected", [("1", True), ("yes", True), ("0", False), ("", False)])
def test_verbose(value, expected, monkeypatch):
    monkeypatch.setenv("FASTSDS_VERBOSE", value)
    assert quiet.verbose() is expected
