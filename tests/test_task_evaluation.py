"""A cross-modal student asked a task: metrics against an independent count, any batch, any number of ranks."""

import json
from io import BytesIO

import evaluation_ranks
import pytest
import runs
import tiny
import torch
from evaluation_ranks import SPLITS, asked

from fastsds.config import ConfigError
from fastsds.crossmodal import load_crossmodal
from fastsds.data.tasks import load_task
from fastsds.evaluation.compare import compare, difference
from fastsds.evaluation.results import load_result
from fastsds.evaluation.tasks import evaluate_task, first_units, measures_of
from fastsds.recipes.clip_td import reads

WORLD = ("world_entailment", "world_questions", "world_choice")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_vilt(tmp_path_factory.mktemp("vilt"))


def of_split(result, split):
    return [row for row in result.rows if row["about"]["split"] == split]


# metrics


def counted(task, split, rows):
    """Metrics in plain Python, of what rows say was predicted and what examples say is right."""
    questions, right = {}, {}  # unit: its examples; metric: one each that counts
    for example in task.splits[split]:
        questions.setdefault(example.about.get("question", example.id), []).append(example)
    assert [row["id"] for row in rows] == list(questions)
    for row in rows:
        of = questions[row["id"]]
        hits = [p == example.target for p, example in zip(row["predicted"], of, strict=True)]
        found = {"accuracy": hits[0]}
        if len(of) > 1:
            found = {e.about["part"]: hit for e, hit in zip(of, hits, strict=True)} | {"both": all(hits)}
        for name, hit in found.items():
            right.setdefault(name, []).append(hit)
            for key in task.by:
                if key in of[0].about:
                    right.setdefault(f"{name}/{key}={of[0].about[key]}", []).append(hit)
    return {name: 100 * sum(hits) / len(hits) for name, hits in right.items()}


@pytest.mark.parametrize("name", WORLD)
def test_metrics_equal_an_independent_count(folder, name, tmp_path):
    student, task = asked(folder, name)
    found = evaluate_task(student, task, SPLITS, batch=7)
    expected = {f"{s}/{k}": v for s in SPLITS for k, v in counted(task, s, of_split(found, s)).items()}
    assert found.metrics == pytest.approx(expected, abs=1e-9) and len({*found.metrics.values()} - {0.0, 100.0}) > 3
    for split in SPLITS:
        predicted = [p for row in of_split(found, split) for p in row["predicted"]]
        own = task.metrics(task.outcomes(task.splits[split], predicted))
        mine = {k.removeprefix(f"{split}/"): v for k, v in found.metrics.items() if k.startswith(f"{split}/")}
        assert mine == pytest.approx(own, abs=1e-9)
    assert all(found.measures[f"dev/{outcome}"].chance == chance for outcome, chance in task.chance.items())
    found.save(tmp_path)
    again = load_result(tmp_path)
    assert (again.metrics, again.errors, again.headline) == (found.metrics, found.errors, found.headline)
    assert again.rows == found.rows and again.about["fingerprint"] == found.about["fingerprint"]


@pytest.mark.parametrize("name", WORLD)
def test_measures_are_known_without_a_student(folder, name):
    student, task = asked(folder, name)
    found, (measures, headline) = evaluate_task(student, task, SPLITS), measures_of(task, SPLITS)
    assert list(measures) == list(found.measures) and tuple(headline) == found.headline
    assert {k: m.n for k, m in measures.items()} == {k: m.n for k, m in found.measures.items()}
    assert headline == [f"{split}/{outcome}" for split in SPLITS for outcome in task.chance]


@pytest.mark.parametrize("name", WORLD)
@torch.no_grad()
def test_predictions_are_the_students_own_whatever_the_batch(folder, name):
    student, task = asked(folder, name)
    expected = {}
    for example in task.splits["dev"]:
        pixels = task.source([example]).load_rows(torch.tensor([0]), student.image_size).pixels
        logits = student(pixels, student.tokenize([reads(example)] if example.choices else reads(example))).logits[0].tolist()
        assert len(logits) == len(example.choices or task.classes)
        expected.setdefault(task.unit(example), []).append(logits.index(max(logits)))
    assert len({p for of in expected.values() for p in of}) > 1  # else any order of the batch would do
    for batch in (1, 7, 64):
        found = evaluate_task(student, task, ("dev",), batch=batch)
        assert {row["id"]: row["predicted"] for row in found.rows} == expected


def test_of_equal_logits_the_first_is_said(folder):
    student, task = asked(folder, "world_entailment")
    torch.nn.init.zeros_(student.head[-1].weight)
    torch.nn.init.zeros_(student.head[-1].bias)
    assert {p for row in evaluate_task(student, task, ("dev",)).rows for p in row["predicted"]} == {0}


def test_the_first_units_have_all_their_parts(folder):
    student, task = asked(folder, "world_choice")
    found, whole = (evaluate_task(student, task, ("dev", "shift"), examples=n) for n in (5, None))
    for split in ("dev", "shift"):
        assert [row["id"] for row in of_split(found, split)] == [f"world_choice/{split}/{k}" for k in range(5)]
        assert of_split(found, split) == of_split(whole, split)[:5]
        assert first_units(task, split, 5) == task.splits[split][:10]
        assert first_units(task, split, None) == first_units(task, split, 10**9) == task.splits[split]
    assert all(len(row["predicted"]) == 2 for row in found.rows) and found.measures["shift/both"].n == 5
    turned = task.splits["dev"][::2] + task.splits["dev"][1::2]  # a question's parts need not be side by side
    task.splits["turned"] = turned
    assert first_units(task, "turned", 3) == [turned[k] for k in (0, 1, 2, 37, 38, 39)]
    again = evaluate_task(student, task, ("turned",))
    assert [(row["id"], row["predicted"]) for row in again.rows] == [(r["id"], r["predicted"]) for r in of_split(whole, "dev")]


# released formats


def vqa(folder, n=5):
    """VQA v2 as it is released; ten people give as many of two answers as the question's number says."""
    from PIL import Image

    for first, sub in ((0, "train2014"), (100, "val2014")):
        questions, answers = [], []
        for k in range(n):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 14), (40 * k, 10, 200)).save(folder / sub / f"COCO_{sub}_{k:012d}.jpg")
            own = {"question_id": first + k, "image_id": k}
            questions.append({**own, "question": f"what is {k}?"})
            said = [{"answer": "red" if j < k else "blue", "answer_id": j + 1} for j in range(10)]
            kind = {"question_type": "what is", "answer_type": "other" if k % 2 else "number", "multiple_choice_answer": "blue"}
            answers.append({**own, **kind, "answers": said})
        file = f"v2_OpenEnded_mscoco_{sub}_questions.json", f"v2_mscoco_{sub}_annotations.json"
        (folder / file[0]).write_text(json.dumps({"questions": questions}))
        (folder / file[1]).write_text(json.dumps({"annotations": answers}))
    (folder / "answers.txt").write_text("red\nblue\n")
    return load_task("vqa_v2", folder, answers=folder / "answers.txt")


def test_vqas_scores_are_soft(folder, tmp_path):
    task, student = vqa(tmp_path / "vqa"), load_crossmodal(folder, classes=2).eval()
    with torch.no_grad():  # it says "red" of everything
        student.head[-1].weight.zero_()
        student.head[-1].bias.copy_(torch.tensor([1.0, 0.0]))
    found = evaluate_task(student, task, ("val",))
    said = [[j < k for j in range(10)] for k in range(5)]  # VQA's rule over leave-one-out subsets of the ten
    rule = [sum(min(1, (sum(of) - of[j]) / 3) for j in range(10)) / 10 for of in said]
    assert rule == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert found.outcomes["accuracy"].tolist() == pytest.approx(rule)
    expected = {"": sum(rule) / 5, "/answer_type=other": (0.3 + 0.9) / 2, "/answer_type=number": 1.6 / 3}
    for group, value in expected.items():
        assert found.metrics[f"val/accuracy{group}"] == pytest.approx(100 * value)
    assert [row["predicted"] for row in found.rows] == [[0]] * 5
    found.save(tmp_path / "kept")
    assert load_result(tmp_path / "kept").metrics == found.metrics


def snli_ve(folder, damaged=(), n=5):
    """SNLI-VE as it is released, an image a sentence; of some of dev's images half the file is there."""
    from PIL import Image

    (folder / "flickr30k_images").mkdir(parents=True)
    for number, split in enumerate(("train", "dev", "test")):
        rows = []
        for k in range(n):
            written, name = BytesIO(), f"{100 * number + k}.jpg"
            Image.effect_noise((20, 14), 50).save(written, "png")
            whole = written.getvalue()
            cut = len(whole) // 2 if split == "dev" and k in damaged else len(whole)
            (folder / "flickr30k_images" / name).write_bytes(whole[:cut])
            row = {"gold_label": ("entailment", "neutral", "contradiction")[k % 3], "pairID": f"{split}#{k}"}
            row |= {"Flickr30K_ID": name.removesuffix(".jpg"), "sentence1": "A man.", "sentence2": f"the cross is {k}"}
            rows.append(row)
        (folder / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# refused


def test_a_split_is_known_and_asked_once(folder):
    student, task = asked(folder, "world_entailment")
    with pytest.raises(ConfigError) as error:
        evaluate_task(student, task, ("dev", "val"))
    assert str(error.value) == "task world_entailment: split 'val', expected some of train, dev, test, dev_shift, shift"
    twice, once = (evaluate_task(student, task, splits) for splits in (("dev", "train", "dev"), ("dev", "train")))
    assert (twice.rows, twice.metrics, twice.about) == (once.rows, once.metrics, once.about)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(folder, tmp_path, workers):
    task, student = load_task("snli_ve", snli_ve(tmp_path / "e", damaged=[3])), load_crossmodal(folder, classes=3).eval()
    for batch in (1, 2, 64):
        with pytest.raises(ConfigError, match=r"^task snli_ve, dev: dev#3: 103\.jpg: not a readable image"):
            evaluate_task(student, task, ("test", "dev"), batch=batch, workers=workers)
    assert len(evaluate_task(student, task, ("test", "dev"), examples=3, workers=workers).rows) == 6  # it is not among these


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_answer(folder, value):
    student, task = asked(folder, "world_entailment")
    own = student.forward

    def forward(pixels, tokens):
        out = own(pixels, tokens)
        out.logits[-1, 1] = value  # of the last of a batch
        return out

    student.forward = forward
    with pytest.raises(ConfigError, match=r"world_entailment, dev: world_entailment/dev/6: .*not finite"):
        evaluate_task(student, task, ("dev",), batch=7)


# several students, several ranks


def test_two_students_are_compared_on_the_same_units(folder, tmp_path):
    for name in WORLD:
        (student, task), (other, _) = asked(folder, name), asked(folder, name, seed=3)
        a, b = (evaluate_task(of, task, SPLITS) for of in (student, other))
        assert a.about["fingerprint"] == b.about["fingerprint"] != evaluate_task(student, task, ("dev",)).about["fingerprint"]
        assert a.rows != b.rows
        for metric, measure in a.measures.items():
            arms = a.outcomes[measure.outcome], b.outcomes[measure.outcome]
            d = difference([arms[0]], [arms[1]], measure)
            assert d.points == pytest.approx(a.metrics[metric] - b.metrics[metric]) and d.low <= d.points <= d.high
            own = [(x, y) for x, y, group in zip(*arms, measure.groups, strict=True) if group == 0]
            assert (d.test, d.only_a, d.only_b) == ("mcnemar", own.count((1, 0)), own.count((0, 1)))
        assert [one.metric for one in compare([([a], [b])])] == list(a.headline)
        with pytest.raises(ConfigError, match="same items alone"):
            compare([([a], [evaluate_task(other, task, SPLITS, examples=9)])])
        assert difference([a.outcomes[measure.outcome]], [a.outcomes[measure.outcome]], measure).p == 1


@pytest.mark.slow
def test_two_ranks_are_one(folder, tmp_path):
    """The same rows to the bit, also where batches are left over; an image that one rank cannot read ends both."""
    entailed = snli_ve(tmp_path / "e", damaged=[3])  # the second batch, of rank 1
    done = runs.deepspeed(evaluation_ranks.__file__, folder, entailed, tmp_path, ranks=2, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    student, task = asked(folder, "world_choice")
    one = json.loads(json.dumps({n: evaluate_task(student, task, SPLITS, batch=n).rows for n in evaluation_ranks.BATCHES}))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rows_{rank}.json").read_text()) == one
        assert (tmp_path / f"error_{rank}.txt").read_text().startswith("task snli_ve, dev: dev#3: 103.jpg: ")
