"""Shards by pipe: each sample once an epoch, on any number of ranks and after any restart; commands that fail."""

import json
import re
import subprocess
import time

import photos
import pytest
import torch
from test_data import loader, sequence
from test_formats import opened, words

from fastsds.config import ConfigError
from fastsds.data.loader import SkipLog
from fastsds.data.pipe import PLACES, Pipe, PipeWalk, _read

N, OF = 29, 3  # ten shards, the last of two
HOW = {"tokenize": words, "image_size": 8, "max_skipped": 0.05}


@pytest.fixture(scope="module")
def taken():
    return photos.make(N)


@pytest.fixture(scope="module")
def folder(taken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    photos.shards(folder, taken, OF)
    return folder


def pipe(folder, command="cat", streams=8, **options):
    return opened(f"pipe:{command} {folder}/{{00..09}}.tar", streams=streams, **options)


def number(sample):
    """A photograph's number from its id: shard << 32 | place."""
    return sample // PLACES * OF + sample % PLACES


@pytest.mark.parametrize("streams", [1, 3, 8, 10])
def test_each_epoch_has_each_sample_once_whatever_the_streams(folder, streams):
    walk, found = PipeWalk(pipe(folder), streams, 5), []
    for stream in range(streams):
        cursor = visit = 0
        while visit < 3:
            sample, visit, after = walk.advance(stream, cursor)
            assert after > cursor
            found.append((number(sample), visit, stream))
            cursor = after
    orders = [[n for n, visit, _ in found if visit == epoch] for epoch in range(3)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(N))
        shards = {(n // OF, stream) for n, visit, stream in found if visit == epoch}
        assert len(shards) == 10  # each in one stream
        counts = [sum(s == stream for _, s in shards) for stream in range(streams)]
        assert counts == [len(range(stream, 10, streams)) for stream in range(streams)]
    assert orders[0] != orders[1] != orders[2]
    other = PipeWalk(pipe(folder), streams, 6)
    assert [other.advance(s, 0)[0] for s in range(streams)] != [walk.advance(s, 0)[0] for s in range(streams)]


def test_ranks_read_what_one_rank_reads_and_what_lies_in_the_shards(folder, taken):
    whole = sequence(pipe(folder), 20, **HOW)
    for world in (2, 4):
        assert sequence(pipe(folder), 20, world, **HOW) == whole
    listed = opened(folder)
    batches, done = loader(pipe(folder, workers=2), **HOW), loader(listed, **HOW)
    captions = {}
    for _ in range(12):
        batch, _ = next(batches)
        plain = done.source.load(torch.tensor([number(i) for i in batch.ids.tolist()]), batch.visits, 8)
        assert torch.equal(plain.pixels, batch.pixels)
        for sample, caption in zip(batch.ids.tolist(), batch.captions, strict=True):
            captions.setdefault(number(sample), set()).add(caption)
    assert all(said <= set(taken[n].captions) for n, said in captions.items())
    assert any(len(said) > 1 for said in captions.values())
    first = loader(pipe(folder, caption="first"), **HOW)
    assert all(c.endswith("a") for _ in range(12) for c in next(first)[0].captions)


@pytest.mark.parametrize("command", ["cat", "head -c 9000"])  # whole shards; such as are cut, some of them empty but for that
def test_a_run_goes_on_in_the_middle_of_a_shard_on_other_ranks(folder, tmp_path, command):
    how = {**HOW, "max_skipped": 0.9}
    whole, log = loader(pipe(folder, command), report=SkipLog(tmp_path / "whole"), **how), SkipLog(tmp_path / "parts")
    expected = [next(whole)[0] for _ in range(14)]
    cursors, first, found = None, 0, []
    for count, world in ((3, 1), (5, 4), (6, 2)):
        parts = [
            loader(pipe(folder, command), rank=r, world=world, first=first, cursors=cursors, report=log, **how)
            for r in range(world)
        ]
        for _ in range(count):
            made = [next(part) for part in parts]
            for row in zip(*(zip(b.ids.tolist(), b.visits.tolist(), b.captions) for b, _ in made), strict=True):
                found += row
        cursors, first = torch.stack([after for _, after in made]).amax(0), first + 8 * count
        assert (cursors % PLACES > 0).any()  # in the midst of shards
    assert found == [row for b in expected for row in zip(b.ids.tolist(), b.visits.tolist(), b.captions, strict=True)]
    logs = tmp_path / "whole/skipped.jsonl", log.path
    rows = [sorted(log.read_text().splitlines()) if log.exists() else [] for log in logs]
    assert rows[0] == rows[1] and bool(rows[0]) == (command != "cat")


FAILS = {
    "status at the end": ("cat {}; exit 3", 3, "exit status 3"),
    "status half-way": ("head -c 7000 {}; exit 3", 1, r"exit status 3, unexpected end .*at byte [\d,]+"),
    "cut": ("head -c 7000 {}", 1, r"unexpected end .*at byte [\d,]+"),
    "nothing": ("echo {} >/dev/null", 0, "empty file at byte 0"),
    "a page": ("echo not found: {}", 0, "truncated header at byte 0"),
    "no such command": ("fastsds-no-such-command {} 2>/dev/null", 0, "exit status 127, empty file at byte 0"),
    "compressed": ("gzip -c {}", 0, ".*at byte 0"),
}


@pytest.mark.parametrize("name", FAILS)
def test_of_a_command_that_fails_the_rest_is_one_sample(folder, name):
    """The same whenever it is asked: what it put out is read to the end, however soon it failed."""
    command, whole, message = FAILS[name]
    found = [list(_read(f"pipe:{command.format(folder / '00.tar')}")) for _ in range(5)]
    assert [len(items) for items in found] == [whole + 1] * 5
    assert len({repr(items) for items in found}) == 1
    *good, last = found[0]
    assert last.is_rest and not any(item.wrong for item in good) and re.fullmatch(message, last.why), last


def test_a_shard_that_fails_is_listed_once_an_epoch_and_its_stream_goes_on(folder, tmp_path):
    """Of ten shards the fifth is not there."""
    log = SkipLog(tmp_path)
    batches = loader(pipe(folder, "test $0 != /04.tar && cat 2>/dev/null", streams=2), **HOW)
    command = f"case {folder}/{{00..09}}.tar in *04.tar) exit 22;; *) cat {folder}/{{00..09}}.tar;; esac"
    del batches, command
    (tmp_path / "04.tar").write_bytes(b"")
    source = opened(f"pipe:cat {{{folder}/00,{folder}/01,{tmp_path}/04,{folder}/03}}.tar", streams=2)
    batches, found = loader(source, streams=2, report=log, **HOW), []
    for _ in range(6):
        batch, _ = next(batches)
        found += list(zip(batch.ids.tolist(), batch.visits.tolist(), strict=True))
    for epoch in range(4):
        assert sorted(i // PLACES * 3 + i % PLACES for i, visit in found if visit == epoch) == [*range(6), *range(9, 12)]
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["epoch"] for row in rows[:4]] == [0, 1, 2, 3] and {row["id"] for row in rows} == {2 * PLACES}
    assert {row["why"] for row in rows} == {f"the rest of pipe:cat {tmp_path}/04.tar: empty file at byte 0"}


def test_a_stream_that_gets_nothing_stops_the_run_with_the_reasons(folder, tmp_path, taken):
    how = {**HOW, "max_skipped": 0.99}
    with pytest.raises(ConfigError, match=r"stream 0 of 2 has no shard that can be used:(\n  pipe:false .*status 1.*){5}$"):
        next(loader(pipe(folder, "false"), streams=2, **how))
    photos.plain_tar(tmp_path / "00.tar", {"readme": b"x"})
    photos.plain_tar(tmp_path / "01.tar", {"a.jpg": taken[0].content})
    with pytest.raises(ConfigError, match=r"stream 0 of 1 (.|\n)*00.tar: no samples(.|\n)*no caption|no caption(.|\n)*no sam"):
        next(loader(opened(f"pipe:cat {tmp_path}/{{00,01}}.tar", streams=1), streams=1, **how))
    photos.plain_tar(tmp_path / "02.tar", {"a.jpg": b"no image", "a.txt": b"x"})
    with pytest.raises(ConfigError, match=r"1 of 1,000 samples cannot be used(.|\n)*not a readable image"):  # not for ever
        next(loader(opened(f"pipe:cat {tmp_path}/02.tar", streams=1), streams=1, **how))


def test_more_streams_than_shards(folder):
    with pytest.raises(ConfigError, match=r"data.streams is 64, and pipe:cat .* is 10 shard\(s\).*most 10.*data.streams=8\)"):
        pipe(folder, streams=64)
    assert isinstance(pipe(folder, streams=10), Pipe)


@pytest.mark.parametrize("key", ["samples", "cache", "images", "split"])
def test_keys_that_a_pipe_has_no_use_for(folder, key):
    with pytest.raises(ConfigError, match=rf"data.{key} is .*, and a pipe, read in its own order, has no use for it"):
        pipe(folder, **{key: 5 if key == "samples" else str(folder)})
    with pytest.raises(ConfigError, match="is not known before it is read"):
        pipe(folder).identity()


def test_what_a_shard_gave_before_and_does_not_give_again_is_told(folder):
    walk = PipeWalk(pipe(folder), 1, 0)
    shard = walk.advance(0, 0)[0] // PLACES
    short = Pipe(f"pipe:head -c 7000 {folder}/{{00..09}}.tar")  # one sample
    again = PipeWalk(short, 1, 0)
    sample, _, cursor = again.advance(0, 3)  # at 2 it may have been the sample and the rest
    assert (sample, cursor) == (shard * PLACES + 3, 4)
    found = short.load(torch.tensor([sample]), torch.tensor([0]), 8)
    assert "it gave 3 samples before, and now 1" in found.damaged[0] and not short.held
    assert again.advance(0, cursor)[0] // PLACES != shard


def test_a_command_ends_with_its_reader(folder, tmp_path):
    """Also one that has more to say, and one that waits."""
    path = folder / "00.tar"
    for command in (f"cat {path} /dev/zero", f"cat {path}; head -c 1000000 /dev/zero; sleep 30; true {tmp_path}"):
        items = _read(f"pipe:{command}")
        assert next(items).key
        began = time.monotonic()
        items.close()
        assert time.monotonic() - began < 5
        assert not subprocess.run(["pgrep", "-f", f"^sh -c {command[:40]}"], capture_output=True, text=True).stdout
