"""Recipes: what to train. Typed, frozen, strict. A kind of recipe is one file here: sds_clip.py, clip_td.py.

A recipe is a YAML file; its key `recipe` says which kind (sds_clip, where it is not given). The shipped recipes write every
value. A recipe of your own may leave keys out; each then takes the default written in the kind's file, which is the value in
`configs/world.yaml`, or `configs/clip_td_world.yaml`.

* A key that is not known is an error that names the file, the key and the nearest known key.
* A value of the wrong type, outside its range, or not among its choices is an error that says what was expected.
* Paths in a recipe are relative to the folder of the recipe; paths in `--set a.b=c` are relative to the current folder.

Every error is a `ConfigError`; the command line prints it and exits with code 2.
"""

from fastsds.config.clip_td import (
    AdaptationConfig,
    ClipConfig,
    CLIPTDRecipe,
    DistillationConfig,
    ShiftConfig,
    TargetsConfig,
    TaskDataConfig,
    TaskEvalConfig,
)
from fastsds.config.loading import (
    CONFIGS,
    KINDS,
    AnyRecipe,
    Over,
    as_dict,
    check,
    dump_recipe,
    load_deepspeed,
    load_recipe,
)
from fastsds.config.sds_clip import BankConfig, DataConfig, EvalConfig, HeadConfig, LossConfig, Recipe, TeacherConfig
from fastsds.config.sections import LogConfig, LoRAConfig, OptimizerConfig, StudentConfig
from fastsds.strict import ConfigError

__all__ = [
    "CONFIGS", "KINDS", "AdaptationConfig", "AnyRecipe", "BankConfig", "CLIPTDRecipe", "ClipConfig", "ConfigError",
    "DataConfig", "DistillationConfig", "EvalConfig", "HeadConfig", "LoRAConfig", "LogConfig", "LossConfig", "OptimizerConfig",
    "Over", "Recipe", "ShiftConfig", "StudentConfig", "TargetsConfig", "TaskDataConfig", "TaskEvalConfig", "TeacherConfig",
    "as_dict", "check", "dump_recipe", "load_deepspeed", "load_recipe",
]  # fmt: skip
