"""The sampler and the tab-separated source."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsds.config import ConfigError, DataConfig
from fastsds.data import Batch, Samples
from fastsds.data.sampler import last_epoch, load_batch, order_of, permutation, positions
from fastsds.data.sources import TSVSource, decode_image, open_source


def walk(batches, batch, n, order="shuffled", seed=0):
    parts = [positions(k, 0, batch, 0, 1, n, seed, order, accumulation=1) for k in range(batches)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("n", "batch"), [(24, 8), (23, 8), (8, 8), (9, 8)])
def test_each_epoch_is_covered_exactly_once(n, batch, order):
    ids, visits = walk(3 * n, batch, n, order)  # batch epochs of 3 times over
    assert torch.equal(visits, torch.arange(len(ids)) // n)
    for epoch in range(3 * batch):
        assert torch.equal(ids[visits == epoch].sort().values, torch.arange(n))
    if order == "sequential":
        assert torch.equal(ids, torch.arange(len(ids)) % n)


def test_epochs_and_seeds_are_shuffled_apart():
    orders = [permutation(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert not torch.equal(a, torch.arange(50))
        assert all(not torch.equal(a, b) for b in orders[:i])


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_parts_of_all_ranks_are_the_batch(world):
    for step, micro in ((0, 0), (0, 1), (5, 1)):
        whole = positions(step, micro, 12, 0, 1, 31, 7, accumulation=2)
        parts = [positions(step, micro, 12, rank, world, 31, 7, accumulation=2) for rank in range(world)]
        for k in range(2):
            assert torch.equal(torch.cat([p[k] for p in parts]), whole[k])


def test_the_last_epoch_of_a_batch_is_that_of_its_last_rank():
    for step, micro in ((0, 0), (1, 0), (2, 1), (9, 1)):
        found = positions(step, micro, 12, 1, 2, 31, 7, accumulation=2)[1][-1]
        assert last_epoch(step, micro, 12, 31, 2) == found


def test_accumulation_takes_the_next_batch():
    two = [positions(step, micro, 4, 0, 1, 100, 0, accumulation=2) for step in (0, 1) for micro in (0, 1)]
    one = [positions(step, 0, 4, 0, 1, 100, 0, accumulation=1) for step in range(4)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(two, one, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0, 9, 0, 2, 100, 0), "batch 9 over 2"), ((0, 0, 8, 0, 1, 7, 0), "larger than the data")],
)
def test_a_batch_that_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        positions(*arguments, accumulation=1)


class Numbers:
    """A source whose caption is its id."""

    sequential = False

    def __len__(self):
        return 40

    def load(self, ids, visits=None, size=None):
        pixels = ids.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
        return Samples(pixels, [str(i) for i in ids.tolist()], [f"not {i}" for i in ids.tolist()])


def tokenize(captions):
    return torch.tensor([[int(c.split()[-1])] for c in captions])


def batches(world, **options):
    options = {"batch": 8, "accumulation": 2, "seed": 3, "image_size": 2, "tokenize": tokenize, **options}
    return [load_batch(Numbers(), 4, 1, rank=rank, world=world, **options) for rank in range(world)]


def test_shuffled_captions_are_a_derangement_that_ranks_do_not_change():
    whole = batches(1, shuffled=True)[0]
    assert sorted(whole.teacher_captions) == sorted(whole.captions)
    assert all(a != b for a, b in zip(whole.teacher_captions, whole.captions, strict=True))
    for world in (2, 4, 8):
        parts = batches(world, shuffled=True)
        assert [c for part in parts for c in part.teacher_captions] == whole.teacher_captions
        assert torch.equal(torch.cat([p.pixels for p in parts]), whole.pixels)


def test_batch_fields():
    batch = batches(1)[0]
    assert batch.captions == [str(i) for i in batch.ids.tolist()]
    assert batch.teacher_captions is batch.captions and batch.pixels_teacher is None
    assert torch.equal(batch.student_tokens, batch.ids[:, None])
    batch = batches(1, negatives=True, teacher_size=5)[0]
    assert torch.equal(batch.student_tokens, batch.ids.repeat(2)[:, None])
    assert batch.pixels_teacher.shape == (8, 3, 5, 5)
    assert batches(1, teacher_size=2)[0].pixels_teacher is None
    assert isinstance(batch, Batch) and len(batch) == 8


def test_sequential_sources_are_not_shuffled():
    assert order_of(Numbers()) == "shuffled"
    assert order_of(SimpleNamespace(sequential=True)) == "sequential"


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


def test_photographs_load(photographs):
    source = open_source(DataConfig(source=str(photographs)), 32)
    assert 2 <= len(source) <= 5 and not source.sequential
    samples = source.load(torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long))
    assert samples.pixels.shape == (2, 3, 32, 32) and samples.pixels.dtype == torch.uint8
    assert samples.captions == [source.captions[1], source.captions[0]]
    assert samples.pixels.float().std() > 10
    assert source.load(torch.tensor([0]), size=20).pixels.shape == (1, 3, 20, 20)
    threads = open_source(DataConfig(source=str(photographs), workers=2), 32)
    assert torch.equal(threads.load(torch.tensor([1, 0])).pixels, samples.pixels)


def test_decoding_is_open_clips_evaluation_transform(photographs):
    import open_clip
    from PIL import Image

    preprocess = open_clip.image_transform(48, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    for file in TSVSource(photographs, 48).files:
        expected = (preprocess(Image.open(file)) * 255).round().to(torch.uint8)
        assert torch.equal(decode_image(file, 48), expected), file


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (33, 33), (10, 11), (1, 64)])
def test_odd_sizes(tmp_path, shape):
    from PIL import Image

    Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", 32).shape == (3, 32, 32)


def test_images_folder_and_extra_columns(photographs, tmp_path):
    table = tmp_path / "elsewhere" / "t.tsv"
    table.parent.mkdir()
    table.write_text(
        '\ufefftitle\tid\tfilepath\r\n"a ""red"" thing"\t7\tcoffee.png\r\n\r\n', encoding="utf-8"
    )
    source = TSVSource(table, 16, images=photographs.parent / "images")
    assert source.captions == ['a "red" thing'] and len(source) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath,title\nx.png,y\n", "row 1: column filepath"),
        ("filepath\tcaption\n", "row 1: column title"),
        ("filepath\ttitle\nimages/coffee.png\n", "row 2: 1 columns, expected 2"),
        ("filepath\ttitle\nimages/coffee.png\t  \n", "row 2: column title is empty"),
        (
            "filepath\ttitle\nimages/coffee.png\tx\nimages/none.png\ty\n",
            "row 3: column filepath.*none.png does not exist",
        ),
        ("filepath\ttitle\n", "no rows"),
        ("", "row 1: column filepath"),
        ('filepath\ttitle\nimages/coffee.png\t"open\n', "not a tab-separated"),
    ],
)
def test_a_bad_table_names_file_row_and_column(photographs, text, message):
    photographs.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"photographs\.tsv.*{message}"):
        TSVSource(photographs, 16)


def test_bad_files(photographs, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.tsv does not exist"):
        TSVSource(tmp_path / "none.tsv", 16)
    with pytest.raises(ConfigError, match=r"data\.source.*expected world or a \.tsv"):
        open_source(DataConfig(source="photographs.csv"), 16)
    with pytest.raises(ConfigError, match=r"data\.images"):
        TSVSource(photographs, 16, images=tmp_path / "nowhere")
    photographs.write_bytes(b"filepath\ttitle\n\xff\xfe\t\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        TSVSource(photographs, 16)


def test_a_damaged_image_names_the_file(photographs):
    source = TSVSource(photographs, 16)
    whole = source.files[0].read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not an image", b""):
        source.files[0].write_bytes(damaged)
        with pytest.raises(ConfigError, match=source.files[0].name):
            source.load(torch.tensor([0]))


def test_a_table_may_name_images_anywhere_and_still_says_what_it_is(photographs, tmp_path):
    """Absolute paths outside the table's folder, as open_clip's own tables have them."""
    (tmp_path / "lists").mkdir()
    rows = [f"{photographs.parent / 'images' / name}\ta thing" for name in ("coffee.png", "chelsea.png")]
    (tmp_path / "lists" / "a.tsv").write_text("filepath\ttitle\n" + "\n".join(rows) + "\n")
    (tmp_path / "b.tsv").write_text("filepath\ttitle\n" + "\n".join(rows[::-1]) + "\n")
    found, again, other = (TSVSource(tmp_path / name, 16).identity() for name in ("lists/a.tsv", "lists/a.tsv", "b.tsv"))
    assert found == again != other


def test_the_first_samples_are_one_data_set_for_every_seed(photographs):
    two, whole = (open_source(DataConfig(source=str(photographs), samples=n), 32) for n in (2, None))
    assert two.captions == whole.captions[:2] and len(two) == 2
    with pytest.raises(ConfigError, match="data.samples is 99, but .* has"):
        open_source(DataConfig(source=str(photographs), samples=99), 32)
    scenes = [open_source(DataConfig(samples=64), 32, seed) for seed in (0, 1)]
    assert [len(s) for s in scenes] == [64, 64] and order_of(scenes[0]) == "shuffled"
    endless = open_source(DataConfig(), 32, 0)
    assert order_of(endless) == "sequential"
    loaded = [s.load(torch.arange(64)) for s in (*scenes, endless)]
    for other in loaded[1:]:
        assert torch.equal(loaded[0].pixels, other.pixels) and loaded[0].captions == other.captions
