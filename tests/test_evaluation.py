"""Winoground's inequalities, retrieval, the diffusion score and the world's suite."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from fastsds.data import SwapItems
from fastsds.evaluation.diffusion_score import diffusion_scores
from fastsds.evaluation.run import evaluate
from fastsds.evaluation.suite import load_suite, pixels
from fastsds.evaluation.suites import world
from fastsds.evaluation.winoground import CHANCE, swap_accuracy, winoground
from fastsds.teacher import Teacher


def by_hand(s):
    """One item after another, word by word; s[c][i]."""
    text = s[0][0] > s[1][0] and s[1][1] > s[0][1]
    image = s[0][0] > s[0][1] and s[1][1] > s[1][0]
    choices = [max((0, 1), key=lambda c: s[c][i]) == i and s[0][i] != s[1][i] for i in (0, 1)]
    return text, image, text and image, sum(choices) / 2


def test_inequalities_are_strict_on_1000_matrices_with_ties():
    scores = np.random.default_rng(0).integers(0, 3, (1000, 2, 2)).astype(float)
    expected = [by_hand(s.tolist()) for s in scores]
    text, image, group = winoground(scores)
    got = list(zip(text.tolist(), image.tolist(), group.tolist(), swap_accuracy(scores).tolist(), strict=True))
    assert got == expected
    ties = (scores[:, 0, 0] == scores[:, 1, 0]) & (scores[:, 1, 1] == scores[:, 0, 1])
    assert ties.sum() > 50 and not text[ties].any() and not swap_accuracy(scores)[ties].any()
    assert 20 < sum(e[0] != e[1] for e in expected)  # text is not image


def test_text_asks_the_captions_and_image_the_images():
    # image 0 and image 1 both choose their caption, but caption 1 prefers image 0
    s = np.array([[[9.0, 1.0], [3.0, 2.0]]])
    assert winoground(s).text.item() and not winoground(s).image.item()
    transposed = winoground(s.transpose(0, 2, 1))
    assert transposed.image.item() and not transposed.text.item()
    assert swap_accuracy(s).item() == 1.0 and swap_accuracy(s.transpose(0, 2, 1)).item() == 0.5


def test_chance_levels():
    scores = np.random.default_rng(1).random((200_000, 2, 2))
    outcome = winoground(scores)
    for name in ("text", "image", "group"):
        assert 100 * getattr(outcome, name).mean() == pytest.approx(CHANCE[name], abs=0.4)
    assert 100 * swap_accuracy(scores).mean() == pytest.approx(CHANCE["swap"], abs=0.4)
    assert CHANCE["group"] == pytest.approx(16.67, abs=0.01)


def test_scores_take_tensors_and_refuse_what_is_no_score():
    s = torch.rand(5, 2, 2)
    assert (winoground(s).text == winoground(s.numpy()).text).all()
    with pytest.raises(ValueError, match="2 captions, 2 images"):
        winoground(s[0])
    s[3, 0, 1] = math.nan
    with pytest.raises(ValueError, match="NaN in item 3"):
        swap_accuracy(s)


# Items that can be read off: the caption is a number, the image is its first pixel.


def numbered(pairs, kinds):
    pixels = torch.zeros(len(pairs), 2, 3, 4, 4, dtype=torch.uint8)
    pixels[:, :, 0, 0, 0] = torch.tensor([p[:2] for p in pairs])
    return SwapItems(pixels, [(str(p[2]), str(p[3])) for p in pairs], kinds, "seen")


# The diffusion score.


class Oracle:
    """A teacher that knows the noise of pictures whose number is in the caption, and is off by `gap` for the others."""

    latent_shape, device, prediction_type = (2, 4, 4), torch.device("cpu"), "epsilon"
    alphas_cumprod = torch.linspace(0.999, 0.01, 100)
    asked, score, _answer = 0, Teacher.score, Teacher._answer

    def encode(self, pixels):
        return pixels[:, 0, 0, 0].float().view(-1, 1, 1, 1).expand(-1, *self.latent_shape).clone()

    def embed(self, captions):
        return torch.tensor([float(c) for c in captions]).view(-1, 1, 1)

    def predict(self, z_t, t, text):
        self.asked += len(z_t)
        self.times = t
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        named = text.view(-1, 1, 1, 1)
        return (z_t - abar.sqrt() * named) / (1 - abar).sqrt()


def test_diffusion_score_follows_its_formula():
    items = numbered([(1, 2, 1, 2), (3, 5, 5, 3)], ["object", "object"])
    teacher = Oracle()
    s = diffusion_scores(teacher, items, draws=3, t_range=(0.5, 0.51), batch=4)
    assert teacher.asked == 2 * 4 * 3 and set(teacher.times.tolist()) == {50}
    abar = teacher.alphas_cumprod[50].double()
    snr = float(abar / (1 - abar))
    for n, (left, right, c0, c1) in enumerate([(1, 2, 1, 2), (3, 5, 5, 3)]):
        for c, said in enumerate((c0, c1)):
            for i, shown in enumerate((left, right)):
                assert s[n, c, i] == pytest.approx(-snr * (said - shown) ** 2, rel=1e-4, abs=1e-6)
    assert winoground(s).group.tolist() == [True, False]


def test_diffusion_score_of_given_latents():
    items = numbered([(1, 2, 1, 2)], ["object"])
    teacher = Oracle()
    z = teacher.encode(items.pixels.flatten(0, 1)).unflatten(0, (1, 2))
    assert np.array_equal(diffusion_scores(teacher, items, draws=2), diffusion_scores(teacher, items, draws=2, latents=z))
    flipped = diffusion_scores(teacher, items, draws=2, latents=z.flip(1))
    assert not winoground(flipped).text.any()
    with pytest.raises(ValueError, match="latents: shape"):
        diffusion_scores(teacher, items, latents=z[0])
    with pytest.raises(ValueError, match="at least 1"):
        diffusion_scores(teacher, items, draws=0)


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory):
    return Teacher.load(tiny.save_teacher(tmp_path_factory.mktemp("teacher")))


def test_noise_is_shared_within_an_item_and_independent_of_the_batch(tiny_teacher):
    captions = list(zip(tiny.captions(5, 1), tiny.captions(5, 2), strict=True))
    items = SwapItems(tiny.pixels(10).unflatten(0, (5, 2)), captions, ["object"] * 5, "x")
    whole = diffusion_scores(tiny_teacher, items, draws=2, batch=64)
    assert np.allclose(whole, diffusion_scores(tiny_teacher, items, draws=2, batch=8), rtol=1e-5, atol=1e-6)
    part = SwapItems(items.pixels[3:], captions[3:], ["object"] * 2, "x")
    assert np.allclose(whole[3:], diffusion_scores(tiny_teacher, part, draws=2, ids=torch.tensor([3, 4])), atol=1e-6)
    assert not np.allclose(whole[3:], diffusion_scores(tiny_teacher, part, draws=2), atol=1e-4)
    # equal captions and equal images score equally to the bit: only then are t and eps shared
    twin = SwapItems(items.pixels[:, :1].expand(-1, 2, -1, -1, -1), [(c, c) for c, _ in captions], ["object"] * 5, "x")
    s = diffusion_scores(tiny_teacher, twin, draws=2)
    assert np.ptp(s, axis=(1, 2)).max() < 1e-6 < np.ptp(s, axis=0).max()


def test_prediction_types_are_scored_as_noise():
    from fastsds.schedule import alpha_sigma

    class Velocity(Oracle):
        prediction_type = "v_prediction"

        def predict(self, z_t, t, text):
            eps = super().predict(z_t, t, text)
            alpha, sigma = alpha_sigma(self.alphas_cumprod, t, z_t)
            return alpha * eps - sigma * (z_t - sigma * eps) / alpha

    items = numbered([(1, 2, 1, 2), (3, 5, 5, 3)], ["object", "object"])
    as_noise = diffusion_scores(Oracle(), items, draws=2)
    assert np.allclose(diffusion_scores(Velocity(), items, draws=2), as_noise, rtol=1e-3, atol=1e-5)


# The world's suite.


class Told:
    """A scorer of features that `encode(pixels, captions)` gives."""

    name, settings, batch = "told", {}, 64

    def __init__(self, encode):
        self.encode = encode

    def encode_images(self, images):
        return self.encode(torch.stack([pixels(ref, 32) for ref in images]), [""] * len(images))[0]

    def encode_texts(self, texts):
        return self.encode(torch.zeros(len(texts), 3, 32, 32), texts)[1]


def constant(pixels, captions):
    ones = torch.ones(len(pixels), 3)
    return ones, ones


def test_suite_of_a_model_that_sees_nothing():
    """All ties, so everything is wrong; and every metric and row is there."""
    result = evaluate(load_suite("world_dev", items=4), Told(constant))
    assert result.metrics == {f"{split}/{name}": 0.0 for split in ("seen", "dev") for name in world.NAMES}
    swaps = [row for row in result.rows if "scores" in row]
    assert len(swaps) == 2 * 3 * 4 and len(result.rows) == len(swaps) + 2 * world.GALLERIES * world.CANDIDATES
    assert {row["about"]["kind"] for row in swaps} == set(world.KINDS)
    assert [row["id"] for row in swaps if row["about"]["split"] == "dev"] == [f"dev/{k}" for k in range(12)]
    assert result.ties == len(result.rows)


def test_metrics_of_the_world_are_counted_by_hand():
    """From the rows' scores alone, item by item, and from matrices of all pairs of a gallery."""
    generator = torch.Generator().manual_seed(0)

    def random(pixels, captions):
        return torch.randn(len(pixels), 5, generator=generator), torch.randn(len(pixels), 5, generator=generator)

    suite = load_suite("world_test", items=30)
    result = evaluate(suite, Told(random))
    for split in ("seen", "test"):
        rows = [row for row in result.rows if "scores" in row and row["about"]["split"] == split]
        found = {row["id"]: (row["about"]["kind"], by_hand(row["scores"])) for row in rows}
        assert len(found) == 90
        for k, name in enumerate(("text", "image", "group", "swap")):
            mean = np.mean([outcome[k] for _, outcome in found.values()])
            assert result.metrics[f"{split}/{name}"] == pytest.approx(100 * mean, rel=1e-12)
        for kind in world.KINDS:
            mean = np.mean([outcome[3] for of, outcome in found.values() if of == kind])
            assert result.metrics[f"{split}/swap_{kind}"] == pytest.approx(100 * mean, rel=1e-12)
        assert 25 < result.metrics[f"{split}/swap"] < 75 and result.metrics[f"{split}/retrieval"] < 5
        assert result.measures[f"{split}/retrieval"].n == 300 and result.measures[f"{split}/swap_shape"].n == 30


def test_a_pair_of_a_gallery_is_asked_both_ways():
    """1: the text finds its image and the image its text; 1/2: one of both; a tie for the first place is wrong."""
    gallery = next(part for part in load_suite("world_dev", items=1).parts if part.gallery)
    gallery.texts, gallery.items = gallery.texts[:3], gallery.items[:3]
    own = np.arange(3)
    gallery.queries = [replace(gallery.queries[0], own=own, labels=own, ids=gallery.queries[0].ids[:3])]
    s = np.array([[3.0, 1.0, 3.0], [0.0, 2.0, 1.0], [0.0, 0.0, 5.0]])  # the first text ties
    assert gallery.outcomes(s)["seen/retrieval"].tolist() == gallery.outcomes(s.T)["seen/retrieval"].tolist() == [0.5, 1.0, 1.0]
    assert gallery.outcomes(s)["tied/seen/retrieval"].tolist() == [True, False, False]
    assert gallery.outcomes(np.zeros((3, 3)))["seen/retrieval"].tolist() == [0.0] * 3
    rows = gallery.rows(s)
    assert rows[0]["places"] == [[0, 0], [1, 0], [0, 0]] and gallery.outcomes_of(rows)["seen/retrieval"].tolist() == [0.5, 1, 1]


def test_dev_and_test_share_no_content_and_no_scene():
    """Combinations: a colour pair and a shape pair."""

    def combinations(suite, split):
        words = [c.replace(" is ", " ").split() for pair in world.swaps(suite, split, 100).captions for c in pair]
        colours = set("red green blue yellow purple cyan orange white".split())
        shapes = set("circle square triangle diamond cross ring".split())
        return {(frozenset(w) & colours, frozenset(w) & shapes) for w in map(frozenset, words)}

    seen, dev, test = combinations("world_dev", "seen"), combinations("world_dev", "dev"), combinations("world_test", "test")
    assert len(dev) == len(test) == 42 and not dev & test and not (dev | test) & seen
    assert combinations("world_test", "seen") & (dev | test) == set()
    images = {s: world.swaps(s, "seen", 20).pixels.flatten(0, 1).flatten(1) for s in world.SUITES}
    a, b = ({row.numpy().tobytes() for row in x} for x in images.values())
    assert len(a) == len(b) == 120 and not a & b


def test_the_images_are_the_worlds_own():
    suite = load_suite("world_dev", items=2)
    swaps, gallery = suite.parts[0], suite.parts[2]
    assert torch.equal(pixels(swaps.items[3].images[1], 32), world.swaps("world_dev", "seen", 2).pixels[3, 1])
    samples = world.gallery("world_dev", "seen", 1)
    assert torch.equal(pixels(gallery.items[5].images[0], 32), samples.pixels[5]) and gallery.texts[5] == (samples.captions[5],)
    assert pixels(gallery.items[5].images[0], 48).shape == (3, 48, 48)
    refs = [ref for part in suite.parts for item in part.items for ref in item.images]
    assert len(set(refs)) == len(refs) == 2 * (2 * 6 + 300)


def test_galleries_hold_distinct_captions():
    galleries = [world.gallery("world_dev", "dev", k) for k in range(world.GALLERIES)]
    assert all(len(set(g.captions)) == len(g) == world.CANDIDATES for g in galleries)
    assert not torch.equal(galleries[0].pixels, galleries[1].pixels)


def test_swap_items_hold_the_same_words():
    items = world.swaps("world_dev", "dev", 50)
    for first, second in items.captions:
        assert first != second and sorted(first.split()) == sorted(second.split())


def test_first_of_each_kind():
    items = numbered([(k, k, k, k) for k in range(6)], ["object", "object", "object", "colour", "colour", "shape"])
    part = world.first_of_each_kind(items, 2)
    assert part.kind == ["object", "object", "colour", "colour", "shape"]
    assert [c[0] for c in part.captions] == ["0", "1", "3", "4", "5"] == [str(int(p[0, 0, 0, 0])) for p in part.pixels]
