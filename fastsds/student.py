"""The student: an open_clip CLIP, the latent head h_w, and what of them trains.

The CLIP is built with a one-element `logit_scale` (DeepSpeed cannot shard a 0-dim one); what is saved has the plain
0-dim form, in open_clip's own folder format, so plain open_clip loads it by `local-dir:FOLDER`.
"""

import json
import math
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastsds.config import ConfigError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
HEAD_FILE = "head.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own limit


class StudentOutput(NamedTuple):
    """What one forward returns, in fp32 unless the student is fp64. Fields of an absent input are None.

    Shapes: image_raw [B, d] as the image tower gives it, image [B, d] and text [N, d] of unit length,
    z [B, C, h, w] = h_w(image_raw) or None without a head, logit_scale 0-dim (already exponentiated).
    """

    image_raw: torch.Tensor | None
    image: torch.Tensor | None
    text: torch.Tensor | None
    z: torch.Tensor | None
    logit_scale: torch.Tensor


class LatentHead(nn.Module):
    """h_w: a linear map from the image embedding f to a latent, fed with f / |f| * sqrt(d).

    So its input has unit mean square whatever the backbone's scale. Shapes: [B, d] -> [B, C, h, w].
    """

    def __init__(self, width: int, latent_shape: tuple[int, int, int]):
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        self.linear = nn.Linear(width, math.prod(self.latent_shape))

    @staticmethod
    def features(f: torch.Tensor) -> torch.Tensor:
        """f / |f| * sqrt(d). Shapes: [B, d] -> [B, d]."""
        return nn.functional.normalize(f, dim=-1) * math.sqrt(f.shape[-1])

    def forward(self, f: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(f).to(self.linear.weight.dtype)).unflatten(1, self.latent_shape)

    def pull_back(self, f: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """dL/df from dL/dz, beside the graph: an engine's hooks forbid partial backward passes through its outputs.

        Shapes: f [B, d], gradient [B, C, h, w] -> [B, d]. Under ZeRO-3 collective (it gathers the weight).
        """
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            features = self.features(f)
        with _whole(self.linear.weight) as weight:
            inner = gradient.flatten(1) @ weight.detach().to(gradient.dtype)
        return torch.autograd.grad(features, f, inner.to(features.dtype))[0]


class Student(nn.Module):
    """CLIP and head behind one forward, so that a sharding engine can call them: `engine(pixels, tokens)`.

    clip: an open_clip model; config: its folder's `open_clip_config.json` as a dict; tokenizer: open_clip's.
    BatchNorm statistics and dropout stay frozen: a step must not depend on how a batch is cut.
    """

    def __init__(self, clip: nn.Module, config: dict, tokenizer, latent_shape: tuple[int, int, int] | None = None):
        super().__init__()
        self.clip = clip
        clip.forward = partial(_towers, clip)
        self.config, self.tokenizer = config, tokenizer
        self.image_size = _square(clip.visual.image_size)
        self.width = _embedding_width(clip, config)
        self.head = LatentHead(self.width, latent_shape) if latent_shape is not None else None
        preprocess = config["preprocess_cfg"]
        self._mean, self._std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self._statistics: dict = {}
        if getattr(clip, "logit_bias", None) is not None:  # a constant bias does not change a softmax
            clip.logit_bias.requires_grad_(False)

    @property
    def latent_shape(self) -> tuple[int, int, int] | None:
        return self.head.latent_shape if self.head is not None else None

    def train(self, mode: bool = True) -> "Student":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
                module.eval()
        return self

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(pixels / 255 - mean) / std, in the dtype of the weights. Shapes: uint8 [B, 3, S, S] -> [B, 3, S, S]."""
        expected = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"pixels: {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [B, 3, {expected[1]}, {expected[2]}]"
            )
        dtype = self.clip.logit_scale.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if (key := (pixels.device, wide)) not in self._statistics:
            self._statistics[key] = tuple(
                torch.tensor(v, dtype=wide, device=pixels.device).view(1, 3, 1, 1) for v in (self._mean, self._std)
            )
        mean, std = self._statistics[key]
        return ((pixels.to(wide) / 255 - mean) / std).to(dtype)

    def forward(self, pixels: torch.Tensor | None = None, tokens: torch.Tensor | None = None) -> StudentOutput:
        """Shapes: pixels uint8 [B, 3, S, S] or None, tokens int64 [N, L] or None -> StudentOutput."""
        image = text = z = None
        images = None if pixels is None else self.normalise(pixels)
        raw, raw_text, scale = self.clip(images, tokens)
        if raw is not None:
            image = nn.functional.normalize(raw, dim=-1)
            if self.head is not None:
                z = _at_least_fp32(self.head(raw))
        if raw_text is not None:
            text = nn.functional.normalize(raw_text, dim=-1)
        return StudentOutput(raw, image, text, z, scale)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids, cut to the context length with the end token kept. Shapes: [N] strings -> int64 [N, L]."""
        return self.tokenizer(list(captions))


def load_student(
    model: str | Path,
    pretrained: str | None = None,
    latent_shape: tuple[int, int, int] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Student:
    """Load a student in fp32.

    Args: model: "world" (the embedded one), a folder in open_clip's format, a named open_clip architecture, or
        `hf-hub:ORG/NAME`. Only a `pretrained` tag or an `hf-hub:` name is ever fetched; `pretrained` may also be a
        local weights file. latent_shape: (C, h, w) of the teacher; None takes the folder's own head, if it has one.
        seed: of whatever is not loaded (the head; the towers of a named architecture without weights).
    Raises: ConfigError that names the folder and what is missing in it.
    """
    import open_clip

    name, folder = _resolve(model, pretrained)
    options = {
        "nonscalar_logit_scale": True,
        "device": "cpu",
        "precision": "fp32",
        "force_patch_dropout": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clip = open_clip.create_model(name, pretrained=pretrained, **options)
            tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise ConfigError(f"student {model}: {_brief(error)}") from error
        model_cfg = open_clip.factory.get_model_config(
            name.replace("/", "-") if folder is None and ":" not in name else name
        )
        config = {"model_cfg": model_cfg, "preprocess_cfg": dict(clip.visual.preprocess_cfg)}
        saved = _read_head(folder) if folder is not None else None
        if latent_shape is None and saved is not None:
            latent_shape = saved[0]
        student = Student(clip, config, tokenizer, latent_shape)
    if saved is not None:
        shape, state = saved
        if shape != student.latent_shape or state["linear.weight"].shape != student.head.linear.weight.shape:
            raise ConfigError(
                f"{folder / HEAD_FILE}: head for latents {shape}, but the teacher's latents are {tuple(latent_shape)}"
            )
        student.head.load_state_dict(state)
    _check_text(student, model)
    return student.to(device)


def apply_tuning(student: Student, tune: str, head: bool = True) -> list[str]:
    """Set `requires_grad` on every parameter and return the trained names.

    "layernorm": affine parameters of LayerNorm (and BatchNorm, in ResNets), and the head. "all": everything.
    head=False leaves the head out: nothing would train it where L_SDS is off.
    """
    if tune not in ("layernorm", "all"):
        raise ConfigError(f"student.tune: {tune!r}, expected layernorm or all")
    kinds = nn.LayerNorm | nn.modules.batchnorm._BatchNorm
    norms = {id(p) for m in student.clip.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    trained = []
    for name, parameter in student.named_parameters():
        if name.startswith("head."):
            wanted = head
        else:
            wanted = name != "clip.logit_bias" and (tune == "all" or id(parameter) in norms)
        parameter.requires_grad_(wanted)
        if wanted:
            trained.append(name)
    return trained


def save_student(state: dict[str, torch.Tensor], like: Student | Path, out: Path) -> None:
    """Write a student's state as an open_clip folder: config, weights, tokenizer files, and the head beside them.

    Args: state: `Student.state_dict()`, whole tensors. like: the student, or the folder it came from, which gives
        config and tokenizer files. A `local-dir:` load of `out` in plain open_clip gives the same features.
    """
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(like, Student):
        config = json.loads(json.dumps(like.config))
        hf = getattr(like.tokenizer, "tokenizer", None)
        if hasattr(hf, "save_pretrained"):
            hf.save_pretrained(out)
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "."  # plain open_clip takes the folder itself
        _replace(out / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    else:
        for file in sorted(Path(like).iterdir()):
            if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and file.resolve() != (out / file.name).resolve():
                shutil.copyfile(file, out / file.name)
    parts: dict[str, dict] = {"clip": {}, "head": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise ValueError(f"{name}: not a student's tensor, expected clip.* or head.*")
        parts[part][rest] = tensor.detach().cpu().contiguous().clone()
    clip = parts["clip"]
    clip["logit_scale"] = clip["logit_scale"].clamp(max=MAX_LOGIT_SCALE).reshape(())
    if "logit_bias" in clip:
        clip["logit_bias"] = clip["logit_bias"].reshape(())
    _replace(out / WEIGHTS_FILE, lambda path: save_file(clip, path))
    if parts["head"]:
        shape = like.latent_shape if isinstance(like, Student) else _shape_of_head(like, parts["head"])
        meta = {"latent_shape": json.dumps(list(shape))}
        _replace(out / HEAD_FILE, lambda path: save_file(parts["head"], path, metadata=meta))


@contextmanager
def _whole(parameter: nn.Parameter):
    """Give a parameter whole, wherever ZeRO-3 keeps its parts."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def _towers(clip: nn.Module, images: torch.Tensor | None, tokens: torch.Tensor | None):
    """What the student's `clip(images, tokens)` does: raw features of both towers, and the logit scale.

    It goes through the module's own call, for ZeRO-3 gathers a module's parameters around that and nothing else.
    """
    image = None if images is None else _at_least_fp32(clip.encode_image(images))
    text = None if tokens is None else _at_least_fp32(clip.encode_text(tokens))
    scale = _at_least_fp32(clip.logit_scale).clamp(max=MAX_LOGIT_SCALE).exp().reshape(())
    return image, text, scale


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _square(size) -> int:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if height != width:
        raise ConfigError(f"student: images of {height}x{width}, expected square ones")
    return int(height)


def _embedding_width(clip: nn.Module, config: dict) -> int:
    return int(config["model_cfg"].get("embed_dim") or clip.visual.output_dim)


def _brief(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).strip().split("\n")[:2])


def _resolve(model: str | Path, pretrained: str | None) -> tuple[str, Path | None]:
    """open_clip's name for a recipe's `student.model`, and the local folder if it is one."""
    import open_clip

    text = str(model)
    if text == "world":
        from fastsds import world

        model = world.STUDENT
    elif text.startswith("hf-hub:"):
        return text, None
    folder = Path(str(model).removeprefix("local-dir:"))
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(f"{folder}: {CONFIG_FILE} is missing (expected an open_clip folder)")
        if not any(f.suffix in WEIGHT_SUFFIXES and f.name != HEAD_FILE for f in folder.iterdir()):
            raise ConfigError(f"{folder}: no weights (expected {WEIGHTS_FILE})")
        if pretrained is not None:
            raise ConfigError(f"student.pretrained: {pretrained!r}, but {folder} has its own weights; expected null")
        return f"local-dir:{folder}", folder
    if text.replace("/", "-") in open_clip.list_models():
        return text, None
    if text == "world" or text.startswith(("local-dir:", ".", "/", "~")) or "/" in text:
        raise ConfigError(f"student.model: folder {folder} does not exist")
    raise ConfigError(f"student.model: {text!r} is neither a folder nor an open_clip model (see open_clip.list_models())")


def _read_head(folder: Path) -> tuple[tuple[int, ...], dict] | None:
    """The latent shape and state of a saved head, or None."""
    from safetensors import safe_open

    if not (folder / HEAD_FILE).is_file():
        return None
    with safe_open(folder / HEAD_FILE, "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "latent_shape" not in metadata or set(state) != {"linear.weight", "linear.bias"}:
        raise ConfigError(f"{folder / HEAD_FILE}: not a latent head (expected linear.weight, linear.bias and latent_shape)")
    return tuple(json.loads(metadata["latent_shape"])), state


def _shape_of_head(like: Path, state: dict) -> tuple[int, ...]:
    saved = _read_head(Path(like))
    if saved is None or math.prod(saved[0]) != state["linear.bias"].numel():
        raise ValueError(f"the latent shape of the head is unknown: {like} has no {HEAD_FILE} like it; pass the student")
    return saved[0]


def _replace(path: Path, write) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def _check_text(student: Student, model: str | Path) -> None:
    """Raise unless the text tower pools the end token of short, long and odd captions, and knows every token."""
    clip, tokenizer = student.clip, student.tokenizer
    tower = getattr(clip, "text", clip)
    vocabulary = getattr(tower, "vocab_size", None)
    pool = getattr(clip, "text_pool_type", None) or getattr(tower, "pool_type", None)
    hf = getattr(tokenizer, "tokenizer", None)
    end = getattr(tokenizer, "eot_token_id", None) or getattr(hf, "eos_token_id", None)
    try:
        tokens = student.tokenize(["a red ring", "word " * 200, "naïve 雪 \N{SNOWMAN}"])
    except Exception as error:
        raise ConfigError(f"student {model}: its tokenizer fails on a caption: {_brief(error)}") from error
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise ConfigError(f"student {model}: token {int(tokens.max())} is past the text tower's {vocabulary} entries")
    if pool not in ("argmax", "eos") or end is None:
        return  # 'first', 'last' and HF towers do not look for the end token
    if pool == "argmax":
        pooled = tokens.argmax(dim=1)
    else:
        pooled = (tokens == (getattr(clip, "text_eos_id", None) or tower.eos_id)).int().argmax(dim=1)
    is_end = tokens == end
    if not bool(is_end.any(dim=1).all()) or not torch.equal(pooled, is_end.int().argmax(dim=1)):
        raise ConfigError(
            f"student {model}: text_cfg.pool_type {pool!r} does not find the tokenizer's end token {end}; "
            "expected the highest id for 'argmax', or text_cfg.eos_id for 'eos'"
        )
