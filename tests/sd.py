"""Stable Diffusion 1.x and 2.x: the published sizes, tiny instances as folders, and the original layout's names."""

from pathlib import Path

import torch

from fastsds.teacher.sizes import STABLE_DIFFUSION_1

PIXELS, LATENT, WIDTH = 64, (4, 8, 8), 64
PREDICTION = {1: "epsilon", 2: "v_prediction"}
SIZES = {  # what the published configurations say; 2 where it differs from 1
    1: STABLE_DIFFUSION_1,
    2: {
        "unet": dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
        "vae": dict(sample_size=768),
        "text": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"),
    },
}  # fmt: skip
PARAMETERS = {
    1: {"unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480},
    2: {"unet": 865_910_724, "vae": 83_653_863, "text": 340_387_840},
}


def size(part: str, version: int) -> dict:
    return {**SIZES[1][part], **SIZES[version][part]}


def full_size(part: str, version: int) -> torch.nn.Module:
    """A part at its published size, without storage."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        if part == "text":
            return CLIPTextModel(CLIPTextConfig(**size(part, version)))
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part](**size(part, version))


def save(folder: Path, version: int) -> Path:
    """A diffusers folder with all that tells the versions apart, for images of 64 pixels: heads, projections, text model."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from fastsds.teacher.vocabulary import END, clip_tokenizer

    widths = {1: (32, 32, 64), 2: (64, 64, 128)}[version]
    text = {1: dict(num_hidden_layers=2, hidden_act="quick_gelu"), 2: dict(num_hidden_layers=23, hidden_act="gelu")}[version]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(version)
        UNet2DConditionModel(
            sample_size=LATENT[1],
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=widths,
            layers_per_block=2,
            attention_head_dim=8 if version == 1 else [w // 64 for w in widths],
            use_linear_projection=version == 2,
            cross_attention_dim=WIDTH,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            sample_size=PIXELS,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
        ).save_pretrained(folder / "vae")
        encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=1, **text)
        )
        for parameter in encoder.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.1)
        encoder.save_pretrained(folder / "text_encoder")
    clip_tokenizer(END if version == 1 else "!").save_pretrained(folder / "tokenizer")
    DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=PREDICTION[version]
    ).save_pretrained(folder / "scheduler")
    return folder


def save_ldm(folder: Path, path: Path, version: int, metadata: dict | None = None, without: str | None = None) -> Path:
    """The models of a `save` folder in one file of the original layout, but for tensors under the prefix `without`."""
    from safetensors.torch import load_file, save_file

    def read(part: str) -> dict:
        return load_file(next((folder / part).glob("*.safetensors")))

    unet = read("unet")
    tensors = ldm_tensors(unet, read("vae"), read("text_encoder"), version)
    tensors |= {"model_ema.diffusion_model" + _ldm_unet(name).replace(".", ""): tensor + 1 for name, tensor in unet.items()}
    tensors["alphas_cumprod"] = torch.zeros(1000)
    kept = {k: v.contiguous().clone() for k, v in tensors.items() if without is None or not k.startswith(without)}
    save_file(kept, path, metadata={"format": "pt", "modelspec.resolution": f"{PIXELS}x{PIXELS}", **(metadata or {})})
    return path


def ldm_tensors(unet: dict, vae: dict, text: dict, version: int) -> dict:
    """The state dicts of a UNet, a VAE and a text model under the names that the original layout gives their tensors."""
    tensors = {f"model.diffusion_model.{_ldm_unet(name)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        square = "attentions" in name and tensor.ndim == 2  # there a convolution
        tensors[f"first_stage_model.{_ldm_vae(name)}"] = tensor[:, :, None, None] if square else tensor
    if version == 1:
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in _open_clip(text).items()}
    return tensors


def _renamed(name: str, pairs: dict) -> str:
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def _ldm_unet(name: str) -> str:
    """The ldm name of a tensor of diffusers' UNet with two residual blocks a level."""
    layers = 2
    outer = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    inner = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    where, *rest = name.split(".")
    if where == "time_embedding":
        return f"time_embed.{2 * (int(rest[0][-1]) - 1)}.{rest[1]}"
    if where == "mid_block":
        kind, i, *rest = rest
        tail = ".".join(rest)
        return f"middle_block.{2 * int(i)}.{_renamed(tail, inner)}" if kind == "resnets" else f"middle_block.1.{tail}"
    if where not in ("down_blocks", "up_blocks"):
        return _renamed(name, outer)
    level, kind, i, *rest = rest
    tail, first, side = ".".join(rest), int(level) * (layers + 1), "input" if where == "down_blocks" else "output"
    number = first + int(i) + (side == "input")
    if kind == "resnets":
        return f"{side}_blocks.{number}.0.{_renamed(tail, inner)}"
    if kind == "attentions":
        return f"{side}_blocks.{number}.1.{tail}"
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{tail.replace('conv', 'op')}"
    return f"output_blocks.{first + layers}.{1 if level == '0' else 2}.{tail}"  # the innermost level has no attention


def _ldm_vae(name: str) -> str:
    name = _renamed(name, {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    if "attn_1" in name:
        return _renamed(name, {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"})
    name = _renamed(name, {"mid_block.resnets.1": "mid.block_2", "mid_block.resnets.0": "mid.block_1", "resnets": "block"})
    name = _renamed(name, {"down_blocks": "down", "downsamplers.0": "downsample", "upsamplers.0": "upsample"})
    if ".up_blocks." in name:  # counted from the other end
        head, tail = name.split(".up_blocks.")
        level, tail = tail.split(".", 1)
        name = f"{head}.up.{3 - int(level)}.{tail}"
    return name


def _open_clip(text: dict) -> dict:
    """The tensors of a 23-layer CLIPTextModel as those of an OpenCLIP text tower, with its 24th block."""
    names = {
        "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
        "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn",
    }  # fmt: skip
    found = {}
    for name, tensor in text.items():
        if "q_proj" in name:
            whole = torch.cat([text[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            found[_renamed(name, names).replace("q_proj.", "in_proj_")] = whole
        elif "k_proj" not in name and "v_proj" not in name:
            found[_renamed(name, names)] = tensor
    found |= {k.replace(".22.", ".23."): torch.full_like(v, 9.0) for k, v in found.items() if ".resblocks.22." in k}
    width = text["final_layer_norm.weight"].numel()
    return {**found, "text_projection": torch.eye(width) * 9, "logit_scale": torch.tensor(1.0)}
