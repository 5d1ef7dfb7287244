"""Every family of student trains alike on one and on two ranks, sharded by ZeRO 2 and 3: the same losses and weights."""

import json

import pytest
import runs
import tiny
import torch
from reload import agree as equal
from reload import open_clip_says, transformers_says

from fastsds import cli
from fastsds.student import read_student

EQUAL = 1e-5  # the order of summation is all that differs
STUDENTS = {
    "vit": (tiny.save_student, ()),
    "resnet": (lambda folder: tiny.save_student(folder, resnet=True), ()),
    "clip": (lambda folder: tiny.save_hf(folder, "clip"), ()),
    "siglip": (lambda folder: tiny.save_hf(folder, "siglip"), ()),
    "vit_lora": (tiny.save_student, ("student.tune=lora",)),
    "siglip_lora": (lambda folder: tiny.save_hf(folder, "siglip"), ("student.tune=lora", "student.checkpoint=true")),
}
LAST = ("student.tune=[clip.visual.ln_post.*, clip.ln_final.*]",)  # little to compile a backward pass of: a minute less
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """{student: the arguments of its run}: two steps of two micro-batches."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe, found = runs.write_recipe(folder), {}
    for name, (make, sets) in STUDENTS.items():
        small = ("steps=2", "checkpoint_every=0", "data.batch=8", f"student.model={make(folder / name)}")
        found[name] = ["--recipe", str(recipe), *runs.sets(*small, *sets)]
    return found


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """One rank, plain torch, no compiler."""
    folder = tmp_path_factory.mktemp("one")
    for name, argv in {**base, "last": [*base["vit"], *runs.sets(*LAST)]}.items():
        assert runs.train(*argv, "--output", folder / name) == 0
    return folder


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Two ranks, all in one launch. Compiled ones first: ZeRO 3 leaves torch's linear layer replaced in its process."""
    folder = tmp_path_factory.mktemp("two")
    tight = folder / "tight.json"  # every parameter is really partitioned, and gathered where it is used
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    tight.write_text(json.dumps({"zero_optimization": zero, "steps_per_print": 10**9}))
    zero2 = ["--config", "configs/zero2.json"]
    plan = {"compiled": [*base["vit"], *zero2, *runs.sets(*LAST, "student.compile=default")]}
    plan |= {f"{name}_2": [*argv, *zero2] for name, argv in base.items()}
    plan |= {f"{name}_half": [*base[name], *zero2, *runs.sets("precision=bf16")] for name in ("resnet", "siglip_lora")}
    plan |= {f"{name}_3": [*argv, "--config", tight] for name, argv in base.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes beside two ranks
        return runs.launch(2, plan, folder)


def agree(ours, theirs):
    for key in ("loss", "clip", "sds"):
        assert runs.relative(runs.losses(ours, key), runs.losses(theirs, key)) < EQUAL
    assert runs.losses(theirs, "clip")[0] != runs.losses(theirs, "clip")[1]
    a, b = (read_student(run / "student") for run in (ours, theirs))
    assert set(a) == set(b)
    for key in a:
        assert a[key].shape == b[key].shape and a[key].dtype == b[key].dtype, key
        if key.endswith("in_proj_bias"):  # a key's bias moves all scores alike: its gradient is rounding, and Adam
            for state in (a, b):  # makes whole steps of that
                state[key] = torch.stack(state[key].chunk(3))[[0, 2]]
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", STUDENTS)
def test_two_ranks_are_one(one, two, name, stage):
    agree(two[f"{name}_{stage}"], one / name)


def test_compiled_on_two_ranks_is_plain_torch_on_one(one, two):
    agree(two["compiled"], one / "last")


@pytest.mark.parametrize("name", ["resnet", "siglip_lora"])
def test_bf16_weights_follow_fp32(base, one, two, name):
    """fp32 masters; BatchNorm's statistics are the source's, bit for bit."""
    half, whole = two[f"{name}_half"], one / name
    assert runs.relative(runs.losses(half, "clip"), runs.losses(whole, "clip")) < 2e-2
    assert runs.losses(half) != runs.losses(whole)
    saved, full = (read_student(run / "student") for run in (half, whole))
    for key, tensor in saved.items():
        assert tensor.dtype == full[key].dtype
        if "running" in key:
            assert torch.equal(tensor, full[key]), key


@pytest.mark.parametrize("name", STUDENTS)
def test_what_does_not_train_is_saved_bit_for_bit(base, two, name):
    start = read_student(next(a for a in base[name] if a.startswith("student.model=")).partition("=")[2])
    frozen = [k for k in start if "running" in k or k == "clip.logit_bias" or (name.endswith("lora") and "attn" not in k)]
    for stage in (2, 3):
        end = read_student(two[f"{name}_{stage}"] / "student")
        assert all(torch.equal(start[k], end[k]) for k in frozen)
        assert any(not torch.equal(start[k], end[k]) for k in start)


@pytest.mark.parametrize("name, to", [
    ("vit", "open_clip"), ("vit", "hf"), ("vit_lora", "open_clip"), ("vit_lora", "hf"), ("resnet", "open_clip"), ("clip", "hf"),
    ("siglip", "hf"), ("siglip_lora", "hf"),
])  # fmt: skip
def test_what_two_ranks_trained_leaves_the_house(two, tmp_path, name, to):
    """Exported, and reloaded by the library: the student's features."""
    says = {"open_clip": open_clip_says, "hf": transformers_says}
    own = "open_clip" if name in ("vit", "vit_lora", "resnet") else "hf"
    for stage in (2, 3):
        run, out = two[f"{name}_{stage}"], tmp_path / str(stage)
        assert cli.main(["export", str(run), "--to", to, "--out", str(out)]) == 0
        equal(says[own](run / "student"), says[to](out))
