"""Cross-modal tasks in their released formats, on small files: what is read, what is refused, and how answers are counted."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsds.config import ConfigError
from fastsds.data.loader import Loader
from fastsds.data.tasks import Example, Task, load_task
from fastsds.data.tasks.answers import CONTRACTIONS, normalised, soft_accuracy
from fastsds.data.tasks.files import ImageRef
from fastsds.data.tasks.subsets import low_shot, shift_by, shift_lists
from fastsds.data.tasks.vcr import sentence


def image(path, shade=90):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 14), (shade, 10, 200)).save(path)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(name, folder, *says, **options):
    """The error of a load, which is one ConfigError that says all this."""
    with pytest.raises(ConfigError) as error:
        load_task(name, folder, **options)
    assert all(text in str(error.value) for text in says), str(error.value)


# SNLI-VE


def entailed(pair, label, key="Flickr30K_ID", name="17"):
    row = {"gold_label": label, "pairID": pair, "sentence1": "A man.", "sentence2": "A man is outside.", key: name}
    return row | {"annotator_labels": [label], "captionID": f"{name}.jpg#0", "sentence2_binary_parse": "( A man )"}


@pytest.fixture
def snli_ve(tmp_path):
    image(tmp_path / "flickr30k_images" / "17.jpg")
    labels = ("entailment", "neutral", "-", "contradiction")
    for split, key, name in (("train", "Flickr30K_ID", "17"), ("dev", "Flikr30kID", "17.jpg"), ("test", "Flickr30K_ID", "17")):
        lines(tmp_path / f"snli_ve_{split}.jsonl", [entailed(f"{split}#{k}", x, key, name) for k, x in enumerate(labels)])
    return tmp_path


def test_snli_ve_as_released(snli_ve):
    task = load_task("snli_ve", snli_ve)
    targets = {split: [e.target for e in of] for split, of in task.splits.items()}
    assert targets == dict.fromkeys(("train", "dev", "test"), [0, 1, 2])
    assert "1 of train, 1 of dev, 1 of test" in task.notes[0]
    first = task.splits["dev"][0]
    assert (first.id, first.text, first.image.name, first.choices) == ("dev#0", "A man is outside.", "17.jpg", ())
    assert task.prompts(first)[0] == "A man is outside" and len(set(task.prompts(first))) == len(task.classes) == 3
    assert [task.caption(e) for e in task.splits["dev"]] == ["A man is outside.", None, None]
    outcomes = task.outcomes(task.splits["dev"], [0, 1, 1])
    found = {"contradiction": 0, "entailment": 100, "neutral": 100}
    found = {"accuracy": 200 / 3} | {f"accuracy/label={label}": percent for label, percent in found.items()}
    assert task.metrics(outcomes) == pytest.approx(found)
    assert outcomes.rows()[2] == {
        "id": "dev#3", "about": {"label": "contradiction", "image": "17.jpg"}, "outcomes": {"accuracy": 0.0}
    }  # fmt: skip
    for bad in ([0, 1], [0, 1, 3], [0, -1, 2], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match="predicted"):
            task.outcomes(task.splits["dev"], bad)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (entailed("new", "maybe"), "gold_label is 'maybe'"),
        (entailed("dev#1", "neutral"), "snli_ve_dev.jsonl: row 2"),
        (entailed("new", "neutral", name="18"), "18.jpg"),
        ({"gold_label": "neutral", "pairID": "new", "sentence2": "x"}, "no field 'Flickr30K_ID'"),
        (entailed("new", "neutral") | {"sentence2": " "}, "sentence2 is ' '"),
        ([], "an object expected"),
        (entailed("new", "neutral") | {"sentence2": "a \ud800 ring"}, "not Unicode: half a character in "),
        (entailed("new", "neutral", name="a\0b"), "images are not in"),
    ],
)
def test_snli_ve_refuses(snli_ve, row, says):
    path = snli_ve / "snli_ve_test.jsonl"
    path.write_text(path.read_text() + "\n" + json.dumps(row) + "\n")
    refused("snli_ve", snli_ve, "snli_ve_test.jsonl: row 6", says)


def test_what_is_not_there_is_named(snli_ve, tmp_path):
    refused("snli-ve", snli_ve, "'snli-ve'", "nearest: snli_ve")
    refused("snli_ve", tmp_path / "none", "none does not exist")
    refused("snli_ve", None, "expected the folder")
    refused("snli_ve", snli_ve, "unknown option 'size'", size=3)
    refused("world_choice", snli_ve, "takes no folder")
    refused("world_choice", None, "'trian'", sizes={"trian": 3})
    refused("snli_ve", snli_ve, "elsewhere does not exist", images=snli_ve / "elsewhere")
    (snli_ve / "snli_ve_dev.jsonl").write_text("{\n")
    refused("snli_ve", snli_ve, "snli_ve_dev.jsonl: row 1: not JSON")
    (snli_ve / "snli_ve_dev.jsonl").write_text("1" * 5000)
    refused("snli_ve", snli_ve, "snli_ve_dev.jsonl: row 1: not JSON")
    (snli_ve / "snli_ve_dev.jsonl").unlink()
    refused("snli_ve", snli_ve, "expected the file snli_ve_dev.jsonl")


@pytest.mark.parametrize(
    ("name", "option", "value", "says"),
    [
        ("snli_ve", "images", 3, "images is 3, expected text"),
        ("vqa_v2", "min_count", "9", "min_count is the text '9', expected a whole number"),
        ("vqa_v2", "min_count", True, "min_count is true, expected a whole number"),
        ("vqa_v2", "answers", ["yes"], 'answers is ["yes"], expected text'),
        ("vqa_v2", "template", None, "template is null, expected text"),
        ("vqa_v2", "template", "{answer}", "template is '{answer}', expected a text with {choice}"),
        ("vqa_v2", "template", "{", "template is '{', expected a text with {choice}"),
        ("vqa_v2", "template", "{text:d} {choice}", "template is '{text:d} {choice}', expected a text with {choice}"),
        ("vqa_v2", "template", "{text}", "template is '{text}', expected a text with {choice}"),
        ("world_questions", "name", "x", "unknown option 'name', expected one of seed, sizes"),
        ("snli_ve", "folder", "x", "unknown option 'folder', expected one of images"),
        ("world_questions", "seed", 0.5, "seed is 0.5, expected a whole number"),
        ("world_questions", "seed", 2**64, "seed is 18446744073709551616, expected an integer of 64 bits"),
        ("world_questions", "sizes", 40, "sizes is 40, expected keys with values"),
        ("world_questions", "sizes", {"test": True}, "sizes: 'test', expected a size of at least 1"),
    ],
)
def test_an_option_of_another_kind_is_named(snli_ve, name, option, value, says):
    with pytest.raises(ConfigError, match=re.escape(f"task {name}: {says}")):
        load_task(name, None if name.startswith("world") else snli_ve, **{option: value})


def test_images_come_through_the_loader_and_damaged_ones_are_passed_over(snli_ve):
    image(snli_ve / "flickr30k_images" / "bad.jpg")
    rows = [entailed("bad", "neutral", name="bad"), *(entailed(f"{k}", "neutral") for k in range(7))]
    lines(snli_ve / "snli_ve_train.jsonl", rows)
    task = load_task("snli_ve", snli_ve)
    (snli_ve / "flickr30k_images" / "bad.jpg").write_bytes(b"not an image")
    source, skipped = task.source(task.splits["train"], workers=2), []
    loader = Loader(
        source, batch=4, streams=2, seed=0, image_size=8, tokenize=lambda texts: torch.zeros(len(texts), 1), max_skipped=0.2,
        report=skipped.append,
    )  # fmt: skip
    seen = [next(loader)[0] for _ in range(4)]
    assert seen[0].pixels.shape == (4, 3, 8, 8) and set(seen[0].captions) == {"A man is outside."}
    assert 0 not in torch.cat([batch.ids for batch in seen]) and "bad.jpg" in skipped[0]["why"]


# VQA

ASKED, TOLD = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def question(number, picture, text="what is it?"):
    return {"question_id": number, "image_id": picture, "question": text}


def annotation(number, picture, answers, kind="other"):
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1} for k, a in enumerate(answers)]
    row = {"question_id": number, "image_id": picture, "question_type": "what is", "answer_type": kind, "answers": given}
    return row | {"multiple_choice_answer": Counter(answers).most_common(1)[0][0]}


@pytest.fixture
def vqa(tmp_path):
    for split, picture in (("train", 42), ("val", 262148)):
        image(tmp_path / f"{split}2014" / f"COCO_{split}2014_{picture:012d}.jpg")
        asked = [question(picture * 1000 + k, picture) for k in range(4)]
        given = (["cat"] * 10, ["cat"] * 4 + ["a dog"] * 3 + ["Dog."] * 3, ["dog"] * 9 + ["two"], ["owl"] * 2 + ["cat"] * 8)
        told = [annotation(picture * 1000 + k, picture, answers) for k, answers in enumerate(given)]
        (tmp_path / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(json.dumps({"info": {}, "questions": asked}))
        (tmp_path / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps({"annotations": told[::-1]}))
    return tmp_path


def rewrite(path, change, key):
    found = json.loads(path.read_text())
    change(found[key])
    path.write_text(json.dumps(found))


def test_vqa_as_released(vqa):
    task = load_task("vqa_v2", vqa, min_count=1)
    assert task.classes == ("cat", "dog") and list(task.splits) == ["train", "val"]
    assert [e.id for e in task.splits["train"]] == ["42000", "42001", "42002", "42003"]
    assert [e.target for e in task.splits["val"]] == [{0: 1.0}, {0: 1.0, 1: 1.0}, {1: 1.0}, {0: 1.0}]
    assert task.splits["val"][0].image.name == "val2014/COCO_val2014_000000262148.jpg"
    assert task.prompts(task.splits["val"][0]) == ("cat", "dog")
    assert task.prompts(task.splits["val"][0]) is task.prompts(task.splits["val"][1])
    assert task.caption(task.splits["val"][2]) == "what is it? dog"
    asking = load_task("vqa_v2", vqa, min_count=1, template="{text} {choice}")
    assert asking.prompts(asking.splits["val"][0]) == ["what is it? cat", "what is it? dog"]
    (vqa / "answers.txt").write_text("owl\n2\nA Dog\n")
    listed = load_task("vqa_v2", vqa, answers=vqa / "answers.txt")
    assert listed.classes == ("owl", "2", "dog")
    targets = [{}, {2: 1.0}, {2: 1.0, 1: pytest.approx(0.3)}, {0: pytest.approx(0.6)}]
    assert [e.target for e in listed.splits["train"]] == targets
    assert listed.splits["train"][0].answer is None and listed.caption(listed.splits["train"][0]) is None
    assert "1 of train, 1 of val" in listed.notes[0]
    outcomes = listed.outcomes(listed.splits["train"], np.array([0, 2, 1, 0]))
    assert listed.metrics(outcomes)["accuracy/answer_type=other"] == pytest.approx(100 * (0 + 1 + 0.3 + 0.6) / 4)


def test_vqa_cp_as_released(vqa):
    for split, coco, picture in (("train", "val2014", 262148), ("test", "train2014", 42)):
        asked = [question(k + len(split) * 10, picture) | {"coco_split": coco} for k in range(2)]
        told = [annotation(q["question_id"], picture, ["cat"] * 6 + ["dog"] * 4) | {"coco_split": coco} for q in asked]
        told[1] = annotation(asked[1]["question_id"], picture, ["dog"] * 10)
        (vqa / f"vqacp_v2_{split}_questions.json").write_text(json.dumps(asked))
        (vqa / f"vqacp_v2_{split}_annotations.json").write_text(json.dumps(told))
    task = load_task("vqa_cp_v2", vqa, min_count=1)
    assert task.splits["train"][0].image.name.startswith("val2014/COCO_val2014") and list(task.splits) == ["train", "test"]
    rewritten = json.loads((vqa / "vqacp_v2_test_questions.json").read_text())
    rewritten[1]["coco_split"] = "test2015"
    (vqa / "vqacp_v2_test_questions.json").write_text(json.dumps(rewritten))
    refused("vqa_cp_v2", vqa, "vqacp_v2_test_questions.json: questions[1]", "'test2015'")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (TOLD, lambda rows: rows.pop(1), ("1 questions have no annotation", "questions[2]")),
        (TOLD, lambda rows: rows.append(annotation(5, 1, ["x"] * 10)), ("annotations[4]", "id 5 is none")),
        (TOLD, lambda rows: rows.append(rows[0]), ("annotations[4]", "was there before", "annotations[0]")),
        (TOLD, lambda rows: rows[2].update(image_id=7), ("annotations[2]", "image_id 7")),
        (TOLD, lambda rows: rows[2]["answers"].pop(), ("annotations[2]", "9 answers")),
        (TOLD, lambda rows: rows[2]["answers"][3].clear(), ("annotations[2]: answers[3]", "'answer'")),
        (ASKED, lambda rows: rows.append(question(42001, 42)), ("questions[4]", "42001", "train")),
        (ASKED, lambda rows: rows.append(question(1, 5)), ("questions[4]", "000000000005.jpg")),
        (ASKED, lambda rows: rows[0].update(question_id="1"), ("questions[0]", "whole number")),
        (ASKED, lambda rows: rows.clear(), ("no questions",)),
    ],
)
def test_vqa_refuses(vqa, file, change, says):
    rewrite(vqa / file, change, "questions" if file == ASKED else "annotations")
    refused("vqa_v2", vqa, *says, min_count=1)


def test_vqa_refuses_answers_that_are_no_classes(vqa):
    refused("vqa_v2", vqa, "0 answers have at least 9", "min_count")
    (vqa / "a.json").write_text('["a dog", "dog"]')
    refused("vqa_v2", vqa, "a.json: row 2", "'dog'", answers=vqa / "a.json")
    (vqa / "a.json").write_text('{"dog": 0}')
    refused("vqa_v2", vqa, "a.json: a list of answers", answers=vqa / "a.json")


def test_soft_accuracy_is_the_mean_over_leave_one_out_subsets():
    draw = random.Random(0)
    for _ in range(500):
        people = [draw.choice("abcd") for _ in range(10)]
        for answer in "abcde":
            subsets = [people[:k] + people[k + 1 :] for k in range(10)]
            official = sum(min(sum(other == answer for other in rest) / 3, 1) for rest in subsets) / 10
            assert soft_accuracy(people.count(answer)) == pytest.approx(official, abs=1e-12)
    assert [round(soft_accuracy(n), 12) for n in range(11)] == [0, 0.3, 0.6, 0.9] + [1] * 7


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The  Red\nbus.", "red bus"), ("a", ""), ("an apple", "apple"), ("two", "2"), ("None", "0"), ("Ten dogs", "10 dogs"),
        ("dont", "don't"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("whats up?", "what's up"),
        ("girl's", "girl's"), ("2:50 pm", "2:50 pm"), ("100,978", "100978"), ("3.5", "3.5"), ("U.S.", "us"), ("[yes]", "yes"),
        ("red/white", "red white"), ("red, white", "red white"), ("well-done!", "well done"), ("- yes", "yes"), ("its", "its"),
        ("well", "well"), ("black & white", "black & white"), ("t-shirt -", "tshirt"), ("1,000-2,000", "10002000"),
    ],
)  # fmt: skip
def test_answers_are_compared_as_documented(said, compared):
    assert normalised(said) == compared and normalised(compared) == compared


def test_normalisation_equals_another_reading_of_its_rules():
    numbers = dict(none=0, zero=0, one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)

    def other(text):
        text, marks = text.lower(), r";/\[\]\"{}()=+\\_\-><@`,?!"
        if re.search(r"[0-9],[0-9]", text):
            text = re.sub(f"[{marks}]", "", text)
        else:
            beside = {m for m in re.findall(f"[{marks}]", text) if m + " " in text or " " + m in text}
            text = re.sub(f"[{marks}]", lambda found: "" if found[0] in beside else " ", text)
        words = re.sub(r"\.([^0-9]|$)", r"\1", re.sub(r"\.+(?=\.)", "", text)).split()
        words = [str(numbers.get(word, word)) for word in words]
        return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))

    draw = random.Random(1)
    parts = ["a", "the", "two", "none", "dont", "red", "3", "3,5", "1.5", ".", ",", "/", "-", "?", " ", " ", "'s", ":"]
    for _ in range(3000):
        text = " ".join("".join(draw.choice(parts) for _ in range(draw.randint(1, 7))).split())
        assert normalised(text) == other(text), text


def test_no_contraction_is_another_word():
    assert all(word.replace("'", "") == spelt.replace("'", "") for spelt, word in CONTRACTIONS.items())
    assert not {"well", "ill", "hell", "shell", "wed", "shed", "id", "its", "were", "lets", "cant've"} & set(CONTRACTIONS)


# VCR


def film(number, split="train", movie="A", label=1):
    row = {"annot_id": f"{split}-{number}", "movie": movie, "objects": ["person", "car", "person", "car", "dog"]}
    row |= {"img_fn": f"{movie}/1.jpg", "metadata_fn": f"{movie}/1.json", "interesting_scores": [0]}
    row |= {"question": ["Why", "is", [0, 2], "near", [1], "?"]}
    row |= {"answer_choices": [[[2], "likes", [4], "."], ["No", "."], ["Yes", ",", [0], "does", "n't"], ["(", "no", ")"]]}
    row |= {"rationale_choices": [["Because", str(k)] for k in range(4)], "answer_label": label, "rationale_label": 3 - label}
    return row


@pytest.fixture
def vcr(tmp_path):
    for movie in "ABC":
        image(tmp_path / "vcr1images" / movie / "1.jpg", ord(movie))
    for split, n in (("train", 40), ("val", 12)):
        lines(tmp_path / f"{split}.jsonl", [film(k, split, "ABC"[k % 3], k // 3 % 4) for k in range(n)])
    return tmp_path


def test_vcr_as_released(vcr):
    task = load_task("vcr", vcr)
    assert {split: len(of) for split, of in task.splits.items()} == {"train": 80, "val": 24}
    answer, rationale = task.splits["train"][:2]
    assert (answer.id, rationale.id, task.unit(answer)) == ("train-0/answer", "train-0/rationale", "train-0")
    assert answer.text == "Why is person 1 and person 2 near car 1?"
    assert answer.choices == ("person 2 likes dog.", "No.", "Yes, person 1 doesn't", "(no)")
    assert rationale.text == answer.text + " person 2 likes dog." and (answer.target, rationale.target) == (0, 3)
    assert task.prompts(answer)[1] == answer.text + " No." and task.caption(answer) == answer.text + " person 2 likes dog."
    assert answer.about["movie"] == "A" and answer.image == rationale.image


def test_conjunction_equals_an_independent_count(vcr):
    task, draw = load_task("vcr", vcr), random.Random(0)
    examples = task.splits["val"][:]
    draw.shuffle(examples)
    predicted = [e.target if draw.random() < 0.6 else draw.randrange(4) for e in examples]
    of = {e.id: p for e, p in zip(examples, predicted, strict=True)}
    right = [json.loads(line) for line in (vcr / "val.jsonl").read_text().splitlines()]
    hits = [[of[f"{r['annot_id']}/{part}"] == r[f"{part}_label"] for part in ("answer", "rationale")] for r in right]
    found = task.metrics(task.outcomes(examples, predicted))
    expected = {"answer": sum(a for a, _ in hits), "rationale": sum(r for _, r in hits), "both": sum(a and r for a, r in hits)}
    assert found == pytest.approx({name: 100 * n / 12 for name, n in expected.items()})
    for odd in (examples[1:], [*examples, examples[0]]):
        with pytest.raises(ValueError, match="each question once"):
            task.outcomes(odd, [0] * len(odd))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer_label": 4}, "answer_label 4"),
        ({"rationale_choices": [["x"]] * 3}, "3 rationale_choices"),
        ({"question": ["Is", [5], "?"]}, "question: object 5"),
        ({"answer_choices": [["a"], ["b"], [[0], 3], ["d"]]}, "answer_choices[2]"),
        ({"img_fn": "D/1.jpg"}, "D/1.jpg"),
        ({"annot_id": "train-3"}, "train.jsonl: row 4"),
        ({"objects": [1]}, "objects: names expected"),
        ({"movie": None}, "movie is None"),
    ],
)
def test_vcr_refuses(vcr, change, says):
    lines(vcr / "val.jsonl", [film(0, "val"), film(1, "val") | change])
    refused("vcr", vcr, "val.jsonl: row 2", says)
    lines(vcr / "val.jsonl", [{k: v for k, v in film(0, "val").items() if k != "answer_label"}])
    refused("vcr", vcr, "val.jsonl: row 1", "no field 'answer_label'")


def test_references_are_written_out():
    objects = ["person", "person", "bottle", "person"]
    said = sentence("here", [[0, 1, 3], "and", "the", [2], "'s", "cap"], objects)
    assert said == "person 1, person 2 and person 3 and the bottle's cap"


# subsets


def made(n, classes=3, seed=0, extra=()):
    draw, ref = random.Random(seed), ImageRef("x", "x", bytes)
    targets = draw.choices(range(classes), range(1, classes + 1), k=n)
    of = [Example(f"q{k}", ref, "t", (), target, {"kind": k % 5}) for k, target in enumerate(targets)]
    return Task(name="made", classes=tuple("abcdefgh"[:classes]), splits={"train": [*of, *extra], "val": of[:20]})


def ids(task, split="train"):
    return {e.id for e in task.splits[split]}


def test_low_shot_is_nested_stratified_and_blind_to_order():
    task = made(3000)
    whole = Counter(e.target for e in task.splits["train"])
    few, more = low_shot(task, 0.01, seed=3), low_shot(task, 0.1, seed=3)
    assert (len(ids(few)), len(ids(more))) == (30, 300) and ids(few) < ids(more) < ids(low_shot(task, 0.5, seed=3)) < ids(task)
    for share, part in ((0.01, few), (0.1, more)):
        kept = Counter(e.target for e in part.splits["train"])
        assert all(abs(kept[c] - share * n) <= 1 for c, n in whole.items())
    turned = replace(task, splits=task.splits | {"train": task.splits["train"][::-1]})
    assert ids(low_shot(turned, 0.1, seed=3)) == ids(more) != ids(low_shot(task, 0.1, seed=4))
    assert few.splits["val"] == task.splits["val"] and few.classes == task.classes
    assert low_shot(task, 1.0, seed=3).splits == task.splits and len(ids(low_shot(task, 1e-9, seed=3))) == 1
    for bad in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="fraction"):
            low_shot(task, bad, seed=0)


def test_low_shot_of_small_classes_and_none_keeps_its_size():
    ref = ImageRef("x", "x", bytes)
    rare = [Example(f"r{k}", ref, "t", (), {} if k % 2 else {k: 0.6, k + 1: 0.9}, {}) for k in range(0, 500)]
    assert len(ids(low_shot(made(500, extra=rare), 0.1, seed=0))) == 100


def test_low_shot_keeps_a_questions_parts_together(vcr):
    task = load_task("vcr", vcr)
    part = low_shot(task, 0.25, seed=0).splits["train"]
    assert len(part) == 20 and set(Counter(e.about["question"] for e in part).values()) == {2}
    assert max(Counter(e.target for e in part if e.about["part"] == "answer").values()) <= 4


def test_shift_by_a_field(vcr):
    task = load_task("vcr", vcr)
    shifted = shift_by(task, "movie", test=["B"])
    movies = {split: {e.about["movie"] for e in of} for split, of in shifted.splits.items()}
    assert movies == {"train": {"A", "C"}, "val": {"A", "C"}, "val_shift": {"B"}}
    assert shift_by(task, "movie", train=["A", "C"]).splits == shifted.splits
    assert list(shift_by(task, "movie", train=["A"], test=["B"]).splits["train"]) == [
        e for e in task.splits["train"] if e.about["movie"] == "A"
    ]
    drawn = [shift_by(made(100), "kind", share=0.4, seed=s) for s in range(6)]
    assert all(len({e.about["kind"] for e in t.splits["train"]}) == 2 for t in drawn)
    assert all(not ids(t) & ids(t, "val_shift") for t in drawn)
    assert len({frozenset(ids(t)) for t in drawn}) > 1
    for options, says in (
        ({"by": "film", "test": ["B"]}, "expected one of image, movie"),
        ({"by": "movie", "test": ["D"]}, "no example has 'D'"),
        ({"by": "movie", "train": ["A"], "test": ["A"]}, "both in train and in test"),
        ({"by": "movie"}, "or a share"),
        ({"by": "movie", "share": 1.0}, "share 1.0"),
        ({"by": "movie", "test": ["A", "B", "C"]}, "train on"),
        ({"by": "part", "train": ["answer"]}, "'train-0' has a part on each side"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            shift_by(task, **options)


def test_a_shift_that_is_asked_takes_the_place_of_a_tasks_own():
    task = load_task("world_entailment", sizes=dict.fromkeys(("train", "dev", "test", "dev_shift", "shift"), 12))
    shifted = shift_by(task, "label", test=["neutral"])
    labels = {split: {e.about["label"] for e in of} for split, of in shifted.splits.items()}
    ours, theirs = {"entailment", "contradiction"}, {"neutral"}
    assert labels == {"train": ours} | {s: ours for s in ("dev", "test", "shift")} | {
        f"{s}_shift": theirs for s in ("dev", "test", "shift")
    }
    assert ids(shifted, "dev_shift") < ids(task, "dev")
    with pytest.raises(ConfigError, match="no example is left to test on"):
        shift_by(task, "label", test=[])


def test_shift_by_lists(vcr, vqa):
    (vcr / "a.txt").write_text("val-3\ntrain-1\n\n")
    (vcr / "b.json").write_text('["train-7"]')
    task = shift_lists(load_task("vcr", vcr), {"train": vcr / "a.txt", "test": vcr / "b.json"})
    assert ids(task) == {"val-3/answer", "val-3/rationale", "train-1/answer", "train-1/rationale"}
    assert ids(task, "test") == {"train-7/answer", "train-7/rationale"}
    (vqa / "c.json").write_text(json.dumps([question(42001, 42), question(262148000, 262148)]))
    (vqa / "d.json").write_text(json.dumps({"questions": [question(42000, 42)]}))
    task = load_task("vqa_v2", vqa, min_count=1)
    lists = {"train": vqa / "c.json", "test": vqa / "d.json"}
    shifted = shift_lists(task, lists)
    assert (ids(shifted), ids(shifted, "test")) == ({"42001", "262148000"}, {"42000"})
    wrong = {'["42000"]': "was there before", '["9"]': "[0]: id '9' is none", "[null]": "[0]: an id", "[]": "no ids"}
    for text, says in wrong.items():
        (vqa / "e.json").write_text(text)
        with pytest.raises(ConfigError, match=re.escape(says)):
            shift_lists(task, lists | {"more": vqa / "e.json"})
    with pytest.raises(ConfigError, match="expected one for 'train'"):
        shift_lists(task, {"test": vqa / "d.json"})


# the task that a recipe names


def test_open_task_takes_a_part_and_names_the_section():
    from fastsds.config import ShiftConfig, TaskDataConfig
    from fastsds.data.tasks.opening import open_task

    data = TaskDataConfig(options={"sizes": {"train": 400}}, fraction=0.05, shift=ShiftConfig(by="form", train=("whole",)))
    task = open_task(data, seed=3)
    assert {e.about["form"] for e in task.splits["train"]} == {"whole"} and len(task.splits["train"]) == 10
    assert {e.about["form"] for e in task.splits["test_shift"]} == {"one"}
    other, ids = open_task(data, seed=4), [e.id for e in task.splits["train"]]
    assert [e.id for e in other.splits["train"]] != ids and other.splits["test"] == task.splits["test"]
    with pytest.raises(ConfigError, match="^data: task 'nothing': expected one of"):
        open_task(TaskDataConfig(task="nothing"))
    with pytest.raises(ConfigError, match="^data.options: 1, expected the name of an option"):
        open_task(TaskDataConfig(options={1: 2}))
    with pytest.raises(ConfigError, match="^data.shift: shift by form: no example has 'odd'"):
        open_task(replace(data, shift=ShiftConfig(by="form", train=("odd",))))
