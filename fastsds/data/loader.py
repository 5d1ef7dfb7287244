"""Batches: what training takes from a source, in an order that depends on nothing but the seed and the data."""

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.data import Batch, Samples, Source
from fastsds.data.sampler import last_epoch, walk_of

FEW = 1000  # samples that a share of damaged ones is measured over, at least, where nobody knows how many there are
SHOWN = 10


class Loader:
    """An endless iterator over one rank's parts of the contrastive batches: (Batch, cursors) pairs.

    cursors, int64 [streams], say how far the streams are after that batch. Given back to a new loader, with the number of
    samples before it, they go on exactly there, also on another number of ranks (streams of other ranks keep their start).

    Args:
        batch: contrastive batch over all ranks. first: positions before the first batch. cursors: where they left the streams.
        teacher_size: also give the images at this many pixels a side; None: nobody asks.
        negatives: also tokenise each image's wrong caption.
        shuffled: tell the teacher the caption of the next image of the contrastive batch (the last one takes the first's),
            whatever the number of ranks; every rank then reads the whole batch.
        reach, read: of a bank: called with the latest epoch of a batch before it is loaded, and with (ids, visits, samples) for
            further fields of it, on the CPU.
        max_skipped: the share of damaged samples that is passed over: of the source, or of those taken where nobody knows how
            many it has. Each rank counts those that it met. report: called with a row for each damaged one. refuse: called past
            max_skipped with what names them, to end the run after its step; without it that is raised.
    Raises: ValueError if batch or streams do not divide by the ranks; ConfigError past max_skipped, or where nothing is left.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        streams: int,
        seed: int,
        image_size: int,
        tokenize: Callable[[list[str]], torch.Tensor],
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        cursors: torch.Tensor | None = None,
        teacher_size: int | None = None,
        negatives: bool = False,
        shuffled: bool = False,
        reach: Callable[[int], None] | None = None,
        read: Callable[..., dict[str, torch.Tensor]] | None = None,
        device: str | torch.device = "cpu",
        max_skipped: float = 0.0,
        report: Callable[[dict], None] | None = None,
        refuse: Callable[[str], None] | None = None,
    ):
        if batch % world or streams % world or first % world or not 0 <= rank < world:
            at = f"batch {batch} from {first} on, {streams} streams"
            raise ValueError(f"{at}, {world} ranks (rank {rank}): expected multiples of the ranks")
        self.count = len(source) if hasattr(source, "__len__") else None
        if self.count is not None and batch > self.count:
            raise ValueError(f"batch {batch} is larger than the data ({self.count} samples)")
        self.source, self.walk = source, walk_of(source, streams, seed)
        self.cursors = torch.zeros(streams, dtype=torch.int64) if cursors is None else cursors.clone()
        self.batch, self.streams, self.rank, self.world, self.first = batch, streams, rank, world, first
        self.size, self.tokenize, self.device = image_size, tokenize, device
        self.second = teacher_size if teacher_size != image_size else None
        self.negatives, self.shuffled, self.reach, self.read = negatives, shuffled, reach, read
        self.max_skipped, self.report, self.refuse = max_skipped, report, refuse
        self.taken, self.damaged = 0, {}

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[Batch, torch.Tensor]:
        if self.reach:
            self.reach(last_epoch(self.first, self.batch, self.count, self.max_skipped))
        positions, whole = range(self.first, self.first + self.batch), self.shuffled
        ids, visits, samples = self._take(positions if whole else positions[self.rank :: self.world])
        told = samples.captions
        if whole:
            mine = list(range(self.rank, self.batch, self.world))
            told = [(told[1:] + told[:1])[k] for k in mine]
            ids, visits, samples = ids[mine], visits[mine], samples.take(mine)
        self.first += self.batch
        return self._made(ids, visits, samples, told), self.cursors.clone()

    def _take(self, positions: range) -> tuple[torch.Tensor, torch.Tensor, Samples]:
        """The samples at these positions: of each stream its next good ones, in order."""
        wanted: dict[int, int] = {}
        for p in positions:
            wanted[p % self.streams] = wanted.get(p % self.streams, 0) + 1
        good: dict[int, list] = {stream: [] for stream in wanted}  # of (id, visit, place in `loaded`)
        loaded: list[Samples] = []
        before = passed = 0
        while short := [s for s, n in wanted.items() for _ in range(n - len(good[s]))]:
            entries = [self._advance(stream) for stream in short]
            samples = self.source.load(*(torch.tensor(column) for column in zip(*entries)), self.size, self.second)
            for row, (stream, (sample, visit)) in enumerate(zip(short, entries, strict=True)):
                if row in samples.damaged:
                    passed += 1
                    self._skip(stream, sample, visit, samples.damaged[row], passed)
                else:
                    good[stream].append((sample, visit, before + row))
            loaded.append(samples)
            before += len(samples)
        next_of = {stream: iter(entries) for stream, entries in good.items()}
        ids, visits, places = (list(column) for column in zip(*(next(next_of[p % self.streams]) for p in positions)))
        self.taken += len(positions)
        samples = loaded[0] if len(loaded) == 1 and places == list(range(before)) else Samples.join(loaded).take(places)
        return torch.tensor(ids), torch.tensor(visits), samples

    def _advance(self, stream: int) -> tuple[int, int]:
        sample, visit, cursor = self.walk.advance(stream, int(self.cursors[stream]))
        self.cursors[stream] = cursor
        return sample, visit

    def _skip(self, stream: int, sample: int, visit: int, why: str, passed: int) -> None:
        """Pass over one. passed: in this batch so far, which ends where the same few are met again and again."""
        self.damaged[sample] = why
        if self.report and stream % self.world == self.rank:  # shuffled, every rank meets all of them
            self.report({"stream": stream, "cursor": int(self.cursors[stream]), "id": sample, "epoch": visit, "why": why})
        of, bad = self.count or max(FEW, self.taken), list(self.damaged.values())
        if len(bad) > self.max_skipped * of or passed > max(FEW, of):
            shown = "".join(f"\n  {text}" for text in bad[:SHOWN]) + "\n  ..." * (len(bad) > SHOWN)
            why = f"data.max_skipped is {self.max_skipped}, and {len(bad)} of {of:,} samples cannot be used:{shown}"
            if self.refuse is None or len(bad) == of:
                raise ConfigError(why)
            self.refuse(why)

    def _made(self, ids: torch.Tensor, visits: torch.Tensor, samples: Samples, told: list[str]) -> Batch:
        if self.negatives and samples.negatives is None:
            raise ConfigError("loss.negatives: swapped needs a source that gives wrong captions, and this one gives none")
        further = self.read(ids, visits, samples) if self.read else {}
        return Batch(
            ids=ids.to(self.device),
            visits=visits.to(self.device),
            pixels=samples.pixels.to(self.device),
            captions=samples.captions,
            negatives=samples.negatives if self.negatives else None,
            tokens=self.tokenize(samples.captions).to(self.device),
            negative_tokens=self.tokenize(samples.negatives).to(self.device) if self.negatives else None,
            pixels_teacher=None if samples.second is None else samples.second.to(self.device),
            teacher_captions=told,
            **{name: value.to(self.device) for name, value in further.items()},
        )


def ahead(batches: Iterator, wanted: int, workers: int) -> Iterator:
    """The next `wanted` batches; with workers, one is loaded while a step computes."""
    if not workers:
        yield from (next(batches) for _ in range(wanted))
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches) if wanted else None
        for k in range(1, wanted + 1):
            batch = waiting.result()
            waiting = pool.submit(next, batches) if k < wanted else None
            yield batch


class SkipLog:
    """OUTPUT/skipped.jsonl: a row for each sample that was passed over, appended by the rank that met it."""

    def __init__(self, output: Path):
        self.path = Path(output) / "skipped.jsonl"

    def __call__(self, row: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def go_back(self, cursors: torch.Tensor) -> None:
        """Drop the rows of what a resumed run will meet again. One rank calls it, before any loads."""
        if self.path.is_file():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # one that was cut off
                    row = json.loads(line)
                    if row["cursor"] <= cursors[row["stream"]]:
                        kept.append(line + "\n")
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self.path)
