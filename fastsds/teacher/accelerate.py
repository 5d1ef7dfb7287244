"""Make a frozen UNet faster and leaner, in place, and undo it.

    unet = UNet2DConditionModel.from_pretrained(...).requires_grad_(False)
    acceleration = accelerate_unet(unet)
    print(acceleration)                     # what was replaced and why, what was left alone and why
    ...
    acceleration.undo()                     # the UNet of before, bit for bit

No weight is copied or renamed: the state dict has the same keys and values all the time.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.utils import checkpoint as checkpointing

COMPILE = {None: None, "default": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # graphs: `cuda_graph` says
MEMORY_FORMATS = (None, "channels_last")
# "norms" are GroupNorms and the SiLU behind them
FUSED = ("norms", "layer_norms", "gates", "remade_gates", "convolutions")


class Change(NamedTuple):
    """What was done to modules of a kind, or why it was not."""

    done: bool
    what: str
    why: str
    modules: tuple[str, ...]

    def __str__(self):
        where = "" if self.done or not self.modules else f" ({', '.join(self.modules[:2])}{', ...' * (len(self.modules) > 2)})"
        return (f"{len(self.modules)} x " if self.modules else "") + f"{self.what}: {self.why}{where}"


class Acceleration:
    """What `accelerate_unet` did to a UNet. `str` of it says so in a few lines; also a context manager that undoes it.

    changes: list of `Change`. attention: the choices of `teacher.attention.attach`.
    """

    def __init__(self, unet):
        self.unet, self.attention, self._undo = unet, [], []
        self._changes: dict[tuple[bool, str, str], list[str]] = {}

    @property
    def changes(self) -> list[Change]:
        return [Change(*key, tuple(names)) for key, names in self._changes.items()]

    def undo(self) -> None:
        """Bring back the UNet of before, bit for bit. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()

    def __str__(self):
        done, left = ([f"  {c}" for c in self.changes if c.done is is_done] for is_done in (True, False))
        lines = ["replaced:", *done, *(f"  {c}" for c in self.attention)]
        return "\n".join(lines + (["left alone:", *left] if left else []))

    def _note(self, done, what, why, *names):
        self._changes.setdefault((done, what, why), []).extend(names)

    def _set(self, owner, name, value):
        """owner.name = value, to be undone."""
        if name == "__class__" or name in vars(owner):
            self._undo.append(functools.partial(setattr, owner, name, getattr(owner, name)))
        else:
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)


def accelerate_unet(
    unet: nn.Module,
    *,
    attention: str | None = "auto",
    fused: bool | tuple[str, ...] = True,
    memory_format: str | None = "channels_last",
    compile: str | None = None,
    cuda_graph: bool = False,
    checkpoint: bool = False,
) -> Acceleration:
    """Replace, in place, the parts of a frozen diffusers UNet that can be faster or keep less for the backward pass.

    Args:
        unet: a `UNet2DConditionModel`, none of whose parameters requires a gradient, on the device and in the dtype that it
            will run in. A gradient flows to latents and text as before.
        attention: "auto", a backend's name, or None to leave the processors alone: see `teacher.attention.attach`.
        fused: GroupNorm + SiLU, LayerNorm and GEGLU by `fastsds.ops`; convolutions that do not keep their input; narrow
            gates that keep the input of their projection and make it again. A tuple of some of `FUSED` takes those alone.
        memory_format: of the convolutions' weights, and so of what they put out; None leaves it.
        compile: "default" or "max-autotune", the mode of `torch.compile`; compiled at the first call, once for each shape.
        cuda_graph: record each shape's forward and backward pass at its first call and replay it afterwards.
        checkpoint: keep the inputs of blocks (resnets, transformer blocks) alone, and run each again in the backward pass:
            a third more time.
    Returns: an Acceleration: what was replaced, what was left alone, and why; `undo()`.
    Raises: ValueError for a parameter that requires a gradient, an unknown value, and a UNet that is accelerated already.
    Numerics: the fused ops compute in fp32 and round once; convolutions and their gradients have torch's own bits.
    Cost: autograd holds 51 % of what the plain UNet makes it hold at SD 1.x's size (64x64 latents), 12 % with checkpoint.
        On the CPU norms and gates are reference twins, which take a third more time there; ("convolutions",) takes none.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"unet: a diffusers UNet2DConditionModel expected, got {type(unet).__name__}")
    if "_acceleration" in vars(unet):
        raise ValueError("unet: accelerated already, or a copy of one that was; undo() that first")
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"unet: parameter {name} requires a gradient; unet.requires_grad_(False) freezes it")
        if parameter.is_inference():
            raise ValueError(f"unet: parameter {name} was made under inference_mode and is lost to autograd; load it outside")
    parts = FUSED if fused is True else () if fused is False else fused
    if not isinstance(parts, tuple) or any(part not in FUSED for part in parts):
        raise ValueError(f"fused: True, False or a tuple of some of {', '.join(map(repr, FUSED))} expected, got {fused!r}")
    for name, value, allowed in (
        ("memory_format", memory_format, MEMORY_FORMATS),
        ("compile", compile, COMPILE),
        ("cuda_graph", cuda_graph, (False, True)),
        ("checkpoint", checkpoint, (False, True)),
    ):
        if not isinstance(value, (str, bool, type(None))) or value not in allowed:
            raise ValueError(f"{name}: one of {', '.join(map(repr, allowed))} expected, got {value!r}")

    done = Acceleration(unet)
    done._set(unet, "_acceleration", True)
    try:
        if attention is not None:
            from fastsds.teacher.attention import attach

            done.attention, undo = attach(unet, attention)
            done._undo.append(undo)
        _fuse(done, set(parts) - ({"remade_gates"} if checkpoint else set()))  # a block that is run again makes it anyway
        if memory_format:
            _channels_last(done)
        if checkpoint:
            _checkpoint(done)
        if compile:
            done._set(unet, "forward", torch.compile(unet.forward, mode=COMPILE[compile], dynamic=False))
            done._note(True, "the forward pass", f"compiled, {compile}")
        if cuda_graph and unet.device.type == "cuda":
            from fastsds.teacher.graphs import Graphs

            done._set(unet, "forward", Graphs(unet))
            done._note(True, "forward and backward pass", "recorded at the first call of a shape, then replayed")
        elif cuda_graph:
            done._note(False, "CUDA graphs", f"no CUDA device: the UNet is on the {unet.device}")
    except BaseException:
        done.undo()
        raise
    return done


def _fuse(done, parts):
    """Give each layer that has a leaner twin its class."""
    from fastsds.teacher.fitting import twins

    for name, module, twin, why in twins(done.unet, parts):
        done._note(twin is not None, (twin or type(module)).__name__, why, name)
        if twin is not None:
            done._set(module, "__class__", twin)


def _channels_last(done):
    """Lay out the convolutions' weights, which is what cuDNN and oneDNN lay out results by."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    from fastsds.teacher import frozen

    for name, parameter in done.unet.named_parameters():
        if parameter.ndim == 4:
            done._undo.append(functools.partial(_lay_out, parameter, parameter.stride()))
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            done._note(True, "weights", "channels_last", name)
    for name, module in done.unet.named_modules():
        if type(module) is Transformer2DModel and module.is_input_continuous:
            done._set(module, "__class__", frozen.DenseTransformer2D)
            done._note(True, "DenseTransformer2D", "its result is not copied to another layout", name)


def _lay_out(parameter, strides):
    old = parameter.data
    parameter.data = torch.empty_strided(old.shape, strides, dtype=old.dtype, device=old.device).copy_(old)


def _checkpoint(done):
    for name, module in done.unet.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            done._set(module, "_gradient_checkpointing_func", _run_again)
            done._set(module, "gradient_checkpointing", True)
            done._note(True, "checkpoints", "keep the inputs of blocks alone", name)


def _run_again(module, *args):
    """What diffusers calls for a block. The generator's state is read, a wait for the device, only where dropout may draw."""
    return checkpointing.checkpoint(module, *args, use_reentrant=False, preserve_rng_state=module.training)
