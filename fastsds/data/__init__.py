"""Image-text data: what a source gives, what a step takes, and what an evaluation asks."""

import hashlib
from dataclasses import dataclass, field, fields

import torch


def digest(image: bytes) -> int:
    """An image as it is stored, as an int64 that tells it from others."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little", signed=True)


def pair_digest(image: int, caption: str) -> int:
    """An image's digest and a caption, as an int64 that tells the pair from others."""
    return digest(image.to_bytes(8, "little", signed=True) + caption.encode())


@dataclass
class Samples:
    """Captioned images.

    Shapes: pixels uint8 [N, 3, S, S]; second uint8 [N, 3, S2, S2], the same images at another size, or None;
    rows int64 [N], the image-caption pairs' numbers in their source; digests int64 [N].
    negatives: one wrong caption an image, or None. damaged: row -> why it cannot be used; its pixels mean nothing.
    """

    pixels: torch.Tensor
    captions: list[str]
    negatives: list[str] | None = None
    digests: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    second: torch.Tensor | None = None
    damaged: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, places: list[int]) -> "Samples":
        """The samples at these places, none of them damaged."""
        picked = {}
        for name in (f.name for f in fields(self) if f.name != "damaged"):
            value = getattr(self, name)
            picked[name] = [value[k] for k in places] if isinstance(value, list) else None if value is None else value[places]
        return Samples(**picked)

    @staticmethod
    def join(parts: list["Samples"]) -> "Samples":
        """Samples one after another, their damage left out."""
        joined = {}
        for name in (f.name for f in fields(Samples) if f.name != "damaged"):
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                joined[name] = None
            else:
                joined[name] = torch.cat(values) if torch.is_tensor(values[0]) else [x for value in values for x in value]
        return Samples(**joined)


class Source:
    """Captioned images that can be read in any order: `len()` images, each with one or more captions.

    A subclass gives `__len__`, `identity` and `load`; with several captions an image also `rows` and `load_rows`. A
    source that can only be read in its own order gives `walk(streams, seed)` instead of `__len__` (see sampler.Walk).
    sequential: its order is random by construction, so nothing shuffles it.
    """

    sequential = False

    def identity(self) -> str:
        """A digest of what the pairs are: equal for equal data, wherever it lies."""
        raise NotImplementedError

    def load(self, ids: torch.Tensor, visits: torch.Tensor, size: int, second: int | None = None) -> Samples:
        """Load images, each with the caption of its visit. Shapes: ids, visits int64 [N].

        Args: size, second: pixels a side. What cannot be used is in the answer's `damaged`, and raises nothing.
        """
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """How many image-caption pairs there are."""
        return len(self)

    def load_rows(self, rows: torch.Tensor, size: int) -> Samples:
        """Load pairs by number. Shapes: rows int64 [N]. As `load`."""
        return self.load(rows, torch.zeros_like(rows), size)


@dataclass
class SwapItems:
    """Winoground-like items: caption c of item n describes image c and not image 1 - c.

    Shapes: pixels uint8 [N, 2, 3, S, S], captions [N] pairs, kind [N].
    """

    pixels: torch.Tensor
    captions: list[tuple[str, str]]
    kind: list[str]
    split: str

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class Batch:
    """One rank's part of one contrastive batch.

    Shapes: ids, visits int64 [b]; pixels uint8 [b, 3, S, S]; tokens, negative_tokens int64 [b, L].
    teacher_captions: what the teacher is told about each image (`captions`, or the control's shuffled ones).
    pixels_teacher: the same images at the teacher's size; None where both sizes are equal or nobody asks.
    targets [b, C, h, w], abar [b]: what the teacher saw of each image, from a bank, and at which alpha-bar; or None.
    text [b, L, D], latents [b, C, h, w]: the teacher's embeddings of the captions, and latents, from a bank; or None.
    """

    ids: torch.Tensor
    visits: torch.Tensor
    pixels: torch.Tensor
    captions: list[str]
    negatives: list[str] | None = None
    tokens: torch.Tensor | None = None
    negative_tokens: torch.Tensor | None = None
    pixels_teacher: torch.Tensor | None = None
    teacher_captions: list[str] = field(default_factory=list)
    targets: torch.Tensor | None = None
    abar: torch.Tensor | None = None
    text: torch.Tensor | None = None
    latents: torch.Tensor | None = None

    def __post_init__(self):
        if not self.teacher_captions:
            self.teacher_captions = self.captions

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, rows: slice) -> "Batch":
        """Some of the samples."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.teacher_captions is self.captions:
            values["teacher_captions"] = []
        return Batch(**{name: value if value is None else value[rows] for name, value in values.items()})

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the student is called with."""
        return self.pixels, self.student_tokens

    @property
    def student_tokens(self) -> torch.Tensor:
        """What the text tower reads: tokens, then negative_tokens if there are any. Shapes: int64 [b or 2b, L]."""
        return self.tokens if self.negative_tokens is None else torch.cat([self.tokens, self.negative_tokens])
