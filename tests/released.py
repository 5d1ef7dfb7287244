"""Small evaluation sets in the formats in which the real ones were released."""

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

RELATIONS = ("on", "near", "riding", "next to", "left of")  # near and next to are symmetric
TAGS = ("Object", "Relation", "Both")
PATTERNS = ("Orientation", "Camera Perspective", "Text")
SUGAR = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def picture(seed: int, size=(8, 6), mode="RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode)


def save(path: Path, seed: int, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **how).save(path)


def encoded(seed: int, **how) -> bytes:
    with BytesIO() as file:
        picture(seed, **how).save(file, "PNG")
        return file.getvalue()


def dump(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write(name: str, folder: Path, n: int = 30) -> tuple[Path, ...]:
    """Write the suite of this name; returns the path to load it from, nothing for one that is made of no data."""
    if name.startswith("world_"):
        return ()
    return (globals()[name](folder, n),)


def winoground_rows(n: int) -> list[dict]:
    return [
        {
            "id": k, "image_0": f"ex_{k}_img_0", "image_1": f"ex_{k}_img_1",
            "caption_0": f"a {k} sees b", "caption_1": f"b sees a {k}",
            "tag": "Noun", "secondary_tag": ("", "Series", "Symbolic, Series")[k % 3 if k % 4 == 0 else 0],
            "num_main_preds": 1 + (k % 5 == 0), "collapsed_tag": TAGS[k % 3],
        }
        for k in range(n)
    ]  # fmt: skip


def winoground(folder: Path, n: int) -> Path:
    """The older release: examples.jsonl and images/; one image has an alpha channel, one is grey."""
    rows = winoground_rows(n)
    folder.joinpath("examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for k in range(n):
        for side in (0, 1):
            mode = "RGBA" if (k, side) == (1, 0) else "L" if (k, side) == (1, 1) else "RGB"
            save(folder / f"images/ex_{k}_img_{side}.png", 2 * k + side, mode=mode)
    return folder


def vg_rows(n: int, label) -> list[dict]:
    return [
        {
            "image_id": k, "image_path": f"{k % 4}.jpg", "bbox_x": k % 3, "bbox_y": 1, "bbox_w": 4, "bbox_h": 3 + k % 2,
            "true_caption": f"the horse {k} eats grass", "false_caption": f"the grass eats horse {k}", **label(k),
        }
        for k in range(n)
    ]  # fmt: skip


def vg_relation(folder: Path, n: int) -> Path:
    dump(folder / "visual_genome_relation.json", vg_rows(n, lambda k: {"relation_name": RELATIONS[k % 5]}))
    for k in range(4):
        save(folder / f"images/{k}.jpg", k)
    return folder


def vg_attribution(folder: Path, n: int) -> Path:
    """Of n cases one in six is of another, rarer pair."""
    label = lambda k: {"attributes": ["white", "tall"] if k % 6 else ["tall", "white"]}  # noqa: E731
    dump(folder / "visual_genome_attribution.json", vg_rows(n, label))
    for k in range(4):
        save(folder / f"images/{k}.jpg", k)
    return folder


def sugarcrepe(folder: Path, n: int) -> Path:
    for c, category in enumerate(SUGAR):
        rows = {  # keys are not contiguous
            str(3 * k): {"filename": f"{k % 4:012d}.jpg", "caption": f"a cat {k}", "negative_caption": f"a dog {k} {category}"}
            for k in range(2 + c)
        }
        dump(folder / f"data/{category}.json", rows)
    for k in range(4):
        save(folder / f"val2017/{k:012d}.jpg", k)
    return folder


def mmvp(folder: Path, n: int) -> Path:
    """n pairs, in the order of patterns as released; a pattern's folder may have _ for a space."""
    with open(folder / "Questions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Question ID", "Type", "Statement"])
        for k in range(n):
            pattern = PATTERNS[3 * k // n]
            for number, said in ((2 * k + 1, "left, facing"), (2 * k + 2, "right")):
                table.writerow([number, pattern, said])
                save(folder / "MLLM_VLM Images" / pattern.replace(" ", "_") / f"{number}.jpg", number)
    return folder


def captions(k: int) -> list[str]:
    return [f"Photo {k} of a very small dog on a big red mat, number {j}." for j in range(5 + (k == 3))]


def karpathy(folder: Path, n: int, name: str) -> Path:
    """A list of images with captions, one of them with six; images in folders of their own."""
    dump(folder / name, [{"image": f"val2014/{k}.jpg", "caption": captions(k)} for k in range(n)])
    for k in range(n):
        save(folder / f"val2014/{k}.jpg", k)
    return folder


def coco_retrieval(folder: Path, n: int) -> Path:
    return karpathy(folder, n, "coco_karpathy_test.json")


def flickr30k_retrieval(folder: Path, n: int) -> Path:
    return karpathy(folder, n, "flickr30k_test.json")


def order(folder: Path, n: int, name: str) -> Path:
    said = [[f"a dog {k} on a mat", *(f"mat {j} on a {k} dog" for j in range(4))] for k in range(n)]
    rows = [{"image": f"val2014/{k % 4}.jpg", "caption_options": options} for k, options in enumerate(said)]
    dump(folder / name, rows)
    for k in range(4):
        save(folder / f"val2014/{k}.jpg", k)
    return folder


def coco_order(folder: Path, n: int) -> Path:
    return order(folder, n, "coco_karpathy_test.json")


def flickr30k_order(folder: Path, n: int) -> Path:
    return order(folder, n, "flickr30k_test.json")


def zeroshot(folder: Path, n: int) -> Path:
    """Seven classes, of unequal sizes."""
    for k in range(n):
        save(folder / f"class_{k % 7 if k % 3 else 0}/{k}.jpg", k)
    return folder


def cifar_records(n: int, classes: int) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(n)
    return generator.integers(0, 256, (n, 3072), np.uint8), [k % classes for k in range(n)]


def cifar10(folder: Path, n: int) -> Path:
    images, labels = cifar_records(n, 10)
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir()
    np.concatenate([np.array(labels, np.uint8)[:, None], images], axis=1).tofile(inner / "test_batch.bin")
    inner.joinpath("batches.meta.txt").write_text("\n".join(f"name_{k}" for k in range(10)) + "\n\n")
    return folder


def cifar100(folder: Path, n: int) -> Path:
    images, labels = cifar_records(n, 100)
    inner = folder / "cifar-100-binary"
    inner.mkdir()
    both = np.stack([np.full(n, 19), np.array(labels)], axis=1).astype(np.uint8)  # coarse, then fine
    np.concatenate([both, images], axis=1).tofile(inner / "test.bin")
    inner.joinpath("fine_label_names.txt").write_text("\n".join(f"name_{k}" for k in range(100)) + "\n")
    return folder
