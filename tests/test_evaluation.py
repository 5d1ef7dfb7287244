"""Winoground's inequalities, retrieval, the diffusion score and the world's suite."""

import math

import numpy as np
import pytest
import tiny
import torch

from fastsds.config import ConfigError
from fastsds.data import Samples, SwapItems
from fastsds.evaluation import world_suite
from fastsds.evaluation.diffusion_score import diffusion_scores
from fastsds.evaluation.retrieval import evaluate_retrieval, recall_at_1
from fastsds.evaluation.winoground import CHANCE, evaluate_swaps, swap_accuracy, winoground
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


# Features that can be read off: the caption is a number, the image is its first pixel.


def angle(values):
    values = torch.as_tensor(values, dtype=torch.float64) / 256 * math.pi / 2
    return torch.stack([values.cos(), values.sin()], dim=1)


def encode(pixels, captions):
    assert len(pixels) == len(captions)
    return angle(pixels[:, 0, 0, 0]), angle([float(c) for c in captions])


def numbered(pairs, kinds):
    pixels = torch.zeros(len(pairs), 2, 3, 4, 4, dtype=torch.uint8)
    pixels[:, :, 0, 0, 0] = torch.tensor([p[:2] for p in pairs])
    return SwapItems(pixels, [(str(p[2]), str(p[3])) for p in pairs], kinds, "seen")


def test_scores_are_caption_times_image_whatever_the_chunk():
    items = numbered([(10, 200, 20, 180), (200, 10, 20, 180), (10, 20, 100, 250)], ["object", "colour", "shape"])
    s = evaluate_swaps(encode, items, chunk=2)
    for n in range(3):
        for c in range(2):
            for i in range(2):
                gap = (float(items.captions[n][c]) - float(items.pixels[n, i, 0, 0, 0])) / 256 * math.pi / 2
                assert s[n, c, i] == pytest.approx(math.cos(gap), abs=1e-12)
    assert np.array_equal(s, evaluate_swaps(encode, items, chunk=128))
    assert winoground(s).text.tolist() == [True, False, False]
    assert swap_accuracy(s).tolist() == [1.0, 0.0, 0.5]


def test_recall():
    s = np.array([[3.0, 1.0, 3.0], [0.0, 2.0, 1.0], [0.0, 0.0, 5.0]])
    image_of_caption, caption_of_image = recall_at_1(s)
    assert image_of_caption.tolist() == [False, True, True]  # the first caption ties: wrong
    assert caption_of_image.tolist() == [True, True, True]
    image_of_caption, caption_of_image = recall_at_1(s.T)
    assert image_of_caption.tolist() == [True, True, True] and caption_of_image.tolist() == [False, True, True]
    assert not np.any(recall_at_1(np.zeros((4, 4))))
    with pytest.raises(ValueError, match=r"\[n, n\]"):
        recall_at_1(np.zeros((2, 3)))


def test_retrieval_of_a_gallery():
    pixels = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor([0, 40, 80, 120, 160, 200])
    right = Samples(pixels, ["1", "41", "81", "121", "161", "201"])
    assert np.all(evaluate_retrieval(encode, right, chunk=4))
    exchanged = Samples(pixels, ["41", "1", "81", "121", "161", "201"])
    assert [x.tolist() for x in evaluate_retrieval(encode, exchanged)] == [[False] * 2 + [True] * 4] * 2


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


def constant(pixels, captions):
    ones = torch.ones(len(pixels), 3)
    return ones, ones


def test_suite_of_a_model_that_sees_nothing():
    """All ties, so everything is wrong; and every metric and row is there."""
    metrics, rows = world_suite.evaluate(constant, "world_dev", items=4)
    assert metrics == {f"{split}/{name}": 0.0 for split in ("seen", "dev") for name in world_suite.NAMES}
    assert len(rows) == 2 * 3 * 4
    assert set(rows[0]) == {"split", "kind", "id", "s00", "s01", "s10", "s11"}
    assert {r["kind"] for r in rows} == set(world_suite.KINDS)
    assert [r["id"] for r in rows if r["split"] == "dev"] == list(range(12))


def test_rows_give_the_metrics_back():
    generator = torch.Generator().manual_seed(0)

    def random(pixels, captions):
        return torch.randn(len(pixels), 5, generator=generator), torch.randn(len(pixels), 5, generator=generator)

    metrics, rows = world_suite.evaluate(random, "world_test", items=30)
    for split in ("seen", "test"):
        again = world_suite.swap_metrics(*world_suite.scores_of(rows, split))
        assert again == {k: metrics[f"{split}/{k}"] for k in again} and len(again) == 7
        assert 25 < metrics[f"{split}/swap"] < 75 and metrics[f"{split}/retrieval"] < 5


def test_dev_and_test_share_no_content_and_no_scene():
    """Combinations: a colour pair and a shape pair."""

    def combinations(suite, split):
        words = [c.replace(" is ", " ").split() for pair in world_suite.swaps(suite, split, 100).captions for c in pair]
        colours = set("red green blue yellow purple cyan orange white".split())
        shapes = set("circle square triangle diamond cross ring".split())
        return {(frozenset(w) & colours, frozenset(w) & shapes) for w in map(frozenset, words)}

    seen, dev, test = combinations("world_dev", "seen"), combinations("world_dev", "dev"), combinations("world_test", "test")
    assert len(dev) == len(test) == 42 and not dev & test and not (dev | test) & seen
    assert combinations("world_test", "seen") & (dev | test) == set()
    images = {s: world_suite.swaps(s, "seen", 20).pixels.flatten(0, 1).flatten(1) for s in world_suite.SUITES}
    a, b = ({row.numpy().tobytes() for row in x} for x in images.values())
    assert len(a) == len(b) == 120 and not a & b


def test_swap_items_hold_the_same_words():
    items = world_suite.swaps("world_dev", "dev", 50)
    for first, second in items.captions:
        assert first != second and sorted(first.split()) == sorted(second.split())


def test_unknown_suite():
    with pytest.raises(ConfigError, match="world_dev, world_test"):
        world_suite.evaluate(constant, "world", items=2)


def test_a_student_through_its_encoder(tmp_path):
    from fastsds.student import load_student

    student = load_student(tiny.save_student(tmp_path)).eval()
    answer = world_suite.encoder(student, student.tokenize)
    captions = tiny.captions(4)
    image, text = answer(tiny.pixels(4), captions)
    assert image.shape == text.shape == (4, 12)
    assert torch.allclose(image.norm(dim=1), torch.ones(4)) and torch.allclose(text.norm(dim=1), torch.ones(4))


def test_retrieval_is_the_mean_of_both_directions():
    """Of a model whose two features are one: everything is found."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    same = lambda pixels, captions: (unit(torch.randn(len(pixels), 4, generator=generator)),) * 2  # noqa: E731
    found = world_suite.retrieve(same, "world_dev", "dev")
    assert found.shape == (world_suite.GALLERIES * world_suite.CANDIDATES,) and found.all()  # image and text agree
    galleries = [world_suite.gallery("world_dev", "dev", k) for k in range(world_suite.GALLERIES)]
    assert all(len(set(g.captions)) == len(g) == world_suite.CANDIDATES for g in galleries)
    assert not torch.equal(galleries[0].pixels, galleries[1].pixels)


def test_first_of_each_kind():
    items = numbered([(k, k, k, k) for k in range(6)], ["object", "object", "object", "colour", "colour", "shape"])
    part = world_suite.first_of_each_kind(items, 2)
    assert part.kind == ["object", "object", "colour", "colour", "shape"]
    assert [c[0] for c in part.captions] == ["0", "1", "3", "4", "5"] == [str(int(p[0, 0, 0, 0])) for p in part.pixels]
