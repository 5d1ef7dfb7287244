"""Image-text data: what a source gives, what a step takes, and what an evaluation asks."""

import hashlib
from dataclasses import dataclass, field

import torch


def digest(image: bytes, caption: str) -> int:
    """An image as it is stored and its caption, as an int64 that tells the pair from others."""
    found = hashlib.blake2b(image + b"\0" + caption.encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


@dataclass
class Samples:
    """Captioned images. pixels: uint8 [N, 3, S, S]; negatives: one wrong caption an image, or None; digests: int64 [N], or
    None where no bank is asked."""

    pixels: torch.Tensor
    captions: list[str]
    negatives: list[str] | None = None
    digests: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)


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
    text [b, L, D]: the teacher's embeddings of the captions, from a bank; or None.
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
    def student_tokens(self) -> torch.Tensor:
        """What the text tower reads: tokens, then negative_tokens if there are any. Shapes: int64 [b or 2b, L]."""
        return self.tokens if self.negative_tokens is None else torch.cat([self.tokens, self.negative_tokens])
