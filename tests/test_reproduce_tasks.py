"""`fastsds reproduce` and `fastsds demo` of CLIP-TD: arms by fractions of a task's examples."""

import json
from functools import partial

import experiments
import pytest
import tiny

from fastsds import demo
from fastsds.config import CONFIGS, CLIPTDRecipe, ConfigError
from fastsds.evaluation.results import load_result
from fastsds.reproduce import command
from fastsds.reproduce import experiment as files
from fastsds.reproduce.runs import Cell, plan

FILE = """
recipe: recipe.yaml
seeds: 1
pairs: [0.25, 1.0]
backbones:
  vilt: {}
arms:
  plain: {label: fine-tuning, sets: {loss.beta: 0}}
  weight: {label: + weight, against: [plain]}
evaluation:
  world_entailment:
    splits: [test, shift]
    headline: [test/accuracy, shift/accuracy, test/accuracy/label=neutral]
    claims: [test/accuracy, shift/accuracy]
"""
RECIPE = """
recipe: clip_td
steps: 4
student: {model: ./student}
teacher: {model: ./clip}
targets: {k: 2}
data: {batch: 8, streams: 4, options: {sizes: {train: 48, dev: 10, test: 30, dev_shift: 10, shift: 20}}}
adaptation: {batch: 4}
optimizer: {warmup: 1}
log_every: 2
eval: {splits: [], every: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_vilt(folder / "student")
    tiny.save_student(folder / "clip")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def file(folder):
    return partial(experiments.writer(folder), FILE)


@pytest.mark.slow
def test_the_whole_of_it(file, tmp_path, capsys):
    path, out = file(), tmp_path / "out"
    assert command.main([str(path), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    for words in ("25 %", "100 %", "fine-tuning", "+ weight against fine-tuning", "split", "shift", "33.3", "Holm p"):
        assert words in said, words
    found = json.loads((out / "results.json").read_text())
    assert [(line["arm"], line["pairs"]) for line in found["lines"]] == [
        ("plain", 0.25), ("weight", 0.25), ("plain", 1.0), ("weight", 1.0)
    ]  # fmt: skip
    assert [line["seeds"][0]["pairs"] for line in found["lines"]] == [12, 12, 32, 32]  # 4 steps of 8
    for line in found["lines"]:
        kept = load_result(out / "vilt" / "seed_0" / str(line["pairs"]) / line["arm"] / "evaluation" / "world_entailment")
        assert kept.metrics == line["seeds"][0]["metrics"]["world_entailment"] and len(kept.rows) == 50
    whole = {line["label"]: line["seeds"][0]["seconds_in_all"] for line in found["lines"] if line["pairs"] == 1.0}
    (note,) = (note for note in found["notes"] if note.startswith("Of whole runs"))
    assert all(f"100 % {label} {seconds:.0f}" in note for label, seconds in whole.items())
    assert (out / "sample_efficiency.png").is_file()
    assert command.main([str(path), "--output", str(out)]) == 0  # all there
    assert "finished before" in (again := capsys.readouterr().out) and again.count("finished before") == 8


def test_sizes_are_fractions(file, tmp_path):
    made = plan(files.load(file(), tmp_path))
    assert len(made.runs) == len(made.evaluations) == 4 and not made.starts and not made.banks
    recipes = {(cell.pairs, cell.arm): made.experiment.recipe(*cell) for cell in made.runs}
    assert {key: (r.data.fraction, r.loss.beta) for key, r in recipes.items()} == {
        (0.25, "plain"): (0.25, 0.0), (0.25, "weight"): (0.25, 1.0), (1.0, "plain"): (1.0, 0.0), (1.0, "weight"): (1.0, 1.0)
    }  # fmt: skip
    assert recipes[1.0, "plain"].targets.path is None
    assert recipes[1.0, "weight"].targets.path.startswith(str(tmp_path.resolve()))
    assert made.runs[Cell("vilt", 0.25, "plain", 0)].folder == tmp_path.resolve() / "vilt" / "seed_0" / "0.25" / "plain"


@pytest.mark.parametrize("old, new, says", [
    ("world_entailment:", "world_questions:", "evaluation.world_questions; expected the name of the recipe's task: world_ent"),
    ("splits: [test, shift]", "splits: [test, nothing]", "has no 'nothing'; expected some of train, dev, test, dev_shift, s"),
    ("claims: [test/accuracy,", "claims: [test/accurracy,", "has no metric 'test/accurracy'; the nearest is 'test/accuracy'"),
    ("    claims", "    path: x\n    claims", "evaluation.world_entailment.path; expected none: data.folder says it"),
    ("    claims", "    zero_shot: [test/accuracy]\n    claims", "expected none: a start, whose head is new"),
    ("against: [plain]", "against: [pretrained]", "arms.weight.against: pretrained: a start, whose head is new"),
    ("  vilt: {}", "  vilt: {pretrain: [python, x, '{folder}']}", "pretrain; expected none with recipes of clip_td"),
    ("pairs: [0.25, 1.0]", "pairs: [0.25, 2.0]", "data.fraction is 2.0; expected greater than 0 and at most 1"),
    ("pairs: [0.25, 1.0]", "pairs: [0.1, 1.0]", "data.batch is 8, larger than the data: world_entailment, train, has 5 sam"),
    ("plain: {label: fine-tuning,", "plain: {recipe: null, label: fine-tuning,", None),
])  # fmt: skip
def test_a_mistake_names_file_and_key(old, new, says, file, tmp_path, capsys, monkeypatch):
    path = file((old, new))
    monkeypatch.setattr(command.jobs, "run", lambda *args, **how: pytest.fail("something ran"))
    if says is None:
        assert len(plan(files.load(path, tmp_path)).runs) == 4
        return
    with pytest.raises(ConfigError) as error:
        command.main([str(path), "--output", str(tmp_path)])
    assert says in str(error.value)


def test_recipes_are_of_one_kind(file, tmp_path):
    path = file(("plain: {label: fine-tuning, sets: {loss.beta: 0}}", f"plain: {{recipe: {CONFIGS / 'world.yaml'}}}"))
    with pytest.raises(ConfigError, match="expected recipes of one kind"):
        files.load(path, tmp_path)
    with pytest.raises(ConfigError, match=r"pairs is \[0.5\]; expected whole numbers, or all: data.samples"):
        (tmp_path / "sds.yaml").write_text(
            "pairs: [0.5]\nbackbones: {world: {}}\narms: {clip: {sets: {loss.lambda: 0}}}\nevaluation: {world_test: {}}"
        )
        files.load(tmp_path / "sds.yaml", tmp_path)


def test_targets_are_shared_by_what_asks_the_same(tmp_path):
    made = files.load(files.find("clip_td"), tmp_path)

    def path(pairs, arm, seed):
        return made.recipe("vilt", pairs, arm, seed).targets.path

    assert path(1.0, "selection", 0) == path(1.0, "weight", 0) == path(1.0, "weight", 3) != path(1.0, "naive", 0)
    assert path(0.01, "weight", 0) not in (path(0.01, "weight", 1), path(1.0, "weight", 0))  # other examples are drawn
    assert path(1.0, "adaptation", 0) is None is path(1.0, "plain", 0)


@pytest.mark.parametrize("name", ["clip_td", "demo_clip_td"])
def test_the_shipped_files(name, tmp_path):
    made = files.load(files.find(name), tmp_path)
    files.check_data(made)
    assert made.trains_tasks
    arms = {arm: made.recipe("vilt", 0.01, arm) for arm in made.said.arms}
    assert list(arms) == ["plain", "naive", "selection", "weight", "adaptation"]
    assert all(isinstance(recipe, CLIPTDRecipe) for recipe in arms.values())
    chosen = [(r.loss.beta > 0, r.targets.select, r.loss.weight, r.adaptation.steps > 0) for r in arms.values()]
    assert chosen == [
        (False, "targeted", "relative", False), (True, "all", "none", False), (True, "targeted", "none", False),
        (True, "targeted", "relative", False), (True, "targeted", "relative", True),
    ]  # fmt: skip


def test_the_demo_takes_a_recipe(tmp_path):
    recipe = str(CONFIGS / "clip_td_world.yaml")
    made = demo.parse(["--recipe", recipe, "--output", str(tmp_path)])
    assert made.trains_tasks and len(plan(made).runs) == 10 and list(made.said.evaluation) == ["world_entailment"]
    plain = demo.parse(["--output", str(tmp_path)])
    assert demo.parse(["--recipe", str(CONFIGS / "world.yaml"), "--output", str(tmp_path)]).recipe("world", "all", "sds") == (
        plain.recipe("world", "all", "sds")
    )
    with pytest.raises(ConfigError, match="--items is of the world's test items"):
        demo.parse(["--recipe", recipe, "--items", "3"])
    with pytest.raises(ConfigError, match="before this can run:\n.*no such folder: .*snli_ve"):
        demo.main(["--recipe", str(CONFIGS / "clip_td_snli_ve.yaml"), "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
