"""Scoring of every suite against another way to the same number; chance; rows; the loaders' common surface."""

import json
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import released
import torch

from fastsds.config import ConfigError
from fastsds.evaluation.choice import choose, stacked
from fastsds.evaluation.measures import Metric, by_value, over_groups, over_items
from fastsds.evaluation.prompts import pool_features, pool_scores
from fastsds.evaluation.retrieval import places
from fastsds.evaluation.suite import Composed, clip_benchmark, load_suite, pixels, suite_names
from fastsds.evaluation.suites import aro, mmvp, order, sugarcrepe
from fastsds.evaluation.winoground import tied

N = 1000


def with_ties(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 3, (N, *shape)).astype(float)


# Scoring, on 1,000 random matrices with ties.


def test_choice_is_the_references_argmax():
    """ARO: argmax over [false, true] in VG-R/A, over [true, ...] in the Order sets; SugarCrepe: positive > negative."""
    first_of = lambda scores: scores.index(max(scores))  # noqa: E731  numpy's argmax: the first of equals
    pairs = with_ties(2, 1)
    right, level = choose(pairs)
    assert right.tolist() == [first_of([false, true]) == 1 for (true,), (false,) in pairs.tolist()]
    assert right.tolist() == [positive > negative for (positive,), (negative,) in pairs.tolist()]
    assert level.tolist() == [true == false for (true,), (false,) in pairs.tolist()] and 200 < level.sum() < 450
    fives = with_ties(5, 1, seed=1)
    found = order._judge(fives)
    assert found["accuracy"].tolist() == [first_of([x for (x,) in five]) == 0 for five in fives.tolist()]
    alone = [sum(x >= five[0][0] for (x,) in five) == 1 for five in fives.tolist()]
    assert found["accuracy_strict"].tolist() == alone
    assert found["tied"].sum() == found["accuracy"].sum() - found["accuracy_strict"].sum() > 100
    assert aro._judge(pairs)["accuracy"].tolist() == sugarcrepe._judge(pairs)["accuracy"].tolist() == right.tolist()


def test_winoground_ties_are_those_of_its_comparisons():
    scores = with_ties(2, 2, seed=10)
    a_tie = [a == b or c == d or a == c or b == d for (a, b), (c, d) in scores.tolist()]
    assert tied(scores).tolist() == a_tie and 0 < sum(a_tie) < N
    assert not tied([[[1.0, 2.0], [3.0, 1.0]]]).any()  # the two right pairs are not compared with one another


def test_mmvp_is_what_the_reference_script_says():
    """It takes a softmax over the two images, says img1 where that is above a half and img2 elsewhere, and asks for both."""
    scores, expected = with_ties(2, 2), []
    for (s00, s01), (s10, s11) in scores.tolist():
        said = ["img1" if math.exp(a) / (math.exp(a) + math.exp(b)) > 0.5 else "img2" for a, b in ((s00, s01), (s10, s11))]
        expected.append(said == ["img1", "img2"])
    found = mmvp.judge(scores)
    assert found["pair"].tolist() == expected
    assert found["pair_strict"].tolist() == [a[0] > a[1] and b[1] > b[0] for a, b in scores.tolist()]
    assert found["tied"].tolist() == [a[0] == a[1] or b[0] == b[1] for a, b in scores.tolist()]
    assert 50 < found["pair"].sum() - found["pair_strict"].sum()


def test_places_are_those_of_a_sort():
    """1,000 queries, 12 candidates of 4 labels: a stable sort for the order of the list, and one that puts strangers first."""
    generator = np.random.default_rng(2)
    scores, own = generator.integers(0, 4, (N, 12)).astype(float), generator.integers(0, 4, N)
    labels = np.array([0, 1, 2, 3, 3, 3, 2, 0, 1, 1, 0, 2])
    found = places(scores, own, labels, chunk=77)
    for k in (1, 5, 10):
        for q in range(N):
            row, mine = scores[q].tolist(), (labels == own[q]).tolist()
            listed = sorted(range(12), key=lambda c, row=row: -row[c])  # stable
            worst = sorted(range(12), key=lambda c, row=row, mine=mine: (-row[c], mine[c]))
            assert found.found(k)[q] == any(mine[c] for c in listed[:k])
            assert found.found_strictly(k)[q] == any(mine[c] for c in worst[:k])
    assert (found.level > 0).mean() > 0.3 and (found.before < found.level).any() and (found.before > 0).any()
    assert all(np.array_equal(a, b) for a, b in zip(found, places(scores, own, labels), strict=True))


def test_classes_are_the_first_of_a_sort(tmp_path):
    """1,000 images of 7 classes: argmax, which takes the first of equals, and the first five of a stable sort."""
    suite = load_suite("zeroshot", *released.write("zeroshot", tmp_path, N))
    scores = with_ties(7, seed=11).T  # [classes, images]
    found, labels = suite.outcomes(scores), [item.about["label"] for item in suite.items]
    for k, label in enumerate(labels):
        row = scores[:, k].tolist()
        listed = sorted(range(7), key=lambda c, row=row: -row[c])
        above, level = (sum(row[c] > row[label] for c in range(7)), sum(row[c] == row[label] for c in range(7)) - 1)
        assert found["top1"][k] == (row.index(max(row)) == label) == (listed[0] == label)
        assert found["top5"][k] == (label in listed[:5]) and found["tied"][k] == (level > 0)
        assert found["top1_strict"][k] == (above + level < 1) and found["top5_strict"][k] == (above + level < 5)
    assert found["top1"].sum() > found["top1_strict"].sum() > 20 and found["top5"].sum() > found["top5_strict"].sum()


def test_places_refuse_what_has_no_place():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) expected, got \(3, 2\)"):
        places(np.zeros((3, 2)), [0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="query 1 has no candidate"):
        places(np.zeros((2, 3)), [0, 7], [0, 1, 1])
    with pytest.raises(ValueError, match="NaN in row 1"):
        places(np.array([[0.0, 1.0], [math.nan, 0.0]]), [0, 1], [0, 1], chunk=1)


def test_scores_may_be_lists_arrays_or_tensors():
    scores = with_ties(3, 1)[:5]
    same = [stacked(x, 3, 1) for x in (scores, torch.tensor(scores), list(scores), list(torch.tensor(scores)), scores.tolist())]
    assert all(x.dtype == np.float64 and np.array_equal(x, scores) for x in same)
    assert stacked(torch.tensor(scores, dtype=torch.bfloat16), 3, 1).tolist() == scores.tolist()
    with pytest.raises(ValueError, match=r"item 0 has shape \(2, 1\), item 1 \(3, 1\)"):
        stacked([np.zeros((2, 1)), np.zeros((3, 1))], None, 1)
    with pytest.raises(ValueError, match="NaN in item 2"):
        choose(np.where(np.arange(5)[:, None, None] == 2, math.nan, scores))
    with pytest.raises(ValueError, match="3 captions, 1 images"):
        stacked(scores[:, :2], 3, 1)


def test_metrics_are_exact_means():
    generator = np.random.default_rng(3)
    outcome, labels = generator.random(N) < 0.6, [None if x == 4 else "abcd"[x] for x in generator.integers(0, 5, N)]
    groups = {label: [bool(o) for o, of in zip(outcome, labels, strict=True) if of == label] for label in "abcd"}
    (macro,) = over_groups("x", labels, 50.0).values()
    by_hand = sum(Fraction(sum(g), len(g)) for g in groups.values()) / 4 * 100
    assert macro.value(outcome) == pytest.approx(float(by_hand), rel=1e-14) and macro.n == sum(map(len, groups.values()))
    (micro,) = over_items("x", [label is not None for label in labels], 50.0).values()
    assert micro.value(outcome) == 100 * (sum(map(sum, groups.values())) / micro.n)
    kinds = by_value("x", "kind", [[] if label is None else [label, "any"] for label in labels], 50.0)
    assert list(kinds) == [f"x/kind={k}" for k in ("a", "any", "b", "c", "d")]
    assert kinds["x/kind=any"].value(outcome) == micro.value(outcome)
    assert kinds["x/kind=c"].value(outcome) == 100 * (sum(groups["c"]) / len(groups["c"]))
    for metric in (macro, micro, kinds["x/kind=b"]):
        weights = metric.weights()
        assert weights.sum() == pytest.approx(1) and 100 * (weights @ outcome) == pytest.approx(metric.value(outcome))
    assert Metric("x", np.array([0, 0, 0]), 0.0).value(np.array([0.5, 1.0, 0.0])) == 50.0


def test_phrasings_are_averaged():
    features, sizes = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [3, 1, 3]
    pooled, first = pool_features(features, sizes), 0
    for k, size in enumerate(sizes):
        units = [[x / math.hypot(*row) for x in row] for row in features[first : first + size].tolist()]
        mean = [sum(column) / size for column in zip(*units, strict=True)]
        assert pooled[k].tolist() == pytest.approx([x / math.hypot(*mean) for x in mean], abs=1e-12)
        expected = [sum(column) / size for column in zip(*features[first : first + size].tolist(), strict=True)]
        assert pool_scores(features, sizes)[k].tolist() == pytest.approx(expected, abs=1e-12)
        first += size
    for wrong in ([3, 3], [7, 0]):
        with pytest.raises(ValueError, match="7 phrasings"):
            pool_scores(features, wrong)


# Every suite, from small files in the released formats.


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """Every suite under the name it is loaded by."""
    return {name: load_suite(name, *released.write(name, tmp_path_factory.mktemp(name))) for name in suite_names()}


def shape(suite):
    """The shape of a suite's scores."""
    if suite.gallery:
        return len(suite.texts), len(suite.items)
    return len(suite.items), len(suite.items[0].captions), len(suite.items[0].images)


def asked(suite):
    """The suites that are asked under one name."""
    return suite.parts if isinstance(suite, Composed) else [suite]


def drawn(suite, draw):
    """Scores for a suite. draw: a shape -> scores."""
    found = [draw(shape(part)) / 3 for part in asked(suite)]  # whole numbers: not exact in binary, and with ties
    return found if isinstance(suite, Composed) else found[0]


def test_there_is_a_released_format_for_every_suite(suites):
    known = "winoground vg_relation vg_attribution coco_order flickr30k_order sugarcrepe mmvp zeroshot cifar10 cifar100"
    more = {"coco_retrieval", "flickr30k_retrieval", "world_dev", "world_test"}
    assert set(suites) == set(suite_names()) == {*known.split(), *more}


def test_every_suite_has_one_surface(suites):
    for name, suite in suites.items():
        items = [item for part in asked(suite) for item in part.items]
        assert suite.name == name and len({item.id for item in items}) == len(items)
        scores = drawn(suite, partial(np.random.default_rng(4).integers, 0, 3))
        outcomes = suite.outcomes(scores)
        assert suite.size == len(suite.rows(scores))
        metrics = suite.metrics(outcomes)
        assert set(metrics) == set(suite.chance) == set(suite.summary) >= set(suite.headline) != set()
        assert all(0 <= value <= 100 for value in metrics.values()) and all(suite.summary.values())
        assert suite.ties(outcomes) == sum(int(v.sum()) for k, v in outcomes.items() if "tied" in k) > 0
        assert all(values.dtype == bool or set(values) <= {0, 0.5, 1} for values in outcomes.values())
        assert pixels(items[-1].images[-1], 4).shape == (3, 4, 4)
        for part in asked(suite):
            assert part.gallery or len({(len(i.captions), len(i.images)) for i in part.items}) == 1


def test_one_driver_serves_all(suites):
    """A scorer that is told the answer is right everywhere; one that is told the opposite, nowhere."""

    def answer(part, sign):
        if part.gallery:
            (query,) = (q for q in part.queries if q.asks in ("image", "pair"))
            return sign * (query.labels[:, None] == query.own).astype(float)  # [texts, images]
        scores = np.zeros(shape(part))
        scores[:, 0, 0] = sign
        if len(part.items[0].images) == 2:
            scores[:, 1, 1] = sign
        return scores

    for suite in suites.values():
        answers = [[answer(part, sign) for part in asked(suite)] for sign in (1, -1)]
        right, wrong = (suite.metrics(suite.outcomes(a if isinstance(suite, Composed) else a[0])) for a in answers)
        assert set(right.values()) == {100.0}
        assert {name: v for name, v in wrong.items() if v and not name.endswith(("@5", "@10")) and "top5" not in name} == {}


def test_kept_rows_give_the_metrics_back(suites):
    for suite in suites.values():
        scores = drawn(suite, partial(np.random.default_rng(5).integers, 0, 4))
        outcomes = suite.outcomes(scores)
        rows = [json.loads(json.dumps(row)) for row in suite.rows(scores)]
        again = suite.outcomes_of(rows)
        assert suite.metrics(again) == suite.metrics(outcomes) and suite.ties(again) == suite.ties(outcomes)
        if not suite.gallery and not isinstance(suite, Composed):
            assert [row["id"] for row in rows] == [item.id for item in suite.items]
            assert [row["about"] for row in rows] == [item.about for item in suite.items]
            assert all([row["outcomes"][k] for row in rows] == v.tolist() for k, v in outcomes.items())
            assert np.array_equal([row["scores"] for row in rows], scores)
        last = asked(suite)[-1].name
        with pytest.raises(ValueError, match=f"of {last} expected"):
            suite.outcomes_of(rows[:-1])
        with pytest.raises(ValueError, match="number 0"):
            suite.outcomes_of([{**rows[0], "id": "else"}, *rows[1:]])


def test_wrong_scores_are_named(suites):
    with pytest.raises(ValueError, match="2 captions, 2 images"):
        suites["winoground"].outcomes(np.zeros((5, 2, 1)))
    with pytest.raises(ValueError, match="items in vg_relation, got 1"):
        suites["vg_relation"].outcomes(np.zeros((1, 2, 1)))
    with pytest.raises(ValueError, match=r"\[texts, images\] expected"):
        suites["coco_retrieval"].outcomes(np.zeros((2, 2)))


@pytest.mark.parametrize("name", suite_names())
def test_chance(name, tmp_path):
    """Random scores without ties reach what `chance` says, within three standard errors, at every metric."""
    suite = load_suite(name, *released.write(name, tmp_path, 150))
    generator = np.random.default_rng(6)
    draws = [suite.metrics(suite.outcomes(drawn(suite, generator.random))) for _ in range(40)]
    for metric, chance in suite.chance.items():
        weights, p = suite.measures[metric].weights(), chance / 100
        error = 100 * math.sqrt((weights**2).sum() * p * (1 - p) / len(draws))
        assert abs(np.mean([draw[metric] for draw in draws]) - chance) <= 3 * error + 1e-9, metric


def test_winoground_by_tag_is_counted_by_hand(tmp_path):
    suite = load_suite("winoground", *released.write("winoground", tmp_path, 200))
    scores = with_ties(2, 2, seed=7)[:200]
    metrics = suite.metrics(suite.outcomes(scores))
    for key, value in (("collapsed_tag", "Both"), ("num_main_preds", 2), ("secondary_tag", "Series")):
        of = [k for k, item in enumerate(suite.items)
              if item.about[key] == value or isinstance(item.about[key], list) and value in item.about[key]]  # fmt: skip
        text = [scores[k][0][0] > scores[k][1][0] and scores[k][1][1] > scores[k][0][1] for k in of]
        assert 0 < len(of) < 200 and metrics[f"text/{key}={value}"] == 100 * (sum(text) / len(of))
        assert suite.summary[f"group/{key}={value}"] == len(of)


def test_classes_are_averaged_over_images_and_over_classes(tmp_path):
    suite = load_suite("zeroshot", *released.write("zeroshot", tmp_path))
    scores = np.random.default_rng(8).integers(0, 4, shape(suite)).astype(float)
    metrics = suite.metrics(suite.outcomes(scores))
    said = [max(range(len(suite.texts)), key=lambda c, i=i: (scores[c, i], -c)) for i in range(len(suite.items))]
    right = {}
    for item, answer in zip(suite.items, said, strict=True):
        right.setdefault(item.about["label"], []).append(answer == item.about["label"])
    assert len({len(of) for of in right.values()}) > 1  # else both means are one
    assert metrics["top1"] == 100 * (sum(map(sum, right.values())) / len(said))
    by_hand = 100 * sum(Fraction(sum(of), len(of)) for of in right.values()) / len(right)
    assert metrics["top1/macro"] == pytest.approx(float(by_hand), rel=1e-14) != metrics["top1"]


# What is emitted, and what is refused.


def test_results_in_clip_benchmarks_shape(suites):
    emitted = {}
    for name, suite in suites.items():
        metrics = suite.metrics(suite.outcomes(drawn(suite, np.random.default_rng(9).random)))
        emitted[name] = clip_benchmark(suite, metrics, "ViT-B-32", "openai")
        for one in emitted[name]:
            assert list(one) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
            assert json.loads(json.dumps(one)) == one and all(0 <= value <= 1 for value in one["metrics"].values())
        if name == "winoground":
            (one,) = emitted[name]
            assert one["task"] == "image_caption_selection" and one["language"] == "en"
            assert one["metrics"] == {
                "image_acc": metrics["image"] / 100, "text_acc": metrics["text"] / 100, "acc": metrics["group"] / 100,
            }  # fmt: skip
    assert [one["dataset"] for one in emitted["sugarcrepe"]][:2] == ["sugar_crepe/add_att", "sugar_crepe/add_obj"]
    assert len(emitted["sugarcrepe"]) == 7
    (coco,) = emitted["coco_retrieval"]
    assert coco["dataset"] == "mscoco_captions" and "image_retrieval_recall@5" in coco["metrics"]
    assert set(emitted["cifar10"][0]["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert emitted["vg_relation"][0]["metrics"]["accuracy/macro"] >= 0


def test_unknown_names_and_options(tmp_path):
    with pytest.raises(ConfigError, match="suite 'vg_relations': expected one of .*; nearest: vg_relation"):
        load_suite("vg_relations", tmp_path)
    with pytest.raises(ConfigError, match="suite 'q': expected one of .*zeroshot$"):
        load_suite("q", tmp_path)
    with pytest.raises(ConfigError, match="suite mmvp: unknown option 'split', expected one of items"):
        load_suite("mmvp", tmp_path, split="test")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load_suite("winoground", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="suite winoground: expected the path of its data"):
        load_suite("winoground")
    with pytest.raises(ConfigError, match="suite world_dev: made here, of no data"):
        load_suite("world_dev", tmp_path)
