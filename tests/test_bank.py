"""The bank: its targets are the teacher's, whoever writes them and however often it is stopped; what it is of is checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from fastsds import config, ops
from fastsds.config import ConfigError
from fastsds.data.sources import open_source
from fastsds.teacher import Teacher, bank
from fastsds.teacher.shards import Shards

ROWS, DRAWS = 70, 3
SETS = (
    "loss.gradient=amortised", "loss.t=[0.2, 0.9]", f"data.samples={ROWS}", "data.batch=16", f"bank.draws={DRAWS}",
    "bank.seed=4", "teacher.micro_batch=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.write_recipe(tmp_path_factory.mktemp("tiny"))


def recipe_of(base, folder, *more):
    return config.load_recipe(base, [*SETS, f"bank.path={folder}", *more])


def made(base, folder, *more, rank=0, world=1):
    recipe = recipe_of(base, folder, *more)
    teacher = Teacher.load(recipe.teacher.path)
    bank.build(recipe, teacher, open_source(recipe.data), rank, world)
    return recipe


@pytest.fixture(scope="module")
def built(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("banks") / "bank"
    return made(base, folder), folder


def opened(recipe, **how):
    found = bank.Bank(recipe)
    found.attach(open_source(recipe.data), **how)
    return found


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_targets_are_the_teachers(built):
    recipe, _ = built
    teacher, source = Teacher.load(recipe.teacher.path), open_source(recipe.data)
    ids, visits = torch.tensor([69, 3, 0, 41]), torch.tensor([0, 1, 5, 3])  # visits 5 and 3 take draws 2 and 0
    samples = source.load(ids, visits, teacher.image_size)
    found = opened(recipe).read(ids, visits, samples)
    text = opened(recipe).texts(ids, visits, samples)["text"]
    torch.testing.assert_close(text.float(), teacher.embed(samples.captions), rtol=1e-3, atol=1e-3)
    z = teacher.encode(samples.pixels).half().float()
    for row, k in enumerate((0, 1, 2, 0)):
        t, noise = (ops.Noise(4, ops.draw(of, k), ids[row : row + 1]) for of in (ops.Purpose.TIMESTEP, ops.Purpose.NOISE))
        t = t.randint(200, 900)
        expected = teacher.targets(z[row : row + 1], t, noise, text[row : row + 1].float())
        torch.testing.assert_close(found["targets"][row : row + 1].float(), expected, rtol=2e-3, atol=2e-3)
        assert found["abar"][row] == teacher.alphas_cumprod[t]


def test_an_interrupted_build_goes_on_and_a_torn_file_counts_for_nothing(base, built, tmp_path, monkeypatch):
    whole, written = files(built[1]), []
    claim = Shards.claim

    def until(self, shard):
        written.append(shard)
        if len(written) == 13:
            raise KeyboardInterrupt
        return claim(self, shard)

    monkeypatch.setattr(Shards, "claim", until)
    with pytest.raises(KeyboardInterrupt):
        made(base, tmp_path / "bank")
    monkeypatch.undo()
    assert 0 < len(files(tmp_path / "bank")) < len(whole)
    recipe = recipe_of(base, tmp_path / "bank")
    with pytest.raises(ConfigError, match="is not whole; .*fastsds bank build"):
        opened(recipe)
    (tmp_path / "bank" / "generation_0000").mkdir(exist_ok=True)
    (tmp_path / "bank" / "generation_0000" / ".shard_00005.partial").write_bytes(b"torn")
    made(base, tmp_path / "bank")
    assert files(tmp_path / "bank") == whole
    assert not list((tmp_path / "bank").rglob(".*"))


def test_a_killed_writer_leaves_nothing_in_the_way(base, built, tmp_path):
    command = [sys.executable, "-m", "fastsds.cli", "bank", "build", "--recipe", str(base)]
    command += runs.sets(*SETS, f"bank.path={tmp_path / 'bank'}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_env())
    while not list(tmp_path.rglob("shard_*.safetensors")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made(base, tmp_path / "bank")
    assert files(tmp_path / "bank") == files(built[1])


def test_two_ranks_and_two_writers_make_the_same_bank(base, built, tmp_path):
    """Two processes that do not know of each other, each rank 0 of 1; and a third that is rank 1 of 2."""
    context = get_context("fork")
    how = [{}, {}, {"rank": 1, "world": 2}]
    writers = [context.Process(target=_writer, args=(base, tmp_path / "bank", kwargs)) for kwargs in how]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert files(tmp_path / "bank") == files(built[1])


def _writer(base, folder, how):
    torch.set_num_threads(1)
    made(base, folder, **how)
    os._exit(0)


def _env():
    return {**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("change", "words"), [
    ("bank.draws=2", "made with draws 3, expected 2"), ("bank.seed=5", "made with seed 4, expected 5"),
    ("loss.t=[0.3, 0.9]", r"made with loss.t \[0.2, 0.9\], expected \[0.3, 0.9\]"),
    ("data.samples=69", "made with data .* expected"),
])  # fmt: skip
def test_a_bank_of_other_settings_or_data_is_refused(base, built, change, words):
    recipe = recipe_of(base, built[1], change)
    with pytest.raises(ConfigError, match=words):
        opened(recipe)
    before = files(built[1])
    with pytest.raises(ConfigError, match=words):
        made(base, built[1], change)
    assert files(built[1]) == before


def test_a_changed_image_of_the_same_size_is_noticed(base, tmp_path):
    """The names, sizes and captions are the data's identity; what is in a file is compared when it is read."""
    from PIL import Image

    rows = ["filepath\ttitle"]
    for i, image in enumerate(tiny.pixels(16)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.bmp")
        rows.append(f"{i}.bmp\ta red ring, number {i}")
    (tmp_path / "data.tsv").write_text("\n".join(rows) + "\n")
    sets = (f"data.source={tmp_path / 'data.tsv'}", "data.samples=16")
    recipe, ids = made(base, tmp_path / "bank", *sets), torch.arange(16)
    source = open_source(recipe.data)
    opened(recipe).read(ids, ids * 0, source.load(ids, ids * 0, tiny.IMAGE))
    content = bytearray((tmp_path / "5.bmp").read_bytes())
    content[-1] ^= 1
    (tmp_path / "5.bmp").write_bytes(content)
    found = opened(recipe)
    found.read(ids[:5], ids[:5] * 0, source.load(ids[:5], ids[:5] * 0, tiny.IMAGE))
    with pytest.raises(ConfigError, match="pair 5, 'a red ring, number 5', has another image or caption"):
        found.read(ids, ids * 0, source.load(ids, ids * 0, tiny.IMAGE))


def test_each_caption_of_an_image_has_targets_and_a_damaged_image_is_passed_over(base, tmp_path, monkeypatch):
    from PIL import Image

    rows = ["filepath\ttitle"]
    for i, image in enumerate(tiny.pixels(24)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.bmp")
        rows += [f"{i}.bmp\t{said}, number {i}" for said in ("a red ring", "the blue ring", "a cross")[: 1 + i % 3]]
    (tmp_path / "7.bmp").write_bytes(b"not an image")
    (tmp_path / "data.tsv").write_text("\n".join(rows) + "\n")
    sets = (f"data.source={tmp_path / 'data.tsv'}", "data.samples=24", "data.batch=8", "steps=12")
    with pytest.raises(ConfigError, match=r"and 2 of 48 pairs cannot be used:(\n  7.bmp: not a readable image .cannot.*){2}"):
        made(base, tmp_path / "bank", *sets)
    sets += ("data.max_skipped=0.05",)
    recipe, teacher = made(base, tmp_path / "bank", *sets), Teacher.load(base.parent / "teacher")
    source, found, ids = open_source(recipe.data), opened(recipe), torch.arange(24)
    samples = source.load(ids, ids * 0 + 5, tiny.IMAGE).take([i for i in range(24) if i != 7])
    assert len(set(samples.rows.tolist())) == 23 and samples.rows.max() > 24
    answers = found.targets(None, samples.rows * 0 + 5, samples)
    t = ops.Noise(4, ops.draw(ops.Purpose.TIMESTEP, 5 % DRAWS), samples.rows).randint(200, 900)
    assert torch.equal(answers["abar"], teacher.alphas_cumprod[t])
    for name, expected in (("text", teacher.embed(samples.captions)), ("latents", teacher.encode(samples.pixels))):
        answer = (found.texts if name == "text" else found.latents)(None, None, samples)[name]
        torch.testing.assert_close(answer.float(), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(Teacher, "load", lambda *_, **__: pytest.fail("a teacher was loaded"))
    for gradient in ("amortised", "latents"):
        out = tmp_path / gradient
        assert all(row["sds"] > 0 for row in train(base, tmp_path / "bank", out, *sets, f"loss.gradient={gradient}"))
        skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
        assert {row["id"] for row in skipped} == {7} and [row["epoch"] for row in skipped] == list(range(len(skipped)))
        assert len(skipped) == 8  # 12 x 2 x 8 images of 23 good ones


def test_a_bank_of_another_teacher_or_a_damaged_one_is_refused(base, built, tmp_path):
    recipe, folder = built
    other = tiny.save_teacher(tmp_path / "other", scale=0.25)
    unet = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ConfigError, match="made with teacher unet/diffusion_pytorch_model.safetensors "):
        bank.Bank(recipe_of(base, folder, f"teacher.path={other}"))
    with pytest.raises(ConfigError, match="holds no bank; .*fastsds bank build"):
        bank.Bank(recipe_of(base, tmp_path / "nothing"))
    shutil.copytree(folder, tmp_path / "bank")
    shard = tmp_path / "bank" / "generation_0000" / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    source = open_source(recipe.data)
    first = torch.tensor([0])
    with pytest.raises(ConfigError, match="shard_00000.safetensors: damaged"):
        opened(recipe_of(base, tmp_path / "bank")).read(first, first, source.load(first, first * 0, tiny.IMAGE))


def test_it_says_what_it_will_cost_and_refuses_a_full_disk(base, tmp_path, capsys, monkeypatch):
    recipe = made(base, tmp_path / "bank")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"bank {recipe.bank.path}: {ROWS} samples x {DRAWS} targets in ") and "MiB to write" in said[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(ConfigError, match="MiB free, the bank needs"):
        made(base, tmp_path / "other")
    assert not (tmp_path / "other").exists()  # a smaller bank may be built there


def test_a_disk_that_fills_up_all_the_same_keeps_whole_shards(base, tmp_path):
    """The kernel refuses bytes past a limit, as it does on a full disk."""
    program = (
        "import resource, signal, sys; from fastsds import cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, -1)); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "bank", "build", "--recipe", str(base)]
    command += runs.sets(*SETS, f"bank.path={tmp_path}")
    done = subprocess.run(command, env=_env(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "shard_00000.safetensors: cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*shard*") if path.stat().st_size]
    made(base, tmp_path)


def test_targets_of_another_bank_are_refused(base, built, tmp_path):
    """What a run made for itself before: from a bank that has since been built anew of other data."""
    made(base, tmp_path / "other", "bank.seed=5")
    recipe = recipe_of(base, built[1], f"bank.refresh_every={DRAWS}", f"output={tmp_path / 'run'}")
    shutil.copytree(tmp_path / "other" / "generation_0000", tmp_path / "run" / "bank" / "generation_0001")
    with pytest.raises(ConfigError, match="generation_0001: made with seed 5, expected 4"):
        opened(recipe, teacher=Teacher.load(recipe.teacher.path, parts=("unet",))).reach(DRAWS)


@pytest.mark.parametrize(("sets", "words"), [
    (("loss.gradient=amortised",), "bank.path is null"),
    (("loss.gradient=amortised", "bank.path=b", "loss.noised=false"), "loss.noised"),
    (("bank.path=b", "loss.captions=shuffled"), "loss.captions is 'shuffled'"),
    (("bank.refresh_every=2", "bank.draws=3"), "bank.draws is 3"), (("bank.draws=0",), "at least 1"),
    (("teacher.micro_batch=5",), "a divisor of 32"), (("loss.gradient=amortised", "bank.path=''"), "bank.path is the text ''"),
])  # fmt: skip
def test_recipes_that_make_no_sense(sets, words):
    with pytest.raises(ConfigError, match=words):
        config.check(config.load_recipe(None, sets))


def test_a_bank_may_be_made_by_more_at_a_time_than_a_batch():
    config.check(config.load_recipe(None, ("loss.gradient=amortised", "bank.path=b", "teacher.micro_batch=64")))


def test_levels_that_the_teacher_does_not_have(base, tmp_path):
    with pytest.raises(ConfigError, match="loss: log_snr: no timestep lies in"):
        made(base, tmp_path / "bank", "loss.t=null", "loss.log_snr=[50, 60]")
    assert not (tmp_path / "bank").exists()


def test_the_command_line(tmp_path, capsys):
    for more, words in (((), "bank.path is null"), (("bank.path=x",), "the world is endless")):
        with pytest.raises(ConfigError, match=words):
            bank.main(["build", *runs.sets(*more)])


# -- training from it --------------------------------------------------------------------------------------------------


def train(base, folder, output, *more):
    assert runs.train("--recipe", base, *runs.sets(*SETS, f"bank.path={folder}", *more), "--output", output) == 0
    return runs.rows(output)


def test_training_from_the_bank_opens_no_teacher(base, built, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "load", lambda *_, **__: pytest.fail("a teacher was loaded"))
    rows = train(base, built[1], tmp_path / "run", "steps=12", "data.workers=1", "head.init=warmup", "head.warmup_steps=3")
    assert all(row["sds"] > 0 for row in rows) and rows[-1]["sds"] < rows[0]["sds"]


def test_a_head_is_solved_for_from_the_banks_latents(base, built, tmp_path, monkeypatch):
    """As from the VAE's, to the rounding of fp16, and without a teacher."""
    sets = ("steps=1", "head.init=ridge", f"head.samples={ROWS - 8}", "student.tune=layernorm", "optimizer.head_lr=1e-9")
    train(base, built[1], tmp_path / "vae", *sets, "loss.gradient=latents", "bank.path=null")
    monkeypatch.setattr(Teacher, "load", lambda *_, **__: pytest.fail("a teacher was loaded"))
    train(base, built[1], tmp_path / "bank", *sets)
    a, b = (load_file(tmp_path / name / "student" / "head.safetensors") for name in ("vae", "bank"))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_refreshed_targets_are_new_and_a_resumed_run_makes_them_again(base, built, tmp_path, monkeypatch):
    """refresh_every = K makes generation g from draws g K .. g K + K - 1; the last that is read is kept, and the one before."""
    sets, before = (f"bank.refresh_every={DRAWS}", "steps=21", "checkpoint_every=8"), files(built[1])
    fixed = train(base, built[1], tmp_path / "fixed", "steps=21")
    kept = []
    monkeypatch.setattr(bank.Bank, "close", lambda self: kept.extend(path.name for path in self.refreshed.iterdir()))
    rows = train(base, built[1], tmp_path / "run", *sets)  # 21 x 32 images = 9.6 epochs of 70
    assert sorted(kept) == ["generation_0002", "generation_0003"] and files(built[1]) == before
    for ours, theirs in zip(rows, fixed, strict=True):
        assert (ours["sds"] == theirs["sds"]) == (ours["step"] * 32 / ROWS <= DRAWS), ours["step"]
    recipe = recipe_of(base, built[1], *sets, f"output={tmp_path / 'run'}")
    teacher, ids = Teacher.load(recipe.teacher.path, parts=("unet",)), torch.tensor([5, 60])
    samples = open_source(recipe.data).load(ids)
    found = opened(recipe, teacher=teacher).read(ids, torch.tensor([7, 9]), samples)
    for row, draw in enumerate((7, 9)):
        t = ops.Noise(4, ops.draw(ops.Purpose.TIMESTEP, draw), ids[row : row + 1]).randint(200, 900)
        assert found["abar"][row] == teacher.alphas_cumprod[t]
    shutil.rmtree(tmp_path / "run" / "bank")
    monkeypatch.undo()
    resumed = runs.train("--recipe", base, *runs.sets(*SETS, f"bank.path={built[1]}", *sets), "--output",
                         tmp_path / "run", "--resume", tmp_path / "run" / "checkpoints" / "step_00000016")  # fmt: skip
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert resumed == 0 and [(r["step"], r["loss"]) for r in again] == [(r["step"], r["loss"]) for r in rows]
    assert not (tmp_path / "run" / "bank").exists()


def test_all_ranks_make_new_targets_at_the_same_batch(base, built, tmp_path, monkeypatch):
    """Also a rank whose own part of that batch is still in the epoch before: else it waits while the others work."""
    reached, reach, sets = [], bank.Bank.reach, (f"bank.refresh_every={DRAWS}", f"output={tmp_path}")
    monkeypatch.setattr(bank.Bank, "reach", lambda self, epoch: reached.append(epoch) or reach(self, epoch))
    train(base, built[1], tmp_path / "run", *sets, "steps=8")
    assert reached == [((k + 1) * 16 - 1) // ROWS for k in range(16)] and reached[-1] == DRAWS
    recipe = recipe_of(base, built[1], *sets)
    found = opened(recipe, teacher=Teacher.load(recipe.teacher.path, parts=("unet",)))
    found.reach(DRAWS - 1)
    assert not (tmp_path / "bank").exists()
    found.reach(DRAWS)
    assert not Shards.open(tmp_path / "bank" / "generation_0001").missing()
    fixed = opened(recipe_of(base, built[1]))
    fixed.reach(DRAWS)  # the same targets for the whole run: nothing to make, and nobody who could


@pytest.mark.parametrize(("streams", "damaged"), [(4, 1), (64, 4)])
def test_damaged_images_make_no_rank_work_alone_nor_anything_twice(base, tmp_path, monkeypatch, streams, damaged):
    """They bring the streams into an epoch sooner than their positions say, and some streams before others."""
    from PIL import Image

    rows = ["filepath\ttitle"]
    for i, image in enumerate(tiny.pixels(70)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.bmp")
        rows.append(f"{i}.bmp\ta red ring, number {i}")
    for i in range(damaged):
        (tmp_path / f"{7 * i}.bmp").write_bytes(b"not an image")
    (tmp_path / "data.tsv").write_text("\n".join(rows) + "\n")
    sets = (f"data.source={tmp_path / 'data.tsv'}", "data.samples=null", "data.batch=16", "data.accumulation=1", "steps=36",
            "bank.draws=1", "bank.refresh_every=1", "data.max_skipped=0.1", f"data.streams={streams}")  # fmt: skip
    made(base, tmp_path / "bank", *sets)
    filled, read, fill, targets = [], [], bank.fill_generation, bank.Bank.targets
    monkeypatch.setattr(bank, "fill_generation", lambda parent, cache, teacher, g, *rest: (
        filled.append(g), fill(parent, cache, teacher, g, *rest)))  # fmt: skip

    def watched(self, ids, visits, samples):
        before = len(filled)
        found = targets(self, ids, visits, samples)
        read.append(len(filled) - before)
        return found

    monkeypatch.setattr(bank.Bank, "targets", watched)
    train(base, tmp_path / "bank", tmp_path / "run", *sets)
    assert filled == sorted(set(filled)) and filled[-1] >= 8
    assert streams == 64 or not any(read)  # all by `reach`, which every rank calls at the same batch


def test_a_bank_in_the_runs_own_folder_outlives_the_run(base, built, tmp_path):
    """`bank.path` may be OUTPUT/bank, where a run keeps the targets that it makes for itself."""
    shutil.copytree(built[1], tmp_path / "run" / "bank")
    train(base, tmp_path / "run" / "bank", tmp_path / "run", f"bank.refresh_every={DRAWS}", "steps=20")  # 9 epochs
    assert files(tmp_path / "run" / "bank") == files(built[1])


def test_cached_embeddings_serve_sds_and_leave_the_text_encoder_unread(base, built, tmp_path):
    sets = runs.sets(*SETS[1:], "loss.gradient=sds", "loss.t=[0.3, 0.8]", "steps=5")  # other levels than the bank's targets
    losses = {}
    for name, more in (("own", []), ("cached", runs.sets(f"bank.path={built[1]}"))):
        assert runs.train("--recipe", base, *sets, *more, "--output", tmp_path / name) == 0
        losses[name] = [json.loads(line)["sds"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert losses["own"] == pytest.approx(losses["cached"], rel=1e-3) and losses["own"] != losses["cached"]
