"""What CLIP says of every training example, asked once: the targets of CLIP-TD on disk.

    FOLDER/index.json           what they are of: CLIP, task and examples, the student's tokens, how tokens are chosen
    FOLDER/shard_00007...       text [K, d], visual [K, d] fp16; text_index, visual_index [K] int64; probability fp32;
                                candidates [2], pair int64 (a digest of image and text)

They depend on no weight of the student, so they serve every epoch, seed and arm that chooses alike. A text is the one whose
tokens the student's features are of: with choices, that of the right one. K is a shard's largest.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fastsds.config import ConfigError
from fastsds.crossmodal import CrossModal
from fastsds.data import Samples, Source
from fastsds.data.tasks import Example, Task
from fastsds.progress import watched
from fastsds.recipes import clip_td
from fastsds.recipes.clip_td import TeacherTargets
from fastsds.recipes.clip_tokens import ClipTokens, tokenizer_digest
from fastsds.recipes.head import weights_digest
from fastsds.teacher.shards import Shards, fill, rows_a_shard

CHUNK = 64  # examples a call of CLIP
COUNTED = 1000  # texts a call of the tokenizer
TEXTS = 50_000  # prompts whose features are kept
SELECTIONS = ("all", "pooled", "targeted")


@dataclass(frozen=True)
class Selection:
    """Which tokens are distilled. select: "all"; "targeted": the k, or as few as reach `mass`, most relevant of each side;
    "pooled": the pooled features instead of tokens. Raises: ConfigError where these do not fit each other.
    """

    select: str = "targeted"
    k: int | None = None
    mass: float | None = None

    def __post_init__(self):
        if self.select not in SELECTIONS:
            raise ConfigError(f"select: {self.select!r}, expected {', '.join(SELECTIONS)}")
        if sum(value is not None for value in (self.k, self.mass)) != (self.select == "targeted"):
            expected = "one of k and mass" if self.select == "targeted" else "neither k nor mass"
            raise ConfigError(f"select: {self.select}, k {self.k}, mass {self.mass}; expected {expected}")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"k: {self.k}, expected at least 1")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ConfigError(f"mass: {self.mass}, expected a number in (0, 1]")


class TargetCache:
    """The targets of some examples in a folder: `build` makes what is missing, `read` gives them to training.

    Args: examples: those that are trained on, in order; row k is of example k, as in `task.source(examples)`.
    Raises: ConfigError if the folder holds targets of anything else.
    """

    def __init__(
        self, folder: Path, task: Task, examples: Sequence[Example], teacher: ClipTokens, student: CrossModal,
        selection: Selection,
    ):  # fmt: skip
        self.folder, self.task, self.examples = Path(folder), task, examples
        self.teacher, self.student, self.selection = teacher, student, selection
        self.about = {
            "teacher": weights_digest(teacher.clip), "teacher tokenizer": teacher.tokenizer_digest(), "width": teacher.width,
            "task": task.name, "examples": examples_digest(task, examples),
            "student tokenizer": tokenizer_digest(student.family.tokenizer), "student length": student.family.length,
            "student grid": list(student.grid), **asdict(selection),
        }  # fmt: skip
        most = 2 * (1 if selection.select == "pooled" else selection.k or 0) or student.family.length + math.prod(student.grid)
        self.a_row = most * (2 * teacher.width + 8)  # bytes, at most
        self.size = rows_a_shard(self.a_row, CHUNK, len(examples))
        self.shards = Shards.plan(self.folder, self.about, len(examples), self.size)
        self._shared: tuple[Sequence[str] | None, torch.Tensor | None] = (None, None)
        self._whole = False
        self._texts: dict[str, torch.Tensor] = {}

    def build(self, workers: int = 0, rank: int = 0, world: int = 1) -> None:
        """Ask CLIP about every example that is not there yet; several processes share the work, a stopped one goes on.

        An image that cannot be read keeps its place: training passes over it. Args: workers: threads that decode.
        Raises: ConfigError for too little disk, or the first example with fewer tokens than k.
        """
        needed = self.a_row * sum(len(self.shards.span(shard)) for shard in self.shards.missing())
        free = shutil.disk_usage(next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())).free
        if needed > free:
            raise ConfigError(f"{self.folder}: {free / 2**20:,.0f} MiB free, its targets need up to {needed / 2**20:,.0f}")
        self._check_k()
        self.shards = Shards.create(self.folder, self.about, len(self.examples), self.size)
        source = self.task.source(self.examples, workers)
        fill(self.shards, partial(self._ask, source), CHUNK, "CLIP's targets", rank, world, join=_joined)

    def read(self, ids: torch.Tensor, visits: torch.Tensor, samples: Samples) -> TeacherTargets:
        """The targets of samples of `task.source(examples)`. Any number of ranks may read.

        Raises: ConfigError where the folder is not whole or damaged, or an image or a text is not the one CLIP was asked about.
        """
        if not self._whole and (missing := self.shards.missing()):
            raise ConfigError(f"{self.folder}: {len(missing)} of {len(self.shards)} shards are missing: build it to its end")
        self._whole, rows = True, samples.rows  # a shard that is there stays
        if other := (self.shards.read("pair", rows) != samples.digests).nonzero().flatten().tolist():
            example = self.examples[int(rows[other[0]])]
            raise ConfigError(f"{self.folder}: {example.id} has another image or text than CLIP was asked about; build it anew")
        order = (rows // self.size).sort(stable=True).indices  # a shard's together: its K is its own
        parts = rows[order].split((rows // self.size).unique(return_counts=True)[1].tolist())
        back = order.argsort()
        return TeacherTargets(*(_joined([self.shards.read(name, x) for x in parts])[back] for name in TeacherTargets._fields))

    def _check_k(self) -> None:
        """Raise a ConfigError for the first example, of those that are still to be asked about, of which the student has fewer
        than k words or patches: before a folder is begun with that k, and not hours later. CLIP may have still fewer: `_ask`.
        """
        if (k := self.selection.k) is None:
            return
        rows = [row for shard in self.shards.missing() for row in self.shards.span(shard)]
        patches = math.prod(self.student.grid)
        for first in watched(range(0, len(rows), COUNTED), f"counting words, {COUNTED:,} texts at a time"):
            examples = [self.examples[row] for row in rows[first : first + COUNTED]]
            said = [sum(map(bool, spans)) for spans in self.student.spans([_asked(e) for e in examples])]
            for e, words in zip(examples, said, strict=True):
                for side, there in (("text", words), ("visual", patches)):
                    if there < k:
                        raise clip_td.too_few(f"{e.id}, {side}", k, there)

    def _ask(self, source: Source, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows of the cache. Shapes: int64 [n]."""
        if int(rows[0]) % self.size == 0:  # the same bits whoever fills a shard, and whatever came before it: a text's features
            self._texts.clear()  # depend on the batch that it is encoded in, in the last ones
        examples = [self.examples[row] for row in rows.tolist()]
        samples = source.load_rows(rows, self.teacher.image_size)
        texts = [_asked(e) for e in examples]
        place = self.teacher.device
        found = self.teacher(samples.pixels.to(place), self.teacher.tokenize(texts).to(place))
        self._texts.update(zip(texts, F.normalize(found.pooled_text, dim=-1), strict=True))
        if self.selection.select == "pooled":
            text, visual = found.pooled_text[:, None], found.pooled_image[:, None]
            said = torch.ones(len(rows), 1, dtype=torch.bool, device=place)
        else:
            spans = (of.spans(texts) for of in (self.student, self.teacher))
            text, said = clip_td.align_text(*spans, found.text)
            visual = clip_td.align_patches(found.visual, self.teacher.grid, self.student.grid)
        seen = torch.ones(visual.shape[:2], dtype=torch.bool, device=place)
        answer = {"probability": self._probability(examples, found.pooled_image), "pair": samples.digests}
        how = {"k": self.selection.k, "mass": self.selection.mass, "scale": float(self.teacher.scale)}
        sides = ("text", text, said, found.pooled_image), ("visual", visual, seen, found.pooled_text)
        for side, x, there, of in sides:
            index = clip_td.choose(clip_td.relevance(x, of), there, [f"{e.id}, {side}" for e in examples], **how)
            chosen = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
            answer[side] = clip_td.unit_mean_square(chosen).where((index >= 0)[..., None], 0.0).half()
            answer[f"{side}_index"] = index
        return {**answer, "candidates": torch.stack([said.sum(1), seen.sum(1)], 1)}

    def _probability(self, examples: Sequence[Example], image: torch.Tensor) -> torch.Tensor:
        """p_T of the right answers. Shapes: image [n, d] -> fp32 [n]."""
        prompts, image = [self.task.prompts(e) for e in examples], F.normalize(image, dim=-1)
        if all(of is prompts[0] for of in prompts):  # the same for all, and perhaps for the next ones
            if self._shared[0] is not prompts[0]:
                self._shared = prompts[0], self.teacher.encode_texts(list(prompts[0]))
            logits = self.teacher.scale * image @ self._shared[1].T
        else:
            features = self._encoded([text for of in prompts for text in of]).unflatten(0, (len(prompts), -1))
            logits = self.teacher.scale * torch.einsum("nd,ncd->nc", image, features)
        return clip_td.answer_probability(logits, clip_td.labels_of(examples, logits.shape[1]).to(logits.device)).float()

    def _encoded(self, texts: Sequence[str]) -> torch.Tensor:
        """CLIP's text features, in a shard each text's made once: tasks ask of the same ones again. Shapes: [n, d]."""
        if len(self._texts) > TEXTS:
            self._texts.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            self._texts.update(zip(new, self.teacher.encode_texts(new), strict=True))
        return torch.stack([self._texts[text] for text in texts])


def _asked(example: Example) -> str:
    """The text whose tokens are distilled: with choices, that of the right one."""
    return clip_td.reads(example)[example.target if example.choices else 0]


def captioned(task: Task, examples: Sequence[Example], workers: int = 0) -> Source:
    """The images of examples with a text that is true of them (`Task.caption`): the pairs of a contrastive adaptation.

    Raises: ConfigError where no example has one.
    """
    pairs = [replace(e, text=said) for e in examples if (said := task.caption(e)) is not None]
    if not pairs:
        raise ConfigError(f"task {task.name}: none of {len(examples)} examples has a text that is true of its image")
    return task.source(pairs, workers)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One after another, each [n, K, ...] filled up to the largest K: features with 0, indices with -1."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    most, value = max(part.shape[1] for part in parts), 0 if parts[0].is_floating_point() else -1
    return torch.cat([F.pad(part, (0, 0) * (part.ndim - 2) + (0, most - part.shape[1]), value=value) for part in parts])


def examples_digest(task: Task, examples: Sequence[Example]) -> str:
    """Of all that the targets are made from but pixels, which each row answers for itself."""
    found, shared = hashlib.blake2b(repr((task.source(examples).identity(), task.classes)).encode(), digest_size=16), None
    for e in examples:
        prompts = task.prompts(e)
        found.update(repr((e.id, e.text, e.choices, e.target, None if prompts is shared else tuple(prompts))).encode())
        shared = prompts
    return found.hexdigest()
