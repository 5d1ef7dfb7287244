"""An export is done when the library it is for, reading the folder alone, gives the student's features."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastsds import hub
from fastsds.config import ConfigError
from fastsds.student import Student

TOLERANCE = 1e-5  # of features of unit length, and of every cosine between them
CAPTIONS = (
    "a red ring", "a photograph of a dog left of a cat", "word " * 200, "naïve 雪 \N{SNOWMAN}", "It's 2 o'clock, isn't it?",
    "A  PHOTO\tof\na cat!!!", "",
)  # fmt: skip


class Answer(NamedTuple):
    """Shapes: image [B, d], text [N, d], of unit length; logit_scale 0-dim, exponentiated."""

    image: torch.Tensor
    text: torch.Tensor
    logit_scale: torch.Tensor


def images(size: int) -> torch.Tensor:
    """Two smooth images and two of noise, the same each time. uint8 [4, 3, S, S]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return torch.cat([smooth, torch.rand(2, 3, size, size, generator=generator)]).mul(255).round().to(torch.uint8)


@torch.no_grad()
def of_student(student: Student) -> Answer:
    out = student.eval()(images(student.image_size), student.tokenize(list(CAPTIONS)))
    return Answer(out.image, out.text, out.logit_scale)


@torch.no_grad()
def of_open_clip(folder: Path, size: int) -> Answer:
    """What plain open_clip says, as its users load it, with the network off."""
    import open_clip

    name = f"local-dir:{folder}"
    with hub.offline():
        model, preprocess = open_clip.create_model_from_pretrained(name)
        tokens = open_clip.get_tokenizer(name)(list(CAPTIONS))
    pixels = torch.stack([preprocess(image) for image in _pictures(size)])
    out = model.eval()(pixels, tokens)
    return Answer(*out[:3])


@torch.no_grad()
def of_transformers(folder: Path, size: int) -> Answer:
    """What plain transformers says, as its users load it, with the network off."""
    from transformers import AutoModel, AutoProcessor

    with hub.offline():
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=_pictures(size), text=list(CAPTIONS), return_tensors="pt", padding="max_length", truncation=True
    )
    if model.config.model_type == "siglip":  # trained without one, whatever its tokenizer gives
        inputs.pop("attention_mask", None)
    out = model(**inputs)
    return Answer(F.normalize(out.image_embeds, dim=-1), F.normalize(out.text_embeds, dim=-1), model.logit_scale.exp())


def compare(ours: Answer, theirs: Answer, what: str) -> float:
    """The largest difference of features and of cosines. Raises: ConfigError past TOLERANCE, which names where."""
    worst = 0.0
    for name in ("image", "text"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a.shape != b.shape:
            raise ConfigError(f"{what}: {name} features {tuple(b.shape)}, the student's are {tuple(a.shape)}")
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ("image", "text")}
    pairs["image-text cosine"] = tuple(answer.image @ answer.text.T for answer in (ours, theirs))
    pairs["logit scale, relative"] = (torch.ones(()), theirs.logit_scale.reshape(()) / ours.logit_scale)
    for name, (a, b) in pairs.items():
        difference = float((a.double() - b.double()).abs().max())
        if not difference <= TOLERANCE:  # also where it is not a number
            raise ConfigError(f"{what}: {name} differs from the student's by {difference:.2g}; expected at most {TOLERANCE}")
        worst = max(worst, difference)
    return worst


def _pictures(size: int) -> list:
    from PIL import Image

    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images(size)]
