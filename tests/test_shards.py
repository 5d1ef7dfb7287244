"""Shards on a disk: which members make a sample, and what is done about one that is cut, at any byte."""

import json
import re
import shutil

import photos
import pytest
import torch
from test_formats import everything, opened

from fastsds.config import ConfigError
from fastsds.data.pipe import _read
from fastsds.data.shards import read_shards

END = 512  # the first block of the two that end an archive


@pytest.fixture(scope="module")
def taken():
    return photos.make(4)


def listing(path):
    """Key -> (captions, what is wrong)."""
    found = read_shards([path])
    keys = [name.partition(" of ")[0] for name in found.names]
    return {key: (said, found.damaged.get(i, "")) for i, (key, said) in enumerate(zip(keys, found.captions, strict=True))}


def test_what_makes_a_sample(tmp_path, taken):
    image = taken[0].content
    path = photos.plain_tar(tmp_path / "x.tar", {
        "__meta__": b"x", "readme": b"x", "./dir/a.JPG": image, "./dir/a.txt": b" two\nlines \n", "./dir/a.seg.png": b"x",
        "b.1.txt": b"x", "c.webp": image, "c.json": b'{"text": ["one", "two", "one"]}', "d.png": image, "d.txt": b" ",
        "d.json": b'{"caption": "of the json", "text": "x"}', "e.jpg": image, "e.cls": b"3", "f.jpg": image, "f.txt": b"\xff",
        "g.txt": b"of no image", "h.jpg": image, "h.json": b"[", "i.jpg": image, "i.json": b'{"caption": 3}',
        "j.jpg": image, "j.json": b'["caption"]', "k.jpg": image, "k.json": b"{}", "l.jpg": image, "l.txt": b"last",
        "__last__/x.jpg": b"x",
    })  # fmt: skip
    found = listing(path)
    assert list(found) == ["./dir/a", *"bcdefghijkl"]
    good = {key: said for key, (said, why) in found.items() if said and not why}
    assert good == {"./dir/a": ("two\nlines",), "c": ("one", "two"), "d": ("of the json",), "l": ("last",)}
    assert found["e"] == found["k"] == ((), "")  # no caption: told from the captions
    wrong = {"b": "no image", "f": "txt: .*codec", "g": "no image", "h": "json: ", "i": "3 is no capt", "j": "json"}
    for key, words in wrong.items():
        assert re.search(words, found[key][1]), (key, found[key])
    source = opened(path, max_skipped=0.9)
    assert set(everything(source).damaged) == {1, *range(4, 11)}
    with pytest.raises(ConfigError, match=r"8 of 12 images cannot be used(.|\n)*e of x.tar: no caption"):
        opened(path)


def test_text_that_is_not_as_it_should_be_ends_no_run(tmp_path, taken):
    """A byte order mark, an emoji of which half was cut off, brackets without end."""
    image, deep = taken[0].content, b"[" * 100_000
    path = photos.plain_tar(tmp_path / "x.tar", {
        "a.jpg": image, "a.txt": "\ufeffmarked".encode(), "b.jpg": image, "b.json": '\ufeff{"caption": "marked"}'.encode(),
        "c.jpg": image, "c.json": b'{"caption": "half \\ud83d of it"}', "d.jpg": image, "d.json": deep,
    })  # fmt: skip
    found = listing(path)
    said = {key: captions for key, (captions, _) in found.items()}
    assert said == {"a": ("marked",), "b": ("marked",), "c": ("half ? of it",), "d": ()}
    assert [key for key, (_, why) in found.items() if why] == ["d"] and "json: maximum recursion" in found["d"][1]
    assert set(everything(opened(path, max_skipped=0.5)).damaged) == {3}


def test_two_files_of_one_name_are_no_sample(tmp_path, taken):
    image = taken[0].content
    pairs = [{f"{key}.jpg": image, f"{key}.txt": b"x"} for key in "aab"]
    archives = [photos.plain_tar(tmp_path / f"{k}.tar", pair) for k, pair in enumerate(pairs)]
    blocks = [path.read_bytes()[: -(-len(image) // 512) * 512 + 1536] for path in archives]
    (tmp_path / "x.tar").write_bytes(b"".join(blocks) + bytes(1024))
    assert listing(tmp_path / "x.tar") == {"a": (("x",), "two files of one name"), "b": (("x",), "")}


def members(taken):
    """The files of an archive, and where each sample ends in it."""
    files, ends, at = {}, [], 0
    for photo in taken:
        for suffix, content in ((photo.suffix, photo.content), ("txt", photo.captions[0].encode())):
            files[f"{photo.key}.{suffix}"] = content
            at += 512 + len(content)
            end, at = at, -(-at // 512) * 512
        ends.append(end)
    return files, ends, at


def test_of_a_cut_shard_what_is_whole_is_used_and_the_rest_counts_once(tmp_path, taken):
    """Cut every 300 bytes and at every block; read on the disk and by pipe, which say the same."""
    files, ends, last = members(taken)
    whole = photos.plain_tar(tmp_path / "whole.tar", files).read_bytes()
    assert whole[last : last + END] == bytes(END)
    path = tmp_path / "x.tar"
    for cut in sorted({*range(0, last + 3 * END, 300), *range(0, last + 3 * END, 512), *ends, last + END}):
        path.write_bytes(whole[:cut])
        found = listing(path)
        good = [photo.key for photo, end in zip(taken, ends, strict=True) if end <= cut]
        assert list(found) == good + ["the rest"] * (cut < last + END), cut
        if cut < last + END:
            at = int(re.search(r"at byte ([\d,]+)$", found["the rest"][1])[1].replace(",", ""))
            assert at <= max(cut, 0) or at - cut < 512, (cut, found)
        piped = list(_read(f"pipe:cat {path}"))
        assert {item.key: (item.captions, item.why) for item in piped} == found, cut
        assert [item.image for item in piped if item.image] == [photo.content for photo in taken[: len(good)]]


def test_a_header_that_is_damaged_ends_a_shard_and_does_not_hide_it(tmp_path, taken):
    files, ends, _ = members(taken)
    path = photos.plain_tar(tmp_path / "x.tar", files)
    third = -(-ends[1] // 512) * 512
    with open(path, "r+b") as file:
        file.seek(third)
        file.write(b"\xff" * 100)
    assert listing(path)["the rest"] == ((), f"no header of tar at byte {third:,}")
    assert [item.why for item in _read(f"pipe:cat {path}")] == ["", "", f"no header of tar at byte {third:,}"]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"x" * 2000])
def test_what_is_no_archive_counts_once(tmp_path, taken, content):
    data = photos.shards(tmp_path, taken, of=2)
    (tmp_path / "02.tar").write_bytes(content)
    source = opened(tmp_path, max_skipped=0.3)
    assert len(source) == 5 and list(everything(source).damaged) == [4]
    with pytest.raises(ConfigError, match=r"1 of 5 images cannot be used(.|\n)*the rest of 02.tar: .* at byte 0"):
        opened(tmp_path)
    assert len(opened(data["source"])) == 4


def test_shards_by_file_folder_or_braces_are_the_same(tmp_path, taken):
    data = photos.shards(tmp_path / "a", taken, of=2)
    (tmp_path / "a" / "notes.json").write_text(json.dumps({}))
    one, two = opened(tmp_path / "a"), opened(data["source"])
    names = [f"x/{p.key} of 0{k // 2}.tar" for k, p in enumerate(taken)]
    assert one.identity() == two.identity() and one.listing.names == names
    assert opened(tmp_path / "a" / "01.tar").captions == one.captions[2:]
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "01.tar", tmp_path / "b" / "02.tar")
    assert opened(f"{tmp_path}/{{a/00,b/02}}.tar").captions == one.captions
    with pytest.raises(ConfigError, match=r"3 of 5 shards are not there or cannot be read: .*/a/02.tar, .*03.tar, .*04.tar$"):
        opened(f"{tmp_path}/a/{{00..04}}.tar")
    with pytest.raises(ConfigError, match=r"data.source: .*: Unbalanced"):
        opened(f"{tmp_path}/a/{{00..04.tar")


@pytest.mark.parametrize(("name", "command"), [("x.tar.gz", "gzip"), ("x.tgz", "gzip"), ("{0..3}.tar.zst", "zstd")])
def test_a_compressed_shard_is_refused_with_the_command_that_unpacks_it(tmp_path, name, command):
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} is compressed; .*pipe:{command} -dc .*{re.escape(name)}"):
        opened(tmp_path / name)


def test_a_shard_that_shrinks_while_it_is_in_use(tmp_path, taken):
    source = opened(photos.tar(tmp_path / "x.tar", taken))
    with open(tmp_path / "x.tar", "r+b") as file:
        file.truncate(4000)
    samples = source.load(torch.tensor([3, 0]), torch.zeros(2, dtype=torch.long), 16)
    assert list(samples.damaged) == [0] and "was cut since" in samples.damaged[0]
