"""The embedded world's scenes: two coloured shapes in one of four relations, rendered at 32x32.

A scene is fully given by (seed, sample id, visit): every choice is a counter-based draw, so any sample can be
rendered alone, in any order, on any rank. 28 unordered colour pairs x 15 unordered shape pairs give 420 content
classes; 336 are for training, 42 for choosing settings (`dev`), 42 for the figures that are reported (`test`).
"""

from dataclasses import dataclass
from itertools import combinations

import torch

from fastsds.data import Samples, Source, SwapItems, digest, pair_digest
from fastsds.ops import Noise, Purpose, draw

SIZE = 32
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.62, 0.12, 0.78),
    "cyan": (0.15, 0.85, 0.90),
    "orange": (1.00, 0.55, 0.05),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a {0} {1} a {2}", "the {0} is {1} the {2}", "there is a {0} {1} a {2}")
KINDS = ("object", "colour", "shape")
CONTENTS = tuple(
    (colours, shapes) for colours in combinations(range(8), 2) for shapes in combinations(range(6), 2)
)
CARD = 7.5  # pixels from the middle of a card to its edge: no shape reaches further
CHUNK = 32  # contents are distinct within aligned runs of this many samples
_RENDERED, _PIXELS, _SPLITS, _ITEMS = (draw(Purpose.RENDER, visit) for visit in range(4))
_SPLIT_IDS = {"train": 0, "seen": 1, "dev": 2, "test": 3}


def _permutation(seed: int, purpose: int, rows: torch.Tensor, n: int) -> torch.Tensor:
    """Permutations of range(n), one a row id. Shapes: rows [R] -> [R, n]."""
    return Noise(seed, purpose, rows).uniform(n).argsort(dim=1, stable=True)


def contents(split: str) -> torch.Tensor:
    """Indices into CONTENTS of a split: `train` and `seen` share 336, `dev` and `test` hold 42 each."""
    order = _permutation(0, _SPLITS, torch.zeros(1, dtype=torch.long), len(CONTENTS))[0]
    bounds = {"train": (0, 336), "seen": (0, 336), "dev": (336, 378), "test": (378, 420)}
    if split not in bounds:
        raise ValueError(f"split {split!r}: expected one of {', '.join(bounds)}")
    first, last = bounds[split]
    return order[first:last]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes, column-wise. colour, shape: [N, 2] (subject, then other); relation, template: [N]."""

    colour: torch.Tensor
    shape: torch.Tensor
    relation: torch.Tensor
    template: torch.Tensor

    def captions(self) -> list[str]:
        names = list(COLOURS)
        rows = zip(
            self.colour.tolist(), self.shape.tolist(), self.relation.tolist(), self.template.tolist(), strict=True
        )
        return [
            TEMPLATES[t].format(f"{names[c[0]]} {SHAPES[s[0]]}", RELATIONS[r], f"{names[c[1]]} {SHAPES[s[1]]}")
            for c, s, r, t in rows
        ]

    def layout(self) -> torch.Tensor:
        """What the picture shows, however it is said ("a left of b", "b right of a"): [N, 5].

        Colours of the left (upper) and right (lower) object, their shapes, and the axis.
        """
        upright = (self.relation % 2 == 0)[:, None]
        colour = torch.where(upright, self.colour, self.colour.flip(1))
        shape = torch.where(upright, self.shape, self.shape.flip(1))
        return torch.cat([colour, shape, self.relation[:, None] // 2], dim=1)

    def swapped(self, kind: str) -> "Scenes":
        """The scene whose caption has the same words with objects, colours or shapes exchanged."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
        colour = self.colour.flip(1) if kind in ("object", "colour") else self.colour
        shape = self.shape.flip(1) if kind in ("object", "shape") else self.shape
        return Scenes(colour, shape, self.relation, self.template)


def draw_scenes(content: torch.Tensor, u: torch.Tensor) -> Scenes:
    """Scenes with given contents from uniforms. Shapes: content [N], u [N, >=4]."""
    table = torch.tensor([list(c) + list(s) for c, s in CONTENTS])[content]  # [N, 4]
    colour, shape = table[:, :2], table[:, 2:]
    flip_colour, flip_shape = u[:, 0] <= 0.5, u[:, 1] <= 0.5
    return Scenes(
        torch.where(flip_colour[:, None], colour.flip(1), colour),
        torch.where(flip_shape[:, None], shape.flip(1), shape),
        (u[:, 2] * len(RELATIONS)).long().clamp(max=len(RELATIONS) - 1),
        (u[:, 3] * len(TEMPLATES)).long().clamp(max=len(TEMPLATES) - 1),
    )


def _distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels (approximate at corners). Shapes: shape [N], x, y [N, S, S], r [N, 1, 1]."""
    ax, ay, radius = x.abs(), y.abs(), (x * x + y * y).sqrt()
    thick = 0.36 * r
    kinds = torch.stack(
        [
            radius - r,
            torch.maximum(ax, ay) - 0.86 * r,
            torch.maximum(ax * 0.866 - y * 0.5, y) - 0.62 * r,  # y points down: apex at the top
            (ax + ay) * 0.7071 - 0.82 * r,
            torch.minimum(torch.maximum(ax - r, ay - thick), torch.maximum(ay - r, ax - thick)),
            (radius - 0.78 * r).abs() - 0.26 * r,
        ]
    )
    return kinds[shape, torch.arange(len(shape))]


def render(scenes: Scenes, seed: int, ids: torch.Tensor, covered: torch.Tensor | None = None) -> torch.Tensor:
    """Render scenes with jitter in place, size, background and pixel noise.

    Shapes: ids [N] -> uint8 [N, 3, 32, 32]. The same (seed, id) gives the same jitter whatever the scene holds.
    Args: covered: int64 [N], the object (0 or 1) that a grey card as large as any shape is painted in place of, below the
        other object; -1: none.
    """
    u = Noise(seed, _RENDERED, ids).uniform(16)[:, 4:]
    n, relation = len(ids), scenes.relation
    along = torch.where((relation % 2 == 0)[:, None], torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])) * 6.5
    across = torch.zeros(n, 2)
    horizontal = (relation < 2)[:, None]
    centre_x = 15.5 + torch.where(horizontal, along, across) + (u[:, 0:2] - 0.5) * torch.where(horizontal, 2.5, 7.0)
    centre_y = 15.5 + torch.where(horizontal, across, along) + (u[:, 2:4] - 0.5) * torch.where(horizontal, 7.0, 2.5)
    r = 4.3 + 1.5 * u[:, 4:6]
    image = (0.04 + 0.24 * u[:, 6:9])[:, :, None, None].expand(n, 3, SIZE, SIZE)
    grid = torch.arange(SIZE, dtype=torch.float32)
    x = grid[None, None, None, :] - centre_x[:, :, None, None]  # [N, 2, 1, S]
    y = grid[None, None, :, None] - centre_y[:, :, None, None]
    if covered is not None:
        card = torch.maximum(x.abs(), y.abs()).le(CARD)  # [N, 2, S, S]
        image = image.masked_fill((card & (covered[:, None] == torch.arange(2))[:, :, None, None]).any(1, keepdim=True), 0.5)
    for k in range(2):
        distance = _distance(scenes.shape[:, k], *torch.broadcast_tensors(x[:, k], y[:, k]), r[:, k, None, None])
        inside = (0.5 - distance).clamp(0, 1)
        if covered is not None:
            inside = inside.masked_fill((covered == k)[:, None, None], 0)
        colour = torch.tensor(list(COLOURS.values()))[scenes.colour[:, k]]
        image = torch.lerp(image, colour[:, :, None, None].expand_as(image), inside[:, None])
    image = image + 0.03 * Noise(seed, _PIXELS, ids).normal((3, SIZE, SIZE))
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def resize(pixels: torch.Tensor, size: int | None) -> torch.Tensor:
    if size in (None, SIZE):
        return pixels
    resized = torch.nn.functional.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


class WorldSource(Source):
    """Captioned scenes of one split: an endless, seekable stream, or the first `length` of it as a data set.

    Sample i's content is drawn so that contents are distinct within aligned runs of 32 samples, as no real
    batch holds one image twice; otherwise all choices are independent. `sequential`: the endless order is random by
    construction, so a sampler need not shuffle; a data set that is seen again and again is shuffled.
    """

    ENDLESS = 1 << 20

    def __init__(self, split: str = "train", seed: int = 0, length: int = ENDLESS):
        self.split, self.seed, self.length = split, seed, length
        self.sequential = length >= self.ENDLESS
        self.contents = contents(split)

    def __len__(self) -> int:
        return self.length

    def identity(self) -> str:
        """What the pairs are."""
        return f"world {self.split}, seed {self.seed}, {self.length} scenes"

    def scenes(self, ids: torch.Tensor) -> Scenes:
        chunks, inverse = torch.unique(ids // CHUNK, return_inverse=True)
        purpose = draw(Purpose.ORDER, _SPLIT_IDS[self.split])
        order = _permutation(self.seed, purpose, chunks, len(self.contents))
        content = self.contents[order[inverse, ids % CHUNK]]
        return draw_scenes(content, Noise(self.seed, _RENDERED, ids).uniform(16))

    def load(
        self, ids: torch.Tensor, visits: torch.Tensor | None = None, size: int | None = None, second: int | None = None
    ) -> Samples:
        """Render samples. Shapes: ids [N] -> pixels uint8 [N, 3, size, size]; negatives: colours exchanged."""
        scenes = self.scenes(ids)
        kinds = [scenes.swapped(kind).captions() for kind in KINDS]
        negatives = [kinds[i % 3][row] for row, i in enumerate(ids.tolist())]
        pixels, captions = render(scenes, self.seed, ids), scenes.captions()
        digests = [pair_digest(digest(image.numpy().tobytes()), said) for image, said in zip(pixels, captions, strict=True)]
        other = None if second is None else resize(pixels, second)
        return Samples(resize(pixels, size), captions, negatives, torch.tensor(digests), ids, other)


def swap_items(split: str, per_kind: int = 300, seed: int = 0) -> SwapItems:
    """Winoground-like items: two scenes and two captions with the same words, `per_kind` of each kind.

    Shapes: pixels uint8 [3 * per_kind, 2, 3, 32, 32]. Both images of an item have jitter of their own.
    """
    n = 3 * per_kind
    ids = (1 << 40) + (_SPLIT_IDS[split] << 32) + torch.arange(n)
    pool = contents(split)
    u = Noise(seed, _ITEMS, ids).uniform(8)
    content = pool[(u[:, 4] * len(pool)).long().clamp(max=len(pool) - 1)]
    first = draw_scenes(content, u)
    kind = [KINDS[i // per_kind] for i in range(n)]
    swapped = [first.swapped(k) for k in KINDS]
    part = torch.arange(n) // per_kind
    columns = {name: torch.stack([getattr(s, name) for s in swapped]) for name in ("colour", "shape")}
    rows = torch.arange(n)
    second = Scenes(columns["colour"][part, rows], columns["shape"][part, rows], first.relation, first.template)
    pixels = torch.stack([render(first, seed, 2 * ids), render(second, seed, 2 * ids + 1)], dim=1)
    return SwapItems(pixels, list(zip(first.captions(), second.captions(), strict=True)), kind, split)


def retrieval_set(split: str, n: int = 100, seed: int = 0) -> Samples:
    """n captioned scenes with n distinct meanings, for recall@1 both ways."""
    pool = WorldSource(split, seed)
    ids = (1 << 30) + (_SPLIT_IDS[split] << 24) + torch.arange(4 * n)
    scenes, rows = pool.scenes(ids), {}
    for row, key in enumerate(map(tuple, scenes.layout().tolist())):
        rows.setdefault(key, row)
    if len(rows) < n:
        raise ValueError(f"split {split!r} gave {len(rows)} distinct meanings, expected {n}")
    return pool.load(ids[torch.tensor(list(rows.values())[:n])])
