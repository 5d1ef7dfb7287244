"""The files that captioned images come in: each kind gives the same samples, in an order that no rank or restart changes."""

import json
import sys
from pathlib import Path

import photos
import pytest
import torch
from test_data import loader, sequence

from fastsds.config import ConfigError, DataConfig
from fastsds.data.sources import open_source

LISTED = [name for name in photos.FORMATS if name != "pipe"]
N = 23


@pytest.fixture(scope="module")
def taken():
    return photos.make(N)


@pytest.fixture(scope="module")
def made(taken, tmp_path_factory):
    """The keys of `data` for each format."""
    folder = tmp_path_factory.mktemp("formats")
    return {name: make(folder / name, taken) for name, make in photos.FORMATS.items()}


def opened(source, seed=0, **options):
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return open_source(DataConfig(source=str(source), **options), seed)


def everything(source, size=16):
    return source.load(torch.arange(len(source)), torch.zeros(len(source), dtype=torch.long), size)


def words(captions):
    """A number for each caption: "cup 12 b" -> 12."""
    return torch.tensor([[int(caption.split()[1])] for caption in captions])


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTED)
def test_every_format_gives_the_same_samples(made, taken, name):
    source, plain = opened(**made[name]), everything(opened(**made["tsv"]))
    assert len(source) == N and source.rows == sum(len(photo.captions) for photo in taken) and not source.sequential
    assert source.captions == [tuple(photo.captions) for photo in taken]
    assert [source.listing.read(i) for i in range(N)] == [photo.content for photo in taken]
    assert list(source.listing.sizes) == [len(photo.content) for photo in taken] and not source.listing.damaged
    found = everything(source)
    assert torch.equal(found.pixels, plain.pixels) and torch.equal(found.digests, plain.digests) and not found.damaged
    rows = source.load_rows(torch.arange(source.rows), 16)
    assert rows.captions == [caption for photo in taken for caption in photo.captions]
    assert torch.equal(everything(opened(**made[name], workers=2)).pixels, plain.pixels)
    assert len(opened(**made[name], samples=7)) == 7


@pytest.mark.parametrize("name", LISTED)
def test_what_the_data_are_does_not_depend_on_where_they_lie(made, taken, tmp_path, name):
    found = opened(**made[name]).identity()
    again = photos.FORMATS[name](tmp_path / "elsewhere", taken)
    assert opened(**again).identity() == found
    other = [*taken[:-1], photos.Photo(taken[-1].key, taken[-1].suffix, taken[-1].content, ["another caption"])]
    assert opened(**photos.FORMATS[name](tmp_path / "other", other)).identity() != found


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_read_the_samples_of_one_rank(made, name, world):
    how = {"tokenize": words, "image_size": 8}
    whole = sequence(opened(**made[name]), 12, **how)
    assert sequence(opened(**made[name]), 12, world, **how) == whole
    for epoch in range(3):
        assert sorted(i for i, visit in whole if visit == epoch) == list(range(N))


@pytest.mark.parametrize("name", LISTED)
def test_a_run_goes_on_in_the_middle_on_other_ranks(made, name):
    """First one rank, then four, then two: in the middle of an epoch and of a shard."""
    how = {"tokenize": words, "image_size": 8}
    whole = sequence(opened(**made[name]), 12, **how)
    found, cursors = [], None
    for first, count, world in ((0, 3, 1), (24, 5, 4), (64, 4, 2)):
        found += sequence(opened(**made[name]), count, world, first=first, cursors=cursors, **how)
        parts = [loader(opened(**made[name]), rank=r, world=world, first=first, cursors=cursors, **how) for r in range(world)]
        for _ in range(count):
            after = torch.stack([next(part)[1] for part in parts]).amax(0)
        cursors = after
    assert found == whole


# -- COCO and Karpathy -------------------------------------------------------------------------------------------------


def test_splits_of_karpathys_file(made, taken):
    data = made["karpathy"]
    assert opened(**data, split="test").captions == [("of the test",)]
    assert len(opened(**data, split="restval")) == len(taken[::4])
    with pytest.raises(ConfigError, match=r"dataset_coco.json: no split val; data.split may be restval, test, train"):
        opened(**data, split="val")
    for name in ("coco", "pairs"):
        with pytest.raises(ConfigError, match=r"json has no splits, and data.split is 'train'; expected null"):
            opened(**made[name], split="train")


def coco_of(*, images=({"id": 1, "file_name": "a.jpg"},), annotations=({"id": 1, "image_id": 1, "caption": "x"},)):
    return {"images": list(images), "annotations": list(annotations)}


BAD_JSON = {
    "no JSON": ("{", "not JSON"),
    "half a character": (coco_of(annotations=[{"id": 1, "image_id": 1, "caption": "a \ud83d"}]), "not Unicode: half a char"),
    "another kind": ({"data": []}, r"expected COCO captions \(images, annotations\), Karpathy's"),
    "no images": (coco_of(images=[], annotations=[]), "no images with captions"),
    "no file name": (coco_of(images=[{"id": 1}]), r"images\[0\]: file_name is missing"),
    "an id twice": (coco_of(images=[{"id": 1, "file_name": n} for n in "ab"]), r"images\[1\]: id 1 is there twice"),
    "instances": (coco_of(annotations=[{"id": 1, "image_id": 1, "bbox": [0]}]), r"annotations\[0\]: caption is missing"),
    "of no image": (coco_of(annotations=[{"id": 1, "image_id": 9, "caption": "x"}]), r"\[0\]: image_id 9 is none of images"),
    "an id as text": (coco_of(images=[{"id": "1", "file_name": "a"}]), r'images\[0\]: id is "1", expected a whole number'),
    "sentences": (
        {"images": [{"sentences": [{"text": "x"}], "filename": "a", "split": "train"}]},
        r"images\[0\].sentences\[0\]: raw is missing",
    ),
    "a list in a list": ([{"image": "a.jpg", "caption": [["x"]]}], r"\[0\].caption: .*no caption: expected a text or a list"),
    "no image": ([{"caption": "x"}], r"\[0\]: image is missing"),
    "no object": (["a.jpg"], r"\[0\]: image is missing"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bad_json_names_file_entry_and_field(tmp_path, name):
    content, message = BAD_JSON[name]
    (tmp_path / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=rf"x\.json.*{message}"):
        opened(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["coco", "karpathy", "pairs", "tsv"])
def test_images_that_are_missing_broken_or_without_caption_are_passed_over(taken, tmp_path, name):
    silent = photos.Photo(taken[2].key, taken[2].suffix, taken[2].content, [])
    data = photos.FORMATS[name](tmp_path / "x", [*taken[:2], silent, *taken[3:]])
    gone = next(data["images"].rglob(taken[5].name))
    gone.unlink()
    next(data["images"].rglob(taken[7].name)).write_bytes(b"no image")
    wrong = {taken[5].name: "No such file", taken[7].name: "not a readable image"}
    if name in ("coco", "karpathy"):  # in the others nothing is said of an image without a caption
        wrong[silent.name] = "no caption"
    with pytest.raises(ConfigError, match=rf"{len(wrong) - 1} of \d+ images(.|\n)*{taken[5].name}: .*No such file"):
        opened(**data)
    source = opened(**data, max_skipped=0.5)
    found = {source.listing.names[row].split("/")[-1]: why for row, why in everything(source).damaged.items()}
    assert set(found) == set(wrong) and all(wrong[file] in found[file] for file in wrong)


def test_one_file_of_two_ids_is_one_image(taken, tmp_path):
    data = photos.coco(tmp_path / "x", taken[:3])
    found = json.loads(data["source"].read_text())
    found["images"].append({"id": 7, "file_name": taken[0].name})
    found["annotations"] += [{"id": 99, "image_id": 7, "caption": c} for c in ("again", taken[0].captions[0])]
    data["source"].write_text(json.dumps(found))
    assert opened(**data).captions == [(*taken[0].captions, "again"), *(tuple(photo.captions) for photo in taken[1:3])]


@pytest.mark.parametrize("name", ["coco", "tsv"])
def test_a_name_that_no_file_can_have_is_one_damaged_image(taken, tmp_path, name):
    data = photos.FORMATS[name](tmp_path / "x", taken[:4])
    text = data["source"].read_text()
    data["source"].write_text(text.replace(taken[1].name, {"coco": r"\u0000", "tsv": "\0"}[name] + taken[1].name))
    with pytest.raises(ConfigError, match="1 of 4 images cannot be used(.|\n)*null byte"):
        opened(**data)
    assert set(everything(opened(**data, max_skipped=0.5)).damaged) == {1}


# -- a folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_sorted_order_and_says_what_is_missing(taken, tmp_path):
    folder = photos.sidecars(tmp_path / "x", taken)["source"]
    (folder / "a" / f"{taken[1].key}.txt").unlink()
    (folder / "a" / f"{taken[3].key}.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "a" / f"{taken[4].key}.txt").write_text(" \n\n")
    (folder / "0.JPG").write_bytes(taken[0].content)
    (folder / "0.txt").write_text("\ufeffone\r\ntwo\none\n", encoding="utf-8")
    (folder / ".hidden.jpg").touch()
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "x.png").touch()
    (folder / "a" / "notes.md").touch()
    with pytest.raises(ConfigError, match=r"3 of 24 images(.|\n)*1.png: no caption\n.*000003.txt is not UTF-8\n.*no caption"):
        opened(folder)
    source = opened(folder, max_skipped=0.2)
    assert source.listing.names == ["0.JPG", *(f"a/{p.name}" for p in taken[:11]), *(f"b/c/{p.name}" for p in taken[11:])]
    assert source.captions[0] == ("one", "two")
    assert set(everything(source).damaged) == {2, 4, 5}


# -- a saved data set --------------------------------------------------------------------------------------------------


def saved(folder, **columns):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return folder


def test_splits_of_a_saved_data_set(made, taken):
    assert len(opened(**made["saved"], split="test")) == 1
    with pytest.raises(ConfigError, match=r"no split val; data.split may be train, test"):
        opened(**made["saved"], split="val")
    one = made["saved"]["source"] / "train"
    assert opened(one).captions == opened(**made["saved"]).captions
    with pytest.raises(ConfigError, match=r"is one split, and data.split is 'train'"):
        opened(one, split="train")


def test_a_saved_data_set_says_which_columns_and_rows_it_cannot_use(tmp_path):
    from PIL import Image

    with pytest.raises(ConfigError, match=r"no column of the type Image; its columns: picture \(binary\), caption \(string\)"):
        opened(saved(tmp_path / "a", picture=[b"x"], caption=["x"]))
    with pytest.raises(ConfigError, match=r"no column named caption, captions, text, sentences, title; its columns: image"):
        opened(saved(tmp_path / "b", image=[Image.new("RGB", (9, 9))], label=[1]))
    with pytest.raises(ConfigError, match=r"row 1: caption: \['x', None\] is no caption"):
        opened(saved(tmp_path / "c", image=[Image.new("RGB", (9, 9))] * 2, caption=[["y"], ["x", None]]))
    (tmp_path / "c" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match=r"c is no whole data set of save_to_disk"):
        opened(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"e is no whole data set of save_to_disk"):  # of no rows it writes no file
        opened(saved(tmp_path / "e", image=[], text=[]))
    folder = saved(tmp_path / "d", image=[Image.new("RGB", (9, 9)), None, Image.new("RGB", (9, 9))], text=["x", "y", None])
    with pytest.raises(ConfigError, match=r"2 of 3 images(.|\n)*row 1: no image in it\n  row 2: no caption"):
        opened(folder)
    assert set(everything(opened(folder, max_skipped=0.7)).damaged) == {1, 2}


def test_a_saved_data_set_is_not_read_to_open_it(tmp_path):
    """Sizes come from where each image begins."""
    import datasets
    import pyarrow

    cells = [{"bytes": bytes(100_000 + k), "path": None} for k in range(100)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"image": cells, "caption": ["x"] * 100}, features=features)
    made.save_to_disk(tmp_path / "x", num_shards=3)
    del made, cells
    before = pyarrow.total_allocated_bytes()
    source = opened(tmp_path / "x")
    source.identity()
    assert pyarrow.total_allocated_bytes() - before < 100_000
    assert source.listing.sizes == [100_000 + k for k in range(100)]


# -- what is named -----------------------------------------------------------------------------------------------------


def test_what_a_source_may_be_is_said_where_it_is_something_else(tmp_path, made):
    (tmp_path / "x.csv").touch()
    (tmp_path / "empty").mkdir()
    for name in ("x.csv", "none.tsv"):
        with pytest.raises(ConfigError, match=rf"data.source: .*{name}.*expected world; a .tsv or .json(.|\n)*pipe:COMMAND"):
            opened(tmp_path / name)
    with pytest.raises(ConfigError, match="empty: no images with captions"):
        opened(tmp_path / "empty")
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ConfigError, match=r"x.parquet: expected it as save_to_disk writes it(.|\n)*load_dataset"):
        opened(tmp_path / "x.parquet")
    for url in ("https://host/00.tar", "hf-hub://x", "s3://b/{0..9}.tar"):
        with pytest.raises(ConfigError, match=r"is not fetched by itself; name a command that does: pipe:curl"):
            opened(url)
    for key, value in (("images", tmp_path), ("split", "train")):
        for name in ("sidecars", "shards"):
            with pytest.raises(ConfigError, match=rf"data.{key} is .* has no use for it; expected null"):
                opened(**made[name], **{key: value})


@pytest.mark.parametrize(("name", "package"), [("saved", "datasets"), ("shards", "webdataset"), ("pipe", "webdataset")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(made, monkeypatch, name, package):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'fastsds\[data\]'"):
        opened(**made[name])
