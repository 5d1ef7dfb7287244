"""Images a second from disk to uint8 pixels, a core: what it takes to feed a step.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_data.py --benchmark-json=run.json

JPEGs of 640 x 480, the size of COCO's, cut from scikit-image's photographs. Beside ours what a careful user writes: a torch
DataLoader over open_clip's own evaluation transform, its workers kept alive, as many as our threads. `report.py` divides: cores
for 500 images/s (an `sds` step on one large GPU) and 3,000 (`amortised`).
"""

import io
import tarfile
from pathlib import Path

import pytest
import torch

from fastsds.config import DataConfig
from fastsds.data.loader import Loader, ahead
from fastsds.data.sources import open_source

IMAGES, BATCH, SIZE, TEACHER = 64, 32, 224, 512
PROVIDERS = (
    "DataLoader, 1 worker", "DataLoader, 2 workers", "ours, no thread", "ours, 2 threads", "ours, 224 and 512, 2 threads",
    "ours, from a shard, 2 threads", "ours, from the cache, no thread", "ours, batches of the loader, 2 threads",
)  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A table of JPEGs, and the same in a shard."""
    import skimage
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    there = Path(skimage.__path__[0]) / "data"
    found = [Image.open(there / name).convert("RGB") for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]
    rows = ["filepath\ttitle"]
    with tarfile.open(folder / "000.tar", "w") as shard:
        for i in range(IMAGES):
            image, jpeg = found[i % len(found)], io.BytesIO()
            left, top = 3 * i % (image.width // 4), 5 * i % (image.height // 4)
            image.crop((left, top, image.width, image.height)).resize((640, 480)).save(jpeg, "JPEG", quality=90)
            for name, content in ((f"{i:03d}.jpg", jpeg.getvalue()), (f"{i:03d}.txt", f"photograph {i}".encode())):
                (folder / name).write_bytes(content)
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
            rows.append(f"{i:03d}.jpg\tphotograph {i}")
    (folder / "table.tsv").write_text("\n".join(rows) + "\n")
    return folder


class Table(torch.utils.data.Dataset):
    """What a careful user writes."""

    def __init__(self, folder):
        import open_clip
        from torchvision.transforms import Compose, PILToTensor

        whole = open_clip.image_transform(SIZE, is_train=False)
        self.files = sorted(folder.glob("*.jpg"))
        self.transform = Compose([*whole.transforms[:3], PILToTensor()])  # resize, crop, RGB; then uint8, as ours

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.open(self.files[i]))


def careful_user(folder, workers):
    loader = torch.utils.data.DataLoader(Table(folder), BATCH, num_workers=workers, persistent_workers=True)
    return lambda: list(loader)


def ours(folder, provider, cache):
    workers, second = (0 if "no thread" in provider else 2), (TEACHER if "512" in provider else None)
    path = folder / ("000.tar" if "shard" in provider else "table.tsv")
    kept = str(cache) if "cache" in provider else None
    source = open_source(DataConfig(source=str(path), workers=workers, cache=kept))
    if "loader" in provider:
        import open_clip

        tokenize = open_clip.get_tokenizer("ViT-B-32")
        loader = Loader(source, batch=BATCH, streams=32, seed=0, image_size=SIZE, tokenize=tokenize)
        return lambda: [batch.pixels for batch, _ in ahead(loader, IMAGES // BATCH, workers)]
    places = torch.arange(IMAGES).split(BATCH)
    return lambda: [source.load(ids, torch.zeros_like(ids), SIZE, second).pixels for ids in places]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_data(provider, benchmark, photographs, tmp_path):
    cores = 2 if "2 " in provider else 1
    user = provider.startswith("DataLoader")
    read = careful_user(photographs, cores) if user else ours(photographs, provider, tmp_path / "cache")
    pixels = torch.cat(read())  # warm, and right: the same pixels, in whatever order
    expected = torch.stack([Table(photographs)[i] for i in range(IMAGES)])
    assert torch.equal(pixels.long().sum((1, 2, 3)).sort().values, expected.long().sum((1, 2, 3)).sort().values)
    benchmark.extra_info.update(images=IMAGES, cores=cores)
    benchmark.pedantic(read, rounds=1 if benchmark.disabled else 15, iterations=1)
