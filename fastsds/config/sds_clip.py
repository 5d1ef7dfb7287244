"""The recipe of SDS-CLIP."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastsds.config.sections import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    NOT_EMPTY,
    SHARED,
    WORD,
    LogConfig,
    OptimizerConfig,
    StudentConfig,
    ranges,
)
from fastsds.strict import ConfigError, show


@dataclass(frozen=True)
class HeadConfig:
    init: Literal["default", "warmup", "ridge"] = "default"
    samples: int = 2048
    warmup_steps: int = 100
    ridge: float = 1e-3


@dataclass(frozen=True)
class TeacherConfig:
    path: str = "world"                 # "world", a diffusers folder, a .safetensors file, or hf-hub:ORG/NAME
    prediction_type: Literal["epsilon", "v_prediction"] | None = None     # null: what the folder or file says
    micro_batch: int = 0                # images the UNet sees at a time; 0: a rank's whole batch
    accelerate: bool | Literal["auto"] = "auto"     # auto: on a GPU
    attention: str = "auto"             # a backend's name, or "keep": diffusers' own processors
    compile: Literal["default", "max-autotune"] | None = None
    cuda_graph: bool = False
    checkpoint: bool = False


@dataclass(frozen=True)
class BankConfig:
    path: str | None = None             # a folder of the teacher's targets; null: none
    draws: int = 8                      # K, targets a sample
    refresh_every: int = 0              # epochs; 0: the same targets for the whole run
    seed: int = 0                       # of the bank's timesteps and noise


@dataclass(frozen=True)
class DataConfig:
    source: str = "world"               # "world", or a file, folder, shards: see docs/data.md
    images: str | None = None           # the folder that a file's image names are relative to; null: the file's own
    split: str | None = None            # of a Karpathy JSON; null: train and restval
    samples: int | None = None          # N images; null: all
    subset: int | None = None           # which N: drawn by this seed, fewer being some of more; null: the first
    caption: Literal["random", "first"] = "random"      # of an image with several: one drawn for each epoch, or the first
    batch: int = 32                     # contrastive batch over all ranks
    accumulation: int = 2               # contrastive batches an optimizer step
    streams: int = 64                   # logical streams that share the data out; a multiple of the ranks
    workers: int = 0                    # threads that decode
    cache: str | None = None            # a folder on a local disk for decoded images
    max_skipped: float = 0.001          # the share of damaged samples that is passed over


@dataclass(frozen=True)
class LossConfig:
    lambda_: float | Literal["auto"] = 30.0     # key `lambda`
    rho: float = 1.0
    gradient: Literal["sds", "amortised", "full", "latents"] = "sds"
    reference: Literal["noise"] = "noise"
    noised: bool = True
    weighting: Literal["uniform", "sigma2", "alpha_sigma2", "inverse_snr_root"] = "inverse_snr_root"
    t: tuple[float, float] | None = (0.5, 0.9)
    log_snr: tuple[float, float] | None = None
    shift: float = 0.0
    sds_every: int = 1
    captions: Literal["own", "shuffled"] = "own"
    negatives: Literal["none", "swapped"] = "none"


@dataclass(frozen=True)
class EvalConfig:
    suite: str = "world_dev"            # a suite's name, or "none"
    data: str | None = None             # where it lies; null: the world's are made
    every: int = 200                    # 0: only at the start and at the end
    items: int | None = None            # the first ones alone; null: all


@dataclass(frozen=True)
class Recipe:
    recipe: Literal["sds_clip"] = "sds_clip"
    seed: int = 0
    output: str = "runs/world"
    steps: int = 1000
    precision: Literal["fp32", "bf16"] = "fp32"
    student: StudentConfig = field(default_factory=StudentConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 20
    log: LogConfig = field(default_factory=LogConfig)       # beside metrics.jsonl
    checkpoint_every: int = 0           # 0: only at the end
    eval: EvalConfig = field(default_factory=EvalConfig)

    # What follows is of the class: no annotations, so no keys.
    called = "recipe"
    ranges = SHARED | ranges(
        ("data.samples head.samples bank.draws loss.sds_every eval.items", *AT_LEAST_1),
        ("head.warmup_steps head.ridge teacher.micro_batch bank.refresh_every loss.lambda", *AT_LEAST_0),
        ("loss.rho", *ABOVE_0),
        ("bank.seed data.subset", *WORD),
        ("loss.t", lambda v: 0 <= v[0] < v[1] <= 1, "[lo, hi] with 0 <= lo < hi <= 1"),
        ("loss.log_snr", lambda v: v[0] < v[1], "[lo, hi] with lo < hi"),
        ("teacher.path teacher.attention bank.path data.source data.split data.cache eval.suite eval.data", *NOT_EMPTY),
    )
    paths = ("teacher.path", "bank.path", "data.source", "data.images", "data.cache", "eval.data")     # unless "world"
    maybe_paths = ("student.model", "student.pretrained")       # a name, or a folder or file

    def check_values(self, origin) -> None:
        """What keys ask of each other. Args: origin: key -> what to name in an error. Raises: ConfigError."""
        loss, bank = self.loss, self.bank
        if (loss.t is None) == (loss.log_snr is None):
            both = "both" if loss.t else "neither"
            raise ConfigError(f"{origin('loss.log_snr')}: {both} of loss.t and loss.log_snr are given; expected exactly one "
                              "(write null for the other)")
        if loss.gradient == "amortised":
            for key, value, wrong, why in (
                ("bank.path", bank.path, bank.path is None, "the folder of the bank that `fastsds bank build` makes"),
                ("loss.noised", loss.noised, not loss.noised, "true: a target is what the teacher sees in a noised latent"),
            ):
                if wrong:
                    asked = "expected with loss.gradient amortised"
                    raise ConfigError(f"{origin(key)}: {key} is {show(value)}; {asked}: {why}")
        if bank.path and loss.captions != "own":
            raise ConfigError(f"{origin('loss.captions')}: loss.captions is 'shuffled'; expected own with bank.path, which "
                              "holds the samples' own captions")
        if 0 < bank.refresh_every < bank.draws:
            raise ConfigError(f"{origin('bank.draws')}: bank.draws is {bank.draws}, but bank.refresh_every replaces the "
                              f"targets after {bank.refresh_every} epochs, one draw each; expected at most as many draws")
        if loss.shift and loss.log_snr is None:
            raise ConfigError(f"{origin('loss.shift')}: loss.shift moves loss.log_snr only; expected 0.0 with loss.t")

    def check(self, world_size: int) -> None:
        """What a recipe cannot know alone: the ranks, the files it points at. Raises: ConfigError."""
        asks = self.loss.gradient != "amortised"        # else it is a bank that is made by so many at a time, of any data
        part = self.data.batch // world_size
        if asks and self.teacher.micro_batch and part % self.teacher.micro_batch:
            raise ConfigError(f"teacher.micro_batch is {self.teacher.micro_batch}; expected a divisor of {part}, "
                              "a rank's part of data.batch, so that the UNet sees one shape")
        for key, value in (("data.source", self.data.source), ("data.images", self.data.images),
                           ("teacher.path", self.teacher.path)):
            if value and value != "world" and "{" not in value and Path(value).is_absolute() and not Path(value).exists():
                raise ConfigError(f"{key}: no such file or folder: {value}")
        if self.loss.negatives == "swapped" and self.data.source != "world":
            raise ConfigError("loss.negatives is 'swapped', which needs captions with swapped roles; only data.source world "
                              "has them: expected none")
