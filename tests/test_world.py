"""The embedded world: scenes that are what their captions say, splits that do not leak, weights that are what they claim."""

import hashlib
import json
from collections import Counter

import pytest
import torch

from fastsds import world
from fastsds.world import scenes
from fastsds.world.scenes import COLOURS, CONTENTS, KINDS, WorldSource, contents, retrieval_set, swap_items


def test_splits_partition_the_contents():
    train, dev, test = (contents(s).tolist() for s in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (336, 42, 42)
    assert sorted(train + dev + test) == list(range(len(CONTENTS)))
    assert contents("seen").tolist() == train


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_scenes_stay_in_their_split(split):
    s = WorldSource(split).scenes(torch.arange(512))
    allowed = {CONTENTS[i] for i in contents(split).tolist()}
    drawn = {
        (tuple(sorted(c)), tuple(sorted(k))) for c, k in zip(s.colour.tolist(), s.shape.tolist(), strict=True)
    }
    assert drawn <= allowed


def test_contents_are_distinct_within_aligned_runs_of_32():
    s = WorldSource().scenes(torch.arange(320))
    content = torch.cat([s.colour.sort(dim=1).values, s.shape.sort(dim=1).values], dim=1)
    for run in content.split(scenes.CHUNK):
        assert len(torch.unique(run, dim=0)) == scenes.CHUNK


def test_a_sample_depends_on_its_id_alone():
    source, ids = WorldSource(seed=3), torch.tensor([5, 70_000, 33, 5])
    whole = source.load(ids)
    for row, i in enumerate(ids.tolist()):
        alone = source.load(torch.tensor([i]))
        assert torch.equal(alone.pixels[0], whole.pixels[row]) and alone.captions[0] == whole.captions[row]
    assert not torch.equal(WorldSource(seed=4).load(ids).pixels, whole.pixels)


def test_objects_are_painted_where_the_relation_puts_them():
    s = WorldSource(seed=1).scenes(torch.arange(64))
    pixels = scenes.render(s, 1, torch.arange(64)).float() / 255
    palette = torch.tensor(list(COLOURS.values()))
    for n in range(64):
        centres = []
        for k in range(2):
            distance = (pixels[n] - palette[s.colour[n, k]][:, None, None]).square().sum(0)
            y, x = torch.nonzero(distance < 0.03, as_tuple=True)
            centres.append((x.float().mean(), y.float().mean()))
        (ax, ay), (bx, by) = centres
        assert [ax < bx, ax > bx, ay < by, ay > by][s.relation[n]], s.captions()


def test_swap_items_have_the_same_words_and_the_kind_they_say():
    items = swap_items("dev", 20, seed=5)
    assert Counter(items.kind) == dict.fromkeys(KINDS, 20) and items.pixels.shape == (60, 2, 3, 32, 32)
    for kind, (a, b) in zip(items.kind, items.captions, strict=True):
        assert a != b and Counter(a.split()) == Counter(b.split())
        changed = [(x, y) for x, y in zip(a.split(), b.split(), strict=True) if x != y]
        words = {w for pair in changed for w in pair}
        assert bool(words & set(COLOURS)) == (kind in ("object", "colour"))
        assert bool(words & set(scenes.SHAPES)) == (kind in ("object", "shape"))


def test_splits_and_seeds_of_items_differ():
    first, again = swap_items("test", 4), swap_items("test", 4)
    assert torch.equal(first.pixels, again.pixels) and first.captions == again.captions
    for other in (swap_items("seen", 4), swap_items("test", 4, seed=1)):
        assert not torch.equal(first.pixels, other.pixels)


def test_retrieval_captions_mean_different_things():
    samples = retrieval_set("test", 100)
    assert len(set(samples.captions)) == 100
    with pytest.raises(ValueError, match="distinct meanings"):
        retrieval_set("test", 2000)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="'training'"):
        contents("training")
    with pytest.raises(ValueError, match="'size'"):
        WorldSource().scenes(torch.arange(2)).swapped("size")


def test_manifest_matches_the_shipped_weights():
    manifest = json.loads((world.WEIGHTS / "manifest.json").read_text())
    files = {p.relative_to(world.WEIGHTS).as_posix(): p for p in world.WEIGHTS.rglob("*") if p.is_file()}
    for name in ("manifest.json", "pretrain.log"):
        files.pop(name)
    assert set(files) == set(manifest["sha256"]) and sum(p.stat().st_size for p in files.values()) <= 8e6
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    for split in ("seen", "dev", "test"):
        for kind, least in (("object", 95), ("colour", 95), ("shape", 90)):
            assert manifest["teacher_score"][f"{split}/{kind}/text"] >= least


def test_shipped_teacher_binds():
    """The manifest's claim again, on a few items."""
    from fastsds.evaluation.diffusion_score import diffusion_scores
    from fastsds.evaluation.winoground import winoground
    from fastsds.teacher import Teacher

    items = swap_items("test", 8, seed=7)
    scores = diffusion_scores(Teacher.load("world"), items, draws=6)
    assert winoground(scores).text.mean() >= 0.85


def test_any_caption_has_tokens():
    from fastsds.student import load_student

    student = load_student("world")
    tokens = student.tokenize(["a red ring", "Zwei Füchse, 雪 & \N{SNOWMAN}!", "word " * 100])
    end = tokens.max()
    assert student.clip.vocab_size <= 1024 and bool((tokens == end).any(dim=1).all())
