"""Small photographs with captions, cut from those that scikit-image ships, and files of each kind that `data.source` takes."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

FILES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png")
KINDS = {"jpg": "JPEG", "png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass
class Photo:
    key: str
    suffix: str
    content: bytes
    captions: list[str]

    @property
    def name(self) -> str:
        return f"{self.key}.{self.suffix}"


def whole() -> list:
    """scikit-image's photographs, as PIL has them."""
    import skimage
    from PIL import Image

    return [Image.open(Path(skimage.__path__[0]) / "data" / file).convert("RGB") for file in FILES]


def make(n: int, most: int = 3) -> list[Photo]:
    """n photographs in four formats and of several shapes, the k-th with 1 + k % most captions."""
    small = [photo.resize((160, 120)) for photo in whole()]
    found = []
    for k in range(n):
        left, top = 7 * k % 80, 11 * k % 60
        cut = small[k % len(small)].crop((left, top, left + 40 + k % 3, top + 40 - k % 5))
        suffix, kind = list(KINDS.items())[k % len(KINDS)]
        cut.save(content := io.BytesIO(), kind)
        found.append(Photo(f"{k:06d}", suffix, content.getvalue(), [f"cup {k} {'abc'[j]}" for j in range(1 + k % most)]))
    return found


def _files(folder: Path, photos: list[Photo]) -> Path:
    folder.mkdir(parents=True)
    for photo in photos:
        (folder / photo.name).write_bytes(photo.content)
    return folder


def tsv(folder: Path, photos: list[Photo]) -> dict:
    images = _files(folder / "images", photos)
    rows = [f"{photo.name}\t{caption}" for photo in photos for caption in photo.captions]
    (folder / "photos.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return {"source": folder / "photos.tsv", "images": images}


def coco(folder: Path, photos: list[Photo]) -> dict:
    """Annotations in disorder; what counts is the order of their ids."""
    images = _files(folder / "images", photos)
    entries = [{"id": 100 + k, "file_name": photo.name, "height": 1} for k, photo in enumerate(photos)]
    said = [(100 + k, caption) for k, photo in enumerate(photos) for caption in photo.captions]
    notes = [{"id": number, "image_id": image, "caption": caption} for number, (image, caption) in enumerate(said)]
    (folder / "captions.json").write_text(json.dumps({"images": entries, "annotations": notes[::-1], "info": {}}))
    return {"source": folder / "captions.json", "images": images}


def karpathy(folder: Path, photos: list[Photo]) -> dict:
    """Files in two folders, three splits; one image more in the one that is not trained on."""
    where = ["train2014" if k % 2 else "val2014" for k in range(len(photos))]
    for name in sorted(set(where)):
        _files(folder / "images" / name, [photo for photo, at in zip(photos, where, strict=True) if at == name])
    entries = [
        {
            "filepath": at, "filename": photo.name, "split": "restval" if k % 4 == 0 else "train", "cocoid": k,
            "sentences": [{"raw": caption, "tokens": caption.split()} for caption in photo.captions],
        }
        for k, (photo, at) in enumerate(zip(photos, where, strict=True))
    ]  # fmt: skip
    entries.insert(3, {**entries[0], "split": "test", "sentences": [{"raw": "of the test"}]})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return {"source": folder / "dataset_coco.json", "images": folder / "images"}


def pairs(folder: Path, photos: list[Photo]) -> dict:
    """An entry a caption, as of training; every other image as of validation, with a list."""
    images = _files(folder / "images", photos)
    entries = []
    for k, photo in enumerate(photos):
        name = f"val2014/{photo.name}"  # which lies in the folder itself
        texts = [photo.captions] if k % 2 else photo.captions
        entries += [{"image": name, "caption": text, "image_id": f"coco_{k}"} for text in texts]
    (folder / "coco_karpathy_train.json").write_text(json.dumps(entries))
    return {"source": folder / "coco_karpathy_train.json", "images": images}


def sidecars(folder: Path, photos: list[Photo]) -> dict:
    for k, photo in enumerate(photos):
        inside = folder / ("a" if k < len(photos) // 2 else "b/c")
        inside.mkdir(parents=True, exist_ok=True)
        (inside / photo.name).write_bytes(photo.content)
        (inside / f"{photo.key}.txt").write_text("\n".join(photo.captions) + "\n\n")
    return {"source": folder}


def saved(folder: Path, photos: list[Photo]) -> dict:
    import datasets

    columns = {
        "number": list(range(len(photos))),
        "image": [{"bytes": photo.content, "path": photo.name} for photo in photos],
        "captions": [photo.captions for photo in photos],
    }
    kinds = {"number": datasets.Value("int64"), "image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    return {"source": folder}


def tar(path: Path, photos: list[Photo]) -> Path:
    """A shard, as webdataset's own writer makes it: one caption in the txt, several in the json."""
    import webdataset

    with webdataset.TarWriter(str(path)) as writer:
        for photo in photos:
            said = {"txt": photo.captions[0]} if len(photo.captions) == 1 else {"json": {"caption": photo.captions}}
            writer.write({"__key__": f"x/{photo.key}", photo.suffix: photo.content, **said})
    return path


def plain_tar(path: Path, members: dict[str, bytes]) -> Path:
    """An archive of these members, in the plainest format: a header is one block."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shards(folder: Path, photos: list[Photo], of: int = 5) -> dict:
    """Shards of `of` photographs, the last of the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    last = 0
    for last, first in enumerate(range(0, len(photos), of)):
        tar(folder / f"{last:02d}.tar", photos[first : first + of])
    return {"source": f"{folder}/{{00..{last:02d}}}.tar"}


def pipe(folder: Path, photos: list[Photo], of: int = 5) -> dict:
    return {"source": f"pipe:cat {shards(folder, photos, of)['source']}"}


FORMATS = {
    "tsv": tsv, "coco": coco, "karpathy": karpathy, "pairs": pairs, "sidecars": sidecars, "saved": saved, "shards": shards,
    "pipe": pipe,
}  # fmt: skip


def sets(data: dict) -> list[str]:
    """A format's keys as the command line takes them."""
    return [part for key, value in data.items() for part in ("--set", f"data.{key}={value}")]
