"""Choose each attention of a UNet by measurement: forward and backward of every backend at the shapes the UNet really has.

    choices, undo = attach(unet)              # the fastest right backend for each shape; log the choices
    verify(unet, choices)                     # any time later: the chosen processors are still the ones in place
    undo()                                    # the processors of before, the same objects

diffusers' `set_attention_backend` does nothing on this UNet (its `AttnProcessor2_0` has no such hook), hence processors of
our own. Which backend is fastest is a measurement: where a rerun must repeat a run's bits, name the backend.
"""

import dataclasses
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastsds.teacher.probe import BACKENDS, Probe, Shape, probe

QUIET_SECONDS = 5.0  # a probe shows nothing before, and a line about as often after
TIE = 0.97  # a later backend must take less than this share of an earlier one's time: timings repeat to a few percent
LEAN = 2.0  # a backend that holds more than this many times the least for backward is not taken: memory is what runs out


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
        reasons: dict[str, list[str]] = {}
        for name, reason in self.refused.items():
            reasons.setdefault(reason, []).append(name)
        return where + what + "".join(f"; {', '.join(names)}: {reason}" for reason, names in reasons.items())


class Processor:
    """diffusers' `AttnProcessor2_0` on one named backend. With an attention mask it is SDPA's own choice, as there."""

    def __init__(self, backend: str):
        self.backend, self.attend = backend, BACKENDS[backend].attend

    def __reduce__(self):
        return Processor, (self.backend,)

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
        width = k.shape[-1] // attn.heads
        q, k, v = (x.view(batch, -1, attn.heads, width).transpose(1, 2) for x in (q, k, v))
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
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


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
