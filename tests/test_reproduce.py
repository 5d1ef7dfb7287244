"""`fastsds reproduce`: its table recomputed from the items; a small whole in the embedded world, stopped and gone on with."""

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import released
import runs as trainer
import torch
from experiments import SMALL, writer

from fastsds import comparison, jobs, report
from fastsds.config import ConfigError, load_recipe
from fastsds.evaluation.measures import Metric
from fastsds.evaluation.results import Result
from fastsds.evaluation.statistics import holm
from fastsds.evaluation.suite import load_suite
from fastsds.evaluation.suites import world
from fastsds.reproduce import command
from fastsds.reproduce.experiment import load
from fastsds.reproduce.runs import Cell, plan
from fastsds.reproduce.table import Change, Findings


@pytest.fixture
def file(tmp_path):
    return writer(tmp_path)


# The table, from results that are written here.


SPLIT = np.array([0, 0, 0, 1, 1, -1, 2, 0])  # a macro mean over three groups, one item that does not count


def canned(experiment, seed=0):
    """A plan, finished: outcomes of 0 and 1 and a macro mean over eight items."""
    made, generator = plan(experiment), np.random.default_rng(seed)
    measures = {
        "test/text": Metric("text", np.zeros(8, int), 25.0), "test/swap_object": Metric("swap", np.zeros(8, int), 50.0),
        "test/retrieval": Metric("swap", SPLIT, 50.0), "seen/text": Metric("text", SPLIT, 25.0),
        "test/group": Metric("text", np.arange(8) // 4, 16.7),
    }  # fmt: skip
    for (cell, suite), job in made.evaluations.items():
        outcomes = {"text": generator.random(8) < 0.6, "swap": generator.integers(0, 3, 8) / 2}
        rows = [
            {"id": f"{k}", "about": {}, "scores": [], "outcomes": {name: of[k].item() for name, of in outcomes.items()}}
            for k in range(8)
        ]
        result = Result(suite, rows, measures, ("test/text",), {"suite": suite, "fingerprint": "f", "scorer": {}, "notes": []})
        result.save(job.folder)
        more = {"test/reading": 40.0 + cell.seed} if cell.arm == "sds" else {}
        job.results = {"metrics": result.metrics | more, "kept": "."}
    for cell, job in made.runs.items():
        job.results = {"seconds": 3.0 + cell.seed, "pairs": 16 if cell.pairs == 16 else 32}
    for job in made.banks:
        job.results = {"seconds_in_all": 7.0}
    return made


def macro(outcome, groups=SPLIT):
    return 100 * np.mean([np.mean(np.asarray(outcome, float)[groups == g]) for g in np.unique(groups[groups >= 0])])


def outcomes_of(folder: Path, name: str):
    return [json.loads(line)["outcomes"][name] for line in (folder / "items.jsonl").read_text().splitlines()]


def test_every_cell_is_that_of_the_items(file, tmp_path):
    made = canned(load(file(), tmp_path / "out"))
    found = Findings(made)
    (header, rows), (_, matrix), (claims_header, claims) = found.tables()
    cells = {tuple(row[:3]): dict(zip(header, row, strict=True)) for row in rows}
    assert len(cells) == 2 * (1 + 6) + 1 and header[:3] == ["combinations", "pairs", "student"]
    assert [row[1] for row in rows][1:7] == ["16"] * 3 + ["all"] * 3 and rows[0][1:3] == ["-", "pretrained"]

    def values(arm, pairs, compute, outcome):
        return [
            compute(outcomes_of(made.evaluations[Cell("world", pairs, arm, s), "world_test"].folder, outcome)) for s in (0, 1)
        ]

    for arm, label in (("clip", "L_CLIP"), ("sds", "L_CLIP + L_SDS"), ("banked", "banked")):
        for pairs in (16, "all"):
            cell = {split: cells[split, str(pairs), label] for split in ("seen", "held out")}
            for split, title, compute, outcome in (
                ("held out", "text", lambda x: 100 * np.mean(x), "text"), ("seen", "text", macro, "text"),
                ("held out", "object swap", lambda x: 100 * np.mean(x), "swap"), ("held out", "retrieval", macro, "swap"),
                ("held out", "group", lambda x: macro(x, np.arange(8) // 4), "text"),
            ):  # fmt: skip
                a, b = values(arm, pairs, compute, outcome)
                assert cell[split][title] == f"{(a + b) / 2:.1f} +- {abs(a - b) / 2**0.5:.1f}", (arm, pairs, split, title)
            assert cell["held out"]["teacher's reading of h_w(f(x))"] == ("40.5 +- 0.7" if arm == "sds" else "-")
            assert cell["seen"]["retrieval"] == "-"
    start = made.evaluations[Cell("world", "all", "pretrained", 0), "world_test"].folder
    assert cells["held out", "-", "pretrained"]["text"] == f"{100 * np.mean(outcomes_of(start, 'text')):.1f}"
    assert cells["chance", "", ""]["text"] == "25.0" and cells["chance", "", ""]["retrieval"] == "50.0"

    # Differences: every arm and each it is against, of the same size, on the claims with p; Holm's over all of them.
    assert [row[2] for row in matrix][:3] == [
        "L_CLIP + L_SDS against L_CLIP", "banked against L_CLIP", "banked against L_CLIP + L_SDS"
    ]  # fmt: skip
    assert len(claims) == 3 * 2 * 2 and claims_header == ["pairs", "claim", "combinations", "score", "points", "Holm p"]
    by_name = {(c.line, c.other.arm, c.key[1]): c for c in found.compared}
    for (line, other, metric), c in by_name.items():
        compute, outcome = {
            "test/text": (lambda x: 100 * np.mean(x), "text"), "test/swap_object": (lambda x: 100 * np.mean(x), "swap"),
            "test/retrieval": (macro, "swap"), "seen/text": (macro, "text"),
            "test/group": (lambda x: macro(x, np.arange(8) // 4), "text"),
        }[metric]  # fmt: skip
        a, b = (np.mean(values(arm, line.pairs, compute, outcome)) for arm in (line.arm, other))
        assert c.difference.points == pytest.approx(a - b) and c.difference.low <= a - b <= c.difference.high
        assert c.difference.test == "seeds" and (c.p_holm is not None) == (metric in ("test/text", "test/swap_object"))
    family = [c for c in found.compared if c.p_holm is not None]
    assert [c.p_holm for c in family] == holm([c.difference.p for c in family]) and len(family) == len(claims)
    assert {c.other.pairs for c in found.compared if c.line.pairs == 16} == {16}


def test_zero_shot_is_against_the_start_and_flagged_twice(file, tmp_path):
    """By the mean, and apart from that by the one-sided interval."""
    made = canned(load(file(), tmp_path / "out"))
    found = Findings(made)
    start = made.evaluations[Cell("world", "all", "pretrained", 0), "world_test"].folder
    for (line, key), change in found.zero_shot.items():
        folders = [made.evaluations[Cell(*line, seed), "world_test"].folder for seed in (0, 1)]
        points = np.mean([macro(outcomes_of(folder, "swap")) for folder in folders]) - macro(outcomes_of(start, "swap"))
        assert key == ("world_test", "test/retrieval") and change.points == pytest.approx(points)
        assert change.at_least <= points and change.bound == 0.5
    assert len(found.zero_shot) == 6
    header, rows = found.tables()[0]
    column = header.index("zero-shot retrieval")
    assert [row[column] for row in rows if row[0] == "held out"] == ["-", *map(str, found.zero_shot.values())]
    assert {row[column] for row in rows if row[0] != "held out"} == {"-"}
    assert Change(-0.6, -2.0, 0.5).verdict == "lost" and Change(-0.4, -0.6, 0.5).verdict == "not excluded"
    assert Change(-0.5, -0.5, 0.5).verdict == "kept" and Change(3.0, 1.0, 0.5).verdict == "kept"
    assert str(Change(-0.04, -0.96, 0.5)) == "+0.0 (95 % above -1.0): not excluded"
    text = " ".join(found.notes())
    for verdict in ("lost", "not excluded"):
        named = [found.whole(line) for (line, _), change in found.zero_shot.items() if change.verdict == verdict]
        assert (f"Zero-shot, {verdict}: " in text) == bool(named) and all(name in text for name in named)


def test_the_one_sided_interval_covers_a_loss_that_is_there_nineteen_times_in_twenty():
    """On outcomes that are drawn anew: the bound is above the true change in at most about 5 % of experiments."""
    from fastsds.evaluation.statistics import two_level_bootstrap

    generator, above = np.random.default_rng(3), 0
    for k in range(200):
        a = (generator.random((1, 300)) < 0.60).astype(float)
        b = (generator.random((1, 300)) < 0.62).astype(float)
        above += two_level_bootstrap(a, b, resamples=400, seed=k, level=0.9).low > -0.02
    assert 2 <= above <= 20  # 10 expected


def test_rows_are_held_once_a_suite(file, tmp_path):
    """Not of every student: of the paper's suites and runs they are 28 million."""
    found = Findings(canned(load(file(), tmp_path / "out")))
    found.tables()
    assert len(found.kept) == 13 and [len(result.rows) for result in found.kept.values() if result.rows] == [8]
    first = found.firsts["world_test"]
    assert all(result.measures is first.measures for result in found.kept.values())


def test_results_of_other_items_are_not_compared(file, tmp_path):
    made = canned(load(file(), tmp_path / "out"))
    path = made.evaluations[Cell("world", 16, "sds", 1), "world_test"].folder / "result.json"
    path.write_text(path.read_text().replace('"fingerprint": "f"', '"fingerprint": "g"'))
    with pytest.raises(ConfigError, match="the same items"):
        Findings(made).tables()


def test_several_backbones_and_suites_have_columns_of_their_own(file, tmp_path):
    text = SMALL[: SMALL.index("evaluation:")] + """
evaluation:
  first: {suite: world_test, headline: [test/text, seen/text], claims: [test/text]}
  second: {suite: world_test, headline: [test/text]}
"""
    other = ("world: {}", "world: {}\n  other: {sets: {student.tune: layernorm}}")
    path = file(text, other, ("pairs: [16, all]", "pairs: [all]"))
    tables = Findings(canned(load(path, tmp_path / "out"))).tables()
    header, rows = tables[0]
    assert header == ["combinations", "backbone", "student", "first text", "second text"]
    assert [row[1] for row in rows if row[0] == "held out"] == ["world"] * 4 + ["other"] * 4
    assert {row[4] for row in rows if row[0] == "seen"} == {"-"}
    assert len(tables[2][1]) == 6 and [row[0] for row in tables[2][1]] == ["world"] * 3 + ["other"] * 3


def test_a_metric_that_what_is_finished_has_not_is_one_error(file, tmp_path, monkeypatch):
    """Not a claim that is left out, and so out of Holm's family."""
    monkeypatch.setattr(jobs.Job, "finished", lambda job: job.results is not None)
    for key in ("claims", "zero_shot", "headline"):
        made = canned(load(file(SMALL, (f"{key}: [", f"{key}: [test/txt, ")), tmp_path / key))
        with pytest.raises(ConfigError, match=f"evaluation.world_test.{key}: world_test has no metric 'test/txt'; the nearest"):
            command.look(made)


def test_a_curve_of_a_reading_has_no_start(file, tmp_path):
    path = file(SMALL, ("[seen/text, ", "[test/reading, "), ("    claims: [test/text, test/swap_object]\n", ""))
    (panel,) = Findings(canned(load(path, tmp_path / "out"))).curves().values()
    assert panel == {"L_CLIP + L_SDS": [(16.0, 40.5, pytest.approx(0.5**0.5)), (32.0, 40.5, pytest.approx(0.5**0.5))]}


def test_the_reading_is_of_the_scenes_that_are_asked(monkeypatch):
    """Those of the suite's own seed, the first of each kind."""
    seen = []
    monkeypatch.setattr(comparison, "load_teacher", lambda path: None)
    monkeypatch.setattr(comparison, "diffusion_scores", lambda _, part, **how: seen.append(part) or np.ones((len(part), 2, 2)))
    monkeypatch.setattr(comparison, "READING", {"items": 2, "draws": 4})
    assert comparison.readings(load_suite("world_test", items=3, seed=7), "") == {"seen/reading": 0, "test/reading": 0}
    for split, part in zip(("seen", "test"), seen, strict=True):
        whole = world.first_of_each_kind(world.swaps("world_test", split, 3, 7), 2)
        assert (part.split, part.kind, part.captions) == (split, whole.kind, whole.captions)
        assert torch.equal(part.pixels, whole.pixels)
    seen.clear()
    comparison.readings(load_suite("world_test", items=1), "")
    assert [part.kind for part in seen] == [["object", "colour", "shape"]] * 2


def test_mean_and_deviation():
    assert report.mean_and_deviation([61.0]) == "61.0"
    assert report.mean_and_deviation([60.0, 62.0, 64.0]) == "62.0 +- 2.0"
    assert report.mean_and_deviation([None]) == "-"


# Runs.


def start(argv, log) -> subprocess.Popen:
    words = [sys.executable, "-m", "fastsds.cli", "reproduce", *map(str, argv)]
    return subprocess.Popen(words, stdout=open(log, "w"), stderr=subprocess.STDOUT, cwd=Path(__file__).resolve().parent.parent)


def until(seen, seconds=300):
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "run" / "student").glob("*.safetensors")}


@pytest.mark.slow
def test_the_whole_of_it_stopped_in_the_middle(file, tmp_path, capsys):
    """Two seeds, two sizes, two arms and one from a bank; a second start ends what the first began, a third runs nothing."""
    other = ("sds: {label: L_CLIP + L_SDS,", "other: {label: swapped, sets: {loss.lambda: 0, loss.negatives: swapped},")
    path, out, log = file(SMALL, other, ("[clip, sds]", "[clip, other]")), tmp_path / "out", tmp_path / "log"
    process = start([path, "--output", out], log)
    until(lambda: len(list(out.rglob("done.json"))) > 3 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and "the same command goes on" in log.read_text()
    done = {p: p.stat().st_mtime_ns for p in out.rglob("done.json")}
    assert len(done) >= 4 and not (out / "table.md").exists()

    assert command.main([str(path), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("finished before") == len(done) and all(p.stat().st_mtime_ns == t for p, t in done.items())
    assert len(list(out.rglob("done.json"))) == 27 and (out / "sample_efficiency.png").stat().st_size > 5000

    # The table is that of the raw scores that were kept.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "table.md").read_text().splitlines()]
    rows = rows[: rows.index([])]
    for arm, label in (("clip", "L_CLIP"), ("other", "swapped"), ("banked", "banked")):
        for pairs in ("16", "all"):
            text, found = [], []
            for seed in (0, 1):
                kept = out / "world" / f"seed_{seed}" / pairs / arm / "evaluation" / "world_test" / "items.jsonl"
                items = [row for row in map(json.loads, kept.read_text().splitlines()) if row["id"].startswith("test/")]
                swaps = [row["scores"] for row in items if "scores" in row]
                places = [row["places"] for row in items if "places" in row]  # [above, level, before], of both directions
                assert len(swaps) == 24 and len(places) == 300
                text.append(100 * np.mean([s[0][0] > s[1][0] and s[1][1] > s[0][1] for s in swaps]))
                found.append(100 * np.mean([above + level == 0 for of in places for above, level, _ in zip(*of, strict=True)]))
            (row,) = (r for r in rows if r[:3] == ["held out", pairs, label])
            for column, values in (("text", text), ("retrieval", found)):
                cell = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
                assert row[rows[0].index(column)] == cell, (arm, pairs, column)

    # What was trained is what the trainer gives by hand, the bank's arm included.
    results = json.loads((out / "results.json").read_text())
    assert {line["arm"] for line in results["lines"]} == {"pretrained", "clip", "other", "banked"} and results["commit"]
    by_hand = {"clip": ["loss.lambda=0"], "banked": ["loss.gradient=amortised", "bank.draws=1"]}
    for arm, sets in by_hand.items():
        ran = out / "world" / "seed_1" / "16" / arm
        bank = load_recipe(ran / "recipe.yaml").bank.path
        sets = [*sets, *([f"bank.path={bank}"] if bank else []), "seed=1", "steps=4", "log_every=2", "eval.suite=none",
                "data.batch=8", "data.accumulation=1", "data.samples=16", "optimizer.lr=1e-4"]  # fmt: skip
        assert trainer.train("--output", tmp_path / arm / "run", *trainer.sets(*sets)) == 0
        assert weights(tmp_path / arm) == weights(ran)

    # Nothing runs, and the same is said.
    before = {p: p.read_text() for p in (out / "table.md", out / "results.json")}
    assert command.main([str(path), "--output", str(out)]) == 0
    again = capsys.readouterr().out
    assert again.count("finished before") == 27 and {p: p.read_text() for p in before} == before
    assert command.main([str(path), "--output", str(out), "--dry-run"]) == 0
    assert "run: 12, 12 done" in (said := capsys.readouterr().out) and "left: about 0:00" in said
    with pytest.raises(ConfigError, match="is of other settings"):
        command.main([str(path), "--output", str(out), "--set", "steps=5"])


ONE = SMALL.replace("seeds: 2", "seeds: 1").replace("[16, all]", "[all]").replace("steps: 4, log", "steps: 200, log")


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint_to_the_same_weights(file, tmp_path):
    made = plan(load(file(ONE), tmp_path / "out", only=["clip"]))
    (job,) = made.runs.values()
    log = job.folder / "run" / "metrics.jsonl"

    def cut():
        until(lambda: log.is_file() and log.read_text().count("\n") > 10)
        job.process.send_signal(signal.SIGTERM)

    with pytest.raises(jobs.Failed, match="(?s)exit code 130.*stopped after step"), ThreadPoolExecutor(1) as worker:
        cutting = worker.submit(cut)
        jobs.run([job])
    cutting.result()
    (again,) = plan(made.experiment).runs.values()
    jobs.run([again])
    assert re.search(r"steps [1-9]\d* to 200", again.log.read_text()) and again.results["pairs"] == 32
    steps = [row["step"] for row in trainer.rows(job.folder / "run")]
    assert steps == list(range(2, 201, 2))
    assert trainer.train("--recipe", job.folder / "recipe.yaml", "--output", tmp_path / "whole" / "run") == 0
    assert weights(tmp_path / "whole") == weights(job.folder)


def test_a_suite_of_data_is_asked_by_fastsds_eval(file, tmp_path):
    """With its options and where it lies; the table has its metrics beside the world's."""
    (tmp_path / "data").mkdir()
    released.winoground(tmp_path / "data", 12)
    more = "  compositional: {suite: winoground, path: data, options: {items: 4}}\n  world_test:"
    path = file(ONE, ("  world_test:", more))
    made = plan(load(path, tmp_path / "out", only=["clip"]))
    (start,) = set(made.starts.values())
    job = made.evaluations[start, "compositional"]
    jobs.run([job])
    result = made.result(start, "compositional")
    assert job.results["metrics"] == result.metrics and {"text", "image", "group"} <= set(result.metrics)
    assert len(result.rows) == 4 and "--option" in job.argv and result.about["scorer"]["name"] == "world"


def test_a_run_that_fails_is_told_and_the_others_are_kept(file, tmp_path, capsys):
    """The end of its log last; what does not need it has run; the same command tries it again."""
    pretrain = """pretrain: [python, -c, "import sys; sys.exit('no disk')", "{folder}"]"""
    path = file(ONE, ("world: {}", f"world: {{{pretrain}}}\n  plain: {{}}"))
    argv = [str(path), "--output", str(tmp_path / "out"), "--only", "clip", "--set", "steps=1"]
    for _ in range(2):
        assert command.main(argv) == 1
        said = capsys.readouterr()
        assert "world seed_0 pretraining ended with exit code 1" in said.err and "no disk" in said.err
        assert "the same command goes on" in said.err and not (tmp_path / "out" / "table.md").exists()
    assert said.out.count("finished before") == 3 and said.out.count("left out") == 3
