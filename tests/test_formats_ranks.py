"""Every kind of data trains on two ranks as on one, also a run that goes on in the middle of a shard on other ranks."""

import json

import photos
import pytest
import runs

EQUAL = 1e-5
SETS = (
    "steps=4", "data.batch=8", "data.accumulation=1", "data.streams=2", "data.max_skipped=0.2", "checkpoint_every=2",
    "optimizer.warmup=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Arguments of a run of each format; one image of each is damaged."""
    folder = tmp_path_factory.mktemp("formats")
    recipe, taken = runs.write_recipe(folder), photos.make(20)
    taken[3] = photos.Photo(taken[3].key, taken[3].suffix, b"no image", taken[3].captions)
    made = {name: make(folder / name, taken) for name, make in photos.FORMATS.items()}
    return {name: ["--recipe", recipe, *runs.sets(*SETS), *photos.sets(data)] for name, data in made.items()}


@pytest.fixture(scope="module")
def one(plans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name, argv in plans.items():
        assert runs.train(*argv, "--output", folder / name) == 0, name
    return {name: folder / name for name in plans}


@pytest.fixture(scope="module")
def two(plans, one, tmp_path_factory):
    """Two ranks from the start, and from where one rank was after two steps."""
    zero = ["--config", runs.ROOT / "configs/zero2.json"]
    plan = {name: [*zero, *argv] for name, argv in plans.items()}
    plan |= {f"{name} on": [*zero, *plans[name], "--resume", runs.at(one[name], 2)] for name in ("shards", "pipe", "tsv")}
    return runs.launch(2, plan, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(photos.FORMATS))
def test_two_ranks_are_one(one, two, name):
    assert runs.relative(runs.losses(two[name]), runs.losses(one[name])) < EQUAL
    logs = [(run / "skipped.jsonl").read_text().splitlines() for run in (one[name], two[name])]
    rows = [sorted((row["stream"], row["cursor"], row["id"]) for row in map(json.loads, log)) for log in logs]
    assert rows[0] == rows[1] and len({i for *_, i in rows[0]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipe", "shards", "tsv"])
def test_a_run_of_one_rank_goes_on_on_two_and_back(plans, one, two, tmp_path, name):
    assert runs.relative(runs.losses(two[f"{name} on"]), runs.losses(one[name])[2:]) < EQUAL
    argv = [*plans[name], "--resume", runs.at(two[name], 2), "--output", tmp_path / "back"]
    assert runs.train(*argv) == 0
    assert runs.relative(runs.losses(tmp_path / "back"), runs.losses(one[name])[2:]) < EQUAL
