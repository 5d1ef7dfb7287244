"""Which layers of a UNet have a twin in `frozen`, and why others have none."""

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from fastsds.kernels.layer_norm import MAX_ROW
from fastsds.teacher import frozen

# Making the product of a gate again costs 2 C operations for each number that is held less. SD 1.x at C = 320: 12 % of what
# the plain UNet holds for 2 % of its operations, forward and backward; at C = 640 half of that for as much, at 1,280 a quarter.
NARROW = 512


def twins(unet, parts):
    """Yield (name, module, its twin or None, why), for the parts named of `accelerate.FUSED`."""
    rows = []
    if "norms" in parts:
        rows += _group_norms(unet)
    if "layer_norms" in parts:
        rows += _layer_norms(unet)
    if "gates" in parts or "remade_gates" in parts:
        rows += _gates(unet, parts)
    if "convolutions" in parts:
        rows += _convolutions(unet)
    for name, module, twin, why in rows:
        if twin is not None and "forward" in vars(module):
            twin, why = None, "another library has put a forward of its own into it"
        yield name, module, twin, why


def _group_norms(unet):
    once, in_block, alone = "keeps one tensor instead of two", set(), set()
    for name, module in unet.named_modules():
        if isinstance(module, (ResnetBlock2D, ResnetBlockCondNorm2D)):
            reason = _foreign_resnet(module)
            in_block |= {module.norm1, module.norm2}
            yield name, module, None if reason else frozen.FusedResnetBlock2D, reason or f"SiLU in its norms: {once}"
        elif isinstance(module, Transformer2DModel):
            alone.add(module.norm)
    if _affine(unet.conv_norm_out) and type(unet.conv_act) is nn.SiLU and not _watched(unet.conv_act):
        in_block.add(unet.conv_norm_out)
        yield "conv_norm_out", unet.conv_norm_out, frozen.FusedGroupNormSiLU, f"with the SiLU behind it: {once}"
        yield "conv_act", unet.conv_act, frozen.PassedSiLU, "in the norm before it"
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm) and module not in in_block:
            fits = _affine(module) and module in alone
            yield name, module, frozen.FusedGroupNorm if fits else None, "one kernel" if fits else "not one of those we know"


def _layer_norms(unet):
    for name, module in unet.named_modules():
        if isinstance(module, nn.LayerNorm):
            fits = type(module) is nn.LayerNorm and module.bias is not None and module.weight.ndim == 1
            fits = fits and len(module.weight) <= MAX_ROW
            why = "one kernel" if fits else f"weight and bias of one axis, at most {MAX_ROW} long, expected"
            yield name, module, frozen.FusedLayerNorm if fits else None, why


def _affine(norm):
    return type(norm) is nn.GroupNorm and norm.affine and not _watched(norm)


def _watched(module):
    """Somebody counts on this module's being called: a hook (offloading, casting), or a forward of its own."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _foreign_resnet(module) -> str | None:
    """Why a resnet block is not one of those that we compute."""
    if type(module) is not ResnetBlock2D:
        return "a class of its own, whose norms may depend on the time step"
    if module.time_embedding_norm != "default":
        return f"time_embedding_norm {module.time_embedding_norm!r} stands between norm and activation"
    if type(module.nonlinearity) is not nn.SiLU or _watched(module.nonlinearity):
        return f"{type(module.nonlinearity).__name__}, not SiLU without hooks"
    if not (_affine(module.norm1) and _affine(module.norm2)):
        return "norms other than GroupNorm with weight, bias, and no hooks"
    return None


def _gates(unet, parts):
    for name, module in unet.named_modules():
        if not isinstance(module, GEGLU):
            continue
        width = module.proj.in_features
        if type(module) is not GEGLU or type(module.proj) is not nn.Linear or _watched(module.proj):
            yield name, module, None, "of another class, or its projection is no Linear without hooks"
        elif "remade_gates" in parts and width <= NARROW:
            yield name, module, frozen.RemadeGEGLU, f"rows of {width}: keeps an eighth and makes its product again"
        elif "gates" in parts:
            yield name, module, frozen.FusedGEGLU, "keeps two thirds"


def _convolutions(unet):
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            fits = type(module) is nn.Conv2d and not isinstance(module.padding, str)
            why = "does not keep its input" if fits else "of another class, or its padding is a word"
            yield name, module, frozen.FrozenConv2d if fits else None, why
