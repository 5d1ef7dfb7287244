"""`fastsds eval`: the models it takes, what it keeps and reuses, what it prints, and one error for what is wrong."""

import json
import re
import shlex
import shutil
import time

import numpy as np
import pytest
import released
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastsds.config import ConfigError
from fastsds.evaluation import command
from fastsds.evaluation.compare import compare
from fastsds.evaluation.results import load_result
from fastsds.evaluation.scorer import ClipScorer
from fastsds.evaluation.suite import clip_benchmark, load_suite, suite_names
from fastsds.evaluation.table import Shown, table, ties
from fastsds.student import load_student

SUITES = ("winoground", "sugarcrepe", "mmvp", "coco_retrieval")
N = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two students, a run of one, and small suites in the released formats, each in a folder of its name."""
    home = tmp_path_factory.mktemp("home")
    tiny.save_student(home / "a")
    shutil.copytree(home / "a", home / "b")
    weights, generator = load_file(home / "b/open_clip_model.safetensors"), torch.Generator().manual_seed(5)
    for tensor in weights.values():
        if tensor.ndim > 1:
            tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(weights, home / "b/open_clip_model.safetensors")
    for name in SUITES:
        (home / "data" / name).mkdir(parents=True)
        released.write(name, home / "data" / name, N)
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home, here, capsys):
    """run(*arguments) -> what `fastsds eval` prints; --data is the home's."""

    def run(*arguments, data=True):
        argv = [str(a) for a in arguments]
        assert command.main([*argv, *(["--data", str(home / "data")] if data else [])]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuses(home, here):
    def refuses(pattern, *arguments, data=True):
        argv = [str(a) for a in arguments]
        with pytest.raises(ConfigError, match=pattern):
            command.main([*argv, *(["--data", str(home / "data")] if data else [])])

    return refuses


def cells(text, suite):
    """The rows of a suite's table: metric -> its cells."""
    block = next(part for part in re.split(r"\n(?=\w+: )", text) if part.startswith(f"{suite}: "))
    rows = block[block.index("---\n") + 4 :].partition("\n\n")[0].splitlines()
    return {row.split()[0]: re.split(r"\s{2,}", row.strip())[1:] for row in rows if not row.startswith("note")}


# what is printed and kept


def test_the_table_says_what_the_kept_result_says(home, run, here):
    printed = run("--model", home / "a", "--suite", "winoground,sugarcrepe", "--suite", "mmvp")
    for name in ("winoground", "sugarcrepe", "mmvp"):
        (folder,) = here.glob(f"evaluations/*/{name}")
        kept, suite = load_result(folder), load_suite(name, home / "data" / name)
        scores = ClipScorer(load_student(home / "a").eval()).score
        outcomes = suite.outcomes([scores(item.images, item.captions) for item in suite.items])
        assert kept.metrics == suite.metrics(outcomes)
        rows = cells(printed, name)
        assert list(rows) == list(suite.headline)
        for metric, row in rows.items():
            tied = outcomes["tied"][suite.measures[metric].groups >= 0].sum()
            said = [f"{kept.metrics[metric]:.2f}", f"{kept.errors[metric]:.1f}", f"{suite.summary[metric]}"]
            assert row == [*said, f"{suite.chance[metric]:.1f}", f"{tied}"], metric
    every = run("--model", home / "a", "--suite", "winoground", "--all")
    assert list(cells(every, "winoground")) == list(load_suite("winoground", home / "data/winoground").measures)


def test_what_is_finished_is_not_made_again(home, run, here, monkeypatch):
    first = run("--model", home / "a", "--suite", "winoground,coco_retrieval")
    monkeypatch.setattr(ClipScorer, "_forward", lambda *_: pytest.fail("the model was asked again"))
    before = {file: file.stat().st_mtime_ns for file in here.rglob("*.json*")}
    assert run("--model", home / "a", "--suite", "winoground,coco_retrieval") == first and len(before) == 4
    assert {file: file.stat().st_mtime_ns for file in here.rglob("*.json*")} == before
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        run("--model", home / "a", "--suite", "mmvp")


def test_another_evaluation_in_its_place_is_one_error(home, run, refuses, here):
    run("--model", home / "a", "--suite", "winoground")
    refuses("result.json is of another scorer: .*name another folder, or delete it", "--model", home / "a", "--suite",
            "winoground", "--precision", "bf16")  # fmt: skip
    refuses("is of another suite", "--model", home / "a", "--suite", "winoground", "--option", "items=5")
    both = run("--model", home / "a", "--suite", "winoground", "--precision", "bf16", "--output", "half")
    assert load_result(next(here.glob("half/*/winoground"))).about["scorer"]["settings"]["autocast"] == "bfloat16"
    assert list(cells(both, "winoground")) == ["text", "image", "group"]


def test_a_baseline_is_paired(home, run, here):
    args = ("--model", home / "a", "--baseline", home / "b", "--suite", "winoground,sugarcrepe,coco_retrieval")
    printed, found = run(*args), json.loads(run(*args, "--format", "json"))
    folders = [next(here.glob(f"evaluations/*_{name}")) for name in "ab"]
    results = {one["suite"]: [load_result(folder / one["suite"]) for folder in folders] for one in found}
    assert list(results) == ["winoground", "sugarcrepe", "coco_retrieval"]
    expected = compare([([x], [y]) for x, y in results.values()], every=True)
    for d in expected:
        (one,) = (one for one in found if one["suite"] == d.suite)
        said = one["differences"][d.metric]
        assert said.pop("text") == str(d.difference) and said.pop("p_holm") == d.p_holm
        assert said == d.difference._asdict()
        x, y = results[d.suite]
        values = one["model"]["metrics"][d.metric]["value"], one["baseline"]["metrics"][d.metric]["value"]
        assert values == (x.metrics[d.metric], y.metrics[d.metric])
        assert d.difference.points == pytest.approx(values[0] - values[1], abs=1e-9)
        if d.p_holm is not None:
            row = cells(printed, d.suite)[d.metric]
            tied = " / ".join(str(ties(of, d.metric)) for of in (x, y))
            assert row[:4] == [f"{x.metrics[d.metric]:.2f}", f"{x.errors[d.metric]:.1f}",
                               f"{y.metrics[d.metric]:.2f}", f"{y.errors[d.metric]:.1f}"]  # fmt: skip
            assert row[6:] == [tied, str(d.difference), f"{d.p_holm:.2g}"]
    assert len({d.difference.points for d in expected}) > 5 and len({d.difference.p for d in expected}) > 3
    family = sum(len(x.headline) for x, _ in results.values())
    assert f"Holm p: of the {family} headline metrics of winoground, sugarcrepe, coco_retrieval together" in printed
    assert not re.search(r"[+-]\d+\.\d+(?! \(95 %|\d* to | to |\))", printed.split("Holm p\n", 1)[1])  # no bare difference


def test_kept_results_are_compared_without_model_or_data(home, run, refuses, here):
    first = run("--model", home / "a", "--baseline", home / "b", "--suite", "winoground,mmvp")
    run("--model", home / "b", "--suite", "sugarcrepe")
    a, b = sorted(here.glob("evaluations/*"))
    assert a.name.endswith("a") and len(list(b.iterdir())) == 3
    assert cells(run("--compare", a, b, data=False), "mmvp") == cells(first, "mmvp")
    again = run("--compare", a / "winoground", b / "winoground", data=False)
    assert [row[:-1] for row in cells(again, "winoground").values()] == [r[:-1] for r in cells(first, "winoground").values()]
    assert "of the 3 headline metrics of winoground together" in again
    swapped = json.loads(run("--compare", b, a, "--format", "json", data=False))
    assert [one["model"]["scorer"]["name"] for one in swapped] == [str(home / "b")] * 2
    kept = [([load_result(a / name)], [load_result(b / name)]) for name in ("mmvp", "winoground")]
    before = [d.difference for d in compare(kept)]
    after = [one["differences"][name]["points"] for one in swapped for name in one["headline"]]
    assert after == pytest.approx([-d.points for d in before]) and any(after)
    refuses(r"mmvp has mmvp, and .*sugarcrepe has sugarcrepe: no suite in both", "--compare", a / "mmvp", b / "sugarcrepe")
    refuses("nowhere is not a folder", "--compare", a, here / "nowhere")
    refuses("clip_benchmark: its shape takes the suite's data", "--compare", a, b, "--format", "clip_benchmark")
    run("--model", home / "b", "--suite", "winoground", "--option", "items=20", "--output", "fewer")
    refuses("of 24 and 20 items; the first that differs is number 20: '20' and none", "--compare", a / "winoground",
            next(here.glob("fewer/*/winoground")))  # fmt: skip
    (a / "mmvp" / "result.json").unlink()
    refuses("mmvp: no evaluation: no result.json in it", "--compare", a / "mmvp", b / "mmvp")


def test_clip_benchmarks_shape(home, run, here):
    lines = run("--model", home / "a", "--baseline", home / "b", "--suite", "sugarcrepe", "--format", "clip_benchmark")
    found = [json.loads(line) for line in lines.splitlines()]
    suite = load_suite("sugarcrepe", home / "data/sugarcrepe")
    metrics = load_result(next(here.glob("evaluations/*a/sugarcrepe"))).metrics
    assert found[:7] == clip_benchmark(suite, metrics, str(home / "a"), "") and len(found) == 14
    assert found[7]["model"] == str(home / "b") and found[0]["dataset"] == "sugar_crepe/add_att"


def test_ties_are_those_of_the_items_that_count(home, here):
    """Of every suite, with scores that often tie; a gallery's and the world's outcomes have ties of their own."""
    from fastsds.evaluation.run import evaluate

    class Dice:
        name, settings = "dice", {}

        def score(self, images, captions):
            seeds = [[len(c) + sum(map(ord, i.name)) for i in images] for c in captions]
            return np.array([[np.random.default_rng(s).integers(0, 3) for s in row] for row in seeds], float)

    for name in SUITES:
        result = evaluate(suite := load_suite(name, home / "data" / name), Dice())
        for metric, of in suite.measures.items():
            kind = metric.split("_recall")[0] if suite.gallery else None
            tied = result.outcomes["tied" if kind is None else f"tied_{kind}"]
            assert ties(result, metric) == tied[of.groups >= 0].sum()
        assert any(ties(result, metric) for metric in suite.headline)
        assert "dice" in table([Shown(result)], True)
    world = evaluate(load_suite("world_dev", items=2), Dice())
    assert ties(world, "dev/retrieval") == world.outcomes["tied/dev/retrieval"].sum() > 100
    assert ties(world, "seen/swap_object") == world.outcomes["tied/seen"][:2].sum()
    del world.outcomes["tied/seen"]
    assert ties(world, "seen/text") is None


# models


def test_every_kind_of_model(home, run, here, monkeypatch):
    """Folders of both libraries, a run, an architecture with a file of weights: one table for one set of weights."""
    import open_clip

    config = json.loads((home / "a/open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(home / "a")
    (here / "tiny-eval.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    open_clip.add_model_config(here / "tiny-eval.json")
    (here / "run").mkdir()
    (here / "run/recipe.yaml").write_text("{data: {}, output: run, steps: 1, student: {}}")
    (here / "run/metrics.jsonl").write_text('{"split": "train", "step": 1}\n')
    shutil.copytree(home / "a", here / "run/student")
    tables = [run("--model", of, "--suite", "winoground") for of in (home / "a", "run", f"local-dir:{home / 'a'}")]
    rows = [list(cells(text, "winoground").values()) for text in tables]
    assert rows[0] == rows[1] == rows[2]
    assert cells(run("--model", "./run/", "--suite", "winoground"), "winoground") == cells(tables[1], "winoground")
    weights = home / "a/open_clip_model.safetensors"
    assert (here / "evaluations/run/winoground/result.json").is_file()
    run("--model", f"tiny-eval:{weights}", "--suite", "winoground")
    digests = {load_result(path).about["scorer"]["settings"]["weights"] for path in here.glob("evaluations/*/winoground")}
    assert len(list(here.glob("evaluations/tiny-eval_*"))) == len(digests) == 1
    for kind in ("clip", "siglip"):
        tiny.save_hf(here / kind, kind)
        assert cells(run("--model", kind, "--suite", "winoground"), "winoground")["text"][2] == str(N)


def test_a_model_that_is_none_is_one_error(home, refuses, here):
    def refuse(pattern, model):
        refuses(f"^model {re.escape(str(model))}: {pattern}", "--model", model, "--suite", "winoground")

    refuse("expected a run's or a student's folder, NAME:TAG or NAME:FILE of open_clip, hf-hub", "ViT-B-99")
    refuse("an architecture without weights; expected one of .*ViT-B-32-quickgelu:openai", "ViT-B-32-quickgelu")
    refuse("expected a run's or a student's folder", here / "nowhere")
    refuse("student.pretrained: .*nosuchtag", "ViT-B-32:nosuchtag")
    refuse("a file of weights; expected NAME:FILE", home / "a/open_clip_model.safetensors")
    refuse(".*expected a run .recipe.yaml and student/ in it., a checkpoint .* or a student's folder", home / "data")
    refuse(".*hf-hub:nobody/nothing", "hf-hub:nobody/nothing")
    assert not (here / "evaluations").exists()


def test_a_hub_id_fails_within_seconds(home, tmp_path, python):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    env["HF_HOME"] = str(tmp_path)
    start = time.monotonic()
    args = ("--model", "hf-hub:nobody/nothing", "--suite", f"winoground={home}/data/winoground", "--output", tmp_path / "out")
    done = python("-m", "fastsds.cli", "eval", *args, env=env)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "open_clip_config.json of hf-hub:nobody/nothing is not on this disk" in errors[0]
    assert time.monotonic() - start < 30 and not (tmp_path / "out").exists()


# scorers


OWN = '''
class Scorer:
    def __init__(self, model="own"):
        self.name, self.settings = model, {"version": 1}
        self.left = 10**9
    def score(self, images, captions):
        return [[float(len(c)) for _ in images] for c in captions]

class Stopped(Scorer):
    """Ctrl-C after three items."""
    asked = 0
    def score(self, images, captions):
        Stopped.asked += 1
        if Stopped.asked == 4:
            raise KeyboardInterrupt
        return super().score(images, captions)
    batch = 1

class Bare:
    score = None

bare, made, unnamed = Bare(), Scorer("made"), Scorer(3)
OF = 3
'''


@pytest.fixture
def own(here):
    (here / "own_scorers.py").write_text(OWN)


def test_a_scorer_of_ones_own(own, run, refuses, home, here):
    printed = run("--scorer", "own_scorers:Scorer", "--suite", "winoground")
    assert cells(printed, "winoground")["text"] == ["0.00", "0.0", str(N), "25.0", str(N)]  # both captions are as long
    assert json.loads((here / "evaluations/own/winoground/result.json").read_text())["scorer"]["settings"] == {"version": 1}
    run("--scorer", "own_scorers:Scorer", "--model", "one", "--baseline", "two", "--suite", "sugarcrepe")
    run("--scorer", "own_scorers:made", "--suite", "mmvp")
    assert {path.name for path in (here / "evaluations").iterdir()} == {"own", "one", "two", "made"}
    for name, pattern in (
        ("own_scorers:bare", "it has no name; expected score.images, captions., name, and settings"),
        ("own_scorers:nothing", "module 'own_scorers' has no attribute"),
        ("nobodys:nothing", "No module named 'nobodys'"),
        (":nothing", "Empty module name"),
        ("own_scorers:OF", "it is 3; expected a scorer, or what makes one"),
    ):
        refuses(f"--scorer {name}: {pattern}", "--scorer", name, "--suite", "mmvp")
    refuses("scorer 3: its name is to be text", "--scorer", "own_scorers:unnamed", "--suite", "mmvp")


def test_what_is_stopped_goes_on(own, run, home, here, capsys):
    argv = ["--scorer", "own_scorers:Stopped", "--suite", f"winoground={home}/data/winoground"]
    assert command.main(argv) == 130
    assert "what is scored is kept, and the same command goes on" in capsys.readouterr().err
    items = here / "evaluations/own/winoground/items.jsonl"
    kept = items.read_text()
    assert 0 < len(kept.splitlines()) <= 3 and not items.with_name("result.json").exists()
    assert command.main(argv) == 0 and items.read_text().startswith(kept) and len(items.read_text().splitlines()) == N


def test_the_diffusion_model_scores(run, refuses, home, here, capsys):
    tiny.save_teacher(here / "teacher")
    base = ("--scorer", "diffusion", "--teacher", "teacher", "--suite", "winoground", "--option", "items=4")
    how = ("--steps", "5", "--log-snr", "-3", "1", "--weighting", "uniform", "--stop", "0.05", "--correction", "unconditional")
    assert list(cells(run(*base, *how), "winoground")) == ["text", "image", "group"]
    settings = json.loads((here / "evaluations/diffusion_teacher/winoground/result.json").read_text())["scorer"]["settings"]
    assert settings["steps"] == 5 and settings["stop"] == 0.05 and settings["correction"] == "unconditional"
    low, high = settings["log_snr"]
    assert -3.1 <= min(low, high) < max(low, high) <= 1.1
    refuses("is of another scorer", *base, "--steps", "6")
    refuses("--scorer diffusion: expected --teacher", "--scorer", "diffusion", "--suite", "winoground")
    refuses("--teacher: of --scorer diffusion alone", "--model", home / "a", "--teacher", "x", "--suite", "winoground")
    refuses("--scorer diffusion: steps: at least 1 expected, got 0", *base, "--steps", "0")
    refuses("weighting: one of .* expected, got 'none'", *base, "--weighting", "none")
    refuses("--model .*: --scorer diffusion scores by --teacher", *base, "--model", home / "a")
    refuses("--precision fp16", *base, "--precision", "fp16")
    against = run(*base, *how, "--baseline", home / "b")
    assert "diffusion:teacher against" in against and "95 %" in cells(against, "winoground")["text"][-2]


# suites


def test_suites_paths_and_options(home, run, refuses, here):
    out = run("--model", home / "a", "--suite", f"winoground={home}/data/winoground/examples.jsonl", "--suite", "mmvp",
              "--option", "items=3", "--option", "winoground.images=" + str(home / "data/winoground/images"))  # fmt: skip
    assert cells(out, "winoground")["text"][2] == "3" and "note: the first 3 items" in out
    name = "--model", home / "a", "--suite"
    refuses("suite 'winogrand': expected one of cifar10, .*, zeroshot; nearest: winoground", *name, "winogrand")
    refuses("--suite winoground: it is named twice", *name, "winoground,winoground")
    refuses("--suite: expected one or more of cifar10", "--model", home / "a")
    refuses("--option split=val: expected NAME=VALUE .* that is there .mmvp: items.", *name, "mmvp", "--option", "split=val")
    refuses("--option items=all: expected a whole number", *name, "mmvp", "--option", "items=all")
    refuses("--option items=--5: expected a whole number", *name, "mmvp", "--option", "items=--5")
    refuses("--option mmvp.items=1: expected NAME=VALUE", *name, "winoground", "--option", "mmvp.items=1")
    refuses("suite mmvp: expected the path of its data", *name, "mmvp", data=False)
    refuses("suite mmvp: .*nowhere does not exist", *name, "mmvp=nowhere")
    refuses("--model: expected a run's", "--suite", "mmvp")
    refuses("--scorer blip: expected clip, diffusion, or MODULE:NAME", *name, "mmvp", "--scorer", "blip")
    refuses("--batch 0: expected at least 1", *name, "mmvp", "--batch", "0")


def test_the_list_has_every_suite(capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    heads = [name for line in printed.splitlines() if line and not line.startswith((" ", "docs")) for name in line.split(", ")]
    assert sorted(heads) == suite_names()
    for said in ("FOLDER/Questions.csv", "coco_karpathy_test.json", "10-batches-bin/test_batch.bin", "options: images, split"):
        assert said in printed


@pytest.mark.slow
def test_two_ranks_are_as_one(home, run, here, python, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    args = ("--model", home / "a", "--baseline", home / "b", "--batch", "8", "--suite", "winoground,coco_retrieval")
    one = run(*args, "--output", here / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastsds.cli", "eval")
    two = python(*torchrun, *args, "--data", home / "data", "--output", here / "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout == one and one.count("model - baseline") == 2
    files = sorted(path.relative_to(here / "one") for path in (here / "one").rglob("items.jsonl"))
    assert len(files) == 4
    for file in files:
        assert (here / "one" / file).read_bytes() == (here / "two" / file).read_bytes()


# docs/evaluation.md


def block(root, name):
    text = (root / "docs/evaluation.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)[1]


def test_the_pages_commands_run_and_print_its_table(root, here, capsys):
    """The same rows and columns; values within two items, for another machine may round otherwise."""
    said = block(root, "eval")
    (here / "shorter.py").write_text(re.search(r"```python\n(.*?)```", said, re.DOTALL)[1])
    for line in re.findall(r"^fastsds eval (.*)$", said, re.MULTILINE):
        assert command.main(shlex.split(line)) == 0
    printed = capsys.readouterr().out
    printed, shown = printed[printed.index("world_dev: world against") :], block(root, "eval-table").strip("`\n")
    assert [line.split()[0] for line in printed.splitlines() if line] == [x.split()[0] for x in shown.splitlines() if x]
    assert printed.split("---")[0].split() == shown.split("---")[0].split()
    for name, row in cells(shown, "world_dev").items():
        own = cells(printed, "world_dev")[name]
        assert own[2:7] == row[2:7] and abs(float(own[0]) - float(row[0])) <= 2 * 100 / 60
        assert re.fullmatch(r"\+\d+\.\d \(95 % \+\d+\.\d to \+\d+\.\d\), p = [\d.e-]+", row[7])


def test_the_page_has_every_suite_its_data_and_a_public_figure(root):
    text = (root / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [name for name in suite_names() if f"`{name}`" not in text and f"    {name} " not in text] == []
    for source in ("facebook/winoground", "mertyg/vision-language-models-are-bows", "RAIVNLab/sugar-crepe", "MMVP/MMVP_VLM",
                   "kriz/cifar", "image-net.org", "cocodataset.org", "karpathy", "DenotationGraph"):  # fmt: skip
        assert source in text, source
    figures = text[text.index("## Check your set-up first") :]
    for column in ("Winoground", "VG-R", "VG-A", "COCO-Order", "Flickr-Order", "SugarCrepe", "MMVP", "ImageNet", "CIFAR-10",
                   "CIFAR-100", "| COCO | Flickr30k |"):  # fmt: skip
        assert column in figures, column
