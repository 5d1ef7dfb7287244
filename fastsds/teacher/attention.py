"""Choose each attention of a UNet by measurement: forward and backward of every backend at the shapes the UNet really has.

    choices, undo = attach(unet)              # the fastest correct backend for each shape; log the choices
    verify(unet, choices)                     # any time later: the chosen processors are still the ones in place
    undo()                                    # the processors of before, the same objects

diffusers' `set_attention_backend` does nothing on this UNet (its `AttnProcessor2_0` has no such hook), hence processors of
our own. A candidate is correct by the twice-eager rule (`fastsds.testing`) on tensors scaled to a largest value of 1: its
error against float64 is at most twice that of SDPA's math in the same dtype, plus the table's atol, for the output and the
gradients of q, k and v. Which one is fastest is a measurement: where a rerun must repeat a run's bits, name the backend.
"""

import dataclasses
import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsds import ops, reference
from fastsds.kernels import launch
from fastsds.testing import TOLERANCE

QUIET_SECONDS = 5.0  # a probe shows nothing before, and a line about as often after
TIE = 0.97  # a later backend must take less than this share of an earlier one's time: timings repeat to a few percent
LEAN = 2.0  # a backend that holds more than this many times the least for backward is not taken: memory is what runs out
SCORES_BYTES = 1 << 31  # math is not tried where its scores alone would take more: there it never wins, and may not fit


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention: q [B, heads, queries, head_dim], k and v [B, heads, keys, head_dim]."""

    heads: int
    head_dim: int
    queries: int
    keys: int

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.head_dim}, {self.queries} queries, {self.keys} keys"


@dataclasses.dataclass(frozen=True)
class Backend:
    """attend(q, k, v) [B, H, L, D] -> [B, H, L, D] with scale D^-1/2, and where it may be tried."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    devices: tuple[str, ...] = ("cuda",)
    head_dims: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one backend did on one shape: milliseconds of a forward and backward pass and bytes held between, or why not."""

    milliseconds: float | None = None
    saved_bytes: int | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend of all attentions of one shape; None: they were left as they were. `str` of it is the line to log.

    modules: their names in the UNet. probes: backend -> Probe, of all that were tried. refused: name -> reason.
    """

    shape: Shape | None
    backend: str | None
    modules: tuple[str, ...]
    probes: dict[str, Probe]
    refused: dict[str, str]

    def __str__(self) -> str:
        where = f"attention, {self.shape or 'all'} (x{len(self.modules)}): "
        if self.backend is None:
            what = "left alone"
        else:
            probe = self.probes[self.backend]
            what = f"{self.backend}, {probe.milliseconds:.3g} ms, {probe.saved_bytes / 2**20:.3g} MiB saved for backward"
        return where + what + "".join(f"; {name}: {reason}" for name, reason in self.refused.items())


# -- backends ----------------------------------------------------------------------------------------------------------


def _sdpa(kernel: SDPBackend) -> Callable:
    def attend(q, k, v):
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _xformers(module: str) -> Callable:
    """One of xformers' operators, through a torch op: Dynamo cannot trace its dispatcher."""

    def attend(q, k, v):
        forward, _ = _xformers_ops()
        return forward(*(x.transpose(1, 2) for x in (q, k, v)), module)[0].transpose(1, 2)

    return attend


@functools.cache
def _xformers_ops():
    from xformers.ops import fmha  # about a second; quiet.py takes its line about the extension that these do not use

    def forward(q: Tensor, k: Tensor, v: Tensor, module: str) -> tuple[Tensor, Tensor]:
        operator = getattr(fmha, module).FwOp
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, op=operator)
        return out.contiguous(), lse.contiguous()

    def backward(
        g: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, module: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        operator = getattr(fmha, module).BwOp
        found = fmha.memory_efficient_attention_backward(g, out, lse, q, k, v, op=operator)
        return tuple(x.contiguous() for x in found)

    def forward_fake(q, k, v, module):
        rows = q.shape[1] if module == "flash" else -(-q.shape[1] // 32) * 32  # cutlass pads its log-sum-exp
        return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], rows), dtype=torch.float32)

    forward = torch.library.custom_op("fastsds::xformers_attention", forward, mutates_args=(), device_types="cuda")
    forward.register_fake(forward_fake)
    backward = torch.library.custom_op("fastsds::xformers_attention_gradient", backward, mutates_args=(), device_types="cuda")
    backward.register_fake(lambda g, out, lse, q, k, v, module: tuple(x.new_empty(x.shape) for x in (q, k, v)))

    def context(ctx, inputs, output):
        q, k, v, ctx.module = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(out, lse, q, k, v)

    forward.register_autograd(lambda ctx, g, _: (*backward(g, *ctx.saved_tensors, ctx.module), None), setup_context=context)
    return forward, backward


# In the order in which ties are settled. xformers' two call the same torch kernels as flash and efficient.
BACKENDS: dict[str, Backend] = {
    "flash": Backend(_sdpa(SDPBackend.FLASH_ATTENTION), ("cuda", "cpu")),
    "cudnn": Backend(_sdpa(SDPBackend.CUDNN_ATTENTION)),
    "efficient": Backend(_sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "xformers_fa2": Backend(_xformers("flash")),
    "xformers_cutlass": Backend(_xformers("cutlass")),
    "fastsds": Backend(ops.attention, ("cuda", "cpu") if launch.INTERPRETED else ("cuda",), (40,)),
    "math": Backend(_sdpa(SDPBackend.MATH), ("cuda", "cpu")),
}


class Processor:
    """diffusers' `AttnProcessor2_0` on one named backend. With an attention mask it is SDPA's own choice, as there."""

    def __init__(self, backend: str):
        self.backend, self.attend = backend, BACKENDS[backend].attend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape if hidden_states.ndim == 4 else None
        if image is not None:  # [B, C, H, W] -> [B, H W, C]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, keys, _ = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.view(batch, -1, attn.heads, k.shape[-1] // attn.heads).transpose(1, 2) for x in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if attention_mask is None:
            out = self.attend(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        for layer in attn.to_out:  # linear, dropout
            out = layer(out)
        if image is not None:
            out = out.transpose(1, 2).reshape(image)
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


# -- probing -----------------------------------------------------------------------------------------------------------


@functools.cache
def probe(backend: Backend, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Probe:
    """Try one backend on one shape, as the processor calls it, once a process: correct forward and backward, then time."""
    if device.type not in backend.devices:
        return Probe(reason=f"no operator for {device.type}")
    if backend.head_dims is not None and shape.head_dim not in backend.head_dims:
        return Probe(reason=f"no operator for head dimension {shape.head_dim}")
    scores = 4 * batch * shape.heads * shape.queries * shape.keys
    if backend is BACKENDS["math"] and scores > SCORES_BYTES:
        return Probe(reason=f"not tried: its scores would take {scores / 2**30:.1f} GiB")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        warnings.catch_warnings(record=True) as said,  # SDPA's reasons are warnings
    ):
        warnings.simplefilter("always")
        *leaves, g = _inputs(shape, batch, device, dtype)

        def forward():
            q, k, v = (x.unflatten(2, (shape.heads, -1)).transpose(1, 2) for x in leaves)
            return backend.attend(q, k, v).transpose(1, 2).flatten(2)

        def both():
            return torch.autograd.grad(forward(), leaves, g)

        stage = "no operator"
        try:
            held = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda v: _hold(held, v), lambda v: v):
                out = forward()
            stage = "no backward"
            found = (out.detach(), *torch.autograd.grad(out, leaves, g))
            if wrong := _wrong(found, shape, leaves, g):
                return Probe(reason=f"wrong: {wrong}")
            return Probe(_milliseconds(both, device), sum(held.values()))
        except Exception as error:  # a third party's operator may fail in any way; the reason is kept
            lines = [str(error), *(str(w.message) for w in said if issubclass(w.category, UserWarning))]
            return Probe(reason=f"{stage}: {'; '.join(' '.join(line.split())[:160] for line in lines)}")


def _inputs(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and an upstream gradient, [B, L, heads * head_dim] as the linears give them.

    Scores with a deviation of 2, so that a softmax is peaked and every output and gradient of the size of its inputs.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows = (shape.queries, shape.keys, shape.keys, shape.queries)
    q, k, v, g = (
        torch.randn(batch, n, shape.heads * shape.head_dim, generator=generator, device=device).to(dtype) for n in rows
    )
    return [*(x.requires_grad_() for x in ((2 * q.detach()), k, v)), g]


def _hold(held: dict[int, int], v: Tensor) -> Tensor:
    held[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
    return v


def _wrong(found: tuple[Tensor, ...], shape: Shape, leaves: list[Tensor], g: Tensor) -> str | None:
    """By the twice-eager rule on the batch's last sample, one head after the other: the first that breaks it, in words."""
    dtype = g.dtype
    for head in range(shape.heads):
        part = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        q, k, v, upstream = (x[-1:, None, :, part].detach() for x in (*leaves, g))
        wide = [x.double() for x in (q, k, v)]
        out, lse = reference.attention(*wide, shape.head_dim**-0.5)
        oracle = (out, *reference.attention_gradient(upstream.double(), *wide, out, lse, shape.head_dim**-0.5))
        eager_leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = BACKENDS["math"].attend(*eager_leaves)
        eager = (out.detach(), *torch.autograd.grad(out, eager_leaves, upstream))
        for name, ours, theirs, exact in zip(("output", "dq", "dk", "dv"), found, eager, oracle, strict=True):
            size = exact.abs().max()
            ours = ((ours[-1:, None, :, part].double() - exact).abs().max() / size).item()
            limit = 2 * ((theirs.double() - exact).abs().max() / size).item() + TOLERANCE[dtype][1]
            if not ours <= limit:  # NaN is wrong too
                return f"{name} of head {head} off by {ours:.2g} of its largest value, allowed {limit:.2g}"
    return None


def _milliseconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return do_bench(function, warmup=10, rep=50, return_mode="median")
    times = []
    while len(times) < 3 or (sum(times) < 0.05 and len(times) < 50):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def shapes(unet: torch.nn.Module, text_length: int = 77) -> dict[str, Shape]:
    """Find the attentions of a UNet and their shapes at `unet.config.sample_size`: {module name: Shape}.

    The UNet's own forward runs on the meta device, without memory or arithmetic, every processor replaced by one that notes
    down what it is given. Raises: ValueError if the configuration has no sample_size, or the forward needs more than
    latents, timesteps and text.
    """
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    if not isinstance(size, (int, list, tuple)):
        raise ValueError(f"unet.config.sample_size: {size!r}, expected a number, or (height, width), of latents")
    size = (size, size) if isinstance(size, int) else tuple(size)
    found, attentions = {}, _attentions(unet)
    names = {module: name for name, module in attentions.items()}

    def note(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        queries, keys = (x.shape[1] if x.ndim == 3 else x.shape[2:].numel() for x in (hidden_states, other))
        found[names[attn]] = Shape(attn.heads, attn.inner_kv_dim // attn.heads, queries, keys)
        return hidden_states

    tensors = {name: v.to("meta") for name, v in (*unet.named_parameters(), *unet.named_buffers())}
    latents = torch.empty(1, unet.config.in_channels, *size, dtype=unet.dtype, device="meta")
    text = torch.empty(1, text_length, width if isinstance(width, int) else width[0], dtype=unet.dtype, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    before = {name: module.processor for name, module in attentions.items()}
    try:
        for module in attentions.values():
            module.processor = note
        with torch.no_grad():
            torch.func.functional_call(unet, tensors, (latents, t), {"encoder_hidden_states": text})
    except Exception as error:
        raise ValueError(f"unet: its forward does not run on latents, timesteps and text alone: {error}") from error
    finally:
        for name, module in attentions.items():
            module.processor = before[name]
    return found


def _attentions(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from diffusers.models.attention_processor import Attention

    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _foreign(attentions: dict[str, torch.nn.Module]) -> str | None:
    """Why these processors are not ours to replace: they do more than attention, or it is not scaled by D^-1/2."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    for name, module in attentions.items():
        if type(module.processor) not in (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, Processor):
            return f"{name} has a {type(module.processor).__name__}, which does more than attention"
        if module.scale != (module.inner_kv_dim // module.heads) ** -0.5:
            return f"{name} scales by {module.scale}, not by head_dim^-1/2"
    return None


# -- choosing ----------------------------------------------------------------------------------------------------------


def attach(
    unet: torch.nn.Module, attention: str | None = "auto", *, batch: int = 1, text_length: int = 77
) -> tuple[list[Choice], Callable[[], None]]:
    """Give each attention of a UNet the fastest backend that is right at its shape, forward and backward.

    Args:
        unet: a `UNet2DConditionModel`, on the device and in the dtype it will run in.
        attention: "auto"; None to change nothing; or a name of `BACKENDS`, which then serves every shape.
        batch, text_length: what to measure with, besides `unet.config.sample_size`: samples, and tokens of a caption.
    Returns: (choices, undo): one Choice a shape, to log; undo() puts the former processors back, the same objects.
        Processors that do more than attention (IP-adapter, old LoRA, slicing), a UNet that needs more than latents,
        timesteps and text, and one on the meta device are left alone under "auto": one Choice with backend None says so.
    Raises: ValueError for an unknown name, and for a named backend that cannot serve a shape: no operator, no backward,
        wrong. It names the shape, the backend, and those that can.
    Cost: a process probes a shape once; more than five seconds of it show progress on stderr. Global random numbers are
        not used.
    """
    if attention is None:
        return [], lambda: None
    if attention != "auto" and attention not in BACKENDS:
        raise ValueError(f"attention: 'auto', None or one of {', '.join(BACKENDS)} expected, got {attention!r}")
    attentions = _attentions(unet)
    if not attentions:
        return [], lambda: None
    reason, found = _foreign(attentions), {}
    if reason is None and unet.device.type == "meta":
        reason = "nothing can be measured on the meta device"
    if reason is None:
        try:
            found = shapes(unet, text_length)
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        if attention != "auto":
            raise ValueError(f"attention {attention!r}: {reason}; use attention=None to leave them alone")
        return [Choice(None, None, tuple(attentions), {}, {"reason": reason})], lambda: None

    modules: dict[Shape, list[str]] = {}
    for name, shape in found.items():
        modules.setdefault(shape, []).append(name)
    choices = _choose(modules, attention, batch, unet.device, unet.dtype)
    before = {name: attentions[name].processor for name in found}

    def undo():
        for name, processor in before.items():
            attentions[name].set_processor(processor)

    for choice in choices:
        if choice.backend is not None:
            for name in choice.modules:
                attentions[name].set_processor(Processor(choice.backend))
    verify(unet, choices)
    return choices, undo


def verify(unet: torch.nn.Module, choices: list[Choice]) -> None:
    """Check that every attention still has the processor that was chosen for it; RuntimeError names the first that has not."""
    for choice in choices:
        for name in choice.modules if choice.backend is not None else ():
            processor = unet.get_submodule(name).processor
            if type(processor) is not Processor or processor.backend != choice.backend:
                got = getattr(processor, "backend", type(processor).__name__)
                raise RuntimeError(f"{name}: attention {choice.backend} was chosen, {got} is in place; attach again")


def _choose(modules: dict[Shape, list[str]], attention: str, batch: int, device, dtype) -> list[Choice]:
    choices, began, shown = [], time.monotonic(), QUIET_SECONDS
    for i, (shape, names) in enumerate(modules.items()):
        probes = {}
        for backend in BACKENDS if attention == "auto" else (attention,):
            if (spent := time.monotonic() - began) > shown:
                print(f"attention: shape {i + 1} of {len(modules)}, {backend} ({spent:.0f} s)", file=sys.stderr, flush=True)
                shown = spent + QUIET_SECONDS
            probes[backend] = probe(BACKENDS[backend], shape, batch, device, dtype)
        right = {n: p for n, p in probes.items() if p.reason is None}
        limit = LEAN * min((p.saved_bytes for p in right.values()), default=0)
        best = None
        for name, found in right.items():
            if found.saved_bytes <= limit and (best is None or found.milliseconds < TIE * right[best].milliseconds):
                best = name
        if best is None and attention != "auto":
            able = [n for n, b in BACKENDS.items() if probe(b, shape, batch, device, dtype).reason is None]
            raise ValueError(
                f"attention {attention!r} cannot serve {shape} in {str(dtype).removeprefix('torch.')} on {device}: "
                f"{probes[attention].reason}; use 'auto' or one of {', '.join(able) or 'none'}"
            )
        refused = {n: p.reason or _beaten(p, limit) for n, p in probes.items() if n != best}
        choices.append(Choice(shape, best, tuple(names), probes, refused))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return choices


def _beaten(probe: Probe, limit: float) -> str:
    """Why a backend that is right was not taken."""
    figures = f"{probe.milliseconds:.3g} ms, {probe.saved_bytes / 2**20:.3g} MiB saved"
    return f"{'saves too much' if probe.saved_bytes > limit else 'slower'}, {figures}"
