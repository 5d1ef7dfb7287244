"""The attention of a UNet: what is chosen and why, and that nothing else changes, on tiny UNets of both families."""

import copy
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0

from fastsds import testing
from fastsds.teacher import attention, probe
from fastsds.teacher.attention import Processor
from fastsds.teacher.probe import BACKENDS, Backend, Shape

SD1 = dict(attention_head_dim=2, cross_attention_dim=16)  # head_dim is the number of heads: 2 everywhere, as 8 in SD 1.x
SD2 = dict(attention_head_dim=(2, 4), cross_attention_dim=24, use_linear_projection=True)  # a head of 8 everywhere, as 64
FAMILIES = pytest.mark.parametrize("family", (SD1, SD2), ids=("sd1", "sd2"))


def unet(family=SD1, dtype=torch.float32, **changes):
    options = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**options | family | changes).to(dtype).requires_grad_(False).eval()


def ask(net, batch=2, dtype=None, **arguments):
    """(output, input gradient) for an upstream gradient that is not 1."""
    generator, dtype = torch.Generator().manual_seed(1), dtype or net.dtype
    z, g = (torch.randn(batch, 4, 8, 8, generator=generator).to(net.dtype).to(dtype) for _ in range(2))
    text = torch.randn(batch, 7, net.config.cross_attention_dim, generator=generator).to(net.dtype).to(dtype)
    z.requires_grad_()
    out = net(z, torch.tensor([10, 500])[:batch], encoder_hidden_states=text, **arguments).sample
    return out.detach(), torch.autograd.grad(out, z, g)[0]


def processors(net):
    return {name: m.processor for name, m in net.named_modules() if isinstance(m, Attention)}


@FAMILIES
@pytest.mark.parametrize("name", ("auto", "flash", "math"))
def test_an_attached_unet_is_the_plain_one(family, name):
    net = unet(family)
    plain = ask(net)
    choices, undo = attention.attach(net, name, batch=2, text_length=7)
    assert all(type(p) is Processor for p in processors(net).values())
    for ours, theirs in zip(ask(net), plain):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert {n for c in choices for n in c.modules} == processors(net).keys()
    undo()
    assert all(torch.equal(one, other) for one, other in zip(ask(net), plain))


@FAMILIES
@pytest.mark.parametrize("name", ("auto", "flash", "math"))
def test_an_attached_unet_in_bf16(family, name):
    net = unet(family, torch.bfloat16)
    plain = ask(net)
    attention.attach(net, name, batch=2, text_length=7)
    ours = ask(net)
    oracle = ask(unet(family, torch.bfloat16).double(), dtype=torch.float64)
    for what, one, eager, exact in zip(("output", "gradient"), ours, plain, oracle):
        testing.assert_twice_eager(one, eager, exact, torch.bfloat16, what)


def test_undo_puts_the_same_objects_back():
    net = unet()
    before, state = processors(net), {k: v.clone() for k, v in net.state_dict().items()}
    _, undo = attention.attach(net)
    _, again = attention.attach(net, "math")  # on top of the first: each undo takes back its own
    again()
    assert {type(p) for p in processors(net).values()} == {Processor}
    undo()
    undo()
    after = processors(net)
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert attention.attach(net, None)[0] == [] and all(processors(net)[n] is before[n] for n in before)


@FAMILIES
def test_shapes_are_those_of_a_forward_pass(family, monkeypatch):
    """Beside what SDPA itself is given, in the real forward pass of the real UNet, at an odd size."""
    net = unet(family, sample_size=(9, 6))
    found = attention.shapes(net, 5)
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append(Shape(q.shape[1], q.shape[3], q.shape[2], k.shape[2]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    net(torch.zeros(1, 4, 9, 6), 1, encoder_hidden_states=torch.zeros(1, 5, net.config.cross_attention_dim))
    assert list(found.values()) == seen and len(seen) == 8
    assert found.keys() == processors(net).keys()


def test_shapes_of_sd1_take_no_memory():
    """Of the full SD 1.x UNet: four levels of self-attention, each with its cross-attention."""
    with torch.device("meta"):
        net = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    levels = ((40, 4096), (80, 1024), (160, 256), (160, 64))
    expected = {Shape(8, d, n, keys) for d, n in levels for keys in (n, 77)}
    found = attention.shapes(net)
    assert set(found.values()) == expected and len(found) == 32
    choices, _ = attention.attach(net)  # meta: nothing to measure
    assert choices[0].backend is None and "meta" in str(choices[0])


def zeros(q, k, v):
    return (q + k.sum(2, keepdim=True) + v.sum(2, keepdim=True)) * 0


def no_backward(q, k, v):
    return BACKENDS["flash"].attend(q.detach(), k.detach(), v.detach())


def wrong_backward(q, k, v):
    return Halved.apply(BACKENDS["flash"].attend(q, k, v))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 0.9 * g


@pytest.mark.parametrize(
    "attend, reason",
    (
        (zeros, "wrong: output of head 0 off by 1 of its largest value"),
        (wrong_backward, "wrong: dq of head 0 off by 0."),
        (no_backward, "no backward: element 0 of tensors does not require grad"),
        (lambda q, k, v: q.view(-1), "no operator: view size is not compatible"),
    ),
    ids=("zeros", "wrong_backward", "no_backward", "raises"),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_bad_candidate_is_not_chosen(attend, reason, dtype, monkeypatch):
    monkeypatch.setitem(BACKENDS, "bad", Backend(attend, ("cpu",)))
    net = unet(dtype=dtype)
    choices, undo = attention.attach(net)
    for choice in choices:
        assert choice.backend in ("flash", "math")
        assert choice.refused["bad"].startswith(reason) and choice.refused["bad"] in str(choice)
    before = processors(net)
    undo()
    with pytest.raises(ValueError, match=r"'bad' cannot serve 2 heads of 8, 64 queries, .* use 'auto' or one of flash"):
        attention.attach(net, "bad")
    assert not any(processors(net)[n] is p for n, p in before.items())  # refused before anything was replaced


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_candidate_is_chosen_or_has_a_reason(dtype):
    choices, _ = attention.attach(unet(dtype=dtype))
    for choice in choices:
        assert choice.refused.keys() | {choice.backend} == BACKENDS.keys() and all(choice.refused.values())
        assert choice.probes[choice.backend].milliseconds > 0
        assert f"{choice.backend}, " in str(choice) and str(choice.shape) in str(choice)


def test_the_scores_count_against_math(monkeypatch):
    """The scores of math are 64 times 64 a head beside 64 times 8 of q: it is not taken, were it ever so fast."""
    monkeypatch.setattr(probe, "_milliseconds", lambda function, device: 1.0)
    choices, _ = attention.attach(unet(), text_length=64)
    for choice in (c for c in choices if c.shape.queries == 64):
        flash, math = (choice.probes[n].saved_bytes for n in ("flash", "math"))
        size = choice.shape.heads * choice.shape.queries * choice.shape.head_dim * 4
        assert 4 * size <= flash <= 5 * size  # q, k, v, output; log-sum-exp
        assert math >= choice.shape.heads * 64 * 64 * 4 and "saves too much" in choice.refused["math"]
    monkeypatch.setattr(probe, "SCORES_BYTES", 1000)
    probe.probe.cache_clear()
    assert "not tried: its scores" in attention.attach(unet())[0][0].refused["math"]
    probe.probe.cache_clear()


def test_where_nothing_is_right_all_is_left_alone(monkeypatch):
    monkeypatch.setitem(BACKENDS, "flash", Backend(BACKENDS["flash"].attend, ()))
    monkeypatch.setattr(probe, "SCORES_BYTES", 0)
    probe.probe.cache_clear()
    net = unet()
    before = processors(net)
    choices, undo = attention.attach(net)
    undo()
    attention.verify(net, choices)
    assert all("left alone; flash, " in str(c) and c.refused.keys() == BACKENDS.keys() for c in choices)
    assert all(c.refused["flash"] == "no operator for cpu" for c in choices)
    assert all(processors(net)[n] is p for n, p in before.items())
    probe.probe.cache_clear()


def test_probed_once_a_process(monkeypatch):
    probe.probe.cache_clear()
    attention.attach(unet())
    misses = probe.probe.cache_info().misses
    attention.attach(unet(SD1))
    assert probe.probe.cache_info().misses == misses
    attention.attach(unet(dtype=torch.float64))
    assert probe.probe.cache_info().misses > misses


def test_probing_touches_no_global_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probe.probe.cache_clear()
    with torch.inference_mode():
        choices, _ = attention.attach(unet())
    assert all(c.backend for c in choices) and torch.equal(torch.rand(1), expected)


def test_a_long_probe_shows_progress(monkeypatch, capsys):
    monkeypatch.setattr(attention, "QUIET_SECONDS", 0.0)
    attention.attach(unet())
    assert "attention: shape 1 of 4, math (" in capsys.readouterr().err
    monkeypatch.undo()
    attention.attach(unet())
    assert capsys.readouterr().err == ""


def test_processors_that_do_more_are_left_alone():
    net = unet()
    block = net.mid_block.attentions[0].transformer_blocks[0].attn2
    block.processor = IPAdapterAttnProcessor2_0(32, 16, num_tokens=(4,))
    before = processors(net)
    choices, undo = attention.attach(net)
    undo()
    assert choices[0].backend is None and "attn2 has a IPAdapterAttnProcessor2_0" in str(choices[0])
    assert all(processors(net)[n] is p for n, p in before.items())
    with pytest.raises(ValueError, match="attn2 has a IPAdapterAttnProcessor2_0.*use attention=None"):
        attention.attach(net, "flash")
    net = unet()
    net.mid_block.attentions[0].transformer_blocks[0].attn1.scale *= 2
    assert "attn1 scales by" in str(attention.attach(net)[0][0])
    net = unet(num_class_embeds=3)
    assert "does not run on latents, timesteps and text alone" in str(attention.attach(net)[0][0])
    with pytest.raises(ValueError, match="sample_size: None"):
        attention.shapes(unet(sample_size=None))


@pytest.mark.parametrize(
    "name, message",
    (
        ("xformers", "attention: 'auto', None or one of flash, cudnn, efficient"),
        ("efficient", r"'efficient' cannot serve 2 heads of 8, .* float32 on cpu: no operator for cpu; use 'auto'"),
        ("xformers_cutlass", "no operator for cpu; use 'auto' or one of flash, math"),
        ("xformers_fa2", "no operator for cpu; use 'auto' or one of flash, math"),
    ),
)
def test_a_named_backend_is_required(name, message):
    net = unet()
    before = processors(net)
    with pytest.raises(ValueError, match=message):
        attention.attach(net, name)
    assert all(processors(net)[n] is p for n, p in before.items())


def test_verify_sees_a_processor_that_was_replaced():
    net = unet()
    choices, _ = attention.attach(net, "flash")
    attention.verify(net, choices)
    block = net.mid_block.attentions[0].transformer_blocks[0].attn1
    for processor, got in ((AttnProcessor2_0(), "AttnProcessor2_0"), (Processor("math"), "math")):
        block.set_processor(processor)
        with pytest.raises(RuntimeError, match=f"attn1: attention flash was chosen, {got} is in place"):
            attention.verify(net, choices)


def test_an_attached_unet_can_be_copied_and_pickled():
    net = unet()
    choices, _ = attention.attach(net, "math")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        attention.verify(other, choices)
        assert all(torch.equal(one, same) for one, same in zip(ask(other), ask(net)))


@FAMILIES
def test_masks_as_diffusers_has_them(family):
    net = unet(family)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1]])
    plain = ask(net, encoder_attention_mask=mask)
    attention.attach(net, "math", text_length=7)
    for ours, theirs in zip(ask(net, encoder_attention_mask=mask), plain):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not torch.allclose(plain[0], ask(net)[0])


@pytest.mark.parametrize(
    "options",
    (
        dict(norm_num_groups=2, residual_connection=True, rescale_output_factor=2.0, bias=True),
        dict(norm_num_groups=2, spatial_norm_dim=3, residual_connection=True, query_dim=32),
        dict(cross_attention_dim=6, cross_attention_norm="layer_norm", qk_norm="layer_norm"),
        dict(out_dim=8, dim_head=2),
    ),
    ids=("group_norm", "spatial_norm", "cross_norm", "out_dim"),
)
def test_all_of_diffusers_attention(options):
    """One Attention module with each of its features, on tokens and on images, beside AttnProcessor2_0: the same bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attention(**dict(query_dim=8, heads=2, dim_head=4, eps=1e-5) | options)
        channels = options.get("query_dim", 8)
        images, tokens, temb = torch.randn(2, channels, 3, 4), torch.randn(2, 12, channels), torch.randn(2, 3, 3, 4)
    text = torch.randn(2, 5, 6) if "cross_attention_dim" in options else None
    keywords = {"temb": temb} if "spatial_norm_dim" in options else {}
    found = []
    for processor in (AttnProcessor2_0(), Processor("flash")):
        module.set_processor(processor)
        inputs = (images,) if "spatial_norm_dim" in options else (images, tokens)
        found.append([module(x, encoder_hidden_states=text, **keywords) for x in inputs])
    assert all(torch.equal(one, other) for one, other in zip(*found))


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def counted(function):
    """What a function returns, and how often it called each of torch's operators."""
    with torch.profiler.profile(acc_events=True) as profile:
        found = function()
    return found, {event.key: event.count for event in profile.key_averages()}


@pytest.mark.slow
def test_compiles_in_one_graph():
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None)
    net = unet(block_out_channels=(16,), **blocks)
    attention.attach(net, "math", batch=2, text_length=7)  # not what SDPA itself would take
    plain = ask(net)
    torch._dynamo.reset()
    net.forward = torch.compile(net.forward, fullgraph=True, backend="aot_eager")
    found, counts = counted(lambda: ask(net))
    assert FLASH not in counts and counts["aten::_safe_softmax"] >= 6
    for ours, theirs in zip(found, plain):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name, calls", (("flash", 16), ("math", 0)))
def test_recomputation_takes_the_chosen_backend(name, calls):
    """Checkpointed blocks: eight attentions forward, and eight again in the backward pass."""
    net = unet()
    attention.attach(net, name, batch=2, text_length=7)
    plain = ask(net)
    net.enable_gradient_checkpointing()
    net.train()
    found, counts = counted(lambda: ask(net))
    assert counts.get(FLASH, 0) == calls
    for ours, theirs in zip(found, plain):
        torch.testing.assert_close(ours, theirs)


GPU = testing.devices()[1:]


@pytest.mark.parametrize("name", ("xformers_fa2", "xformers_cutlass", "fastsds"))
def test_cuda_backends_are_traced_without_a_gpu(name):
    """One graph of Dynamo's on fake CUDA tensors; the shapes and layouts of output and gradients."""
    from torch._subclasses import FakeTensorMode

    torch._dynamo.reset()
    with FakeTensorMode():
        rows = (torch.empty(2, n, 80, device="cuda", dtype=torch.bfloat16) for n in (50, 77, 77))
        q, k, v = (x.view(2, -1, 2, 40).transpose(1, 2).requires_grad_() for x in rows)
        y = torch.compile(BACKENDS[name].attend, fullgraph=True, backend="eager")(q, k, v)
        assert y.shape == q.shape and y.stride() == q.stride() and y.requires_grad
        if name.startswith("xformers"):
            tokens = [x.transpose(1, 2) for x in (q, k, v)]
            out, lse = torch.ops.fastsds.xformers_attention(*tokens, name.removeprefix("xformers_").replace("fa2", "flash"))
            assert lse.shape == (2, 2, 64 if name == "xformers_cutlass" else 50)
            found = torch.ops.fastsds.xformers_attention_gradient(out, out, lse, *tokens, "flash")
            assert [x.shape for x in found] == [x.shape for x in tokens]


def test_xformers_has_the_operators_that_need_no_extension():
    from xformers.ops import fmha

    assert fmha.cutlass.FwOp.NAME == "cutlassF-pt" and fmha.cutlass.BwOp.NAME == "cutlassB-pt"
    assert fmha.flash.FwOp.NAME.endswith("-pt") and fmha.flash.BwOp.NAME.endswith("-pt")


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_on_a_gpu(device, dtype):
    """SD 1.x's head dimensions: nothing is wrong, the Triton kernel among it; each backend that is right carries a UNet."""
    options = dict(block_out_channels=(80, 160), sample_size=16, norm_num_groups=4)
    net = unet(dtype=dtype, **options).to(device)
    choices, undo = attention.attach(net, batch=2)
    undo()
    for choice in choices:
        print(choice)
        assert choice.backend is not None
        assert not any(reason.startswith("wrong") for reason in choice.refused.values()), str(choice)
    finest = choices[0].probes
    assert finest["fastsds"].reason is None
    generator = torch.Generator().manual_seed(0)
    z, g = (torch.randn(2, 4, 16, 16, generator=generator).to(device, dtype) for _ in range(2))
    text = torch.randn(2, 77, 16, generator=generator).to(device, dtype)

    def step(net, as_=dtype):
        x = z.to(as_).requires_grad_()
        y = net(x, 10, encoder_hidden_states=text.to(as_)).sample
        return y.detach(), torch.autograd.grad(y, x, g.to(as_))[0]

    plain, oracle = step(net), step(unet(dtype=dtype, **options).to(device).double(), torch.float64)
    for name in (n for n in BACKENDS if all(n in c.probes and c.probes[n].reason is None for c in choices)):
        _, undo = attention.attach(net, name, batch=2)
        torch._dynamo.reset()
        for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
            for what, ours, eager, exact in zip(("output", "gradient"), step(run), plain, oracle):
                testing.assert_twice_eager(ours, eager, exact, dtype, f"{name}, {what}")
        undo()
