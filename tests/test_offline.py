"""Nothing is fetched that was not named: with no network local things work, and a hub id fails at once, by name."""

import os
import time

import pytest
import runs

NO_NETWORK = '''
import socket, sys
def refused(*arguments, **how):
    raise AssertionError(f"the network was asked for {arguments[:2]}")
socket.getaddrinfo = socket.create_connection = refused
from fastsds import train
sys.exit(train.main(sys.argv[1:]))
'''


@pytest.fixture(scope="module")
def online():
    """The environment of a user who has not switched the hub off, at a host that does not exist."""
    taken = {name: os.environ.pop(name, None) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    yield {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ.update({name: value for name, value in taken.items() if value is not None})


def test_local_things_never_ask_the_network(tmp_path, python, online):
    recipe = runs.write_recipe(tmp_path)
    done = python("-c", NO_NETWORK, "--recipe", recipe, *runs.sets("steps=2"), "--output", tmp_path / "run", env=online)
    assert done.returncode == 0, done.stderr
    world = python("-c", NO_NETWORK, "--dry-run", "--output", tmp_path / "world", env=online)
    assert world.returncode == 0, world.stderr


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher.path", "hf-hub:nobody/nothing", "something of hf-hub:nobody/nothing is not on this disk"),
        ("student.model", "hf-hub:nobody/nothing", "open_clip_config.json of hf-hub:nobody/nothing is not on this disk"),
        ("student.pretrained", "openai", "openai"),
    ],
)
def test_a_hub_id_fails_within_seconds_and_says_what_is_missing(tmp_path, python, online, key, value, words):
    sets = [f"{key}={value}"] + ["student.model=ViT-B-32-quickgelu"] * (key == "student.pretrained")
    start = time.monotonic()
    done = python("-m", "fastsds.train", *runs.sets(*sets), "--output", tmp_path / "run", env={**online, "HF_HOME": tmp_path})
    took = time.monotonic() - start
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert words in errors[0] and "fetch it where there is a network" in errors[0]
    assert took < 30, f"{took:.0f} s"  # of them about 8 are imports, and the machine may be busy
    assert not (tmp_path / "run").exists()
