"""The walk and its streams, batches, and what is done about damaged samples."""

import io
import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from fastsds import quiet
from fastsds.config import ConfigError, DataConfig
from fastsds.data import Batch, Samples, Source
from fastsds.data.cache import PixelCache
from fastsds.data.images import decode_image
from fastsds.data.loader import Loader, SkipLog, ahead
from fastsds.data.sampler import Walk, last_epoch, permutation
from fastsds.data.sources import open_source


class Numbers(Source):
    """A source whose caption is its id. damaged: ids that cannot be used."""

    def __init__(self, n=40, damaged=()):
        self.n, self.damaged = n, set(damaged)

    def __len__(self):
        return self.n

    def load(self, ids, visits, size, second=None):
        pixels = [(ids % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, s, s).contiguous() for s in (size, second or 1)]
        damaged = {k: f"number {i}: bad" for k, i in enumerate(ids.tolist()) if i in self.damaged}
        names = [str(i) for i in ids.tolist()]
        return Samples(pixels[0], names, [f"not {i}" for i in names], ids + 1, ids, second and pixels[1], damaged)


def tokenize(captions):
    return torch.tensor([[int(c.split()[-1])] for c in captions])


def loader(source=None, **options):
    options = {"batch": 8, "streams": 8, "seed": 3, "image_size": 2, "tokenize": tokenize, **options}
    return Loader(source or Numbers(), **options)


def sequence(batches, count, world=1, **options):
    """The samples of some batches as (id, visit), position by position, from the parts of all ranks."""
    parts = [loader(batches, rank=rank, world=world, **options) for rank in range(world)]
    found = []
    for _ in range(count):
        part = [next(one)[0] for one in parts]
        ids, visits = (torch.stack([getattr(p, name) for p in part], 1).flatten().tolist() for name in ("ids", "visits"))
        found += list(zip(ids, visits, strict=True))
    return found


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize(("n", "streams"), [(24, 8), (23, 8), (5, 8), (100, 1)])
def test_each_epoch_is_covered_exactly_once(n, streams, shuffled):
    walk, cursors, found = Walk(n, streams, 7, shuffled), [0] * streams, []
    for p in range(3 * n * streams):
        sample, visit, cursors[p % streams] = walk.advance(p % streams, cursors[p % streams])
        found.append((sample, visit))
    for epoch in range(3 * streams):
        assert sorted(sample for sample, visit in found if visit == epoch) == list(range(n))
    if not shuffled:
        assert [sample for sample, _ in found] == [p % n for p in range(len(found))]


def test_epochs_and_seeds_are_shuffled_apart():
    orders = [permutation(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert not torch.equal(a, torch.arange(50))
        assert all(not torch.equal(a, b) for b in orders[:i])


@pytest.mark.parametrize("damaged", [(), (3, 17, 31)])
@pytest.mark.parametrize("batch", [8, 24, 16])
def test_the_order_depends_on_no_batch_rank_or_restart(damaged, batch):
    """Streams 8, batches across and within them: the same samples at the same positions, each good one once an epoch."""
    source, how = Numbers(50, damaged), {"max_skipped": 0.9}
    whole = sequence(source, 30, batch=8, **how)
    for world in (1, 2, 4, 8):
        assert sequence(source, 240 // batch, world, batch=batch, **how) == whole
    good, last = set(range(50)) - set(damaged), max(visit for _, visit in whole)
    for epoch in range(last - 1):  # streams that passed over more are further: the last two epochs are not whole
        assert sorted(sample for sample, visit in whole if visit == epoch) == sorted(good)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 2)])
def test_a_run_goes_on_where_it_stopped_on_other_ranks(before, after):
    source, how = Numbers(50, (3, 17, 31)), {"max_skipped": 0.9}
    whole = sequence(source, 20, **how)
    parts = [loader(source, rank=rank, world=before, **how) for rank in range(before)]
    for _ in range(7):
        cursors = torch.stack([next(part)[1] for part in parts]).amax(0)  # what engine.most gives
    assert sequence(source, 13, after, first=56, cursors=cursors, **how) == whole[56:]


def test_a_damaged_sample_is_refilled_from_its_own_stream():
    clean, source = sequence(Numbers(4000), 40), Numbers(4000)
    position = 13
    source.damaged = {clean[position][0]}
    found = sequence(source, 40, max_skipped=0.01)
    for p, (a, b) in enumerate(zip(clean, found, strict=True)):
        if p % 8 != position % 8 or p < position:
            assert a == b
        elif p + 8 < len(clean):
            assert b == clean[p + 8]


def test_too_many_damaged_samples_stop_the_run_with_the_list(tmp_path):
    source, log = Numbers(1000, (5, 6)), SkipLog(tmp_path)
    batches = loader(source, max_skipped=0.001, report=log)
    with pytest.raises(ConfigError, match=r"max_skipped is 0.001, and 2 of 1,000 (.|\n)*number [56]: bad\n  number [56]"):
        for _ in range(125):
            next(batches)
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert {row["id"] for row in rows} == {5, 6} and all("bad" in row["why"] and row["epoch"] == 0 for row in rows)
    enough = loader(source, max_skipped=0.002)
    for _ in range(250):  # two epochs: the same two again are still two
        next(enough)


def test_rows_of_what_a_resumed_run_meets_again_are_dropped(tmp_path):
    source, log = Numbers(50, (3, 17, 31)), SkipLog(tmp_path)
    first = loader(source, max_skipped=0.9, report=log)
    for k in range(20):
        _, cursors = next(first)
        if k == 6:
            early = cursors
    whole = log.path.read_text()
    log.go_back(early)
    assert 0 < len(log.path.read_text()) < len(whole)
    again = loader(source, max_skipped=0.9, report=log, first=56, cursors=early)
    for _ in range(13):
        next(again)
    assert log.path.read_text() == whole


def test_a_row_that_was_cut_off_is_no_hindrance(tmp_path):
    log = SkipLog(tmp_path)
    for cursor in (1, 5):
        log({"stream": 0, "cursor": cursor, "id": 3})
    whole = log.path.read_text()
    log.path.write_text('{"stream": 0, "cur\n' + whole + '{"stream": 1')  # a full disk, a power cut
    log.go_back(torch.tensor([9, 9]))
    assert log.path.read_text() == whole


def test_a_sample_that_all_ranks_met_is_in_the_list_once():
    """With shuffled captions every rank reads the whole batch; else a rank meets its own streams alone."""
    source, how = Numbers(50, (3, 17, 31)), {"max_skipped": 0.9}
    for shuffled in (False, True):
        found = {}
        for world in (1, 2):
            rows = found[world] = []
            for rank in range(world):
                batches = loader(source, rank=rank, world=world, report=rows.append, shuffled=shuffled, **how)
                for _ in range(20):
                    next(batches)
        assert sorted(found[2], key=str) == sorted(found[1], key=str) and len(found[1]) > 5


def test_the_last_epoch_of_a_batch():
    found = sequence(Numbers(31), 40, batch=8)
    for number in range(40):
        assert last_epoch(8 * number, 8, 31) == max(visit for _, visit in found[: 8 * number + 8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 9, "world": 2}, "batch 9 from 0 on, 8 streams, 2 ranks"),
        ({"batch": 9, "world": 3}, "batch 9 from 0 on, 8 streams, 3 ranks"),
        ({"batch": 48}, "larger than the data"),
    ],
)
def test_a_batch_that_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


def test_shuffled_captions_are_a_derangement_that_ranks_do_not_change():
    source, how = Numbers(50, (3, 17)), {"shuffled": True, "max_skipped": 0.9}
    whole = [next(batches)[0] for batches in [loader(source, **how)] for _ in range(12)]
    for batch in whole:
        assert sorted(batch.teacher_captions) == sorted(batch.captions)
        assert all(a != b for a, b in zip(batch.teacher_captions, batch.captions, strict=True))
    for world in (2, 8):
        ranks = [loader(source, rank=rank, world=world, **how) for rank in range(world)]
        for batch in whole:
            parts = [next(one)[0] for one in ranks]
            for name in ("teacher_captions", "captions"):
                assert [c for group in zip(*(getattr(p, name) for p in parts)) for c in group] == getattr(batch, name)
            assert torch.equal(torch.stack([p.pixels for p in parts], 1).flatten(0, 1), batch.pixels)


def test_batch_fields():
    batch, cursors = next(loader())
    assert batch.captions == [str(i) for i in batch.ids.tolist()] and torch.equal(cursors, torch.ones(8, dtype=torch.long))
    assert batch.teacher_captions is batch.captions and batch.pixels_teacher is None
    assert torch.equal(batch.student_tokens, batch.ids[:, None])
    batch, _ = next(loader(negatives=True, teacher_size=5))
    assert torch.equal(batch.student_tokens, batch.ids.repeat(2)[:, None])
    assert batch.pixels_teacher.shape == (8, 3, 5, 5)
    assert next(loader(teacher_size=2))[0].pixels_teacher is None
    assert isinstance(batch, Batch) and len(batch) == 8


def test_a_bank_is_asked_for_the_batch_that_was_loaded_and_told_the_epoch():
    def read(ids, visits, samples):
        return {"abar": (samples.rows + visits).float()}

    epochs = []
    batches = loader(Numbers(10), reach=epochs.append, read=read)
    for _ in range(5):
        batch, _ = next(batches)
        assert torch.equal(batch.abar, (batch.ids + batch.visits).float())
    assert epochs == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_ahead_gives_every_batch_once_and_in_order(workers):
    expected = [next(b)[0].captions for b in [loader()] for _ in range(5)]
    assert [batch.captions for batch, _ in ahead(loader(), 5, workers)] == expected
    assert list(ahead(loader(), 0, workers)) == []


def test_sequential_sources_are_not_shuffled():
    endless = open_source(DataConfig())
    assert [i for i, _ in sequence(endless, 4, image_size=32, tokenize=lambda c: torch.zeros(len(c), 1))] == list(range(32))


# -- photographs --------------------------------------------------------------------------------------------------------

PHOTOGRAPHS = {  # shipped inside scikit-image's wheel
    "astronaut.png": "an astronaut in an orange suit",
    "coffee.png": "a cup of coffee on a wooden table",
    "chelsea.png": "a cat looks to the left",
    "rocket.jpg": "a rocket on its launch pad",
    "camera.png": "a man behind a camera, in grey",
}


@pytest.fixture
def photographs(tmp_path):
    """A folder of photographs and its .tsv."""
    import skimage

    there = skimage.__path__[0] + "/data/"
    (tmp_path / "images").mkdir()
    rows = ["filepath\ttitle"]
    for name, caption in PHOTOGRAPHS.items():
        try:
            shutil.copy(there + name, tmp_path / "images")
        except FileNotFoundError:
            continue
        rows.append(f"images/{name}\t{caption}")
    assert len(rows) > 2
    (tmp_path / "photographs.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path / "photographs.tsv"


def opened(path, seed=0, **options):
    return open_source(DataConfig(source=str(path), **options), seed)


def load(source, ids, visits=None, size=32):
    ids = torch.tensor(list(ids))
    return source.load(ids, torch.zeros_like(ids) if visits is None else torch.tensor(visits), size)


def test_photographs_load(photographs):
    source = opened(photographs)
    assert 2 <= len(source) <= 5 and not source.sequential
    samples = load(source, [1, 0])
    assert samples.pixels.shape == (2, 3, 32, 32) and samples.pixels.dtype == torch.uint8
    assert samples.captions == [source.captions[1][0], source.captions[0][0]] and not samples.damaged
    assert samples.pixels.float().std() > 10
    both = source.load(torch.tensor([1, 0]), torch.tensor([0, 0]), 32, 20)
    assert both.second.shape == (2, 3, 20, 20) and torch.equal(both.pixels, samples.pixels)
    assert torch.equal(both.second, load(source, [1, 0], size=20).pixels)
    assert torch.equal(load(opened(photographs, workers=2), [1, 0]).pixels, samples.pixels)


def test_decoding_is_open_clips_evaluation_transform(photographs):
    import open_clip
    from PIL import Image

    preprocess = open_clip.image_transform(48, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    for file in sorted((photographs.parent / "images").iterdir()):
        expected = (preprocess(Image.open(file)) * 255).round().to(torch.uint8)
        assert torch.equal(decode_image(file.read_bytes(), [48])[0], expected), file


MODES = {  # how an image of mode RGB is kept, and what its file says besides
    "palette": ("P", "png", {}),
    "palette, one transparent": ("P", "png", {"transparency": 3}),
    "palette, each more or less transparent": ("P", "png", {"transparency": bytes(range(200))}),
    "palette, frames": ("P", "gif", {"save_all": True}),
    "alpha": ("RGBA", "png", {}),
    "grey and alpha": ("LA", "png", {}),
    "grey, one transparent": ("L", "png", {"transparency": 100}),
    "16 bits": ("I;16", "png", {}),
    "black and white": ("1", "png", {}),
    "CMYK": ("CMYK", "jpeg", {}),
    "YCbCr": ("YCbCr", "tiff", {}),
    "floats": ("F", "tiff", {}),
    "turned": ("RGB", "jpeg", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_is_what_open_clips_evaluation_transform_makes_of_it(mode):
    """That resizes in the image's own mode, and converts what is left: palettes have no colours between theirs."""
    import open_clip
    from PIL import Image

    kind, form, how = MODES[mode]
    numbers = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype=np.uint8)
    image = Image.fromarray(numbers, "RGBA").resize((130, 90), Image.Resampling.BICUBIC)
    if kind == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    elif kind != "RGBA":
        image = image.convert("LA" if kind == "LA" else "RGB").convert(kind)
    frames = {"append_images": [image.rotate(90)]} if "save_all" in how else {}
    file = io.BytesIO()
    image.save(file, form, **how, **frames)
    preprocess = open_clip.image_transform(48, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = (preprocess(Image.open(file)) * 255).round().to(torch.uint8)
    assert torch.equal(decode_image(file.getvalue(), [48])[0], expected) and expected.float().std() > 10


def test_an_image_that_pillow_fails_on_in_whatever_way_has_one_reason():
    from PIL import Image

    image, whole = Image.new("RGB", (64, 8)), {}
    for form in ("dds", "avif", "png"):
        file = io.BytesIO()
        (image if form != "png" else image.resize((65000, 1))).save(file, form)
        whole[form] = bytearray(file.getvalue())
    whole["dds"][80:84] = bytes(4)  # of no pixel format: NotImplementedError
    whole["avif"] = whole["avif"][:300]  # RuntimeError
    for content in whole.values():  # the last is whole, but would take 8 GiB to resize
        with pytest.raises(ValueError, match=r"not a readable image \("):
            decode_image(bytes(content), [224])


def test_pillow_does_not_warn_of_each_image(monkeypatch):
    from PIL import Image

    files = [io.BytesIO(), io.BytesIO()]
    Image.new("P", (40, 40)).save(files[0], "png", transparency=bytes(range(100)))
    Image.new("L", (60, 40)).save(files[1], "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1700)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet.install()
        for file in files:
            decode_image(file.getvalue(), [16])
    assert not [str(one.message) for one in said]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (33, 33), (10, 11), (1, 64)])
def test_odd_sizes(tmp_path, shape):
    from PIL import Image

    Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    assert decode_image((tmp_path / "x.png").read_bytes(), [32])[0].shape == (3, 32, 32)


def test_images_folder_and_extra_columns(photographs, tmp_path):
    table = tmp_path / "elsewhere" / "t.tsv"
    table.parent.mkdir()
    table.write_text(
        '\ufefftitle\tid\tfilepath\r\n"a ""red"" thing"\t7\tcoffee.png\r\n\r\n', encoding="utf-8"
    )
    source = opened(table, images=str(photographs.parent / "images"))
    assert source.captions == [('a "red" thing',)] and len(source) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath,title\nx.png,y\n", "row 1: column filepath"),
        ("filepath\tcaption\n", "row 1: column title"),
        ("filepath\ttitle\nimages/coffee.png\n", "row 2: 1 columns, expected 2"),
        ("filepath\ttitle\n\ta title\n", "row 2: column filepath is empty"),
        ("filepath\ttitle\nimages/coffee.png\t  \n", "1 of 1 images cannot be used(.|\n)*coffee.png: no caption"),
        (
            "filepath\ttitle\nimages/coffee.png\tx\nimages/none.png\ty\n",
            "1 of 2 images cannot be used(.|\n)*none.png: No such file",
        ),
        ("filepath\ttitle\n", "no images"),
        ("", "row 1: column filepath"),
        ('filepath\ttitle\nx.png\ty\nimages/coffee.png\t"open\nx.png\ty\n', "row 3: not tab-separated: .*end of data.*quot"),
        ('filepath\ttitle\n\nimages/coffee.png\t"Stop" it says\n', "row 3: not tab-separated: .*expected.*quot"),
    ],
)
def test_a_bad_table_names_file_row_and_column(photographs, text, message):
    photographs.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"photographs\.tsv.*{message}"):
        opened(photographs)


def test_bad_files(photographs, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.tsv does not exist"):
        opened(tmp_path / "none.tsv")
    (tmp_path / "photographs.csv").touch()
    with pytest.raises(ConfigError, match=r"data\.source.*photographs.csv.*expected"):
        opened(tmp_path / "photographs.csv")
    with pytest.raises(ConfigError, match=r"data\.images"):
        opened(photographs, images=str(tmp_path / "nowhere"))
    photographs.write_bytes(b"filepath\ttitle\n\xff\xfe\t\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        opened(photographs)
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.tsv: no images with captions in it"):  # a folder is one of images
        opened(tmp_path / "folder.tsv")


def test_a_damaged_image_and_a_missing_caption_are_named_and_harm_no_other(photographs):
    names = sorted((photographs.parent / "images").iterdir())
    whole = names[0].read_bytes()
    place = list(PHOTOGRAPHS).index(names[0].name)
    for content in (whole[: len(whole) // 2], b"not an image", b"", whole[:-2000]):
        names[0].write_bytes(content)
        samples = load(opened(photographs), range(len(names)))
        assert list(samples.damaged) == [place] and names[0].name in samples.damaged[place], samples.damaged
    names[0].unlink()
    with open(photographs, "a") as file:
        file.write("images/coffee.png\t\nimages/nothing.png\tnothing\n")
    with pytest.raises(ConfigError, match="2 of 6 images cannot be used, more than data.max_skipped 0.001"):
        opened(photographs)
    source = opened(photographs, max_skipped=0.5)
    samples = load(source, range(len(source)))
    assert set(samples.damaged) == {place, len(source) - 1}


def test_several_captions_are_drawn_by_image_and_visit_alone(photographs):
    with open(photographs, "a") as file:
        file.write("images/coffee.png\tanother cup\nimages/coffee.png\ta third\nimages/coffee.png\ta third\n")
    source, first = opened(photographs), opened(photographs, caption="first")
    place = [k for k, said in enumerate(source.captions) if len(said) > 1]
    assert source.captions[place[0]] == (PHOTOGRAPHS["coffee.png"], "another cup", "a third")
    assert len(source) == len(first) == first.rows == source.rows - 2
    said = [load(source, place, visits=[v]).captions[0] for v in range(30)]
    assert set(said) == set(source.captions[place[0]]) and max(map(said.count, said)) < 20
    assert load(source, place * 30, visits=list(range(30))).captions == said
    assert [load(opened(photographs, seed=1), place, visits=[v]).captions[0] for v in range(30)] != said
    assert load(first, place * 3, visits=[0, 1, 2]).captions == [PHOTOGRAPHS["coffee.png"]] * 3
    rows = source.load_rows(torch.arange(source.rows), 16)
    assert rows.captions == [text for texts in source.captions for text in texts]
    assert rows.rows.tolist() == list(range(source.rows)) and len(set(rows.digests.tolist())) == source.rows
    drawn = load(source, place * 30, visits=list(range(30)), size=16)
    assert torch.equal(rows.digests[drawn.rows], drawn.digests) and torch.equal(rows.pixels[drawn.rows], drawn.pixels)
    assert [rows.captions[row] for row in drawn.rows.tolist()] == drawn.captions
    assert source.identity() != first.identity() and source.images_identity() == first.images_identity()


def test_a_cache_of_pixels_gives_the_same_and_reads_no_image(photographs, tmp_path):
    plain, folder = load(opened(photographs), range(5)), tmp_path / "cache"
    source = opened(photographs, cache=str(folder), workers=2)
    for _ in range(2):
        found = load(source, range(5))
        assert torch.equal(found.pixels, plain.pixels) and torch.equal(found.digests, plain.digests)
    again = opened(photographs, cache=str(folder))
    again.listing.read = None  # would fail
    assert torch.equal(load(again, [4, 0]).pixels, plain.pixels[[4, 0]])
    both = source.load(torch.arange(5), torch.zeros(5, dtype=torch.long), 32, 20)  # another size is decoded, then kept
    assert torch.equal(both.pixels, plain.pixels) and both.second.shape == (5, 3, 20, 20)
    assert torch.equal(again.load(torch.arange(5), torch.zeros(5, dtype=torch.long), 20).pixels, both.second)


def test_a_torn_cache_is_decoded_anew_and_that_of_other_data_refused(photographs, tmp_path):
    plain, folder = load(opened(photographs), range(5)), tmp_path / "cache"
    load(opened(photographs, cache=str(folder)), range(5))
    with open(folder / "pixels_32.u8", "r+b") as file:  # a page that a power cut lost
        file.write(bytes(2000))
    assert torch.equal(load(opened(photographs, cache=str(folder)), range(5)).pixels, plain.pixels)
    with open(photographs, "a") as file:
        file.write("images/../images/coffee.png\tagain\n")
    with pytest.raises(ConfigError, match=r"data\.cache: .*cache is of other data"):
        opened(photographs, cache=str(folder))
    with pytest.raises(ConfigError, match=r"data\.cache: .*images is no cache and not empty"):
        opened(photographs, cache=str(photographs.parent / "images"))
    with pytest.raises(ConfigError, match="GiB more"):
        PixelCache(tmp_path / "vast", "x", 1 << 24).get(0, [224])


FULL = """
import resource, sys, warnings
import torch
from fastsds.config import DataConfig
from fastsds.data.sources import open_source
source = open_source(DataConfig(source=sys.argv[1], cache=sys.argv[2]))
load = lambda: source.load(torch.arange(5), torch.zeros(5, dtype=torch.long), 32).pixels
source.cache._open(32)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 3 * 32 * 32 + 100, -1))  # as on a full disk: bytes past it are refused
first = load()
assert torch.equal(first, load())
print(sum(source.cache.get(i, [32]) is not None for i in range(5)))
"""


def test_a_disk_that_fills_up_ends_the_cache_and_not_the_run(photographs, tmp_path, python):
    done = python("-c", FULL, photographs, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n" and done.stderr.count("no more images are kept") == 1
    plain = load(opened(photographs), range(5))
    assert torch.equal(load(opened(photographs, cache=str(tmp_path / "cache")), range(5)).pixels, plain.pixels)


def test_a_table_may_name_images_anywhere_and_still_says_what_it_is(photographs, tmp_path):
    """Absolute paths outside the table's folder, as open_clip's own tables have them."""
    (tmp_path / "lists").mkdir()
    rows = [f"{photographs.parent / 'images' / name}\ta thing" for name in ("coffee.png", "chelsea.png")]
    (tmp_path / "lists" / "a.tsv").write_text("filepath\ttitle\n" + "\n".join(rows) + "\n")
    (tmp_path / "b.tsv").write_text("filepath\ttitle\n" + "\n".join(rows[::-1]) + "\n")
    found, again, other = (opened(tmp_path / name).identity() for name in ("lists/a.tsv", "lists/a.tsv", "b.tsv"))
    assert found == again != other


def test_the_first_samples_are_one_data_set_for_every_seed(photographs):
    two, whole = (opened(photographs, samples=n) for n in (2, None))
    assert two.captions == whole.captions[:2] and len(two) == 2
    with pytest.raises(ConfigError, match="data.samples is 99, but .* has"):
        opened(photographs, samples=99)
    scenes = [open_source(DataConfig(samples=64), seed) for seed in (0, 1)]
    assert [len(s) for s in scenes] == [64, 64] and not scenes[0].sequential
    endless = open_source(DataConfig())
    assert endless.sequential
    loaded = [s.load(torch.arange(64)) for s in (*scenes, endless)]
    for other in loaded[1:]:
        assert torch.equal(loaded[0].pixels, other.pixels) and loaded[0].captions == other.captions


def test_a_subset_is_drawn_by_its_seed_and_a_smaller_one_is_part_of_a_larger(photographs):
    whole = opened(photographs)
    chosen = {(n, seed): opened(photographs, samples=n, subset=seed) for n in (2, 4, len(whole)) for seed in (0, 1, 2)}
    names = {key: set(source.listing.names) for key, source in chosen.items()}
    for seed in (0, 1, 2):
        assert names[2, seed] < names[4, seed] < names[len(whole), seed] == set(whole.listing.names)
        assert names[4, seed] == set(opened(photographs, samples=4, subset=seed).listing.names)
    assert len({frozenset(names[4, seed]) for seed in (0, 1, 2)}) > 1
    for source in chosen.values():  # in the file's order, each with its own captions and pixels
        places = [whole.listing.names.index(name) for name in source.listing.names]
        assert places == sorted(places)
        ids, zero = torch.arange(len(source)), torch.zeros(len(source), dtype=torch.int64)
        assert source.captions == [whole.captions[k] for k in places]
        assert torch.equal(source.load(ids, zero, 32).pixels, whole.load(torch.tensor(places), zero, 32).pixels)
    few, more, other = (open_source(DataConfig(samples=n, subset=seed)) for n, seed in ((8, 1), (16, 1), (8, 2)))
    pixels = [source.load(torch.arange(8)).pixels for source in (few, more, other)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    assert few.identity() != other.identity()
