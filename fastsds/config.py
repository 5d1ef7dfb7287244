"""Recipes: what to train. Typed, frozen, strict.

A recipe is a YAML file with the keys of `Recipe`. The shipped recipes write every value. A recipe of your own may leave
keys out; each then takes the default written in this file, which is the value in `configs/world.yaml`.

* A key that is not known is an error that names the file, the key and the nearest known key.
* A value of the wrong type, outside its range, or not among its choices is an error that says what was expected.
* Paths in a recipe are relative to the folder of the recipe; paths in `--set a.b=c` are relative to the current folder.

Every error is a `ConfigError`; the command line prints it and exits with code 2.
"""
import dataclasses
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from fastsds.strict import ConfigError, key_of, merge, parse, read_yaml, show

_HERE = Path(__file__).resolve().parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"   # wheel | source tree


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 8
    alpha: float = 16.0                 # the product is scaled by alpha / rank
    targets: tuple[str, ...] = ("*attn*weight",)    # patterns of matrices' names


@dataclass(frozen=True)
class StudentConfig:
    model: str = "world"                # "world", a folder of open_clip's or transformers', an open_clip name, hf-hub:ORG/NAME
    pretrained: str | None = None       # a tag, a file or hf-hub:ORG/NAME, for an open_clip name
    tune: Literal["layernorm", "all", "lora"] | tuple[str, ...] = "all"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    checkpoint: bool = False
    compile: Literal["default", "max-autotune"] | None = None


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
class EvalConfig:
    suite: str = "world_dev"            # a suite's name, or "none"
    data: str | None = None             # where it lies; null: the world's are made
    every: int = 200                    # 0: only at the start and at the end
    items: int | None = None            # the first ones alone; null: all


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = False           # also OUTPUT/tensorboard
    wandb: str | None = None            # a project of Weights & Biases; WANDB_MODE=offline works


@dataclass(frozen=True)
class Recipe:
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


# key: (test, what is expected). A value of null or "auto" has no range.
_RANGES = {}
for _keys, _test, _text in (
    ("data.batch data.accumulation data.streams data.samples head.samples bank.draws loss.sds_every log_every eval.items "
     "student.lora.rank", lambda v: v >= 1, "at least 1"),
    ("steps head.warmup_steps head.ridge teacher.micro_batch bank.refresh_every data.workers loss.lambda "
     "optimizer.weight_decay optimizer.warmup optimizer.clip checkpoint_every eval.every", lambda v: v >= 0, "at least 0"),
    ("data.max_skipped", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("loss.rho optimizer.lr optimizer.head_lr optimizer.eps student.lora.alpha", lambda v: v > 0, "greater than 0"),
    ("student.tune student.lora.targets", lambda v: len(v) and all(map(str.strip, v)), "at least one pattern, none empty"),
    ("seed bank.seed data.subset", lambda v: -2**63 <= v < 2**63, "a signed 64-bit integer"),
    ("optimizer.betas", lambda v: all(0 <= b < 1 for b in v), "two numbers with 0 <= beta < 1"),
    ("loss.t", lambda v: 0 <= v[0] < v[1] <= 1, "[lo, hi] with 0 <= lo < hi <= 1"),
    ("loss.log_snr", lambda v: v[0] < v[1], "[lo, hi] with lo < hi"),
    ("output student.model teacher.path teacher.attention bank.path data.source data.split data.cache log.wandb "
     "eval.suite eval.data",
     lambda v: bool(v.strip()), "a text that is not empty"),
):
    _RANGES.update(dict.fromkeys(_keys.split(), (_test, _text)))

_ALWAYS_PATHS = ("teacher.path", "bank.path", "data.source", "data.images", "data.cache",
                 "eval.data")        # unless "world"
_SOMETIMES_PATHS = ("student.model", "student.pretrained")            # a name, or a folder or file


def _get(recipe: Recipe, key: str):
    for name in key.split("."):
        recipe = getattr(recipe, "lambda_" if name == "lambda" else name)
    return recipe


# -- paths -------------------------------------------------------------------------------------------------------------

def _resolve(recipe: Recipe, keys, folder: Path) -> Recipe:
    """Make the paths under `keys` absolute, relative to `folder`."""
    for key in keys:
        value = _get(recipe, key)
        if not value or value == "world" or "://" in value or re.match(r"[a-z-]+:", value):    # hf-hub:..., local-dir:...
            continue
        path = Path(value).expanduser()
        if key in _SOMETIMES_PATHS and not (value.startswith((".", "~", "/")) or (folder / path).exists()):
            continue                                                  # a name that open_clip knows
        section, name = key.split(".")
        absolute = str((folder / path).resolve())
        recipe = dataclasses.replace(
            recipe, **{section: dataclasses.replace(getattr(recipe, section), **{name: absolute})})
    return recipe


# -- public ------------------------------------------------------------------------------------------------------------

class Over(NamedTuple):
    """Values over a recipe. Of `values` the keys are whole ("loss.t"); folder: what their paths are relative to."""

    origin: str
    values: dict[str, Any]
    folder: Path


def load_recipe(
    path: str | Path | Recipe | None = None, overrides: Sequence[str | Over] = (), checked: bool = True
) -> Recipe:
    """Read a recipe, or take one, and apply `a.b=c` overrides in order; without it, start from the embedded world's recipe.

    Args: overrides, each "key=value" with the full key and a YAML value: "loss.lambda=auto", "loss.t=[0.3, 1.0]"; or an `Over`.
        checked: False leaves ranges and what keys ask of each other to a later call.
    Raises: ConfigError for a missing file, an unknown or repeated key, a wrong type, a value out of range.
    """
    recipe, origins = path if isinstance(path, Recipe) else Recipe(), {}
    if isinstance(path, (str, Path)):
        path = Path(path)
        recipe = merge(recipe, read_yaml(path, "recipe"), str(path), origins)
        recipe = _resolve(recipe, _ALWAYS_PATHS + _SOMETIMES_PATHS, path.resolve().parent)
    for override in overrides:
        over, own = _of_text(override) if isinstance(override, str) else override, {}
        for key, value in over.values.items():
            for name in reversed(str(key).split(".")):
                value = {name: value}
            recipe = merge(recipe, value, over.origin, own)
        recipe = _resolve(recipe, [k for k in _ALWAYS_PATHS + _SOMETIMES_PATHS if k in own], over.folder)
        origins |= own
    if checked:
        file = path if isinstance(path, (str, Path)) else "default recipe"
        _check_values(recipe, lambda key: origins.get(key, str(file)))
    return recipe


def _of_text(override: str) -> Over:
    """What `--set key=value` says."""
    origin = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{origin}: expected key=value, for example loss.lambda=30")
    return Over(origin, {key.strip(): parse(text, origin)}, Path.cwd())


def _check_values(recipe: Recipe, origin) -> None:
    for key, (test, expected) in _RANGES.items():
        value = _get(recipe, key)
        if value is not None and value != "auto" and not test(value):
            raise ConfigError(f"{origin(key)}: {key} is {show(value)}; expected {expected}")
    if (recipe.loss.t is None) == (recipe.loss.log_snr is None):
        both = "both" if recipe.loss.t else "neither"
        raise ConfigError(f"{origin('loss.log_snr')}: {both} of loss.t and loss.log_snr are given; expected exactly one "
                          "(write null for the other)")
    if recipe.loss.gradient == "amortised":
        for key, wrong, why in (
            ("bank.path", recipe.bank.path is None, "the folder of the bank that `fastsds bank build` makes"),
            ("loss.noised", not recipe.loss.noised, "true: a target is what the teacher sees in a noised latent"),
        ):
            if wrong:
                raise ConfigError(f"{origin(key)}: {key} is {show(_get(recipe, key))}; expected with loss.gradient amortised: "
                                  f"{why}")
    if recipe.bank.path and recipe.loss.captions != "own":
        raise ConfigError(f"{origin('loss.captions')}: loss.captions is 'shuffled'; expected own with bank.path, which holds "
                          "the samples' own captions")
    if 0 < recipe.bank.refresh_every < recipe.bank.draws:
        raise ConfigError(f"{origin('bank.draws')}: bank.draws is {recipe.bank.draws}, but bank.refresh_every replaces the "
                          f"targets after {recipe.bank.refresh_every} epochs, one draw each; expected at most as many draws")
    if recipe.loss.shift and recipe.loss.log_snr is None:
        raise ConfigError(f"{origin('loss.shift')}: loss.shift moves loss.log_snr only; expected 0.0 with loss.t")


def load_deepspeed(path: str | Path) -> dict:
    """Read a DeepSpeed configuration (JSON): how to shard. Raises ConfigError if it is missing or not a JSON object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {show(values)}")
    return values


def check(recipe: Recipe, world_size: int = 1, deepspeed_json: dict | None = None) -> None:
    """Check everything that a recipe cannot know alone: the ranks, the DeepSpeed file, the files it points at.

    contrastive batch = micro-batch x ranks; DeepSpeed's train_batch_size = contrastive batch x accumulation.
    Raises: ConfigError.
    """
    batch, accumulation = recipe.data.batch, recipe.data.accumulation
    if batch % world_size:
        raise ConfigError(f"data.batch is {batch}, the contrastive batch over all ranks; expected a multiple of "
                          f"{world_size}, the number of ranks")
    if recipe.data.streams % world_size:
        raise ConfigError(f"data.streams is {recipe.data.streams}; expected a multiple of {world_size}, the number of ranks "
                          f"(--set data.streams={max(1, recipe.data.streams // world_size) * world_size})")
    asks = recipe.loss.gradient != "amortised"      # else it is a bank that is made by so many at a time, of any data
    if asks and recipe.teacher.micro_batch and (batch // world_size) % recipe.teacher.micro_batch:
        raise ConfigError(f"teacher.micro_batch is {recipe.teacher.micro_batch}; expected a divisor of {batch // world_size}, "
                          "a rank's part of data.batch, so that the UNet sees one shape")
    for key, value in (("data.source", recipe.data.source), ("data.images", recipe.data.images),
                       ("teacher.path", recipe.teacher.path)):
        if value and value != "world" and "{" not in value and Path(value).is_absolute() and not Path(value).exists():
            raise ConfigError(f"{key}: no such file or folder: {value}")
    if recipe.loss.negatives == "swapped" and recipe.data.source != "world":
        raise ConfigError("loss.negatives is 'swapped', which needs captions with swapped roles; only data.source world "
                          "has them: expected none")
    for key, wanted, package in (("log.tensorboard", recipe.log.tensorboard, "tensorboard"),
                                 ("log.wandb", recipe.log.wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key} is {show(wanted)}, and the package {package} is missing: "
                              "pip install 'fastsds[logs]'")
    config = deepspeed_json or {}
    zero = config.get("zero_optimization")
    if recipe.student.compile and isinstance(zero, dict) and zero.get("stage") == 3:
        raise ConfigError(f"student.compile is {show(recipe.student.compile)}; expected null with ZeRO 3, whose linear layer "
                          "torch.compile differentiates wrongly; ZeRO 0 to 2 compile")
    for key, expected, reason in (
        ("train_micro_batch_size_per_gpu", batch // world_size, f"data.batch {batch} / {world_size} ranks"),
        ("gradient_accumulation_steps", accumulation, "data.accumulation"),
        ("train_batch_size", batch * accumulation, f"data.batch {batch} x data.accumulation {accumulation}"),
        ("gradient_clipping", recipe.optimizer.clip, "optimizer.clip"),
    ):
        if key in config and config[key] != expected:
            raise ConfigError(f"DeepSpeed file: {key} is {show(config[key])}, the recipe says {expected} ({reason}); "
                              "leave the key out of the DeepSpeed file or make them agree")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(f"DeepSpeed file: the section {key!r} belongs to the recipe (optimizer.*); take it out")
    for key in ("bf16", "fp16"):
        section = config.get(key, {})
        enabled = section.get("enabled") if isinstance(section, dict) else section
        if enabled is not None and enabled != (recipe.precision == key):
            raise ConfigError(f"DeepSpeed file: {key}.enabled is {show(enabled)}, the recipe's precision is "
                              f"{recipe.precision}; leave the key out of the DeepSpeed file or make them agree")


def as_dict(recipe: Recipe) -> dict:
    """The recipe as plain dicts, lists and scalars, keyed as in YAML."""
    def plain(value):
        if dataclasses.is_dataclass(value):
            return {key_of(f.name): plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value
    return plain(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every value written; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
