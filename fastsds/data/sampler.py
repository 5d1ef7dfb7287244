"""Which sample is where: a pure function of (seed, place), so a resumed or re-sharded run sees what the first did.

The data are an endless walk: epoch after epoch, each a permutation of its own. `streams` logical streams share it out,
place p to stream p mod streams, and are read round-robin: position p of the training takes the next good sample of
stream p mod streams. Rank r of W reads the streams s with s mod W = r, so what is trained on does not depend on W. A
sample that cannot be used is passed over within its own stream: no other stream moves.
"""

from functools import lru_cache

import torch

from fastsds.ops import Noise, Purpose, draw

_ORDER_ID, _SUBSET_ID = -1, -2  # the sample ids of the sampler's own words: no sample has them


class Walk:
    """The walk through a source that can be read in any order.

    A walk has `advance`; a source that can only be read in its own order brings its own (`source.walk(streams, seed)`).
    Args: n: samples in the source. shuffled: each epoch a permutation; else their own order.
    """

    def __init__(self, n: int, streams: int, seed: int, shuffled: bool = True):
        self.n, self.streams, self.seed, self.shuffled = n, streams, seed, shuffled

    def advance(self, stream: int, cursor: int) -> tuple[int, int, int]:
        """The next sample of a stream: (id, visit, the cursor after it). cursor: 0 where a stream begins.

        Entry k of stream s is place k * streams + s; visit is the epoch of that place.
        """
        visit, place = divmod(cursor * self.streams + stream, self.n)
        return int(permutation(self.n, self.seed, visit)[place]) if self.shuffled else place, visit, cursor + 1


def walk_of(source, streams: int, seed: int):
    """The walk through a source."""
    if hasattr(source, "walk"):
        return source.walk(streams, seed)
    return Walk(len(source), streams, seed, shuffled=not source.sequential)


def last_epoch(first: int, batch: int, n: int, damaged: float = 0.0) -> int:
    """The latest epoch that the batch at position `first` reaches into, whichever rank has that part.

    Args: damaged: the share of samples that may be passed over, which brings an epoch sooner; at most one is told of too early.
    """
    end = first + batch - 1
    return (end + min(n, int(end * damaged / (1 - damaged)))) // n


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """A counter-based permutation of range(n): the stable argsort of n Philox uniforms."""
    noise = Noise(seed, draw(Purpose.ORDER, epoch), torch.tensor([_ORDER_ID]))
    return noise.uniform(n).reshape(-1).argsort(stable=True)


def subset(n: int, count: int, seed: int) -> list[int]:
    """`count` of range(n), in order: the first ones of a counter-based permutation, so a smaller subset is part of a larger."""
    noise = Noise(seed, draw(Purpose.ORDER, 0), torch.tensor([_SUBSET_ID]))
    return noise.uniform(n).reshape(-1).argsort(stable=True)[:count].sort().values.tolist()
