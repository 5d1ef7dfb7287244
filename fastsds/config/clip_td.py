"""The recipe of CLIP-TD."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastsds.config.sections import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    NOT_EMPTY,
    SHARED,
    LogConfig,
    LoRAConfig,
    OptimizerConfig,
    StudentConfig,
    ranges,
)
from fastsds.strict import ConfigError, show


@dataclass(frozen=True)
class ClipConfig:
    model: str = "world"                # a CLIP: all that `student.model` of SDS-CLIP may be
    pretrained: str | None = None       # a tag, a file or hf-hub:ORG/NAME, for an open_clip name


@dataclass(frozen=True)
class AdaptationConfig:
    steps: int = 0                      # contrastive steps of the teacher on the task's training pairs; 0: none
    batch: int = 32                     # over all ranks
    lr: float = 1e-3
    warmup: int = 10
    tune: Literal["layernorm", "all"] | tuple[str, ...] = "all"


@dataclass(frozen=True)
class TargetsConfig:
    path: str | None = None             # a folder for what CLIP says of the examples; null: OUTPUT/targets
    select: Literal["all", "pooled", "targeted"] = "targeted"
    k: int | None = 4                   # of select targeted: so many tokens a side, or
    mass: float | None = None           # as few as have this share of the relevance


@dataclass(frozen=True)
class ShiftConfig:
    by: str | None = None               # the field of examples by which training and testing differ; null: no shift
    train: tuple[str, ...] | None = None    # its values in training; null: those that test lacks
    test: tuple[str, ...] | None = None     # and in testing, where splits are called SPLIT_shift
    share: float | None = None          # in place of both: the share of values that are drawn for training
    lists: dict = field(default_factory=dict)   # or splits by files of ids, {train: FILE, test: FILE}


@dataclass(frozen=True)
class TaskDataConfig:
    task: str = "world_entailment"      # a task's name: docs/tasks.md
    folder: str | None = None           # where its files lie; null: the world's are made
    options: dict = field(default_factory=dict)     # of its loader
    fraction: float = 1.0               # of the training examples: stratified, nested, drawn by the recipe's seed
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    batch: int = 64                     # over all ranks
    accumulation: int = 1               # batches an optimizer step
    streams: int = 64                   # logical streams that share the data out; a multiple of the ranks
    workers: int = 0                    # threads that decode
    max_skipped: float = 0.001          # the share of damaged images that is passed over


@dataclass(frozen=True)
class DistillationConfig:
    beta: float = 1.0                   # 0: the task alone, without a teacher
    weight: Literal["none", "teacher", "relative"] = "relative"
    distance: Literal["l1", "l2", "cosine"] = "l1"


@dataclass(frozen=True)
class TaskEvalConfig:
    splits: tuple[str, ...] = ("dev",)
    every: int = 200                    # 0: only at the start and at the end
    examples: int | None = None         # the first ones of each split alone; null: all


@dataclass(frozen=True)
class CLIPTDRecipe:
    recipe: Literal["clip_td"] = "clip_td"
    seed: int = 0
    output: str = "runs/clip_td_world"
    steps: int = 400
    precision: Literal["fp32", "bf16"] = "fp32"
    student: StudentConfig = field(default_factory=lambda: StudentConfig(lora=LoRAConfig(targets=("*attention*weight",))))
    teacher: ClipConfig = field(default_factory=ClipConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 20
    log: LogConfig = field(default_factory=LogConfig)       # beside metrics.jsonl
    checkpoint_every: int = 0           # 0: only at the end
    eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)

    # What follows is of the class: no annotations, so no keys.
    called = "recipe"
    ranges = SHARED | ranges(
        ("adaptation.batch targets.k eval.examples", *AT_LEAST_1),
        ("adaptation.steps adaptation.warmup loss.beta", *AT_LEAST_0),
        ("adaptation.lr", *ABOVE_0),
        ("targets.mass data.fraction", lambda v: 0 < v <= 1, "greater than 0 and at most 1"),
        ("data.shift.share", lambda v: 0 < v < 1, "greater than 0 and below 1"),
        ("teacher.model teacher.pretrained targets.path data.task data.folder data.shift.by", *NOT_EMPTY),
        ("eval.splits", lambda v: len(v) == len(set(v)) and all(map(str.strip, v)), "names of splits, each once"),
    )
    paths = ("targets.path", "data.folder", "data.options.images", "data.options.answers", "data.shift.lists")
    maybe_paths = ("student.model", "student.pretrained", "teacher.model", "teacher.pretrained")    # a name, or a path

    def check_values(self, origin) -> None:
        """What keys ask of each other. Args: origin: key -> what to name in an error. Raises: ConfigError."""
        targets, shift = self.targets, self.data.shift
        chosen = [key for key in ("k", "mass") if getattr(targets, key) is not None]
        if len(chosen) != (targets.select == "targeted"):
            key = "targets.select" if targets.select != "targeted" else "targets.mass" if chosen else "targets.k"
            expected = "one of targets.k and targets.mass" if targets.select == "targeted" else "null for both"
            found = f"targets.k is {show(targets.k)} and targets.mass {show(targets.mass)}"
            raise ConfigError(f"{origin(key)}: {found}; expected {expected} with targets.select {targets.select}")
        sides = [key for key in ("train", "test", "share") if getattr(shift, key) is not None]
        if shift.by is None and sides:
            raise ConfigError(f"{origin(f'data.shift.{sides[0]}')}: data.shift.{sides[0]} is "
                              f"{show(getattr(shift, sides[0]))}; expected null without data.shift.by")
        if shift.by is not None and shift.lists:
            raise ConfigError(f"{origin('data.shift.lists')}: data.shift.lists and data.shift.by are given; expected one")
        if wrong := [name for name, file in shift.lists.items() if not isinstance(file, str) or not isinstance(name, str)]:
            raise ConfigError(f"{origin('data.shift.lists')}: data.shift.lists: {wrong[0]!r} is not a split with a file's name")
        if self.adaptation.steps and self.loss.beta == 0:
            raise ConfigError(f"{origin('adaptation.steps')}: adaptation.steps is {self.adaptation.steps}; expected 0 with "
                              "loss.beta 0, which asks no teacher")

    def check(self, world_size: int) -> None:
        """What a recipe cannot know alone: the ranks, the files it points at. Raises: ConfigError."""
        if self.adaptation.steps and self.adaptation.batch % world_size:
            raise ConfigError(f"adaptation.batch is {self.adaptation.batch}; expected a multiple of {world_size}, the ranks")
        if self.data.folder is not None and not Path(self.data.folder).is_dir():
            raise ConfigError(f"data.folder: no such folder: {self.data.folder}")
