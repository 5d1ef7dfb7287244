"""`fastsds plan` against what real runs hold: engines, activations, optimizer state, a bank on disk; FLOP against formulas."""

import io
import json
import tarfile

import plan_counts
import pytest
import runs
import sd
import tiny
import torch
from torch import nn

from fastsds import config, testing
from fastsds.config import ConfigError, StudentConfig
from fastsds.plan import command
from fastsds.plan.measure import Law, Live, cuda_autocast, place, use, without_storage
from fastsds.plan.models import build
from fastsds.plan.planner import Planner, largest
from fastsds.plan.states import Engine, _moments, _step_copies, held, zero_section
from fastsds.plan.table import table
from fastsds.student import make_student
from fastsds.teacher import accelerate_unet

CLOSE = 0.05
ALONE = ("0 bf16", "2 fp32, a small bucket", "2 fp32, one micro-step", "3 fp32")  # of the engines, what one rank tries, too


def engine(**changes):
    return Engine(**{"stage": None, "ranks": 1, "precision": "fp32", "optimizer": "adamw", "accumulation": 2, "gpu": False,
                     **changes})  # fmt: skip


# -- what engines hold -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
def test_real_runs_hold_what_is_planned(ranks, tmp_path):
    """Every phase of real training steps, on each ZeRO stage, in fp32 and bf16, with AdamW and 8-bit Adam."""
    wanted = {**plan_counts.PLAIN, **{name: plan_counts.ENGINES[name] for name in ALONE}} if ranks == 1 else plan_counts.ENGINES
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    done = runs.deepspeed(plan_counts.__file__, tmp_path / "wanted.json", ranks=ranks)
    assert (tmp_path / "counted.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    counted = json.loads((tmp_path / "counted.json").read_text())
    assert counted.keys() == wanted.keys()
    for name, phases in counted.items():
        for phase, (found, planned) in phases.items():
            assert planned == pytest.approx(found, rel=CLOSE), (name, phase)


@pytest.mark.parametrize("n", (1, 4095, 4096, 100_001))
@pytest.mark.parametrize("name", ("adamw", "adamw8bit"))
def test_moments_of_one_tensor(n, name):
    from bitsandbytes.optim import AdamW8bit

    weight = nn.Parameter(torch.zeros(n))
    weight.grad = torch.ones(n)
    optimizer = (torch.optim.AdamW if name == "adamw" else AdamW8bit)([weight])
    optimizer.step()
    state = {k: v for k, v in optimizer.state[weight].items() if torch.is_tensor(v) and not k.startswith("qmap")}
    assert sum(v.numel() * v.element_size() for v in state.values()) == _moments(n, name)


def test_code_books_are_counted_once():
    two = held([[5000, 5000]], [], 0, engine(optimizer="adamw8bit")).moments
    assert two == 2 * _moments(5000, "adamw8bit") + 2 * 256 * 4


@pytest.mark.parametrize("gpu", (False, True))
def test_what_adamw_makes_while_it_steps(gpu):
    """On a GPU torch steps a group at once (foreach): tried here on the CPU."""
    groups = [[300_000, 50_000], [20_000]]
    weights = [[nn.Parameter(torch.ones(n)) for n in group] for group in groups]
    optimizer = torch.optim.AdamW([{"params": group} for group in weights], foreach=gpu)
    for _ in range(2):
        for weight in (w for group in weights for w in group):
            weight.grad = torch.ones_like(weight)
        with Live() as live:
            optimizer.step()
    assert live.peak == pytest.approx(_step_copies(groups, engine(gpu=gpu)), rel=CLOSE)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_padding_and_the_fullest_rank(stage):
    """Groups of 10 and 3 elements on 3 ranks: ZeRO 1 and 2 pad to multiples of 6, ZeRO 3 each parameter to one of 3."""
    found = held([[7, 3], [3]], [5], 0, engine(stage=stage, ranks=3, zero=zero_section({}, stage)))
    padded = {1: 12 + 6, 2: 12 + 6, 3: 3 * (3 + 1 + 1)}[stage]
    assert found.masters == 4 * padded // 3
    assert found.weights == 4 * {1: padded + 5, 2: padded + 5, 3: padded // 3 + 2}[stage]
    if stage == 2:  # the second rank's four of twelve lie in both parameters of the first group; the second group's in one
        assert found.gradients == 4 * (7 + 3 + 3)


def test_deepspeeds_own_defaults_and_errors():
    assert zero_section({}, 2).reduce_bucket_size == 500_000_000
    with pytest.raises(ConfigError, match="zero_optimization.reduce_bucket_size"):
        zero_section({"zero_optimization": {"reduce_bucket_size": -1}}, 2)


# -- what modules hold -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.save_student(tmp_path_factory.mktemp(kind), resnet=kind == "resnet") for kind in ("vit", "resnet")}


def student(folder, device, **how):
    return make_student(StudentConfig(str(folder), **how), tiny.LATENT, device)[0].train()


def forward(model, n=6):
    return model(
        torch.zeros(n, 3, model.image_size, model.image_size, dtype=torch.uint8),
        torch.ones(n, model.context_length, dtype=torch.int64),
    )


@pytest.mark.parametrize("precision", ("fp32", "bf16", "autocast"))
@pytest.mark.parametrize("tune", ("all", "layernorm", "lora"))
@pytest.mark.parametrize("kind", ("vit", "resnet"))
def test_a_student_without_storage_holds_what_a_real_one_does(folders, kind, tune, precision):
    dtype = torch.bfloat16 if precision == "bf16" else None
    run = lambda model: lambda: forward(model)  # noqa: E731
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    how = {"tune": ("*conv1.weight", "*attn*")} if (kind, tune) == ("resnet", "lora") else {"tune": tune}
    real = student(folders[kind], "cpu", **how).to(dtype or torch.float32)
    fake = student(folders[kind], "meta", **how)
    with cast:
        expected = testing.held_for_backward(run(real), real)
    with without_storage(), cast:
        place(fake, dtype)
        planned = testing.held_for_backward(run(fake), fake)
    # under autocast the CPU keeps LayerNorms' statistics in fp32, which its fake kernel does not know
    assert planned == (pytest.approx(expected, rel=0.01) if precision == "autocast" else expected)
    assert [(n, p.requires_grad) for n, p in fake.named_parameters()] == [
        (n, p.requires_grad) for n, p in real.named_parameters()
    ]


def test_a_students_peak_is_that_of_the_allocator(folders):
    """Live's count beside torch's own CPU allocator, of forward and backward, and the plan's beside both."""
    from torch.profiler import ProfilerActivity, profile

    def run(model):
        return use(lambda: forward(model, 32), lambda out: (out.z.sum() + out.image.sum() + out.text.sum()).backward()).peak

    real = student(folders["vit"], "cpu", tune="all")
    counted = run(real)
    real.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        run(real)
    now = allocated = 0
    for event in sorted(events.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            allocated = max(allocated, now)
    fake = student(folders["vit"], "meta", tune="all")
    with without_storage():
        planned = run(place(fake))
    assert planned == pytest.approx(counted, rel=0.01)
    assert planned == pytest.approx(allocated, rel=CLOSE)


UNET = dict(
    sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
    attention_head_dim=4,
)  # fmt: skip


@pytest.mark.parametrize("how", ("plain", "accelerated", "checkpointed"))
def test_a_unet_without_storage_holds_what_a_real_one_does(how):
    from diffusers import UNet2DConditionModel

    real = UNet2DConditionModel(**UNET).requires_grad_(False).eval()
    fake, mode = build("unet", UNET).requires_grad_(False).eval(), without_storage()
    with mode:
        place(fake)
        if how != "plain":
            accelerate_unet(fake, attention=None, checkpoint=how == "checkpointed")
    if how != "plain":
        accelerate_unet(real, attention=None, checkpoint=how == "checkpointed")

    def ask(unet):
        z, t = torch.zeros(3, 4, 16, 16, requires_grad=True), torch.zeros(3, dtype=torch.int64)
        return unet(z, t, torch.zeros(3, 7, 24)).sample

    expected = testing.held_for_backward(lambda: ask(real), real)
    peak = use(lambda: ask(real), lambda y: y.sum().backward()).peak
    with mode:
        assert testing.held_for_backward(lambda: ask(fake), fake) == expected > 0
        assert use(lambda: ask(fake), lambda y: y.sum().backward()).peak == pytest.approx(peak, rel=0.02)


def test_cudas_autocast_holds_layer_norms_in_fp32(folders):
    """Beside CUDA's own rules on fake CUDA tensors, which need no GPU for a forward pass; attention as its products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def move(model):
        for part in model.modules():
            for tensors in (part._parameters, part._buffers):
                for name, v in tensors.items():
                    if v is not None:
                        x = torch.empty_like(v, device="cuda")
                        tensors[name] = nn.Parameter(x, v.requires_grad) if isinstance(v, nn.Parameter) else x
        return model

    model, before = student(folders["vit"], "meta", tune="all"), torch.is_autocast_enabled("cuda")
    with without_storage(), sdpa_kernel(SDPBackend.MATH):
        place(model)
        with cuda_autocast():
            ours = testing.held_for_backward(lambda: forward(model), model)
        with torch.autocast("cpu", torch.bfloat16):
            cpus = testing.held_for_backward(lambda: forward(model), model)
        move(model)
        pixels = torch.zeros(6, 3, model.image_size, model.image_size, dtype=torch.uint8, device="cuda")
        tokens = torch.ones(6, model.context_length, dtype=torch.int64, device="cuda")
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            cudas = testing.held_for_backward(lambda: model(pixels, tokens), model)
        finally:
            torch.set_autocast_enabled("cuda", before)
            torch.clear_autocast_cache()
    assert ours == cudas
    assert cpus < 0.98 * cudas  # so that the rule is seen to matter


def test_law_is_checked_at_a_third_size():
    assert Law.of({2: 120, 4: 140, 8: 180})(100) == 1100
    with pytest.raises(ArithmeticError, match="not a line"):
        Law.of({2: 120, 4: 140, 8: 200})


def test_live_forgets_what_is_dropped():
    outside = torch.zeros(100)
    with Live() as live:
        x = outside + 1
        y = x.view(10, 10)
        assert live.now == 400
        del x
        assert live.now == 400
        del y
        (outside.view(10, 10) * 2).sum()
    assert (live.now, live.peak) == (0, 404)


# -- parameters and FLOP -----------------------------------------------------------------------------------------------


def test_parameters_of_vit_b32_and_of_stable_diffusion():
    import open_clip

    planner = Planner(config.load_recipe(None, ["student.model=ViT-B-32", "teacher.path=hf-hub:no/where", "head.init=ridge"]))
    real = open_clip.create_model("ViT-B-32")
    outputs = 4 * 64 * 64
    assert planner.head_elements == 512 * outputs + outputs
    assert sum(planner.student.parameters.values()) - planner.head_elements == sum(p.numel() for p in real.parameters())
    assert planner.teacher.parameters == sd.PARAMETERS[1] and planner.teacher.assumed
    assert planner.held.weights == 4 * sum(planner.student.parameters.values()) + planner.student.buffers


def test_flop_of_a_linear_and_of_attention():
    tokens, width = 5, 12
    linear = nn.Linear(width, 3 * width)
    x = torch.zeros(2, tokens, width, requires_grad=True)
    product = 2 * 2 * tokens * width * 3 * width
    with without_storage():
        place(linear)
        x = torch.zeros(2, tokens, width, requires_grad=True)
        assert testing.count_flop(lambda: linear(x)) == product
        assert testing.count_flop(lambda: linear(x).sum().backward()) == 3 * product
        q, k, v = (torch.zeros(2, 3, n, 4, requires_grad=True) for n in (tokens, 7, 7))
        scores = 2 * 2 * 3 * tokens * 7 * 4
        attend = lambda: nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
        assert testing.count_flop(attend) == 2 * scores
        assert testing.count_flop(lambda: attend().sum().backward()) == 6 * scores


@pytest.fixture(scope="module")
def world():
    return Planner(config.load_recipe(None, ["loss.gradient=full"]), gpu=False)


def test_flop_of_a_step(world):
    data = world.recipe.data
    images = data.batch * data.accumulation
    assert world.student.flop(4) == 4 * world.student.flop(1)
    d = world.student.width
    assert world.flop["contrast"] == data.accumulation * 2 * 3 * 2 * data.batch**2 * d  # images with texts, texts with images
    assert world.flop["unet"] == images * world.teacher.flop("predict") > 1.9 * images * world.teacher.flop("answer")
    sparse = Planner(config.load_recipe(None, ["loss.gradient=full", "loss.sds_every=4"]), gpu=False)
    assert sparse.flop["unet"] == world.flop["unet"] / 4


def test_counting_flop_leaves_nothing_behind():
    """A plan asks for bytes, then FLOP, then bytes of other batches: gradients of the second are not there in the third."""
    whole = Planner(config.load_recipe(None, ["loss.lambda=0", "data.accumulation=1"]), gpu=False).student
    again = Planner(config.load_recipe(None, ["loss.lambda=0", "data.accumulation=1"]), gpu=False).student
    again.flop(1)
    assert again.use(2).peak == pytest.approx(whole.use(2).peak, rel=1e-3)  # but for constants


# -- the bank ----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_bank_on_disk(tmp_path):
    from fastsds.teacher import bank

    base = runs.write_recipe(tmp_path)
    sets = ["loss.gradient=amortised", "data.samples=300", "data.batch=16", "bank.draws=3", f"bank.path={tmp_path / 'bank'}"]
    planner = Planner(config.load_recipe(base, sets), gpu=False)
    assert bank.main(["build", "--recipe", str(base), *runs.sets(*sets)]) == 0
    files = [*(tmp_path / "bank").rglob("shard_*.safetensors")]
    assert planner.rows == 300
    assert planner.bank["bytes"] == pytest.approx(sum(f.stat().st_size for f in files), rel=CLOSE)
    assert planner.running == () and planner.flop.keys() == {"student", "contrast"}


def test_bytes_while_a_bank_is_built(tmp_path):
    """The captions' embeddings that the teacher keeps are there, too."""
    from fastsds.teacher import bank

    sets = ["loss.gradient=amortised", "data.samples=200", "bank.draws=1", f"bank.path={tmp_path}", "teacher.attention=keep"]
    planner = Planner(config.load_recipe(None, sets), gpu=False)
    with Live() as live:
        assert bank.main(["build", *runs.sets(*sets)]) == 0
    assert planner.bank["peak"] == pytest.approx(live.peak, rel=0.02)


# -- what fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", (lambda k: 7 * k + 100, lambda k: 100 + k**1.3, lambda k: max(900, 3 * k)))
@pytest.mark.parametrize("limit", (50, 107, 108, 900, 5000, 10**9))
@pytest.mark.parametrize("guess", (1, 40, 1000))
def test_the_largest_that_fits_is_found(peak, limit, guess):
    top = 1000
    asked = []
    found = largest(lambda k: asked.append(k) or peak(k), limit, top, guess)
    assert found == max((k for k in range(1, top + 1) if peak(k) <= limit), default=0)
    assert len(asked) <= 35


def test_the_largest_batch_fits_and_the_next_does_not(world):
    limit = world.captions + 200e6
    batch = world.largest_batch(limit)
    assert batch > 32 and world.phases(batch, 0).peak <= limit < world.phases(batch + 1, 0).peak
    limit = world.captions + 60e6
    micro = world.largest_micro_batch(limit)
    assert micro in (2, 4, 8, 16) and world.phases(32, micro).peak <= limit < world.phases(32, 2 * micro).peak
    assert world.largest_batch(1e6) == world.largest_micro_batch(1e6) == 0


def test_micro_batches_and_checkpoints_lower_the_peak(world):
    sets = ["loss.gradient=full", "teacher.accelerate=true", "teacher.checkpoint=true"]
    lean = Planner(config.load_recipe(None, sets), gpu=False)
    assert world.phases(32, 4).ask < world.phases(32, 0).ask
    assert lean.phases(32, 0).ask < world.phases(32, 0).ask
    assert lean.flop["unet"] > world.flop["unet"]  # blocks run again


@pytest.mark.parametrize("init", ("ridge", "warmup"))
def test_bytes_of_the_heads_start(tmp_path, init):
    """Beside a real one: two sums in float64, or the head's gradients and AdamW's moments, besides what is asked."""
    from fastsds.data.loader import Loader
    from fastsds.data.sources import open_source
    from fastsds.recipes.head import init_head
    from fastsds.teacher import Teacher

    sets = ["data.batch=8", "data.samples=64", "head.samples=32", "head.warmup_steps=2", "teacher.attention=keep"]
    recipe = config.load_recipe(None, [*sets, f"head.init={init}", f"output={tmp_path}"])
    planner = Planner(recipe, gpu=False)
    with Live() as live:
        teacher = Teacher.of(recipe, torch.device("cpu"), planner.loaded)
        student, _ = make_student(recipe.student, teacher.latent_shape)
        source = open_source(recipe.data)

        def batches(first, cursors):
            return Loader(
                source, batch=8, streams=64, seed=0, image_size=student.image_size, tokenize=student.tokenize,
                teacher_size=teacher.image_size, first=first, cursors=cursors,
            )  # fmt: skip

        live.peak = live.now
        init_head(student, teacher, batches, recipe, source)
        planner.captions = sum(row.numel() * row.element_size() for row in teacher._captions.values())
    assert planner.phases(8, 0).start == pytest.approx(live.peak, rel=0.01)


def test_the_heads_start_asks_about_whole_batches():
    sets = ["head.init=ridge", "loss.gradient=amortised", "bank.path=null", "loss.gradient=sds", "data.batch=64"]
    sharded = plan_counts.deepspeed_json(0, None)
    planner = Planner(config.load_recipe(None, sets), sharded, ranks=8, gpu=False)
    phases = planner.phases(64, 0)
    assert phases.start > planner.teacher.encode(64).peak > 4 * planner.teacher.encode(8).peak


# -- the command -------------------------------------------------------------------------------------------------------


def run(capsys, *argv):
    assert command.main([str(a) for a in argv]) == 0
    return capsys.readouterr()


def test_json_and_table_say_the_same(capsys):
    argv = [*runs.sets("loss.gradient=full", "precision=bf16"), "--card", "l4", "--mfu", "0.4"]
    argv += ["--config", config.CONFIGS / "zero2.json", "--ranks", 2]
    found = json.loads(run(capsys, "--json", *argv).out)
    text = table(found)
    assert f"{found['parameters']['student']:,}" in text and "ZeRO 2 on 2 rank(s), bf16, adamw" in text
    assert found["peak"]["all"] == max(found["peak"][k] for k in ("between", "ask", "backward", "step", "start"))
    images = found["batch"]["contrastive"] * found["batch"]["accumulation"]
    rate = 2 * 121e12 * 0.4 * images / found["flop_a_step"]["all"]
    assert found["speed"]["images_per_s"] == pytest.approx(rate)
    assert f"{found['card']['largest_batch']:,}" in text
    assert any("reduce_bucket_size" in note for note in found["notes"])
    width = {len(line) for line in text.splitlines() if line.startswith("  ") and "<-" not in line}
    assert len(width) == 1  # aligned


def test_what_is_not_on_disk_is_said_and_nothing_is_read(capsys, tmp_path):
    recipe = config.CONFIGS / "recommended.yaml"
    absent = (f"bank.path={tmp_path / 'no'}", f"data.source={tmp_path / 'no.tsv'}")
    sets = runs.sets("student.model=world", "student.pretrained=null", *absent)
    found = json.loads(run(capsys, "--json", "--recipe", recipe, *sets, "--samples", "118287").out)
    assert any("Stable Diffusion 1.x are assumed" in note for note in found["notes"])
    assert found["bank"]["rows"] == 118287 and found["bank"]["bytes"] == 118287 * (2 * 32768 + 4 + 77 * 768 * 2 + 8)
    assert "card" not in found and "speed" not in found
    assert not list(tmp_path.iterdir())


def test_8bit_adam_pays_where_everything_trains(capsys):
    sets = ("loss.lambda=0", "data.batch=8")
    said = {}
    for tune in ("all", "layernorm"):
        found = json.loads(run(capsys, "--json", *runs.sets(*sets, f"student.tune={tune}")).out)
        said[tune] = " ".join(found["notes"])
    assert "it pays" in said["all"] and "hardly pays" in said["layernorm"]


def test_no_batch_is_larger_than_the_images(tmp_path):
    """Of two images with three captions each: pairs make a bank, images a batch."""
    (tmp_path / "a.tsv").write_text("filepath\ttitle\n" + "".join(f"{n}.png\t{said}\n" for n in "ab" for said in "xyz"))
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    planner = Planner(config.load_recipe(None, [f"data.source={tmp_path / 'a.tsv'}", "loss.lambda=0"]), gpu=False)
    assert (planner.rows, planner.images, planner.largest_batch(1e12)) == (6, 2, 2)


def test_shards_of_a_pattern_are_counted_where_they_are(tmp_path):
    for k in range(2):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as archive:
            for member in (f"{k}.png", f"{k}.txt"):
                about = tarfile.TarInfo(member)
                about.size = 1
                archive.addfile(about, io.BytesIO(b"x"))
    rows = {}
    for last in (1, 2):
        source = f"data.source={tmp_path}/{{0..{last}}}.tar"
        rows[last] = Planner(config.load_recipe(None, [source, "loss.lambda=0"]), gpu=False).rows
    assert rows == {1: 2, 2: None}


def test_a_pipe_is_not_taken_for_shards_and_has_no_bank(capsys, tmp_path):
    sets = ("data.source='pipe:cat {0..1}.tar'", "loss.gradient=amortised", f"bank.path={tmp_path}")
    assert "no bank is made of it" in run(capsys, *runs.sets(*sets)).out


def test_a_students_configuration_is_not_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **how: pytest.fail(f"asked {where}"))
    with pytest.raises(ConfigError, match="is not on this disk, and the hub is not to be asked"):
        command.main(["--set", "student.model=hf-hub:nobody/nothing"])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--ranks", "2"], "plain torch has one: name a DeepSpeed file"),
        (["--ranks", "3", "--config", str(config.CONFIGS / "zero2.json")], "data.batch is 32"),
        (["--mfu", "2"], "--mfu is 2.0; expected above 0 and at most 1"),
        (["--memory", "-1"], "--memory is -1.0"),
        (["--set", "student.model=ViT-X"], "ViT-X"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line(argv, words):
    with pytest.raises(ConfigError, match=words):
        command.main(argv)


def test_offloading_is_said_not_to_be_counted(capsys, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    found = json.loads(run(capsys, "--json", "--config", path, "--set", "loss.lambda=0").out)
    assert any("zero_optimization.offload_optimizer" in note for note in found["notes"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_allocates_what_is_planned(folders):
    """Forward and backward of a ViT-B/16 in bf16, beside the most that CUDA's allocator had."""
    config_ = StudentConfig("ViT-B-16", tune="all")
    n, shape = 16, (4, 64, 64)
    fake, real = (make_student(config_, shape, device)[0].train() for device in ("meta", "cuda"))
    real = real.bfloat16()

    def backward(out):
        (out.z.sum() + out.image.sum() + out.text.sum()).backward()

    with without_storage():
        planned = use(lambda: forward(place(fake, torch.bfloat16), n), backward).peak
    pixels = torch.zeros(n, 3, 224, 224, dtype=torch.uint8, device="cuda")
    tokens = torch.ones(n, 77, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(real(pixels, tokens))
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=CLOSE)
