"""The file of `fastsds reproduce`: its mistakes, the shipped ones, and what they plan."""

import re
import sys
from pathlib import Path

import pytest
import released
import torch
from experiments import SMALL, writer

from fastsds import jobs
from fastsds.config import CONFIGS, ConfigError, as_dict, load_recipe
from fastsds.data.cache import PixelCache
from fastsds.reproduce import command
from fastsds.reproduce.experiment import SHIPPED, find, load, missing
from fastsds.reproduce.runs import Cell, plan

TASKS = ("clip_td", "clip_td_long", "clip_td_questions", "clip_td_choice", "clip_td_beta", "clip_td_repaired", "demo_clip_td")


@pytest.fixture
def file(tmp_path):
    return writer(tmp_path)


# The file.


@pytest.mark.parametrize("old, new, expected", [
    ("seeds: 2", "sedes: 2", "unknown key 'sedes'; the nearest known key is 'seeds'"),
    ("label: L_CLIP,", "lable: L_CLIP,", "unknown key 'arms.clip.lable'; the nearest known key is 'arms.NAME.label'"),
    ("loss.lambda: 0", "loss.lamda: 0", "arms.clip.sets: unknown key 'loss.lamda'; the nearest known key is 'loss.lambda'"),
    ("loss.lambda: 0", "loss.lambda: -1", "arms.clip.sets: loss.lambda is -1.0; expected at least 0"),
    ("steps: 4", "steps: few", "sets: steps is the text 'few'; expected a whole number"),
    ("seeds: 2", "seeds: 0", "seeds is 0; expected at least 1"),
    ("seeds: 2", "seeds: two", "seeds is the text 'two'; expected a whole number"),
    ("[16, all]", "[16, some]", "pairs is [16, \"some\"]; expected a list of which each is a whole number or a number or all"),
    ("[16, all]", "[16, 16]", "pairs is [16, 16]; expected numbers of pairs, at least 1 and each once, or all"),
    ("[16, all]", "[]", "expected numbers of pairs"),
    ("world: {}", "world: 3", "backbones.world is a section with keys, not 3"),
    ("  world: {}", "  a/b: {}", "backbones: the name is the text 'a/b'; expected letters, digits"),
    ("clip: {l", "pretrained: {l", "not pretrained"),
    ("against: [clip]", "against: [clap]", "arms.sds.against is the text 'clap'; expected another arm; the nearest is 'clip'"),
    ("against: [clip]", "against: [sds]", "arms.sds.against is the text 'sds'; expected another arm"),
    ("against: [clip]", "same_time_as: clip", "arms.sds.sets is {}; expected those of another arm"),
    ("world: {}", "world: {pretrain: [python, -c, pass]}", "backbones.world.pretrain is [\"python\", \"-c\", "),
    ("seeds: 2", "zero_shot_bound: -1", "zero_shot_bound is -1.0; expected at least 0, in points"),
    ("seeds: 2", "seeds: 2\nseeds: 3", "line 3: the key 'seeds' is written twice"),
    ("data.samples: 32, ", "", "arms.banked: a bank needs a data set that ends; expected data.samples"),
    ("label: L_CLIP + L_SDS", "label: L_CLIP", "arms.sds.label is the text 'L_CLIP'; expected another than clip's"),
    ("loss.lambda: 0", "seed: 3", "arms.clip.sets.seed is 3; expected none: it is what `seeds` says"),
    ("sets: {steps", "sets: {output: there, steps", "sets.output is the text 'there'; expected none: it is what `output` says"),
    ("seeds: 2", "recipe: no.yaml", "no.yaml: no such recipe file"),
    ("against: [clip]", "against: [clip, clip]", 'arms.sds.against is ["clip", "clip"]; expected each once'),
    ("label: L_CLIP + L_SDS", "label: pretrained", "sds.label is the text 'pretrained'; expected another than pretrained's"),
    ("world_test:\n", "world_tset:\n", "evaluation.world_tset: suite 'world_tset': expected one of"),
    ("items: 8", "itmes: 8", "world_test.options: the name is the text 'itmes'; expected one of items, seed"),
    ("items: 8", "items: few", "evaluation.world_test.options.items is the text 'few'; expected a whole number"),
    ("items: 8", "items: true", "evaluation.world_test.options.items is true; expected a whole number"),
    ("items: 8", "seed: 2026-01-01", "evaluation.world_test.options.seed is \"2026-01-01\"; expected a whole number"),
    ("items: 8", "3: 8", "evaluation.world_test.options: the name is 3; expected one of"),
    ("items: 8", "path: here", "evaluation.world_test.options: the name is the text 'path'; expected one of"),
    ("world_test:", "winoground: {path: x, options: {images: [a]}}\n  world_test:", "images is [\"a\"]; expected text"),
    ("world_test:", "winoground: {path: ''}\n  world_test:", "evaluation.winoground.path is the text ''; expected a text"),
])  # fmt: skip
def test_a_mistake_in_the_file_names_file_key_and_what_was_expected(old, new, expected, file):
    path = file(SMALL, (old, new))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert expected in str(error.value) and ("no.yaml" in expected or str(path) in str(error.value))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("old, new, expected", [
    ("[seen/text,", "[seen/txt,", "world_test.headline: world_test has no metric 'seen/txt'; the nearest is 'seen/text'"),
    ("claims: [test/text,", "claims: [test/reading,", "claims: world_test has no metric 'test/reading'; the nearest is"),
    ("zero_shot: [", "zero_shot: [accuracy, ", "zero_shot: world_test has no metric 'accuracy'"),
    ("options: {items: 8}", "path: here", "expected no path"),
    ("world: {}", "world: {sets: {data.source: no.tsv}}", "data.source: no such file or folder"),
    ("data.batch: 8", "data.batch: 8, data.streams: 0", "data.streams is 0"),
])  # fmt: skip
def test_what_only_data_and_suites_can_tell_is_said_before_anything_runs(old, new, expected, file, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "run", lambda *_, **__: pytest.fail("something runs"))
    path = file(SMALL, (old, new))
    with pytest.raises(ConfigError) as error:
        command.main([str(path), "--output", str(path.parent / "out")])
    assert expected in str(error.value) and not (path.parent / "out").exists()


def test_all_that_is_missing_is_said_at_once(tmp_path, capsys):
    """paper.yaml as it is shipped: a dry run prints its runs, then every place that is to be filled in."""
    with pytest.raises(ConfigError) as error:
        command.main(["paper", "--dry-run", "--output", str(tmp_path / "out")])
    asked = load(find("paper")).said.evaluation
    assert str(error.value).count("\n") == 1 + len(asked) and "data.source: no such file" in str(error.value)
    assert all(f"evaluation.{name}: " in str(error.value) for name in asked)
    out = capsys.readouterr().out
    assert "run: 144, 0 done" in out and "bank: 3, 0 done" in out and not (tmp_path / "out").exists()


def test_the_metrics_of_the_paper_are_its_suites(tmp_path):
    """On small sets in the formats in which the real ones are released."""
    text = find("paper").read_text()
    for name in re.findall(r"^  (\w+):", text[text.index("evaluation:") :], re.MULTILINE):
        (tmp_path / name).mkdir()
        (where,) = released.write({"imagenet": "zeroshot"}.get(name, name), tmp_path / name)
        text = re.sub(rf"(\n  {name}:.*?path: )[^\s,]+", rf"\g<1>{where}", text, count=1, flags=re.DOTALL)
    text = re.sub(r"options: {classes.*}", "options: {}", text)
    for place in ("lclip_only", "recommended", "paper_reading"):
        text = text.replace(f"../{place}.yaml", str(CONFIGS / f"{place}.yaml"))
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n")
    (tmp_path / "paper.yaml").write_text(text.replace("../../data/coco_train2017.tsv", "pairs.tsv"))
    assert missing(load(tmp_path / "paper.yaml")) == []


def test_shipped_files_are_found_by_name_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in SHIPPED.glob("*.yaml")}
    assert names == {"spine", "bank", "paper", "demo", *TASKS}
    for name in names:
        for text in (name, f"{name}.yaml", f"configs/reproduce/{name}.yaml"):
            assert find(text) == SHIPPED / f"{name}.yaml"
    (tmp_path / "spine").write_text("")
    assert find("spine") == tmp_path / "spine"
    with pytest.raises(ConfigError, match="spin: no such file; expected one, or the name of a shipped one: bank, clip_td, "):
        find("spin")


def test_the_file_of_the_documentation_is_one(root, tmp_path):
    page = (root / "docs" / "reproduce.md").read_text(encoding="utf-8")
    path = tmp_path / "files" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    (tmp_path / "recommended.yaml").write_text((CONFIGS / "recommended.yaml").read_text())
    made = plan(load(path, tmp_path / "out"))
    assert len(made.runs) == 2 * 3 * 3 * 3 and {cell.backbone for cell in made.runs} == {"vitb32", "mine"}
    lost = [line for line in missing(made.experiment) if "no such" not in line and "does not exist" not in line]
    assert not lost and missing(made.experiment)


@pytest.mark.parametrize("name", ["spine", "bank", "demo", *TASKS])
def test_what_the_world_needs_is_all_there(name):
    assert missing(load(find(name))) == []


# The plan.


def value(argv, key):
    return [word.removeprefix(f"{key}=") for word in argv if word.startswith(f"{key}=")][-1]


def test_what_is_shared_and_what_waits_for_what(file, tmp_path):
    made = plan(load(file(), tmp_path / "out"))
    assert made.begun == {tmp_path / "out" / "world" / "pretrained_world": Cell("world", "all", "pretrained", 0)}
    folders = [job.folder for job in made.jobs]
    assert len(set(folders)) == len(folders) == 12 + 2 + 13  # runs, a bank a size, evaluations of runs and start
    position = {job: k for k, job in enumerate(made.jobs)}
    assert all(position[need] < position[job] for job in made.jobs for need in job.needs)
    for cell, job in made.runs.items():
        recipe = load_recipe(None, [])
        assert made.evaluations[cell, "world_test"].needs == [job]
        assert made.starts[cell] == Cell("world", "all", "pretrained", 0)
        text = job.files()["recipe.yaml"]
        (job.folder.parent / job.folder.name).mkdir(parents=True)
        (job.folder / "recipe.yaml").write_text(text)
        recipe = load_recipe(job.folder / "recipe.yaml")
        assert recipe.seed == cell.seed and recipe.data.samples == (16 if cell.pairs == 16 else 32) and recipe.steps == 4
        assert recipe.loss.lambda_ == (0 if cell.arm == "clip" else 30)
        assert as_dict(recipe) == job.key["recipe"]
        if cell.arm == "banked":
            (bank,) = job.needs
            assert Path(recipe.bank.path) == bank.folder / "bank" and recipe.loss.gradient == "amortised"
            assert bank is made.runs[cell._replace(seed=1 - cell.seed)].needs[0]
            assert bank is not made.runs[cell._replace(pairs="all" if cell.pairs == 16 else 16)].needs[0]
        else:
            assert recipe.bank.path is None and job.needs == []


def test_a_bank_is_shared_by_all_that_ask_it_the_same(file, tmp_path):
    """Two backbones and an arm with another loss share it; other draws, noise or data do not; one's own is used as it is."""
    more = """
  again: {sets: {loss.gradient: amortised, bank.draws: 1, loss.lambda: 3, optimizer.lr: 1.0e-3}}
  two: {sets: {loss.gradient: amortised, bank.draws: 2}}
  noisier: {sets: {loss.gradient: amortised, bank.draws: 1, loss.t: [0.7, 1.0]}}
  mine: {sets: {loss.gradient: amortised, bank.path: mine}}
evaluation:"""
    text = file(SMALL, ("world: {}", "world: {}\n  other: {sets: {student.model: ./student}}"), ("\nevaluation:", more))
    made = plan(load(text, tmp_path / "out"))
    assert len(made.banks) == 2 * 3
    bank = {cell: Path(job.key["recipe"]["bank"]["path"] or "") for cell, job in made.runs.items()}
    for cell, path in bank.items():
        assert (path == bank[cell._replace(arm="banked")]) == (cell.arm in ("banked", "again"))
        assert path == bank[cell._replace(backbone="world", seed=0)]
        assert cell.arm != "mine" or (path == tmp_path / "mine" and made.runs[cell].needs == [])
    assert made.runs[Cell("other", 16, "clip", 0)].key["recipe"]["student"]["model"] == str(tmp_path / "student")


def test_the_spine_and_its_controls(tmp_path):
    """Every seed's arms start from that seed's pretraining, but for the one with its own; ten controls, each compared twice."""
    experiment = load(find("spine"), tmp_path, ["steps=50"], seeds=2)
    made, said = plan(experiment), experiment.said
    assert len(said.arms) == 12 and len(made.runs) == 24
    assert {"clip", "sds"} <= {a for name, arm in said.arms.items() if name not in ("clip", "sds") for a in arm.against}
    pretraining = {job.folder: job.command() for job in made.jobs if job.folder.name.startswith("pretraining")}
    assert len(pretraining) == 4
    for folder, argv in pretraining.items():
        assert argv[:5] == [sys.executable, "-m", "fastsds.world.pretrain", "--only", "student"]
        assert argv[argv.index("--output") + 1] == str(folder)
        assert argv[argv.index("--seed") + 1] == folder.parent.name.removeprefix("seed_")
        assert ("--parsing" in argv) == folder.name.endswith("parsing_student")
    for cell, job in made.runs.items():
        recipe, own = job.key["recipe"], "_parsing_student" if cell.arm == "parsing_student" else ""
        folder = tmp_path / "world" / f"seed_{cell.seed}" / f"pretraining{own}"
        assert recipe["student"]["model"] == str(folder / "student") and folder in pretraining and job.needs[0].folder == folder
        assert made.starts[cell] == Cell("world", "all", f"pretrained{own}", cell.seed)
        assert recipe["seed"] == cell.seed
    timed = made.runs[Cell("world", "all", "clip_same_wall_time", 1)]
    clip, sds = timed.needs[1:]
    assert (clip, sds) == tuple(made.runs[Cell("world", "all", arm, 1)] for arm in ("clip", "sds"))
    clip.results, sds.results = {"seconds": 10.0}, {"seconds": 23.0}
    assert value(timed.command(), "steps") == "115" and value(clip.command(), "steps") == "50"


def test_fewer_seeds_and_some_arms_are_part_of_the_whole(tmp_path):
    """So what they ran is not run again."""
    whole, part = (plan(load(find("spine"), tmp_path, **how)) for how in ({}, {"seeds": 1, "only": ["clip", "negatives"]}))
    found = {job.folder: job for job in whole.jobs}
    assert {cell.arm for cell in part.runs} == {"clip", "negatives"}
    for job in part.jobs:
        assert job.fingerprint() == found[job.folder].fingerprint()
    assert part.experiment.said.arms["negatives"].against == ("clip",)
    alone = plan(load(find("spine"), tmp_path, seeds=1, only=["parsing_student"]))
    assert all(job.fingerprint() == found[job.folder].fingerprint() for job in alone.jobs)  # its start keeps its place
    with pytest.raises(ConfigError, match="--seeds is 0"):
        load(find("spine"), tmp_path, seeds=0)
    with pytest.raises(ConfigError, match="--set seed=3: expected --seeds"):
        load(find("spine"), tmp_path, ["seed=3"])
    for only, words in ((["clop"], "'clop' is not one of clip"), (["clip_same_wall_time", "clip"], "name sds, too")):
        with pytest.raises(ConfigError, match=words):
            load(find("spine"), tmp_path, only=only)


def test_sizes_are_those_of_the_file_alone(file, tmp_path):
    """Else a row says 16 pairs of a run that had others."""
    for text in ("data.samples=8", "data={samples: 8}"):
        with pytest.raises(ConfigError, match="--set data.samples=8: expected none with the file's pairs: .16, .all.."):
            load(file(), tmp_path, [text])
    load(file(SMALL, ("[16, all]", "[all]")), tmp_path, ["data.samples=8"])


def test_a_time_is_of_steps(file, tmp_path):
    twin = "timed: {sets: {loss.lambda: 0}, same_time_as: sds}\n  sds: {l"
    with pytest.raises(ConfigError, match="mine.yaml: arms.timed.same_time_as: steps is 0, and takes no time"):
        load(file(SMALL, ("sds: {l", twin)), tmp_path, ["steps=0"])
    made = plan(load(file(SMALL, ("sds: {l", twin)), tmp_path))
    for seconds, steps in ((1.0, "steps=1"), (20.0, "steps=8")):
        job = plan(made.experiment).runs[Cell("world", 16, "timed", 0)]
        job.needs[0].results, job.needs[1].results = {"seconds": 10.0}, {"seconds": seconds}
        assert steps in job.argv


def test_what_another_teacher_read_is_another_evaluation(file, tmp_path):
    """Also of a start, which no recipe's key is of."""
    first = plan(load(file(), tmp_path))
    other = plan(load(file(SMALL, ("sets: {", "sets: {teacher.path: other, ")), tmp_path))
    start = first.evaluations[Cell("world", "all", "pretrained", 0), "world_test"]
    assert start.fingerprint() != other.by_folder[start.folder].fingerprint()


def test_each_size_has_a_cache_folder_of_its_own(file, tmp_path):
    made = load(file(SMALL, ("sets: {", "sets: {data.cache: cache, ")), tmp_path)
    for pairs, images in ((16, 16), ("all", 32), (16, 16)):
        PixelCache(made.recipe("world", pairs, "clip").data.cache, f"{pairs}", images)


def test_a_start_has_one_name_whatever_the_seed(file, tmp_path):
    """Also where one arm starts as it is, for all seeds, and another is pretrained for each."""
    words = 'pretrain: [python, -c, pass, "{folder}"], '
    made = plan(load(file(SMALL, ("sds: {l", f"sds: {{{words}l")), tmp_path))
    for cell, start in made.starts.items():
        arm, seed = ("pretrained_sds", cell.seed) if cell.arm == "sds" else ("pretrained", 0)
        assert start == Cell("world", "all", arm, seed)


def test_a_run_at_a_time_on_each_gpu_or_two_on_the_cpu(monkeypatch):
    monkeypatch.setattr(command, "device", lambda: torch.device("cpu"))
    assert command.places() == list(jobs.PLACES) and len(jobs.PLACES) == 2
    monkeypatch.setattr(command, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command.places() == [{"CUDA_VISIBLE_DEVICES": k} for k in "012"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert command.places() == [{"CUDA_VISIBLE_DEVICES": name} for name in ("2", "GPU-5")]
