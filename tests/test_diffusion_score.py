"""The teacher as a scorer: its formula, what its draws depend on, what a choice needs, and what stopping early changes."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import released
import tiny
import torch
from PIL import Image
from scipy import stats

from fastsds import ops, world
from fastsds.config import ConfigError
from fastsds.data import digest
from fastsds.evaluation import stopping
from fastsds.evaluation.diffusion_score import DiffusionScorer
from fastsds.evaluation.elimination import Race, run, spread, stages
from fastsds.evaluation.run import evaluate
from fastsds.evaluation.statistics import wilson
from fastsds.evaluation.suite import ImageRef, Item, load_suite, suite_names
from fastsds.evaluation.winoground import winoground
from fastsds.teacher import Teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder):
    return Teacher.load(folder)


def refs(pixels: torch.Tensor, name: str = "image") -> list[ImageRef]:
    """Images as a suite has them, in PNG, which loses nothing."""

    def encoded(image):
        with io.BytesIO() as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
            return file.getvalue()

    return [ImageRef(f"{name} {k}", "a test", lambda image=image: encoded(image)) for k, image in enumerate(pixels)]


def some_items(n: int, captions: int = 2, images: int = 2, seed: int = 0) -> list[Item]:
    pixels = tiny.pixels(n * images, seed=seed).unflatten(0, (n, images))
    said = tiny.captions(n * captions, seed + 1)
    return [
        Item(f"item {k}", tuple(refs(pixels[k], f"{seed} {k}")), tuple(said[k * captions : (k + 1) * captions]))
        for k in range(n)
    ]


# The formula.


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", ["uniform", "snr"])
@pytest.mark.parametrize("correction", ["none", "unconditional"])
def test_score_is_its_formula(tmp_path, prediction_type, weighting, correction):
    """Pair after pair, draw after draw, in float64."""
    teacher = Teacher.load(tiny.save_teacher(tmp_path, prediction_type))
    exact = Teacher.load(tmp_path, dtype=torch.float64)
    steps, band = 3, (-2.0, 1.5)
    items = [*some_items(2, captions=3, images=2), *some_items(1, captions=2, images=1, seed=5)]
    scorer = DiffusionScorer(
        teacher, steps=steps, band=band, weighting=weighting, correction=correction, batch=7, seed=11
    )
    found = scorer.score_items(items)
    abar = teacher.alphas_cumprod.double()
    inside = [t for t in range(1000) if band[0] <= float(torch.log(abar[t] / (1 - abar[t]))) <= band[1]]

    def term(ref, caption, number, draw):
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(ref.read())))).permute(2, 0, 1)[None]
        z, text = exact.encode(image).double(), exact.embed([caption])
        sample = torch.tensor([number])
        u = float(ops.Noise(11, ops.draw(ops.Purpose.TIMESTEP, draw), sample).uniform(1))
        t = min(int(inside[0] + (draw + 1 - u) / steps * len(inside)), inside[-1])
        eps = ops.Noise(11, ops.draw(ops.Purpose.NOISE, draw), sample).normal(teacher.latent_shape).double()
        alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
        z_t = alpha * z + sigma * eps
        said = exact.unet(z_t, torch.tensor([t]), encoder_hidden_states=text).sample
        eps_hat = said if prediction_type == "epsilon" else alpha * said + sigma * z_t
        w = {"uniform": 1.0, "snr": float(abar[t] / (1 - abar[t]))}[weighting]
        return -w * float((eps_hat - eps).square().mean())

    for item, s in zip(items, found, strict=True):
        assert s.shape == (len(item.captions), len(item.images)) and s.dtype == np.float64
        number = digest(item.id.encode())
        for c, caption in enumerate(item.captions):
            for i, ref in enumerate(item.images):
                want = np.mean([term(ref, caption, number, k) for k in range(steps)])
                if correction == "unconditional":
                    want -= np.mean([term(ref, "", number, k) for k in range(steps)])
                assert s[c, i] == pytest.approx(want, rel=1e-4, abs=2e-6)
    pairs = 2 * 3 * 2 + 2 + (5 if correction == "unconditional" else 0)
    assert scorer.passes == steps * pairs


def test_draws_are_stratified_and_every_beginning_is_spread():
    for n in (1, 3, 8, 10, 32, 100, 1000):
        assert sorted(spread(n)) == list(range(n)) and stages(n)[-1] == n
        for k in stages(n):
            assert abs(np.mean(spread(n)[:k]) + 0.5 - n / 2) <= max(n / 16, 0.5)  # near the middle
    for n in (8, 32, 64):
        for k in (2, 4, 8):
            assert sorted(place * k // n for place in spread(n)[:k]) == list(range(k))  # one in each part
    assert stages(32) == [4, 8, 16, 32] and stages(4) == [4] and stages(3) == [3] and stages(10) == [4, 8, 10]


# What a score depends on.


@pytest.mark.parametrize("stop", [None, 0.2])
def test_a_score_depends_on_its_item_alone(teacher, stop):
    """Bit for bit: whatever is asked with it, in whatever order, so that resuming and ranks change nothing."""
    items = [*some_items(5, captions=3, images=1), *some_items(4, seed=9)]
    items = [replace(item, id=f"number {k}") for k, item in enumerate(items)]

    def ask(part):
        return DiffusionScorer(teacher, steps=8, batch=16, stop=stop).score_items(part)

    whole = ask(items)
    assert all(np.array_equal(a, b) for a, b in zip(ask(items[::-1])[::-1], whole, strict=True))
    assert all(np.array_equal(ask([item])[0], s) for item, s in zip(items, whole, strict=True))
    others = DiffusionScorer(teacher, steps=8, batch=5, stop=stop).score_items(items)
    assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(others, whole, strict=True))
    renamed = ask([replace(items[0], id="another")])[0]
    assert not np.allclose(renamed, whole[0], atol=1e-4)  # its draws
    assert not np.allclose(DiffusionScorer(teacher, steps=8, batch=16, seed=1).score_items(items[:1])[0], whole[0], atol=1e-4)


def test_a_gallery_may_be_scored_in_parts(teacher):
    images, captions = refs(tiny.pixels(3)), tiny.captions(5)
    scorer = DiffusionScorer(teacher, steps=4, batch=8, stop=0.5)
    whole = scorer.score(images, captions)
    assert whole.shape == (5, 3) and scorer.passes == 4 * 15
    parts = [np.vstack([scorer.score(images[a:b], captions[:2]), scorer.score(images[a:b], captions[2:])])
             for a, b in ((0, 1), (1, 3))]  # fmt: skip
    assert np.array_equal(np.hstack(parts), whole)
    corrected = DiffusionScorer(teacher, steps=4, batch=8, correction="unconditional")
    again, bare = corrected.score(images, captions), scorer.score(images, [""])
    np.testing.assert_allclose(again, whole - bare, rtol=0, atol=1e-12)
    assert corrected.passes == 4 * (15 + 3)


def test_equal_captions_and_images_tie_and_are_asked_once(teacher):
    (item,) = some_items(1)
    first, second = item.captions
    item = replace(item, captions=(first, second, first), images=(*item.images, item.images[0]))
    scorer = DiffusionScorer(teacher, steps=4, correction="unconditional")
    (s,) = scorer.score_items([item])
    assert np.array_equal(s[0], s[2]) and np.array_equal(s[:, 0], s[:, 2]) and len(np.unique(s)) == 4
    assert scorer.passes == 4 * (2 * 2 + 2)
    assert DiffusionScorer(teacher, steps=4, correction="unconditional").terms([item])[0].shape == (4, 3, 3)


def test_correction_changes_image_choices_only(teacher):
    items = some_items(60)
    plain = np.stack(DiffusionScorer(teacher, steps=4).score_items(items))
    corrected = np.stack(DiffusionScorer(teacher, steps=4, correction="unconditional").score_items(items))
    assert np.array_equal(np.sign(plain[:, 0] - plain[:, 1]), np.sign(corrected[:, 0] - corrected[:, 1]))
    assert np.allclose(plain[:, 0] - plain[:, 1], corrected[:, 0] - corrected[:, 1], rtol=0, atol=1e-12)
    changed = np.sign(plain[..., 0] - plain[..., 1]) != np.sign(corrected[..., 0] - corrected[..., 1])
    assert 0.1 < changed.mean() < 0.9
    easy = np.sign((plain[..., 0] - plain[..., 1]).sum(axis=1))  # an untrained teacher finds one image easier, whatever is said
    assert (np.sign(plain[..., 0] - plain[..., 1]) == easy[:, None]).mean() > 0.9


# What decides a suite's outcomes.


@pytest.mark.parametrize("name", [name for name in suite_names() if name in vars(released)])
def test_outcomes_rest_on_the_choices_that_items_name(tmp_path, name):
    """Scores of which the same come first, and tie for it, in every choice have the same outcomes."""
    suite = load_suite(name, *released.write(name, tmp_path))
    if suite.gallery:
        pytest.skip("asked by queries")
    n, shape = len(suite.items), (len(suite.items[0].captions), len(suite.items[0].images))
    (chosen,) = {item.chosen for item in suite.items}
    scores, others = np.random.default_rng(0).integers(0, 3, (2, 3000, *shape)).astype(float)

    def firsts(s):
        by_image, by_caption = s == s.max(axis=0), s == s.max(axis=1, keepdims=True)
        return ("captions" in chosen and by_image.tobytes(), "images" in chosen and by_caption.tobytes())

    alike = {}
    for s in others:
        alike.setdefault(firsts(s), []).append(s)
    pairs = [(s, alike[firsts(s)][-1]) for s in scores if firsts(s) in alike]
    assert len(pairs) > 2900 and len(alike) > 2
    for start in range(0, len(pairs) - n + 1, n):
        a, b = (suite.outcomes(np.stack(part)) for part in zip(*pairs[start : start + n], strict=True))
        assert all(np.array_equal(a[key], b[key]) for key in a)


# Stopping early.


def by_hand(x: np.ndarray, chosen: tuple[str, ...], risk: float):
    """What is dropped when, of x [draws, captions, images]: {pair: (draws, who it lost to)}; one p-value after another."""
    draws, captions, images = x.shape
    columns = [[(c, i) for c in range(captions)] for i in range(images)] if "captions" in chosen and captions > 1 else []
    rows = [[(c, i) for i in range(images)] for c in range(captions)] if "images" in chosen and images > 1 else []
    looks = [n for n in (4, 8, 16, 32, 64) if n < draws]
    alive, lost = {(c, i): draws for c in range(captions) for i in range(images)}, {}
    for n in looks:
        settled = []
        for choice in columns + rows:
            running = [pair for pair in choice if alive[pair] == draws]
            if len(running) < 2:
                settled.append(True)
                continue
            means = {pair: np.mean([x[k][pair] for k in range(n)]) for pair in running}
            leader = max(running, key=means.get)
            losers = []
            for pair in running:
                d = [x[k][leader] - x[k][pair] for k in range(n)]
                if pair == leader or np.ptp(d) == 0:
                    continue
                t = np.mean(d) / (np.std(d, ddof=1) * np.sqrt(1 / n - 1 / draws))
                if stats.t.sf(t, n - 1) < risk / (len(looks) * (len(choice) - 1)):
                    losers.append(pair)
            settled.append(len(losers) == len(running) - 1)
            if not (columns and rows):
                for pair in losers:
                    alive[pair], lost[pair] = n, leader
                if settled[-1]:
                    alive[leader] = n
        if columns and rows and all(settled):
            return dict.fromkeys(alive, n), {}
    return alive, lost


@pytest.mark.parametrize("shape, chosen", [((5, 1), ("captions",)), ((3, 2), ("captions",)), ((2, 3), ("images",)),
                                           ((2, 2), ("captions", "images")), ((3, 2), ("captions", "images"))])  # fmt: skip
@pytest.mark.parametrize("draws", [8, 21, 64])
def test_elimination_against_brute_force(shape, chosen, draws):
    generator, dropped = np.random.default_rng(draws), 0
    for _ in range(60):
        x = generator.normal(size=(draws, *shape)) * 0.5 + generator.normal(size=shape) + generator.normal(size=(draws, 1, 1))
        race = Race(*shape, draws, chosen, risk=0.1)

        def fill(first, last, race=race, x=x):
            race.x[first:last, race.alive] = x[first:last, race.alive]  # and nothing else

        run([race], fill)
        made, lost = by_hand(x, chosen, 0.1)
        assert {pair: int(n) for pair, n in np.ndenumerate(race.made)} == made
        s = race.scores()
        for pair, n in made.items():
            if pair not in lost:
                assert s[pair] == pytest.approx(np.mean([x[k][pair] for k in range(n)]), abs=1e-12)
                continue
            leader = lost[pair]
            gap = np.mean([x[k][leader] - x[k][pair] for k in range(n)])
            assert s[leader] - s[pair] == pytest.approx(gap, abs=1e-12) and s[pair] < s[leader]
            dropped += 1
    assert dropped > 20 or len(chosen) == 2


def test_the_risk_is_kept():
    """Of choices whose draws are normal, no more end otherwise than with all draws, at several shares of signal."""
    generator, risk, n = np.random.default_rng(0), 0.05, 1500
    for gap in (0.0, 0.1, 0.3, 1.0):
        changed = spared = 0
        for _ in range(n):
            x = generator.normal(size=(32, 4, 1))
            x[:, 0] += gap
            race = Race(4, 1, 32, ("captions",), risk)
            run([race], lambda first, last, race=race, x=x: race.x.__setitem__(slice(first, last), x[first:last]))
            changed += race.scores().argmax() != x.mean(axis=0).argmax()
            spared += 1 - race.made.mean() / 32
        assert changed / n <= risk + 3 * (risk * (1 - risk) / n) ** 0.5
        assert spared / n > (0.02 if gap < 1 else 0.4)


def test_ties_are_never_settled():
    x = np.repeat(np.random.default_rng(1).normal(size=(32, 1, 1)), 2, axis=1)
    race = Race(2, 1, 32, ("captions",), 0.5)
    run([race], lambda first, last: race.x.__setitem__(slice(first, last), x[first:last]))
    assert (race.made == 32).all() and race.scores()[0] == race.scores()[1]


@pytest.mark.parametrize("correction", ["none", "unconditional"])
def test_scorer_asks_what_the_race_needs(teacher, correction):
    """Its scores with `stop` are those of a race over all its terms, and it pays for no others."""
    items = [replace(item, chosen=("captions",)) for item in some_items(6, captions=4)] + some_items(6, seed=3)
    items = [replace(item, id=str(k)) for k, item in enumerate(items)]
    whole = DiffusionScorer(teacher, steps=16, batch=32, correction=correction)
    x, passes = whole.terms(items), 0
    assert not any(np.isnan(of).any() for of in x)
    scorer = DiffusionScorer(teacher, steps=16, batch=32, correction=correction, stop=0.3)
    for item, of, s in zip(items, x, scorer.score_items(items), strict=True):
        race = Race(len(item.captions), len(item.images), 16, item.chosen, 0.3)
        run([race], lambda first, last, race=race, of=of: race.x.__setitem__(slice(first, last), of[first:last]))
        assert np.array_equal(race.scores(), s)
        passes += race.made.sum() + (race.made.max(axis=0).sum() if correction == "unconditional" else 0)
    assert scorer.passes == passes < whole.passes
    # a repeated caption is raced once, and shares its twin's score
    twice = [replace(item, captions=(*item.captions, item.captions[0])) for item in items]
    found, paid = stopping.replay(twice, [np.concatenate([of, of[:, :1]], axis=1) for of in x], 0.3)
    assert all(np.array_equal(a, [*b, b[0]]) for a, b in zip(found, scorer.score_items(items), strict=True))
    assert paid == passes or correction == "unconditional"


@pytest.mark.slow
def test_reaches_the_accuracy_recorded_with_the_weights():
    """On the items and with the settings of the manifest, and draws of its own: within Wilson's intervals of 100 items. And
    stopping early agrees with it, and pays less."""
    from fastsds.world.scenes import swap_items

    recorded = json.loads((world.WEIGHTS / "manifest.json").read_text())["teacher_score"]
    swaps = swap_items("test", 100, seed=1)
    items = [Item(str(k), tuple(refs(swaps.pixels[k], str(k))), swaps.captions[k]) for k in range(len(swaps))]
    terms = DiffusionScorer(Teacher.load("world"), steps=8).terms(items)
    scores = [x.mean(axis=0) for x in terms]
    found = winoground(scores)
    for kind in ("object", "colour", "shape"):
        rows = [k == kind for k in swaps.kind]
        for name in ("text", "image"):
            value = recorded[f"test/{kind}/{name}"]
            low, high = wilson(round(value), 100)
            assert low <= getattr(found, name)[rows].mean() <= high, (kind, name, value)
    early, passes = stopping.replay(items, terms, 0.05)
    assert stopping.changed(items, early, scores) == (0, 4 * 300) and passes < 0.75 * 8 * 4 * 300


# What is refused, and what is said.


@pytest.mark.parametrize("how, said", [
    ({"steps": 0}, "steps: at least 1 expected, got 0"), ({"batch": 0}, "batch: at least 1"),
    ({"stop": 0.0}, "stop: a risk between 0 and 1"), ({"stop": 1}, "stop: a risk"),
    ({"weighting": "x0_error"}, "weighting: one of uniform"), ({"correction": "prior"}, "correction: one of none, uncond"),
    ({"band": (2.0, -2.0)}, "log_snr: lo < hi"), ({"band": (90.0, 99.0)}, "no timestep lies in"),
    ({"t_range": (0.5, 0.5)}, "fractions of T"),
])  # fmt: skip
def test_wrong_settings_are_named(teacher, how, said):
    with pytest.raises(ValueError, match=said):
        DiffusionScorer(teacher, **how)


def test_a_weighting_without_bound_is_refused(teacher, monkeypatch):
    monkeypatch.setattr(teacher, "alphas_cumprod", torch.cat([teacher.alphas_cumprod[:-1], torch.zeros(1)]))
    with pytest.raises(ValueError, match="'inverse_snr_root' has no bound in the band"):
        DiffusionScorer(teacher, t_range=(0.3, 1.0), weighting="inverse_snr_root")
    DiffusionScorer(teacher, t_range=(0.3, 0.99), weighting="inverse_snr_root")


def test_a_missing_image_is_named(teacher):
    def missing():
        raise FileNotFoundError(2, "No such file or directory")

    item = Item("0", (ImageRef("gone.png", "rows.json: row 4", missing),), ("a", "b"))
    with pytest.raises(ConfigError, match="rows.json: row 4: gone.png: No such file"):
        DiffusionScorer(teacher).score_items([item])


def test_forecast_counts_passes_before_they_are_made(tmp_path, teacher):
    for name in ("w", "f"):
        (tmp_path / name).mkdir()
    suite = load_suite("winoground", *released.write("winoground", tmp_path / "w", 6))
    said = DiffusionScorer(teacher, steps=5).forecast(suite)
    assert said.startswith("winoground: 120 passes of the UNet, about 0:0") and said.endswith("on cpu")
    said = DiffusionScorer(teacher, steps=5, stop=0.01, correction="unconditional").forecast(suite)
    assert "at most 180 passes" in said
    suite = load_suite("flickr30k_retrieval", *released.write("flickr30k_retrieval", tmp_path / "f", 6))
    pairs = len(suite.items) * len(suite.texts)
    assert f" {pairs * 5:,} passes" in DiffusionScorer(teacher, steps=5, stop=0.01).forecast(suite)
    scorer = DiffusionScorer(teacher, steps=1, correction="unconditional")
    evaluate(suite, scorer)
    asked = scorer.passes
    assert f" {asked:,} passes" in scorer.forecast(suite)


def test_settings_are_what_scores_depend_on(teacher, folder):
    settings = DiffusionScorer(teacher, steps=4, stop=0.1).settings
    again = DiffusionScorer(Teacher.load(folder), steps=4, stop=0.1, batch=7).settings
    assert settings == again == json.loads(json.dumps(settings))
    others = ({"seed": 1}, {"correction": "unconditional"}, {"weighting": "snr"}, {"t_range": (0.2, 0.9)}, {"stop": None})
    assert all(DiffusionScorer(teacher, **{"steps": 4, "stop": 0.1} | other).settings != settings for other in others)


def test_a_vae_without_finite_latents_is_one_error(folder, tmp_path):
    broken = Teacher.load(folder)
    next(broken.vae.parameters()).data.fill_(torch.nan)
    suite = load_suite("winoground", *released.write("winoground", tmp_path, 2))
    with pytest.raises(ConfigError, match="scorer diffusion: teacher: the vae's latents of the first images are not finite"):
        evaluate(suite, DiffusionScorer(broken, steps=1))


@pytest.mark.parametrize("file, key, value", [
    ("vae/config.json", "scaling_factor", 0.13025), ("scheduler/scheduler_config.json", "beta_schedule", "squaredcos_cap_v2"),
])  # fmt: skip
def test_another_teacher_with_the_same_weights_has_other_settings(file, key, value, teacher, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = tmp_path / "other" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    ours, theirs = (DiffusionScorer(of, t_range=(0.0, 1.0)).settings for of in (teacher, Teacher.load(tmp_path / "other")))
    del ours["log_snr"], theirs["log_snr"]  # whose ends may be the same
    assert ours != theirs


def test_evaluation_goes_on_where_it_was_stopped(tmp_path, teacher):
    """The same rows, with `stop` as well: what an item scores depends on it alone."""
    (tmp_path / "w").mkdir()
    suite = load_suite("winoground", *released.write("winoground", tmp_path / "w", 9))
    ask = lambda: DiffusionScorer(teacher, steps=8, batch=2, stop=0.3)  # noqa: E731
    whole = evaluate(suite, ask(), tmp_path / "whole")
    cut = tmp_path / "cut"
    evaluate(suite, ask(), cut)
    rows = (cut / "items.jsonl").read_text().splitlines(keepends=True)
    (cut / "items.jsonl").write_text("".join(rows[:5]) + rows[5][:20])
    result = json.loads((cut / "result.json").read_text())
    (cut / "result.json").unlink()
    (cut / "started.json").write_text(json.dumps({key: result[key] for key in ("suite", "fingerprint", "scorer")}))
    assert evaluate(suite, ask(), cut).rows == whole.rows


# The curve of what is traded.


def test_what_stopping_trades(tmp_path, teacher, monkeypatch):
    """Replayed from one set of terms: the passes and the scores are those of scorers that stop."""
    (tmp_path / "w").mkdir()
    suite = load_suite("winoground", *released.write("winoground", tmp_path / "w", 9))
    monkeypatch.setattr(stopping, "STEPS", (2, 8))
    rows = stopping.measure(tmp_path / "out", teacher, suite, "the command")
    own = {(r["draws"], r["rule"], r["value"]): r for r in rows if tuple(r["chosen"]) == ("captions", "images")}
    full = DiffusionScorer(teacher, steps=8)
    scores = np.stack(full.score_items(suite.items))
    assert own[8, "all", None]["passes"] == full.passes == 9 * 4 * 8 and own[8, "all", None]["changed"] == 0
    for risk in (0.5, 0.2):
        scorer = DiffusionScorer(teacher, steps=8, stop=risk)
        found = np.stack(scorer.score_items(suite.items))
        changed = sum((np.sign(np.diff(found, axis=k)) != np.sign(np.diff(scores, axis=k))).sum() for k in (1, 2))
        row = own[8, "stop", risk]
        assert (row["passes"], row["changed"], row["choices"]) == (scorer.passes, changed, 9 * 4)
        assert row["saved"] == 1 - scorer.passes / full.passes
        assert row["text"] == 100 * winoground(found).text.mean()
    corrected = DiffusionScorer(teacher, steps=8, correction="unconditional")
    found = np.stack(corrected.score_items(suite.items))
    row = own[8, "corrected", None]
    assert row["passes"] == corrected.passes and row["image"] == 100 * winoground(found).image.mean()
    assert row["changed"] == (np.sign(np.diff(found, axis=2)) != np.sign(np.diff(scores, axis=2))).sum() > 0
    first = own[8, "first", 4]
    terms = np.stack(full.terms(suite.items))
    assert first["saved"] == 0.5
    assert first["group"] == 100 * winoground(terms[:, :4].mean(axis=1)).group.mean()
    assert [json.loads(line)["passes"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()] == [
        row["passes"] for row in rows
    ]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("`the command`, commit") and "| 8 | stop 0.5 |" in table and "| 8 | 288 |" in table
    (tmp_path / "f").mkdir()
    gallery = load_suite("flickr30k_retrieval", *released.write("flickr30k_retrieval", tmp_path / "f", 3))
    with pytest.raises(ConfigError, match="a gallery, of which nothing is dropped"):
        stopping.measure(tmp_path / "none", teacher, gallery, "")


def test_a_mistake_to_the_curve_is_one_line(tmp_path, capsys):
    assert stopping.main([str(tmp_path / "out"), "--suite", "wynoground"]) == 2
    assert "error: suite 'wynoground': expected one of" in capsys.readouterr().err and not (tmp_path / "out").exists()
