"""Which sample is where: a pure function of (seed, step, rank), so a resumed or re-sharded run sees what the first did."""

from collections.abc import Callable
from functools import lru_cache

import torch

from fastsds.data import Batch
from fastsds.ops import Noise, Purpose, draw

ORDERS = ("shuffled", "sequential")
_ORDER_ID = -1  # the sample id of the sampler's own words: no sample has it


def order_of(source) -> str:
    """ "sequential" for a source that is random by construction, else "shuffled"."""
    return "sequential" if getattr(source, "sequential", False) else "shuffled"


def positions(
    step: int,
    micro: int,
    batch: int,
    rank: int,
    world: int,
    n: int,
    seed: int,
    order: str = "shuffled",
    *,
    accumulation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of one rank's part of one contrastive batch.

    Contrastive batch number step * accumulation + micro takes the next `batch` places of an endless walk through the
    data; each epoch of the walk is a permutation of its own, and batches span epochs. Rank r takes the r-th part, so
    the parts of all ranks, one after another, are the batch.

    Args: batch: over all ranks. n: samples in the source. order: "shuffled" or "sequential".
    Returns: ids int64 [b] in [0, n), visits int64 [b] (the epoch of each), b = batch / world.
    Raises: ValueError if the batch does not divide or is larger than the data.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r}, expected one of {ORDERS}")
    if batch % world or not 0 <= rank < world:
        raise ValueError(f"batch {batch} over {world} ranks (rank {rank}): expected a multiple of the world size")
    if batch > n:
        raise ValueError(f"batch {batch} is larger than the data ({n} samples)")
    b = batch // world
    first = (step * accumulation + micro) * batch + rank * b
    places = torch.arange(first, first + b)
    visits, ids = places // n, places % n
    if order == "shuffled":
        for epoch in range(int(visits[0]), int(visits[-1]) + 1):
            ids = torch.where(visits == epoch, permutation(n, seed, epoch)[ids], ids)
    return ids, visits


def last_epoch(step: int, micro: int, batch: int, n: int, accumulation: int) -> int:
    """The latest epoch that a contrastive batch reaches into, whichever rank has that part. Args: as `positions`."""
    return ((step * accumulation + micro + 1) * batch - 1) // n


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """A counter-based permutation of range(n): the stable argsort of n Philox uniforms."""
    noise = Noise(seed, draw(Purpose.ORDER, epoch), torch.tensor([_ORDER_ID]))
    return noise.uniform(n).reshape(-1).argsort(stable=True)


def load_batch(
    source,
    step: int,
    micro: int,
    *,
    batch: int,
    accumulation: int,
    seed: int,
    image_size: int,
    tokenize: Callable[[list[str]], torch.Tensor],
    rank: int = 0,
    world: int = 1,
    negatives: bool = False,
    shuffled: bool = False,
    teacher_size: int | None = None,
    bank=None,
    device: str | torch.device = "cpu",
) -> Batch:
    """Load one rank's part of one contrastive batch.

    Args: negatives: also tokenise each image's wrong caption. shuffled: tell the teacher the caption of the next
        image of the contrastive batch (the last one takes the first's), whatever the number of ranks.
        teacher_size: also give the images at this many pixels a side; None: nobody asks. bank: a function of (ids,
        visits, samples) that gives further fields of a batch, on the CPU.
    """
    at = {
        "batch": batch,
        "n": len(source),
        "seed": seed,
        "order": order_of(source),
        "accumulation": accumulation,
    }
    ids, visits = positions(step, micro, rank=rank, world=world, **at)
    samples = source.load(ids, visits, image_size)
    told = samples.captions
    if shuffled:
        all_ids, all_visits = positions(step, micro, rank=0, world=1, **at)
        after = (rank + 1) * len(ids) % batch
        told = told[1:] + source.load(all_ids[after : after + 1], all_visits[after : after + 1], image_size).captions
    if negatives and samples.negatives is None:
        raise ValueError("loss.negatives: swapped needs a source that gives wrong captions, and this one gives none")
    pixels_teacher = None
    if teacher_size is not None and teacher_size != image_size:
        pixels_teacher = source.load(ids, visits, teacher_size).pixels.to(device)
    return Batch(
        ids=ids.to(device),
        visits=visits.to(device),
        pixels=samples.pixels.to(device),
        captions=samples.captions,
        negatives=samples.negatives if negatives else None,
        tokens=tokenize(samples.captions).to(device),
        negative_tokens=tokenize(samples.negatives).to(device) if negatives else None,
        pixels_teacher=pixels_teacher,
        teacher_captions=told,
        **{name: value.to(device) for name, value in (bank(ids, visits, samples) if bank else {}).items()},
    )
