"""`fastsds doctor`: every check made to fail by real means, a line to run for each thing that is wrong, and a quiet report."""

import importlib
import os
import stat
import sys
from collections import Counter

import pytest
import torch

from fastsds import doctor
from fastsds.doctor import compute, places, versions
from fastsds.doctor.finding import GIB, NONE, OK, WARN, WRONG, Finding, pip

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def only(findings):
    (found,) = findings
    return found


def wrong(findings, words):
    found = only(findings)
    assert found.state == WRONG and words in found.found, found
    assert found.run and "\n" not in found.run
    return found


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(name, version, **fields) puts the metadata of a package first on the path, as an installer would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name, version, requires=(), python=">=3.11"):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        return tmp_path

    return put


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# -- versions ----------------------------------------------------------------------------------------------------------


def test_this_machines_versions_are_right():
    found = list(versions.packages())
    assert {f.state for f in found} <= {OK, NONE}
    assert {"torch", "triton", "xformers", "deepspeed", "bitsandbytes"} <= {f.name for f in found}
    assert only(versions.python()).state == OK and only(versions.kernels_folder()).state == OK


def test_a_version_that_is_too_old(installed):
    installed("torch", "1.13.0")
    found = wrong([f for f in versions.packages() if f.name == "torch"], "1.13.0, expected ")
    assert "-m pip install 'torch" in found.run and ">=2.11" in found.run
    assert Counter(f.state for f in versions.packages())[WRONG] == 1


def test_a_package_that_is_missing_and_an_extra_that_nobody_needs(installed):
    requires = ("no-such-package>=3", "no-such-logger; extra == 'logs'", "never; sys_platform == 'x'")
    installed("fastsds", "9.9", requires)
    found = {f.name: f for f in versions.packages()}
    assert found.keys() == {"no-such-package", "no-such-logger"}
    wrong([found["no-such-package"]], "not installed, expected >=3")
    assert found["no-such-logger"].state == NONE and "fastsds[logs]" in found["no-such-logger"].found


def test_a_python_that_is_too_old(installed):
    installed("fastsds", "9.9", python=">=3.99")
    wrong(versions.python(), "expected >=3.99")


def test_a_folder_that_hides_the_package_kernels(installed, tmp_path):
    """Another package of that name: nothing of PyPI's is imported from it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    try:
        found = wrong(versions.kernels_folder(), "which is not PyPI's")
        assert found.run.startswith(f"mv {tmp_path / 'kernels' / '__init__.py'} ")
        installed("kernels", "0.11.1")
        wrong(versions.kernels_folder(), "not PyPI's 0.11.1")
        (tmp_path / "kernels-0.11.1.dist-info" / "RECORD").write_text("kernels/cli/__init__.py,,\nkernels/__init__.py,,\n")
        assert only(versions.kernels_folder()) == Finding("kernels", OK, "PyPI's, 0.11.1")
    finally:
        sys.path.remove(str(tmp_path))


# -- what computes -----------------------------------------------------------------------------------------------------


@NO_GPU
def test_no_gpu_is_nothing_wrong(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    found = only(compute.gpu())
    assert found.state == NONE and not found.run


@NO_GPU
def test_a_gpu_that_torch_does_not_see(monkeypatch, tmp_path):
    program(tmp_path / "nvidia-smi", "echo '470.82.01, NVIDIA A100-SXM4-80GB'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = wrong(compute.gpu(), "NVIDIA A100-SXM4-80GB, driver 470.82.01, and torch sees none")
    assert found.run.startswith("nvidia-smi")


@NO_GPU
def test_attention_without_an_operator():
    from fastsds.teacher.probe import BACKENDS

    assert only(compute.attention()).state == OK
    wrong(compute.attention({"cudnn": BACKENDS["cudnn"]}), "none is right")


def test_attention_that_is_wrong():
    """An operator that forgets the scale, and one without a backward pass."""
    from fastsds.teacher.probe import Backend

    forgets = Backend(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, ("cpu", "cuda"))
    detached = Backend(lambda q, k, v: (q @ k.mT).softmax(-1).detach() @ v.detach(), ("cpu", "cuda"))
    for found in compute.attention({"forgets": forgets, "detached": detached}):
        wrong([found], "forgets: wrong: output")
        assert "detached: no backward" in found.found


CHECK = """
import sys
from fastsds import doctor
from fastsds.doctor import compute
for found in doctor.examine([getattr(compute, name) for name in sys.argv[1:]]):
    print(found.state, found.run.replace("\\n", "NEWLINE"), found.found, sep="|")
"""


def in_a_process(python, *checks, **env):
    """Checks in a process of its own: what they import is in none of ours."""
    done = python("-c", CHECK, *checks, env={"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **env})
    assert done.returncode == 0, done.stderr[-2000:]
    return [Finding("", *(line.split("|", 2)[k] for k in (0, 2, 1))) for line in done.stdout.splitlines() if "|" in line]


def broken(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"raise ImportError('lib{name}.so: cannot open shared object file')\n")


def test_libraries_that_do_not_import(python, tmp_path):
    """A broken bitsandbytes and a broken DeepSpeed, first on the path."""
    for name in ("bitsandbytes", "deepspeed"):
        broken(tmp_path, name)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    eight_bit, sharded = in_a_process(python, "bitsandbytes", "deepspeed", PYTHONPATH=path)
    assert "libbitsandbytes.so: cannot open" in wrong([eight_bit], "cannot open").found
    assert "pip install --force-reinstall 'bitsandbytes" in eight_bit.run
    assert "libdeepspeed.so: cannot open" in wrong([sharded], "cannot open").found


@NO_GPU
def test_a_compiler_of_kernels_that_fails(python, tmp_path):
    answer = "Cuda compilation tools, release 12.8, V12.8.93"
    program(tmp_path / "ptxas", f'case "$*" in *--version*) echo "{answer}";; *) exit 1;; esac')
    (bad,) = in_a_process(python, "triton", TRITON_PTXAS_PATH=str(tmp_path / "ptxas"))
    assert wrong([bad], "").run.endswith("'") and "triton" in bad.run
    (slow,) = in_a_process(python, "triton", TRITON_INTERPRET="1")
    assert slow.state == WARN and slow.run == "unset TRITON_INTERPRET"


def test_the_libraries_work_here():
    assert only(compute.bitsandbytes()).state == OK
    assert only(compute.compiler()).state == OK


@pytest.mark.slow
def test_deepspeed_joins_its_ranks_here():
    found = only(compute.deepspeed())
    assert found.state == OK and "sums over its ranks" in found.found


def test_a_cplusplus_compiler_that_is_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    assert wrong(compute.compiler(), "No such file").run.startswith("unset CXX")
    monkeypatch.setenv("CXX", str(program(tmp_path / "cc", "echo 'fatal error: cannot find cc1plus' >&2; exit 1")))
    wrong(compute.compiler(), "cannot find cc1plus")


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    found = {f.name: f for f in places.disks()}
    wrong([found["disk, hub cache"]], "cannot be written")
    assert found["disk, hub cache"].run.startswith("export HF_HOME=")
    wrong([places.folder("disk", places.Path("/proc"), 1, "cd /elsewhere")], "/proc cannot be written")


def test_a_disk_that_is_full(tmp_path):
    assert places.folder("disk", tmp_path / "not" / "yet", 1, "x") == only(
        [places.folder("disk", tmp_path / "not" / "yet", 1, "y")]
    )
    found = places.folder("disk", tmp_path, 1 << 60, "cd /elsewhere")
    assert found.state == WARN and found.run == "cd /elsewhere" and "wanted" in found.found


def test_shared_memory_matters_to_several_gpus(tmp_path):
    assert only(places.shared_memory(gpus=1)).state == NONE
    assert only(places.shared_memory(str(tmp_path), 1, gpus=2)).state == OK
    small = only(places.shared_memory(str(tmp_path / "none"), GIB, gpus=2))
    assert small.state == WARN and "--shm-size" in small.run


# -- all of it ---------------------------------------------------------------------------------------------------------


def test_a_check_that_cannot_begin_is_wrong_itself():
    def check():
        yield importlib.import_module("no_such_module_at_all")

    def fails():
        raise RuntimeError("first line\nsecond line")
        yield

    missing, failed = doctor.examine([check, fails])
    assert "pip install" in wrong([missing], "no_such_module_at_all").run
    assert wrong([failed], "first line").found == "first line"


def test_one_line_to_run_for_each_thing_that_is_wrong():
    found = [Finding("a", OK, "fine"), Finding("b", WRONG, "bad", "mend b"), Finding("c", WARN, "odd", "look at c")]
    lines = doctor.report(found).splitlines()
    assert [line.split()[-2:] for line in lines if "run:" in line] == [["mend", "b"], ["at", "c"]]
    assert lines[-1] == "1 wrong, 1 to know of"
    assert doctor.report(found[:1]).splitlines()[-1] == "everything works"


def test_lines_name_what_fastsds_asks_for():
    assert pip("deepspeed").endswith("-m pip install 'deepspeed<0.20,>=0.19'")
    assert "install -e" in pip("fastsds")


@pytest.mark.slow
@NO_GPU
def test_the_command_on_this_machine(python, tmp_path):
    """Quiet, complete, exit code 0; and 1 with one line to run where two things are broken."""
    done = python("-m", "fastsds.cli", "doctor", env={"HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "compiled for sm_90" in done.stdout
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok ", "- ", "warn ", "      run:")) for line in lines[:-2]), lines
    assert all(line.startswith("doctor: ") for line in done.stderr.splitlines()), done.stderr
    assert "everything runs on the CPU" in done.stdout
    broken(tmp_path, "bitsandbytes")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = python("-m", "fastsds.cli", "doctor", env={"PYTHONPATH": path, "CXX": "/nowhere/g++"})
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [k + 1 for k, x in enumerate(lines) if x.startswith("wrong")] == [k for k, x in enumerate(lines) if "run:" in x]
    assert lines[-1] == "2 wrong, 0 to know of", done.stdout
