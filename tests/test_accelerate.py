"""accelerate_unet: the plain UNet's results and gradients, its state at any time, and how much less is held for backward."""

import functools
import gc
import itertools
import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsds import testing
from fastsds.teacher import accelerate_unet
from fastsds.testing import held_for_backward

SMALL = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=24,
)
FAMILIES = {
    "sd1": dict(attention_head_dim=4),  # in these configurations the number of heads
    "sd2": dict(attention_head_dim=[2, 4], use_linear_projection=True),
}
SD1 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
OFF = dict(attention=None, fused=False, memory_format=None)
OPTIONS = {
    "norms": dict(OFF, fused=("norms",)),
    "layer norms": dict(OFF, fused=("layer_norms",)),
    "gates": dict(OFF, fused=("gates",)),
    "remade gates": dict(OFF, fused=("remade_gates",)),
    "convolutions": dict(OFF, fused=("convolutions",)),
    "channels_last": dict(OFF, memory_format="channels_last"),
    "checkpoint": dict(OFF, checkpoint=True),
    "fused": dict(OFF, fused=True),
    "default": dict(attention=None),
    "all": dict(attention=None, checkpoint=True),
}


def build(**config):
    """A frozen UNet, none of whose norms is the identity."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**(SMALL | config)).requires_grad_(False).eval()
    for p in unet.parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn_like(p)
    return unet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        build(**FAMILIES[name]).save_pretrained(folder)
    return folders


@pytest.fixture
def load(folders):
    from diffusers import UNet2DConditionModel

    def load(family, dtype=torch.float32):
        unet = UNet2DConditionModel.from_pretrained(folders[family], torch_dtype=dtype, low_cpu_mem_usage=False)
        return unet.requires_grad_(False).eval()

    return load


def samples(dtype=torch.float32, size=(12, 10), batch=2):
    """Latents, time steps, text, and an upstream gradient that is not 1."""
    generator = torch.Generator().manual_seed(1)
    z, text, g = (torch.randn(batch, *n, generator=generator) for n in ((4, *size), (7, 24), (4, *size)))
    return z.to(dtype), torch.arange(batch) * 400 + 3, text.to(dtype), g.to(dtype)


def ask(unet, dtype=torch.float32, device="cpu", **shape):
    """The prediction, and its gradients to latents and text."""
    z, t, text, g = (v.to(device) for v in samples(dtype, **shape))
    z.requires_grad_(), text.requires_grad_()
    y = unet(z, t, encoder_hidden_states=text).sample
    return y.detach(), *torch.autograd.grad(y, (z, text), g)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_results_and_gradients_are_the_plain_unets(load, family, option):
    unet = load(family)
    plain = ask(unet)
    with accelerate_unet(unet, **OPTIONS[option]):
        ours = ask(unet)
    assert all(v.abs().max() > 0 for v in plain)
    for a, b in zip(ours, plain):
        assert relative(a, b) <= 1e-5
    if option in ("convolutions", "checkpoint"):  # the same kernels
        assert equal(ours, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_by_the_twice_eager_rule(load, family, dtype):
    unet = load(family, dtype)
    oracle, plain = ask(load(family, dtype).double(), torch.float64), ask(unet, dtype)
    for options in (dict(attention=None), dict(attention=None, checkpoint=True)):
        with accelerate_unet(unet, **options):
            for name, *values in zip(("prediction", "dz", "dtext"), ask(unet, dtype), plain, oracle):
                testing.assert_twice_eager(*values, dtype, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64(load, family):
    unet = load(family).double()
    plain = ask(unet, torch.float64)
    with accelerate_unet(unet, attention=None):
        assert max(map(relative, ask(unet, torch.float64), plain)) <= 1e-12


def test_under_autocast(load):
    """fp32 weights, half-precision arithmetic: the backward pass rounds what the forward pass rounded."""

    def ask_half():
        z, t, text, g = samples()
        with torch.autocast("cpu", torch.bfloat16):
            y = unet(z.requires_grad_(), t, text).sample
        return y.detach(), torch.autograd.grad(y, z, g.to(y.dtype))[0]  # outside, as torch recommends

    unet = load("sd1")
    oracle, plain = ask(load("sd1").double(), torch.float64), ask_half()
    with accelerate_unet(unet, attention=None):
        ours = ask_half()
    assert ours[0].dtype == plain[0].dtype == torch.bfloat16
    for name, *values in zip(("prediction", "dz"), ours, plain, oracle):
        testing.assert_twice_eager(*values, torch.bfloat16, name)


@pytest.mark.parametrize("shape", (dict(size=(7, 9)), dict(size=(2, 2), batch=1)))
def test_sizes_that_do_not_halve(load, shape):
    unet = load("sd2")
    plain = ask(unet, **shape)
    with accelerate_unet(unet, attention=None):
        assert max(map(relative, ask(unet, **shape), plain)) <= 1e-5


def test_without_a_gradient(load):
    unet = load("sd1")
    z, t, text, _ = samples()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = unet(z, t, text).sample
            with accelerate_unet(unet, attention=None):
                ours = unet(z, t, text, return_dict=False)[0]
            assert relative(ours, plain) <= 1e-5 and not ours.requires_grad


VARIANTS = {
    "scale and shift": (dict(resnet_time_scale_shift="scale_shift"), "stands between norm and activation"),
    "another activation": (dict(act_fn="mish"), "Mish, not SiLU without hooks"),
    "activated once": (dict(resnet_skip_time_act=True, time_embedding_act_fn="silu"), None),
    "output factor": (dict(resnet_out_scale_factor=1.5), None),
    "no mid block": (dict(mid_block_type=None), None),
    "resampled in the block": (
        dict(
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        ),
        "GroupNorm: not one of those we know",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_known_is_left_alone_with_a_reason(variant):
    config, reason = VARIANTS[variant]
    unet = build(**(dict(attention_head_dim=8) | config))
    plain = ask(unet, size=(16, 16))
    with accelerate_unet(unet, attention=None) as acceleration:
        assert max(map(relative, ask(unet, size=(16, 16)), plain)) <= 1e-5
        assert (reason in str(acceleration)) if reason else all(c.done for c in acceleration.changes), str(acceleration)
    assert equal(ask(unet, size=(16, 16)), plain)


def test_other_peoples_layers_are_left_alone():
    """A subclass of a block, an adapted linear, a norm with a hook, one with another forward; circular padding is taken."""
    from diffusers.models.resnet import ResnetBlock2D

    class Louder(ResnetBlock2D):
        def forward(self, x, temb):
            return 2 * super().forward(x, temb)

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean()

    class Shifted(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) + 1

    unet = build(attention_head_dim=4)
    unet.mid_block.resnets[0].__class__ = Louder
    unet.mid_block.resnets[1].norm2.__class__ = Shifted
    unet.mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj.__class__ = Adapted
    unet.conv_in.padding = "same"
    seen = []
    unet.down_blocks[0].resnets[0].norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    unet.mid_block.attentions[0].norm.forward = lambda x: x.tanh()
    unet.conv_out.padding_mode = "circular"
    before, plain = state(unet), ask(unet)
    seen.clear()
    with accelerate_unet(unet, attention=None) as acceleration:
        assert max(map(relative, ask(unet), plain)) <= 1e-5
        assert seen == ["norm1"]
        left = {name: c.what for c in acceleration.changes if not c.done for name in c.modules}
    assert left == {
        "mid_block.resnets.0": "Louder",
        "mid_block.resnets.1": "ResnetBlock2D",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0": "GEGLU",
        "mid_block.attentions.0.norm": "GroupNorm",
        "down_blocks.0.resnets.0": "ResnetBlock2D",
        "conv_in": "Conv2d",
    }
    assert_same_state(state(unet), before)


# -- state -------------------------------------------------------------------------------------------------------------


def state(unet):
    """Everything that undo must bring back."""
    modules = {name: (id(m), type(m)) for name, m in unet.named_modules()}
    modules |= {f"{name}.{k}": v for name, m in unet.named_modules() for k, v in vars(m).items() if not isinstance(v, dict)}
    tensors = {k: (id(p), p.stride(), p.clone()) for k, p in (*unet.named_parameters(), *unet.named_buffers())}
    return modules, tensors


def assert_same_state(now, before):
    assert now[0] == before[0]
    assert now[1].keys() == before[1].keys()
    for key, (identity, strides, value) in before[1].items():
        assert now[1][key][:2] == (identity, strides) and torch.equal(now[1][key][2], value), key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_undo_is_exact(load, family, option, layout):
    unet = load(family).to(memory_format=layout)
    before, plain = state(unet), ask(unet)
    acceleration = accelerate_unet(unet, **OPTIONS[option])
    ask(unet)
    acceleration.undo()
    assert_same_state(state(unet), before)
    assert equal(ask(unet), plain)
    acceleration.undo()  # nothing left to undo
    with accelerate_unet(unet, **OPTIONS[option]):  # and it can be done again
        ask(unet)
    assert_same_state(state(unet), before)


def test_the_checkpoint_is_the_plain_unets(load, tmp_path):
    """Keys, values, modules and parameters stay while accelerated; what is saved then is what was loaded."""
    from diffusers import UNet2DConditionModel

    unet = load("sd1")
    values = {k: v.clone() for k, v in unet.state_dict().items()}
    modules, parameters = list(unet.modules()), list(unet.parameters())
    with accelerate_unet(unet, attention=None, checkpoint=True):
        assert list(unet.state_dict()) == list(values)
        assert all(torch.equal(v, values[k]) for k, v in unet.state_dict().items())
        assert all(a is b for a, b in zip(unet.modules(), modules, strict=True))
        assert all(a is b for a, b in zip(unet.parameters(), parameters, strict=True))
        unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert all(torch.equal(v, values[k]) for k, v in again.state_dict().items())


def test_a_parameter_that_requires_a_gradient_is_refused(load):
    unet = load("sd1")
    unet.mid_block.resnets[0].conv1.weight.requires_grad_()
    before = state(unet)
    with pytest.raises(ValueError, match=r"parameter mid_block.resnets.0.conv1.weight requires a gradient"):
        accelerate_unet(unet, attention=None)
    assert_same_state(state(unet), before)


@pytest.mark.parametrize("name", ("conv_in", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "conv_norm_out"))
def test_a_parameter_that_requires_a_gradient_later_is_refused_too(load, name):
    unet = load("sd1")
    with accelerate_unet(unet, attention=None):
        unet.get_submodule(name).weight.requires_grad_()
        with pytest.raises(ValueError, match="requires a gradient"):
            ask(unet)


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(fused="all"), "fused: True, False or a tuple of some of 'norms', 'layer_norms', 'gates'"),
        (dict(fused=("norm",)), "fused: .* got \\('norm',\\)"),
        (dict(memory_format="nhwc"), "memory_format: one of None, 'channels_last' expected, got 'nhwc'"),
        (dict(compile="fast"), "compile: one of None, 'default', 'max-autotune' expected, got 'fast'"),
        (dict(compile=True), "compile: .* got True"),
        (dict(cuda_graph="yes"), "cuda_graph: one of False, True expected, got 'yes'"),
        (dict(checkpoint=2), "checkpoint: one of False, True expected, got 2"),
    ),
)
def test_unknown_values_are_refused_before_anything_is_done(load, options, message):
    unet = load("sd1")
    before = state(unet)
    with pytest.raises(ValueError, match=message):
        accelerate_unet(unet, attention=None, **options)
    assert_same_state(state(unet), before)


def test_what_cannot_be_accelerated(load):
    from diffusers import UNet2DConditionModel

    with pytest.raises(ValueError, match="a diffusers UNet2DConditionModel expected, got Linear"):
        accelerate_unet(nn.Linear(2, 2))
    unet = load("sd1")
    with accelerate_unet(unet, attention=None), pytest.raises(ValueError, match="accelerated already"):
        accelerate_unet(unet, attention=None)
    with torch.inference_mode():
        unet = UNet2DConditionModel(**SMALL, attention_head_dim=4).requires_grad_(False)
    with pytest.raises(ValueError, match="parameter conv_in.weight was made under inference_mode"):
        accelerate_unet(unet, attention=None)


def test_the_account(load):
    unet = load("sd1")
    with accelerate_unet(unet, attention=None, cuda_graph=True) as acceleration:
        text = str(acceleration)
        count = sum(isinstance(m, nn.Conv2d) for m in unet.modules())
        assert f"{count} x FrozenConv2d: does not keep its input" in text
        assert "left alone:\n  CUDA graphs: no CUDA device: the UNet is on the cpu" in text
        done = {c.what: c.modules for c in acceleration.changes if c.done}
        assert done["FusedGroupNormSiLU"] == ("conv_norm_out",) and "conv_in" in done["FrozenConv2d"]


def test_attention_goes_with_it(load):
    """Where attention is chosen too: a wrong name leaves nothing half done, and undo brings the processors back."""
    pytest.importorskip("fastsds.teacher.attention")
    unet = load("sd1")
    before, plain = state(unet), ask(unet)
    with pytest.raises(ValueError, match="attention"):
        accelerate_unet(unet, attention="no such")
    assert_same_state(state(unet), before)
    with accelerate_unet(unet) as acceleration:
        assert acceleration.attention and all(str(c) in str(acceleration) for c in acceleration.attention)
        assert max(map(relative, ask(unet), plain)) <= 1e-5
    assert_same_state(state(unet), before)


# -- frozen layers -----------------------------------------------------------------------------------------------------

GEOMETRIES = (
    dict(kernel_size=3, padding=1),
    dict(kernel_size=1),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=3, stride=2, bias=False),
    dict(kernel_size=(3, 2), stride=(1, 3), padding=(2, 0), dilation=(2, 1), groups=2),
    dict(kernel_size=1, stride=2),
)


@pytest.mark.parametrize("dtype", (torch.float64, *testing.DTYPES))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "strided"))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_frozen_convolution_is_torchs_own(geometry, layout, dtype):
    """Value and gradient bit for bit, at odd and even sizes; nothing but the weight is saved."""
    from fastsds.teacher.frozen import FrozenConv2d

    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, **geometry).requires_grad_(False).to(dtype)
    if layout == "channels_last":
        conv = conv.to(memory_format=torch.channels_last)
    for size in ((5, 7), (8, 6)):
        x = testing.arrange(torch.randn(2, 6, *size, dtype=dtype), layout).requires_grad_()
        found = []
        for kind in (nn.Conv2d, FrozenConv2d):
            conv.__class__ = kind
            held = held_for_backward(functools.partial(conv, x), conv)
            y = conv(x)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
            found.append((y.detach(), torch.autograd.grad(y, x, g)[0]))
        assert held == 0 and equal(*found)
        assert found[0][1].stride() == found[1][1].stride()


def test_frozen_layers_by_finite_differences():
    """gradcheck, and gradgradcheck of the convolution, whose backward pass is made of torch's own operations."""
    from diffusers.models.activations import GEGLU

    from fastsds.teacher.frozen import FrozenConv2d, RemadeGEGLU

    conv = FrozenConv2d(2, 3, 3, stride=2, padding=1).double().requires_grad_(False)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, x) and torch.autograd.gradgradcheck(conv, x)
    gate = GEGLU(3, 4).double().requires_grad_(False)
    gate.__class__ = RemadeGEGLU
    assert torch.autograd.gradcheck(gate, torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("bias", (True, False))
def test_a_frozen_linear_of_torch_keeps_nothing(bias):
    """So there is none of ours."""
    linear = nn.Linear(8, 8, bias=bias).requires_grad_(False)
    for shape in ((5, 8), (2, 5, 8)):
        x = torch.randn(shape, requires_grad=True)
        assert held_for_backward(functools.partial(linear, x), linear) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_laid_out_anew(load, family):
    """With channels_last weights each image within is channels_last, and no operation of torch's copies one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    copies, strange = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_) and args[0].ndim > 2:
                copies.append((op, args[0].shape))
            return op(*args, **(kwargs or {}))

    def look(name, inputs):
        if name not in ("", "conv_in") and inputs and inputs[0].ndim == 4:
            if not inputs[0].is_contiguous(memory_format=torch.channels_last):
                strange.append(name)

    unet = load(family)
    with accelerate_unet(unet, attention=None):
        for name, module in unet.named_modules():
            module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
        with Watch():
            ask(unet)
    assert not copies and not strange


# -- what is held for the backward pass ----------------------------------------------------------------------------------


def test_held_for_backward_counts_storages_once():
    x, w = torch.randn(10, 4, requires_grad=True), nn.Linear(4, 4)
    assert held_for_backward(lambda: x.exp()) == 160
    assert held_for_backward(lambda: x * x.view(10, 4)) == 160  # two tensors, one storage
    assert held_for_backward(lambda: (x[:1] * 2) * x[1:2]) == 160 + 16  # the whole storage of a view, and a product
    assert held_for_backward(lambda: w(x)) == 160 + 64  # x for dW, W for dx
    assert held_for_backward(lambda: w(x), w) == 160
    assert held_for_backward(lambda: x + 1) == 0
    with FakeTensorMode():
        y = torch.randn(10, 4, requires_grad=True)
        assert held_for_backward(lambda: y.exp()) == 160


@pytest.mark.parametrize("options", (dict(), dict(checkpoint=True)), ids=str)
def test_nothing_is_held_where_no_hook_sees_it(load, options):
    """With all that is saved moved out of torch, no image-sized tensor is alive but input and output; gradients hold."""
    unet = load("sd1")
    z, t, text, g = samples()
    z.requires_grad_()
    with accelerate_unet(unet, attention=None, **options):
        expected = torch.autograd.grad(unet(z, t, text).sample, z, g)[0]
        gc.collect()
        before = {id(v) for v in gc.get_objects() if issubclass(type(v), torch.Tensor)}
        with torch.autograd.graph.saved_tensors_hooks(lambda v: v.detach().numpy().copy(order="K"), torch.from_numpy):
            y = unet(z, t, text).sample
        gc.collect()
        new = [v for v in gc.get_objects() if issubclass(type(v), torch.Tensor) and id(v) not in before and v is not y]
        assert sum(v.numel() for v in new) < z.numel(), [v.shape for v in new]
        assert relative(torch.autograd.grad(y, z, g)[0], expected) <= 1e-5


def held(unet, batch=1, dtype=torch.float32, **options):
    """Bytes for one forward pass at the configuration's own size."""
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    z = torch.randn(batch, 4, size, size, dtype=dtype, requires_grad=True)
    t, text = torch.arange(batch), torch.randn(batch, 77, width, dtype=dtype)
    with accelerate_unet(unet, **(OFF | options)):
        return held_for_backward(lambda: unet(z, t, text).sample, unet)


def test_each_idea_holds_less_than_the_plain_unet(load):
    """On a real small UNet: each part alone, and less and less together."""
    unet = load("sd1")
    plain = held(unet)
    parts = ("norms", "gates", "convolutions", "remade_gates")
    for part in parts:
        assert held(unet, fused=(part,)) < 0.95 * plain, part
    assert held(unet, memory_format="channels_last") == plain
    steps = [held(unet, fused=parts[:n]) for n in range(len(parts) + 1)] + [held(unet, fused=True, checkpoint=True)]
    assert all(b < a for a, b in itertools.pairwise(steps)), steps
    assert held(unet, fused=True) <= 0.6 * plain


@pytest.fixture(scope="module", params=(torch.float32, torch.bfloat16), ids=str)
def stable_diffusion(request):
    """(mode, UNet, dtype): SD v1's own size, without memory. Attention on the CPU is flash attention: (q, k, v, out, lse)."""
    from diffusers import UNet2DConditionModel

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    default = torch.get_default_dtype()
    with mode:
        try:
            torch.set_default_dtype(request.param)
            unet = UNet2DConditionModel(**SD1).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(default)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    return mode, unet, request.param


def test_held_at_stable_diffusions_size(stable_diffusion):
    mode, unet, dtype = stable_diffusion
    with mode:
        plain, ours = held(unet, dtype=dtype), held(unet, dtype=dtype, fused=True, memory_format="channels_last")
        probabilities = 8 * 4096**2 * dtype.itemsize
        assert plain < 3 * probabilities and 1.5e9 < plain * 4 / dtype.itemsize < 1.6e9  # none of ten is among it
        assert ours <= 0.6 * plain
        assert held(unet, dtype=dtype, fused=True, checkpoint=True) <= 0.2 * plain


def test_chunks_of_eight_of_a_batch_of_32(stable_diffusion):
    mode, unet, dtype = stable_diffusion
    with mode:
        whole, chunk = held(unet, 32, dtype), held(unet, 8, dtype, fused=True, memory_format="channels_last")
    assert chunk <= 0.15 * whole


RESIDENT = """
import torch
from diffusers import UNet2DConditionModel
from fastsds.teacher import accelerate_unet

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def peak(z, t, text, size=6):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    for z, t, text in zip(*(v.split(size) for v in (z.detach(), t, text))):
        z.requires_grad_()
        torch.autograd.grad(unet(z, t, text).sample.square().sum(), z)
    return resident("VmHWM") - before

unet = UNet2DConditionModel(sample_size=32, block_out_channels=(64, 128), cross_attention_dim=64, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
unet.requires_grad_(False).eval()
few, inputs = (
    (torch.randn(n, 4, 32, 32), torch.arange(n), torch.randn(n, 77, 64)) for n in (1, 6)
)
peak(*few)  # what libraries allocate once
plain = peak(*inputs)
with accelerate_unet(unet, attention=None):
    peak(*few)
    print(plain, peak(*inputs), peak(*inputs, size=2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from Linux's /proc")
def test_peak_memory_of_a_process(python, root):
    """The high-water mark of resident memory over one forward and backward pass, six samples of two levels at 32x32, fp32:
    plain, accelerated, and accelerated with two samples at a time.

    Peaks hold more than activations: what the reference twins and oneDNN need in passing, too. The allocator is told to give
    large blocks back at once, or its caches would count as memory in use.
    """
    done = python("-c", RESIDENT, env={"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    plain, ours, in_chunks = map(int, done.stdout.split()[-3:])
    assert plain > 200e6 and ours <= 0.65 * plain and in_chunks <= 0.5 * ours, (plain, ours, in_chunks)


# -- checkpoint, compile, graphs -----------------------------------------------------------------------------------------


def test_checkpoint_runs_blocks_again_in_evaluation_mode_and_only_for_a_gradient(load):
    unet = load("sd1")
    runs, z, t, text, g = [], *samples()
    unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: runs.append(1))
    with accelerate_unet(unet, attention=None, checkpoint=True) as acceleration:
        with torch.no_grad():
            unet(z, t, text)
        assert len(runs) == 1
        dz = torch.autograd.grad(unet(z.requires_grad_(), t, text).sample, z, g)[0]
        assert len(runs) == 3 and dz.abs().max() > 0
        assert "RemadeGEGLU" not in str(acceleration)  # not twice
    unet(z, t, text)
    assert len(runs) == 4


def test_checkpoint_draws_the_same_dropout_again():
    unet, found = build(attention_head_dim=4, dropout=0.2).train(), []
    for options in (OFF, dict(OFF, checkpoint=True)):
        with accelerate_unet(unet, **options):
            torch.manual_seed(5)
            found.append(ask(unet))
    assert equal(*found) and not equal(found[0], ask(unet))


@pytest.fixture
def one_level():
    """The least that has every kind of layer but the resampling: the compilers' time goes by operations."""
    torch._dynamo.reset()
    levels = dict(block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",))
    return build(attention_head_dim=4, mid_block_type=None, **levels)


@pytest.mark.parametrize("options", (dict(), dict(checkpoint=True)), ids=str)
def test_dynamo_takes_it_whole(one_level, options):
    """One graph, forward and backward, whose convolutions are torch's own, for a compiler to choose kernels for."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs, plain = [], ask(one_level)

    def keep(module, _):
        graphs.append([node.target for node in module.graph.nodes])
        return make_boxed_func(module.forward)

    with accelerate_unet(one_level, attention=None, **options):
        whole = torch.compile(one_level, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        assert max(map(relative, ask(whole), plain)) <= 1e-5
    convolutions = sum(isinstance(m, nn.Conv2d) for m in one_level.modules())
    assert [g.count(torch.ops.aten.convolution.default) for g in graphs] == [convolutions] * 2
    assert not any("convolution_backward" in str(target) for g in graphs for target in g)


@pytest.mark.slow
def test_compiled_by_inductor(one_level):
    before, plain = state(one_level), ask(one_level)
    # inductor's cache on disk does not know what an op of ours was when the graph was stored
    no_cache = torch._inductor.config.patch(force_disable_caches=True)
    with no_cache, accelerate_unet(one_level, attention=None, compile="default") as acceleration:
        assert max(map(relative, ask(one_level), plain)) <= 1e-5
        assert "compiled, default" in str(acceleration)
    assert_same_state(state(one_level), before)
    assert equal(ask(one_level), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def full_precision(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_results_and_gradients(self, load, family, dtype):
        unet = load(family, dtype).to("cuda")
        oracle = ask(load(family, dtype).to("cuda").double(), torch.float64, "cuda")
        plain = ask(unet, dtype, "cuda")
        with accelerate_unet(unet, attention=None):
            for name, *values in zip(("prediction", "dz", "dtext"), ask(unet, dtype, "cuda"), plain, oracle):
                testing.assert_twice_eager(*values, dtype, name)

    @pytest.mark.slow
    def test_peak_memory_at_stable_diffusions_size(self):
        """Eight samples, bf16: what a forward and backward pass allocates beyond the weights and inputs, at its peak."""
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**SD1).requires_grad_(False).eval().to("cuda", torch.bfloat16)
        z = torch.randn(8, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        t, text = torch.arange(8, device="cuda"), torch.randn(8, 77, 768, device="cuda", dtype=torch.bfloat16)

        def peak():
            torch.autograd.grad(unet(z, t, text).sample.float().square().sum(), z)  # libraries allocate once
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(unet(z, t, text).sample.float().square().sum(), z)
            return torch.cuda.max_memory_allocated() - before

        plain = peak()
        with accelerate_unet(unet, attention=None):
            assert peak() <= 0.6 * plain

    def test_results_outlive_the_next_call(self, load):
        """Predictions and gradients of two chunks, the first's used after the second has been replayed."""
        unet = load("sd1").to("cuda")
        z, t, text, g = (v.to("cuda") for v in samples(batch=4))

        def chunked():
            found = []
            for part in (slice(0, 2), slice(2, 4)) * 2:
                leaf = z[part].clone().requires_grad_()
                y = unet(leaf, t[part], encoder_hidden_states=text[part]).sample
                y.backward(g[part])
                found += [y.detach(), leaf.grad]
            return found

        with accelerate_unet(unet, attention=None):
            plain = chunked()
        with accelerate_unet(unet, attention=None, cuda_graph=True):
            ours = chunked()
        assert max(map(relative, ours, plain)) <= 1e-5

    def test_a_backward_pass_that_comes_too_late_is_refused(self, load):
        unet = load("sd1").to("cuda")
        z, t, text, g = (v.to("cuda") for v in samples())
        with accelerate_unet(unet, attention=None, cuda_graph=True):
            first = unet(z.requires_grad_(), t, text).sample
            unet(z, t, text)
            with pytest.raises(RuntimeError, match="backward after another forward pass"):
                first.backward(g)

    def test_forward_alone_other_shapes_and_reasons(self, load):
        unet = load("sd1").to("cuda")
        z, t, text, _ = (v.to("cuda") for v in samples())
        with torch.no_grad():
            plain = unet(z, t, text).sample
            with accelerate_unet(unet, attention=None, cuda_graph=True):
                assert relative(unet(z, t, text).sample, plain) <= 1e-5
                assert relative(unet(z[:1], t[:1], text[:1], return_dict=False)[0], plain[:1]) <= 1e-5
                with pytest.warns(UserWarning, match="CUDA graphs: latents, time steps and text are not all tensors on cuda"):
                    unet(z, 3, text)
                with pytest.warns(UserWarning, match="called with encoder_attention_mask"):
                    unet(z, t, text, encoder_attention_mask=torch.ones(2, 7, device="cuda"))

    def test_with_compile(self, load):
        unet = load("sd1").to("cuda")
        plain = ask(unet, device="cuda")
        torch._dynamo.reset()
        with accelerate_unet(unet, attention=None, compile="max-autotune", cuda_graph=True):
            for _ in range(2):
                assert max(map(relative, ask(unet, device="cuda"), plain)) <= 1e-5
