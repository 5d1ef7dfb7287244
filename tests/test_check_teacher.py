"""Go or no-go: what a swapped caption is, the statistics, the verdict, and the command on teachers that read and do not."""

import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
import runs
import tiny
import torch

from fastsds import check_teacher, cli
from fastsds.config import ConfigError, load_recipe
from fastsds.evaluation import preference
from fastsds.evaluation.diffusion_score import diffusion_scores, pair_scores, timesteps_and_noise
from fastsds.evaluation.preference import CAPTIONS, Outcome, bands_of, choose, compare, judge
from fastsds.evaluation.statistics import pairs_needed, wilson
from fastsds.evaluation.swapped_caption import swapped_caption
from fastsds.schedule import log_snr, timestep_range
from fastsds.testing import alphas_cumprod

# captions


@pytest.mark.parametrize(("caption", "swapped"), [
    ("A cat sitting on a red mat.", "A red mat sitting on a cat."),
    ("A dog is under the old table", "The old table is under a dog"),
    ("there is a red ring above a blue square", "there is a blue square above a red ring"),
    ("a red cat and a dog", "a cat and a red dog"),
    ("An orange cat beside a dog", "A cat beside an orange dog"),
    ("A red bus next to an old car on a street", "An old bus next to a red car on a street"),
    ("Two dogs and a cat are playing in the grass.", "Two dogs and the grass are playing in a cat."),
    ("A man riding a horse on a beach", "A horse riding a man on a beach"),
    ("A woman holding an umbrella in the rain", "An umbrella holding a woman in the rain"),
    ("a photo of a TV on a stand", "a photo of a stand on a TV"),
    ("TV on a stand", "A stand on TV"),
    ("A building on a hill", "A hill on a building"),
    ("  The cup stands to the left of the plate", "  The plate stands to the left of the cup"),
    ("A person is walking a dog on a leash", "A person is walking a leash on a dog"),
    ("A cat on top of a car, at night", "A car on top of a cat, at night"),
    ("a dog on the left of a cat", "a cat on the left of a dog"),
    ("A cup is on the right side of the plate", "The plate is on the right side of a cup"),
    ("a tall man and a European woman in a car", "a European man and a tall woman in a car"),
    ("an hour hand next to a red dial", "a red hand next to an hour dial"),
])  # fmt: skip
def test_a_swapped_caption_is_another_scene_in_the_same_words(caption, swapped):
    assert swapped_caption(caption) == swapped
    words = [sorted("a" if word == "an" else word for word in re.findall(r"\w+", text.lower())) for text in (caption, swapped)]
    assert words[0] == words[1]


@pytest.mark.parametrize("caption", [
    "", "dogs", "a man and a woman", "A cat and a cat", "A bowl of soup with bread", "A black and white cat sits on a laptop",
    "Man walking down the street", "a clock that is on the side of a tower", "A plate with a sandwich and fries",
    "The very old and very tired brown dog of my neighbour on a chair", "A plate with a salad on it",
    "they sit on it", "on the table", "a train next to",
])  # fmt: skip
def test_captions_that_the_rule_leaves_alone(caption):
    """B and A is the same scene as A and B; what is no noun phrase is not moved."""
    assert swapped_caption(caption) is None


def test_the_rule_exchanges_the_objects_of_the_embedded_world():
    from fastsds.world.scenes import WorldSource

    scenes = WorldSource().scenes(torch.arange(600))
    assert [swapped_caption(caption) for caption in scenes.captions()] == scenes.swapped("object").captions()


def test_the_rule_is_its_own_inverse_on_directed_links():
    for caption in ("a cat on a red mat", "the white ring is left of the blue square", "a man riding a horse"):
        assert swapped_caption(swapped_caption(caption)) == caption


# statistics


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    for right, n in ((0, 9), (3, 9), (9, 9), (57, 100), (210, 400)):
        for level in (0.8, 0.95, 0.99375):
            theirs = binomtest(right, n).proportion_ci(level, method="wilson")
            assert wilson(right, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(("share", "level"), [(0.6, 0.95), (0.6, 0.99375), (0.55, 0.95), (0.7, 0.99)])
def test_so_many_pairs_have_the_power_that_is_said(share, level):
    """By the exact binomial distribution, not by the approximation that the number comes from."""
    from scipy.stats import binom

    n = pairs_needed(share, level)
    sure = [right for right in range(n + 1) if wilson(right, n, level)[0] > 0.5]
    assert binom.sf(min(sure) - 1, n, share) == pytest.approx(0.8, abs=0.03)
    assert 2 * binom.sf(min(sure) - 1, n, 0.5) <= 1.4 * (1 - level)  # and seldom sees what is not there
    with pytest.raises(ValueError, match="between 1/2 and 1"):
        pairs_needed(0.5)


def test_how_many_pairs_are_needed_is_said():
    said = preference.needed(400, 8)
    assert said.startswith("60.0 % is told from 50 % (power 80 %) by 317 pairs in 8 bands at once, by 194 in one band alone")
    assert "400 pairs show 59.0 % or more" in said
    assert pairs_needed(0.59, preference.together(8)) <= 400 < pairs_needed(0.585, preference.together(8))


# bands, outcomes, the range


def test_bands_share_out_the_schedule():
    abar = alphas_cumprod()
    for count in (1, 8, 12):
        bands = bands_of(abar, count)
        assert bands[0].last == 1000 and bands[-1].first == 0
        assert all(lower.first == upper.last for lower, upper in zip(bands, bands[1:]))  # none twice, none left out
        widths = [band.high - band.low for band in bands]
        assert max(widths) - min(widths) < 1e-5
        levels = log_snr(abar)
        for band in bands:
            assert band.low <= levels[band.last - 1] <= levels[band.first] <= band.high
    with pytest.raises(ValueError, match="no timestep"):
        bands_of(abar, 40)
    silent = torch.cat([abar[:-1], torch.zeros(1)])  # a schedule that ends without any signal
    assert bands_of(silent, 8)[0].last == 999


def outcome(share: float, x0: float, n: int = 400, bands: int = 8) -> Outcome:
    wins = round(share * n)
    low, high = wilson(wins, n)
    sure = wilson(wins, n, preference.together(bands))[0] > 0.5
    return Outcome(n, wins, 0, low, high, sure, 0.01, 0.001, x0, 0.01)


def test_outcomes_follow_their_formulas():
    generator = np.random.default_rng(0)
    errors = generator.normal(1.0, 0.2, size=(60, 2, 3, 3, 2))
    errors[:9, :, 1, 1] = errors[:9, :, 1, 0]  # nine ties in the second band
    found = compare(errors, "swapped", 1, 3)
    for band, o in enumerate(found):
        gap = errors[:, :, band, 1, 1] - errors[:, :, band, 0, 1]
        assert (o.wins, o.ties) == ((gap[:, 0] > 0).sum(), 9 if band == 1 else 0) and o.pairs == 60
        assert (o.low, o.high) == wilson(o.wins, 60) and o.share == o.wins / 60
        for k, (mean, error) in enumerate(((o.eps, o.eps_error), (o.x0, o.x0_error))):
            assert mean == pytest.approx(gap[:, k].mean())
            assert error == pytest.approx(math.sqrt(gap[:, k].var(ddof=1) / 60))
    assert compare(errors, "another's", 0, 3)[0].wins == (errors[:, 0, 0, 2, 0] > errors[:, 0, 0, 0, 0]).sum()
    tied = compare(np.ones((60, 2, 3, 3, 1)), "swapped", 0, 3)
    assert all((o.wins, o.ties, o.sure) == (0, 60, False) for o in tied)  # a tie is no win


def test_a_teacher_that_prefers_nothing_is_seldom_sure_of_anything():
    """Of 400 such teachers, 1 in 40 may have a sure band; each alone at 95 % would give 1 in 6."""
    generator = np.random.default_rng(1)
    sure = alone = 0
    for _ in range(400):
        found = compare(generator.normal(size=(200, 2, 8, 3, 1)), "swapped", 0, 8)
        sure += any(o.sure for o in found)
        alone += any(o.low > 0.5 for o in found)
    assert sure <= 18 < alone  # 10 expected, deviation 3; 73 expected


@pytest.mark.parametrize(("real", "chosen"), [
    ([(0.5, 0.3), (0.8, 0.3), (0.8, 0.28), (0.8, 0.1), (0.8, 0.3)], (1, 2)),  # the longest run
    ([(0.8, 0.30), (0.5, 0.1), (0.8, 0.29)], (0,)),  # of equally long ones the greater
    ([(0.8, 0.29), (0.5, 0.1), (0.8, 0.30)], (2,)),
    ([(0.5, 9.0), (0.8, 0.2)], (1,)),  # what is not sure sets no measure
    ([(0.8, 0.3), (0.8, 0.224), (0.8, 0.226)], (2,)[:0] + (0,)),  # 3/4 of 0.3 is 0.225
    ([(0.8, 0.2)] * 4, (0, 1, 2, 3)),
    ([(0.5, 0.2)] * 4, ()),
])  # fmt: skip
def test_the_range_is_the_longest_run_of_bands_used(real, chosen):
    assert choose([outcome(*row) for row in real]) == chosen


def test_the_verdict_in_words():
    bands = bands_of(alphas_cumprod(), 4)
    none, some, easy = [outcome(0.5, 0.0)] * 4, [outcome(0.9, 0.3)] * 2 + [outcome(0.9, 0.1)] * 2, [outcome(0.99, 1.0)] * 4
    broken = judge(bands, none, none, None)
    assert not broken.go and broken.span is None and "another picture's" in broken.text and "prediction_type" in broken.text
    blind = judge(bands, none, easy, None)
    assert not blind.go and "names, not how it is arranged" in blind.text and "--pairs" in blind.text
    go = judge(bands, some, easy, None)
    assert go.go and go.bands == (0, 1) and go.text.startswith("go: in log SNR [-5.37, ") and "90.0 % of 400" in go.text
    assert "and on 50.0 % of h_w(f(x))" in judge(bands, some, easy, none).text


def test_the_line_to_paste_trains_in_the_range():
    bands, sure = bands_of(alphas_cumprod(), 8), [outcome(0.9, 0.3)] * 3 + [outcome(0.9, 0.01)] * 5
    verdict = judge(bands, sure, sure, None)
    words = shlex.split(preference.recipe_line(verdict))
    assert words[::2] == ["--set"] * 3
    loss = load_recipe(None, words[1::2]).loss
    first, last = timestep_range(alphas_cumprod(), loss.t, loss.log_snr, loss.shift)
    assert last == bands[0].last and 0 <= bands[2].first - first <= 3  # rounded outwards to a hundredth


# errors


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A teacher of random weights and its student, 16 x 16 pixels, and a recipe for both that takes the world's scenes."""
    return runs.write_recipe(tmp_path_factory.mktemp("untrained"))


def test_one_formula_of_the_score(untrained):
    """What is measured is what `diffusion_scores` measures: the same pairs at the same (t, eps)."""
    from fastsds.data import SwapItems
    from fastsds.teacher import Teacher

    teacher = Teacher.load(untrained.parent / "teacher")
    captions = list(zip(tiny.captions(5, 1), tiny.captions(5, 2), strict=True))
    items = SwapItems(tiny.pixels(10).unflatten(0, (5, 2)), captions, ["object"] * 5, "x")
    z = teacher.encode(items.pixels.flatten(0, 1)).unflatten(0, (5, 2))
    text = teacher.embed([c for pair in items.captions for c in pair]).unflatten(0, (5, 2))
    found, span = torch.zeros(5, 2, 2), timestep_range(teacher.alphas_cumprod, (0.3, 0.95))
    for k in range(3):
        t, eps = timesteps_and_noise(teacher, torch.arange(5), k, span, k, 3, 0)
        low, high = (span[0] + part / 3 * (span[1] - span[0]) for part in (k, k + 1))
        assert (low - 1 <= t).all() and (t <= high).all()
        found += pair_scores(teacher, z, text, t, eps) / 3
    np.testing.assert_allclose(found.numpy(), diffusion_scores(teacher, items, draws=3), rtol=1e-5, atol=1e-6)
    one = pair_scores(teacher, z[:, 1:], torch.cat([text, text], dim=1), t, eps)  # any number of either
    whole = pair_scores(teacher, z, text, t, eps)[:, :, 1:]
    torch.testing.assert_close(one, torch.cat([whole, whole], dim=1), rtol=1e-5, atol=1e-6)


def run(recipe, *argv, sets=()) -> int:
    return cli.main(["check-teacher", *(["--recipe", str(recipe)] if recipe else []), *runs.sets(*sets), *map(str, argv)])


def test_errors_of_x0_are_those_of_the_teachers_own_targets(untrained, tmp_path):
    """The error of eps over the SNR is the error of x0hat, which is asked of the teacher here."""
    from fastsds.data.sources import open_source
    from fastsds.teacher import Teacher

    out = tmp_path / "rows.jsonl"
    assert run(untrained, "--pairs", 8, "--bands", 2, "--draws", 1, "--out", out, sets=["data.batch=8"]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    teacher, row = Teacher.load(untrained.parent / "teacher"), rows[3]
    ids = torch.tensor([row["id"]])
    recipe = load_recipe(untrained)
    samples = open_source(recipe.data, recipe.seed).load(ids, torch.zeros_like(ids), tiny.IMAGE)
    assert samples.captions == [row["right"]] and samples.negatives == [row["swapped"]]
    z = teacher.encode(samples.pixels)
    for b, band in enumerate(bands_of(teacher.alphas_cumprod, 2)):
        t, eps = timesteps_and_noise(teacher, ids, check_teacher.VISIT + b, (band.first, band.last), 0, 1, recipe.seed)
        for c, caption in enumerate(CAPTIONS):
            text = teacher.embed([row[caption]])
            errors = [row["errors"][k][b][c][0] for k in range(2)]
            assert errors[0] == pytest.approx(-teacher.score(z, t, eps, text).item(), rel=1e-4)
            x0 = (teacher.targets(z, t, eps, text) - z).square().mean().item()
            assert errors[1] == pytest.approx(x0, rel=1e-3)


# the command


@pytest.mark.slow
def test_the_embedded_teacher_is_a_go_in_the_range_that_training_works_in(tmp_path, capfd):
    """High noise: where docs/results/bank and docs/results/check_teacher train; low noise has little to teach."""
    out, found = tmp_path / "rows.jsonl", tmp_path / "found.json"
    sets = ["head.init=ridge", "head.samples=512", f"output={tmp_path / 'run'}"]
    assert run(None, "--pairs", 48, "--draws", 1, "--out", out, "--json", found, sets=sets) == 0
    said = capfd.readouterr().out
    result = json.loads(found.read_text())
    low, high = result["log_snr"]
    assert low == -5.37 and -1.0 < high < 1.0
    real, head = (result["outcomes"][key]["swapped"] for key in ("real latents", "h_w(f(x))"))
    assert min(o["wins"] for o in real) > 0.85 * 48 and sum(o["wins"] for o in head) < sum(o["wins"] for o in real)
    assert real[0]["x0"] > 20 * real[-1]["x0"] > 0  # the eps errors alone would say the contrary
    assert real[0]["eps"] < real[-1]["eps"]
    line = f'--set loss.t=null --set "loss.log_snr=[{low}, {high}]" --set loss.shift=0.0'
    assert line in said.splitlines() and result["set"] == line
    assert "48 pairs x 6 questions x 8 bands x 1 draws: 80 calls" in said and "about 0:" in said
    assert "go: in log SNR" in said and "317 pairs in 8 bands" in said and "0 captions left out" in said
    tables = [block.splitlines()[1:] for block in said.split("\n\n") if "right wins" in block]
    assert len(tables) == 2 and all(len(table) == 9 for table in tables)
    for table in tables:  # aligned: the shares end in one column
        assert {row.index(" %  ") for row in table[1:]} == {table[0].index("right wins") + len("right wins") - 2}
    assert len(out.read_text().splitlines()) == 49


def test_an_untrained_unet_is_a_no_go(tmp_path, capfd):
    """The embedded teacher, its UNet as it was before training."""
    from fastsds import world
    from fastsds.world import models

    shutil.copytree(world.TEACHER, tmp_path / "teacher", ignore=shutil.ignore_patterns("unet"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models.unet().save_pretrained(tmp_path / "teacher" / "unet")
    sets = [f"teacher.path={tmp_path / 'teacher'}", f"output={tmp_path}"]
    assert run(None, "--pairs", 64, "--draws", 1, "--out", tmp_path / "rows.jsonl", sets=sets) == 1
    said = capfd.readouterr().out
    assert "no-go: in no band is it sure that the teacher prefers a picture's own" in said and "--set loss.t" not in said
    assert "h_w(f(x)) is not measured" in said and said.count("right wins") == 1


def test_a_teacher_without_arrangement_is_a_no_go(tmp_path, capfd):
    """The embedded teacher told that right and swapped captions are one: it still tells pictures apart."""
    out, found = tmp_path / "rows.jsonl", tmp_path / "found.json"
    assert run(None, "--pairs", 24, "--bands", 2, "--draws", 1, "--out", out, "--json", found, sets=[f"output={tmp_path}"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for row in lines[1:]:
        for errors in row["errors"]:
            for band in errors:
                band[1] = band[0]
    out.write_text("".join(json.dumps(row) + "\n" for row in lines))
    capfd.readouterr()
    assert run(None, "--pairs", 24, "--bands", 2, "--draws", 1, "--out", out, "--json", found, sets=[f"output={tmp_path}"]) == 1
    assert "names, not how it is arranged" in capfd.readouterr().out
    real = json.loads(found.read_text())["outcomes"]["real latents"]
    assert all(o["ties"] == 24 for o in real["swapped"]) and all(o["sure"] for o in real["another's"])


def test_interrupted_and_gone_on_with_is_uninterrupted(untrained, tmp_path, monkeypatch, capfd):
    argv = ("--pairs", 30, "--bands", 2, "--draws", 2)
    assert run(untrained, *argv, "--out", tmp_path / "whole.jsonl", "--json", tmp_path / "whole.json") == 1
    whole = (tmp_path / "whole.jsonl").read_text()
    asked, ask = [], check_teacher.pair_scores

    def stopped(*args):
        asked.append(len(args[1]))
        if len(asked) == 9:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(check_teacher, "pair_scores", stopped)
    assert run(untrained, *argv, "--out", tmp_path / "part.jsonl") == 130
    assert "the same command goes on" in capfd.readouterr().err
    monkeypatch.undo()
    part = (tmp_path / "part.jsonl").read_text()
    assert whole.startswith(part) and len(part.splitlines()) == 1 + 10  # a call has 30 latents: 10 pairs, 3 captions
    (tmp_path / "part.jsonl").write_text(part[:-40])  # the last line cut: its pair is asked about again
    monkeypatch.setattr(check_teacher, "pair_scores", lambda *args: asked.append(len(args[1])) or ask(*args))
    asked.clear()
    assert run(untrained, *argv, "--out", tmp_path / "part.jsonl", "--json", tmp_path / "part.json") == 1
    assert asked == [10] * (2 + 3 * 4)  # two timed calls, then three chunks of two bands and two draws
    rows = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("whole", "part")]
    assert rows[0] == rows[1]
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "part"))
    assert first == second
    asked.clear()
    assert run(untrained, *argv, "--out", tmp_path / "part.jsonl") == 1 and not asked  # nothing is asked twice
    assert run(untrained, *argv[:1], 40, *argv[2:], "--out", tmp_path / "part.jsonl") == 1  # more pairs: those alone
    more = [json.loads(line) for line in (tmp_path / "part.jsonl").read_text().splitlines()]
    assert more[:31] == rows[0] and len(more) == 41


def test_rows_of_something_else_are_refused(untrained, tmp_path, capfd):
    out = tmp_path / "rows.jsonl"
    argv = ("--pairs", 8, "--bands", 2, "--draws", 1, "--out", out)
    assert run(untrained, *argv) == 1
    before = out.read_bytes()
    for changed, what in ((("--bands", 3), "bands"), (("--draws", 2), "draws")):
        assert run(untrained, *argv, *changed) == 2
        assert f"no check, or one of another {what};" in capfd.readouterr().err
    assert run(untrained, *argv, sets=["seed=3"]) == 2 and "another data;" in capfd.readouterr().err  # the world's scenes
    assert out.read_bytes() == before
    for text in ("[1]\n", "", '{"pair": 0}\n', "a file of another kind"):
        out.write_text(text)
        assert run(untrained, *argv) == 2 and out.read_text() == text


@pytest.fixture
def photographs(tmp_path):
    """Captioned pictures without wrong captions of their own: a .tsv as a user has it."""
    from PIL import Image

    said = [f"a {a} ring on a {b} square" for a in ("red", "blue", "white") for b in ("green", "black", "old", "new")]
    rows = ["filepath\ttitle", *(f"{k}.png\t{caption}" for k, caption in enumerate([*said, "dogs", "a man and a woman"]))]
    for k, pixels in enumerate(tiny.pixels(len(rows) - 1)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.tsv"


def test_captions_of_a_users_own_data_are_swapped_by_the_rule(untrained, photographs, tmp_path, capfd):
    out = tmp_path / "rows.jsonl"
    sets = [f"data.source={photographs}", "head.init=ridge", "head.samples=9", f"output={tmp_path / 'run'}"]
    assert run(untrained, "--pairs", 50, "--bands", 2, "--draws", 1, "--out", out, sets=sets) == 1
    said = capfd.readouterr().out
    assert "12 pairs, 2 captions left out" in said and "the data are few: h_w was made from" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert len({row["id"] for row in rows}) == 12
    for row in rows:
        assert row["swapped"] == swapped_caption(row["right"]) and row["another's"] not in (row["right"], row["swapped"])


def test_a_swap_that_the_text_encoder_does_not_read_is_left_out(untrained, photographs, tmp_path, capfd):
    """Past its last token right and swapped are one caption, and each of its ties would count against the teacher."""
    lines = photographs.read_text().splitlines()
    assert lines[1].startswith("0.png")
    lines[1] = "0.png\t" + "dogs, " * 90 + "a cat on a mat"
    photographs.write_text("\n".join(lines) + "\n")
    sets = [f"data.source={photographs}", f"output={tmp_path / 'run'}"]
    run(untrained, "--pairs", 50, "--bands", 2, "--draws", 1, "--out", tmp_path / "rows.jsonl", sets=sets)
    assert "11 pairs, 3 captions left out" in capfd.readouterr().out


def test_pairs_are_others_than_those_that_the_head_was_made_from(untrained, tmp_path):
    found = {}
    for name, sets in (("without", []), ("ridge", ["head.init=ridge", "head.samples=56"]),
                       ("warmup", ["head.init=warmup", "head.warmup_steps=3"])):  # fmt: skip
        out = tmp_path / f"{name}.jsonl"
        sets = [*sets, f"output={tmp_path / name}", "data.samples=256"]
        for again in range(2):  # the second time the sums are there already
            assert run(untrained, "--pairs", 20, "--bands", 1, "--draws", 1, "--out", out, sets=sets) == 1
            found[name, again] = [json.loads(line)["id"] for line in out.read_text().splitlines()[1:]]
            out.unlink()
        assert found[name, 0] == found[name, 1]
    assert not set(found["without", 0]) & set(found["ridge", 0])
    assert not set(found["without", 0]) & set(found["warmup", 0])


def test_the_head_of_the_students_folder_is_measured(untrained, tmp_path, capfd):
    assert runs.train("--recipe", untrained, *runs.sets("steps=2"), "--output", tmp_path / "run") == 0
    sets = [f"student.model={tmp_path / 'run' / 'student'}"]
    argv = ("--pairs", 8, "--bands", 2, "--draws", 1, "--out", tmp_path / "rows.jsonl")
    assert run(untrained, *argv, sets=sets) == 1
    assert "h_w(f(x)): the right caption against the swapped one" in capfd.readouterr().out
    assert run(untrained, *argv) == 2 and "one of another student;" in capfd.readouterr().err


@pytest.mark.parametrize(("argv", "sets", "message"), [
    (("--pairs", 3), (), "--pairs 3: expected at least 8"),
    (("--bands", 0), (), "--bands 0: expected at least 1"),
    (("--draws", 0), (), "--draws 0: expected at least 1"),
    (("--bands", 90), (), "--bands 90: log_snr: no timestep lies in"),
    ((), ("head.init=warmup", "loss.lambda=0"), "head.init is warmup"),
    ((), ("data.source='pipe:cat {tmp}/a.tar'", "data.streams=1"), "expected data on a disk"),
    (("--json", "{tmp}/none/x.json", "--pairs", 8, "--bands", 1, "--draws", 1), (), "--json"),
    (("--out", "{tmp}"), (), "--out"),
])  # fmt: skip
def test_mistakes_are_named(untrained, tmp_path, capfd, argv, sets, message):
    argv, sets = ([str(a).replace("{tmp}", str(tmp_path)) for a in words] for words in (argv, sets))
    out = () if "--out" in argv else ("--out", tmp_path / "rows.jsonl")
    assert run(untrained, *argv, *out, sets=sets) == 2
    assert message in capfd.readouterr().err


def test_too_few_captions_that_can_be_swapped(untrained, photographs, tmp_path):
    photographs.write_text("filepath\ttitle\n" + "".join(f"{k}.png\ta dog\n" for k in range(9)))
    with pytest.raises(ConfigError, match="of 9 captions 0 can be swapped; expected at least 8"):
        check_teacher.main(
            ["--recipe", str(untrained), *runs.sets(f"data.source={photographs}"), "--out", str(tmp_path / "rows.jsonl")]
        )
