"""Students in a transformers folder: CLIPModel and SiglipModel.

transformers' image processors and ours agree for CLIP (shortest side, then the centre); SigLIP's squash the whole image to
a square, ours crops it, as for every student.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastsds import quiet
from fastsds.config import ConfigError
from fastsds.student.model import Family
from fastsds.weights import first_line, from_folder, open_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SCALARS = {"clip": (), "siglip": (1,)}  # the shape of logit_scale, by model_type


@dataclass
class Transformers(Family):
    """A CLIPModel or SiglipModel. library: its configuration, image processor and tokenizer, as transformers has them.

    Captions are padded to the text tower's length and go without an attention mask, as both were trained: CLIP's text
    tower is causal and pools the end token, SigLIP's sees the padding and pools the last position.
    """

    library: tuple = ()
    loads = "transformers from_pretrained"

    def encode_image(self, clip: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return clip.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

    def encode_text(self, clip: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return clip.get_text_features(input_ids=tokens, return_dict=True).pooler_output

    def pooling(self, clip: nn.Module):
        text = clip.config.text_config
        if clip.config.model_type == "siglip":
            return text.vocab_size, None, None
        end = self.library[2].eos_token_id
        if text.eos_token_id == 2:  # as transformers reads a configuration from before its pull request 24773
            return text.vocab_size, end, lambda tokens: tokens.argmax(dim=1)
        return text.vocab_size, end, lambda tokens: (tokens == text.eos_token_id).int().argmax(dim=1)

    def checkpoint(self, clip: nn.Module) -> None:
        enable = getattr(clip, "activation_checkpointing_enable", None)  # transformers 5.17 has the other name
        (enable or clip.gradient_checkpointing_enable)({"use_reentrant": False})

    def save(self, out: Path) -> None:
        for part in self.library:
            part.save_pretrained(out)


def load(folder: Path, meta: bool) -> tuple[nn.Module, Transformers]:
    """The CLIP of a folder in fp32 and its family. meta: on the meta device, no weights read.

    Raises: ConfigError that names the file and the tensor.
    """
    import transformers

    where = f"student {folder}"
    kind = read_json(folder / CONFIG_FILE).get("model_type")
    if kind not in SCALARS:
        raise ConfigError(f"{folder / CONFIG_FILE}: model_type is {kind!r}; expected clip (CLIPModel) or siglip (SiglipModel)")
    model = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
    with quiet.loading():
        config = read_part(model.config_class, folder, CONFIG_FILE)
        processor = read_part(transformers.AutoImageProcessor, folder, "preprocessor_config.json")
        tokenizer = None if meta else read_part(transformers.AutoTokenizer, folder, "tokenizer")
    if meta:
        with torch.device("meta"):
            clip = model(config)
    else:
        for file in folder.glob("*.safetensors"):
            open_safetensors(file)
        clip = from_folder(model, folder, where, dtype=torch.float32)
    config = clip.config
    for parameter in clip.parameters():  # off the mapped file, which a save may replace
        parameter.data = parameter.data.clone()
    clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
    length = config.text_config.max_position_embeddings

    def tokenize(captions: list[str]) -> torch.Tensor:
        options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return tokenizer(captions, **options).input_ids

    family = Transformers(
        where, read_json(folder / CONFIG_FILE), None if meta else tokenize, config.vision_config.image_size,
        config.projection_dim if kind == "clip" else config.vision_config.hidden_size, length, *statistics(processor),
        SCALARS[kind], (config, processor, tokenizer),
    )  # fmt: skip
    _check(config, processor, where)
    return clip, family


def read_part(kind, folder: Path, what: str):
    """One part of a folder as transformers reads it. Raises: ConfigError."""
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        package = "sentencepiece" if "sentencepiece" in str(error).lower() else first_line(error)
        raise ConfigError(f"{folder}: its {what} needs a package that is not installed: {package}") from error
    except Exception as error:
        raise ConfigError(f"{folder}: {what}: {first_line(error)}") from error


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def statistics(processor) -> tuple[tuple, tuple]:
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(processor.image_mean), tuple(processor.image_std)


def _check(config, processor, where: str) -> None:
    """Raise ConfigError for images that the student would not get as its processor makes them."""
    size, given = config.vision_config.image_size, processor.crop_size if processor.do_center_crop else processor.size
    sides = {given.get(key) for key in ("height", "width", "shortest_edge") if given.get(key) is not None}
    if sides != {size}:
        raise ConfigError(f"{where}: its image processor makes images of {sorted(sides)}, config.json expects {size}x{size}")
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ConfigError(f"{where}: vision_use_head is false in config.json; expected an image tower with its pooling head")
    if config.vision_config.num_channels != 3:
        raise ConfigError(f"{where}: images of {config.vision_config.num_channels} channels, expected 3")
    if abs(processor.rescale_factor * 255 - 1) > 1e-6 or not processor.do_rescale:
        raise ConfigError(f"{where}: preprocessor_config.json rescales by {processor.rescale_factor}, expected 1/255")
