"""What a run says of itself: residuals by noise band, the gradient's norm, TensorBoard, Weights & Biases, a trace."""

import importlib.util
import json
import math
import struct
import sys
from dataclasses import replace

import pytest
import runs
import test_sds_clip as sds
import tiny
import torch

from fastsds.config import ConfigError, check, load_recipe
from fastsds.recipes.bands import BANDS, NoiseBands
from fastsds.recipes.sds_clip import SDSCLIP
from fastsds.schedule import level_range, log_snr
from fastsds.teacher import Teacher
from fastsds.testing import alphas_cumprod

TIMES = ("images_per_s", "seconds")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ["--recipe", str(runs.write_recipe(tmp_path_factory.mktemp("tiny")))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return Teacher.load(tiny.save_teacher(tmp_path_factory.mktemp("teacher"), "v_prediction"), dtype=torch.float64)


# -- residual by noise band --------------------------------------------------------------------------------------------


def by_hand(abar, residual, weighted, low, high) -> dict[str, float]:
    """Means in equal bands, with Python's numbers alone."""
    found: dict[int, list] = {}
    for a, r, w in zip(abar.tolist(), residual.tolist(), weighted.tolist(), strict=True):
        place = (math.log(a / (1 - a)) - low) / (high - low) * BANDS
        found.setdefault(min(max(int(place), 0), BANDS - 1), []).append((r, w))
    edges = [low + (high - low) * k / BANDS for k in range(BANDS + 1)]
    means = {}
    for k, rows in sorted(found.items()):
        name = f"{edges[k]:.2f}_{edges[k + 1]:.2f}"
        for what, column in zip(("residual", "weighted"), zip(*rows, strict=True), strict=True):
            means[f"{what}/{name}"] = sum(column) / len(column)
    return means


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("gradient", ["sds", "full", "amortised"])
def test_residuals_are_those_of_a_float64_computation_by_hand(teacher, gradient, micro_batch):
    """Over two steps, the last of which asks; the means over all bands are the loss itself."""
    loss = sds.setting(gradient=gradient, weighting="inverse_snr_root")
    low, high = level_range(teacher.alphas_cumprod, 600, 1000)
    head = torch.nn.Module()
    head.pull_back = lambda f, g: g.flatten(1)[:, : f.shape[1]]
    recipe = SDSCLIP(loss, teacher, sds.SEED, head=head, micro_batch=micro_batch, levels=(low, high))
    rows, values = [], []
    for step in range(2):
        batch, z = sds.make_batch(6, first=6 * step), sds.latents(6, seed=step)
        if gradient == "amortised":
            t = torch.linspace(600, 999, 6).round().long()
            targets = torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).half()
            batch = replace(batch, targets=targets, abar=teacher.alphas_cumprod[t])
            abar = batch.abar.double()
            error = (z - targets.double()).square().flatten(1).mean(1)
            rows.append((abar, error * abar / (1 - abar), error))  # v = 1 with this weighting
        else:
            t, w, eps, eps_hat, _ = sds.oracle(teacher, loss, z, batch)
            residual = (eps_hat - eps).square().flatten(1).mean(1)
            rows.append((teacher.alphas_cumprod.double()[t], residual, w.flatten() * residual))
        parts = recipe(sds.output(z), batch, step, diagnose=step == 1)
        assert any("/" in key for key in parts) == (step == 1)
        values.append(parts["sds"].item())
    expected = by_hand(*(torch.cat(column).detach() for column in zip(*rows, strict=True)), low, high)
    found = {key: value.item() for key, value in parts.items() if "/" in key}
    assert found.keys() == expected.keys() and len(found) > BANDS
    assert found == pytest.approx(expected, rel=1e-5 if gradient == "amortised" else 1e-6)
    assert sum(values) / 2 == pytest.approx(torch.cat([w for *_, w in rows]).mean().item(), rel=1e-5)
    assert recipe.state_dict() == {}  # what was said is not said again


def test_a_band_without_a_sample_is_left_out_and_the_ends_belong():
    schedule = alphas_cumprod()
    bands = NoiseBands(*level_range(schedule, 300, 800))
    level = log_snr(schedule)
    assert bands.edges[0] == level[799] and bands.edges[-1] == level[300]
    ends = schedule[torch.tensor([300, 799])]
    bands.add(ends, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0]))
    names = bands.names()
    assert {k: v.item() for k, v in bands.means().items()} == {
        f"residual/{names[0]}": 3.0, f"weighted/{names[0]}": 6.0, f"residual/{names[-1]}": 1.0, f"weighted/{names[-1]}": 2.0,
    }  # fmt: skip
    assert bands.means() == {}


def test_a_narrow_range_and_a_level_without_signal():
    schedule = alphas_cumprod().double()
    narrow = NoiseBands(*level_range(schedule, 500, 503))
    assert len(set(narrow.names())) == BANDS
    single = NoiseBands(*level_range(schedule, 500, 501))
    single.add(schedule[[500]], torch.ones(1), torch.ones(1))
    assert len(single.means()) == 2
    schedule[-1] = 0.0  # zero terminal SNR
    low, high = level_range(schedule, 900, 1000)
    assert math.isfinite(low) and low == log_snr(schedule)[998]
    bands = NoiseBands(low, high)
    bands.add(schedule[[999]], torch.tensor([5.0]), torch.tensor([float("nan")]))
    bands.add(schedule[[900]], torch.tensor([7.0]), torch.tensor([7.0]))
    first, last = bands.names()[0], bands.names()[-1]
    means = bands.means()
    assert means[f"residual/{first}"] == 5.0 and means[f"weighted/{first}"].isnan()
    assert means[f"weighted/{last}"] == 7.0  # one that is not a number spoils no other band


def test_residuals_survive_a_checkpoint_between_two_rows(base, tmp_path):
    argv = [*base, *runs.sets("steps=9", "log_every=4", "checkpoint_every=3")]
    assert runs.train(*argv, "--output", tmp_path / "whole") == 0
    assert runs.train(*argv, "--output", tmp_path / "run", "--resume", runs.at(tmp_path / "whole", 6)) == 0
    ours, theirs = ([{k: v for k, v in row.items() if k not in TIMES} for row in runs.rows(tmp_path / name)]
                    for name in ("run", "whole"))  # fmt: skip
    assert [row["step"] for row in theirs] == [4, 8, 9] and ours == theirs[1:]
    assert sum("/" in key for key in theirs[1]) == 2 * BANDS


def test_what_a_checkpoint_kept_of_all_ranks_is_counted_once(teacher):
    sums = torch.rand(3, BANDS, dtype=torch.float64)
    ranks = [SDSCLIP(sds.setting(), teacher, world_size=2, rank=rank) for rank in range(2)]
    for recipe in ranks:
        recipe.load_state_dict({"bands": sums})
    assert torch.equal(ranks[0].bands.sums + ranks[1].bands.sums, sums)


def test_a_bank_says_which_levels_it_has(base, tmp_path, teacher):
    from fastsds.teacher import bank

    sets = runs.sets("loss.gradient=amortised", "data.samples=64", "bank.draws=2", "steps=2", f"bank.path={tmp_path / 'bank'}")
    assert bank.main(["build", *base, *sets]) == 0
    assert runs.train(*base, *sets, "--output", tmp_path / "run") == 0
    low, high = level_range(teacher.alphas_cumprod, 500, 900)  # t in [0.5, 0.9] T
    found = {key.split("/")[1] for row in runs.rows(tmp_path / "run") for key in row if key.startswith("residual/")}
    assert found <= set(NoiseBands(low, high).names()) and len(found) == BANDS


# -- the gradient's norm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.0, 1e9])
def test_the_gradients_norm_is_torchs_before_clipping(base, tmp_path, monkeypatch, clip):
    from fastsds.engine import TorchEngine

    norms, step = [], TorchEngine.step

    def spy(self):
        if (self.micro_steps + 1) % self.accumulation == 0:
            whole = torch.cat([p.grad.flatten().double() for p in self.module.parameters() if p.grad is not None])
            norms.append(whole.norm().item())
        step(self)

    monkeypatch.setattr(TorchEngine, "step", spy)
    assert runs.train(*base, *runs.sets("steps=4", f"optimizer.clip={clip}"), "--output", tmp_path / "run") == 0
    assert runs.losses(tmp_path / "run", "grad_norm") == pytest.approx(norms, rel=1e-6) and len(norms) == 4


# -- TensorBoard, Weights & Biases -------------------------------------------------------------------------------------


def test_tensorboard_reads_back_what_the_rows_say_also_of_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = runs.sets("steps=4", "data.batch=4", "log_every=1", "eval.every=2", "eval.items=3", "log.tensorboard=true",
                     "checkpoint_every=2")  # fmt: skip
    run = tmp_path / "run"
    assert runs.train(*argv, "--output", run) == 0
    assert runs.train(*argv, "--output", run, "--resume", runs.at(run, 2)) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for split in ("train", "eval"):
        rows = runs.rows(run, split)
        keys = {key for row in rows for key, value in row.items() if isinstance(value, float)}
        assert len(keys) > 5
        for key in keys:
            told = {e.step: e.value for e in events.Scalars(f"{split}/{key}")}
            assert told == pytest.approx({row["step"]: row[key] for row in rows if key in row}, rel=1e-6), key
    assert len(events.Scalars("train/loss")) == 4  # what the first start wrote after step 2 is taken back


WANDB = """
import json, socket, sys
def refuse(*args, **kwargs): raise AssertionError("the network was asked")
connect = socket.socket.connect
def local(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"): refuse()
    return connect(self, address)
socket.socket.connect, socket.getaddrinfo = local, refuse
sys.path.insert(0, "tests")
import runs
code = runs.train(*sys.argv[1:])
import wandb
assert wandb.run is not None
print("name", wandb.run.name, "project", wandb.run.project, "seed", wandb.run.config["seed"])
wandb.finish()
sys.exit(code)
"""


@pytest.mark.slow
def test_weights_and_biases_without_a_network(base, tmp_path, python):
    argv = [*base, *runs.sets("steps=4", "log_every=2", "log.wandb=shelf"), "--output", tmp_path / "kept"]
    env = {"WANDB_MODE": "offline", "WANDB_DIR": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    done = python("-c", WANDB, *argv, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "name kept project shelf seed 0" in done.stdout
    (file,) = (tmp_path / "kept" / "wandb").glob("offline-run-*/run-*.wandb")
    told = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            told[row["_step"]] = row
    for row in runs.rows(tmp_path / "kept"):
        for key in ("loss", "grad_norm", "lr"):
            assert told[row["step"]][f"train/{key}"] == pytest.approx(row[key], rel=1e-9)


def records(file):
    """The records of a W&B file: blocks of 32 KiB of pieces, each after crc, length and kind (whole, first, middle, last)."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_without_an_account_there_is_one_error_and_no_run(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert runs.train(*base, *runs.sets("steps=2", "log.wandb=shelf"), "--output", tmp_path / "run") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "log.wandb" in errors[0] and "WANDB_MODE=offline" in errors[0]
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert runs.train(*base, *runs.sets("steps=2"), "--output", tmp_path / "run") == 0  # so the same folder can be used


@pytest.mark.parametrize(("key", "package"), [("log.tensorboard=true", "tensorboard"), ("log.wandb=shelf", "wandb")])
def test_a_missing_package_is_named_before_anything_runs(monkeypatch, key, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    check(load_recipe(None, []))
    with pytest.raises(ConfigError, match=r"package " + package + r" is missing: pip install 'fastsds\[logs\]'"):
        check(load_recipe(None, [key]))


def test_a_run_that_asks_for_neither_needs_neither(base, tmp_path, monkeypatch):
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    assert runs.train(*base, *runs.sets("steps=1"), "--output", tmp_path / "run") == 0


# -- a trace -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "asked", "name"), [(7, 2, "steps_4_5"), (3, 5, "steps_1_3")])
def test_a_trace_of_the_steps_after_a_warm_up(base, tmp_path, steps, asked, name):
    argv = [*base, *runs.sets(f"steps={steps}"), "--profile", asked]
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name == f"{name}.json"
    events = json.loads(file.read_text())["traceEvents"]
    adams = [e for e in events if e.get("name", "").startswith("Optimizer.step#AdamW")]
    assert len(adams) == min(asked, steps)
    assert any(e.get("name") == "aten::convolution" for e in events)


def test_a_trace_changes_no_loss_and_a_number_of_steps_is_one(base, tmp_path, capfd):
    for name, more in (("with", ["--profile", "1"]), ("without", [])):
        assert runs.train(*base, *runs.sets("steps=5"), *more, "--output", tmp_path / name) == 0
    assert runs.losses(tmp_path / "with") == runs.losses(tmp_path / "without")
    assert not (tmp_path / "without" / "profile").exists()
    assert runs.train(*base, "--profile", "-1", "--output", tmp_path / "no") == 2
    assert "--profile" in capfd.readouterr().err and not (tmp_path / "no").exists()
