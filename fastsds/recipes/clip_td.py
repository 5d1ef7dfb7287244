"""CLIP-TD (arXiv 2201.05729): a frozen CLIP teaches a cross-modal student while that is fine-tuned.

    L = L_task + beta * (L_text + L_visual)
    L_m = 1/B sum_b w_b * 1/|S_mb| sum over j in S_mb of d(P_m s_mbj, t_mbj)          (ops.token_distill_loss), m: text, visual

s the student's token features, P_m a linear map h -> d that trains with it, t CLIP's features led to the student's tokens
(`align_text`, `align_patches`), of unit mean square: t / |t| * sqrt(d), so that beta does not depend on the CLIP. S_mb the
tokens that are chosen (`choose`), w_b in [0, 1] how far CLIP is trusted with this example (`confidence`).

    L_task  cross-entropy for one right answer; for VQA's scores binary cross-entropy, summed over classes: two answers may
            both earn 1, and none may; a distribution made of the scores would say otherwise
    p       of the true answer: softmax(logits)[y]; with scores sum_c softmax(logits)_c score_c. For CLIP the logits are its
            scale times the cosines of the image and the prompts
    w       none: 1.  teacher: p_T.  relative: p_T / (p_T + p_S), 0 where p_T is: 1/2 where both know as much

Beyond the abstract the paper's formulas could not be verified: all of these are ours. Everything of CLIP is a constant, w too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastsds import ops
from fastsds.config import ConfigError
from fastsds.crossmodal import CrossModal, CrossModalOutput
from fastsds.data.tasks import Example
from fastsds.recipes.clip_tokens import Span
from fastsds.student.model import at_least_fp32

WEIGHTS = ("none", "teacher", "relative")
MASS_SLACK = 1e-9  # a sum of shares that rounding leaves below `mass` by this has reached it
TINY = 1e-30


class TeacherTargets(NamedTuple):
    """What CLIP says of some examples (clip_targets.py).

    Shapes: text, visual [b, K, d], of unit mean square; text_index, visual_index int64 [b, K], the student's tokens that they
    are for, -1 for none; probability fp32 [b], p_T; candidates int64 [b, 2], text and visual tokens that were chosen from.
    """

    text: torch.Tensor
    text_index: torch.Tensor
    visual: torch.Tensor
    visual_index: torch.Tensor
    probability: torch.Tensor
    candidates: torch.Tensor

    def to(self, device: str | torch.device) -> "TeacherTargets":
        return TeacherTargets(*(x.to(device) for x in self))


class Projected(NamedTuple):
    """A training student's answer with its features in CLIP's space.

    Shapes: text [b, Lt, d], visual [b, Lv, d], or [b, 1, d] each where the pooled feature is distilled; pooled [b, h];
    logits [b, classes] or [b, choices].
    """

    text: torch.Tensor
    visual: torch.Tensor
    pooled: torch.Tensor
    logits: torch.Tensor


# -- what is compared with what ----------------------------------------------------------------------------------------


def align_text(
    student: Sequence[Sequence[Span]], teacher: Sequence[Sequence[Span]], features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lead CLIP's token features to the student's tokens: the mean of those that share characters, weighted by how many.

    Shapes: student, teacher [b] lists of spans of the same texts; features [b, L, d] -> [b, Lt, d] and bool [b, Lt], whether
    any does; Lt the most tokens of a text. Special tokens, and what a tokenizer cut off, share none.
    """
    s, t = (_table(spans, features.device) for spans in (student, teacher))
    shared = torch.minimum(s[:, :, None, 1], t[:, None, :, 1]) - torch.maximum(s[:, :, None, 0], t[:, None, :, 0])
    shared = F.pad(shared.clamp(min=0), (0, features.shape[1] - shared.shape[2]))  # [b, Lt, L]
    total = shared.sum(2, keepdim=True)
    return (shared.to(features.dtype) / total.clamp(min=1)) @ features, total.squeeze(2) > 0


def align_patches(features: torch.Tensor, grid: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
    """Resample CLIP's patches bilinearly at the centres of the student's; both see the same square.

    Shapes: [b, rows * columns, d] of `grid` -> [b, rows * columns, d] of `to`, row by row.
    """
    if tuple(grid) == tuple(to):
        return features
    picture = features.mT.unflatten(2, grid)
    return F.interpolate(picture, size=to, mode="bilinear", align_corners=False).flatten(2).mT


def relevance(features: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """The cosine of each token to the other side's pooled feature. Shapes: [b, n, d], [b, d] -> [b, n]."""
    return F.cosine_similarity(features, of[:, None], dim=2)


def choose(
    relevance: torch.Tensor,
    there: torch.Tensor,
    names: Sequence[str],
    k: int | None = None,
    mass: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Choose the most relevant tokens of each instance: the most relevant first, of equal ones the earlier.

    Shapes: relevance [b, n], there bool [b, n] -> int64 [b, K], -1 after an instance's last.
    Args:
        there: which may be chosen. names: what an error calls each instance.
        k: how many. mass: as few as have a share of at least `mass` in softmax(scale * relevance) over those that are there
            (float64, to 1e-9). Neither: all that are there, in their order.
    Raises: ConfigError naming the first instance of which fewer than k are there.
    """
    counts = there.sum(1)
    if k is None and mass is None:
        order = (~there).int().sort(dim=1, stable=True).indices
    else:
        ranked, order = relevance.masked_fill(~there, -math.inf).sort(dim=1, descending=True, stable=True)
        if k is not None:
            if (short := (counts < k).nonzero()).numel():
                raise too_few(names[b := int(short[0])], k, int(counts[b]))
            counts = torch.full_like(counts, k)
        else:
            shares = torch.where(there.any(1, keepdim=True), (scale * ranked.double()).softmax(1), 0.0)
            counts = torch.minimum(counts, (shares.cumsum(1) < mass - MASS_SLACK).sum(1) + 1)
    places = torch.arange(max(1, int(counts.max())), device=there.device)
    return order[:, : len(places)].where(places < counts[:, None], -1)


def too_few(name: str, k: int, there: int) -> ConfigError:
    return ConfigError(f"{name}: k is {k}, but {there} of its tokens can be chosen; expected a lower k")


def unit_mean_square(x: torch.Tensor) -> torch.Tensor:
    """x / |x| * sqrt(d). Shapes: [..., d]."""
    return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


# -- the task ----------------------------------------------------------------------------------------------------------


def reads(example: Example) -> tuple[str, ...]:
    """What the student reads: the text; of an example with choices, the text with each."""
    return tuple(f"{example.text} {choice}" for choice in example.choices) or (example.text,)


def labels_of(examples: Sequence[Example], classes: int) -> torch.Tensor:
    """The right answers. Shapes: int64 [b]; of examples with scores fp32 [b, classes]."""
    if not isinstance(examples[0].target, dict):
        return torch.tensor([e.target for e in examples])
    scores = torch.zeros(len(examples), classes)
    for row, example in zip(scores, examples, strict=True):
        for answer, score in example.target.items():
            row[answer] = score
    return scores


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, or of scores binary cross-entropy summed over classes; the mean over examples. Shapes: as `labels_of`."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)


def answer_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p of the true answer, in [0, 1], without gradient. Shapes: logits [b, classes], labels as `labels_of` -> [b]."""
    p = logits.detach().softmax(1)
    if labels.ndim == 1:
        return p.gather(1, labels[:, None]).squeeze(1)
    return (p * labels.to(p.dtype)).sum(1).clamp(max=1.0)  # rounding alone would pass 1


def confidence(kind: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """w, in [0, 1], without gradient. Shapes: p_T, p_S [b] -> [b]. Args: kind: one of `WEIGHTS`."""
    teacher, student = teacher.detach(), student.detach()
    if kind == "none":
        return torch.ones_like(student)
    return teacher if kind == "teacher" else teacher / (teacher + student).clamp(min=TINY)


# -- the objective -----------------------------------------------------------------------------------------------------


def add_projections(student: CrossModal, width: int, pooled: bool = False, seed: int = 0) -> None:
    """Hang P_text and P_visual on a student, h -> width each; while it trains, its forward then answers `Projected`.

    They run inside its forward, where an engine gathers what it sharded, and not at all in eval mode.
    Args: width: CLIP's d. pooled: project the pooled feature in place of the tokens (`select: pooled`).
    """
    like = next(student.head.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = {name: nn.Linear(student.width, width) for name in ("text", "visual")}
    student.projections = nn.ModuleDict(maps).to(like.device, like.dtype)

    def project(module: CrossModal, _, out: CrossModalOutput):
        if not module.training:
            return out
        text, visual = (out.pooled[:, None],) * 2 if pooled else (out.text, out.visual)
        found = []
        for name, x in (("text", text), ("visual", visual)):
            linear = module.projections[name]
            found.append(at_least_fp32(linear(x.to(linear.weight.dtype))))
        return Projected(*found, out.pooled, out.logits)

    student.register_forward_hook(project)


class CLIPTD:
    """The loss of one batch, of which this rank holds a part.

    Args: beta: 0: the task alone, without a teacher. weight: one of `WEIGHTS`. distance: of `ops.DISTANCES`.
    The gradient of a rank's loss, averaged over ranks of as many examples each, is the gradient of one rank with all of them.
    """

    def __init__(self, beta: float, weight: str = "relative", distance: str = "l1"):
        if not (math.isfinite(beta) and beta >= 0):
            raise ConfigError(f"beta: {beta!r}, expected a number of at least 0")
        for value, known, key in ((weight, WEIGHTS, "weight"), (distance, ops.DISTANCES, "distance")):
            if value not in known:
                raise ConfigError(f"{key}: {value!r}, expected {', '.join(known)}")
        self.beta, self.weight, self.distance = beta, weight, distance

    def __call__(
        self, out: Projected | CrossModalOutput, batch, step: int = 0, diagnose: bool = False
    ) -> dict[str, torch.Tensor]:
        """The loss of one micro-batch, and its parts.

        Args: out: the student's answer, with several choices for `of` = labels. batch: has labels, as `labels_of` gives them,
            and targets (`TeacherTargets`), or None. step, diagnose: of no use here: every step is alike, and tells all.
        Returns: 0-dim tensors: loss (to be differentiated), task, p_student; with beta also text and visual (L_text, L_visual),
            p_teacher, weight (its mean), share_text and share_visual (of the tokens that could be chosen).
        """
        labels, targets = batch.labels, batch.targets
        task, p_student = task_loss(out.logits, labels), answer_probability(out.logits, labels)
        parts = {"loss": task, "task": task.detach(), "p_student": p_student.mean()}
        if self.beta == 0:
            return parts
        if targets is None or not isinstance(out, Projected):
            raise ValueError(f"beta is {self.beta}: expected targets, and a training student with projections")
        w = confidence(self.weight, targets.probability.to(p_student.dtype), p_student)
        text = self._pull(out.text, targets.text, targets.text_index, w)
        visual = self._pull(out.visual, targets.visual, targets.visual_index, w)
        chosen = torch.stack([(index >= 0).sum(1) for index in (targets.text_index, targets.visual_index)], 1)
        share = (chosen / targets.candidates.clamp(min=1)).mean(0)
        return {
            **parts, "loss": task + self.beta * (text + visual), "text": text.detach(), "visual": visual.detach(),
            "p_teacher": targets.probability.mean(), "weight": w.mean(), "share_text": share[0], "share_visual": share[1],
        }  # fmt: skip

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass

    def _pull(self, student: torch.Tensor, teacher: torch.Tensor, index: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        places = torch.arange(index.shape[1], device=index.device).where(index >= 0, -1)
        return ops.token_distill_loss(student, teacher, index, places, weight=w, distance=self.distance)


def _table(spans: Sequence[Sequence[Span]], device: torch.device) -> torch.Tensor:
    """Spans as int64 [b, most of a text, 2]; (0, 0) for none."""
    n = max(map(len, spans))
    rows = [[span or (0, 0) for span in row] + [(0, 0)] * (n - len(row)) for row in spans]
    return torch.tensor(rows, device=device)
