"""A CLIP with a ViT between open_clip and transformers: weights by name, configuration, image processor, tokenizer.

Both hold the same tensors under other names; two differ in form:

    attn.in_proj_weight, _bias       q_proj, k_proj, v_proj one after another
    visual.proj, text_projection     transposed: open_clip multiplies from the right

What transformers' CLIPModel cannot say is refused by the name of the feature.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from fastsds.config import ConfigError

TOWERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
ACTIVATIONS = {"quick_gelu": "QuickGELU", "gelu": "none", "gelu_pytorch_tanh": "tanh"}  # GELU: its approximation
RESAMPLE = {"bilinear": 2, "bicubic": 3, "random": 3}  # Pillow's numbers; open_clip draws in training alone
LEGACY_EOS = 2  # transformers reads it as "pool the highest id"
EPS = 1e-5

# What of an open_clip configuration has one form alone in transformers: key -> the values that are that form.
PLAIN = {
    "vision_cfg": {
        "timm_model_name": (None,), "attentional_pool": (False,), "no_ln_pre": (False,), "pool_type": ("tok",),
    },
    "text_cfg": {
        "hf_model_name": (None,), "tokenizer_mode": (None, ""), "tokenizer_kwargs": (None, {}), "embed_cls": (False,),
        "no_causal_mask": (False,), "pool_type": ("argmax", "eos"), "proj_bias": (False,), "proj_type": ("linear",),
    },
    "both": {
        "ls_init_value": (None,), "output_tokens": (False,), "block_type": (None, "default"), "qk_norm": (False,),
        "scaled_cosine_attn": (False,), "scale_heads": (False,), "scale_attn_inner": (False,), "scale_attn": (False,),
        "scale_fc": (False,),
    },
}  # fmt: skip


def names(vision_layers: int, text_layers: int, text: str) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(open_clip's name, transformers' names of its parts along axis 0, whether it is transposed) of every tensor.

    text: what stands before the text tower's names: "" in a CLIP, "text." in a CustomTextCLIP.
    """

    def both(ours: str, theirs: str):
        for end in ("weight", "bias"):
            yield f"{ours}.{end}", (f"{theirs}.{end}",), False

    for ours, theirs in TOWERS.items():
        ours = f"{text}{ours}" if theirs.startswith("text_model") else ours
        if ".ln_" in f".{ours}":
            yield from both(ours, theirs)
        else:
            yield ours, (theirs,), False
    yield "visual.proj", ("visual_projection.weight",), True
    yield f"{text}text_projection", ("text_projection.weight",), True
    for trunk, tower, layers in (("visual.", "vision_model", vision_layers), (text, "text_model", text_layers)):
        for k in range(layers):
            ours, theirs = f"{trunk}transformer.resblocks.{k}", f"{tower}.encoder.layers.{k}"
            for a, b in BLOCK.items():
                yield from both(f"{ours}.{a}", f"{theirs}.{b}")
            for end in ("weight", "bias"):
                yield f"{ours}.attn.in_proj_{end}", tuple(f"{theirs}.self_attn.{x}_proj.{end}" for x in "qkv"), False


# -- to transformers ---------------------------------------------------------------------------------------------------


def refuse(model_cfg: dict, preprocess: dict, where: str) -> None:
    """Raise ConfigError that names what of an open_clip configuration transformers' CLIPModel does not have."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    def no(what: str):
        raise ConfigError(f"{where}: {what}: transformers' CLIPModel has no such thing; expected --to open_clip")

    if isinstance(model_cfg["vision_cfg"].get("layers"), list | tuple):
        no(f"vision_cfg.layers is {list(model_cfg['vision_cfg']['layers'])}, a ResNet")
    for section, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        values = asdict(kind(**model_cfg[section]))
        for key, allowed in {**PLAIN[section], **PLAIN["both"]}.items():
            if values[key] not in allowed:
                no(f"{section}.{key} is {values[key]!r}")
    for key in ("multimodal_cfg", "init_logit_bias"):
        if model_cfg.get(key) is not None:
            no(f"{key} (a {'CoCa' if key == 'multimodal_cfg' else 'SigLIP loss'})")
    for key in ("image_size", "patch_size"):
        size = model_cfg["vision_cfg"].get(key)
        if isinstance(size, list | tuple) and size[0] != size[1]:
            no(f"vision_cfg.{key} is {list(size)}, not square")
    if preprocess.get("resize_mode", "shortest") == "longest":
        no("preprocess_cfg.resize_mode is 'longest' (images with borders)")


def to_transformers(clip: nn.Module, tokenizer, where: str):
    """transformers' CLIPModel with the weights of an open_clip CLIP or CustomTextCLIP, and its processor.

    Args: tokenizer: open_clip's. where: how an error calls the student.
    Returns: (CLIPModel, CLIPProcessor). Raises: ConfigError that names what cannot be said.
    """
    from transformers import CLIPConfig, CLIPModel

    prefix, tower, visual = ("text.", clip.text, clip.visual) if hasattr(clip, "text") else ("", clip, clip.visual)
    hf, end = tokenizer_of(tokenizer, clip.context_length)
    if (getattr(tower, "pool_type", None) or clip.text_pool_type) == "eos":
        end = getattr(tower, "eos_id", None) or clip.text_eos_id
        if end == LEGACY_EOS:
            raise ConfigError(f"{where}: text_cfg.eos_id is {end}: transformers takes that for 'pool the highest id'")
    shared = {"projection_dim": int(visual.output_dim)}
    text = {
        **_trunk(tower.transformer, tower.ln_final, where), **shared, "vocab_size": clip.vocab_size, "eos_token_id": int(end),
        "max_position_embeddings": clip.context_length, "bos_token_id": hf.bos_token_id, "pad_token_id": hf.pad_token_id,
    }  # fmt: skip
    vision = {
        **_trunk(visual.transformer, visual.ln_post, where), **shared,
        "image_size": visual.image_size[0], "patch_size": visual.patch_size[0],
    }  # fmt: skip
    scale = clip.logit_scale.detach().reshape(())
    config = CLIPConfig(text_config=text, vision_config=vision, logit_scale_init_value=float(scale), **shared)
    state = {**clip.state_dict(), "logit_scale": scale}
    found = {}
    for ours, theirs, transposed in names(vision["num_hidden_layers"], text["num_hidden_layers"], prefix):
        tensor = state.pop(ours).detach()
        parts = (tensor.T if transposed else tensor).chunk(len(theirs)) if tensor.ndim else (tensor,)
        found |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    if state:
        raise ConfigError(f"{where}: tensor {min(state)} has no place in transformers' CLIPModel")
    model = CLIPModel(config).eval()
    model.load_state_dict(found)
    return model, processor_of(visual.preprocess_cfg, visual.image_size[0], hf)


def _trunk(transformer: nn.Module, norm: nn.LayerNorm, where: str) -> dict:
    block = transformer.resblocks[0]
    act = block.mlp.gelu
    kind = act.approximate if type(act) is nn.GELU else type(act).__name__
    chosen = [name for name, ours in ACTIVATIONS.items() if ours == kind]
    if not chosen:
        raise ConfigError(f"{where}: activation {act}: transformers' CLIPModel has {', '.join(ACTIVATIONS)}")
    return {
        "hidden_size": block.attn.embed_dim, "intermediate_size": block.mlp.c_fc.out_features, "hidden_act": chosen[0],
        "num_hidden_layers": len(transformer.resblocks), "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": norm.eps,
    }  # fmt: skip


def processor_of(preprocess: dict, size: int, tokenizer):
    """The CLIPProcessor that resizes, crops and normalises as open_clip's evaluation transform does."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    squash = preprocess.get("resize_mode", "shortest") == "squash"
    square = {"height": size, "width": size}
    images = CLIPImageProcessor(
        size=square if squash else {"shortest_edge": size}, crop_size=square, do_center_crop=not squash,
        resample=RESAMPLE[preprocess.get("interpolation", "bicubic")],
        image_mean=list(preprocess["mean"]), image_std=list(preprocess["std"]),
    )  # fmt: skip
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def tokenizer_of(tokenizer, context_length: int):
    """transformers' form of an open_clip tokenizer, and the id of its end token.

    A Hugging Face tokenizer stays what it is, but cuts at the context length; open_clip's own becomes a CLIPTokenizer
    with its vocabulary and merges.
    """
    hf = getattr(tokenizer, "tokenizer", None)
    if hf is None:
        from transformers import CLIPTokenizer

        start, end = tokenizer.all_special_ids
        special = {start: "<|startoftext|>", end: "<|endoftext|>"}  # the names that CLIPTokenizer has
        words = {special.get(number, word): number for word, number in tokenizer.encoder.items()}
        merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
        hf = CLIPTokenizer(vocab=words, merges=merges, model_max_length=context_length)
    hf.model_max_length = min(hf.model_max_length, context_length)
    return hf, hf.eos_token_id


# -- to open_clip ------------------------------------------------------------------------------------------------------


def to_open_clip(folder: Path) -> tuple[dict, dict, object]:
    """A transformers CLIPModel folder as open_clip has it: its configuration, its state and its (HF) tokenizer.

    Raises: ConfigError that names what cannot be said.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "clip":
        raise ConfigError(f"{folder}: a {config.model_type}: open_clip's CLIP has no such thing; expected --to hf")
    model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text, vision = config.text_config, config.vision_config
    if text.hidden_act != vision.hidden_act or text.hidden_act not in ACTIVATIONS:
        acts = f"{vision.hidden_act}, {text.hidden_act}"
        raise ConfigError(f"{folder}: activations {acts}: open_clip has one of {', '.join(ACTIVATIONS)} for both towers")
    tanh = {"act_kwargs": {"approximate": "tanh"}} if text.hidden_act == "gelu_pytorch_tanh" else {}
    vision_cfg = {
        "image_size": vision.image_size, "patch_size": vision.patch_size, "layers": vision.num_hidden_layers,
        "head_width": vision.hidden_size // vision.num_attention_heads, **_widths(vision), **tanh,
    }  # fmt: skip
    legacy = text.eos_token_id == LEGACY_EOS
    text_cfg = {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "hf_tokenizer_name": ".",
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers, **_widths(text), **tanh,
        "pool_type": "argmax" if legacy else "eos", "eos_id": text.eos_token_id,
    }  # fmt: skip
    model_cfg = {"embed_dim": config.projection_dim, "quick_gelu": text.hidden_act == "quick_gelu"}
    model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
    held, state = model.state_dict(), {}
    for ours, theirs, transposed in names(vision.num_hidden_layers, text.num_hidden_layers, ""):
        parts = [held.pop(name) for name in theirs]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[ours] = (tensor.T if transposed else tensor).contiguous()
    return {"model_cfg": model_cfg, "preprocess_cfg": _preprocess(images, folder)}, state, tokenizer


def _widths(config) -> dict:
    eps, ratio = config.layer_norm_eps, config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) < config.intermediate_size:  # open_clip multiplies and cuts
        ratio = math.nextafter(ratio, math.inf)
    return {"width": config.hidden_size, "mlp_ratio": ratio, **({} if eps == EPS else {"norm_kwargs": {"eps": eps}})}


def _preprocess(images, folder: Path) -> dict:
    size = dict(images.size)
    resample = {number: name for name, number in RESAMPLE.items() if name != "random"}.get(int(images.resample))
    modes = {("shortest_edge",): "shortest", ("height", "width"): "squash"}
    mode = modes.get(tuple(sorted(key for key, value in size.items() if value is not None)))
    if resample is None or mode is None or bool(images.do_center_crop) != (mode == "shortest"):
        raise ConfigError(
            f"{folder}: images are resized to {size} by filter {int(images.resample)}, "
            f"{'cropped' if images.do_center_crop else 'not cropped'}: open_clip has no such transform"
        )
    return {
        "size": max(size.values()), "mode": "RGB", "mean": list(images.image_mean), "std": list(images.image_std),
        "interpolation": resample, "resize_mode": mode, "fill_color": 0,
    }  # fmt: skip
