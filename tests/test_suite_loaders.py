"""Each loader on small files in the released formats: what it reads, and one error with file and row for what is wrong."""

import json
import shutil
from io import BytesIO

import numpy as np
import pytest
import released
import torch
from PIL import Image

from fastsds.config import ConfigError
from fastsds.data.images import decode_image
from fastsds.evaluation.suite import ImageRef, load_suite, pixels
from fastsds.evaluation.suites.aro import SYMMETRIC
from fastsds.evaluation.suites.order import generate, normalise


def picture(seed, side=4, crop=None, **how):
    """The pixels of a released image, by another way: PIL crops, then the data's own transform."""
    image = released.picture(seed, **how).convert("RGB")
    return transformed(image if crop is None else image.crop(crop), side)


def transformed(image, side=4):
    with BytesIO() as file:
        image.save(file, "PNG")
        return decode_image(file.getvalue(), [side])[0]


def refuses(pattern, name, path, **options):
    with pytest.raises(ConfigError, match=pattern):
        load_suite(name, path, **options)


def edit(path, change):
    """Change a JSON file's content in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# Images.


def of_bytes(content, box=None):
    return ImageRef("x.png", "table.json: row 7", lambda: content, box)


def test_the_box_is_cut_out_before_anything_is_resized():
    content = released.encoded(0, size=(40, 20))
    for box in ((10, 2, 30, 12), (0, 0, 40, 20), (3.4, 1.6, 20.5, 19)):
        expected = picture(0, 8, [round(edge) for edge in box], size=(40, 20))
        assert torch.equal(pixels(of_bytes(content, box), 8), expected)
    assert torch.equal(pixels(of_bytes(content, (-5, -9, 12, 99)), 8), picture(0, 8, (0, 0, 12, 20), size=(40, 20)))


def test_images_that_give_no_pixels_name_file_and_row():
    content = released.encoded(0)
    for box in ((8, 0, 12, 6), (3, 3, 3, 5), (-9, 0, 0, 6)):
        with pytest.raises(ConfigError, match=r"table.json: row 7: x.png: .*box .* holds nothing of an image of 8x6"):
            pixels(of_bytes(content, box), 4)
    with pytest.raises(ConfigError, match="table.json: row 7: x.png: not a readable image"):
        pixels(of_bytes(content[:40]), 4)
    assert pixels(of_bytes(released.encoded(1, mode="RGBA")), 4).shape == (3, 4, 4)
    assert of_bytes(content) == of_bytes(b"") != of_bytes(content, (0, 0, 1, 1)) and len({of_bytes(b""), of_bytes(b"1")}) == 1


# Winoground.


def winoground_table(n=5):
    """The hub's columns, images as its cells hold them."""
    rows = released.winoground_rows(n)
    for k, row in enumerate(rows):
        for side in (0, 1):
            mode = "RGBA" if (k, side) == (1, 0) else "L" if (k, side) == (1, 1) else "RGB"
            row[f"image_{side}"] = {"bytes": released.encoded(2 * k + side, mode=mode), "path": f"ex_{k}_img_{side}.png"}
    return rows


def hub(rows, *images):
    import datasets

    features = datasets.Dataset.from_list(rows).features
    return datasets.Dataset.from_list(rows, features=datasets.Features(features | dict.fromkeys(images, datasets.Image())))


def as_parquet(rows, folder, *images, parts=2):
    """As the hub stores a split: several files, each of several row groups."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        shard = hub(rows, *images).shard(parts, part, contiguous=True)
        pq.write_table(shard.data.table, folder / f"test-{part:05d}-of-{parts:05d}.parquet", row_group_size=2)
    return folder


def test_winoground_is_the_same_in_all_its_layouts(tmp_path):
    import datasets

    rows, images = winoground_table(), ("image_0", "image_1")
    released.winoground(tmp_path, 5)
    hub(rows, *images).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": hub(rows, *images)}).save_to_disk(tmp_path / "dict")
    as_parquet(rows, tmp_path / "hub/data", *images)
    moved = tmp_path / "moved"
    (moved / "data").mkdir(parents=True)
    shutil.copytree(tmp_path / "images", moved / "images")
    shutil.copy(tmp_path / "examples.jsonl", moved / "data")
    first = load_suite("winoground", tmp_path)
    assert [item.id for item in first.items] == ["0", "1", "2", "3", "4"]
    assert first.items[0].about == {"tag": "Noun", "collapsed_tag": "Object", "num_main_preds": 2, "secondary_tag": []}
    assert first.items[1].captions == ("a 1 sees b", "b sees a 1")
    for path in ("saved", "dict", "hub", "hub/data", "moved", "examples.jsonl"):
        suite = load_suite("winoground", tmp_path / path)
        assert [(i.id, i.captions, i.about) for i in suite.items] == [(i.id, i.captions, i.about) for i in first.items]
        assert suite.fingerprint() == first.fingerprint()
        for k in (4, 1, 0, 3):
            for side in (0, 1):
                mode = "RGBA" if (k, side) == (1, 0) else "L" if (k, side) == (1, 1) else "RGB"
                assert torch.equal(pixels(suite.items[k].images[side], 4), picture(2 * k + side, mode=mode))
    assert len({ref for item in suite.items for ref in item.images}) == 10


def test_winoground_refuses_what_is_wrong(tmp_path):
    released.winoground(tmp_path, 4)
    file, lines = tmp_path / "examples.jsonl", (tmp_path / "examples.jsonl").read_text().splitlines()

    def refuse(pattern, line, **change):
        row = {**json.loads(lines[line]), **change}
        row = {key: value for key, value in row.items() if value is not ...}
        file.write_text("\n".join([*lines[:line], json.dumps(row), *lines[line + 1 :]]))
        refuses(f"examples.jsonl: line {line + 1}: {pattern}", "winoground", tmp_path)

    refuse("no field 'caption_1'; found id, image_0", 2, caption_1=...)
    refuse("num_main_preds is '1', expected a whole number", 1, num_main_preds="1")
    refuse("collapsed_tag is '', expected a text that is not empty", 0, collapsed_tag="")
    refuse("id is True", 0, id=True)
    refuse("id 0 was there before, in .*examples.jsonl: line 1", 3, id=0)
    file.write_text("\n".join([*lines[:1], "{", *lines[1:]]))
    refuses("examples.jsonl: line 2: not JSON", "winoground", tmp_path)
    file.write_text('{"id": 0, "id": 1}')
    refuses("examples.jsonl: line 1: 'id' is there twice", "winoground", tmp_path)
    file.write_text('{"id": "a \\ud83d ring"}')
    refuses("examples.jsonl: line 1: not Unicode: half a character in ", "winoground", tmp_path)
    file.write_text("\n")
    refuses("no examples in it", "winoground", tmp_path)
    file.write_bytes(b'{"id": "\xff"}')
    refuses("examples.jsonl: not UTF-8", "winoground", tmp_path)
    file.write_text("\n".join(lines))
    for gone in ("ex_1_img_0.png", "ex_3_img_1.png"):
        (tmp_path / "images" / gone).unlink()
    refuses("2 of 8 images are not in .*images:\n.*line 2: ex_1_img_0\n.*line 4: ex_3_img_1$", "winoground", tmp_path)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images.zip").touch()
    refuses("images does not exist; unpack .*images.zip", "winoground", tmp_path)
    file.unlink()
    refuses("expected a data set of save_to_disk, data/test-.*parquet, or examples.jsonl", "winoground", tmp_path)


def test_tables_refuse_what_is_wrong(tmp_path):
    import datasets

    images, rows = ("image_0", "image_1"), winoground_table(3)
    rows[1]["image_1"] = None
    suite = load_suite("winoground", as_parquet(rows, tmp_path / "a", *images))
    with pytest.raises(ConfigError, match=r"a: row 1: .*a\[1\].image_1: no image"):
        pixels(suite.items[1].images[1], 4)
    for row in rows:
        del row["tag"]
    refuses("b: no column tag; its columns: id, caption_0", "winoground", as_parquet(rows, tmp_path / "b", *images))
    plain = [{**row, "tag": "Noun", "image_0": "x.png"} for row in rows]
    refuses(r"c: no column image_0 \(images\)", "winoground", as_parquet(plain, tmp_path / "c", "image_1"))
    rows = winoground_table(3)
    rows[2]["id"] = 1
    refuses("d: row 2: id 1 was there before, in .*row 1", "winoground", as_parquet(rows, tmp_path / "d", *images))
    datasets.DatasetDict({"val": hub(winoground_table(2), *images)}).save_to_disk(tmp_path / "e")
    refuses("e: no split test; its splits: val", "winoground", tmp_path / "e")
    (tmp_path / "f.parquet").write_bytes(b"PAR1")
    refuses("f.parquet: not readable as parquet", "winoground", tmp_path / "f.parquet")
    (tmp_path / "g").mkdir()
    (tmp_path / "g/state.json").write_text("{}")
    refuses("g: no whole data set of save_to_disk", "winoground", tmp_path / "g")


# ARO's VG-Relation and VG-Attribution.


def test_the_symmetric_relations_are_157():
    names = [line for line in SYMMETRIC.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(names) == len(set(names)) == 157 and {"near", "next to", "beside", "with", "of"} <= set(names)
    assert not {"on", "riding", "left of", "to the left of", "wearing", "behind"} & set(names)
    assert all(name == name.strip() for name in names)


def test_symmetric_relations_and_rare_ones_by_hand(tmp_path):
    """on: 3 of 4 right; riding: the only case wrong; near and next to, symmetric: left out, whatever they are."""
    relations = ["on", "near", "on", "riding", "next to", "on", "on", "near"]
    right = [1, 1, 1, 0, 0, 0, 1, 1]
    released.vg_relation(tmp_path, len(relations))
    edit(tmp_path / "visual_genome_relation.json",
         lambda rows: [row.update(relation_name=name) for row, name in zip(rows, relations, strict=True)])  # fmt: skip
    suite = load_suite("vg_relation", tmp_path)
    metrics = suite.metrics(suite.outcomes([[[1.0], [1.0 - r]] for r in right]))  # where it is not right, it is a tie
    assert metrics == {
        "accuracy/macro": (75 + 0) / 2, "accuracy": 60.0, "accuracy/all": 62.5,
        "accuracy/relation=on": 75.0, "accuracy/relation=riding": 0.0,
    }  # fmt: skip
    assert suite.summary["accuracy"] == 5 and suite.summary["accuracy/all"] == 8
    assert suite.notes == ["macro mean over 2 of 4 kinds; 3 of 8 cases are left out of it"]


def test_rare_attribute_pairs_by_hand(tmp_path):
    """25 cases of a pair count, 24 do not; the order of the two attributes tells pairs apart."""
    pairs = [["white", "tall"]] * 25 + [["tall", "white"]] * 24 + [["old", "red"]] * 30
    released.vg_attribution(tmp_path, len(pairs))
    edit(tmp_path / "visual_genome_attribution.json",
         lambda rows: [row.update(attributes=pair) for row, pair in zip(rows, pairs, strict=True)])  # fmt: skip
    suite = load_suite("vg_attribution", tmp_path)
    right = [k < 5 for k in range(25)] + [True] * 24 + [k < 15 for k in range(30)]
    metrics = suite.metrics(suite.outcomes([[[float(r)], [0.5]] for r in right]))
    assert metrics["accuracy/macro"] == (100 * 5 / 25 + 100 * 15 / 30) / 2 == 35.0
    assert metrics["accuracy"] == 100 * (20 / 55) and metrics["accuracy/all"] == 100 * (44 / 79)
    assert {name for name in metrics if "=" in name} == {"accuracy/attributes=white_tall", "accuracy/attributes=old_red"}
    edit(tmp_path / "visual_genome_attribution.json", lambda rows: rows.__delitem__(slice(20, None)))
    assert list(load_suite("vg_attribution", tmp_path).measures) == ["accuracy/all"]


def test_vg_cases_are_cut_to_their_box(tmp_path):
    suite = load_suite("vg_relation", released.vg_relation(tmp_path, 5))
    for k, item in enumerate(suite.items):
        crop = (k % 3, 1, k % 3 + 4, 4 + k % 2)
        jpeg = Image.open(tmp_path / f"images/{k % 4}.jpg").convert("RGB")
        assert torch.equal(pixels(item.images[0], 4), transformed(jpeg.crop(crop)))
        assert item.captions[0].startswith("the horse") and item.captions[1].startswith("the grass")


def test_vg_refuses_what_is_wrong(tmp_path):
    def refuse(pattern, name="vg_relation", row=2, **change):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        getattr(released, name)(folder, 6)
        file = folder / {"vg_relation": "visual_genome_relation.json", "vg_attribution": "visual_genome_attribution.json"}[name]
        edit(file, lambda rows: rows[row].update(change))
        refuses(f"{file.name}: row {row}: {pattern}", name, folder)

    refuse("bbox_w is '4', expected a number", bbox_w="4")
    refuse("box of 0 x 3 pixels is empty", bbox_w=0)
    refuse("relation_name is None", relation_name=None)
    refuse("true_caption is ' ', expected a text that is not empty", true_caption=" ")
    refuse("attributes is .'old'., expected two texts", "vg_attribution", attributes=["old"])
    refuse("attributes is 'old', expected a list", "vg_attribution", attributes="old")
    folder = tmp_path / "vg_relation"
    (folder / "images/3.jpg").unlink()
    edit(folder / "visual_genome_relation.json", lambda rows: rows[2].update(true_caption="x"))
    refuses("json: 1 of 4 images are not in .*:\n.*row 3: 3.jpg", "vg_relation", folder)
    edit(folder / "visual_genome_relation.json", lambda rows: rows.insert(1, 5))
    refuses("row 1: an object expected, found 5", "vg_relation", folder)
    (folder / "visual_genome_relation.json").write_text("[]")
    refuses("a list of cases expected", "vg_relation", folder)
    (folder / "visual_genome_relation.json").unlink()
    refuses("expected visual_genome_relation.json in this folder, found none", "vg_relation", folder)


def test_vg_cases_that_are_there_twice_count_twice_and_are_told(tmp_path):
    released.vg_relation(tmp_path, 6)
    edit(tmp_path / "visual_genome_relation.json", lambda rows: rows.append(rows[0]))
    suite = load_suite("vg_relation", tmp_path)
    assert len(suite.items) == 7 and suite.notes[0] == "1 of 7 cases repeat an earlier one; they count, as in published figures"


# ARO's Order sets.


def test_order_reads_what_was_released(tmp_path):
    columns = ("correct_caption", "hard_text_1", "hard_text_2", "hard_text_3", "hard_text_4")
    rows = [
        {"images": {"bytes": released.encoded(k), "path": None}, **{c: f"{c} {k}" for c in columns}} for k in range(5)
    ]
    rows[3]["hard_text_2"] = rows[3]["correct_caption"]
    suite = load_suite("coco_order", as_parquet(rows, tmp_path / "hub/data", "images").parent)
    assert suite.name == "coco_order" and suite.items[2].captions == tuple(f"{c} 2" for c in columns)
    assert torch.equal(pixels(suite.items[4].images[0], 4), picture(4)) and suite.chance["accuracy"] == 20.0
    assert suite.notes == ["in 1 of 5 cases a shuffle changes nothing: never right in accuracy_strict"]
    del rows[1]["hard_text_4"]
    hub(rows, "images").save_to_disk(tmp_path / "saved")  # the absent text becomes null
    refuses("saved: row 1: hard_text_4 is None, expected a text", "coco_order", tmp_path / "saved")
    file = released.coco_order(tmp_path, 6) / "coco_karpathy_test.json"
    assert load_suite("coco_order", file).items[1].captions[0] == "a dog 1 on a mat"
    edit(file, lambda found: found[4]["caption_options"].pop())
    refuses("json: row 4: caption_options: the true caption and 4 shuffles expected", "coco_order", file)
    file = released.flickr30k_order(tmp_path, 6) / "flickr30k_test.json"
    edit(file, lambda found: found[1].update(image="val2014/gone.jpg"))
    refuses("json: 1 of 5 images are not in .*:\n.*row 1: val2014/gone.jpg", "flickr30k_order", file)
    edit(file, lambda found: found[1].pop("image"))
    refuses("json: row 1: no field 'image'; found caption_options", "flickr30k_order", file)


def test_shuffles_are_generated_from_captions_alone(tmp_path):
    released.coco_retrieval(tmp_path, 4)
    suite = load_suite("coco_order", tmp_path)
    assert suite.name == "coco_order_generated" and suite.chance["accuracy"] == pytest.approx(100 / 3)
    assert len(suite.items) == 5 * 4 + 1 and "not comparable" in suite.notes[-1]
    for k, item in enumerate(suite.items):
        true, within, trigrams = (caption.split() for caption in item.captions)
        assert " ".join(true) == normalise(released.captions(min(k // 5, 3))[k - 5 * min(k // 5, 3)])
        assert sorted(within) == sorted(trigrams) == sorted(true)
        threes = [true[at : at + 3] for at in range(0, len(true), 3)]
        assert [sorted(within[at : at + 3]) for at in range(0, len(true), 3)] == [sorted(three) for three in threes]
        whole, rest = [], list(trigrams)
        while rest:  # whole threes, in another order
            whole.append(next(three for three in threes if rest[: len(three)] == three and three not in whole))
            rest = rest[len(whole[-1]) :]
        assert sorted(whole) == sorted(threes)
    assert sum(item.captions[0] != item.captions[1] for item in suite.items) > 15
    assert sum(item.captions[0] != item.captions[2] for item in suite.items) > 15


FROZEN = (
    "one two three four five six seven eight nine",
    "three one two four six five nine seven eight",
    "four five six seven eight nine one two three",
)


def test_a_shuffle_depends_on_seed_and_number_alone(tmp_path):
    said = released.captions(0) + released.captions(1)
    whole = generate(said)
    assert whole == generate(said) == generate(list(said)) and generate(said[:3]) == whole[:3]
    assert generate(said, ["trigrams"]) == [(true, last) for true, _, last in whole]
    assert generate(said, seed=1) != whole and generate(said[:1] * 9)[1:] != generate(said[:1] * 9)[:-1]
    assert generate(["one two three four five six seven eight nine"], seed=3) == [FROZEN]
    assert normalise('A "Dog" (small); on  the: mat!') == "a dog small on the mat"
    assert len(normalise("a " * 50).split()) == 30
    file = released.coco_retrieval(tmp_path, 2) / "coco_karpathy_test.json"
    tagged = "perturbation nouns_and_adj: takes a part-of-speech tagger; give the released"
    refuses(tagged, "coco_order", file, perturbations="trigrams,nouns_and_adj")
    refuses("perturbation 'words': expected one of within_trigrams, trigrams", "coco_order", file, perturbations=["words"])


# Captions: retrieval.


def test_retrieval_is_the_same_in_all_its_files(tmp_path):
    first = load_suite("coco_retrieval", released.coco_retrieval(tmp_path, 5))
    assert [item.id for item in first.items] == [f"val2014/{k}.jpg" for k in range(5)]
    assert len(first.texts) == 26 and first.texts[20] == (released.captions(3)[5],)
    said = [[{"raw": text} for text in released.captions(k)] for k in range(5)]
    entries = [
        {"filepath": "val2014", "filename": f"{k}.jpg", "split": "test", "sentences": raw} for k, raw in enumerate(said)
    ]
    released.dump(tmp_path / "dataset_coco.json", {"images": [{**entries[0], "filename": "9.jpg", "split": "train"}, *entries]})
    released.dump(
        tmp_path / "coco_test_karpathy.json",
        {
            "images": [{"id": 70 - k, "file_name": f"{k}.jpg"} for k in range(5)],
            "annotations": [{"image_id": 70 - k, "caption": text} for k in range(5) for text in released.captions(k)],
        },
    )
    refuses("found more than one; name the file", "coco_retrieval", tmp_path)
    for name, images in (("dataset_coco.json", None), ("coco_test_karpathy.json", tmp_path / "val2014")):
        suite = load_suite("coco_retrieval", tmp_path / name, images=images)
        assert suite.texts == first.texts and [i.captions for i in suite.items] == [i.captions for i in first.items]
        assert [q.own.tolist() for q in suite.queries] == [q.own.tolist() for q in first.queries]
        assert torch.equal(pixels(suite.items[2].images[0], 4), pixels(first.items[2].images[0], 4))
    flat = load_suite("coco_retrieval", tmp_path / "dataset_coco.json", images=str(tmp_path / "val2014"))  # without its folders
    assert torch.equal(pixels(flat.items[2].images[0], 4), pixels(first.items[2].images[0], 4))
    assert load_suite("coco_retrieval", tmp_path / "dataset_coco.json", split="test").name == "coco_retrieval"
    refuses("no split 'val'; its splits: test, train", "coco_retrieval", tmp_path / "dataset_coco.json", split="val")


def test_retrieval_by_hand(tmp_path):
    """Three images of 5 captions each; captions 0 and 5 tie between two images, caption 3 prefers image 2."""
    suite = load_suite("flickr30k_retrieval", released.flickr30k_retrieval(tmp_path, 3))
    scores = np.zeros((15, 3))
    scores[np.arange(15), np.arange(15) // 5] = 2
    scores[0, 1] = scores[5, 0] = 2  # ties: image 0 is listed first
    scores[3, 2] = 9
    metrics = suite.metrics(suite.outcomes(scores))
    assert metrics["image_retrieval_recall@1"] == 100 * (13 / 15)  # caption 3 is wrong, 5's tie is lost, 0's won
    assert metrics["image_retrieval_recall@1_strict"] == 100 * (12 / 15)
    assert metrics["image_retrieval_recall@5"] == metrics["image_retrieval_recall@5_strict"] == 100.0
    assert metrics["text_retrieval_recall@1"] == 100 * (1 / 3)  # image 0 wins a tie with caption 5, image 1 loses one with 0
    assert metrics["text_retrieval_recall@1_strict"] == 0.0 and metrics["text_retrieval_recall@5_strict"] == 100.0
    assert suite.ties(suite.outcomes(scores)) == 2 + 2


def test_captions_refuse_what_is_wrong(tmp_path):
    def refuse(pattern, change, n=4):
        file = released.coco_retrieval(tmp_path, n) / "coco_karpathy_test.json"
        edit(file, change)
        refuses(f"coco_karpathy_test.json: {pattern}", "coco_retrieval", file)
        refuses(f"coco_karpathy_test.json: {pattern}", "coco_order", file)

    refuse("row 2: caption is 'a dog', expected a list", lambda rows: rows[2].update(caption="a dog"))
    refuse("row 1: a list of captions expected, none of them empty", lambda rows: rows[1].update(caption=["a", " "]))
    refuse("row 0: a list of captions expected", lambda rows: rows[0].update(caption=[]))
    refuse("row 3: no field 'image'", lambda rows: rows[3].pop("image"))
    refuse("row 3: image 'val2014/1.jpg' was there before, in .*row 1", lambda rows: rows[3].update(image="val2014/1.jpg"))
    refuse("1 of 4 images are not in .*:\n.*row 2: val2014/x.jpg", lambda rows: rows[2].update(image="val2014/x.jpg"))
    refuse("no images in it", lambda rows: rows.clear())
    file = tmp_path / "annotations.json"
    released.dump(file, {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "a"}]})
    refuses(r"annotations.json: annotations\[0\]: image_id 2 is none of images", "coco_retrieval", file)
    released.dump(file, {"captions": []})
    refuses("a list of images with captions, Karpathy's dataset", "coco_retrieval", file)


def test_karpathys_and_cocos_files_refuse_what_is_wrong(tmp_path):
    """dataset_coco.json and COCO's annotations: fields, images and rows that are there twice."""
    released.coco_retrieval(tmp_path, 4)

    def karpathy(pattern, k, **change):
        said = [{"raw": "a dog"}]
        rows = [{"filepath": "val2014", "filename": f"{n}.jpg", "split": "test", "sentences": said} for n in range(4)]
        rows[k] = {key: value for key, value in {**rows[k], **change}.items() if value is not ...}
        released.dump(tmp_path / "dataset_coco.json", {"images": rows})
        refuses(f"dataset_coco.json: {pattern}", "coco_retrieval", tmp_path / "dataset_coco.json")

    karpathy(r"images\[2\]: no field 'split'", 2, split=...)
    karpathy(r"images\[1\]: filename is 7, expected a text", 1, filename=7)
    karpathy(r"images\[3\]: no field 'raw'", 3, sentences=[{"tokens": ["a"]}])
    karpathy(r"images\[3\]: a list of captions expected", 3, sentences=[])
    karpathy(r"images\[3\]: image 'val2014/1.jpg' was there before, in .*images\[1\]", 3, filename="1.jpg")
    karpathy(r"1 of 4 images are not in .*:\n.*images\[0\]: val2014/9.jpg", 0, filename="9.jpg")

    def coco(pattern, images=None, annotations=None):
        images = images or [{"id": 1, "file_name": "val2014/0.jpg"}]
        annotations = annotations or [{"image_id": 1, "caption": "a dog"}]
        released.dump(tmp_path / "coco_test_karpathy.json", {"images": images, "annotations": annotations})
        refuses(f"coco_test_karpathy.json: {pattern}", "coco_retrieval", tmp_path / "coco_test_karpathy.json")

    coco(r"images\[0\]: id is '1', expected a whole number", [{"id": "1", "file_name": "val2014/0.jpg"}])
    coco(r"images\[1\]: id 1 was there before, in .*images\[0\]", [{"id": 1, "file_name": f"val2014/{k}.jpg"} for k in (0, 1)])
    coco(r"images\[1\]: image 'val2014/0.jpg' was there", [{"id": k, "file_name": "val2014/0.jpg"} for k in (1, 2)])
    coco(r"annotations\[0\]: caption is ' ', expected a text", annotations=[{"image_id": 1, "caption": " "}])
    coco(r"annotations\[0\]: no field 'caption'", annotations=[{"image_id": 1}])
    coco(r"1 of 1 images are not in .*:\n.*images\[0\]: gone.jpg", [{"id": 1, "file_name": "gone.jpg"}])


# SugarCrepe and MMVP-VLM.


def test_sugarcrepe_has_seven_files(tmp_path):
    suite = load_suite("sugarcrepe", released.sugarcrepe(tmp_path, 0))
    assert [suite.summary[f"accuracy/category={c}"] for c in released.SUGAR] == [2, 3, 4, 5, 6, 7, 8]
    assert suite.items[3].id == "add_obj/3" and suite.items[3].captions == ("a cat 1", "a dog 1 add_obj")
    right = [item.about["category"] == "swap_obj" for item in suite.items]
    metrics = suite.metrics(suite.outcomes([[[float(r)], [0.5]] for r in right]))
    assert metrics["accuracy"] == 100 * (8 / 35) and metrics["accuracy/macro"] == pytest.approx(100 / 7)
    moved = load_suite("sugarcrepe", tmp_path / "data", images=tmp_path / "val2017")
    assert [item.id for item in moved.items] == [item.id for item in suite.items]


def test_sugarcrepe_refuses_what_is_wrong(tmp_path):
    file = released.sugarcrepe(tmp_path, 0) / "data/add_obj.json"
    edit(file, lambda rows: rows["3"].pop("negative_caption"))
    refuses("add_obj.json: row 3: no field 'negative_caption'; found filename, caption", "sugarcrepe", tmp_path)
    edit(file, lambda rows: rows.update({"3": rows["0"]}))
    refuses(r"add_obj.json: row 3: item .* was there before, in .*row 0", "sugarcrepe", tmp_path)
    edit(file, lambda rows: rows.update({"3": {**rows["0"], "filename": "gone.jpg"}}))
    refuses("add_obj.json: 1 of 4 images are not in .*:\n.*row 3: gone.jpg", "sugarcrepe", tmp_path)
    file.write_text('{"0": {}, "0": {}}')
    refuses("add_obj.json: '0' is there twice", "sugarcrepe", tmp_path)
    file.write_text("[]")
    refuses("add_obj.json: an object of items expected", "sugarcrepe", tmp_path)
    file.unlink()
    refuses("expected add_obj.json in this folder, found none", "sugarcrepe", tmp_path)
    refuses("image folder .*val2017 does not exist", "sugarcrepe", released.sugarcrepe(tmp_path, 0) / "data")


def test_mmvp_pairs_by_number(tmp_path):
    released.mmvp(tmp_path, 6)
    suite = load_suite("mmvp", tmp_path)
    assert [item.id for item in suite.items] == ["1-2", "3-4", "5-6", "7-8", "9-10", "11-12"]
    assert suite.items[2].about == {"pattern": "Camera Perspective"}
    assert suite.items[2].captions == ("a photo of left, facing", "a photo of right")
    assert suite.items[2].images[1].name.endswith("Camera_Perspective/6.jpg")
    lines = (tmp_path / "Questions.csv").read_text().splitlines()
    (tmp_path / "Questions.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert load_suite("mmvp", tmp_path).items == suite.items
    right = [1, 0, 1, 1, 0, 0]
    metrics = suite.metrics(suite.outcomes([[[1.0, 0.0], [0.0, r]] for r in right]))
    assert metrics["pair/macro"] == metrics["pair"] == 100.0  # a tie of the second statement alone: the script's rule
    assert metrics["pair_strict"] == metrics["pair_strict/macro"] == 50.0


def test_mmvp_refuses_what_is_wrong(tmp_path):
    released.mmvp(tmp_path, 6)
    file, lines = tmp_path / "Questions.csv", (tmp_path / "Questions.csv").read_text().splitlines()

    def refuse(pattern, *rows):
        file.write_text("\n".join(rows))
        refuses(pattern, "mmvp", tmp_path)

    refuse("csv: line 1: the columns Question ID, Type, Statement expected", "id,Type,Statement", *lines[1:])
    refuse(r"csv: line 3: .* expected, found \['2', 'Orientation'\]", *lines[:2], "2,Orientation", *lines[3:])
    refuse("csv: line 3: Question ID is 'two'", *lines[:2], "two,Orientation,x", *lines[3:])
    refuse("csv: line 4: Question ID 2 was there before, in .*line 3", *lines[:3], "2,Orientation,x", *lines[3:])
    refuse("csv: line 2: question 1 has no partner 2", *lines[:2], *lines[3:])
    refuse("csv: line 4: question 4 has no partner 3", *lines[:3], *lines[4:])
    refuse("csv: line 3: Type is 'Text', but 'Orientation' for question 1", *lines[:2], "2,Text,x", *lines[3:])
    refuse("no questions in it", lines[0])
    (tmp_path / "MLLM_VLM Images/Camera_Perspective/6.jpg").unlink()
    refuse("1 of 12 images are not in .*:\n.*line 7: Camera_Perspective/6.jpg", *lines)


# Zero-shot classification.


def test_folders_are_classes(tmp_path):
    released.zeroshot(tmp_path, 30)
    (tmp_path / ".hidden").mkdir()
    released.save(tmp_path / "class_1/deep/a.PNG", 5)
    suite = load_suite("zeroshot", tmp_path)
    assert suite.texts == [(f"a photo of a class {k}.",) for k in range(7)] and len(suite.items) == 31
    assert [item.about["label"] for item in suite.items] == sorted(item.about["label"] for item in suite.items)
    assert "class_1/deep/a.PNG" in [item.id for item in suite.items]
    names, templates = tmp_path / "classes.txt", tmp_path / "templates.txt"
    names.write_text("\n".join(["cat"] * 2 + ["dog"] * 5) + "\n")  # two classes may share a name: ImageNet's do
    templates.write_text("a {}.\n\nmany {c}\n")
    suite = load_suite("zeroshot", tmp_path, classes=names, templates=templates)
    assert suite.texts[1] == ("a cat.", "many cat") and suite.texts[6] == ("a dog.", "many dog")
    names.write_text("\n".join(f"class_{k}\tname {k}" for k in reversed(range(9))))
    assert load_suite("zeroshot", tmp_path, classes=names).texts[2] == ("a photo of a name 2.",)


def test_classes_and_templates_refuse_what_is_wrong(tmp_path):
    root, names, templates = tmp_path / "images", tmp_path / "classes.txt", tmp_path / "templates.txt"
    released.zeroshot(root, 30)
    for content, pattern in (
        ("a\nb", "2 names, expected one for each of 7 classes"),
        ("class_0\ta\nclass_1", "line 2: FOLDER<TAB>NAME expected"),
        ("class_0\ta\nclass_0\tb", "line 2: folder 'class_0' was there before, in .*line 1"),
        ("class_0\ta", "no name for 6 of 7 classes: class_1, class_2"),
    ):
        names.write_text(content)
        refuses(f"classes.txt: {pattern}", "zeroshot", root, classes=names)
    for content, pattern in (
        ("a {}\na photo", "line 2: one {} for the class name expected"),
        ("a {} of {c}", "line 1: one {} for"),
        ("a {name}", "line 1: one {} for"),
        ("a {}\n\na {}", "line 3: template 'a {}' was there before, in .*line 1"),
        ("\n", "no templates in it"),
    ):
        templates.write_text(content)
        refuses(f"templates.txt: {pattern}", "zeroshot", root, templates=templates)
    refuses("nowhere.txt: No such file", "zeroshot", root, templates=tmp_path / "nowhere.txt")
    (root / "empty").mkdir()
    refuses("empty: no images in it", "zeroshot", root)
    refuses("images/empty: one folder a class expected", "zeroshot", root / "empty")


@pytest.mark.parametrize("count", [10, 100])
def test_cifar_is_read_from_its_records(count, tmp_path):
    images, labels = released.cifar_records(12, count)
    suite = load_suite(f"cifar{count}", getattr(released, f"cifar{count}")(tmp_path, 12))
    assert [item.about["label"] for item in suite.items] == labels and suite.items[3].about["class"] == "name 3"
    assert suite.texts == [(f"a photo of a name {k}.",) for k in range(count)] and suite.chance["top1"] == 100 / count
    for k in (0, 11):
        assert torch.equal(pixels(suite.items[k].images[0], 32), torch.from_numpy(images[k].reshape(3, 32, 32)))
    (inner,) = tmp_path.glob("cifar*")
    assert load_suite(f"cifar{count}", inner).texts == suite.texts
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {k}" for k in range(count)))
    assert load_suite(f"cifar{count}", tmp_path, classes=names).texts[3] == ("a photo of a thing 3.",)


def test_cifar_refuses_what_is_wrong(tmp_path):
    refuses("no cifar-10-batches-bin/test_batch.bin in it$", "cifar10", tmp_path)
    python = tmp_path / "cifar-10-batches-py"
    python.mkdir()
    for path in (tmp_path, python):
        refuses("can run code when it is read, does not serve: unpack cifar-10-binary.tar.gz", "cifar10", path)
    file = released.cifar10(tmp_path, 12) / "cifar-10-batches-bin/test_batch.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refuses("test_batch.bin: 36,875 bytes are no whole number of records of 3073", "cifar10", tmp_path)
    file.write_bytes(content[: 2 * 3073] + b"\x0b" + content[2 * 3073 + 1 :])
    refuses("test_batch.bin: row 2: label 11, expected 0 to 9", "cifar10", tmp_path)
    file.write_bytes(b"")
    refuses("test_batch.bin: 0 bytes are no", "cifar10", tmp_path)
    file.write_bytes(content)
    file.with_name("batches.meta.txt").write_text("cat\n")
    refuses("batches.meta.txt: 1 names, expected 10", "cifar10", tmp_path)
    file.with_name("batches.meta.txt").unlink()
    refuses("batches.meta.txt: No such file", "cifar10", tmp_path)
