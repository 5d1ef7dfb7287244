"""`fastsds report`: what is drawn is what the runs logged, with their names and intervals."""

import json
import shutil

import numpy as np
import pytest
import runs
from PIL import Image

from fastsds import cli, figures, history
from fastsds.config import ConfigError
from fastsds.evaluation.statistics import paired_bootstrap
from fastsds.recipes.bands import BANDS

SETS = ("steps=4", "data.batch=8", "log_every=1", "eval.every=0", "eval.items=5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two short runs of the embedded world, one without the teacher."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("sds", ()), ("clip", ("loss.lambda=0",))):
        assert runs.train(*runs.sets(*SETS, *more), "--output", folder / name) == 0
    return [folder / name for name in ("sds", "clip")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    seen, save = {}, figures._save

    def spy(figure, panels, path):
        seen[path.name] = {axes.get_title(): axes for axes in panels}
        return save(figure, panels, path)

    monkeypatch.setattr(figures, "_save", spy)
    return seen


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_runs_are_drawn_together_as_they_were_logged(folders, tmp_path, drawn, capsys):
    assert cli.main(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    paths = [tmp_path / "out" / name for name in figures.OF_RUNS]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        assert min(image.shape[:2]) > 250 and image.std() > 20
    panels = drawn["curves.png"]
    assert list(panels) == [key for key in figures.KEYS if any(key in row for folder in folders for row in runs.rows(folder))]
    assert {"loss", "clip", "sds", "rho", "lr"} <= panels.keys()
    for key, axes in panels.items():
        for folder in folders:
            points = [(row["step"], row[key]) for row in runs.rows(folder) if key in row]
            assert lines(axes)[folder.name].get_xydata().tolist() == [list(p) for p in points]
    assert not len(lines(panels["sds"])["clip"].get_xydata())  # no teacher, no such curve


def test_the_residual_of_the_first_and_of_the_last_interval(folders, tmp_path, drawn):
    assert cli.main(["report", str(folders[0]), "--out", str(tmp_path)]) == 0
    first, last = (next(row for row in rows if any("/" in k for k in row)) for rows in
                   (runs.rows(folders[0]), runs.rows(folders[0])[::-1]))  # fmt: skip
    left, right = drawn["residuals.png"].values()
    for what, axes in (("residual", left), ("weighted", right)):
        assert list(lines(axes)) == ["sds, step 1", "sds, step 4"]
        for row, line in zip((first, last), lines(axes).values(), strict=True):
            values = [value for key, value in row.items() if key.startswith(f"{what}/")]
            x, y = line.get_xydata().T
            assert sorted(y) == pytest.approx(sorted(values)) and len(y) <= BANDS and (np.diff(x) > 0).all()
    assert figures.residuals(tmp_path / "none.png", history.read_runs(folders[1:])) is None
    assert not (tmp_path / "none.png").exists()


def test_evaluations_with_their_intervals(folders, tmp_path, drawn):
    assert cli.main(["report", *map(str, folders), "--out", str(tmp_path)]) == 0
    panels = drawn["evaluations.png"]
    assert {"text", "image", "group", "swap", "swap_object", "retrieval"} <= panels.keys()
    rows = runs.rows(folders[0], "eval")
    for split in ("seen", "dev"):
        line = lines(panels["group"])[f"sds, {split}"]
        assert line.get_xydata().tolist() == [[row["step"], row[f"{split}/group"]] for row in rows]
    run = history.read_run(folders[0])
    for row in run.evaluations:
        scores = run.scores(row)
        items = [i for i in runs.evaluation(folders[0], row["step"]).rows if i["about"]["split"] == "dev"]
        of = [i["scores"] for i in items if "scores" in i]
        right = [50.0 * ((s[0][0] > s[1][0]) + (s[1][1] > s[0][1])) for s in of]
        expected = paired_bootstrap(right, np.zeros(15))
        assert scores["dev/swap"] == (pytest.approx(row["dev/swap"]), expected.low, expected.high, 15, 50.0)
        assert expected.difference == pytest.approx(row["dev/swap"])
        found = [50.0 * sum(above + level == 0 for above, level in zip(*i["places"][:2])) for i in items if "places" in i]
        expected = paired_bootstrap(found, np.zeros(300))
        assert scores["dev/retrieval"] == (pytest.approx(row["dev/retrieval"]), expected.low, expected.high, 300, 1.0)
        assert scores.keys() == {key for key, value in row.items() if isinstance(value, float)}


def test_without_the_items_there_is_no_interval(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluations" / "step_00000004")
    run = history.read_run(tmp_path / "run")
    assert run.scores(run.evaluations[-1])["dev/text"].n is None
    assert run.scores(run.evaluations[0])["dev/text"].n == 15


def test_a_line_that_was_cut_off_is_left_out(folders, tmp_path, drawn):
    shutil.copytree(folders[0], tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in whole if '"train"' in line]
    last = max(k for k, line in enumerate(whole) if '"train"' in line)
    file.write_text("".join(whole[:last]) + whole[last][:40])
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert lines(drawn["curves.png"]["loss"])["run"].get_xdata().tolist() == steps[:-1]


def test_bad_input_gets_one_error(folders, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "metrics.jsonl").write_text('{"split": "tra')
    (tmp_path / "file").write_text("")
    others = {
        "row": b'{"loss": 1.0}\n', "list": b"[1, 2]\n", "suite": b'{"split": "eval", "step": 2, "text": 1.0}\n',
        "bytes": b"\xff\xfe", "head": b'{"split": "head", "step": 0, "init": "ridge"}\n',
    }  # fmt: skip
    for name, content in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_bytes(content)
    for argv, word in (
        *(([tmp_path / name], f"{name}/metrics.jsonl: not a run's: row 1") for name in ("row", "list", "suite")),
        ([tmp_path / "bytes"], "bytes/metrics.jsonl: 'utf-8' codec"),
        ([tmp_path / "head", "--out", tmp_path / "head-report"], "nothing to draw yet"),
        ([tmp_path / "empty"], "empty: no metrics.jsonl"),
        ([tmp_path / "cut"], "no whole row"),
        ([folders[0], folders[0]], "named twice"),
        ([folders[0], "--out", tmp_path / "file"], "--out"),
    ):
        assert cli.main(["report", *map(str, argv)]) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and word in error[0]
    assert not (tmp_path / "head-report").exists()
    with pytest.raises(ConfigError):
        history.read_run(tmp_path / "nowhere")


def test_runs_have_the_shortest_names_that_tell_them_apart(folders, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(folders[1], tmp_path / parent / "run")
    assert [run.name for run in history.read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]
    assert [run.name for run in history.read_runs(folders)] == ["sds", "clip"]
