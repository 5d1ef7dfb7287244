"""ViLT (arXiv 2102.03334), as transformers has it: one transformer over words and patches.

ViltModel gives its visual tokens in an order that it draws anew each time, and drops patches past `max_image_length`. Here
images are whole squares and the order is the grid's: the token of row r, column c is number r * columns + c. The rest is
ViltModel's own forward; its text is of type 0, token and modality, its picture of modality 1. ViltModel's processor keeps
an image's shape; the student gets a square cut from the middle, as every student of this project.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastsds import quiet
from fastsds.config import ConfigError
from fastsds.crossmodal.model import Family
from fastsds.student.hf import CONFIG_FILE, read_part, statistics
from fastsds.weights import from_folder, open_safetensors


@dataclass
class Vilt(Family):
    """parts: its configuration, image processor and tokenizer, as transformers has them."""

    parts: tuple = ()

    def encode(self, model: nn.Module, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
        out = model(
            input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, pixel_mask=mask[:, :1, None], return_dict=True
        )  # every pixel counts: of pixel_mask nothing is read
        tokens, n = out.last_hidden_state, ids.shape[1]
        return tokens[:, :n], tokens[:, n + 1 :], out.pooler_output  # n: the picture's own first token

    def checkpoint(self, model: nn.Module) -> None:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has the other name
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})

    def save(self, out: Path) -> None:
        *parts, tokenizer = self.parts
        plain = copy.deepcopy(tokenizer)
        plain.backend_tokenizer.no_padding()  # how a call pads and cuts would be saved with it
        plain.backend_tokenizer.no_truncation()
        for part in (*parts, plain):
            part.save_pretrained(out)


def load(folder: Path, meta: bool) -> tuple[nn.Module, Vilt]:
    """The ViltModel of a folder in fp32, of whatever ViLT was saved there, and its family. meta: no weights, no tokenizer.

    Raises: ConfigError that names the file and what is wrong in it.
    """
    import transformers

    where = f"student {folder}"
    with quiet.loading():
        config = read_part(transformers.ViltConfig, folder, CONFIG_FILE)
        processor = read_part(transformers.AutoImageProcessor, folder, "preprocessor_config.json")
        tokenizer = None if meta else read_part(transformers.AutoTokenizer, folder, "tokenizer")
    family = make(config, processor, tokenizer, where)
    if meta:
        with torch.device("meta"):
            model = transformers.ViltModel(config)
    else:
        for file in folder.glob("model*.safetensors"):
            open_safetensors(file)
        model = from_folder(transformers.ViltModel, folder, where, dtype=torch.float32)
        for parameter in model.parameters():  # off the mapped file, which a save may replace
            parameter.data = parameter.data.clone()
    in_order(model)
    return model, family


def make(config, processor, tokenizer, where: str) -> Vilt:
    """The family of a configuration, an image processor and a tokenizer. Raises: ConfigError where they do not fit."""
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or config.num_channels != 3:
        found = f"images of {config.num_channels} channels, image_size {size}, patch_size {patch}"
        raise ConfigError(f"{where}: {CONFIG_FILE}: {found}; expected 3 channels and one number for each size")
    if processor.do_resize:
        size = processor.size.get("shortest_edge") or processor.size.get("height")
    if not size or size % patch:
        raise ConfigError(f"{where}: its image processor makes images of {size}, expected a multiple of the patch, {patch}")
    if abs(processor.rescale_factor * 255 - 1) > 1e-6 or not processor.do_rescale:
        raise ConfigError(f"{where}: preprocessor_config.json rescales by {processor.rescale_factor}, expected 1/255")
    if tokenizer is not None and not tokenizer.is_fast:
        raise ConfigError(f"{where}: its tokenizer is not of the fast kind, which knows where a token lies in the text")
    if tokenizer is not None and set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up
        raise ConfigError(f"{where}: its tokenizer knows no words: tokenizer.json and vocab.txt are missing or empty")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ConfigError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    config.architectures, config.dtype = ["ViltModel"], torch.float32  # what is saved, whatever was read
    return Vilt(
        where, size, (size // patch, size // patch), config.hidden_size, config.max_position_embeddings,
        *statistics(processor), tokenizer, (config, processor, tokenizer),
    )  # fmt: skip


def in_order(model: nn.Module) -> None:
    """Let a ViltModel keep the grid's order, and all patches."""
    model.embeddings.visual_embed = partial(_whole_square, model.embeddings)


def _whole_square(embeddings: nn.Module, pixel_values: torch.Tensor, pixel_mask=None, max_image_length=None):
    """ViltEmbeddings.visual_embed for images of which every pixel counts. Shapes: [n, 3, S, S] -> [n, 1 + patches, h], mask."""
    x = embeddings.patch_embeddings(pixel_values)  # [n, h, rows, columns]
    first, places = embeddings.position_embeddings[:, :1], embeddings.position_embeddings[:, 1:]
    side = embeddings.config.image_size // embeddings.config.patch_size
    places = places.transpose(1, 2).unflatten(2, (side, side))
    if x.shape[2:] != places.shape[2:]:
        places = nn.functional.interpolate(places, size=x.shape[2:], mode="bilinear", align_corners=True)
    x = (x + places).flatten(2).transpose(1, 2)
    x = torch.cat([(embeddings.cls_token + first).expand(len(x), -1, -1), x], dim=1)
    return embeddings.dropout(x), x.new_ones(x.shape[:2], dtype=torch.int64), None
