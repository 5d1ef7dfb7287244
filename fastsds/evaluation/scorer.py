"""What gives a score to images and captions. Anything with `score` serves; what else it has makes it faster.

    score(images, captions) -> [captions, images]         higher is better, and a pair's score depends on that pair alone
    encode_images(images), encode_texts(texts) -> [n, d]  of unit length: each distinct image and text is encoded once
    score_items(items) -> list of [captions, images]      several items at a time
    expect(images)                                        these will be asked for next: decode them already

`ClipScorer` is the one for every student, also while an engine trains it.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from fastsds.evaluation.suite import ImageRef, pixels
from fastsds.student import Student

BATCH, WORKERS = 64, 4


class Scorer(Protocol):
    """Scores images against captions.

    name: how results call it. settings: what its scores depend on, of JSON's kinds: other settings are other results.
    May have: encode_images and encode_texts; score_items; expect; batch: images, texts or items of one call.
    """

    name: str
    settings: dict[str, Any]

    def score(self, images: Sequence[ImageRef], captions: Sequence[str]):
        """Shapes: -> array or tensor [captions, images]."""


class ClipScorer:
    """Cosines of a student's features.

    Args:
        model: a `Student`, or the engine around one, which every rank then calls equally often.
        autocast: the dtype in which the towers compute; None: their own (an engine has its recipe's precision).
        batch: images, or texts, of one forward. workers: threads that decode.
    """

    def __init__(
        self, model, name: str = "clip", autocast: torch.dtype | None = None, batch: int = BATCH, workers: int = WORKERS
    ):
        self.student = model if isinstance(model, Student) else model.module
        self.device = next(model.parameters()).device if model is self.student else model.device
        self.model, self.name, self.autocast, self.batch = model, name, autocast, batch
        self._pool, self._decoding = ThreadPoolExecutor(workers), {}
        self._digest: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The weights' digest (None of an engine's, which change) and the dtype of autocast."""
        if self._digest is None and self.model is self.student:
            self._digest = weights_digest(self.student)
        return {"weights": self._digest, "autocast": self.autocast and str(self.autocast).removeprefix("torch.")}

    def expect(self, images: Sequence[ImageRef]) -> None:
        """Begin to decode images that are asked for next."""
        for ref in images:
            if ref not in self._decoding:
                self._decoding[ref] = self._pool.submit(pixels, ref, self.student.image_size)

    def encode_images(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Shapes: -> fp32 [n, d], of unit length. Raises: ConfigError for an image that cannot be read."""
        return self._encoded(images, self._encode_images)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Shapes: -> fp32 [n, d], of unit length."""
        return self._encoded(texts, lambda part: self._forward(None, self.student.tokenize(list(part))).text)

    def score(self, images: Sequence[ImageRef], captions: Sequence[str]) -> torch.Tensor:
        """Shapes: -> float64 [captions, images]."""
        texts, images = self.encode_texts(captions).double(), self.encode_images(images).double()
        return (texts[:, None] * images).sum(-1)  # equal texts have equal scores, to the bit

    def _encoded(self, asked: Sequence, encode) -> torch.Tensor:
        return torch.cat([encode(asked[k : k + self.batch]).float().cpu() for k in range(0, len(asked), self.batch)])

    def _encode_images(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Encode, and only then say that an image could not be read: ranks that wait for this call get it."""
        self.expect(images)
        found = [self._decoding[ref] for ref in images]
        for ref in set(images):
            del self._decoding[ref]
        side = self.student.image_size
        wrong = [future.exception() for future in found if future.exception() is not None]
        blank = torch.zeros(3, side, side, dtype=torch.uint8)
        batch = torch.stack([blank if future.exception() else future.result() for future in found])
        features = self._forward(batch, None).image
        if wrong:
            raise wrong[0]
        return features

    @torch.no_grad()
    def _forward(self, images: torch.Tensor | None, tokens: torch.Tensor | None):
        cast = contextlib.nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with cast:
            return self.model(*(x if x is None else x.to(self.device) for x in (images, tokens)))


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's weights and their dtypes."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
