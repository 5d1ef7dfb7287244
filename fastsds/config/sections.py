"""Sections that recipes share, and the ranges of their values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 8
    alpha: float = 16.0                 # the product is scaled by alpha / rank
    targets: tuple[str, ...] = ("*attn*weight",)    # patterns of matrices' names


@dataclass(frozen=True)
class StudentConfig:
    model: str = "world"                # "world", a folder of its library's, hf-hub:ORG/NAME; of a CLIP also open_clip's names
    pretrained: str | None = None       # a tag, a file or hf-hub:ORG/NAME, for an open_clip name
    tune: Literal["layernorm", "all", "lora"] | tuple[str, ...] = "all"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    checkpoint: bool = False
    compile: Literal["default", "max-autotune"] | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 1e-3
    head_lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 30
    clip: float = 1.0                   # global gradient norm; 0: no clipping


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = False           # also OUTPUT/tensorboard
    wandb: str | None = None            # a project of Weights & Biases; WANDB_MODE=offline works


# key: (test, what is expected). A value of null or "auto" has no range.
Ranges = dict[str, tuple[Callable[[Any], bool], str]]


def ranges(*rows: tuple[str, Callable[[Any], bool], str]) -> Ranges:
    """Args: rows: (keys, test, what is expected)."""
    return {key: (test, text) for keys, test, text in rows for key in keys.split()}


AT_LEAST_1 = (lambda v: v >= 1), "at least 1"
AT_LEAST_0 = (lambda v: v >= 0), "at least 0"
ABOVE_0 = (lambda v: v > 0), "greater than 0"
NOT_EMPTY = (lambda v: bool(v.strip())), "a text that is not empty"
WORD = (lambda v: -(2**63) <= v < 2**63), "a signed 64-bit integer"
SHARED = ranges(
    ("data.batch data.accumulation data.streams log_every student.lora.rank", *AT_LEAST_1),
    ("steps data.workers optimizer.weight_decay optimizer.warmup optimizer.clip checkpoint_every eval.every", *AT_LEAST_0),
    ("optimizer.lr optimizer.head_lr optimizer.eps student.lora.alpha", *ABOVE_0),
    ("data.max_skipped", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("student.tune student.lora.targets", lambda v: len(v) and all(map(str.strip, v)), "at least one pattern, none empty"),
    ("optimizer.betas", lambda v: all(0 <= b < 1 for b in v), "two numbers with 0 <= beta < 1"),
    ("output student.model log.wandb", *NOT_EMPTY),
    ("seed", *WORD),
)
