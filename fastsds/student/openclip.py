"""Students that open_clip builds: a folder in its format, a named architecture, a repository of the hub."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fastsds import hub, quiet
from fastsds.config import ConfigError
from fastsds.hub import HUB
from fastsds.student.head import HEAD_FILE
from fastsds.student.model import Family
from fastsds.weights import first_line

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip looks
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


class OpenClip(Family):
    """A CLIP or CustomTextCLIP of open_clip."""

    def encode_image(self, clip: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return clip.encode_image(pixels)

    def encode_text(self, clip: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return clip.encode_text(tokens)

    def pooling(self, clip: nn.Module):
        tower = getattr(clip, "text", clip)
        kind = getattr(clip, "text_pool_type", None) or getattr(tower, "pool_type", None)
        hf = getattr(self.tokenizer, "tokenizer", None)
        end = getattr(self.tokenizer, "eot_token_id", None) or getattr(hf, "eos_token_id", None)
        if kind == "argmax":
            pooled = _highest
        elif kind == "eos":
            eos = getattr(clip, "text_eos_id", None) or tower.eos_id

            def pooled(tokens):
                return (tokens == eos).int().argmax(dim=1)
        else:  # 'first', 'last' and HF towers do not look for the end token
            pooled = None
        return getattr(tower, "vocab_size", None), end, pooled

    def checkpoint(self, clip: nn.Module) -> None:
        from open_clip.modified_resnet import ModifiedResNet
        from open_clip.timm_model import TimmModel

        if isinstance(clip.visual, ModifiedResNet):
            raise ConfigError(f"student.checkpoint: true, but open_clip's ResNets have none ({self.where}): expected false")
        try:
            if isinstance(clip.visual, TimmModel):  # open_clip's own call goes on without it
                clip.visual.trunk.set_grad_checkpointing(True)
            clip.set_grad_checkpointing(True)
        except Exception as error:
            raise ConfigError(f"student.checkpoint: true, but {self.where} has none: {first_line(error)}") from error

    def save(self, out: Path) -> None:
        config = json.loads(json.dumps(self.config))
        hf = getattr(self.tokenizer, "tokenizer", None)
        if hasattr(hf, "save_pretrained"):
            hf.save_pretrained(out)
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "."  # plain open_clip takes the folder itself
        (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model: str, pretrained: str | None, folder: Path | None, meta: bool) -> tuple[nn.Module, OpenClip]:
    """A CLIP in fp32 and its family.

    Args: model: a name that open_clip lists, or `hf-hub:ORG/NAME`; folder: a local folder in its stead. pretrained: a
        tag, a weights file, or `hf-hub:ORG/NAME`, of a listed name. meta: on the meta device, no weights read.
    Raises: ConfigError that names the file and the tensor.
    """
    import open_clip

    where = f"student {folder or model}"
    source = _folder(folder) if folder else _repository(model, where) if model.startswith(HUB) else None
    source = source or _listed(model.replace("/", "-"), pretrained, where, meta)
    model_cfg = source.config["model_cfg"]
    _check(model_cfg, where)
    text = model_cfg["text_cfg"]
    weights = None if meta or source.weights is None else source.weights()

    def build():
        options = dict(nonscalar_logit_scale=True, precision="fp32", force_patch_dropout=0.0)
        options |= dict(load_weights=False, pretrained_text=False, device="meta" if meta else "cpu")
        with torch.device(options["device"]), quiet.loading():
            return open_clip.create_model(source.name, force_preprocess_cfg=source.preprocess, **options)

    clip = _make(build, text.get("hf_model_name"), "config.json", source.fetches, where)
    tokenizer = None
    if not meta:
        if weights is not None:
            _load_weights(clip, weights, where)
        repo = None if folder else text.get("hf_tokenizer_name")
        get = lambda: open_clip.get_tokenizer(source.tokenizer)  # noqa: E731
        tokenizer = _make(get, repo, "tokenizer_config.json", source.fetches, where)
    preprocess = dict(clip.visual.preprocess_cfg)
    height, width = open_clip.transform.to_2tuple(clip.visual.image_size)
    if height != width:
        raise ConfigError(f"{where}: images of {height}x{width}, expected square ones")
    return clip, OpenClip(
        where, {"model_cfg": model_cfg, "preprocess_cfg": preprocess}, tokenizer, int(height), int(model_cfg["embed_dim"]),
        int(text.get("context_length", 77)), tuple(preprocess["mean"]), tuple(preprocess["std"]),
    )  # fmt: skip


@dataclass
class _Source:
    """Where a CLIP comes from. name, tokenizer: as open_clip calls them; weights: finds the file, fetches it where it was
    named; None: a random start.
    """

    name: str
    tokenizer: str
    config: dict
    weights: Callable[[], Path] | None
    fetches: bool = False
    preprocess: dict = field(default_factory=dict)


def _folder(folder: Path) -> _Source:
    name = f"local-dir:{folder}"
    return _Source(name, name, _read_config(folder), lambda: find_weights(folder))


def _repository(model: str, where: str) -> _Source:
    repo = model.removeprefix(HUB)
    hint = f": expected an open_clip model; transformers' are read from a folder (hf download {repo} --local-dir FOLDER)"
    snapshot = hub.fetch(repo, (CONFIG_FILE,), where, hint).parent
    return _Source(f"local-dir:{snapshot}", model, _read_config(snapshot), lambda: hub.fetch(repo, WEIGHTS_FILES, where), True)


def _listed(name: str, pretrained: str | None, where: str, meta: bool) -> _Source:
    """A name that open_clip lists, with a tag, a weights file, a repository of the hub, or a random start."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    source = _Source(name, name, {"model_cfg": open_clip.get_model_config(name)}, None)
    tags = {tag: get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)}

    def check_gelu(quick) -> None:
        other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
        if bool(quick) != bool(source.config["model_cfg"].get("quick_gelu")) and other in open_clip.list_models():
            raise ConfigError(f"{where}: the weights {pretrained!r} were trained with the other GELU: expected {other}")

    if pretrained is None:
        return source
    if tag := get_pretrained_cfg(name, pretrained):
        check_gelu(tag.get("quick_gelu"))
        repo, _, file = tag["hf_hub"].rpartition("/")
        names = (str(Path(file).with_suffix(".safetensors")), file) if file else WEIGHTS_FILES
        source.weights = lambda: hub.fetch(repo, names, where)
        source.preprocess, source.fetches = {key: tag[key] for key in PREPROCESS if key in tag}, True
    elif pretrained.startswith(HUB):
        repo = pretrained.removeprefix(HUB)
        if not meta:
            found = _read_config(hub.fetch(repo, (CONFIG_FILE,), where).parent)
            check_gelu(found["model_cfg"].get("quick_gelu"))
            found = found.get("preprocess_cfg", {})
            source.preprocess = {key: found[key] for key in PREPROCESS if key in found}
        source.weights, source.fetches = lambda: hub.fetch(repo, WEIGHTS_FILES, where), True
    elif Path(pretrained).suffix not in WEIGHT_SUFFIXES or not Path(pretrained).is_file():
        raise ConfigError(
            f"student.pretrained: {pretrained!r} is no weights file ({', '.join(WEIGHT_SUFFIXES)}) and no tag of {name}: "
            f"{', '.join(tags) or 'none'}"
        )
    else:
        source.weights = lambda: Path(pretrained)
        for key in PREPROCESS:  # which the file does not say: what all tags of this name agree on
            if len(values := {tag.get(key) for tag in tags.values()}) == 1:
                source.preprocess |= {key: values.pop()}
    return source


def find_weights(folder: Path) -> Path:
    """The weights of a folder, preferred as open_clip prefers them. Raises: ConfigError."""
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.name != HEAD_FILE)
    if not files:
        raise ConfigError(f"{folder}: no weights (expected {WEIGHTS_FILE})")
    preferred = [folder / name for name in WEIGHTS_FILES if folder / name in files]
    if not preferred and len(files) > 1:
        raise ConfigError(f"{folder}: {files[0].name} or {files[1].name}? expected {WEIGHTS_FILE}")
    return (preferred or files)[0]


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ConfigError(f"{path}: no section model_cfg")
    return config


def _check(model_cfg: dict, where: str) -> None:
    """Raise ConfigError for a model that cannot be a student."""
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model_cfg:
            raise ConfigError(f"{where}: model_cfg has no {key}")
    if "multimodal_cfg" in model_cfg:
        raise ConfigError(f"{where}: a CoCa, whose text tower also writes captions; expected a CLIP: two towers alone")
    for section in ("vision_cfg", "text_cfg"):
        if model_cfg[section].get("output_tokens"):
            raise ConfigError(f"{where}: {section}.output_tokens is true; expected a tower that gives its embedding alone")


def _make(make: Callable, repo: str | None, file: str, fetches: bool, where: str):
    """make() without the network; with it, where something of `repo` is missing and the hub was named."""
    try:
        with hub.offline():
            return make()
    except Exception as error:  # of whatever kind: what is wrong is in the user's files
        if repo is None or Path(repo).exists():
            raise ConfigError(f"{where}: {first_line(error)}") from error
        if not fetches:
            message = f"{where}: {repo} is not on this disk ({first_line(error)}): fetch it (hf download {repo})"
            raise ConfigError(message) from error
    hub.reach(repo, file, where)
    try:
        return make()
    except Exception as error:
        raise ConfigError(f"{where}: {HUB}{repo}: {first_line(error)}") from error


def _load_weights(clip: nn.Module, path: Path, where: str) -> None:
    """Load open_clip's weights, or a checkpoint of its training. Raises: ConfigError that names the file and the tensor."""
    from open_clip.factory import load_checkpoint as read_into

    try:
        with quiet.loading():
            read_into(clip, str(path))
    except Exception as error:
        raise ConfigError(f"{where}: {path}: {_wrong(clip, path) or first_line(error)}") from error


def _wrong(clip: nn.Module, path: Path) -> str | None:
    """What a weights file that does not load holds, in words."""
    from open_clip.factory import load_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    try:
        state = load_state_dict(str(path))
    except Exception as error:
        if "TorchScript" in str(error):
            return "a TorchScript archive, as OpenAI published them; expected plain weights: the tag openai has them"
        return f"truncated or damaged, or no file of weights ({first_line(error)})"
    if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        return "expected tensors by name, as open_clip writes them"
    if hasattr(clip, "text"):
        state = convert_to_custom_text_state_dict(state)
    expected = clip.state_dict()
    for name, tensor in expected.items():
        if name in state and state[name].numel() != tensor.numel():
            return f"tensor {name} is {tuple(state[name].shape)}, by the model's configuration {tuple(tensor.shape)}"
    for names, said in ((expected.keys() - state.keys(), "missing"), (state.keys() - expected.keys(), "not this model's")):
        if names:
            return f"tensor {min(names)} is {said}" + (f", as are {len(names) - 1} more" if len(names) > 1 else "")
    return None


def _highest(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.argmax(dim=1)
