"""The cache of CLIP's targets: what it holds, how it is built and gone on with, what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from fastsds.config import ConfigError
from fastsds.crossmodal import load_crossmodal
from fastsds.data.tasks import load_task
from fastsds.recipes import clip_td
from fastsds.recipes.clip_targets import Selection, TargetCache, captioned
from fastsds.recipes.clip_tokens import ClipTokens
from fastsds.student import load_student

SIZES = {"train": 200, "dev": 1, "test": 1, "dev_shift": 1, "shift": 1}
WORLD = ("world_entailment", "world_questions", "world_choice")
CHOICES = {"all": Selection("all"), "pooled": Selection("pooled"), "k": Selection(k=2), "mass": Selection(mass=0.4)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = ClipTokens(load_student(tiny.save_student(folder / "clip")))
    return teacher, load_crossmodal(tiny.save_vilt(folder / "vilt"), classes=3), folder


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(name, sizes=SIZES) for name in WORLD}


def read(cache, task, rows):
    rows = torch.tensor(rows)
    return cache.read(rows, torch.zeros_like(rows), task.source(cache.examples).load(rows, torch.zeros_like(rows), 32))


def directly(task, example, teacher, student, selection):
    """One example's targets, by the functions: -> {side: [(the student's token, target)]}, p_T."""
    pixels = task.source([example]).load_rows(torch.tensor([0]), teacher.image_size).pixels
    said = clip_td.reads(example)[example.target if example.choices else 0]
    found = teacher(pixels, teacher.tokenize([said]))
    if selection.select == "pooled":
        sides = {"text": (found.pooled_text[:, None], None), "visual": (found.pooled_image[:, None], None)}
        there = {side: torch.ones(1, 1, dtype=torch.bool) for side in sides}
    else:
        text, there_text = clip_td.align_text(student.spans([said]), teacher.spans([said]), found.text)
        visual = clip_td.align_patches(found.visual, teacher.grid, student.grid)
        sides = {"text": (text, found.pooled_image), "visual": (visual, found.pooled_text)}
        there = {"text": there_text, "visual": torch.ones(1, visual.shape[1], dtype=torch.bool)}
    chosen = {}
    for side, (x, of) in sides.items():
        scores = torch.zeros(1, x.shape[1]) if of is None else clip_td.relevance(x, of)
        how = {"k": selection.k, "mass": selection.mass, "scale": float(teacher.scale)}
        places = [p for p in clip_td.choose(scores, there[side], ["it"], **how)[0].tolist() if p >= 0]
        chosen[side] = [(p, clip_td.unit_mean_square(x[0, p])) for p in places]
    prompts = normalize(teacher.clip(None, teacher.tokenize(list(task.prompts(example)))).text, dim=-1)
    logits = teacher.scale * normalize(found.pooled_image, dim=-1) @ prompts.T
    return chosen, float(clip_td.answer_probability(logits, clip_td.labels_of([example], logits.shape[1])))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", WORLD)
def test_what_is_read_is_what_the_functions_say(models, tasks, name, choice, tmp_path):
    teacher, student, _ = models
    task, selection = tasks[name], CHOICES[choice]
    examples = task.splits["train"][:30]
    cache = TargetCache(tmp_path / "t", task, examples, teacher, student, selection)
    cache.build()
    rows = [3, 29, 0, 17, 3]
    found = read(cache, task, rows)
    assert found.text.dtype == found.visual.dtype == torch.float16 and found.probability.dtype == torch.float32
    for b, row in enumerate(rows):
        chosen, p = directly(task, examples[row], teacher, student, selection)
        assert float(found.probability[b]) == pytest.approx(p, rel=1e-4, abs=1e-6)
        for side, index in (("text", found.text_index), ("visual", found.visual_index)):
            places = index[b].tolist()
            own = [p for p in places if p >= 0]
            assert own == [place for place, _ in chosen[side]] and places == own + [-1] * (len(places) - len(own))
            for k, (_, target) in enumerate(chosen[side]):
                torch.testing.assert_close(getattr(found, side)[b, k].float(), target, rtol=2e-3, atol=2e-3)
            assert not getattr(found, side)[b, len(own) :].any()
    if selection.select == "all":
        assert (found.candidates == torch.stack([(found.text_index >= 0).sum(1), (found.visual_index >= 0).sum(1)], 1)).all()


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}


def test_stopped_in_the_middle_it_goes_on_to_the_same_bytes(models, tasks, tmp_path, monkeypatch):
    teacher, student, _ = models
    task, examples = tasks["world_entailment"], tasks["world_entailment"].splits["train"]
    make = lambda folder: TargetCache(folder, task, examples, teacher, student, CHOICES["mass"])  # noqa: E731
    make(tmp_path / "whole").build()
    asked = TargetCache._ask
    calls = []

    def stops(self, source, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return asked(self, source, rows)

    monkeypatch.setattr(TargetCache, "_ask", stops)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut").build()
    with pytest.raises(ConfigError, match=r"of \d+ shards are missing: build it to its end"):
        read(make(tmp_path / "cut"), task, [0])
    make(tmp_path / "cut").build()
    made = len(calls)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole") and made < 2 + len(tree(tmp_path / "whole")) * 2
    make(tmp_path / "cut").build()
    assert len(calls) == made  # nothing was missing


def test_the_bytes_do_not_depend_on_who_fills_which_shard(models, tmp_path):
    """The last chunk, of six examples, has a prompt that was encoded before: in a larger batch its last bits are others."""
    _, student, _ = models
    task, teacher = load_task("world_entailment", sizes={**SIZES, "train": 1030}), ClipTokens(load_student("world"))
    make = lambda: TargetCache(tmp_path / "t", task, task.splits["train"], teacher, student, CHOICES["mass"])  # noqa: E731
    make().build()
    whole = tree(tmp_path / "t")
    (tmp_path / "t" / max(whole)).unlink()
    make().build()
    assert len(whole) > 2 and tree(tmp_path / "t") == whole


TWO = """
import sys
from pathlib import Path
from fastsds.crossmodal import load_crossmodal
from fastsds.data.tasks import load_task
from fastsds.recipes.clip_targets import Selection, TargetCache
from fastsds.recipes.clip_tokens import ClipTokens
from fastsds.student import load_student
models, out, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
task = load_task("world_entailment", sizes={"train": 200})
teacher, student = ClipTokens(load_student(models / "clip")), load_crossmodal(models / "vilt", classes=3)
TargetCache(Path(out), task, task.splits["train"], teacher, student, Selection(k=2)).build(0, rank, 2)
"""


@pytest.mark.slow
def test_two_processes_share_the_work(models, tasks, tmp_path, root):
    teacher, student, folder = models
    task = tasks["world_entailment"]
    TargetCache(tmp_path / "one", task, task.splits["train"], teacher, student, CHOICES["k"]).build()
    words = [sys.executable, "-c", TWO, str(folder), str(tmp_path / "two")]
    both = [subprocess.Popen([*words, str(rank)], cwd=root) for rank in (0, 1)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_targets_of_anything_else_are_refused(models, tasks, tmp_path):
    teacher, student, folder = models
    task = tasks["world_entailment"]
    examples = task.splits["train"][:20]

    def make(task=task, examples=examples, teacher=teacher, student=student, selection=CHOICES["k"]):
        return TargetCache(tmp_path / "t", task, examples, teacher, student, selection)

    make().build()
    make()
    other = load_student(folder / "clip")
    with torch.no_grad():
        other.clip.text_projection += 0.1
    quick = tiny.save_student(tmp_path / "quick")
    config = json.loads((quick / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True  # the same weights
    (quick / "open_clip_config.json").write_text(json.dumps(config))
    larger = load_crossmodal(tiny.save_vilt(tmp_path / "vilt", size=48, made=48), classes=3)
    changed = [replace(examples[0], target=(examples[0].target + 1) % 3), *examples[1:]]
    for how, key in (
        ({"teacher": ClipTokens(other)}, "teacher"), ({"teacher": ClipTokens(load_student(quick))}, "teacher"),
        ({"examples": examples[:19]}, "examples"),
        ({"examples": changed}, "examples"), ({"student": larger}, "student grid"), ({"selection": Selection(k=1)}, "k"),
        ({"selection": Selection("all")}, "select"), ({"selection": CHOICES["mass"]}, "k"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            make(**how)
        assert f"{tmp_path / 't'}: made with {key} " in str(error.value)
        assert "name another folder, or delete it" in str(error.value)
    make(student=load_crossmodal(folder / "vilt", classes=3, seed=9))  # no weight of the student counts


def test_shards_that_no_index_tells_of_are_refused(models, tasks, tmp_path):
    """Without its index a folder is anybody's: other tokens would be taken for those that are asked."""
    teacher, student, _ = models
    task, folder = tasks["world_entailment"], tmp_path / "t"
    TargetCache(folder, task, task.splits["train"][:20], teacher, student, CHOICES["k"]).build()
    (folder / "index.json").unlink()
    for selection in (CHOICES["k"], Selection(k=1)):
        with pytest.raises(ConfigError, match="/t: shards, but no index.json that says what they are of; name another folder"):
            TargetCache(folder, task, task.splits["train"][:20], teacher, student, selection)
    assert not (folder / "index.json").exists()
    (folder / "index.json").write_text('{"about": null, "rows": 20, "size": 64}')
    with pytest.raises(ConfigError, match="index.json: no index that can be read"):
        TargetCache(folder, task, task.splits["train"][:20], teacher, student, CHOICES["k"])


@pytest.mark.parametrize("change", [lambda x: x.pop("visual"), lambda x: x.update({k: v[:3].clone() for k, v in x.items()})])
def test_a_shard_that_lacks_something_is_named(models, tasks, change, tmp_path):
    teacher, student, _ = models
    task, path = tasks["world_entailment"], tmp_path / "t" / "shard_00000.safetensors"
    cache = TargetCache(tmp_path / "t", task, task.splits["train"][:20], teacher, student, CHOICES["k"])
    cache.build()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="shard_00000.safetensors: damaged: .*; delete it, and the same build writes it anew"):
        read(cache, task, [3, 5])


def test_a_pair_that_changed_after_the_build_is_named(models, tasks, tmp_path):
    teacher, student, _ = models
    task = tasks["world_entailment"]
    cache = TargetCache(tmp_path / "t", task, task.splits["train"][:20], teacher, student, CHOICES["k"])
    cache.build()
    rows = torch.tensor([5, 7])
    samples = task.source(cache.examples).load(rows, torch.zeros_like(rows), 32)
    samples.digests[1] += 1
    with pytest.raises(ConfigError, match="world_entailment/train/7 has another image or text than CLIP was asked about"):
        cache.read(rows, torch.zeros_like(rows), samples)


def released(folder, n=12):
    """SNLI-VE as it is released, with one image that is damaged."""
    from PIL import Image

    (folder / "flickr30k_images").mkdir(parents=True)
    for k in range(n):
        Image.fromarray(tiny.pixels(1, 40, seed=k)[0].permute(1, 2, 0).numpy()).save(folder / "flickr30k_images" / f"{k}.jpg")
    (folder / "flickr30k_images" / "4.jpg").write_bytes(b"no image")
    labels = ("entailment", "neutral", "contradiction")
    for split in ("train", "dev", "test"):
        rows = [
            {"gold_label": labels[k % 3], "pairID": f"{split}{k}", "sentence2": f"a red ring {'is left ' * (k % 3)}.",
             "Flickr30K_ID": str(k)} for k in range(n)
        ]  # fmt: skip
        (folder / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task("snli_ve", folder)


def test_a_damaged_image_keeps_its_place(models, tmp_path):
    teacher, student, _ = models
    task = released(tmp_path / "data")
    cache = TargetCache(tmp_path / "t", task, task.splits["train"], teacher, student, CHOICES["k"])
    cache.build()
    found = read(cache, task, [3, 5, 11])
    assert found.text.isfinite().all() and (found.text_index >= 0).sum(1).tolist() == [2] * 3


def test_an_image_that_changed_on_the_disk_is_named(models, tmp_path):
    teacher, student, _ = models
    task = released(tmp_path / "data")
    cache = TargetCache(tmp_path / "t", task, task.splits["train"], teacher, student, CHOICES["k"])
    cache.build()
    images = tmp_path / "data" / "flickr30k_images"
    (images / "5.jpg").write_bytes((images / "7.jpg").read_bytes())
    with pytest.raises(ConfigError, match="train5 has another image or text than CLIP was asked about; build it anew"):
        read(cache, task, [3, 5, 11])


def test_k_larger_than_the_tokens_names_the_row(models, tmp_path, monkeypatch):
    teacher, student, _ = models
    task = released(tmp_path / "data", 72)
    cache = TargetCache(tmp_path / "t", task, task.splits["train"], teacher, student, Selection(k=6))
    with pytest.raises(ConfigError, match="^train0, text: k is 6, but "):
        cache.build()
    assert not (tmp_path / "t").exists()  # so that a lower k may have it
    long = [replace(e, text="a red ring is left of a blue square, and nothing else is there") for e in task.splits["train"]]
    long[-1] = replace(long[-1], id="last", text="a ring")
    cache = TargetCache(tmp_path / "t", task, long, teacher, student, Selection(k=4))
    monkeypatch.setattr(cache, "_ask", lambda *_: pytest.fail("CLIP was asked before all texts were counted"))
    with pytest.raises(ConfigError, match="^last, text: k is 4, but "):
        cache.build()
    cache = TargetCache(tmp_path / "t", task, long[:8], teacher, student, Selection(k=student.grid[0] ** 2 + 1))
    with pytest.raises(ConfigError, match="^train0, (text|visual): k is "):
        cache.build()


@pytest.mark.parametrize(("how", "says"), [
    ({}, "select: targeted, k None, mass None; expected one of k and mass"),
    ({"k": 1, "mass": 0.5}, "expected one of k and mass"), ({"select": "all", "k": 1}, "expected neither k nor mass"),
    ({"k": 0}, "k: 0, expected at least 1"), ({"mass": 1.5}, "mass: 1.5, expected a number in (0, 1]"),
    ({"select": "some"}, "select: 'some', expected all, pooled, targeted"),
])  # fmt: skip
def test_a_selection_is_checked(how, says):
    with pytest.raises(ConfigError) as error:
        Selection(**how)
    assert says in str(error.value)


def test_the_pairs_of_an_adaptation_are_true(tasks):
    task = tasks["world_entailment"]
    examples = task.splits["train"]
    source = captioned(task, examples)
    true = [e for e in examples if task.caption(e) is not None]
    found = source.load_rows(torch.arange(len(true)), 32)
    assert found.captions == [task.caption(e) for e in true] and len(source) == len(true)
    assert torch.equal(found.pixels, task.source(true).load_rows(torch.arange(len(true)), 32).pixels)
    no = [e for e in examples if task.caption(e) is None]
    assert {e.about["label"] for e in true} == {"entailment"}
    with pytest.raises(ConfigError, match=f"none of {len(no)} examples has a text that is true of its image"):
        captioned(task, no)
