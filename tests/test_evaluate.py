"""evaluate(): scorers and suites of all kinds, stopped and gone on with, on two ranks as on one (training: test_deepspeed)."""

import json
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import released
import tiny
import torch

from fastsds.config import ConfigError
from fastsds.data.images import decode_image
from fastsds.evaluation.prompts import pool_features
from fastsds.evaluation.results import ITEMS, load_result
from fastsds.evaluation.run import Similarity, evaluate
from fastsds.evaluation.scorer import ClipScorer
from fastsds.evaluation.suite import first_items, load_suite, pixels, suite_names
from fastsds.student import load_student

N = 30


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return load_student(tiny.save_student(tmp_path_factory.mktemp("student"))).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where each suite's small files lie."""
    return {name: released.write(name, tmp_path_factory.mktemp(name), N) for name in suite_names()}


def loaded(name, places):
    return load_suite(name, *places[name], items=4 if name.startswith("world") else None)


class Counting:
    """A scorer that counts its calls, and is stopped by Ctrl-C at one of them. kind: what it has beside `score`."""

    name, batch = "counting", 7

    def __init__(self, scorer, kind, stop=None):
        self.scorer, self.kind, self.stop, self.calls, self.settings = scorer, kind, stop, 0, {"kind": kind}
        if kind == "features":
            self.encode_images = lambda x: self._call(scorer.encode_images, x)
            self.encode_texts = lambda x: self._call(scorer.encode_texts, x)
        if kind == "items":
            self.score_items = lambda items: self._call(lambda: [scorer.score(i.images, i.captions) for i in items])

    def score(self, images, captions):
        assert self.kind != "items" or len(images) > 2
        return self._call(self.scorer.score, images, captions)

    def _call(self, ask, *args):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return ask(*args)


def by_hand(suite, student):
    """Scores of all pairs of a suite, one image and one text at a time, in float64."""
    image = lambda ref: student(pixels(ref, student.image_size)[None], None).image[0].double()  # noqa: E731
    text = lambda said: student(None, student.tokenize([said])).text[0].double()  # noqa: E731
    with torch.no_grad():
        if suite.gallery:
            images = torch.stack([image(item.images[0]) for item in suite.items])
            of = [pool_features(torch.stack([text(x) for x in phrasings]), [len(phrasings)]) for phrasings in suite.texts]
            return (torch.cat(of) @ images.T).numpy()
        found = []
        for item in suite.items:
            images, texts = torch.stack([image(x) for x in item.images]), torch.stack([text(x) for x in item.captions])
            found.append((texts @ images.T).numpy())
        return np.stack(found)


@pytest.mark.parametrize("name", ["winoground", "vg_relation", "sugarcrepe"])
def test_scores_are_those_of_one_pair_at_a_time(name, student, places):
    suite = loaded(name, places)
    result = evaluate(suite, ClipScorer(student, batch=7))
    expected = by_hand(suite, student)
    assert np.allclose([row["scores"] for row in result.rows], expected, rtol=0, atol=1e-6)
    assert [row["id"] for row in result.rows] == [item.id for item in suite.items]
    assert result.metrics == suite.metrics(suite.outcomes([row["scores"] for row in result.rows]))
    assert result.ties == suite.ties(result.outcomes)


@pytest.mark.parametrize("name", ["coco_retrieval", "zeroshot"])
def test_galleries_are_places_in_the_matrix_of_all_pairs(name, student, places, tmp_path):
    options = {}
    if name == "zeroshot":
        (tmp_path / "templates").write_text("a photo of a {}.\nred {}\nthe {} ring\n")
        options["templates"] = str(tmp_path / "templates")
    suite = load_suite(name, *places[name], **options)
    expected = suite.rows(by_hand(suite, student))
    for kind in ("features", "score"):
        result = evaluate(suite, Counting(ClipScorer(student), kind))
        if kind == "features" or name != "zeroshot":  # one averages features, the other scores
            assert result.rows == expected
    assert result.measures.keys() == suite.measures.keys() and suite.outcomes_of(result.rows).keys() == result.outcomes.keys()


def test_every_distinct_image_and_text_is_encoded_once(student, places):
    class Asked(ClipScorer):
        def __init__(self):
            super().__init__(student, batch=8)
            self.images, self.texts = [], []

        def encode_images(self, images):
            self.images.append(list(images))
            return super().encode_images(images)

        def encode_texts(self, texts):
            self.texts.append(list(texts))
            return super().encode_texts(texts)

    for name in ("sugarcrepe", "coco_order", "zeroshot", "winoground"):
        suite, scorer = loaded(name, places), Asked()
        evaluate(suite, scorer)
        images = {ref for item in suite.items for ref in item.images}
        texts = {x for of in (suite.texts if suite.gallery else [item.captions for item in suite.items]) for x in of}
        for asked, wanted in ((scorer.images, images), (scorer.texts, texts)):
            flat = [x for batch in asked for x in batch]
            assert len(flat) == len(set(flat)) and set(flat) == wanted
            assert {len(batch) for batch in asked[:-1]} <= {8} and not scorer._decoding


def test_equal_texts_and_images_tie_to_the_bit(student, places):
    """Also in other places of a matrix, where a product may be summed in another order."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, 512, generator=generator, dtype=torch.float64).numpy() for n in (40, 37))
    again = np.arange(3 * 37) % 37
    scores = Similarity(rows, columns, np.arange(40), again)
    assert scores.shape == (40, 111) and scores.T.shape == (111, 40)
    whole = np.concatenate([scores[0:11], scores[11:40]])
    assert np.array_equal(whole[:, :37], whole[:, 37:74]) and np.allclose(whole[:, :37], rows @ columns.T, rtol=0, atol=1e-12)
    assert np.allclose(scores.T[0:111], whole.T, rtol=0, atol=1e-12)
    suite = loaded("winoground", places)
    suite.items[3] = type(suite.items[3])("3", suite.items[3].images, (suite.items[3].captions[0],) * 2)
    for kind in ("features", "score", "items"):
        scores = evaluate(suite, Counting(ClipScorer(student), kind)).rows[3]["scores"]
        assert scores[0] == scores[1]


def test_an_open_image_is_rgb_and_cut(places):
    suite = loaded("vg_relation", places)
    ref = suite.items[0].images[0]
    image = ref.open()
    left, top, right, bottom = map(round, ref.box)
    assert image.mode == "RGB" and image.size == (right - left, bottom - top)
    with torch.no_grad():
        assert torch.equal(pixels(ref, 4), decode_image(as_png(image), [4])[0])


def as_png(image):
    from io import BytesIO

    with BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def test_autocast_is_its_own_setting_and_close(student, places):
    suite = loaded("winoground", places)
    plain, half = (evaluate(suite, ClipScorer(student, autocast=kind)) for kind in (None, torch.bfloat16))
    assert half.about["scorer"]["settings"]["autocast"] == "bfloat16" and plain.about["scorer"]["settings"]["autocast"] is None
    a, b = ([row["scores"] for row in result.rows] for result in (plain, half))
    assert 0 < np.abs(np.subtract(a, b)).max() < 2e-2


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suite_names())
def test_results_are_read_back_without_the_data(name, student, places, tmp_path):
    result = evaluate(loaded(name, places), ClipScorer(student), tmp_path / "out")
    back = load_result(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items.jsonl", "result.json"]
    assert back.suite == result.suite and back.rows == result.rows and back.headline == result.headline
    assert back.metrics == result.metrics and back.errors == result.errors and back.ties == result.ties
    assert all(np.array_equal(back.outcomes[k], v) and back.outcomes[k].dtype == v.dtype for k, v in result.outcomes.items())
    for metric, of in result.measures.items():
        assert np.array_equal(of.groups, back.measures[metric].groups)
        values = back.values(metric)
        assert len(values) == of.n and values.mean() == pytest.approx(result.metrics[metric], abs=1e-9)
    kept = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {"suite", "fingerprint", "scorer", "metrics", "notes", "ties", "commit", "versions", "machine"} <= kept.keys()
    assert kept["scorer"]["settings"]["weights"] and kept["notes"] == result.about["notes"]
    for value in kept["metrics"].values():
        assert {"value", "standard_error", "n", "chance", "outcome"} <= value.keys()


def test_standard_errors_of_means_and_of_macro_means(student, places):
    """Against the spread of the metric over resampled items."""
    result = evaluate(loaded("vg_relation", places), ClipScorer(student))
    x = result.outcomes["accuracy"].astype(float)
    assert result.errors["accuracy/all"] == pytest.approx(100 * x.std(ddof=1) / len(x) ** 0.5)
    generator, suite = np.random.default_rng(0), loaded("sugarcrepe", places)
    macro = suite.measures["accuracy/macro"]
    outcome = generator.random(len(suite.items)) < 0.7
    weights, mean = macro.weights(), macro.value(outcome) / 100
    draws = generator.integers(len(outcome), size=(20_000, len(outcome)))
    spread = ((weights * (outcome - mean))[draws].sum(axis=1)).std() * 100
    n = macro.n
    assert macro.error(outcome) == pytest.approx(spread * (n / (n - 1)) ** 0.5, rel=0.03)


def test_files_that_are_no_evaluation(student, places, tmp_path):
    with pytest.raises(ConfigError, match="no evaluation: no result.json"):
        load_result(tmp_path)
    evaluate(loaded("mmvp", places), ClipScorer(student), tmp_path / "out")
    whole = (tmp_path / "out" / ITEMS).read_text().splitlines(keepends=True)
    for content, words in (("".join(whole[:-1]), "not an evaluation's|by items.jsonl"), ("{}\n", "not an evaluation's"),
                           ("x", "not an evaluation's")):  # fmt: skip
        (tmp_path / "out" / ITEMS).write_text(content)
        with pytest.raises(ConfigError, match=words):
            load_result(tmp_path / "out")
    (tmp_path / "out" / ITEMS).write_text("".join(whole))
    result = tmp_path / "out" / "result.json"
    result.write_text(result.read_text().replace('"value":', '"valeu":'))
    with pytest.raises(ConfigError, match="not an evaluation's: KeyError 'value'"):
        load_result(tmp_path / "out")


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["features", "score", "items"])
@pytest.mark.parametrize("name", ["winoground", "coco_retrieval", "zeroshot", "world_dev"])
def test_what_was_stopped_goes_on_and_nothing_is_lost(name, kind, student, places, tmp_path):
    suite, scorer = loaded(name, places), ClipScorer(student)
    if name == "world_dev" and kind != "features":
        suite.parts = [part for k, part in enumerate(suite.parts) if k in (0, 1)]  # a matrix of pairs takes long
        suite.measures = {m: of for m, of in suite.measures.items() if m.startswith("seen") and m != "seen/retrieval"}
        suite.headline = ("seen/text",)
    whole = Counting(scorer, kind)
    evaluate(suite, whole, tmp_path / "whole")
    calls, stops = 0, [1, whole.calls // 3, whole.calls // 4, None]
    for stop in stops:
        one = Counting(scorer, kind, stop)
        if stop is None:
            result = evaluate(suite, one, tmp_path / "out")
        else:
            with pytest.raises(KeyboardInterrupt):
                evaluate(suite, one, tmp_path / "out")
            with pytest.raises(ConfigError, match="not finished"):
                load_result(tmp_path / "out")
            if (tmp_path / "out" / ITEMS).is_file():
                with open(tmp_path / "out" / ITEMS, "a") as file:
                    file.write('{"id": "cut o')
        calls += one.calls
    ours, theirs = (load_result(tmp_path / which) for which in ("out", "whole"))
    assert ours.rows == theirs.rows == result.rows and ours.metrics == theirs.metrics
    features_again = 4 * len(stops) if kind == "features" and not suite.gallery else 0  # batches that rows still need
    assert whole.calls <= calls <= whole.calls + features_again + len(stops)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items.jsonl", "result.json"]
    nobody = Counting(scorer, kind, 0)  # what is finished is read
    assert evaluate(suite, nobody, tmp_path / "out").metrics == ours.metrics


@pytest.mark.parametrize("name", ["winoground", "coco_retrieval"])
def test_rows_that_two_commands_wrote_at_once_are_one_error(name, student, places, tmp_path):
    """Each of them appended: what is there is counted neither twice nor in another's place."""
    suite, scorer = loaded(name, places), ClipScorer(student)
    evaluate(suite, scorer, tmp_path)
    lines = (tmp_path / ITEMS).read_text().splitlines(keepends=True)
    (tmp_path / ITEMS).write_text("".join(line * 2 for line in lines))
    with pytest.raises(ConfigError, match=r"in result.json, and [\d.]+ of \d+ by items.jsonl"):
        load_result(tmp_path)
    with pytest.raises(ConfigError, match="items.jsonl: row 2 is not the suite's"):
        evaluate(suite, scorer, tmp_path)
    (tmp_path / ITEMS).write_text("".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match=f"items.jsonl: row {len(lines) + 1} is not the suite's"):
        evaluate(suite, scorer, tmp_path)


def test_a_gallery_goes_on_with_another_batch(student, places, tmp_path):
    """What was kept of other batches is of other images and texts."""
    suite = loaded("coco_retrieval", places)
    expected = evaluate(suite, Counting(ClipScorer(student), "features")).rows
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite, Counting(ClipScorer(student), "features", 6), tmp_path)
    other = Counting(ClipScorer(student), "features")
    other.batch = 3
    assert evaluate(suite, other, tmp_path).rows == expected


def test_a_scorer_of_features_needs_no_batch(student, places):
    class Features:
        name, settings = "features", {}
        score = None

        def __init__(self):
            scorer = ClipScorer(student)
            self.encode_images, self.encode_texts = scorer.encode_images, scorer.encode_texts

    for name in ("winoground", "coco_retrieval"):
        suite = loaded(name, places)
        assert evaluate(suite, Features()).metrics == evaluate(suite, ClipScorer(student)).metrics


@pytest.mark.parametrize("settings", [{"dtype": torch.float16}, {"low": -np.inf}, {("a", 1): 2}, {"of": Path("x")}])
def test_settings_that_json_does_not_hold_are_one_error(settings, places, tmp_path):
    scorer = Given(lambda c, i: np.eye(2))
    scorer.settings = settings
    with pytest.raises(ConfigError, match="scorer given: its settings are .*; expected texts, finite numbers"):
        evaluate(loaded("winoground", places), scorer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_evaluation_in_the_folder_is_one_error(student, places, tmp_path):
    suite, scorer = loaded("winoground", places), ClipScorer(student)
    evaluate(suite, scorer, tmp_path / "done")
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite, Counting(scorer, "features", 3), tmp_path / "half")
    other = ClipScorer(student, autocast=torch.bfloat16)
    renamed = ClipScorer(student, "mine")
    for folder, asked, by, words in (
        ("done", loaded("mmvp", places), scorer, 'result.json is of another suite: "winoground", this one\'s is "mmvp"'),
        ("done", first_items(suite, 5), scorer, "result.json is of another suite"),
        ("done", suite, other, "result.json is of another scorer: .*null.*bfloat16"),
        ("done", suite, renamed, 'another scorer: .*"clip".*"mine"'),
        ("half", suite, scorer, "started.json is of another scorer"),
    ):
        before = (tmp_path / folder / ITEMS).read_text() if (tmp_path / folder / ITEMS).is_file() else None
        with pytest.raises(ConfigError, match=words):
            evaluate(asked, by, tmp_path / folder)
        assert before is None or (tmp_path / folder / ITEMS).read_text() == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ITEMS).write_text("mine\n")
    with pytest.raises(ConfigError, match="items.jsonl in it is of no known evaluation"):
        evaluate(suite, scorer, tmp_path / "foreign")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        evaluate(suite, scorer, tmp_path / "file")


def test_an_image_that_cannot_be_read_is_one_error_and_rows_before_it_stay(student, tmp_path):
    (path,) = released.write("winoground", tmp_path, N)
    bad = load_suite("winoground", path).items[20].images[1]
    Path(bad.name).write_bytes(b"no image")
    suite = load_suite("winoground", path)
    with pytest.raises(ConfigError, match="line 21: .*not a readable image"):
        evaluate(suite, ClipScorer(student, batch=4), tmp_path / "out")
    assert 10 <= len((tmp_path / "out" / ITEMS).read_text().splitlines()) <= 20


def test_where_it_takes_long_a_line_says_how_far_it_is(student, places, capfd, monkeypatch):
    from fastsds import progress

    monkeypatch.setattr(progress, "EVERY", 0.0)
    evaluate(loaded("winoground", places), ClipScorer(student, "tiny", batch=4))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("winoground, tiny: ")]
    assert len(lines) > 10 and "29 of 30" in lines[-1] and "left 0:0" in lines[-1]
    monkeypatch.setenv("RANK", "1")
    evaluate(loaded("winoground", places), ClipScorer(student, "tiny", batch=4))
    assert not capfd.readouterr().err


# -- a part of a suite -------------------------------------------------------------------------------------------------


def test_the_first_items_of_each_kind(places):
    whole, part = (load_suite("sugarcrepe", *places["sugarcrepe"], items=n) for n in (None, 2))
    of = [item.about["category"] for item in part.items]
    assert {of.count(category) for category in of} == {2} and len(set(of)) == 7
    assert [item for item in whole.items if item in part.items] == part.items
    assert "the first 2 items of each category" in part.notes[-1]
    assert part.summary["accuracy"] == part.summary["accuracy/macro"] == 14 and part.measures.keys() == whole.measures.keys()
    assert load_suite("winoground", *places["winoground"], items=5).summary["text"] == 5
    assert load_suite("winoground", *places["winoground"], items=500).notes == []
    retrieval = load_suite("coco_retrieval", *places["coco_retrieval"], items=6)
    assert len(retrieval.items) == 6 and retrieval.chance["image_retrieval_recall@1"] == pytest.approx(100 / 6)
    for name in ("zeroshot", "cifar10"):
        classes = load_suite(name, *places[name], items=1)
        labels = [item.about["label"] for item in classes.items]
        assert len(labels) == len(set(labels)) < N and len(classes.texts) == len(load_suite(name, *places[name]).texts)
    assert load_suite("world_dev", items=3).summary["dev/text"] == 9 and load_suite("world_dev").summary["seen/text"] == 900


# -- two ranks ---------------------------------------------------------------------------------------------------------


RANKED = [(n, kind) for n in ("winoground", "coco_retrieval", "zeroshot", "mmvp") for kind in ("features", "score", "items")]


def _rank_main(rank, student, places, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    said = {}
    for name, kind in RANKED:
        scorer = Counting(ClipScorer(student), kind)
        result = evaluate(loaded(name, places), scorer, folder / f"{name} {kind}")
        said[f"{name} {kind}"] = [scorer.calls, result.metrics]
    for stop in (2, None):  # both are stopped, both go on, from what rank 0 has
        scorer = Counting(ClipScorer(student), "features", stop)
        try:
            result = evaluate(loaded("coco_retrieval", places), scorer, folder / "stopped")
        except KeyboardInterrupt:
            continue
    said["stopped"] = [scorer.calls, result.metrics]
    suite = load_suite("winoground", folder / "damaged")
    for where in ("fails", "done"):
        try:
            evaluate(suite, ClipScorer(student, batch=4), folder / where)
        except ConfigError as error:
            said[where] = str(error)
    (folder / f"said_{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(student, places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(*places["winoground"], folder / "damaged")
    suite = load_suite("winoground", folder / "damaged")
    Path(suite.items[3].images[0].name).write_bytes(b"no image")  # in the second batch: rank 1's
    evaluate(loaded("mmvp", places), ClipScorer(student), folder / "done")
    context = get_context("fork")
    ranks = [context.Process(target=_rank_main, args=(rank, student, places, folder)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return folder, [json.loads((folder / f"said_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("name", "kind"), RANKED)
def test_two_ranks_give_what_one_gives_bit_for_bit(name, kind, student, places, two):
    folder, (first, second) = two
    scorer = Counting(ClipScorer(student), kind)
    one, both = evaluate(loaded(name, places), scorer), load_result(folder / f"{name} {kind}")
    assert both.rows == one.rows and both.about["fingerprint"] == one.about["fingerprint"]
    assert first[f"{name} {kind}"] == second[f"{name} {kind}"]  # as many calls, the same metrics
    calls, metrics = first[f"{name} {kind}"]
    assert metrics == one.metrics and scorer.calls / 2 <= calls <= scorer.calls / 2 + 1


def test_two_ranks_go_on_and_stop_together(student, places, two):
    folder, (first, second) = two
    one = evaluate(loaded("coco_retrieval", places), ClipScorer(student, batch=7))
    assert first["stopped"] == second["stopped"] and load_result(folder / "stopped").rows == one.rows
    assert first["stopped"][0] == first["coco_retrieval features"][0] - 2
    assert first["fails"] == second["fails"] and "line 4: " in first["fails"] and "not a readable image" in first["fails"]
    assert first["done"] == second["done"] and "result.json is of another suite" in first["done"]


class Given:
    """A scorer that gives what it is told, made of the number of captions and of images."""

    name, settings, batch = "given", {}, 4

    def __init__(self, make, many=None):
        self.make = make
        if many is not None:
            self.score_items = lambda items: [make(len(i.captions), len(i.images)) for i in items][: many(len(items))]

    def score(self, images, captions):
        return self.make(len(captions), len(images))


@pytest.mark.parametrize("name", ["winoground", "coco_retrieval"])
@pytest.mark.parametrize(
    "make, said",
    [
        (lambda c, i: np.full((c, i), np.nan), "NaN"),
        (lambda c, i: np.full((c, i), -np.inf), "infinity; expected finite numbers"),
        (lambda c, i: np.ones((c, 1)), r"\[\d+, \d+\] expected, got float64 of shape \[\d+, 1\]"),
        (lambda c, i: np.ones((c * i,)), "expected, got float64 of shape"),
        (lambda c, i: "none", "numbers of shape"),
    ],
)
def test_what_a_scorer_must_not_give_is_one_error(name, make, said, places, tmp_path):
    with pytest.raises(ConfigError, match=f"scorer given: .*{said}"):
        evaluate(loaded(name, places), Given(make), tmp_path)
    assert not (tmp_path / ITEMS).exists()


@pytest.mark.parametrize("many", [lambda n: n - 1, lambda n: 0])
def test_scores_of_fewer_items_are_one_error(many, places):
    with pytest.raises(ConfigError, match="scorer given: scores of 4 items expected, got"):
        evaluate(loaded("winoground", places), Given(lambda c, i: np.ones((c, i)), many))


def test_scores_may_be_bfloat16(places):
    result = evaluate(loaded("winoground", places), Given(lambda c, i: torch.eye(2, dtype=torch.bfloat16)))
    assert result.metrics["group"] == 100


@pytest.mark.parametrize("text", ["garbage\n", "[]\n"])
@pytest.mark.parametrize("file", [ITEMS, "result.json"])
def test_damaged_files_of_a_folder_are_one_error(file, text, places, tmp_path):
    suite, scorer = loaded("winoground", places), Given(lambda c, i: np.ones((c, i)))
    evaluate(suite, scorer, tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=f"{file}: not an evaluation's"):
        evaluate(suite, scorer, tmp_path)


@pytest.mark.parametrize("items", [0, -3])
def test_no_items_are_one_error(items, places):
    with pytest.raises(ConfigError, match=f"items is {items}, expected at least 1"):
        load_suite("winoground", *places["winoground"], items=items)
