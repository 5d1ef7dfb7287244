"""A cross-modal student: a library's model and the head that answers, behind one forward.

Tokens are int64 with PADDING after a text, so that its mask is in the tensor itself, whatever a tokenizer pads with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastsds.config import ConfigError
from fastsds.student.model import Normalise, at_least_fp32, drop_dropout

PADDING = -1


class CrossModalOutput(NamedTuple):
    """What one forward returns, in fp32 unless the student is fp64.

    Shapes: text [b, Lt, h], special tokens included, meaningless where `CrossModal.mask` is False; visual [b, Lv, h], the
    grid's tokens in order, row by row; pooled [b, h]; logits [b, classes], or [b, choices].
    """

    text: torch.Tensor
    visual: torch.Tensor
    pooled: torch.Tensor
    logits: torch.Tensor


@dataclass
class Family:
    """What differs between the models that a cross-modal student may be. One file for each; vilt.py is one.

    where: how an error calls this student. grid: rows and columns of its visual tokens. length: tokens a text, at most.
    tokenizer: transformers', of the fast kind; None on the meta device.
    """

    where: str
    image_size: int
    grid: tuple[int, int]
    width: int
    length: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenizer: object | None
    loads = "transformers from_pretrained"  # how the library itself reads what is saved

    def encode(self, model: nn.Module, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
        """Token features and the pooled one, through the model's own call: ZeRO-3 gathers parameters around it.

        Shapes: normalised [n, 3, S, S], ids int64 [n, L], mask bool [n, L] -> text [n, L, h], visual [n, rows * columns, h] in
        the grid's order, pooled [n, h].
        """
        raise NotImplementedError

    def checkpoint(self, model: nn.Module) -> None:
        """Keep the inputs of the model's blocks alone, and run each again in the backward pass."""
        raise NotImplementedError

    def save(self, out: Path) -> None:
        """Write everything but the weights into a folder: configuration, image processor and tokenizer files."""
        raise NotImplementedError


class CrossModal(nn.Module):
    """A model of text and picture, and a head: `classes` shared by all examples, or 0 for one score a choice.

    Args: answers: the classes' names, in order, or their number; of none, the head scores choices.

    The head is ViLT's for questions: h -> 2h, LayerNorm, GELU, -> classes. Dropout is off: a step must not depend on how a
    batch is cut. What a recipe hangs on beside `model` and `head` (its projections) is trained and saved with them.
    """

    def __init__(self, model: nn.Module, family: Family, answers: int | Sequence[str]):
        super().__init__()
        self.answers = () if isinstance(answers, int) else tuple(answers)
        self.classes = classes = answers if isinstance(answers, int) else len(self.answers)
        self.model, self.family = model, family
        self.image_size, self.grid, self.width = family.image_size, family.grid, family.width
        h, last = family.width, nn.Linear(2 * family.width, classes or 1, bias=classes > 0)  # a softmax sees no constant
        self.head = nn.Sequential(nn.Linear(h, 2 * h), nn.LayerNorm(2 * h), nn.GELU(), last)
        self._normalise = Normalise(family.image_size, family.mean, family.std)
        drop_dropout(model)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, of: torch.Tensor | None = None) -> CrossModalOutput:
        """Shapes: pixels uint8 [b, 3, S, S], tokens int64 [b, L] -> logits [b, classes]; tokens [b, choices, L] -> logits
        [b, choices], features those of the choice that `of` (int64 [b]) names, or the first.

        Raises: ValueError for shapes that do not fit each other or the head.
        """
        multiple = tokens.ndim == 3
        if tokens.ndim not in (2, 3) or len(tokens) != len(pixels) or tokens.shape[-1] > self.family.length:
            shape = f"[{len(pixels)}, L] or [{len(pixels)}, choices, L], L at most {self.family.length}"
            raise ValueError(f"tokens: {tuple(tokens.shape)}, expected {shape}")
        if multiple == bool(self.classes):
            expected = "[b, choices, L]: its head scores choices" if not multiple else f"[b, L]: it has {self.classes} classes"
            raise ValueError(f"tokens: {tuple(tokens.shape)}, this student expects {expected}")
        if of is not None and (not multiple or of.shape != (len(pixels),)):
            raise ValueError(f"of: {tuple(of.shape)}, expected [{len(pixels)}], beside tokens [b, choices, L]")
        images = self._normalise(pixels, next(self.head.parameters()).dtype)
        flat = tokens.flatten(0, -2)  # [b * choices, L]
        if multiple:
            images = images.repeat_interleave(tokens.shape[1], dim=0)
        mask = self.mask(flat)
        *features, pooled = self.family.encode(self.model, images, flat.where(mask, 0), mask)
        logits = self.head(pooled)
        features.append(pooled)
        if multiple:
            rows = torch.arange(len(pixels), device=tokens.device)
            place = torch.zeros_like(rows) if of is None else of
            features = [x.unflatten(0, tokens.shape[:2])[rows, place] for x in features]
            logits = logits.view(tokens.shape[:2])
        return CrossModalOutput(*(at_least_fp32(x) for x in (*features, logits)))

    def check_answers(self, asked: int | Sequence[str], where: str, hint: str = "") -> None:
        """Raise ConfigError unless the head gives these classes in this order, as far as both have names.

        Args: where, hint: how the error begins and ends.
        """
        numbers = self.classes, asked if isinstance(asked, int) else len(asked)
        if numbers[0] != numbers[1]:
            has, wanted = (f"{n} classes" if n else "one score a choice" for n in numbers)
            raise ConfigError(f"{where}: its head has {has}, the task asks for {wanted}{hint}")
        if self.answers and not isinstance(asked, int) and self.answers != tuple(asked):
            k = next(k for k, (a, b) in enumerate(zip(self.answers, asked, strict=True)) if a != b)
            raise ConfigError(f"{where}: its head's class {k} is {self.answers[k]!r}, the task's {asked[k]!r}{hint}")

    def tokenize(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> torch.Tensor:
        """Token ids, cut to the model's length with the end token kept, PADDING up to the longest of these texts.

        Shapes: [n] strings -> int64 [n, L]; [n] lists of as many strings each -> int64 [n, choices, L].
        """
        texts = list(texts)
        if texts and not isinstance(texts[0], str):
            if len(counts := {len(choices) for choices in texts}) != 1:
                raise ValueError(f"choices: {sorted(counts)} a text, expected the same number for all")
            return self.tokenize([choice for choices in texts for choice in choices]).view(len(texts), counts.pop(), -1)
        read = self._read(texts, return_tensors="pt")
        return read.input_ids.where(read.attention_mask.bool(), PADDING)

    @staticmethod
    def mask(tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens are there. Shapes: int64 [..., L] -> bool [..., L]."""
        return tokens != PADDING

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int] | None]]:
        """Where each token of `tokenize(texts)` lies in its text: text[first:last]; None for special tokens and padding."""
        read = self._read(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True)
        rows = zip(read.offset_mapping, read.special_tokens_mask, strict=True)
        return [[None if special else tuple(at) for at, special in zip(*row, strict=True)] for row in rows]

    def _read(self, texts, **options):
        # one padding and one truncation everywhere: a fast tokenizer keeps them, and threads share it
        return self.family.tokenizer(texts, padding=True, truncation=True, max_length=self.family.length, **options)
