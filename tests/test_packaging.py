"""What is installed, under which names, and what `make` says. No test installs anything into the environment it runs in."""
import ast
import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Prints where the kernels are, and says whether the PyPI package of the same name is still itself.
PROBE = """
import importlib.util, sys
import fastsds
print("ours", importlib.util.find_spec("fastsds.kernels.philox").origin)
import kernels
print("theirs", kernels.MARK)
from fastsds.config import CONFIGS
print("configs", CONFIGS)
"""


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory) -> Path:
    """A copy of the source tree, so that nothing is built in the one that is tested."""
    copy = tmp_path_factory.mktemp("source") / "fastsds"
    copy.mkdir()
    for name in ("setup.py", "README.md", "LICENSE", "constraints.txt"):
        if (root / name).exists():
            shutil.copy(root / name, copy)
    for name in ("fastsds", "kernels", "configs", "benchmarks"):
        if (root / name).exists():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "probe.py").write_text(PROBE)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_probe.py").write_text(f"def test_probe():\n    exec({PROBE!r})\n")
    return copy


@pytest.fixture(scope="module")
def pypi(tmp_path_factory) -> Path:
    """A folder that holds a stand-in for the PyPI package `kernels`."""
    folder = tmp_path_factory.mktemp("pypi")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("MARK = 'pypi'\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory, python) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    done = python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--use-pep517",
                  "--wheel-dir", folder, tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel.read(name).decode())


@pytest.fixture(scope="module")
def installed_wheel(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def editable(tree, tmp_path_factory, python) -> Path:
    """The Python of a fresh environment with an editable install; all other packages come from the tested environment."""
    folder = tmp_path_factory.mktemp("editable") / "venv"
    done = python("-m", "venv", "--without-pip", folder)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = python("-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index",
                  "--no-build-isolation", "--use-pep517", "--ignore-installed", "--editable", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin" / "python"


def probed(done) -> dict[str, str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


# the name `kernels`: ours only as fastsds.kernels, theirs never hidden

def test_kernels_and_configs_are_no_packages(root):
    for name in ("kernels", "configs", "benchmarks", "tests"):
        assert not (root / name / "__init__.py").exists()
    assert not (root / "fastsds" / "kernels").exists() and not (root / "fastsds" / "configs").exists()


def test_wheel(installed_wheel, pypi, python, tmp_path):
    found = probed(python("-c", PROBE, cwd=tmp_path, env={"PYTHONPATH": f"{installed_wheel}{os.pathsep}{pypi}"}))
    assert found == {"ours": str(installed_wheel / "fastsds/kernels/philox.py"), "theirs": "pypi",
                     "configs": str(installed_wheel / "fastsds/configs")}


def test_editable_install(editable, tree, pypi, python, tmp_path):
    found = probed(python("-c", PROBE, cwd=tmp_path, env={"PYTHONPATH": pypi}, executable=editable))
    assert found == {"ours": str(tree / "kernels/philox.py"), "theirs": "pypi", "configs": str(tree / "configs")}
    done = python("-c", "import kernels", cwd=tmp_path, executable=editable)
    if importlib.util.find_spec("kernels") is None:
        assert "No module named 'kernels'" in done.stderr, "an editable install must not add the tree to the path"
    done = python("--version", executable=editable.parent / "fastsds", cwd=tmp_path)
    assert done.stdout.startswith("fastsds "), done.stderr


@pytest.mark.parametrize("how", [("-m", "probe"), ("probe.py",), ("-c", PROBE)], ids=["-m", "script", "-c"])
def test_in_the_source_tree(how, tree, pypi, python):
    found = probed(python(*how, cwd=tree, env={"PYTHONPATH": pypi}))
    assert found == {"ours": str(tree / "kernels/philox.py"), "theirs": "pypi", "configs": str(tree / "configs")}


@pytest.mark.parametrize("how", ["python -m pytest", "pytest"])
def test_under_pytest(how, tree, pypi, python):
    path = str(pypi) if how != "pytest" else f"{pypi}{os.pathsep}{tree}"
    arguments = ["-m", "pytest"] if how != "pytest" else [Path(sys.executable).parent / "pytest"]
    done = python(*arguments, "-q", "-p", "no:cacheprovider", "tests/test_probe.py", cwd=tree, env={"PYTHONPATH": path})
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_kernels_import_for_real(installed_wheel, python, tmp_path):
    done = python("-c", "from fastsds.kernels import philox; print(philox.__name__)", cwd=tmp_path,
                  env={"PYTHONPATH": installed_wheel})
    assert done.stdout == "fastsds.kernels.philox\n", done.stderr


@pytest.mark.skipif("kernels" in {d.name for d in importlib.metadata.distributions()}, reason="`kernels` is installed")
def test_libraries_do_not_take_our_folder_for_the_package(tree, python):
    code = ("from transformers.utils import is_kernels_available as a; "
            "from diffusers.utils.import_utils import is_kernels_available as b; print(a(), b())")
    done = python("-c", code, cwd=tree)
    assert done.stdout == "False False\n", done.stdout + done.stderr


# `deepspeed fastsds/train.py` puts fastsds/ first on sys.path

def test_no_module_bears_a_name_that_others_import(root):
    ours = {p.stem for p in (root / "fastsds").iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__", "__pycache__"}
    assert ours >= {"config", "quiet", "cli"}
    installed = {name for name, owners in importlib.metadata.packages_distributions().items() if owners != ["fastsds"]}
    assert installed >= {"torch", "transformers"}
    assert not ours & (set(sys.stdlib_module_names) | installed)
    assert not ours & {"datasets", "evaluate", "accelerate", "wandb", "kernels"}, "often installed beside this package"


# the wheel

def test_wheel_holds_the_package_and_nothing_else(wheel, root):
    names = wheel.namelist()
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastsds"}
    python_files = {str(p.relative_to(root)) for p in (root / "fastsds").rglob("*.py")}
    python_files |= {f"fastsds/{p.relative_to(root)}" for p in (root / "kernels").glob("*.py")}
    assert {n for n in names if n.endswith(".py")} == python_files
    data = {f"fastsds/{p.relative_to(root)}" for p in (root / "configs").rglob("*") if p.is_file()}
    data |= {str(p.relative_to(root)) for p in (root / "fastsds/world/weights").rglob("*") if p.is_file()}
    assert data >= {f"fastsds/configs/{name}" for name in ("zero0.json", "zero3.json", "world.yaml", "reproduce/spine.yaml")}
    assert data <= set(names)
    assert any("licenses/LICENSE" in n or n.endswith("/LICENSE") for n in names)


def test_version_and_entry_point(wheel, metadata):
    import fastsds
    assert metadata["Version"] == fastsds.__version__
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "fastsds = fastsds.cli:script" in wheel.read(name).decode()


def imported(folder: Path) -> set[str]:
    """Top-level names imported by the Python files under a folder, at any depth of the code."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("folders, extras", [(("fastsds", "kernels"), {"", "data", "logs"}), (("tests",), {"", "test"}),
                                             (("benchmarks",), {"", "bench"})])
def test_everything_imported_is_required(folders, extras, metadata, root):
    requirements = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    required = {canonicalize_name(r.name) for r in requirements
                if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)}
    owners = importlib.metadata.packages_distributions()
    local = {"fastsds"} | {p.stem for folder in folders for p in (root / folder).glob("*.py")}
    optional = {"kernels", "pytest"}                  # the stand-in; fastsds.testing serves tests
    missing = {name for folder in folders for name in imported(root / folder) - local - optional
               if not required & {canonicalize_name(o) for o in owners.get(name, [name])}}
    assert not missing


# constraints.txt

def test_constraints_pin_what_setup_asks_for(metadata, root):
    pins = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line)
        assert match, f"constraints.txt: not name==version: {line!r}"
        pins[canonicalize_name(match[1])] = match[2]
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes the pin {pins[name]}"
    assert "pip" not in pins and "fastsds" not in pins


# the command line and the Makefile

def test_cli(python):
    assert python("-m", "fastsds.cli", "--version").stdout.startswith("fastsds ")
    done = python("-m", "fastsds.cli", "--help")
    assert done.returncode == 0 and "demo" in done.stdout
    done = python("-m", "fastsds.cli", "deom")
    from fastsds.cli import COMMANDS

    assert done.returncode == 2 and done.stderr == f"error: unknown command 'deom'; expected one of {', '.join(COMMANDS)}\n"
    assert python("-m", "fastsds.cli").returncode == 2


def test_cli_turns_a_config_error_into_exit_code_2(monkeypatch, capsys):
    import types

    from fastsds import cli
    from fastsds.config import ConfigError

    def main(argv):
        raise ConfigError(f"x.yaml: {argv}")
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: types.SimpleNamespace(main=main))
    assert cli.main(["demo", "--seeds", "5"]) == 2
    assert capsys.readouterr().err == "error: x.yaml: ['--seeds', '5']\n"


@pytest.fixture
def tools(tmp_path):
    """A folder with the tools of a bare machine, as the only PATH; returns a function that runs make there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "make", "git", "g++"):
        (folder / name).symlink_to(shutil.which(name))
    script = folder / "python3.11"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
    script.chmod(0o755)

    def make(root, *arguments, without=()):
        for name in without:
            (folder / name).unlink()
        # pytest may itself run under make: forget that
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        return subprocess.run([shutil.which("make"), "--no-print-directory", "VENV=none", *arguments], cwd=root,
                              env={**env, "PATH": str(folder)}, capture_output=True, text=True, timeout=60)
    return make


@pytest.mark.skipif(not shutil.which("make"), reason="make is missing")
class TestMake:
    def test_check_passes_on_a_bare_machine(self, tools, root):
        done = tools(root, "check")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize("missing, expected", [
        ("git", "error: git is missing;"), ("g++", "error: g++ is missing;"),
        ("python3.11", "error: Python 3.11 or 3.12 with venv is missing"),
    ])
    def test_check_names_what_is_missing(self, missing, expected, tools, root):
        done = tools(root, "check", without=[missing])
        first, *rest = done.stderr.splitlines()
        assert done.returncode == 2 and first.startswith(expected)
        assert len(rest) == 1 and rest[0].startswith("make: ***"), "one sentence, then make's own line"

    def test_a_wrong_python_is_refused(self, tools, root, tmp_path):
        done = tools(root, "check", "PYTHON=/bin/false")
        assert done.returncode == 2 and "/bin/false is not Python 3.11 or 3.12 with venv" in done.stderr

    def test_help_lists_the_targets(self, tools, root):
        text = tools(root).stdout
        for target in ("demo", "test", "bench", "lint", "clean"):
            assert f"make {target} " in text

    def test_failed_installation_shows_the_end_of_the_log_without_addresses(self, root, tmp_path):
        (tmp_path / "constraints.txt").write_text("torch==2.11.0\n")
        pip = tmp_path / "python"
        pip.write_text("#!/bin/sh\necho Looking in indexes: https://a.example/simple\n"
                       "echo ERROR: no match at https://a.example/simple/torch/ for torch\nexit 1\n")
        pip.chmod(0o755)
        done = subprocess.run([root / ".ci" / "install", pip, tmp_path / "install.log"], cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "ERROR: no match at <address> for torch" in done.stderr
        assert "example" not in done.stdout + done.stderr


def test_ci_runs_what_a_user_runs(root):
    script = root / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
