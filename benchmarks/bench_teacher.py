"""The frozen UNet, forward and backward to its input: diffusers as a careful user runs it, and ours.

    eager           diffusers with its SDPA processors           ours             accelerate_unet
    xformers        with xformers' memory-efficient attention    ours + compile   accelerate_unet(compile="default")
    compile         torch.compile, max-autotune, channels_last   ours + graphs    accelerate_unet(cuda_graph=True)

`test_ablation` adds one idea at a time to the plain UNet; `test_activations` counts what a backward pass keeps at Stable
Diffusion v1's size, where no memory is needed to count it.
"""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsds import testing
from fastsds.teacher import accelerate_unet

GPU = torch.cuda.is_available()
BATCHES = (1, 8, 32) if GPU else (8,)
NO_GPU = "needs a CUDA device"
PLAIN = dict(attention=None, fused=False, memory_format=None)
IDEAS = {
    "channels_last": dict(PLAIN, memory_format="channels_last"),
    "attention": dict(PLAIN, attention="auto"),
    "group norms": dict(PLAIN, fused=("norms",)),
    "layer norms": dict(PLAIN, fused=("layer_norms",)),
    "gates": dict(PLAIN, fused=("gates",)),
    "remade gates": dict(PLAIN, fused=("remade_gates",)),
    "convolutions": dict(PLAIN, fused=("convolutions",)),
    "all of these": {},
    "all, checkpointed": dict(checkpoint=True),
}


def call(network, device, batch, backward, change=lambda unet: None):
    """A function that makes a UNet, changes it, and gives the call to time: prediction, or the gradient of the latents."""

    def make():
        unet = network.make()
        change(unet)
        z, t, text = inputs(network, device, batch, backward)
        g = torch.randn_like(z)

        def run():
            with torch.set_grad_enabled(backward):
                y = unet(z, t, encoder_hidden_states=text).sample
                return torch.autograd.grad(y, z, g)[0] if backward else y

        return run

    return make


def inputs(network, device, batch, backward):
    torch.manual_seed(1)
    z = torch.randn(batch, *network.latent, device=device, dtype=network.dtype, requires_grad=backward)
    text = torch.randn(batch, *network.text, device=device, dtype=network.dtype)
    return z, torch.linspace(50, 950, batch, device=device).long(), text


def changes(device, timed):
    """Provider -> what it does to a plain UNet, or why it is not here."""

    def compiled(unet):
        unet.to(memory_format=torch.channels_last)
        unet.forward = torch.compile(unet.forward, mode="max-autotune" if device == "cuda" else "default")

    compiles = device == "cuda" or timed
    untimed = "compiled only where it is timed: half a minute of C++"
    return {
        "eager": lambda unet: None,
        "xformers": (lambda unet: unet.enable_xformers_memory_efficient_attention()) if device == "cuda" else NO_GPU,
        "compile": compiled if compiles else untimed,
        "ours": accelerate_unet,
        "ours + compile": (lambda unet: accelerate_unet(unet, compile="default")) if compiles else untimed,
        "ours + graphs": (lambda unet: accelerate_unet(unet, cuda_graph=True)) if device == "cuda" else NO_GPU,
    }


def check(network, device, backward, change):
    """No number without this: ours errs at most twice as much as eager does, beside float64 (fp32 on a GPU)."""
    exact = torch.float32 if device == "cuda" else torch.float64
    found = {}
    for name, how in (("oracle", lambda unet: None), ("eager", lambda unet: None), ("ours", change)):
        wide = type(network)(**{**vars(network), "dtype": exact, "make": lambda: network.make().to(exact)})
        found[name] = call(wide if name == "oracle" else network, device, 1, backward, how)()()
    testing.assert_twice_eager(found["ours"], found["eager"], found["oracle"].double(), network.dtype)


def flop(network, device, batch, backward):
    """Of the plain UNet, counted at batch 1."""
    unet, (z, t, text) = network.make(), inputs(network, device, 1, backward)

    def run():
        with torch.set_grad_enabled(backward):
            y = unet(z, t, encoder_hidden_states=text).sample
            if backward:  # the counter takes no torch.autograd.grad
                y.sum().backward()

    return batch * testing.count_flop(run)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "forward_backward"))
def test_unet(backward, batch, network, device, benchmark, side_by_side):
    for name, change in changes(device, not benchmark.disabled).items():
        if name.startswith("ours") and not isinstance(change, str):
            check(network, device, backward, change)
            torch._dynamo.reset()  # or what is timed is compiled for any batch
    providers = {
        name: change if isinstance(change, str) else call(network, device, batch, backward, change)
        for name, change in changes(device, not benchmark.disabled).items()
    }
    of = f"{network.name}, {batch} latents, {'forward and backward to the latents' if backward else 'forward'}."
    side_by_side(providers, flop=flop(network, device, batch, backward), samples=batch, dtype=network.dtype, of=of)


def test_ablation(network, device, side_by_side):
    """Each idea alone on the plain UNet, forward and backward to the input; and what autograd holds in between."""
    batch, how = 8, {"plain": lambda unet: None}
    for name, kwargs in IDEAS.items():
        how[name] = functools.partial(accelerate_unet, **kwargs)
        check(network, device, True, how[name])
    providers = {name: call(network, device, batch, True, change) for name, change in how.items()}
    of = f"{network.name}, {batch} latents, forward and backward to the latents: each idea alone, then all."
    rows = side_by_side(providers, flop=flop(network, device, batch, True), samples=batch, dtype=network.dtype, of=of)
    for name, change in how.items():
        unet = network.make()
        change(unet)
        z, t, text = inputs(network, device, batch, True)
        rows[name]["held"] = testing.held_for_backward(lambda: unet(z, t, encoder_hidden_states=text).sample, unet)  # noqa: B023


def test_activations(benchmark):
    """No memory is needed to count them: tensors without storage, attention as flash attention keeps it (q, k, v, out, lse)."""
    from diffusers import UNet2DConditionModel

    rows, default = [], torch.get_default_dtype()
    cases = {
        "plain": (32, None), "ours": (32, {}), "ours, checkpointed": (32, dict(checkpoint=True)),
        "ours, 8 at a time": (8, {}), "ours, checkpointed, 8 at a time": (8, dict(checkpoint=True)),
    }  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.set_default_dtype(torch.bfloat16)
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(default)
        for name, (batch, how) in cases.items():
            z = torch.randn(batch, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
            t, text = torch.arange(batch), torch.randn(batch, 77, 768, dtype=torch.bfloat16)
            with accelerate_unet(unet, attention=None, **how) if how is not None else contextlib.nullcontext():
                held = testing.held_for_backward(lambda: unet(z, t, text).sample, unet)  # noqa: B023
            rows.append({"provider": name, "held": held})
    of = "What autograd holds of 32 latents (4x64x64, bf16) in Stable Diffusion v1's UNet, without weights: counted, not timed."
    benchmark.extra_info |= {"providers": rows, "of": of}
    benchmark.pedantic(lambda: None, rounds=1)
