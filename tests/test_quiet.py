"""The noise of third-party packages is silenced, comes back on request, and nothing else is lost."""
import logging
import re

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
    code = ("import sys, time; before = set(sys.modules); t = time.process_time(); import fastsds; "
            "t = time.process_time() - t; new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
            "print(t, *sorted(new - set(sys.stdlib_module_names)))")
    seconds, *modules = said(python("-c", code)).split()
    assert modules == ["fastsds"]
    assert float(seconds) < 0.1


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


@pytest.mark.parametrize("name", ["transformers.modeling_utils", "diffusers.models.modeling_utils"])
def test_loading_leaves_tensors_to_the_error_of_who_loads(name, monkeypatch):
    logger = logging.getLogger(name)
    monkeypatch.setenv("FASTSDS_VERBOSE", "0")
    with quiet.loading():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
    assert logger.isEnabledFor(logging.WARNING)
    monkeypatch.setenv("FASTSDS_VERBOSE", "1")
    with quiet.loading():
        assert logger.isEnabledFor(logging.WARNING)


def test_loading_draws_no_bar(monkeypatch, capfd):
    from transformers.utils.logging import tqdm
    monkeypatch.setenv("FASTSDS_VERBOSE", "0")
    with quiet.loading():
        assert list(tqdm(range(2), desc="Loading weights")) == [0, 1]
    assert capfd.readouterr().err == ""
    list(tqdm(range(2), desc="after the block"))
    assert "after the block" in capfd.readouterr().err
    with pytest.raises(RuntimeError), quiet.loading():
        raise RuntimeError
    monkeypatch.setenv("FASTSDS_VERBOSE", "1")
    with quiet.loading():
        list(tqdm(range(2), desc="Loading weights"))
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.parametrize("value, expected", [("1", True), ("yes", True), ("0", False), ("", False)])
def test_verbose(value, expected, monkeypatch):
    monkeypatch.setenv("FASTSDS_VERBOSE", value)
    assert quiet.verbose() is expected
