"""The demo: its first line and its picture, and the whole of it from models that know nothing."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from fastsds import demo, figures, report
from fastsds.config import ConfigError, load_recipe
from fastsds.provenance import provenance


def test_first_line_says_what_differs():
    line = report.settings_line(load_recipe(), (4, 8, 8), 32, "world")
    assert "\n" not in line and "arXiv 2307.09233" in line
    for words in ("all parameters", "without the UNet's Jacobian", "inverse_snr_root", "of the summed norm", " T (all t)",
                  "2 x 32", "32x32", "teacher world"):  # fmt: skip
        assert words in line
    line = report.settings_line(load_recipe(None, ["loss.lambda=30", "loss.t=[0.6, 1]"]), (4, 8, 8), 32, "world")
    assert "lambda 30 of the element mean = 0.117" in line and "t in [0.6, 1] T" in line
    sets = ["student.tune=layernorm", "loss.gradient=full", "loss.weighting=uniform", "loss.t=[0, 1]"]
    line = report.settings_line(load_recipe(None, sets), (4, 8, 8), 32, "world")
    for words in ("all parameters", "gradient", "all t"):
        assert words not in line
    assert "log SNR" in report.settings_line(load_recipe(None, ["loss.t=null", "loss.log_snr=[-3, 1]"]), (4, 8, 8), 32, "x")


def test_the_demo_is_the_shipped_one_with_any_gradient(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("seeds: 1")  # of somebody's own
    asked = demo.parse(["--set", "loss.gradient=amortised", "--set", "data.samples=64", "--output", str(tmp_path / "out")])
    assert "gradient to a bank's targets" in demo.first_line(asked)


def test_a_tag_takes_no_commits_place(tmp_path, monkeypatch):
    """`git describe` names the nearest annotated tag, and a release has one."""
    import fastsds
    from fastsds.provenance import commit

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "fastsds").mkdir()
    (tmp_path / "fastsds" / "__init__.py").touch()
    for words in (("init",), ("add", "."), ("commit", "-m", "one"), ("tag", "-a", "v1", "-m", "one")):
        git(*words)
    monkeypatch.setattr(fastsds, "__file__", str(tmp_path / "fastsds" / "__init__.py"))
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "fastsds" / "__init__.py").write_text("changed")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_provenance():
    source = provenance()
    assert set(source) == {"commit", "versions", "machine"} and "cores" in source["machine"]
    assert source["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_picture(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    shown = [
        {
            "kind": kind, "captions": ("a red ring left of a blue square", "a blue square left of a red ring"),
            "images": generator.integers(0, 255, (2, 3, 32, 32), dtype=np.uint8),
            "decoded": generator.integers(0, 255, (2, 3, 32, 32), dtype=np.uint8),
            "choices": {"L_CLIP": (True, False), "L_CLIP + L_SDS": (True, True)},
        }
        for kind in ("object", "colour", "shape")
    ]  # fmt: skip
    curves = {
        arm: {"loss": [(20, 2.0), (40, 1.0)], "held out": [(0, 50.0), (40, 70.0)], "seen": []}
        for arm in ("L_CLIP", "L_CLIP + L_SDS")
    }
    figures.picture(tmp_path / "demo.png", shown, curves, "title")
    image = np.asarray(Image.open(tmp_path / "demo.png").convert("RGB"))
    assert min(image.shape[:2]) > 400 and image.std() > 20
    for item in shown:
        item["decoded"] = None
    figures.picture(tmp_path / "other.png", shown, curves, "title")
    assert Image.open(tmp_path / "other.png").height < image.shape[0]


def test_bad_arguments(tmp_path):
    (tmp_path / "file").touch()
    for argv, words in (
        (["--items", "0"], "--items is 0"), (["--set", "stepz=4"], "nearest known key is 'steps'"),
        (["--set", "steps"], "key=value"), (["--output", str(tmp_path / "file")], "is not a folder"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            demo.main(["--output", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--what"])
    assert stopped.value.code == 2


# The whole of it, from models that know nothing.


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The embedded world's models before any training, in their real formats."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    from fastsds.world import models
    from fastsds.world.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("untrained")
    teacher, student = root / "teacher", root / "student"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = train_tokenizer(teacher / "tokenizer", samples=256)
        models.autoencoder().save_pretrained(teacher / "vae")
        models.unet().save_pretrained(teacher / "unet")
        models.text_encoder(size).save_pretrained(teacher / "text_encoder")
        models.scheduler().save_pretrained(teacher / "scheduler")
        config = models.student_config(size, ".")
        state = CLIP(**config).state_dict()
    shutil.copytree(teacher / "tokenizer", student)
    save_file({k: v.contiguous() for k, v in state.items()}, student / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (student / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return root


def test_the_whole_demo(untrained, tmp_path, capsys):
    out = tmp_path / "out"
    sets = ["steps=4", "log_every=2", "eval.items=4", "eval.every=2", f"student.model={untrained / 'student'}",
            f"teacher.path={untrained / 'teacher'}", "data.batch=4"]  # fmt: skip
    argv = ["--output", str(out), "--items", "6", *(word for s in sets for word in ("--set", s))]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].startswith("Not the paper's settings")
    assert "all parameters train" in printed[0] and "2 x 4 pairs" in printed[0]
    assert [line for line in printed if line.startswith("[0:") and "world seed_0 sds: " in line]
    table = (out / "table.md").read_text()
    assert table.startswith(printed[0])
    for label in ("pretrained", "L_CLIP", "L_CLIP + L_SDS"):
        assert table.count(f"| {label} |") == 2
        assert sum(f"  {label} " in line for line in printed) >= 2
    results = json.loads((out / "results.json").read_text())
    assert {"commit", "versions", "machine", "command", "file", "set", "lines", "differences"} <= set(results)
    names = ("text", "image", "group", "swap", "swap_object", "swap_colour", "swap_shape", "retrieval")
    for line in results["lines"]:
        (seed,) = line["seeds"]
        assert set(seed["metrics"]["world_test"]) >= {f"{s}/{m}" for s in ("seen", "test") for m in names}
        assert ("test/reading" in seed["metrics"]["world_test"]) == (line["arm"] == "sds")
        assert line["arm"] == "pretrained" or seed["seconds"] > 0
    of = {(d["metric"], d["test"]) for d in results["differences"] if d["p_holm"] is not None}
    assert of == {(f"{s}/{m}", "mcnemar") for s in ("seen", "test") for m in ("text", "image", "group")}
    assert (out / "demo.png").stat().st_size > 20_000
    runs = [out / "world" / "seed_0" / "all" / arm for arm in ("clip", "sds")]
    assert [line.strip() for line in printed if line.startswith("  /")] == [
        *(str(out / name) for name in ("table.md", "results.json", "demo.png")), *map(str, runs)
    ]  # fmt: skip
    # both arms: the same batches and the same start, so the same first contrastive loss until the teacher speaks
    first = [json.loads((run / "run" / "metrics.jsonl").read_text().split("\n")[0]) for run in runs]
    assert first[0] == first[1] and first[0]["step"] == 0 and first[0]["suite"] == "world_dev"
