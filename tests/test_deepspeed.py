"""ZeRO 0 to 3 on one and two CPU ranks: the same losses, the same weights, resumable across all of them."""


import numpy as np
import pytest
import released
import runs
import torch
from safetensors.torch import load_file

from fastsds.evaluation.run import evaluate
from fastsds.evaluation.scorer import ClipScorer
from fastsds.evaluation.suite import load_suite
from fastsds.student import load_student

STAGES = (0, 1, 2, 3)
EQUAL = 1e-5  # over 20 steps: the order of summation is all that differs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return ["--recipe", str(runs.write_recipe(folder))]


@pytest.fixture(scope="module")
def banked(base, tmp_path_factory):
    """A bank of the teacher's targets; the set that names it."""
    from fastsds.teacher import bank

    path = f"bank.path={tmp_path_factory.mktemp('banks') / 'bank'}"
    assert bank.main(["build", *map(str, base), *runs.sets(*BANK, path)]) == 0
    return path


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory):
    """Arguments of runs that evaluate before the first step and after each of two: of the world, and of files."""
    path = tmp_path_factory.mktemp("winoground")
    released.write("winoground", path, 25)
    of = {"world": ("eval.suite=world_dev", "eval.items=4"),
          "files": ("eval.suite=winoground", f"eval.data={path}", "eval.items=20")}  # fmt: skip
    return {f"evaluated {name}": [*base, *runs.sets(*EVALUATED, *sets)] for name, sets in of.items()}


@pytest.fixture(scope="module")
def plain(base, banked, evaluated, tmp_path_factory):
    """Plain torch: one rank with the whole batch."""
    folder = tmp_path_factory.mktemp("plain")
    plan = {**evaluated, "base": base, "layernorm": [*base, *runs.sets("student.tune=layernorm")]}
    plan |= {"auto": [*base, *runs.sets(*AUTO)], "world": runs.sets(*WORLD), "bank": [*base, *runs.sets(*BANK, banked)]}
    for name, argv in plan.items():
        assert runs.train(*argv, "--output", folder / name) == 0
    return {name: folder / name for name in plan}


AUTO = ("loss.lambda=auto", "loss.sds_every=2", "loss.captions=shuffled", "loss.negatives=swapped", "log_every=2")
BANK = ("loss.gradient=amortised", "data.samples=96", "bank.draws=2", "bank.refresh_every=3")  # 20 steps: 14 epochs
EVALUATED = (
    "loss.lambda=0", "steps=2", "data.batch=8", "eval.every=1", "checkpoint_every=1", "optimizer.lr=0.01", "optimizer.warmup=0",
)  # fmt: skip
WORLD = ("steps=2", "log_every=1", "data.batch=8", "eval.items=4")
BITS = ("optimizer.name=adamw8bit", "steps=6", "checkpoint_every=3")
HALF = ("precision=bf16", "steps=8", "checkpoint_every=4")


def stage(n: int) -> list[str]:
    return ["--config", f"configs/zero{n}.json"]


def at_stages(evaluated, tight):
    """The runs that evaluate, at ZeRO 0 and 3."""
    configs = {"z0": stage(0), "z3": ["--config", tight]}
    return {f"{z} {name}": [*argv, *config] for name, argv in evaluated.items() for z, config in configs.items()}


@pytest.fixture(scope="module")
def two(base, plain, banked, evaluated, tight, tmp_path_factory):
    """Two ranks, half the micro-batch each: everything in one launch."""
    folder = tmp_path_factory.mktemp("two")
    plan = {f"z{n}": [*base, *stage(n)] for n in STAGES}
    plan["tight"] = [*base, "--config", tight]
    plan["tight_layernorm"] = [*base, "--config", tight, *runs.sets("student.tune=layernorm")]
    plan["auto"] = [*base, *stage(3), *runs.sets(*AUTO)]
    plan["bank"] = [*base, *stage(2), *runs.sets(*BANK, banked)]
    plan["world"] = ["--config", tight, *runs.sets(*WORLD)]
    plan |= at_stages(evaluated, tight)
    for n in STAGES:
        plan[f"bits{n}"] = plan[f"bits{n}_again"] = [*base, *stage(n), *runs.sets(*BITS)]
        plan[f"bits{n}_resumed"] = [*plan[f"bits{n}"], "--resume", runs.at(folder / f"bits{n}", 3)]
        plan[f"from_plain{n}"] = [*base, *stage(n), "--resume", runs.at(plain["base"], 10)]
    return runs.launch(2, plan, folder)


@pytest.fixture(scope="module")
def one(base, two, evaluated, tight, tmp_path_factory):
    """One rank."""
    folder = tmp_path_factory.mktemp("one")
    plan = at_stages(evaluated, tight)
    for n in STAGES:
        plan[f"z{n}"] = [*base, *stage(n)]
        plan[f"z{n}_resumed"] = [*plan[f"z{n}"], "--resume", runs.at(folder / f"z{n}", 10)]
        plan[f"half{n}"] = [*base, *stage(n), *runs.sets(*HALF)]
        plan[f"half{n}_resumed"] = [*plan[f"half{n}"], "--resume", runs.at(folder / f"half{n}", 4)]
    plan["z1_from_two_z3"] = [*base, *stage(1), "--resume", runs.at(two["z3"], 10)]
    plan["z3_from_two_z2"] = [*base, *stage(3), "--resume", runs.at(two["z2"], 10)]
    return runs.launch(1, plan, folder)


@pytest.mark.parametrize("n", STAGES)
def test_two_ranks_are_one_rank_with_the_whole_batch(plain, two, n):
    for key in ("loss", "clip", "sds", "grad_norm"):
        assert runs.relative(runs.losses(two[f"z{n}"], key), runs.losses(plain["base"], key)) < EQUAL
    both = two[f"z{n}"], plain["base"]
    ours, theirs = ([{key: v for key, v in row.items() if "/" in key} for row in runs.rows(run)] for run in both)
    assert [list(row) for row in ours] == [list(row) for row in theirs] and all(len(row) > 8 for row in ours)
    values = ([value for row in of for value in row.values()] for of in (ours, theirs))
    assert runs.relative(*values) < EQUAL


@pytest.mark.parametrize("n", STAGES)
def test_one_rank_is_plain_torch(plain, one, n):
    for key in ("loss", "grad_norm"):
        assert runs.relative(runs.losses(one[f"z{n}"], key), runs.losses(plain["base"], key)) < EQUAL
    assert all(row["grad_norm"] > 0 for row in runs.rows(one[f"half{n}"]))


def test_the_losses_move(plain):
    """Without this, equal losses would say nothing about the update."""
    assert abs(runs.losses(plain["base"], "clip")[-1] - runs.losses(plain["base"], "clip")[0]) > 0.05


@pytest.mark.parametrize("key", ["loss", "clip", "sds", "rho", "cosine", "grad_norm"])
def test_fully_partitioned_parameters(plain, two, key):
    assert runs.relative(runs.losses(two["tight"], key), runs.losses(plain["base"], key)) < EQUAL


def test_lambda_auto_and_the_controls_do_not_see_the_ranks(plain, two):
    for key in ("loss", "lambda", "clip"):
        ours, theirs = ([row[key] for row in runs.rows(run["auto"]) if key in row] for run in (two, plain))
        assert runs.relative(ours, theirs) < EQUAL
    assert len({row["lambda"] for row in runs.rows(plain["auto"]) if "lambda" in row}) > 1


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_what_two_ranks_trained_leaves_the_house(two, tmp_path, to):
    from fastsds import cli

    assert cli.main(["export", str(two["tight"]), "--to", to, "--out", str(tmp_path / "out")]) == 0  # compared in there
    assert "ZeRO 3 on 2 rank(s)" in (tmp_path / "out" / "README.md").read_text()


def test_two_ranks_share_a_bank_and_make_its_next_targets_together(plain, two):
    for key in ("loss", "sds"):
        assert runs.relative(runs.losses(two["bank"], key), runs.losses(plain["bank"], key)) < EQUAL
    assert not (two["bank"] / "bank").exists()


def test_the_embedded_world_and_its_evaluation_under_zero3(plain, two):
    assert runs.relative(runs.losses(two["world"]), runs.losses(plain["world"])) < EQUAL
    ours, theirs = (runs.rows(run["world"], "eval") for run in (two, plain))
    assert ours[0] == theirs[0] and [row["step"] for row in ours] == [0, 2]
    for a, b in zip(*(runs.evaluation(run["world"], 2).rows for run in (two, plain)), strict=True):
        assert a["id"] == b["id"] and np.allclose(a.get("scores", 0), b.get("scores", 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("suite", ["world", "files"])
@pytest.mark.parametrize("engine", ["plain", "one z0", "one z3", "two z0", "two z3"])
def test_evaluation_during_training_is_evaluation_of_the_saved_student(engine, suite, plain, one, two, evaluated):
    ranks, _, zero = engine.partition(" ")
    run = {"plain": plain, "one": one, "two": two}[ranks][f"{zero} evaluated {suite}".strip()]
    sets = dict(word.split("=", 1) for word in evaluated[f"evaluated {suite}"] if "=" in word)
    asked = load_suite(sets["eval.suite"], sets.get("eval.data"), int(sets["eval.items"]))
    rows = {row["step"]: row for row in runs.rows(run, "eval")}
    assert list(rows) == [0, 1, 2]
    for step in (1, 2):
        during = runs.evaluation(run, step)
        after = evaluate(asked, ClipScorer(load_student(runs.at(run, step) / "student").eval()))
        assert during.about["fingerprint"] == after.about["fingerprint"]
        assert during.metrics == after.metrics and during.metrics.items() <= rows[step].items()
        assert all(np.array_equal(during.outcomes[name], values) for name, values in after.outcomes.items())
        for a, b in zip(during.rows, after.rows, strict=True):
            assert a["id"] == b["id"] and np.allclose(a.get("scores", 0), b.get("scores", 0), rtol=0, atol=1e-6)
    first, last = ([row["scores"] for row in runs.evaluation(run, step).rows if "scores" in row] for step in (0, 2))
    assert np.abs(np.subtract(first, last)).max() > 1e-2  # else all steps would be one


@pytest.mark.parametrize("name", [*(f"z{n}" for n in STAGES), "tight"])
def test_final_weights_are_those_of_plain_torch(plain, two, name):
    for file in ("open_clip_model.safetensors", "head.safetensors"):
        ours, theirs = (load_file(run / "student" / file) for run in (two[name], plain["base"]))
        assert set(ours) == set(theirs)
        for key in ours:
            assert ours[key].dtype == torch.float32 and ours[key].shape == theirs[key].shape, key
            if key.endswith("in_proj_bias"):  # a key's bias moves all scores alike: its gradient is rounding, and Adam
                for run in (ours, theirs):  # makes whole steps of that
                    run[key] = torch.stack(run[key].chunk(3))[[0, 2]]
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_frozen_parameters_stay_and_layernorms_train_under_zero3(base, plain, two):
    assert runs.relative(runs.losses(two["tight_layernorm"]), runs.losses(plain["layernorm"])) < EQUAL
    start = load_file(str(base[1]).replace("recipe.yaml", "student/open_clip_model.safetensors"))
    end = load_file(two["tight_layernorm"] / "student" / "open_clip_model.safetensors")
    for key in start:
        trained = ".ln_" in key or key.startswith("ln_")
        assert torch.equal(start[key], end[key]) != trained, key


@pytest.mark.parametrize("n", STAGES)
def test_8bit_adam_runs_and_repeats_itself_at_equal_stage(plain, two, n):
    first = runs.losses(two[f"bits{n}"])
    assert first == runs.losses(two[f"bits{n}_again"])
    assert first[0] == pytest.approx(runs.losses(plain["base"])[0], rel=EQUAL)  # before the first update all are one
    raw = load_file(runs.at(two[f"bits{n}"], 6) / "rank_0.safetensors")
    assert any(t.dtype == torch.uint8 for t in raw.values()), "no state is held in 8 bits"


@pytest.mark.parametrize("n", STAGES)
def test_8bit_adam_resumes_bit_for_bit_at_equal_stage(two, n):
    assert runs.losses(two[f"bits{n}_resumed"]) == runs.losses(two[f"bits{n}"])[3:]


@pytest.mark.parametrize("n", STAGES)
def test_resume_is_bit_for_bit_on_one_rank(one, n):
    assert runs.losses(one[f"z{n}_resumed"]) == runs.losses(one[f"z{n}"])[10:]
    assert runs.losses(one[f"half{n}_resumed"]) == runs.losses(one[f"half{n}"])[4:]


@pytest.mark.parametrize("n", STAGES)
def test_a_plain_checkpoint_goes_on_at_every_stage(plain, two, n):
    assert runs.relative(runs.losses(two[f"from_plain{n}"]), runs.losses(plain["base"])[10:]) < EQUAL


@pytest.mark.parametrize("name", ["z1_from_two_z3", "z3_from_two_z2"])
def test_a_checkpoint_goes_on_at_another_stage_and_number_of_ranks(plain, one, name):
    assert runs.relative(runs.losses(one[name]), runs.losses(plain["base"])[10:]) < EQUAL


@pytest.mark.parametrize("name", ["z2", "z3"])
def test_a_sharded_checkpoint_goes_on_without_deepspeed(base, plain, two, tmp_path, name):
    assert runs.train(*base, "--resume", runs.at(two[name], 10), "--output", tmp_path / "run") == 0
    assert runs.relative(runs.losses(tmp_path / "run"), runs.losses(plain["base"])[10:]) < EQUAL


def test_8bit_state_is_refused_elsewhere(base, two, tmp_path, capfd):
    argv = [*base, *runs.sets(*BITS), "--resume", runs.at(two["bits2"], 3), "--output", tmp_path / "run"]
    assert runs.train(*argv) == 2
    assert "ZeRO 2 on 2 rank(s); this run is plain torch on 1 rank(s)" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n", STAGES)
def test_bf16_follows_fp32(plain, one, n):
    ours, theirs = runs.losses(one[f"half{n}"], "clip"), runs.losses(plain["base"], "clip")[:5]
    assert runs.relative(ours[:5], theirs) < 2e-2  # 8 bits of mantissa; later steps differ by the cosine's length
    assert ours != theirs
    state = load_file(runs.at(one[f"half{n}"], 4) / "student" / "open_clip_model.safetensors")
    rounded = [torch.equal(t, t.bfloat16().float()) for key, t in state.items() if t.numel() > 100]
    assert not all(rounded), "the checkpoint holds bf16 weights, not their fp32 masters"


def test_the_documented_commands_run(base, plain, tmp_path, python):
    """`deepspeed fastsds/train.py` itself, no --num_gpus, on the embedded world; `python -m` with a DeepSpeed file."""
    sets = runs.sets("steps=2", "log_every=1", "data.batch=8", "eval.suite=none")
    done = runs.deepspeed("fastsds/train.py", "--config", "configs/zero2.json", *sets, "--output", tmp_path / "world")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(runs.losses(tmp_path / "world")) == 2
    assert (tmp_path / "world" / "student" / "open_clip_model.safetensors").is_file()
    done = python("-m", "fastsds.train", *base, *stage(1), "--output", tmp_path / "alone")
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.relative(runs.losses(tmp_path / "alone"), runs.losses(plain["base"])) < EQUAL


def test_a_batch_that_does_not_divide_is_one_error_on_two_ranks(tmp_path):
    argv = ["fastsds/train.py", "--config", "configs/zero1.json", "--set", "data.batch=31", "--output", tmp_path / "run"]
    done = runs.deepspeed(*argv, ranks=2)
    assert done.returncode == 2
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "data.batch is 31" in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(base, plain, tmp_path, monkeypatch):
    """Plain torch and every stage follow the CPU's first losses; bf16 and 8-bit Adam run; a resume goes on."""
    plan = {f"z{n}": [*base, *stage(n)] for n in STAGES}
    plan |= {f"half{n}": [*base, *stage(n), *runs.sets(*HALF)] for n in STAGES}
    plan |= {f"bits{n}": [*base, *stage(n), *runs.sets(*BITS)] for n in STAGES}
    plan["resumed"] = [*base, *stage(2), "--resume", runs.at(tmp_path / "runs" / "z3", 10)]
    plan["bits_resumed"] = [*plan["bits2"], "--resume", runs.at(tmp_path / "runs" / "bits2", 3)]
    found = runs.launch(1, plan, tmp_path / "runs", accelerator="cuda")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert runs.train(*base, "--output", tmp_path / "plain") == 0
    cpu = runs.losses(plain["base"])
    for n in STAGES:
        assert runs.relative(runs.losses(found[f"z{n}"])[:5], cpu[:5]) < 1e-3
        assert runs.relative(runs.losses(found[f"half{n}"])[:3], cpu[:3]) < 3e-2
    assert runs.relative(runs.losses(tmp_path / "plain")[:5], cpu[:5]) < 1e-3
    assert runs.relative(runs.losses(found["resumed"]), runs.losses(found["z3"])[10:]) < 1e-3
    assert len(runs.losses(found["bits_resumed"])) == 3
