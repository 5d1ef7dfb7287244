"""What trains, and how: patterns, LoRA, checkpointed blocks, compiled towers; each against the plain student."""

import json
import shutil
from fnmatch import fnmatchcase

import open_clip
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastsds.config import ConfigError, LoRAConfig, StudentConfig, check, load_recipe
from fastsds.student import WEIGHTS_FILE, apply_tuning, count_trained, load_student, lora, make_student, save_student
from fastsds.student.model import Student

MAKERS = {
    "vit": tiny.save_student,
    "resnet": lambda folder: tiny.save_student(folder, resnet=True),
    "openclip_siglip": tiny.save_siglip,
    "clip": lambda folder: tiny.save_hf(folder, "clip"),
    "siglip": lambda folder: tiny.save_hf(folder, "siglip"),
}
CLOSE = 1e-6  # relative, fp32: the same sums
TARGETS = {  # Linear, in_proj_weight, convolutions, bare matrices, embeddings: of every kind that a family has
    "vit": ("*attn*weight", "*c_fc.weight", "clip.visual.conv1.weight", "clip.visual.proj", "clip.text_projection"),
    "resnet": ("*attn*weight", "clip.visual.layer2.0.conv2.weight", "clip.token_embedding.weight"),
    "openclip_siglip": ("*attn*weight", "*patch_embed.proj.weight"),
    "clip": ("*attn*weight", "*fc1.weight", "*patch_embedding.weight", "clip.text_projection.weight"),
    "siglip": ("*attn*weight", "clip.vision_model.head.attention.in_proj_weight", "clip.text_model.head.weight"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ["--recipe", str(runs.write_recipe(tmp_path_factory.mktemp("tiny")))]


def make(folder, tune="all", shape=tiny.LATENT, **options) -> tuple[Student, list[str]]:
    student, trained = make_student(StudentConfig(model=str(folder), tune=tune, **options), shape)
    return student.train(), trained


def answer(student):
    """Outputs and gradients of a weighted sum of them all."""
    size = student.image_size
    out = student(tiny.pixels(3, size=size), student.tokenize(tiny.captions(4)))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(value.shape, generator=generator).to(value) for value in out]
    sum((value * weight).sum() for value, weight in zip(out, weights)).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return [value.detach() for value in out], gradients


def same(ours, theirs, tolerance=CLOSE):
    """max |a - b| / max |b|, of outputs and of all gradients together: some are zero but for rounding."""
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert ours[1].keys() == theirs[1].keys()
    largest = max(g.abs().max() for g in theirs[1].values())
    for name, gradient in theirs[1].items():
        own = gradient.abs().max()
        assert (ours[1][name] - gradient).abs().max() <= tolerance * (own if own > 1e-3 * largest else largest), name


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_patterns_train_what_they_match_and_the_head(folders, name):
    student = load_student(folders[name], latent_shape=tiny.LATENT)
    names = [n for n, _ in student.named_parameters()]
    for patterns in (("*.bias",), ("clip.logit_scale", "*attn*weight")):
        trained = apply_tuning(student, patterns)
        matched = [n for n in names if n.startswith("head.") or any(fnmatchcase(n, p) for p in patterns)]
        assert trained == matched == [n for n, p in student.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", MAKERS)
def test_what_trains_is_counted_by_tower(folders, name):
    student = load_student(folders[name], latent_shape=tiny.LATENT)
    counted, clip = count_trained(student, apply_tuning(student, "all")), student.clip
    image = [clip.visual] if hasattr(clip, "visual") else [clip.vision_model]
    image += [clip.visual_projection] if name == "clip" else []
    constant = name in ("siglip", "openclip_siglip")  # the bias
    assert sum(elements for _, elements in counted.values()) == sum(p.numel() for p in student.parameters()) - constant
    assert counted["image tower"][1] == sum(p.numel() for module in image for p in module.parameters())
    assert counted["head"] == (2, sum(p.numel() for p in student.head.parameters())) and counted["logit scale"] == (1, 1)
    student.clip.logit_scale.ds_numel = 7  # as ZeRO 3 says what it holds elsewhere
    assert count_trained(student, ["clip.logit_scale"]) == {"logit scale": (1, 7)}


def test_a_pattern_that_matches_nothing_names_the_nearest(folders):
    student = load_student(folders["vit"], latent_shape=tiny.LATENT)
    with pytest.raises(ConfigError, match=r"student.tune: 'clip.visual.ln_pst.\*' matches no parameter .*visual.ln_post.bias"):
        apply_tuning(student, ["clip.visual.ln_post.*", "clip.visual.ln_pst.*"])
    with pytest.raises(ConfigError, match=r"student.lora.targets: .*ln_post.weight' matches no matrix .* nearest are clip"):
        apply_tuning(student, "lora", low_rank=LoRAConfig(targets=("clip.visual.ln_post.weight",)))
    siglip = load_student(folders["siglip"])
    with pytest.raises(ConfigError, match="student.tune: 'clip.logit_bias' matches no parameter"):
        apply_tuning(siglip, ["clip.logit_bias"])


def test_the_recipe_s_forms():
    assert load_recipe(None, ["student.tune=[clip.visual.*ln*, '*bias']"]).student.tune == ("clip.visual.*ln*", "*bias")
    assert load_recipe(None, ["student.tune=lora", "student.lora.rank=4"]).student.lora == LoRAConfig(rank=4)
    for wrong, message in (
        ("student.tune=norms", "student.tune is the text 'norms'; expected one of layernorm, all, lora or a list of texts"),
        ("student.tune=[]", "at least one pattern"),
        ("student.tune=[1]", "expected one of layernorm, all, lora or a list of texts"),
        ("student.lora.targets=[*attn*]", r"begins with \* is put in quotes"),
        ("student.lora.rank=0", "student.lora.rank is 0; expected at least 1"),
        ("student.lora.alpha=0", "student.lora.alpha is 0.0; expected greater than 0"),
        ("student.lora={rank: 4, ranks: 3}", "unknown key 'student.lora.ranks'; the nearest known key is 'student.lora.rank'"),
        ("student.compile=fast", "expected one of default, max-autotune or null"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(None, [wrong])


def test_compiled_towers_are_refused_with_zero3_by_name():
    recipe = load_recipe(None, ["student.compile=default"])
    for stage in (0, 1, 2):
        check(recipe, 1, {"zero_optimization": {"stage": stage}})
    with pytest.raises(ConfigError, match="student.compile is .*; expected null with ZeRO 3"):
        check(recipe, 1, {"zero_optimization": {"stage": 3}})


def test_a_dry_run_counts_and_lists_what_trains(base, tmp_path, capfd):
    assert runs.train(*base, "--dry-run", *runs.sets("student.tune=lora"), "--output", tmp_path / "run") == 0
    said = capfd.readouterr().out
    student, trained = make(base[1].replace("recipe.yaml", "student"), "lora")
    assert "\ntrained:\n  " + "\n  ".join(trained) + "\nengine: " in said and not (tmp_path / "run").exists()
    total = sum(p.numel() for p in student.parameters())
    assert f"2,368 of {total:,} parameters train (image tower 768 in 4, text tower 768 in 4, head 832 in 2 tensors)" in said


# -- LoRA --------------------------------------------------------------------------------------------------------------


def with_factors(folder, targets, double=False):
    """A student with LoRA whose B is not zero."""
    student, trained = make(folder, "lora", lora=LoRAConfig(rank=3, alpha=6.0, targets=targets))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith(".0.B"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return (student.double() if double else student), trained


@pytest.mark.parametrize("name", MAKERS)
def test_lora_is_the_student_whose_matrices_have_the_products_added(folders, tmp_path, name):
    """In float64: the same outputs; dA = s B' dW and dB = s dW A' of the plain student's dW; nothing else trains."""
    student, trained = with_factors(folders[name], TARGETS[name], double=True)
    ours, gradients = answer(student)
    state = student.state_dict()
    plain = load_student(folders[name], latent_shape=tiny.LATENT).train().double()
    merged = lora.merge(student, state)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    theirs, whole = answer(plain)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == set(trained)
    factors = [n for n in trained if not n.startswith("head.")]
    assert len(factors) >= 8 and all(lora.is_factor(n) for n in factors)
    for path in {n.rpartition(".0.")[0] for n in factors}:
        a, b, grad = state[f"{path}.0.A"], state[f"{path}.0.B"], whole[path.replace(lora.MARK, ".")].flatten(1)
        assert a.shape == (3, grad.shape[1]) and b.shape == (grad.shape[0], 3)
        for gradient, expected in ((gradients[f"{path}.0.A"], 2.0 * b.T @ grad), (gradients[f"{path}.0.B"], 2.0 * grad @ a.T)):
            torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("name", MAKERS)
def test_lora_starts_from_the_student_and_saves_plain_weights(folders, tmp_path, name):
    student, trained = make(folders[name], "lora", lora=LoRAConfig(targets=TARGETS[name]))
    out, _ = answer(student)
    for a, b in zip(out, answer(make(folders[name])[0])[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # B is zero
    student, _ = with_factors(folders[name], TARGETS[name])
    save_student(student.state_dict(), student, tmp_path / "out")
    file = WEIGHTS_FILE if (tmp_path / "out" / WEIGHTS_FILE).exists() else "model.safetensors"
    saved, source = load_file(tmp_path / "out" / file), load_file(folders[name] / file)
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in source.items()}
    changed = {f"clip.{k}" for k in source if not torch.equal(saved[k], source[k])}
    assert changed == {n.rpartition(".0.")[0].replace(lora.MARK, ".") for n in trained if lora.is_factor(n)}
    again = load_student(tmp_path / "out").train()
    for a, b in zip(answer(again)[0], answer(student)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_plain_open_clip_reads_the_merged_folder(folders, tmp_path):
    student, _ = with_factors(folders["vit"], TARGETS["vit"])
    save_student(student.state_dict(), student, tmp_path / "out")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        ours, theirs = student.eval()(tiny.pixels(3)), model.eval().encode_image(student.normalise(tiny.pixels(3)))
    torch.testing.assert_close(ours.image_raw, theirs, rtol=1e-5, atol=1e-6)


def test_a_comes_from_the_seed_and_b_is_zero(folders):
    def factors(seed):
        config = StudentConfig(model=str(folders["vit"]), tune="lora")
        state = make_student(config, tiny.LATENT, seed=seed)[0].state_dict()
        return {k: v for k, v in state.items() if lora.is_factor(k)}

    before = torch.random.get_rng_state()
    one, again, other = factors(0), factors(0), factors(-5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, again[k]) for k, v in one.items())
    for key, value in one.items():
        assert torch.equal(value, other[key]) == key.endswith(".B") and bool(value.any()) == key.endswith(".A")
        if key.endswith(".A"):
            assert value.abs().max() <= value.shape[1] ** -0.5
    student, trained = make(folders["vit"], "lora")
    assert "clip.logit_scale" not in trained and not student.clip.logit_scale.requires_grad


def test_the_sum_is_rounded_once_also_under_autocast():
    w, a, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((8, 3, 2, 2), (4, 12), (8, 4)))
    expected = (w.double() + 0.5 * (b.double() @ a.double()).view(w.shape)).bfloat16()
    assert torch.equal(lora.merged(w, a, b, 0.5), expected)
    with torch.autocast("cpu", torch.bfloat16):
        ours = lora.merged(w.float(), a.float(), b.float(), 0.5)
    torch.testing.assert_close(ours, w.float() + 0.5 * (b.float() @ a.float()).view(w.shape))


def test_a_resumed_run_refuses_other_weights_under_its_factors(base, tmp_path, capfd):
    """The frozen matrices come from student.model, which must be the one that the run started from."""
    folder = tmp_path / "student"
    shutil.copytree(base[1].replace("recipe.yaml", "student"), folder)
    argv = [*base, *runs.sets("steps=2", "data.batch=8", "checkpoint_every=1", "student.tune=lora", f"student.model={folder}")]
    assert runs.train(*argv, "--output", tmp_path / "run") == 0
    at = runs.at(tmp_path / "run", 1)
    assert runs.train(*argv, "--output", tmp_path / "same", "--resume", at) == 0
    assert runs.losses(tmp_path / "same") == runs.losses(tmp_path / "run")[1:]
    state = load_file(folder / WEIGHTS_FILE)
    state["visual.transformer.resblocks.0.attn.out_proj.weight"][0, 0] += 0.01
    save_file(state, folder / WEIGHTS_FILE)
    capfd.readouterr()
    assert runs.train(*argv, "--output", tmp_path / "other", "--resume", at) == 2
    name = "clip.visual.transformer.resblocks.0.attn.out_proj.weight"
    assert f"{name} did not start from the weights that student.model has now" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


# -- checkpointed blocks, compiled towers, bf16 ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "resnet"])
@pytest.mark.parametrize("tune", ["all", "lora", "layernorm"])
def test_checkpointed_blocks_give_the_same_and_run_twice(folders, name, tune):
    runs_of = {}

    def count(student):
        kinds = ("ResidualAttentionBlock", "CLIPEncoderLayer", "SiglipEncoderLayer", "Block")
        blocks = [m for m in student.clip.modules() if type(m).__name__ in kinds]
        inner = [next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm)) for block in blocks]
        calls = dict.fromkeys(range(len(inner)), 0)
        for i, norm in enumerate(inner):
            norm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        return calls

    answers = []
    for checkpoint in (False, True):
        student, _ = make(folders[name], tune, checkpoint=checkpoint)
        runs_of[checkpoint] = count(student)
        answers.append(answer(student))
    same(*reversed(answers))
    assert len(runs_of[True]) >= 2 and set(runs_of[False].values()) == {1} and set(runs_of[True].values()) == {2}


def test_towers_without_checkpointing_are_refused_by_name(folders, tmp_path):
    with pytest.raises(ConfigError, match=f"student.checkpoint: true, but open_clip's ResNets have none .*{folders['resnet']}"):
        make(folders["resnet"], checkpoint=True)
    folder = shutil.copytree(folders["openclip_siglip"], tmp_path / "timm")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"timm_model_name": "pit_ti_224", "image_size": 224, "timm_pool": "", "timm_proj": ""}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"student.checkpoint: true, but student {folder} has none: .*not supported"):
        make_student(StudentConfig(model=str(folder), checkpoint=True), device="meta")


@pytest.mark.parametrize(
    ("name", "tune"),
    [("vit", "lora"), ("resnet", "layernorm"), ("openclip_siglip", "layernorm"), ("clip", "all"), ("siglip", "lora")],
)
def test_compiled_towers_give_the_same(folders, monkeypatch, name, tune):
    """Traced without a break and differentiated ahead of time; tests/test_student_ranks.py runs inductor's own code, too."""
    compiled = torch.nn.Module.compile
    options = dict(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compiled(self, **options))
    torch.compiler.reset()
    ours, theirs = (make(folders[name], tune, compile=compile)[0] for compile in ("default", None))
    for _ in range(2):  # also after the weights have changed in place
        same(answer(ours), answer(theirs), 5e-6)
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.mul_(0.9), b.mul_(0.9)


@pytest.mark.parametrize("name", MAKERS)
def test_bf16_follows_fp32(folders, base, tmp_path, name):
    """On plain torch: bf16 autocast, of BatchNorm's frozen statistics, too."""
    found = {}
    for precision in ("fp32", "bf16"):
        sets = runs.sets(f"student.model={folders[name]}", f"precision={precision}", "steps=1", "data.batch=8", "log_every=1")
        assert runs.train(*base, *sets, "--output", tmp_path / precision) == 0
        found[precision] = runs.losses(tmp_path / precision, "clip")
    assert runs.relative(found["bf16"], found["fp32"]) < 2e-2 and found["bf16"] != found["fp32"]
